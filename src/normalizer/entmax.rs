//! Sparse maps to the simplex: `w = max((alpha - 1) x - tau, 0)^(1 / (alpha - 1))`, with the `tau` for
//! which the weights sum to 1. Only keys within `1 / (alpha - 1)` of the largest can have a weight, so
//! they are gathered first.

use super::{Class, Domain, Kind, MAX, Normalizer, Row, param, positive, with_copy};
use crate::simd;

/// Calls `work` with the scores above `least`, the largest first.
fn sorted<T>(scores: &mut [f32], least: f32, work: impl FnOnce(&[f32]) -> T) -> T {
    with_copy(scores, |_, copy| {
        copy.retain(|x| *x > least);
        copy.sort_unstable_by(|a, b| b.total_cmp(a));
        work(copy)
    })
}

struct Sparsemax;

impl Normalizer for Sparsemax {
    fn row(&self, scores: &mut [f32], _: Row) {
        let max = simd::max(scores);
        let tau = sorted(scores, max - 1.0, |x| {
            let (mut sum, mut tau) = (0.0f32, -1.0f32);
            for (k, x) in x.iter().enumerate() {
                sum += x - max;
                let candidate = (sum - 1.0) / (k + 1) as f32;
                if x - max <= candidate {
                    break;
                }
                tau = candidate;
            }
            tau
        });
        simd::map(scores, |x| positive(x - max - tau));
    }
}

pub(super) static SPARSEMAX: Kind = Kind {
    name: "sparsemax",
    formula: "w_j = max(x_j - tau, 0), sum w = 1",
    paper: "Martins and Astudillo, arXiv 1602.02068",
    params: &[],
    class: Class::Selecting,
    shift_invariant: true,
    sums_to_one: true,
    make: |_| Box::new(Sparsemax),
};

struct Entmax15;

impl Normalizer for Entmax15 {
    fn row(&self, scores: &mut [f32], _: Row) {
        let max = simd::max(scores);
        let tau = sorted(scores, max - 2.0, |x| {
            let (mut sum, mut squares, mut tau) = (0.0f32, 0.0f32, -1.0f32);
            for (k, x) in x.iter().enumerate() {
                let z = (x - max) / 2.0;
                (sum, squares) = (sum + z, squares + z * z);
                let k = (k + 1) as f32;
                let mean = sum / k;
                // What is left of 1 after the variance, per key.
                let rest = (1.0 - (squares - k * mean * mean)) / k;
                let candidate = mean - positive(rest).sqrt();
                if z < candidate {
                    break;
                }
                tau = candidate;
            }
            tau
        });
        simd::map(scores, |x| {
            let u = positive((x - max) / 2.0 - tau);
            u * u
        });
    }
}

pub(super) static ENTMAX15: Kind = Kind {
    name: "entmax15",
    formula: "w_j = max(x_j / 2 - tau, 0)^2, sum w = 1",
    paper: "Peters et al., arXiv 1905.05702",
    params: &[],
    class: Class::Selecting,
    shift_invariant: true,
    sums_to_one: true,
    make: |_| Box::new(Entmax15),
};

/// Largest number of steps; 4 or 5 are usual.
const MAX_STEPS: usize = 30;

fn entmax(scores: &mut [f32], alpha: f32) {
    let max = simd::max(scores);
    let r = 1.0 / (alpha - 1.0);
    // With z = (alpha - 1)(x - max) <= 0, tau lies in [-1, 0).
    let tau = with_copy(scores, |_, z| {
        z.retain(|x| *x > max - r);
        simd::map(z, |x| (alpha - 1.0) * (x - max));
        // Newton's method on the r-norm of max(z - tau, 0), minus 1: convex and falling, so that from
        // the left it never goes too far; and for equal scores it is a straight line.
        let mut tau = -1.0f32;
        for _ in 0..MAX_STEPS {
            let [sum, slope] = simd::power_sums(z, tau, r);
            let norm = sum.powf(1.0 / r);
            let step = (norm - 1.0) * sum / (norm * slope);
            let next = tau + step;
            if step.is_nan() || step <= 0.0 || next == tau {
                break;
            }
            tau = next;
        }
        tau
    });
    let a = alpha - 1.0;
    let sum = simd::powers(scores, a, -a * max - tau, r);
    simd::scale(scores, 1.0 / sum);
}

struct Entmax(f32);

impl Normalizer for Entmax {
    fn row(&self, scores: &mut [f32], _: Row) {
        entmax(scores, self.0);
    }
}

pub(super) static ENTMAX: Kind = Kind {
    name: "entmax",
    formula: "w_j = max((alpha - 1) x_j - tau, 0)^(1 / (alpha - 1)), sum w = 1",
    paper: "Peters et al., arXiv 1905.05702; Goncalves et al., AdaSplash, arXiv 2502.12082",
    params: &[param("alpha", "2 is sparsemax, towards 1 softmax", 1.25, Domain::From(1.001, 2.0))],
    class: Class::Selecting,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(Entmax(p[0])),
};

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

pub(super) static ASENTMAX: Kind = Kind {
    name: "asentmax",
    formula: "w = entmax((delta + beta (ln n)^gamma) x), with constants",
    paper: "Vasylenko et al., arXiv 2506.16640",
    params: &[
        param("alpha", "as of entmax", 1.5, Domain::From(1.001, 2.0)),
        param("delta", "factor of short rows", 1.0, Domain::From(0.0, MAX)),
        param("beta", "factor that grows with n", 0.1, Domain::From(0.0, MAX)),
        param("gamma", "how it grows", 1.0, Domain::From(0.0, 2.0)),
    ],
    class: Class::Selecting,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(Asentmax { alpha: p[0], delta: p[1], beta: p[2], gamma: p[3] }),
};
