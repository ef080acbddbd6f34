//! The merge loop that byte pair encoding and SentencePiece share: of all neighbours that may be
//! joined, the most urgent first, the leftmost among equals, until none are left.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// The id of a symbol that no token stands for.
pub(super) const NONE: u32 = u32::MAX;

/// A part of the text, a member of a linked list.
pub(super) struct Symbol {
    /// First byte.
    pub start: u32,
    /// Byte after the last; equal to `start` once another symbol has swallowed this one.
    pub end: u32,
    /// Its token, or [`NONE`].
    pub id: u32,
    prev: u32,
    next: u32,
}

/// Two neighbours as they were when they could be joined; fields in the order of urgency.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    priority: u32,
    left: u32,
    right: u32,
    end: u32,
    id: u32,
}

/// The list and the queue, kept between texts for their memory.
#[derive(Default)]
pub(super) struct Merger {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Candidate>>,
}

impl Merger {
    /// Forgets the last text.
    pub fn clear(&mut self) {
        self.symbols.clear();
        self.queue.clear();
    }

    /// Appends the symbol that ends at byte `end`.
    pub fn push(&mut self, end: usize, id: u32) {
        let at = self.symbols.len() as u32;
        let start = self.symbols.last().map_or(0, |s| s.end);
        self.symbols.push(Symbol {
            start,
            end: end as u32,
            id,
            prev: at.wrapping_sub(1),
            next: at + 1,
        });
    }

    /// Merges until nothing can be joined. `join` tells whether two neighbours can be: their
    /// priority, smallest first, and the token that they become.
    pub fn run(&mut self, join: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>) {
        for right in 1..self.symbols.len() as u32 {
            self.offer(right - 1, right, &join);
        }
        while let Some(Reverse(Candidate { left, right, end, id, .. })) = self.queue.pop() {
            // A left side that has grown has another neighbour; a right side, another end.
            let (l, r) = (&self.symbols[left as usize], &self.symbols[right as usize]);
            if l.end == l.start || l.next != right || r.end != end {
                continue;
            }
            let (prev, next) = (l.prev, r.next);
            self.symbols[right as usize].end = self.symbols[right as usize].start;
            let l = &mut self.symbols[left as usize];
            (l.end, l.id, l.next) = (end, id, next);
            if let Some(after) = self.symbols.get_mut(next as usize) {
                after.prev = left;
            }
            self.offer(prev, left, &join);
            self.offer(left, next, &join);
        }
    }

    fn offer(
        &mut self,
        left: u32,
        right: u32,
        join: impl Fn(&Symbol, &Symbol) -> Option<(u32, u32)>,
    ) {
        let (Some(l), Some(r)) =
            (self.symbols.get(left as usize), self.symbols.get(right as usize))
        else {
            return;
        };
        if let Some((priority, id)) = join(l, r) {
            self.queue.push(Reverse(Candidate { priority, left, right, end: r.end, id }));
        }
    }

    /// The symbols that are left, in order.
    pub fn finished(&self) -> impl Iterator<Item = &Symbol> {
        self.symbols.iter().filter(|s| s.end > s.start)
    }
}
