//! The operations of the forward pass on single rows.

use crate::arch::{Activation, Norm, NormKind, Pairing, Rope, Scaling};
use crate::model::{Model, NormWeight};
use crate::simd;

/// Norms one row in place.
pub(super) fn norm_row(kind: Norm, w: &NormWeight, x: &mut [f32]) {
    norm_with(kind, &w.weight, x);
    if let Some(bias) = &w.bias {
        simd::add(x, bias);
    }
}

/// The same without a bias.
pub(super) fn norm_with(kind: Norm, weight: &[f32], x: &mut [f32]) {
    let n = x.len() as f32;
    let mean = match kind.kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => simd::sum(x) / n,
    };
    let variance = simd::squares(x, mean) / n;
    simd::shift_scale(x, mean, 1.0 / (variance + kind.eps).sqrt(), weight);
}

/// The FFN's nonlinearity, in place.
pub(super) fn activate(kind: Activation, x: &mut [f32]) {
    match kind {
        Activation::Silu => simd::silu(x),
        Activation::Gelu => simd::gelu(x),
        Activation::GeluTanh => simd::gelu_tanh(x),
        // Only ever of a gate.
        Activation::ClampedSwiglu => {}
    }
}

/// `up *= act(gate)`; `gate` is used up.
pub(super) fn activate_product(kind: Activation, gate: &mut [f32], up: &mut [f32]) {
    if kind == Activation::ClampedSwiglu {
        for (g, u) in gate.iter_mut().zip(&mut *up) {
            // Unlike `min`, this keeps a NaN.
            *g = if *g > CLAMP { CLAMP } else { *g };
            *u = u.clamp(-CLAMP, CLAMP) + 1.0;
        }
        // g sigmoid(a g) is silu(a g) / a.
        simd::scale(gate, SWIGLU_SHARPNESS);
        simd::silu(gate);
        simd::scale(gate, 1.0 / SWIGLU_SHARPNESS);
    } else {
        activate(kind, gate);
    }
    simd::multiply(up, gate);
}

/// Limits and sharpness of a clamped gate (arXiv 2508.10925).
const CLAMP: f32 = 7.0;
const SWIGLU_SHARPNESS: f32 = 1.702;

/// The rotations of a model.
pub(super) struct Rotations {
    short: Vec<Rotation>,
    /// Those in contexts of more tokens than this, where they are others.
    long: Option<(usize, Vec<Rotation>)>,
}

impl Rotations {
    /// With the divisors of frequencies that the model's file has.
    pub(super) fn new(model: &Model) -> Rotations {
        let ropes = &model.hparams.ropes;
        let all = |n_ctx: usize| {
            let divisors = model.rope_divisors(n_ctx);
            ropes.iter().map(|rope| Rotation::new(rope, divisors)).collect()
        };
        let long = match ropes.first().map(|rope| rope.scaling) {
            Some(Scaling::Long { n_ctx_orig }) => Some((n_ctx_orig, all(usize::MAX))),
            _ => None,
        };
        Rotations { short: all(0), long }
    }

    /// Those in a context of `n_ctx` tokens.
    pub(super) fn within(&self, n_ctx: usize) -> &[Rotation] {
        match &self.long {
            Some((n_ctx_orig, long)) if n_ctx > *n_ctx_orig => long,
            _ => &self.short,
        }
    }
}

/// Frequencies of a rotation and its factor on queries and keys.
pub(super) struct Rotation {
    pairing: Pairing,
    frequencies: Vec<f64>,
    magnitude: f32,
}

impl Rotation {
    /// The rotation of a model, with the divisors of its frequencies that its file has.
    pub(super) fn new(rope: &Rope, divisors: Option<&[f32]>) -> Rotation {
        let (frequencies, magnitude) = rope.frequencies(divisors);
        Rotation { pairing: rope.pairing, frequencies, magnitude }
    }

    /// Which elements form a plane.
    pub(super) fn pairing(&self) -> Pairing {
        self.pairing
    }

    /// The elements of a head that are those of a plane.
    pub(super) fn pair(&self, plane: usize, n_planes: usize) -> [usize; 2] {
        self.pairing.pair(plane, n_planes)
    }

    /// Copies those elements of a head that are of some planes, or of all, and those that are of
    /// none as far as there is room.
    pub(super) fn keep(&self, planes: Option<&[usize]>, head: &[f32], to: &mut [f32]) {
        let n = self.frequencies.len();
        let n_kept = planes.map_or(n, <[usize]>::len);
        for i in 0..n_kept {
            let from = self.pair(planes.map_or(i, |planes| planes[i]), n);
            let at = self.pair(i, n_kept);
            (to[at[0]], to[at[1]]) = (head[from[0]], head[from[1]]);
        }
        let rest = &mut to[2 * n_kept..];
        rest.copy_from_slice(&head[2 * n..][..rest.len()]);
    }

    /// Cosines and sines at a position. `[dim / 2]` each
    pub(super) fn angles(&self, position: usize, out: &mut Vec<[f32; 2]>) {
        out.clear();
        out.extend(self.frequencies.iter().map(|f| {
            let (sin, cos) = libm::sincos(position as f64 * f);
            [cos as f32 * self.magnitude, sin as f32 * self.magnitude]
        }));
    }

    /// Rotates the first elements of a head, those of all planes or of some; elements past them stay.
    pub(super) fn rotate(&self, angles: &[[f32; 2]], planes: Option<&[usize]>, head: &mut [f32]) {
        let half = planes.map_or(angles.len(), <[usize]>::len);
        for i in 0..half {
            let [cos, sin] = angles[planes.map_or(i, |planes| planes[i])];
            let [a, b] = self.pair(i, half);
            let (x, y) = (head[a], head[b]);
            head[a] = x * cos - y * sin;
            head[b] = x * sin + y * cos;
        }
    }
}
