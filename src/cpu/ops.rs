//! The operations of the forward pass.

use rayon::prelude::*;

use crate::arch::{Activation, Norm, NormKind, Pairing, Rope, Scaling};
use crate::model::{Linear, NormWeight, Weight};
use crate::quant::dot_f32;

/// Rows of a matrix that one task multiplies.
const ROWS_PER_TASK: usize = 16;

/// `out = x W^T + b`. `x: [n, n_in]`, `out: [n, n_out]`
pub(super) fn linear(w: &Linear, x: &[f32], out: &mut [f32], scratch: &mut Vec<f32>) {
    matmul(&w.weight, x, out, scratch);
    if let Some(bias) = &w.bias {
        out.chunks_exact_mut(bias.len()).for_each(|row| add(row, bias));
    }
}

/// `out = x W^T`. Every weight row is read once, and decoded once for all rows of `x`.
pub(super) fn matmul(w: &Weight, x: &[f32], out: &mut [f32], scratch: &mut Vec<f32>) {
    let n = x.len() / w.n_in;
    if n == 1 {
        out.par_chunks_mut(ROWS_PER_TASK).enumerate().for_each(|(task, out)| {
            for (i, out) in out.iter_mut().enumerate() {
                *out = w.format.dot(w.row(task * ROWS_PER_TASK + i), x);
            }
        });
        return;
    }
    // By weight row first, so that every task owns what it writes; then turned around.
    scratch.clear();
    scratch.resize(n * w.n_out, 0.0);
    scratch.par_chunks_mut(ROWS_PER_TASK * n).enumerate().for_each_init(
        || vec![0.0f32; w.n_in],
        |row, (task, out)| {
            for (i, out) in out.chunks_exact_mut(n).enumerate() {
                w.format.dequantize(w.row(task * ROWS_PER_TASK + i), row);
                for (out, x) in out.iter_mut().zip(x.chunks_exact(w.n_in)) {
                    *out = dot_f32(row, x);
                }
            }
        },
    );
    out.par_chunks_exact_mut(w.n_out).enumerate().for_each(|(t, out)| {
        for (out, column) in out.iter_mut().zip(scratch.chunks_exact(n)) {
            *out = column[t];
        }
    });
}

/// `a += b`.
pub(super) fn add(a: &mut [f32], b: &[f32]) {
    a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
}

/// `x *= factor`; nothing for 1.
pub(super) fn scale(x: &mut [f32], factor: f32) {
    if factor != 1.0 {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

/// `x = cap * tanh(x / cap)`.
pub(super) fn softcap(x: &mut [f32], cap: f32) {
    x.iter_mut().for_each(|x| *x = cap * libm::tanhf(*x / cap));
}

/// Norms every row of `x` into `out`; a row is as long as the weight.
pub(super) fn norm(kind: Norm, w: &NormWeight, x: &[f32], out: &mut [f32]) {
    let n = w.weight.len();
    for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(n)) {
        out.copy_from_slice(x);
        norm_row(kind, w, out);
    }
}

/// Norms one row in place. Moments are summed in f64.
pub(super) fn norm_row(kind: Norm, w: &NormWeight, x: &mut [f32]) {
    let mean_of = |f: &dyn Fn(f32) -> f64| x.iter().map(|x| f(*x)).sum::<f64>() / x.len() as f64;
    let mean = match kind.kind {
        NormKind::Rms => 0.0,
        NormKind::Layer => mean_of(&|x| x.into()),
    };
    let variance = mean_of(&|x| (f64::from(x) - mean) * (f64::from(x) - mean));
    let scale = (1.0 / (variance + f64::from(kind.eps)).sqrt()) as f32;
    let mean = mean as f32;
    for (x, weight) in x.iter_mut().zip(&w.weight) {
        *x = (*x - mean) * scale * weight;
    }
    if let Some(bias) = &w.bias {
        add(x, bias);
    }
}

/// The FFN's nonlinearity, in place.
pub(super) fn activate(kind: Activation, x: &mut [f32]) {
    let each = |f: fn(f32) -> f32, x: &mut [f32]| {
        x.par_chunks_mut(4096).for_each(|x| x.iter_mut().for_each(|x| *x = f(*x)));
    };
    match kind {
        Activation::Silu => each(|x| x / (1.0 + libm::expf(-x)), x),
        Activation::GeluTanh => each(
            |x| {
                const SQRT_2_OVER_PI: f32 = 0.797_884_6;
                0.5 * x * (1.0 + libm::tanhf(SQRT_2_OVER_PI * (x + 0.044_715 * x * x * x)))
            },
            x,
        ),
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

    /// Cosines and sines at a position. `[dim / 2]` each
    pub(super) fn angles(&self, position: usize, out: &mut Vec<[f32; 2]>) {
        out.clear();
        out.extend(self.frequencies.iter().map(|f| {
            let (sin, cos) = libm::sincos(position as f64 * f);
            [cos as f32 * self.magnitude, sin as f32 * self.magnitude]
        }));
    }

    /// Rotates the first elements of a head; elements past the rotated ones stay.
    pub(super) fn rotate(&self, angles: &[[f32; 2]], head: &mut [f32]) {
        let half = angles.len();
        for (i, [cos, sin]) in angles.iter().enumerate() {
            let (a, b) = match self.pairing {
                Pairing::Adjacent => (2 * i, 2 * i + 1),
                Pairing::Half => (i, i + half),
            };
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
