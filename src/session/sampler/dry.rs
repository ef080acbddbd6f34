//! DRY, "don't repeat yourself" (p-e-w 2024, text-generation-webui pull request 5677): a token
//! that would continue a repetition of n >= allowed tokens loses `multiplier * base^(n - allowed)`.

use super::{Candidates, Random, Sample, SamplerParams};
use crate::error::Result;
use crate::token::Tokenizer;

/// Penalties do not grow beyond what a logit can hold.
const MAX_PENALTY: f64 = f32::MAX as f64;

struct Dry {
    multiplier: f32,
    base: f32,
    allowed: usize,
    last_n: usize,
    breakers: Vec<Vec<u32>>,
    /// Per position k from the end, how many tokens before it equal those before the end.
    repeats: Vec<usize>,
    /// Tokens that would continue a repetition, with its length; then the longest per token.
    next: Vec<(u32, usize)>,
}

/// Token sequences for [`SamplerParams::dry_breakers`]: those of texts in the middle of a line, since some
/// tokenizers begin a line with a space.
pub fn breakers<'a>(
    texts: impl IntoIterator<Item = &'a str>,
    tokenizer: &Tokenizer,
) -> Result<Vec<Vec<u32>>> {
    let before = tokenizer.encode("a", false, false)?;
    let one = |text: &str| {
        let both = tokenizer.encode(&format!("a{text}"), false, false)?;
        match both.strip_prefix(&before[..]) {
            Some(ids) if !ids.is_empty() => Ok(ids.to_vec()),
            _ => tokenizer.encode(text, false, false),
        }
    };
    texts.into_iter().map(one).collect()
}

/// How many past tokens count; 0 if it is off.
pub(super) fn n_history(params: &SamplerParams) -> usize {
    if params.dry_multiplier > 0.0 { params.dry_last_n.unwrap_or(usize::MAX) } else { 0 }
}

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    let dry = Dry {
        multiplier: params.dry_multiplier,
        base: params.dry_base,
        allowed: params.dry_allowed_length,
        last_n: n_history(params),
        breakers: params.dry_breakers.iter().filter(|b| !b.is_empty()).cloned().collect(),
        repeats: Vec::new(),
        next: Vec::new(),
    };
    (dry.last_n > 0).then(|| Box::new(dry) as _)
}

impl Sample for Dry {
    fn apply(&mut self, candidates: &mut Candidates, past: &[u32], _: &mut Random) {
        let past = &past[past.len().saturating_sub(self.last_n)..];
        let limit = self.n_since_breaker(past);
        if past.len() <= self.allowed || limit < self.allowed {
            return;
        }
        count_repeats(past, &mut self.repeats);
        self.next.clear();
        for (k, n) in self.repeats.iter().enumerate().skip(1) {
            let n = limit.min(*n);
            if n >= self.allowed {
                self.next.push((past[past.len() - k], n));
            }
        }
        // Of every token, the longest repetition comes first.
        self.next.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        self.next.dedup_by_key(|(token, _)| *token);
        for (token, n) in &self.next {
            if self.breakers.iter().any(|b| b[..] == [*token]) {
                continue;
            }
            let power = libm::pow(self.base.into(), (n - self.allowed) as f64);
            let penalty = (f64::from(self.multiplier) * power).min(MAX_PENALTY) as f32;
            candidates.change(*token, |logit| logit - penalty);
        }
    }
}

impl Dry {
    /// Tokens after the last sequence breaker, which no repetition crosses.
    fn n_since_breaker(&self, past: &[u32]) -> usize {
        let ends_at = |end: &usize| self.breakers.iter().any(|b| past[..*end].ends_with(b));
        past.len() - (1..=past.len()).rev().find(ends_at).unwrap_or(0)
    }
}

/// For every k, the length of the longest common end of `past` and `past` less its last k tokens:
/// the Z-function (Gusfield 1997, section 1.4) of the reversed text, linear in its length.
fn count_repeats(past: &[u32], repeats: &mut Vec<usize>) {
    let n = past.len();
    let back = |i: usize| past[n - 1 - i];
    repeats.clear();
    repeats.resize(n, 0);
    // The stretch [start, end) is known to equal the beginning.
    let (mut start, mut end) = (0, 0);
    for k in 1..n {
        let mut length = if k < end { repeats[k - start].min(end - k) } else { 0 };
        while k + length < n && back(length) == back(k + length) {
            length += 1;
        }
        if k + length > end {
            (start, end) = (k, k + length);
        }
        repeats[k] = length;
    }
}
