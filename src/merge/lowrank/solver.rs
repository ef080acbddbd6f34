//! Truncation of products in head space: matrices as large as a head, never as large as the model.
//!
//! For rows `q` and `k` with second moments `G_q = R_q^T R_q` and `G_k = R_k^T R_k`, the logits
//! `q A B^T k^T` of rank `r` that come nearest to `q k^T` in the sense of least squares, `q` and `k`
//! independent, follow from the singular values of `R_q R_k^T = U S V^T`: `A = R_q^-1 U_r S_r^1/2`, `B =
//! R_k^-1 V_r S_r^1/2`, and what is lost is the sum of the squares of the values dropped. This is the
//! solution of A3 (arXiv 2505.12942, section 3) and, with moments of the weights alone, of CLOVER (arXiv
//! 2411.17426), without products of the model's width. Queries of a group count by the sum of
//! their moments, which is what stacking them gives.

use faer::{Mat, MatRef, Side};

use crate::bad_usage;
use crate::error::{Error, Result};

/// Smallest eigenvalue of a second moment, as a share of their mean: directions that a text does not
/// show are kept as if it did a little.
const FLOOR: f64 = 1e-6;

/// A second moment as `R^T R`, and the inverse of `R`.
struct Root {
    root: Mat<f64>,
    inverse: Mat<f64>,
    /// Eigenvalues that are not what they were.
    damped: usize,
}

impl Root {
    fn of(gram: MatRef<f64>) -> Result<Root> {
        let n = gram.nrows();
        if (0..n).any(|j| (0..n).any(|i| !gram[(i, j)].is_finite())) {
            bad_usage!("a second moment of a head is not finite");
        }
        let eigen = gram.self_adjoint_eigen(Side::Lower);
        let eigen = eigen.map_err(|_| Error::Runtime("eigenvalues did not converge".into()))?;
        let (vectors, values) = (eigen.U(), eigen.S());
        let mean = (0..n).map(|i| gram[(i, i)]).sum::<f64>() / n.max(1) as f64;
        // A head that is always zero may be anything.
        let floor = if mean > 0.0 { FLOOR * mean } else { 1.0 };
        let size = |i: usize| values[i].max(floor).sqrt();
        Ok(Root {
            root: Mat::from_fn(n, n, |i, j| size(i) * vectors[(j, i)]),
            inverse: Mat::from_fn(n, n, |i, j| vectors[(i, j)] / size(j)),
            damped: (0..n).filter(|i| values[*i] < floor).count(),
        })
    }
}

/// A product of two sides, in the order of what its directions carry.
pub(super) struct Factors {
    /// Singular values, largest first.
    pub(super) values: Vec<f64>,
    /// What rows of either side are multiplied with; the first columns make the best product of that
    /// rank. `[dim, dim]`
    pub(super) left: Mat<f64>,
    pub(super) right: Mat<f64>,
    /// Directions of both moments that they hardly show.
    pub(super) damped: usize,
}

/// Factors of `q k^T` for rows with these second moments.
pub(super) fn factor(left: MatRef<f64>, right: MatRef<f64>) -> Result<Factors> {
    let (q, k) = (Root::of(left)?, Root::of(right)?);
    let product = &q.root * k.root.transpose();
    let svd = product.svd();
    let svd = svd.map_err(|_| Error::Runtime("singular values did not converge".into()))?;
    let n = product.nrows();
    let values: Vec<f64> = (0..n).map(|i| svd.S()[i]).collect();
    // Balanced, so that neither side has columns of very different sizes when it is rounded.
    let side = |inverse: &Mat<f64>, vectors: MatRef<f64>| {
        let map = inverse * vectors;
        Mat::from_fn(n, n, |i, j| map[(i, j)] * values[j].sqrt())
    };
    Ok(Factors {
        left: side(&q.inverse, svd.U()),
        right: side(&k.inverse, svd.V()),
        values,
        damped: q.damped + k.damped,
    })
}

/// For values `v A` of `A: [dim, r]`, what stands for the identity between them and the old output matrix:
/// `M: [r, dim]` with the least squares of `v - v A M`, where `v` has the second moment `gram`.
pub(super) fn refit(gram: MatRef<f64>, map: MatRef<f64>) -> Result<Mat<f64>> {
    let Root { root, .. } = Root::of(gram)?;
    let seen = &root * map;
    let svd = seen.thin_svd();
    let svd = svd.map_err(|_| Error::Runtime("singular values did not converge".into()))?;
    let (n, r) = (seen.nrows(), seen.ncols());
    let largest = if r > 0 { svd.S()[0] } else { 0.0 };
    // (R A)^+ R, where what is nothing stays nothing.
    let inverse = Mat::from_fn(r, n, |i, j| {
        (0..r)
            .filter(|k| svd.S()[*k] > 1e-12 * largest)
            .map(|k| svd.V()[(i, k)] * svd.U()[(j, k)] / svd.S()[k])
            .sum::<f64>()
    });
    Ok(inverse * root)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers between -1 and 1.
    fn random(n: usize, m: usize, seed: u64) -> Mat<f64> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        Mat::from_fn(n, m, |_, _| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
    }

    /// A matrix whose second moment is `c`, and the sum of squares beyond rank `r` of a product.
    fn root(c: &Mat<f64>) -> Mat<f64> {
        Root::of(c.as_ref()).unwrap().root
    }

    fn lost(product: &Mat<f64>, r: usize) -> f64 {
        product.singular_values().unwrap()[r..].iter().map(|s| s * s).sum()
    }

    /// `|R_x (W_q A B^T W_k^T - W_q W_k^T) R_x^T|^2`, with the first `r` columns of `A` and `B`.
    fn error(x: &Mat<f64>, q: &Mat<f64>, k: &Mat<f64>, f: &Factors, r: usize) -> f64 {
        let (a, b) = (f.left.subcols(0, r), f.right.subcols(0, r));
        let change = q * a * (k * b).transpose() - q * k.transpose();
        (x * change * x.transpose()).squared_norm_l2()
    }

    #[test]
    fn head_space_reaches_the_optimum_of_model_space() {
        for (d, dim, group) in [(24, 6, 1), (30, 8, 3), (17, 5, 2)] {
            let seed = (d * dim + group) as u64;
            let inputs = random(40, d, seed);
            let c = inputs.transpose() * &inputs;
            let r_x = root(&c);
            let queries: Vec<_> =
                (0..group).map(|h| random(d, dim, seed + 7 * h as u64 + 1)).collect();
            let k = random(d, dim, seed + 99);
            let gram = |w: &Mat<f64>| w.transpose() * &c * w;
            let grams = queries.iter().map(gram).reduce(|a, b| a + b).unwrap();
            let factors = factor(grams.as_ref(), gram(&k).as_ref()).unwrap();
            let plain = queries.iter().map(|w| w.transpose() * w).reduce(|a, b| a + b).unwrap();
            let blind = factor(plain.as_ref(), (k.transpose() * &k).as_ref()).unwrap();
            // All heads of the group, one over the other: what a solver of model space factors.
            let stacked = Mat::from_fn(group * d, d, |i, j| {
                (&r_x * &queries[i / d] * k.transpose() * r_x.transpose())[(i % d, j)]
            });
            for r in 0..=dim {
                let total = |f| queries.iter().map(|q| error(&r_x, q, &k, f, r)).sum::<f64>();
                let (ours, best) = (total(&factors), lost(&stacked, r));
                let size = stacked.squared_norm_l2();
                assert!((ours - best).abs() < 1e-9 * size, "{d} {dim} {group} {r}: {ours} {best}");
                let stated: f64 = factors.values[r..].iter().map(|s| s * s).sum();
                assert!((ours - stated).abs() < 1e-9 * size, "{ours} {stated}");
                assert!(total(&blind) >= ours - 1e-9 * size, "{d} {dim} {r}");
            }
        }
    }

    #[test]
    fn outputs_reach_the_optimum_too() {
        for (d, dim, group) in [(24, 6, 1), (30, 8, 3)] {
            let seed = (d + dim + group) as u64;
            let values = random(50, dim, seed);
            let gram = values.transpose() * &values;
            let outs: Vec<_> = (0..group).map(|h| random(dim, d, seed + h as u64 + 1)).collect();
            let sum = outs.iter().map(|w| w * w.transpose()).reduce(|a, b| a + b).unwrap();
            let factors = factor(gram.as_ref(), sum.as_ref()).unwrap();
            let side = Mat::from_fn(dim, group * d, |i, j| outs[j / d][(i, j % d)]);
            let product = root(&gram) * &side;
            for r in 1..=dim {
                let map = factors.left.subcols(0, r);
                let m = refit(gram.as_ref(), map).unwrap();
                let change = root(&gram) * (map * m * &side - &side);
                let (ours, best) = (change.squared_norm_l2(), lost(&product, r));
                assert!((ours - best).abs() < 1e-9 * product.squared_norm_l2(), "{ours} {best}");
            }
        }
    }

    #[test]
    fn moments_of_nothing_are_no_trouble() {
        let zero = Mat::<f64>::zeros(4, 4);
        let factors = factor(zero.as_ref(), zero.as_ref()).unwrap();
        assert!(factors.left.squared_norm_l2().is_finite() && factors.damped == 8);
        // One direction only: the rest has nothing to lose.
        let one = Mat::from_fn(4, 4, |i, j| ((i + 1) * (j + 1)) as f64);
        let factors = factor(one.as_ref(), one.as_ref()).unwrap();
        assert!(factors.values[1] < 1e-4 * factors.values[0] && factors.damped == 6);
        assert!(
            refit(one.as_ref(), factors.left.subcols(0, 2)).unwrap().squared_norm_l2().is_finite()
        );
        let nan = Mat::from_fn(4, 4, |_, _| f64::NAN);
        assert!(factor(nan.as_ref(), one.as_ref()).is_err());
    }
}
