//! Masks: which keys a query sees, and how often a prompt is read.
//!
//! A [`Kind`] is an entry of the registry. A [`Choice`] is a kind with values for its parameters:
//! `causal`, `window:n=256`. Only tokens of one prompt may see later ones, and only within it; all
//! other tokens see none that follow. A layer that was trained with a window keeps to it, whatever
//! the mask: keys as far away as its width, or farther, before the query or after it, stay hidden.

use std::ops::Range;

use crate::bad_usage;
use crate::error::Result;
use crate::param::{self, Domain, Param, param};

/// An entry of the registry.
pub struct Kind {
    /// The name on the command line and in files.
    pub name: &'static str,
    /// What is seen.
    pub what: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// Its parameters, whole numbers.
    pub params: &'static [Param],
    /// How often a prompt is read, one copy after the other.
    pub copies: usize,
    /// What the query at a position sees, given the values of `params`, the position, and the
    /// positions of a prompt, which the query belongs to if it is among them.
    pub visible: fn(&[usize], usize, &Range<usize>) -> Visible,
}

/// Every mask.
pub static MASKS: &[&Kind] =
    &[&CAUSAL, &PREFIX, &SINK_PREFIX, &WINDOW, &SINKS_WINDOW, &BLOCKS, &REPEAT];

/// Keys, or tokens, at least one.
const SOME: Domain = Domain::Whole(1.0, 1e9);
/// The same, or none.
const ANY: Domain = Domain::Whole(0.0, 1e9);
const SINKS: &str = "first tokens of the context";

static CAUSAL: Kind = Kind {
    name: "causal",
    what: "every key up to the query itself",
    paper: "Vaswani et al. 2017, arXiv 1706.03762, section 3.2.3",
    params: &[],
    copies: 1,
    visible: |_, position, _| Visible::one(0..position + 1),
};

static PREFIX: Kind = Kind {
    name: "prefix",
    what: "tokens of a prompt see all of it and what is before it",
    paper: "Raffel et al. 2020, arXiv 1910.10683, section 3.2.1",
    params: &[],
    copies: 1,
    visible: |_, position, prompt| match prompt.contains(&position) {
        true => Visible::one(0..prompt.end),
        false => Visible::one(0..position + 1),
    },
};

static SINK_PREFIX: Kind = Kind {
    name: "sink-prefix",
    what: "as prefix, but the first tokens stay causal, as those that attention sinks form on",
    paper: "prefix, with the sinks of Xiao et al. 2023, arXiv 2309.17453",
    params: &[param("sinks", SINKS, 4.0, ANY)],
    copies: 1,
    visible: |p, position, prompt| match position < p[0] {
        true => Visible::one(0..position + 1),
        false => (PREFIX.visible)(p, position, prompt),
    },
};

static WINDOW: Kind = Kind {
    name: "window",
    what: "the last keys, the query's own included",
    paper: "Beltagy et al. 2020, arXiv 2004.05150, section 3.1; causal as in arXiv 2310.06825",
    params: &[param("n", "keys", 256.0, SOME)],
    copies: 1,
    visible: |p, position, _| Visible::one((position + 1).saturating_sub(p[0])..position + 1),
};

static SINKS_WINDOW: Kind = Kind {
    name: "sinks-window",
    what: "the first keys and the last ones; positions stay those in the context, not in a cache",
    paper: "Xiao et al. 2023, arXiv 2309.17453, section 3.2",
    params: &[param("sinks", SINKS, 4.0, ANY), param("n", "last keys", 256.0, SOME)],
    copies: 1,
    visible: |p, position, _| {
        let end = position + 1;
        Visible::new(0..p[0].min(end), end.saturating_sub(p[1])..end)
    },
};

static BLOCKS: Kind = Kind {
    name: "blocks",
    what: "tokens of a prompt see all of their block, counted from its start, and what is before it",
    paper: "after Katz et al. 2024, arXiv 2412.18487, where blocks are the parts of a chat's prompt",
    params: &[param("n", "tokens of a block", 64.0, SOME)],
    copies: 1,
    visible: |p, position, prompt| match prompt.contains(&position) {
        true => {
            let start = position - (position - prompt.start) % p[0];
            Visible::one(0..prompt.end.min(start + p[0]))
        }
        false => Visible::one(0..position + 1),
    },
};

static REPEAT: Kind = Kind {
    name: "repeat",
    what: "causal, but a prompt is read twice: its second copy sees the first; for all layers only",
    paper: "Leviathan et al. 2025, Prompt Repetition Improves Non-Reasoning LLMs; Xu et al. 2023, arXiv 2309.06275",
    params: &[],
    copies: 2,
    visible: CAUSAL.visible,
};

/// The mask of this name.
pub fn find(name: &str) -> Result<&'static Kind> {
    match MASKS.iter().find(|m| m.name == name) {
        Some(kind) => Ok(kind),
        None => {
            let known: Vec<_> = MASKS.iter().map(|m| m.describe()).collect();
            bad_usage!("mask \"{name}\" is not known; known: {}", known.join("; "))
        }
    }
}

impl Kind {
    /// The name and the parameters, as messages show them.
    fn describe(&self) -> String {
        let params: Vec<_> = self.params.iter().map(Param::describe).collect();
        match params.is_empty() {
            true => self.name.into(),
            false => format!("{}: {}", self.name, params.join(", ")),
        }
    }
}

/// A kind with values for its parameters.
#[derive(Clone)]
pub struct Choice {
    kind: &'static Kind,
    values: Vec<f32>,
    /// The same, as the kind takes them.
    numbers: Vec<usize>,
}

impl Choice {
    /// A kind with its defaults.
    pub fn of(kind: &'static Kind) -> Choice {
        Choice::with(kind, kind.params.iter().map(|p| p.default).collect())
    }

    fn with(kind: &'static Kind, values: Vec<f32>) -> Choice {
        let numbers = values.iter().map(|v| *v as usize).collect();
        Choice { kind, values, numbers }
    }

    /// Reads `NAME[:key=value,..]`.
    pub fn parse(text: &str) -> Result<Choice> {
        let (name, rest) = param::split(text);
        let Choice { kind, values, .. } = Choice::of(find(name)?);
        let values = param::read(&format!("mask {name}"), kind.params.iter(), values, rest)?;
        Ok(Choice::with(kind, values))
    }

    /// The kind.
    pub fn kind(&self) -> &'static Kind {
        self.kind
    }

    /// What [`Choice::parse`] reads, with those values that are not defaults.
    pub fn text(&self) -> String {
        param::show(self.kind.name, self.kind.params.iter(), &self.values)
    }

    /// What the query at `position` sees, which belongs to `prompt` if it is in it. `window` is the
    /// number of keys that the model's layer was trained to see, itself included.
    pub fn visible(
        &self,
        position: usize,
        prompt: &Range<usize>,
        window: Option<usize>,
    ) -> Visible {
        let seen = (self.kind.visible)(&self.numbers, position, prompt);
        match window {
            Some(n) => seen.within((position + 1).saturating_sub(n)..position.saturating_add(n)),
            None => seen,
        }
    }
}

/// The positions that a query sees: one range, or two with a gap between them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visible([Range<usize>; 2]);

impl Visible {
    /// Positions in either of two ranges, the later one second.
    pub fn new(a: Range<usize>, b: Range<usize>) -> Visible {
        Visible(match (a.is_empty(), b.is_empty()) {
            (true, true) => [0..0, 0..0],
            (true, _) => [0..0, b],
            (_, true) => [0..0, a],
            _ if a.end >= b.start => [0..0, a.start.min(b.start)..a.end.max(b.end)],
            _ => [a, b],
        })
    }

    /// Positions in one range.
    pub fn one(range: Range<usize>) -> Visible {
        Visible::new(0..0, range)
    }

    /// The ranges; the first is empty where there is only one, both are where nothing is seen.
    pub fn ranges(&self) -> &[Range<usize>; 2] {
        &self.0
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0[0].len() + self.0[1].len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What follows the last.
    pub fn end(&self) -> usize {
        self.0[1].end
    }

    /// Whether this position is one of them.
    pub fn contains(&self, position: usize) -> bool {
        self.0.iter().any(|range| range.contains(&position))
    }

    /// Copies what lies side by side, one element for each of them, to their places.
    pub fn spread(&self, from: &[f32], to: &mut [f32]) {
        let [a, b] = &self.0;
        let (before, after) = from.split_at(a.len());
        to[a.clone()].copy_from_slice(before);
        to[b.clone()].copy_from_slice(after);
    }

    /// Those of them in a range.
    fn within(self, range: Range<usize>) -> Visible {
        let cut = |r: Range<usize>| r.start.max(range.start)..r.end.min(range.end);
        let Visible([a, b]) = self;
        Visible::new(cut(a), cut(b))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_are_one() {
        assert_eq!(Visible::new(0..4, 4..9), Visible::one(0..9));
        assert_eq!(Visible::new(0..4, 2..3), Visible::one(0..4));
        assert_eq!(Visible::new(0..4, 7..7), Visible::one(0..4));
        assert_eq!(Visible::new(0..4, 5..9).ranges(), &[0..4, 5..9]);
        assert_eq!(Visible::new(0..4, 5..9).within(2..7), Visible::new(2..4, 5..7));
        assert_eq!(Visible::new(0..4, 5..9).within(4..7), Visible::one(5..7));
        assert!(Visible::one(0..4).within(6..9).is_empty());
    }
}
