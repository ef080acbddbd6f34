//! Slim: keys alone are cached, before rotation, and values are made of them: `v = W_V W_K^-1 (k - b_K) +
//! b_V`, where `W_K` of all heads together is square. They are rotated when they are read.
//!
//! Values of a token are never made while tokens are written one by one: `sum_n p_n v_n` is one product with
//! `sum_n p_n k_n`. What the cache rounds, and the map itself, is off by up to the condition number of `W_K`
//! times as much in values as in keys, so that number has a limit.

use faer::linalg::solvers::{PartialPivLu, Solve};
use faer::{Col, Mat};

use super::absorb::not_between;
use super::{Choice, Dense, Form, Geometry, Kept, Site, Verdict, Weights, only_products};
use crate::arch::{Hparams, LayerHparams};
use crate::param::{Domain, MAX, Param, param};

pub(super) struct Slim;

static PARAMS: &[Param] = &[param(
    "cond",
    "largest ratio of singular values of W_K; 1000 still suits a cache in f16",
    1e3,
    Domain::From(1.0, MAX),
)];

/// Steps of a power iteration, which finds a singular value to a few percent.
const STEPS: usize = 40;

impl Form for Slim {
    fn name(&self) -> &'static str {
        "slim"
    }

    fn what(&self) -> &'static str {
        "keys alone are cached, values are made of them: half the cache; without grouped heads only"
    }

    fn paper(&self) -> &'static str {
        "Graef and Wasielewski 2025, Slim attention, arXiv 2503.05840"
    }

    fn params(&self) -> &'static [Param] {
        PARAMS
    }

    fn applies(&self, _: &Choice, site: &Site) -> Verdict {
        only_products(site)?;
        let (n, dim, width) = (site.at().n_head_kv, site.hparams.key_dim, site.hparams.n_embd);
        if n * dim != width {
            return Err(format!(
                "keys have {n} heads of {dim} elements, the model is {width} wide: W_K has no inverse"
            ));
        }
        // One table of angles serves all layers.
        if site.rotates() && site.hparams.ropes.len() > 1 {
            return Err("the model has several rotations; angles of one are kept".into());
        }
        not_between(site)
    }

    fn exact(&self, _: &Choice, _: &Site) -> Verdict {
        Ok(())
    }

    fn geometry(&self, hparams: &Hparams, layer: &LayerHparams) -> Geometry {
        let rope = layer.rope.and_then(|i| hparams.ropes.get(i));
        let kept = Kept::Keys { n_planes: rope.map_or(0, |rope| rope.dim / 2) };
        Geometry { kept, ..Geometry::new(layer.n_head, hparams.kv_heads(layer)) }
    }

    fn values(&self, choice: &Choice, w: &Weights) -> Result<Option<Dense>, String> {
        let n = w.k.n_in;
        // Transposed, as what is on the right of the map is solved for.
        let keys = transposed(&w.k);
        let lu = keys.partial_piv_lu();
        let (cond, limit) = (condition(&keys, &lu), choice.value("cond").unwrap_or(0.0));
        if cond.is_nan() || cond > f64::from(limit) {
            return Err(format!(
                "W_K has the condition number {cond:.3e}, by which errors of keys can grow in values; \
                 at most {limit} (cond)"
            ));
        }
        let map = lu.solve(transposed(&w.v));
        let rows = 0..map.ncols();
        let bias = w.v.bias.is_some() || w.k.bias.is_some();
        let bias = bias.then(|| {
            let element =
                |bias: &Option<Vec<f32>>, i: usize| bias.as_ref().map_or(0.0, |b| b[i].into());
            let of_keys =
                |r: usize| (0..n).map(|i| map[(i, r)] * element(&w.k.bias, i)).sum::<f64>();
            rows.clone().map(|r| (element(&w.v.bias, r) - of_keys(r)) as f32).collect()
        });
        let data = rows.flat_map(|r| (0..n).map(move |i| (r, i)));
        let data = data.map(|(r, i)| map[(i, r)] as f32).collect();
        Ok(Some(Dense { n_in: n, data, bias }))
    }
}

fn transposed(w: &Dense) -> Mat<f64> {
    Mat::from_fn(w.n_in, w.data.len() / w.n_in, |i, r| w.data[r * w.n_in + i].into())
}

/// The ratio of the largest singular value to the smallest, about.
fn condition(w: &Mat<f64>, lu: &PartialPivLu<f64>) -> f64 {
    let start = || Col::from_fn(w.nrows(), |i| 1.0 + (i * 7 % 11) as f64);
    let norm = |x: &Col<f64>| x.norm_l2();
    let grow = |step: &dyn Fn(&Col<f64>) -> Col<f64>| {
        let (mut x, mut size) = (start(), 0.0);
        for _ in 0..STEPS {
            let unit = Col::from_fn(x.nrows(), |i| x[i] / norm(&x));
            x = step(&unit);
            size = norm(&x);
        }
        size.sqrt()
    };
    let largest = grow(&|x| w.transpose() * (w * x));
    let inverse = grow(&|x| lu.solve(lu.solve_transpose(x)));
    largest * inverse
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dense(n: usize, at: impl Fn(usize, usize) -> f32) -> Dense {
        let data = (0..n * n).map(|i| at(i / n, i % n)).collect();
        Dense { n_in: n, data, bias: Some((0..n).map(|i| i as f32 - 3.0).collect()) }
    }

    #[test]
    fn values_are_made_of_keys() {
        let noise = |r: usize, i: usize| ((r * 31 + i * 17) * 7919 % 1013) as f32 / 1013.0 - 0.5;
        let n = 24;
        let (k, v) = (
            dense(n, |r, i| noise(r, i) + if r == i { 2.0 } else { 0.0 }),
            dense(n, |r, i| noise(r + 5, i + 2)),
        );
        let o = dense(n, |_, _| 0.0);
        let weights = Weights { q: k.clone(), k: k.clone(), v: v.clone(), o };
        let map = Slim.values(&Choice::of(&Slim), &weights).unwrap().unwrap();
        let times = |w: &Dense, x: &[f64]| -> Vec<f64> {
            let bias = w.bias.clone().unwrap();
            let rows = w.data.chunks(n).zip(bias);
            rows.map(|(row, b)| {
                row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum::<f64>() + f64::from(b)
            })
            .collect()
        };
        let x: Vec<f64> = (0..n).map(|i| f64::from(noise(i, 3))).collect();
        for (made, value) in times(&map, &times(&k, &x)).iter().zip(times(&v, &x)) {
            assert!((made - value).abs() < 1e-5, "{made} {value}");
        }
    }

    #[test]
    fn a_matrix_that_is_nearly_singular_is_refused() {
        let sizes = |smallest: f32| {
            dense(8, move |r, i| {
                if r != i {
                    0.0
                } else if r == 5 {
                    smallest
                } else {
                    2.0
                }
            })
        };
        let weights = |k: Dense| Weights { q: k.clone(), v: k.clone(), o: k.clone(), k };
        let values = |smallest| Slim.values(&Choice::of(&Slim), &weights(sizes(smallest)));
        assert!(values(0.01).is_ok());
        let text = values(0.001).unwrap_err();
        assert!(text.contains("2.000e3") && text.contains("1000"), "{text}");
        assert!(values(0.0).is_err());
    }
}
