//! Weights that are cut, re-weighted, or handed from key to key.

use super::softmax::softmax;
use super::{Class, Domain, Kind, MAX, Normalizer, Param, Row, param, positive, with_copy};
use crate::simd;

struct Softpick(f32);

impl Normalizer for Softpick {
    fn row(&self, scores: &mut [f32], _: Row) {
        // Everything times e^-max, or times 1 where no score is positive.
        let max = simd::max(scores).max(0.0);
        let one = simd::exp1(-max);
        simd::map(scores, |x| simd::exp1(x - max) - one);
        let sum = simd::sum_of_sizes(scores) + self.0 * one;
        let factor = if sum > 0.0 { 1.0 / sum } else { 0.0 };
        simd::map(scores, |y| positive(y) * factor);
    }
}

pub(super) static SOFTPICK: Kind = Kind {
    name: "softpick",
    formula: "w_j = max(exp(x_j) - 1, 0) / (sum_i |exp(x_i) - 1| + eps)",
    paper: "Zuhri et al., arXiv 2504.20966",
    params: &[param("eps", "added to the sum", 1e-6, Domain::Above(0.0, 1.0))],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: false,
    make: |p| Box::new(Softpick(p[0])),
};

/// `x = softplus(c ln n x)`, divided by the sum.
fn lssa(scores: &mut [f32], c: f32) {
    let factor = c * (scores.len() as f32).ln();
    simd::softplus(scores, factor);
    let sum = simd::sum(scores);
    simd::scale(scores, if sum > 0.0 { 1.0 / sum } else { 0.0 });
}

/// `w = max(n w - offset, 0)^power`, divided by the sum; where nothing is left, `w` as it was.
fn reweigh(weights: &mut [f32], offset: f32, power: f32) {
    let n = weights.len() as f32;
    let top = n * simd::max(weights) - offset;
    if top.is_nan() || top <= 0.0 {
        return;
    }
    // Relative to the largest, so that nothing overflows.
    let sum = simd::powers(weights, n / top, -offset / top, power);
    simd::scale(weights, 1.0 / sum);
}

const C: Param = param("c", "factor on ln n x", 0.1685, Domain::Above(0.0, MAX));
const OFFSET: Param = param("cut", "subtracted from n w", 0.0, Domain::From(0.0, MAX));
const POWER: Param = param("power", "of what is left", 3.0, Domain::From(1.0, 64.0));

struct Lssa(f32);

impl Normalizer for Lssa {
    fn row(&self, scores: &mut [f32], _: Row) {
        lssa(scores, self.0);
    }
}

pub(super) static LSSA: Kind = Kind {
    name: "lssa",
    formula: "w_j = softplus(c ln n x_j) / sum_i softplus(c ln n x_i)",
    paper: "after Gao and Spratling, arXiv 2501.13428",
    params: &[C],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: true,
    make: |p| Box::new(Lssa(p[0])),
};

struct Reweighted {
    c: Option<f32>,
    offset: f32,
    power: f32,
}

impl Normalizer for Reweighted {
    fn row(&self, scores: &mut [f32], _: Row) {
        match self.c {
            Some(c) => lssa(scores, c),
            None => softmax(scores),
        }
        reweigh(scores, self.offset, self.power);
    }
}

pub(super) static LSSAR: Kind = Kind {
    name: "lssar",
    formula: "v = lssa(x); w_j = max(n v_j - cut, 0)^power / sum_i of the same",
    paper: "after Gao and Spratling, arXiv 2501.13428",
    params: &[C, OFFSET, POWER],
    class: Class::TwoPass,
    shift_invariant: false,
    sums_to_one: true,
    make: |p| Box::new(Reweighted { c: Some(p[0]), offset: p[1], power: p[2] }),
};

pub(super) static REWEIGHT: Kind = Kind {
    name: "reweight",
    formula: "v = softmax(x); w_j = max(n v_j - cut, 0)^power / sum_i of the same",
    paper: "the second stage of arXiv 2501.13428, on softmax",
    params: &[OFFSET, param("power", "of what is left", 1.5, Domain::From(1.0, 64.0))],
    class: Class::TwoPass,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(Reweighted { c: None, offset: p[0], power: p[1] }),
};

struct StickBreaking {
    current: bool,
}

impl Normalizer for StickBreaking {
    fn row(&self, scores: &mut [f32], _: Row) {
        let scores = match (self.current, scores) {
            (false, [before @ .., own]) => {
                *own = 0.0;
                before
            }
            (_, scores) => scores,
        };
        // ln w_j = ln sigmoid(x_j) + sum over newer i of ln(1 - sigmoid(x_i)), where
        // ln(1 - sigmoid x) = -softplus(x) and ln sigmoid x = x - softplus(x).
        with_copy(scores, |scores, taken| {
            simd::softplus(taken, 1.0);
            let mut newer = 0.0;
            for (x, taken) in scores.iter_mut().zip(taken.iter()).rev() {
                *x -= taken + newer;
                newer += taken;
            }
        });
        simd::map(scores, simd::exp1);
    }
}

pub(super) static STICK_BREAKING: Kind = Kind {
    name: "stick_breaking",
    formula: "w_j = sigmoid(x_j) prod_{i > j} (1 - sigmoid(x_i))",
    paper: "Tan et al., arXiv 2410.17980",
    params: &[param(
        "current",
        "whether the query's own key takes part",
        1.0,
        Domain::Word(&["no", "yes"]),
    )],
    class: Class::Ordered,
    shift_invariant: false,
    sums_to_one: false,
    make: |p| Box::new(StickBreaking { current: p[0] == 1.0 }),
};

struct Hccs(f32);

impl Normalizer for Hccs {
    fn row(&self, scores: &mut [f32], _: Row) {
        let (max, slope) = (simd::max(scores), self.0);
        let sum = simd::map_sum(scores, |x| positive(1.0 + slope * (x - max)));
        simd::scale(scores, 1.0 / sum);
    }
}

pub(super) static HCCS: Kind = Kind {
    name: "hccs",
    formula: "w_j = max(1 + slope (x_j - max x), 0) / sum_i of the same",
    paper: "Head-calibrated clipped-linear softmax, arXiv 2604.02292",
    params: &[param("slope", "per unit of score", 0.25, Domain::Above(0.0, MAX))],
    class: Class::TwoPass,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(Hccs(p[0])),
};
