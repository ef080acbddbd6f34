//! Texts as vectors: what the layers make of their tokens, pooled.

use std::ops::Range;

use super::Session;
use crate::arch::Pooling;
use crate::bad_usage;
use crate::cpu::check_finite;
use crate::engine::Asked;
use crate::error::Result;
use crate::simd;

impl Session {
    /// The embedding of a text: states of its tokens after the last layer and its norm, if the model has
    /// one there, pooled. `[n_embd]`, or with [`Pooling::None`] `[n, n_embd]`. Where the mask has a
    /// prompt read more than once, states are those of the last copy (arXiv 2402.15449). All tokens
    /// are forgotten, before and after.
    ///
    /// # Errors
    ///
    /// Those of [`Session::check_text`], or a pooling that needs a head, or states that are not
    /// finite.
    pub fn embed(&mut self, tokens: &[u32], pooling: Pooling) -> Result<Vec<f32>> {
        self.rewind(0);
        self.check_text(tokens)?;
        let all = self.copies(tokens);
        let n = all.len();
        let wanted = wanted((n, tokens.len()), self.model.plan.n_copies(), pooling)?;
        let mut states = Vec::new();
        self.engine.forward(
            &self.model,
            (&all, 0, &(0..n)),
            wanted,
            None,
            (Asked::States, &mut states),
        )?;
        check_finite(&states, self.engine.fault(n))?;
        Ok(pooled(states, pooling, self.model.hparams.n_embd))
    }

    /// Refuses a text that has no embedding: one without tokens, or with some that the vocabulary does
    /// not have, or more than fit the context.
    pub fn check_text(&self, tokens: &[u32]) -> Result<()> {
        if tokens.is_empty() {
            bad_usage!("the text has no tokens; an embedding needs 1 or more");
        }
        self.check_tokens(tokens)?;
        self.check_room(self.copies(tokens).len())
    }
}

/// Those of `n` tokens, in all copies of `n_first`, whose states are pooled.
pub(super) fn wanted(
    (n, n_first): (usize, usize),
    n_copies: usize,
    pooling: Pooling,
) -> Result<Range<usize>> {
    // Of the last copy, which may go without a BOS.
    let first = match n_copies {
        1 => 0,
        copies => n - (n - n_first) / (copies - 1),
    };
    match pooling {
        Pooling::None | Pooling::Mean => Ok(first..n),
        Pooling::Cls => Ok(first..first + 1),
        Pooling::Last => Ok(n - 1..n),
        Pooling::Rank => {
            bad_usage!(
                "pooling rank: heads that rank are not supported; allowed none, mean, cls, last"
            )
        }
    }
}

/// What becomes of those states.
pub(super) fn pooled(states: Vec<f32>, pooling: Pooling, n_embd: usize) -> Vec<f32> {
    if pooling == Pooling::Mean { mean(&states, n_embd) } else { states }
}

/// The mean of rows of `width` elements.
fn mean(rows: &[f32], width: usize) -> Vec<f32> {
    let n = (rows.len() / width) as f64;
    let mut sums = vec![0.0f64; width];
    for row in rows.chunks_exact(width) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    sums.into_iter().map(|sum| (sum / n) as f32).collect()
}

/// Divides a vector by its length, if it has one.
pub fn normalize(x: &mut [f32]) {
    let length = simd::squares(x, 0.0).sqrt();
    if length > 0.0 {
        simd::scale(x, 1.0 / length);
    }
}

/// The cosine of the angle between two vectors; 0 where one has no length.
pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let lengths = (dot(a, a) * dot(b, b)).sqrt();
    if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
}
