//! Frequencies of a rotation (arXiv 2104.09864), and how they are scaled.

use super::{Pairing, Rope, Scaling};

impl Pairing {
    /// The elements of a head that are those of a plane, of so many.
    pub fn pair(self, plane: usize, n_planes: usize) -> [usize; 2] {
        match self {
            Pairing::Adjacent => [2 * plane, 2 * plane + 1],
            Pairing::Half => [plane, plane + n_planes],
        }
    }
}

impl Rope {
    /// `theta_i = base^(-2i / dim)`, in radians per position, divided by `divisors` and changed by the
    /// scaling; and a factor on rotated queries and keys.
    pub fn frequencies(&self, divisors: Option<&[f32]>) -> (Vec<f64>, f32) {
        let half = self.dim / 2;
        let base = f64::from(self.base);
        let plain = |i: usize| libm::pow(base, -(2.0 * i as f64) / self.dim as f64);
        let divided = |i: usize| plain(i) / divisors.map_or(1.0, |d| f64::from(d[i]));
        match self.scaling {
            Scaling::None | Scaling::Long { .. } => {
                ((0..half).map(divided).collect(), self.attn_factor)
            }
            Scaling::Linear { factor } => {
                let scaled = |i: usize| divided(i) / f64::from(factor);
                ((0..half).map(scaled).collect(), self.attn_factor)
            }
            Scaling::Yarn { factor, n_ctx_orig, beta_fast, beta_slow } => {
                let ramp = yarn_ramp(self, n_ctx_orig, beta_fast, beta_slow);
                let scaled = |i: usize| {
                    let keep = ramp(i);
                    divided(i) * (keep + (1.0 - keep) / f64::from(factor))
                };
                // YaRN, section 3.4: sqrt(1/t) = 0.1 ln(s) + 1, on queries and keys alike.
                let magnitude = 0.1 * libm::log(f64::from(factor)) + 1.0;
                ((0..half).map(scaled).collect(), magnitude as f32 * self.attn_factor)
            }
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
