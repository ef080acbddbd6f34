//! The operations of the forward pass on single rows.

use crate::arch::{Activation, Norm, NormKind, Pairing, Rope, Scaling};
use crate::model::NormWeight;
use crate::simd;

/// Norms one row in place.
pub(super) fn norm_row(kind: Norm, w: &NormWeight, x: &mut [f32]) {
    let n = x.len() as f32;
    let mean = match kind.kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => simd::sum(x) / n,
    };
    let variance = simd::squares(x, mean) / n;
    simd::shift_scale(x, mean, 1.0 / (variance + kind.eps).sqrt(), &w.weight);
    if let Some(bias) = &w.bias {
        simd::add(x, bias);
    }
}

/// The FFN's nonlinearity, in place.
pub(super) fn activate(kind: Activation, x: &mut [f32]) {
    match kind {
        Activation::Silu => simd::silu(x),
        Activation::GeluTanh => simd::gelu_tanh(x),
    }
}

/// Frequencies of a rotation and its factor on queries and keys.
pub(super) struct Rotation {
    pairing: Pairing,
    frequencies: Vec<f64>,
    magnitude: f32,
}

impl Rotation {
    /// `theta_i = base^(-2i / dim)`, divided by `divisors` and changed by the scaling.
    pub(super) fn new(rope: &Rope, divisors: Option<&[f32]>) -> Rotation {
        let half = rope.dim / 2;
        let base = f64::from(rope.base);
        let plain = |i: usize| libm::pow(base, -(2.0 * i as f64) / rope.dim as f64);
        let divided = |i: usize| plain(i) / divisors.map_or(1.0, |d| f64::from(d[i]));
        let (frequencies, magnitude) = match rope.scaling {
            Scaling::None => ((0..half).map(divided).collect(), 1.0),
            Scaling::Linear { factor } => {
                ((0..half).map(|i| divided(i) / f64::from(factor)).collect(), 1.0)
            }
            Scaling::Yarn { factor, n_ctx_orig, attn_factor, beta_fast, beta_slow } => {
                let ramp = yarn_ramp(rope, n_ctx_orig, beta_fast, beta_slow);
                let scaled = |i: usize| {
                    let keep = ramp(i);
                    divided(i) * (keep + (1.0 - keep) / f64::from(factor))
                };
                // YaRN, section 3.4: sqrt(1/t) = 0.1 ln(s) + 1, on queries and keys alike.
                let magnitude = 0.1 * libm::log(f64::from(factor)) + 1.0;
                ((0..half).map(scaled).collect(), magnitude as f32 * attn_factor)
            }
        };
        Rotation { pairing: rope.pairing, frequencies, magnitude }
    }

    /// The elements of a head that are those of a plane.
    pub(super) fn pair(&self, plane: usize, n_planes: usize) -> [usize; 2] {
        match self.pairing {
            Pairing::Adjacent => [2 * plane, 2 * plane + 1],
            Pairing::Half => [plane, plane + n_planes],
        }
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

/// How much of a frequency stays: 1 for those that turn more than `beta_fast` times over the
/// original context, 0 below `beta_slow` times, linear in the index between (YaRN, section 3.2,
/// with whole indices as in its reference code).
fn yarn_ramp(
    rope: &Rope,
    n_ctx_orig: usize,
    beta_fast: f32,
    beta_slow: f32,
) -> impl Fn(usize) -> f64 {
    let (dim, base) = (rope.dim as f64, f64::from(rope.base));
    let index = move |turns: f32| {
        let wavelengths = n_ctx_orig as f64 / (f64::from(turns) * std::f64::consts::TAU);
        dim * libm::log(wavelengths) / (2.0 * libm::log(base))
    };
    let low = index(beta_fast).floor().max(0.0);
    let high = index(beta_slow).ceil().min(dim - 1.0);
    move |i| 1.0 - ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0)
}
