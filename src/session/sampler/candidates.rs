//! The tokens that may come next, which every sampler narrows or reweighs.

use std::cmp::Ordering;

use super::random::Random;

/// One token that may come next.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Candidate {
    /// Token id.
    pub id: u32,
    /// Its logit, never NaN or infinite above; minus infinity stands for "never".
    pub logit: f32,
    /// Its probability among the candidates, as of the last [`Candidates::softmax`].
    pub p: f32,
}

/// What is known of the order of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    ById,
    ByLogit,
    Other,
}

/// A list of candidates, without duplicates.
#[derive(Debug, Clone)]
pub struct Candidates {
    list: Vec<Candidate>,
    /// Survivors of a partial selection, kept for its memory.
    best: Vec<Candidate>,
    order: Order,
}

/// The order of the likeliest: highest logit first, and of equal logits the lowest id.
fn likeliest(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.partial_cmp(&a.logit).unwrap_or(Ordering::Equal).then(a.id.cmp(&b.id))
}

/// Puts the first `n` items under `order` to the front, in order.
pub(super) fn sort_first<T>(items: &mut [T], n: usize, order: impl Fn(&T, &T) -> Ordering) {
    if 0 < n && n < items.len() {
        items.select_nth_unstable_by(n - 1, &order);
    }
    let n = n.min(items.len());
    items[..n].sort_unstable_by(order);
}

/// The length of the shortest beginning of `items`, as sorted by `order`, that ends with an item
/// for which `done`; all of them if there is none. Sorts only as far as it has to look.
pub(super) fn sort_until<T>(
    items: &mut [T],
    order: impl Fn(&T, &T) -> Ordering,
    mut done: impl FnMut(&T) -> bool,
) -> usize {
    // Nearly always enough for nucleus sampling; a flat distribution takes a round more.
    let (mut seen, mut step) = (0, 128);
    while seen < items.len() {
        let rest = &mut items[seen..];
        let n = step.min(rest.len());
        sort_first(rest, n, &order);
        if let Some(at) = rest[..n].iter().position(&mut done) {
            return seen + at + 1;
        }
        seen += n;
        step *= 16;
    }
    items.len()
}

impl Default for Candidates {
    fn default() -> Candidates {
        Candidates { list: Vec::new(), best: Vec::new(), order: Order::ById }
    }
}

impl Candidates {
    /// The candidates of these logits. `[n_vocab]`
    pub fn new(logits: &[f32]) -> Candidates {
        let mut candidates = Candidates::default();
        candidates.fill(logits);
        candidates
    }

    /// Replaces the list by all tokens, but for those whose logit is NaN or minus infinity; plus
    /// infinity counts as the largest finite number. `[n_vocab]`
    pub fn fill(&mut self, logits: &[f32]) {
        self.list.clear();
        self.list.extend(
            (0..)
                .zip(logits)
                .filter(|(_, logit)| **logit > f32::NEG_INFINITY)
                .map(|(id, logit)| Candidate { id, logit: logit.min(f32::MAX), p: 0.0 }),
        );
        self.order = Order::ById;
    }

    /// The candidates, in the present order.
    pub fn list(&self) -> &[Candidate] {
        &self.list
    }

    /// Number of candidates.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether no candidate is left.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// The likeliest candidate.
    pub fn best(&self) -> Option<Candidate> {
        match self.order {
            Order::ByLogit => self.list.first().copied(),
            _ => self.list.iter().min_by(|a, b| likeliest(a, b)).copied(),
        }
    }

    /// The candidate of this token.
    fn find(&self, id: u32) -> Option<usize> {
        match self.order {
            // Mostly nothing was left out, and the id is the index.
            Order::ById => match self.list.get(id as usize) {
                Some(c) if c.id == id => Some(id as usize),
                _ => self.list.binary_search_by_key(&id, |c| c.id).ok(),
            },
            _ => self.list.iter().position(|c| c.id == id),
        }
    }

    /// Replaces the logit of a token, if it is a candidate.
    pub fn change(&mut self, id: u32, logit: impl FnOnce(f32) -> f32) {
        if let Some(at) = self.find(id) {
            let candidate = &mut self.list[at];
            let new = logit(candidate.logit);
            candidate.logit = if new.is_nan() { f32::NEG_INFINITY } else { new.min(f32::MAX) };
            if self.order == Order::ByLogit {
                self.order = Order::Other;
            }
        }
    }

    /// Replaces all logits by a function that grows with them.
    pub fn change_all(&mut self, logit: impl Fn(f32) -> f32) {
        self.list.iter_mut().for_each(|c| c.logit = logit(c.logit).min(f32::MAX));
        // Rounding may have made neighbours equal, which are then no longer in the order of ids.
        if self.order == Order::ByLogit {
            self.order = Order::Other;
        }
    }

    /// Sets every candidate's probability.
    pub fn softmax(&mut self) {
        let max = self.best().map_or(0.0, |c| c.logit);
        let mut sum = 0f64;
        for c in &mut self.list {
            // All may be "never" after a bias; they then count as equal.
            c.p = if c.logit == max { 1.0 } else { libm::expf(c.logit - max) };
            sum += f64::from(c.p);
        }
        self.list.iter_mut().for_each(|c| c.p = (f64::from(c.p) / sum) as f32);
    }

    /// Keeps the candidates that pass, in their order.
    pub fn retain(&mut self, pass: impl FnMut(&Candidate) -> bool) {
        self.list.retain(pass);
    }

    /// Keeps the `n` likeliest, sorted.
    pub fn keep_best(&mut self, n: usize) {
        if self.order != Order::ByLogit {
            if n.saturating_mul(8) < self.list.len() {
                self.select_best(n);
            }
            sort_first(&mut self.list, n, likeliest);
        }
        self.list.truncate(n);
        self.order = Order::ByLogit;
    }

    /// Keeps some hundred candidates that hold the `n` likeliest: one pass with a rising bar,
    /// which is several times faster on a large vocabulary than moving it around.
    fn select_best(&mut self, n: usize) {
        let room = 4 * n + 64;
        let mut bar = f32::NEG_INFINITY;
        self.best.clear();
        for c in &self.list {
            if c.logit < bar {
                continue;
            }
            self.best.push(*c);
            if self.best.len() >= room {
                sort_first(&mut self.best, n, likeliest);
                self.best.truncate(n);
                bar = self.best.last().map_or(bar, |c| c.logit);
            }
        }
        std::mem::swap(&mut self.list, &mut self.best);
        self.order = Order::Other;
    }

    /// Keeps the likeliest, sorted, up to the first for which `done`, which is kept too.
    pub fn keep_until(&mut self, done: impl FnMut(&Candidate) -> bool) {
        let n = sort_until(&mut self.list, likeliest, done);
        self.list.truncate(n);
        self.order = Order::ByLogit;
    }

    /// Replaces the list by these, in their order.
    pub fn replace(&mut self, list: impl Iterator<Item = Candidate>) {
        self.list.clear();
        self.list.extend(list);
        self.order = Order::Other;
    }

    /// Draws one candidate by its probability, with one random number however many there are.
    pub fn draw(&mut self, random: &mut Random) -> Option<Candidate> {
        self.softmax();
        let sum: f64 = self.list.iter().map(|c| f64::from(c.p)).sum();
        let mut left = random.uniform() * sum;
        for c in &self.list {
            left -= f64::from(c.p);
            if left < 0.0 {
                return Some(*c);
            }
        }
        // Only rounding leads here.
        self.best()
    }
}
