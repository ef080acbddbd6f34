//! Temperatures that depend on the length of the row, on the position, or on the row itself.

use super::softmax::softmax;
use super::{Class, Domain, Family, Kind, MAX, Normalizer, Row, param, with_copy};
use crate::simd;

/// Softmax of the scores times a factor.
struct Factor<F>(F);

impl<F: Fn(usize, Row) -> f32 + Sync + Send> Normalizer for Factor<F> {
    fn row(&self, scores: &mut [f32], at: Row) {
        let factor = self.0(scores.len(), at);
        if factor != 1.0 {
            simd::scale(scores, factor);
        }
        softmax(scores);
    }
}

/// Kinds that scale scores before softmax.
const FAMILY: Family = Family { class: Class::Streaming, shift_invariant: true, sums_to_one: true };

pub(super) static SSMAX: Kind = FAMILY.kind(
    "ssmax",
    "w = softmax(max(s ln n, least) x)",
    "Nakanishi, Scalable-Softmax, arXiv 2501.19399",
    &[
        // Keeps the mean factor 1 over rows of up to 1024 keys.
        param("s", "factor on ln n; 1 / mean ln n for a swap", 0.1685, Domain::Above(0.0, MAX)),
        param("least", "smallest factor on scores", 0.0, Domain::From(0.0, MAX)),
    ],
    |p| {
        let (s, least) = (p[0], p[1]);
        Box::new(Factor(move |n: usize, _: Row| (s * (n as f32).ln()).max(least)))
    },
);

pub(super) static LOG_N: Kind = FAMILY.kind(
    "log_n",
    "w = softmax(max(ln n / ln n_train, 1) x)",
    "Chiang and Cholak, arXiv 2202.12172; Qwen's logn attention",
    &[param("n_train", "trained context in tokens; 0: the model's", 0.0, Domain::Whole(0.0, 1e9))],
    |p| {
        let given = p[0];
        Box::new(Factor(move |n: usize, at: Row| {
            let trained = if given > 0.0 { given } else { at.n_ctx_train as f32 };
            ((n as f32).ln() / trained.max(2.0).ln()).max(1.0)
        }))
    },
);

pub(super) static LLAMA4: Kind = FAMILY.kind(
    "llama4",
    "w = softmax((1 + scale_n ln(floor((position + 1) / floor) + 1)) x)",
    "Llama 4's reference code",
    &[
        param("floor", "tokens per step", 8192.0, Domain::Whole(1.0, 1e9)),
        param("scale_n", "factor on the logarithm", 0.1, Domain::From(0.0, MAX)),
    ],
    |p| {
        let (floor, scale) = (p[0], p[1]);
        Box::new(Factor(move |_: usize, at: Row| {
            let steps = ((at.position + 1) as f32 / floor).floor();
            1.0 + scale * (steps + 1.0).ln()
        }))
    },
);

pub(super) static YARN: Kind = FAMILY.kind(
    "yarn",
    "w = softmax((0.1 ln f + 1)^2 x)",
    "Peng et al., YaRN, arXiv 2309.00071",
    &[param("f", "factor by which the context is extended", 1.0, Domain::From(1.0, MAX))],
    |p| {
        let factor = (0.1 * p[0].ln() + 1.0).powi(2);
        Box::new(Factor(move |_: usize, _: Row| factor))
    },
);

struct Adaptive([f32; 5]);

impl Normalizer for Adaptive {
    fn row(&self, scores: &mut [f32], _: Row) {
        // H = L - E[x], both from scores minus their maximum.
        let max = simd::max(scores);
        let entropy = with_copy(scores, |scores, p| {
            let sum = simd::exp_minus(p, max);
            let mean = simd::dot(p, scores) / sum - max;
            sum.ln() - mean
        });
        if entropy > 0.5 {
            let beta = self.0.iter().fold(0.0, |value, c| value * entropy + c);
            simd::scale(scores, beta.max(1.0));
        }
        softmax(scores);
    }
}

pub(super) static ADAPTIVE: Kind = Kind {
    name: "adaptive",
    formula: "w = softmax(b x), b = max(polynomial of the entropy H of softmax(x), 1) where H > 0.5",
    paper: "Velickovic et al., softmax is not enough, arXiv 2410.01104",
    params: &[
        param("c4", "coefficient of H^4", -0.037, Domain::From(-MAX, MAX)),
        param("c3", "coefficient of H^3", 0.481, Domain::From(-MAX, MAX)),
        param("c2", "coefficient of H^2", -2.3, Domain::From(-MAX, MAX)),
        param("c1", "coefficient of H", 4.917, Domain::From(-MAX, MAX)),
        param("c0", "constant", -1.791, Domain::From(-MAX, MAX)),
    ],
    class: Class::TwoPass,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(Adaptive([p[0], p[1], p[2], p[3], p[4]])),
};
