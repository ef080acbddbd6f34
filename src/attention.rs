//! Attention: `output(mix(normalize(mask(scores(x)))))`.
//!
//! The only file that sees forms, normalizers and masks together: which keys are scored, and what
//! becomes of a row of scores. Engines compute the scores and mix the values.

use std::ops::Range;

use crate::arch::Hparams;
use crate::mask::Visible;
use crate::merge::Geometry;
use crate::normalizer::Row;
use crate::plan::LayerPlan;
use crate::simd;

/// The attention of one layer, ready to run.
pub struct Attention {
    /// Its shape.
    pub geometry: Geometry,
    plan: LayerPlan,
    layer: usize,
    scale: f32,
    softcap: Option<f32>,
    window: Option<usize>,
    n_ctx_train: usize,
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
            softcap: hparams.attn_softcap,
            window: at.window,
            n_ctx_train: hparams.n_ctx_train,
        }
    }

    /// What the query at `position` sees, which belongs to `prompt` if it is in it.
    pub fn visible(&self, position: usize, prompt: &Range<usize>) -> Visible {
        self.plan.mask.visible(position, prompt, self.window)
    }

    /// Factor on query-key products before anything else is done with them.
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Turns scores of `head` at `position`, scaled and only those of visible keys, into weights.
    pub fn weigh(&self, position: usize, head: usize, scores: &mut [f32]) {
        self.cap(scores);
        self.normalize(position, head, scores);
    }

    /// What the model does to scaled scores before they are normalized.
    pub fn cap(&self, scores: &mut [f32]) {
        if let Some(cap) = self.softcap {
            simd::softcap(scores, cap);
        }
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
