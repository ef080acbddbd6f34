//! Softmax: `w_j = exp(x_j - max x) / sum_i exp(x_i - max x)` (Bridle 1990).

use super::{Normalizer, Row};
use crate::simd;

pub(super) struct Softmax;

impl Normalizer for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn row(&self, scores: &mut [f32], _at: Row) {
        let max = simd::max(scores);
        let sum = simd::exp_minus(scores, max);
        simd::scale(scores, 1.0 / sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: Row = Row { position: 0, layer: 0, head: 0 };

    #[test]
    fn equals_its_definition() {
        let x = [1.0f32, -2.5, 0.0, 30.0, 29.0];
        let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
        let mut w = x;
        Softmax.row(&mut w, AT);
        for (x, w) in x.iter().zip(w) {
            assert!((f64::from(*x).exp() / sum - f64::from(w)).abs() < 1e-7);
        }
    }

    #[test]
    fn extreme_rows() {
        let mut one = [-1e4f32];
        Softmax.row(&mut one, AT);
        assert_eq!(one, [1.0]);
        let mut far = [1e4f32, -1e4];
        Softmax.row(&mut far, AT);
        assert_eq!(far, [1.0, 0.0]);
        let mut nan = [0.0, f32::NAN];
        Softmax.row(&mut nan, AT);
        assert!(nan.iter().all(|w| w.is_nan()));
    }
}
