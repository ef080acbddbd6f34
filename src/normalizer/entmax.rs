//! Sparse maps to the simplex: `w = max((alpha - 1) x - tau, 0)^(1 / (alpha - 1))`, with the `tau` for
//! which the weights sum to 1. Only keys within `1 / (alpha - 1)` of the largest can have a weight, so
//! they are gathered first; `tau` is found without sorting them.

use super::{Class, Domain, Family, Kind, MAX, Normalizer, Row, param, with_memory};
use crate::simd;

/// Largest number of steps; 3 to 10 are usual.
const MAX_STEPS: usize = 50;

fn entmax(scores: &mut [f32], alpha: f32) {
    let max = simd::max(scores);
    let r = 1.0 / (alpha - 1.0);
    // With z = (alpha - 1)(x - max) <= 0, tau lies in [-1, 0).
    simd::map(scores, |x| (alpha - 1.0) * (x - max));
    let tau = with_memory(|[z, _]| {
        simd::gather(scores, -1.0, 0.0, z);
        // Newton's method on the r-norm of max(z - tau, 0), minus 1: convex and falling, so that from
        // the left it never goes too far; and for equal scores it is a straight line. With alpha = 2
        // the steps are Michelot's (JOTA 50, 1986).
        let mut tau = -1.0f32;
        for _ in 0..MAX_STEPS {
            let [sum, slope] = simd::power_sums(z, tau, r);
            let norm = if r == 1.0 { sum } else { sum.powf(1.0 / r) };
            let step = (norm - 1.0) * sum / (norm * slope);
            let next = tau + step;
            if step.is_nan() || step <= 0.0 || next == tau {
                break;
            }
            tau = next;
        }
        tau
    });
    let sum = simd::powers(scores, 1.0, -tau, r);
    simd::scale(scores, 1.0 / sum);
}

struct Entmax(f32);

impl Normalizer for Entmax {
    fn row(&self, scores: &mut [f32], _: Row) {
        entmax(scores, self.0);
    }
}

const FAMILY: Family = Family { class: Class::Selecting, shift_invariant: true, sums_to_one: true };

pub(super) static SPARSEMAX: Kind = FAMILY.kind(
    "sparsemax",
    "w_j = max(x_j - tau, 0), sum w = 1",
    "Martins and Astudillo, arXiv 1602.02068",
    &[],
    |_| Box::new(Entmax(2.0)),
);

pub(super) static ENTMAX15: Kind = FAMILY.kind(
    "entmax15",
    "w_j = max(x_j / 2 - tau, 0)^2, sum w = 1",
    "Peters et al., arXiv 1905.05702",
    &[],
    |_| Box::new(Entmax(1.5)),
);

pub(super) static ENTMAX: Kind = FAMILY.kind(
    "entmax",
    "w_j = max((alpha - 1) x_j - tau, 0)^(1 / (alpha - 1)), sum w = 1",
    "Peters et al., arXiv 1905.05702; Goncalves et al., AdaSplash, arXiv 2502.12082",
    &[param("alpha", "2 is sparsemax, towards 1 softmax", 1.25, Domain::From(1.001, 2.0))],
    |p| Box::new(Entmax(p[0])),
);

struct Asentmax {
    alpha: f32,
    delta: f32,
    beta: f32,
    gamma: f32,
}

impl Normalizer for Asentmax {
    fn row(&self, scores: &mut [f32], _: Row) {
        let ln_n = (scores.len() as f32).ln();
        simd::scale(scores, self.delta + self.beta * ln_n.powf(self.gamma));
        entmax(scores, self.alpha);
    }
}

pub(super) static ASENTMAX: Kind = FAMILY.kind(
    "asentmax",
    "w = entmax((delta + beta (ln n)^gamma) x), with constants",
    "Vasylenko et al., arXiv 2506.16640",
    &[
        param("alpha", "as of entmax", 1.5, Domain::From(1.001, 2.0)),
        param("delta", "factor of short rows", 1.0, Domain::From(0.0, MAX)),
        param("beta", "factor that grows with n", 0.1, Domain::From(0.0, MAX)),
        param("gamma", "how it grows", 1.0, Domain::From(0.0, 2.0)),
    ],
    |p| Box::new(Asentmax { alpha: p[0], delta: p[1], beta: p[2], gamma: p[3] }),
);
