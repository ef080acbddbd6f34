//! Attention of one head: `output(mix(normalize(mask(scores(x)))))`.
//!
//! The only file that sees forms, normalizers and masks together.

use half::f16;

use crate::arch::Hparams;
use crate::merge::Geometry;
use crate::normalizer::Row;
use crate::plan::LayerPlan;
use crate::quant::dot_f32;

/// The attention of one layer, ready to run.
pub struct Attention {
    /// Its shape.
    pub geometry: Geometry,
    plan: LayerPlan,
    layer: usize,
    scale: f32,
    softcap: Option<f32>,
    window: Option<usize>,
}

/// Cached keys or values of one head: row `i` belongs to position `i`.
#[derive(Clone, Copy)]
pub enum Rows<'a> {
    /// Full precision.
    F32(&'a [f32]),
    /// Half precision.
    F16(&'a [f16]),
}

impl Attention {
    /// Binds a layer's plan to its model.
    pub fn new(hparams: &Hparams, layer: usize, plan: LayerPlan) -> Attention {
        let at = &hparams.layers[layer];
        Attention {
            geometry: plan.form.geometry(hparams, at),
            plan,
            layer,
            scale: hparams.attn_scale,
            softcap: hparams.attn_softcap,
            window: at.window,
        }
    }

    /// Attention of the query `q` of `head` at `position` over the cache of its kv head, into
    /// `out`. `scores` is scratch.
    pub fn head(
        &self,
        (position, head): (usize, usize),
        q: &[f32],
        (keys, values): (Rows, Rows),
        scores: &mut Vec<f32>,
        out: &mut [f32],
    ) {
        let visible = self.plan.mask.visible(position, self.window);
        scores.clear();
        for j in visible.clone() {
            scores.push(keys.dot(j, q) * self.scale);
        }
        if let Some(cap) = self.softcap {
            scores.iter_mut().for_each(|s| *s = cap * libm::tanhf(*s / cap));
        }
        self.plan.normalizers[head].row(scores, Row { position, layer: self.layer, head });
        out.fill(0.0);
        for (weight, j) in scores.iter().zip(visible) {
            // NaN is not zero: it must show in the output.
            if *weight != 0.0 {
                values.add(j, *weight, out);
            }
        }
    }
}

impl Rows<'_> {
    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        let at = row * x.len()..(row + 1) * x.len();
        match self {
            Rows::F32(data) => dot_f32(&data[at], x),
            Rows::F16(data) => {
                let mut sum = 0.0;
                let mut wide = [0.0f32; 64];
                for (half, x) in data[at].chunks(64).zip(x.chunks(64)) {
                    let wide = &mut wide[..half.len()];
                    widen(half, wide);
                    sum += dot_f32(wide, x);
                }
                sum
            }
        }
    }

    fn add(&self, row: usize, weight: f32, out: &mut [f32]) {
        let at = row * out.len()..(row + 1) * out.len();
        match self {
            Rows::F32(data) => out.iter_mut().zip(&data[at]).for_each(|(o, v)| *o += weight * v),
            Rows::F16(data) => {
                let mut wide = [0.0f32; 64];
                for (half, out) in data[at].chunks(64).zip(out.chunks_mut(64)) {
                    let wide = &mut wide[..half.len()];
                    widen(half, wide);
                    out.iter_mut().zip(wide).for_each(|(o, v)| *o += weight * *v);
                }
            }
        }
    }
}

fn widen(half: &[f16], wide: &mut [f32]) {
    use half::slice::HalfFloatSliceExt;
    half.convert_to_f32_slice(wide);
}
