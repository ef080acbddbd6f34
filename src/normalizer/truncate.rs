//! Softmax of which only some keys keep their weight.

use super::softmax::softmax;
use super::{Class, Domain, Kind, MAX, Normalizer, Row, param, with_memory};
use crate::simd;

/// Removes keys for which `gone` holds.
fn without(scores: &mut [f32], gone: impl Fn(f32) -> bool + Copy) {
    simd::map(scores, |x| if gone(x) { f32::NEG_INFINITY } else { x });
}

struct TopK(usize);

impl Normalizer for TopK {
    fn row(&self, scores: &mut [f32], _: Row) {
        if scores.len() > self.0 {
            let few = self.0 <= simd::GROUPS;
            let bound = if few { simd::least_of_largest(scores) } else { f32::NEG_INFINITY };
            let least = with_memory(|[large, _]| {
                simd::gather(scores, bound, f32::INFINITY, large);
                // They are fewer than k only where some scores are NaN.
                let at = self.0.min(large.len()).checked_sub(1)?;
                Some(*large.select_nth_unstable_by(at, |a, b| b.total_cmp(a)).1)
            });
            if let Some(least) = least {
                without(scores, |x| x < least);
            }
        }
        softmax(scores);
    }
}

pub(super) static TOP_K: Kind = Kind {
    name: "top_k",
    formula: "w = softmax over the k largest x; all of several equal ones stay",
    paper: "Gupta et al., arXiv 2106.06899; on trained models: arXiv 2512.03494",
    params: &[param("k", "keys that stay", 64.0, Domain::Whole(1.0, 1e9))],
    class: Class::Selecting,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(TopK(p[0] as usize)),
};

struct TopP {
    p: f32,
    renormalise: bool,
}

/// Halvings after which the weights that may still be the least are gathered.
const HALVINGS: usize = 4;

impl TopP {
    /// The largest weight so that those at least as large have the mass, found bit by bit: positive
    /// floats compare like their bits.
    fn least(&self, weights: &[f32]) -> f32 {
        // Smaller ones do not make up what may go, as long as sums are not rounded to it.
        let small = (1.0 - self.p) / weights.len() as f32;
        let enough = simd::sum_from(weights, small) >= self.p;
        let (mut least, mut most) =
            (if enough { small } else { 0.0 }.to_bits(), simd::max(weights).to_bits());
        with_memory(|[between, next]| {
            between.clear();
            between.extend_from_slice(weights);
            // The mass of those above `most`, and of those of them that are not in `between`.
            let (mut above, mut gone) = (0.0, 0.0);
            for halving in 1.. {
                if least >= most {
                    break;
                }
                let middle = least + (most - least).div_ceil(2);
                let sum = gone + simd::sum_from(between, f32::from_bits(middle));
                match sum >= self.p {
                    true => least = middle,
                    false => (most, above) = (middle - 1, sum),
                }
                if halving % HALVINGS == 0 {
                    simd::gather(between, f32::from_bits(least), f32::from_bits(most), next);
                    std::mem::swap(between, next);
                    gone = above;
                }
            }
        });
        f32::from_bits(least)
    }
}

impl Normalizer for TopP {
    fn row(&self, scores: &mut [f32], _: Row) {
        softmax(scores);
        let least = if self.p < 1.0 { self.least(scores) } else { 0.0 };
        let sum = simd::map_sum(scores, |w| if w < least { 0.0 } else { w });
        if self.renormalise {
            simd::scale(scores, 1.0 / sum);
        }
    }
}

pub(super) static TOP_P: Kind = Kind {
    name: "top_p",
    formula: "w = softmax(x) on the fewest keys whose weights sum to p, 0 elsewhere; then / sum w",
    paper: "Lin et al., Twilight, arXiv 2502.02770",
    params: &[
        param("p", "mass that stays", 0.95, Domain::Above(0.0, 1.0)),
        param("rest", "what becomes of the mass that goes", 0.0, Domain::Word(&["shared", "lost"])),
    ],
    class: Class::Selecting,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(TopP { p: p[0], renormalise: p[1] == 0.0 }),
};

struct Threshold(f32);

impl Normalizer for Threshold {
    fn row(&self, scores: &mut [f32], _: Row) {
        // The largest always stays.
        let least = simd::max(scores).min(self.0);
        without(scores, |x| x < least);
        softmax(scores);
    }
}

pub(super) static THRESHOLD: Kind = Kind {
    name: "threshold",
    formula: "w = softmax over x_j >= theta, and the largest",
    paper: "Berestizshevsky et al., Top-Theta, arXiv 2502.08363",
    params: &[param("theta", "least score, by calibration", -MAX, Domain::From(-MAX, MAX))],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: true,
    make: |p| Box::new(Threshold(p[0])),
};

struct Skip(f32);

impl Normalizer for Skip {
    fn row(&self, scores: &mut [f32], _: Row) {
        let max = simd::max(scores);
        let sum = simd::exp_minus(scores, max);
        let (factor, least) = (1.0 / sum, self.0);
        simd::map(scores, |w| if w < least { 0.0 } else { w * factor });
    }
}

pub(super) static SKIP: Kind = Kind {
    name: "skip",
    formula: "w = softmax(x), 0 where exp(x_j - max x) < eps",
    paper: "Yuan et al., BLASST, arXiv 2512.12087, key by key",
    params: &[param("eps", "least weight relative to the largest", 1e-6, Domain::From(0.0, 1.0))],
    class: Class::Streaming,
    shift_invariant: true,
    sums_to_one: false,
    make: |p| Box::new(Skip(p[0])),
};

struct Hardmax;

impl Normalizer for Hardmax {
    fn row(&self, scores: &mut [f32], _: Row) {
        let max = simd::max(scores);
        let first = scores.iter().position(|x| *x == max);
        simd::map(scores, |x| if x.is_nan() { x } else { 0.0 });
        if let Some(first) = first {
            scores[first] = 1.0;
        }
    }
}

pub(super) static HARDMAX: Kind = Kind {
    name: "hardmax",
    formula: "w_j = 1 for the first of the largest x, 0 elsewhere",
    paper: "the limit of softmax(x / tau) for tau -> 0",
    params: &[],
    class: Class::Streaming,
    shift_invariant: true,
    sums_to_one: true,
    make: |_| Box::new(Hardmax),
};

struct Clipped {
    zeta: f32,
    alpha: f32,
}

impl Normalizer for Clipped {
    fn row(&self, scores: &mut [f32], _: Row) {
        let gamma = -self.alpha / scores.len() as f32;
        let factor = self.zeta - gamma;
        softmax(scores);
        simd::map(scores, |p| {
            let w = factor * p + gamma;
            let w = if w < 0.0 { 0.0 } else { w };
            if w > 1.0 { 1.0 } else { w }
        });
    }
}

pub(super) static CLIPPED: Kind = Kind {
    name: "clipped",
    formula: "w = clip((zeta + alpha / n) softmax(x) - alpha / n, 0, 1)",
    paper: "Bondarenko et al., Quantizable Transformers, arXiv 2306.12929",
    params: &[
        param("alpha", "cut at the bottom, times n", 1.0, Domain::From(0.0, MAX)),
        param("zeta", "stretch at the top", 1.0, Domain::From(1.0, MAX)),
    ],
    class: Class::TwoPass,
    shift_invariant: true,
    sums_to_one: false,
    make: |p| Box::new(Clipped { alpha: p[0], zeta: p[1] }),
};
