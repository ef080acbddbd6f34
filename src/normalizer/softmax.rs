//! Softmax and what differs from it by a map of the scores, a term in the sum, or a second row.

use super::{Class, Domain, Kind, MAX, Normalizer, Row, param, with_copy};
use crate::simd;

/// `x = softmax(x)`, by subtraction of the maximum.
pub(super) fn softmax(x: &mut [f32]) {
    let max = simd::max(x);
    let sum = simd::exp_minus(x, max);
    simd::scale(x, 1.0 / sum);
}

/// `x = e^x / (e^logit + sum_i e^x_i)`
fn with_sink(x: &mut [f32], logit: f32) {
    // Whichever is larger, so that nothing overflows.
    let max = simd::max(x).max(logit);
    let sum = simd::exp_minus(x, max) + simd::exp1(logit - max);
    simd::scale(x, 1.0 / sum);
}

/// Softmax of `factor x`.
struct Scaled(f32);

impl Normalizer for Scaled {
    fn row(&self, scores: &mut [f32], _: Row) {
        if self.0 != 1.0 {
            simd::scale(scores, self.0);
        }
        softmax(scores);
    }
}

pub(super) static SOFTMAX: Kind = Kind {
    name: "softmax",
    formula: "w_j = exp(x_j) / sum_i exp(x_i)",
    paper: "Bridle 1990; streaming form: Milakov and Gimelshein, arXiv 1805.02867",
    params: &[],
    class: Class::Streaming,
    shift_invariant: true,
    sums_to_one: true,
    make: |_| Box::new(Scaled(1.0)),
};

pub(super) static TEMPERATURE: Kind = Kind {
    name: "temperature",
    formula: "w = softmax(x / tau)",
    paper: "at inference: arXiv 2511.01292",
    params: &[param("tau", "temperature", 1.0, Domain::Above(0.0, MAX))],
    class: Class::Streaming,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(Scaled(1.0 / p[0])),
};

pub(super) static SOFTERMAX: Kind = Kind {
    name: "softermax",
    formula: "w_j = 2^x_j / sum_i 2^x_i",
    paper: "Stevens et al., Softermax, arXiv 2103.09301",
    params: &[],
    class: Class::Streaming,
    shift_invariant: true,
    sums_to_one: true,
    make: |_| Box::new(Scaled(std::f32::consts::LN_2)),
};

struct Softcap(f32);

impl Normalizer for Softcap {
    fn row(&self, scores: &mut [f32], _: Row) {
        simd::softcap(scores, self.0);
        softmax(scores);
    }
}

pub(super) static SOFTCAP: Kind = Kind {
    name: "softcap",
    formula: "w = softmax(cap tanh(x / cap))",
    paper: "Gemma 2, arXiv 2408.00118",
    params: &[param("cap", "largest size of a score", 50.0, Domain::Above(0.0, MAX))],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: true,
    make: |p| Box::new(Softcap(p[0])),
};

struct Sink(f32);

impl Normalizer for Sink {
    fn row(&self, scores: &mut [f32], _: Row) {
        with_sink(scores, self.0);
    }
}

pub(super) static SOFTMAX1: Kind = Kind {
    name: "softmax1",
    formula: "w_j = exp(x_j) / (1 + sum_i exp(x_i))",
    paper: "Miller, Attention Is Off By One, 2023",
    params: &[],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: false,
    make: |_| Box::new(Sink(0.0)),
};

pub(super) static SOFTMAX_N: Kind = Kind {
    name: "softmax_n",
    formula: "w_j = exp(x_j) / (n + sum_i exp(x_i))",
    paper: "Miller 2023; Murphy, Flash-Attention-Softmax-N",
    params: &[param("n", "added to the sum", 1.0, Domain::From(0.0, MAX))],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: false,
    make: |p| Box::new(Sink(p[0].ln())),
};

pub(super) static SINK: Kind = Kind {
    name: "sink",
    formula: "w_j = exp(x_j) / (exp(s) + sum_i exp(x_i))",
    paper: "gpt-oss model card, arXiv 2508.10925",
    params: &[param("s", "logit of the sink", 0.0, Domain::From(-MAX, MAX))],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: false,
    make: |p| Box::new(Sink(p[0])),
};

struct Sigsoftmax;

impl Normalizer for Sigsoftmax {
    fn row(&self, scores: &mut [f32], _: Row) {
        let max = simd::max(scores);
        let sum = simd::map_sum(scores, |x| simd::exp1(x - max) / (1.0 + simd::exp1(-x)));
        simd::scale(scores, if sum > 0.0 { 1.0 / sum } else { 0.0 });
    }
}

pub(super) static SIGSOFTMAX: Kind = Kind {
    name: "sigsoftmax",
    formula: "w_j = exp(x_j) sigmoid(x_j) / sum_i exp(x_i) sigmoid(x_i)",
    paper: "Kanai et al., arXiv 1805.10829",
    params: &[],
    class: Class::Streaming,
    shift_invariant: false,
    sums_to_one: true,
    make: |_| Box::new(Sigsoftmax),
};

struct Euclidean;

impl Normalizer for Euclidean {
    fn row(&self, scores: &mut [f32], _: Row) {
        let max = simd::max(scores);
        simd::exp_minus(scores, max);
        let squares = simd::squares(scores, 0.0);
        simd::scale(scores, 1.0 / squares.sqrt());
    }
}

pub(super) static L2: Kind = Kind {
    name: "l2",
    formula: "w_j = exp(x_j) / sqrt(sum_i exp(2 x_i))",
    paper: "Richter and Wattenhofer, Normalized Attention Without Probability Cage, arXiv 2005.09561",
    params: &[],
    class: Class::Streaming,
    shift_invariant: true,
    sums_to_one: false,
    make: |_| Box::new(Euclidean),
};

struct Gumbel {
    tau: f32,
    seed: u64,
}

impl Normalizer for Gumbel {
    fn row(&self, scores: &mut [f32], at: Row) {
        // The same noise for the same place, whatever else is computed.
        let mut state = self.seed;
        for part in [at.layer, at.head, at.position] {
            state = mixed(state ^ part as u64);
        }
        with_copy(scores, |scores, noise| {
            for noise in noise.iter_mut() {
                state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
                *noise = uniform(mixed(state));
            }
            simd::add_gumbel(scores, noise, 1.0 / self.tau);
        });
        softmax(scores);
    }
}

/// A number above 0 and below 1, exact, from the 23 highest bits.
fn uniform(random: u64) -> f32 {
    ((random >> 41) as f32 + 0.5) / (1u32 << 23) as f32
}

/// The output function of SplitMix64 (Steele, Lea and Flood 2014).
fn mixed(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

pub(super) static GUMBEL: Kind = Kind {
    name: "gumbel",
    formula: "w = softmax((x + g) / tau), g_j = -ln(-ln u_j)",
    paper: "Jang et al., arXiv 1611.01144; Maddison et al., arXiv 1611.00712",
    params: &[
        param("tau", "temperature", 1.0, Domain::Above(0.0, MAX)),
        param("seed", "of the noise", 0.0, Domain::Whole(0.0, 16_777_215.0)),
    ],
    class: Class::Streaming,
    shift_invariant: true,
    sums_to_one: true,
    make: |p| Box::new(Gumbel { tau: p[0], seed: p[1] as u64 }),
};

struct Differential {
    lambda: f32,
    tau: f32,
    clip: bool,
}

impl Normalizer for Differential {
    fn row(&self, scores: &mut [f32], _: Row) {
        with_copy(scores, |scores, other| {
            simd::scale(other, 1.0 / self.tau);
            softmax(other);
            softmax(scores);
            simd::add_scaled(scores, -self.lambda, other);
            if self.clip {
                simd::map(scores, |x| if x < 0.0 { 0.0 } else { x });
            }
        });
    }
}

pub(super) static DIFFERENTIAL: Kind = Kind {
    name: "differential",
    formula: "w = softmax(x) - lambda softmax(x / tau)",
    paper: "after Ye et al., arXiv 2410.05258, with one set of scores",
    params: &[
        param("lambda", "share of the second row", 0.2, Domain::From(0.0, 1.0)),
        param("tau", "temperature of the second row", 2.0, Domain::Above(0.0, MAX)),
        param("clip", "negative weights become 0", 0.0, Domain::Word(&["no", "yes"])),
    ],
    class: Class::TwoPass,
    shift_invariant: true,
    sums_to_one: false,
    make: |p| Box::new(Differential { lambda: p[0], tau: p[1], clip: p[2] == 1.0 }),
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_is_finite() {
        let u = [0, 1 << 40, 1 << 63, u64::MAX].map(uniform);
        assert!(u.iter().all(|u| 0.0 < *u && *u < 1.0), "{u:?}");
        let mut x = [3.0; 4];
        simd::add_gumbel(&mut x, &u, 0.5);
        for (x, u) in x.iter().zip(u.map(f64::from)) {
            let exact = 0.5 * (3.0 - (-u.ln()).ln());
            assert!((f64::from(*x) - exact).abs() < 2e-6, "{x} {exact}");
        }
    }
}
