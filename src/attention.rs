//! Attention: `output(mix(normalize(mask(scores(x)))))`.
//!
//! The only file that sees forms, normalizers and masks together: which keys are scored, and what
//! becomes of a row of scores. Engines compute the scores and mix the values.

use std::ops::Range;

use crate::arch::{Hparams, Temperature};
use crate::mask::Visible;
use crate::merge::{self, Geometry};
use crate::normalizer::{Choice, Row};
use crate::plan::LayerPlan;
use crate::simd;

/// The attention of one layer, ready to run.
#[derive(Clone)]
pub struct Attention {
    /// Its shape.
    pub geometry: Geometry,
    plan: LayerPlan,
    layer: usize,
    scale: f32,
    temperature: Option<Temperature>,
    /// What scores of each head lose per position of distance; none in most models.
    slopes: Vec<f32>,
    softcap: Option<f32>,
    window: Option<usize>,
    n_ctx_train: usize,
}

/// Slopes of linear biases (ALiBi, arXiv 2108.12409, section 3, and its code for numbers of heads that
/// are no powers of 2): the series of the next lower power, then every other of the next higher one.
fn slopes(n_head: usize, max_bias: f32) -> Vec<f32> {
    let n = 1 << n_head.max(1).ilog2();
    let slope = |i: usize, n: usize| (-max_bias * (i + 1) as f32 / n as f32).exp2();
    let series = (0..n).map(|i| slope(i, n));
    series.chain((0..n).map(|i| slope(2 * i, 2 * n))).take(n_head).collect()
}

impl Attention {
    /// Binds a layer's plan to its model.
    pub fn new(hparams: &Hparams, layer: usize, plan: LayerPlan) -> Attention {
        let at = &hparams.layers[layer];
        Attention {
            geometry: plan.form.form().geometry(hparams, at),
            plan,
            layer,
            scale: hparams.attn_scale,
            temperature: hparams.temperature,
            slopes: hparams.max_alibi_bias.map_or(Vec::new(), |max| slopes(at.n_head, max)),
            softcap: hparams.attn_softcap,
            window: at.window,
            n_ctx_train: hparams.n_ctx_train,
        }
    }

    /// What the query at `position` sees, which belongs to `prompt` if it is in it.
    pub fn visible(&self, position: usize, prompt: &Range<usize>) -> Visible {
        self.plan.mask.visible(position, prompt, self.window)
    }

    /// Factor on products of the query at `position` with keys before anything else is done with them.
    pub fn scale(&self, position: usize) -> f32 {
        self.temperature.map_or(self.scale, |Temperature { scale, length }| {
            let spans = (1 + position / length) as f64;
            self.scale * (1.0 + f64::from(scale) * libm::log(spans)) as f32
        })
    }

    /// Turns scores of `head` at a position, scaled and only those of the keys that it sees, into
    /// weights.
    pub fn weigh(&self, at: (usize, &Visible), head: usize, scores: &mut [f32]) {
        self.bias(at, head, scores);
        self.normalize(at.0, head, scores);
    }

    /// What the model does to scaled scores before they are normalized.
    pub fn bias(&self, (position, seen): (usize, &Visible), head: usize, scores: &mut [f32]) {
        if let Some(slope) = self.slopes.get(head) {
            let keys = seen.ranges().iter().cloned().flatten();
            for (score, key) in scores.iter_mut().zip(keys) {
                *score -= slope * position.abs_diff(key) as f32;
            }
        }
        if let Some(cap) = self.softcap {
            simd::softcap(scores, cap);
        }
    }

    /// How it is factored.
    pub fn form(&self) -> &merge::Choice {
        &self.plan.form
    }

    /// What turns scores into weights, of each head.
    pub fn normalizers(&self) -> &[Choice] {
        &self.plan.normalizers
    }

    /// The bound that scores are kept within before they are normalized.
    pub fn softcap(&self) -> Option<f32> {
        self.softcap
    }

    /// What scores of each head lose per position of distance; none in most models. `[n_head]`
    pub fn slopes(&self) -> &[f32] {
        &self.slopes
    }

    /// Whether queries see the same keys as with `other`.
    pub fn sees_as(&self, other: &Attention) -> bool {
        self.window == other.window && self.plan.mask.text() == other.plan.mask.text()
    }

    /// What is added to the output of `head`. `[value_dim]`
    pub fn mean(&self, head: usize) -> Option<&[f32]> {
        self.plan.means[head].as_deref()
    }

    /// Turns what is left of scores into weights; no scores into none.
    pub fn normalize(&self, position: usize, head: usize, scores: &mut [f32]) {
        if scores.is_empty() {
            return;
        }
        let at = Row { position, layer: self.layer, head, n_ctx_train: self.n_ctx_train };
        self.plan.normalizers[head].row(scores, at);
    }
}

/// Where tokens at these positions must end to be read together: after the last key that any of them
/// sees in any layer, as `prompt` may have more of them see each other.
pub fn together(layers: &[Attention], positions: Range<usize>, prompt: &Range<usize>) -> usize {
    let Range { start, mut end } = positions;
    let mut position = start.max(prompt.start);
    while position < end.min(prompt.end) {
        let ends = layers.iter().map(|a| a.visible(position, prompt).end());
        end = end.max(ends.max().unwrap_or(0));
        position += 1;
    }
    end
}

/// Whether a token of this prompt sees a later one in any layer.
pub fn looks_ahead(layers: &[Attention], prompt: &Range<usize>) -> bool {
    let ahead = |p| layers.iter().any(|a| a.visible(p, prompt).end() > p + 1);
    prompt.clone().any(ahead)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values that the paper's code gives, which is not quite what its text says of 6 heads.
    #[test]
    fn slopes_are_a_series_and_every_other_of_the_next() {
        let powers = |n: &[f32]| n.iter().map(|n| n.exp2()).collect::<Vec<_>>();
        assert_eq!(slopes(4, 8.0), powers(&[-2.0, -4.0, -6.0, -8.0]));
        assert_eq!(slopes(6, 8.0), powers(&[-2.0, -4.0, -6.0, -8.0, -1.0, -3.0]));
        assert_eq!(slopes(1, 8.0), powers(&[-8.0]));
    }
}
