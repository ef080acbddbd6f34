//! Functions of each score alone, and what they are divided by.

use super::{Class, Domain, Family, Kind, MAX, Normalizer, Param, Row, param, positive};
use crate::simd;

/// What a row is divided by: nothing, its length `n`, `sqrt n`, the sum of sizes, the root of the sum
/// of squares.
const NORMS: Domain = Domain::Word(&["none", "n", "sqrt_n", "l1", "l2"]);
const NONE: f32 = 0.0;
const N: f32 = 1.0;
const SQRT_N: f32 = 2.0;
const L1: f32 = 3.0;

const fn norm(default: f32) -> Param {
    param("norm", "what weights are divided by", default, NORMS)
}

struct Pointwise<F> {
    /// Replaces every score of a row.
    map: F,
    norm: f32,
}

impl<F: Fn(&mut [f32]) + Sync + Send> Normalizer for Pointwise<F> {
    fn row(&self, scores: &mut [f32], _: Row) {
        (self.map)(scores);
        let n = scores.len() as f32;
        let divisor = match self.norm {
            NONE => return,
            N => n,
            SQRT_N => n.sqrt(),
            L1 => simd::sum_of_sizes(scores),
            _ => simd::squares(scores, 0.0).sqrt(),
        };
        // A row of zeros stays one.
        simd::scale(scores, if divisor > 0.0 { 1.0 / divisor } else { 0.0 });
    }
}

fn rows(map: impl Fn(&mut [f32]) + Sync + Send + 'static, norm: f32) -> Box<dyn Normalizer> {
    Box::new(Pointwise { map, norm })
}

fn pointwise<F>(f: F, norm: f32) -> Box<dyn Normalizer>
where
    F: Fn(f32) -> f32 + Copy + Sync + Send + 'static,
{
    rows(move |scores| simd::map(scores, f), norm)
}

const FAMILY: Family =
    Family { class: Class::Pointwise, shift_invariant: false, sums_to_one: false };

pub(super) static SIGMOID: Kind = FAMILY.kind(
    "sigmoid",
    "w_j = 1 / (1 + exp(-x_j + ln n)) / norm",
    "Ramapuram et al., arXiv 2409.04431",
    &[param("b", "factor on ln n, which is added", -1.0, Domain::From(-MAX, MAX)), norm(NONE)],
    |p| {
        let factor = p[0];
        let sigmoid = move |scores: &mut [f32]| {
            let b = factor * (scores.len() as f32).ln();
            simd::map(scores, |x| 1.0 / (1.0 + simd::exp1(-x - b)));
        };
        rows(sigmoid, p[1])
    },
);

pub(super) static RELU: Kind = FAMILY.kind(
    "relu",
    "w_j = max(x_j, 0) / norm",
    "Wortsman et al., arXiv 2309.08586",
    &[norm(N)],
    |p| pointwise(positive, p[0]),
);

pub(super) static RELU2: Kind = FAMILY.kind(
    "relu2",
    "w_j = max(x_j, 0)^2 / norm",
    "Hua et al., arXiv 2202.10447",
    &[norm(N)],
    |p| pointwise(|x| positive(x) * positive(x), p[0]),
);

pub(super) static SOFTPLUS: Kind = FAMILY.kind(
    "softplus",
    "w_j = ln(1 + exp(x_j)) / norm",
    "Wortsman et al., arXiv 2309.08586",
    &[norm(N)],
    |p| rows(|scores| simd::softplus(scores, 1.0), p[0]),
);

pub(super) static SQUAREPLUS: Kind = FAMILY.kind(
    "squareplus",
    "w_j = (x_j + sqrt(x_j^2 + 4)) / 2 / norm",
    "Barron, arXiv 2112.11687",
    &[norm(N)],
    |p| {
        // For negative x without the difference of two large numbers.
        let f = |x: f32| {
            let root = (x * x + 4.0).sqrt();
            if x < 0.0 { 2.0 / (root - x) } else { (x + root) / 2.0 }
        };
        pointwise(f, p[0])
    },
);

pub(super) static ELU1: Kind = Kind {
    sums_to_one: true,
    ..FAMILY.kind(
        "elu1",
        "w_j = x_j + 1 for x_j > 0, else exp(x_j); / norm",
        "Katharopoulos et al., arXiv 2006.16236, on scores",
        &[norm(L1)],
        |p| pointwise(|x| if x > 0.0 { x + 1.0 } else { simd::exp1(x) }, p[0]),
    )
};

pub(super) static TAYLOR2: Kind = Kind {
    sums_to_one: true,
    ..FAMILY.kind(
        "taylor2",
        "w_j = (1 + x_j + x_j^2 / 2) / norm",
        "Nauen et al., TaylorShift, arXiv 2403.02920",
        &[norm(L1)],
        |p| pointwise(|x| 1.0 + x + 0.5 * x * x, p[0]),
    )
};

pub(super) static POWER: Kind = FAMILY.kind(
    "power",
    "w_j = x_j^p / norm",
    "Saratchandran et al., arXiv 2410.18613",
    &[param("p", "the power", 3.0, Domain::Whole(1.0, 8.0)), norm(SQRT_N)],
    |p| {
        let power = p[0] as usize;
        pointwise(move |x| (1..power).fold(x, |y, _| y * x), p[1])
    },
);

pub(super) static CONSMAX: Kind = FAMILY.kind(
    "consmax",
    "w_j = exp(x_j - beta) / gamma / norm",
    "Liu et al., ConSmax, arXiv 2402.10930",
    &[
        param("beta", "subtracted from scores", 2.0, Domain::From(-MAX, MAX)),
        param("gamma", "divisor", 100.0, Domain::Above(0.0, MAX)),
        norm(NONE),
    ],
    |p| {
        let (beta, gamma) = (p[0], p[1]);
        pointwise(move |x| simd::exp1(x - beta) / gamma, p[2])
    },
);

pub(super) static LAPLACE: Kind = FAMILY.kind(
    "laplace",
    "w_j = (1 + erf((x_j - mu) / (sigma sqrt 2))) / 2 / norm, mu = sqrt(1/2), sigma = 1 / sqrt(4 pi)",
    "Ma et al., Mega, arXiv 2209.10655",
    &[norm(NONE)],
    |p| {
        const MU: f32 = std::f32::consts::FRAC_1_SQRT_2;
        // 1 / (sigma sqrt 2) = sqrt(2 pi).
        const FACTOR: f32 = 2.506_628_3;
        pointwise(|x| 0.5 * (1.0 + erf((x - MU) * FACTOR)), p[0])
    },
);

/// The error function to 1.5e-7 (Abramowitz and Stegun 7.1.26).
#[inline(always)]
fn erf(x: f32) -> f32 {
    let size = if x < 0.0 { -x } else { x };
    let t = 1.0 / (1.0 + 0.327_591_1 * size);
    let mut p = 1.061_405_4f32;
    for c in [-1.453_152, 1.421_413_8, -0.284_496_74, 0.254_829_6] {
        p = p * t + c;
    }
    let y = 1.0 - p * t * simd::exp1(-size * size);
    if x < 0.0 { -y } else { y }
}

pub(super) static POLYMAX: Kind = FAMILY.kind(
    "polymax",
    "w_j = (x_j^2 + 1, x_j > 0; 1 + x_j / 100, -100 < x_j <= 0; 0 below) / divisor / norm",
    "ReaLLMASIC nanoGPT",
    &[param("divisor", "of every weight", 1000.0, Domain::Above(0.0, MAX)), norm(NONE)],
    |p| {
        let factor = 1.0 / p[0];
        let f = move |x: f32| {
            let y = if x > 0.0 { x * x + 1.0 } else { positive(1.0 + 0.01 * x) };
            y * factor
        };
        pointwise(f, p[1])
    },
);
