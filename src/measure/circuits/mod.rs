//! What is inside a head, from its weights alone: the products that decide what it looks for, `W_QK = W_Q
//! W_K^T`, and what it writes, `W_OV = W_V W_O` (Elhage et al. 2021, "A Mathematical Framework for
//! Transformer Circuits"). Both are as wide as the model and no product of that size is made: factors
//! are reduced to squares as wide as a head, whose singular values are those of the product.
//!
//! Inputs are normed residuals before the norm's gain, which is folded into the weights; where the norm
//! takes the mean away, so do the weights, as nothing of it reaches them. Biases and rotations are left
//! out: with a rotation, `W_QK` is what a head looks for at its own position. With norms of heads, their
//! gains are folded in too, and lengths are what queries and keys are divided by afterwards.

mod tokens;

pub use tokens::{Described, Direction, Match, Pole, Reading, Side, describe, matches, read_text};

use std::ops::Range;

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::arch::NormKind;
use crate::bad_usage;
use crate::error::{Error, Result};
use crate::merge::{Dense, Weights};
use crate::model::{Model, NormWeight};

/// Which heads, and how much of them.
#[derive(Debug, Clone)]
pub struct Selection {
    /// Layers.
    pub layers: Range<usize>,
    /// Query heads of each of the layers.
    pub heads: Range<usize>,
    /// Singular vectors on either side of a product, those of the largest values.
    pub n_directions: usize,
    /// Tokens for a direction.
    pub n_tokens: usize,
}

/// One head.
#[derive(Debug, Clone)]
pub struct Circuit {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// What it looks for: queries on the left, keys on the right.
    pub qk: Product,
    /// What it reads, on the left, and what it writes, on the right.
    pub ov: Product,
    /// Ratio of the largest to the smallest singular value of this kv head's `W_K`, as it is in the file.
    pub key_condition: f64,
    /// The same of its `W_V`.
    pub value_condition: f64,
    /// The same of all rows of the layer's `W_K`, which values can be made of keys with; infinite where
    /// they are more than the model is wide.
    pub layer_condition: f64,
    /// Sum of the eigenvalues of `W_OV` over the sum of their sizes: 1 for a head that copies, -1 for one
    /// that takes away what it reads (Elhage et al. 2021).
    pub copying: f64,
    /// The rotation, in the order of its frequencies; empty without one.
    pub planes: Vec<Plane>,
}

/// A pair of elements that turns with the position.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plane {
    /// Positions for a whole turn.
    pub wavelength: f64,
    /// `|W_Q|^2 |W_K|^2` of its elements, as a share of that of all planes. Averaged over positions, half
    /// of this is what a plane adds to the squares of scores, for inputs of equal variance.
    pub energy: f64,
}

/// A product of two thin factors, by its singular values and vectors.
#[derive(Debug, Clone)]
pub struct Product {
    /// Largest first, as many as the head is wide.
    pub values: Vec<f64>,
    /// First singular vectors on the left, by column. `[n_embd, n]`
    pub left: Mat<f64>,
    /// And on the right.
    pub right: Mat<f64>,
}

/// Shares of a head's width at which energies are told.
pub const SHARES: [f64; 4] = [0.125, 0.25, 0.5, 0.75];

fn unsolved(_: impl std::fmt::Debug) -> Error {
    Error::Runtime("singular values or eigenvalues did not converge".into())
}

impl Product {
    /// Of `left right^T`, both `[n_embd, dim]`, with `n` vectors.
    fn of(left: MatRef<f64>, right: MatRef<f64>, n: usize) -> Result<Product> {
        let (l, r) = (left.qr(), right.qr());
        let core = l.thin_R() * r.thin_R().transpose();
        let n = n.min(core.nrows()).min(core.ncols());
        if n == 0 {
            let values = core.singular_values().map_err(unsolved)?;
            return Ok(Product { values, left: Mat::new(), right: Mat::new() });
        }
        let svd = core.svd().map_err(unsolved)?;
        Ok(Product {
            values: svd.S().column_vector().iter().copied().collect(),
            left: l.compute_thin_Q() * svd.U().subcols(0, n),
            right: r.compute_thin_Q() * svd.V().subcols(0, n),
        })
    }

    /// Root of the sum of the squares of all elements.
    pub fn norm(&self) -> f64 {
        self.values.iter().map(|s| s * s).sum::<f64>().sqrt()
    }

    /// Exponential of the entropy of the singular values' shares of their sum (Roy & Vetterli 2007, "The
    /// effective rank").
    pub fn effective_rank(&self) -> f64 {
        let sum: f64 = self.values.iter().sum();
        let shares = self.values.iter().map(|s| s / sum.max(f64::MIN_POSITIVE));
        shares.filter(|p| *p > 0.0).map(|p| -p * p.ln()).sum::<f64>().exp()
    }

    /// Share of the squares that the best product of this rank keeps.
    pub fn energy(&self, rank: usize) -> f64 {
        let sum = |s: &[f64]| s.iter().map(|s| s * s).sum::<f64>();
        let all = sum(&self.values);
        if all > 0.0 { sum(&self.values[..rank.min(self.values.len())]) / all } else { 1.0 }
    }

    /// [`Product::energy`] at [`SHARES`] of the width.
    pub fn energies(&self) -> [f64; 4] {
        SHARES.map(|share| self.energy((share * self.values.len() as f64).round() as usize))
    }
}

/// Ratio of the largest to the smallest singular value of some rows.
fn condition(w: &Dense, rows: Range<usize>) -> Result<f64> {
    if rows.len() > w.n_in {
        return Ok(f64::INFINITY);
    }
    let w =
        Mat::from_fn(w.n_in, rows.len(), |e, i| f64::from(w.data[(rows.start + i) * w.n_in + e]));
    // The squares in a Gram matrix would lose half of the digits.
    let values = w.qr().thin_R().singular_values().map_err(unsolved)?;
    let (largest, smallest) = (values.first().copied(), values.last().copied());
    Ok(largest.unwrap_or(0.0) / smallest.unwrap_or(0.0).max(f64::MIN_POSITIVE))
}

/// Refuses models whose keys and values are no products of the layer's input with one matrix.
fn no_latent(model: &Model) -> Result<()> {
    if model.hparams.latent.is_some() {
        bad_usage!(
            "keys and values are made of a latent that is normed, so no product is a head's"
        );
    }
    Ok(())
}

/// The heads of a selection.
pub fn circuits(model: &Model, selection: &Selection) -> Result<Vec<Circuit>> {
    no_latent(model)?;
    let of = |layer| of_layer(model, layer, &selection.heads, selection.n_directions);
    let all = selection.layers.clone().into_par_iter().map(of);
    Ok(all.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// What a layer's norm leaves of a direction that is read after it, but for the gain: all, or what is not
/// the mean.
fn centered(model: &Model, mut direction: Vec<f64>) -> Vec<f64> {
    if model.hparams.norm.kind == NormKind::Layer {
        let mean = direction.iter().sum::<f64>() / direction.len() as f64;
        direction.iter_mut().for_each(|x| *x -= mean);
    }
    direction
}

/// The four thin matrices of a head, by column. `[n_embd, width]`
struct Factors {
    q: Mat<f64>,
    k: Mat<f64>,
    v: Mat<f64>,
    o: Mat<f64>,
}

impl Factors {
    fn of(model: &Model, layer: usize, w: &Weights, head: usize) -> Factors {
        let g = &model.attention[layer].geometry;
        let norms = model.layers[layer].qk_norm.as_ref();
        let kv = head / g.per_kv();
        let o_at = g.outputs(head);
        let o = Mat::from_fn(model.hparams.n_embd, o_at.len(), |e, i| {
            f64::from(w.o.data[e * w.o.n_in + o_at.start + i])
        });
        let read = |w: &Dense, rows: Range<usize>, norm: Option<&NormWeight>| -> Mat<f64> {
            let columns: Vec<Vec<f64>> = match norm {
                None => rows.map(|row| reading((model, layer), w, (row, 1.0))).collect(),
                Some(norm) => {
                    let of = |at: usize| {
                        let row = rows.start + at;
                        (row, f64::from(norm.weight[row]))
                    };
                    let kept = kept(model, g.kv[kv].planes.as_deref());
                    kept.into_iter().map(|at| reading((model, layer), w, of(at))).collect()
                }
            };
            Mat::from_fn(w.n_in, columns.len(), |e, i| columns[i][e])
        };
        let q_at = if norms.is_some() { whole(model, head) } else { g.queries(head) };
        Factors {
            q: read(&w.q, q_at, norms.map(|n| &n.0)),
            k: read(&w.k, key_rows(model, layer, kv), norms.map(|n| &n.1)),
            v: read(&w.v, g.values(kv), None),
            o,
        }
    }
}

/// Rows of a kv head's keys. Norms need whole heads, whatever is left of them afterwards.
fn key_rows(model: &Model, layer: usize, kv: usize) -> Range<usize> {
    match model.layers[layer].qk_norm {
        Some(_) => whole(model, kv),
        None => model.attention[layer].geometry.keys(kv),
    }
}

fn whole(model: &Model, head: usize) -> Range<usize> {
    head * model.hparams.key_dim..(head + 1) * model.hparams.key_dim
}

/// Elements of a whole head that are left of it, in their order there.
fn kept(model: &Model, planes: Option<&[usize]>) -> Vec<usize> {
    let hp = &model.hparams;
    let (Some(planes), Some(rope)) = (planes, hp.ropes.first()) else {
        return (0..hp.key_dim).collect();
    };
    let mut kept = vec![0; 2 * planes.len()];
    for (at, plane) in planes.iter().enumerate() {
        let places = rope.pairing.pair(at, planes.len());
        let elements = rope.pairing.pair(*plane, rope.dim / 2);
        places.into_iter().zip(elements).for_each(|(place, element)| kept[place] = element);
    }
    kept
}

/// One row of a matrix that reads a layer's normed input, times a factor and the gain of the norm.
fn reading((model, layer): (&Model, usize), w: &Dense, (row, factor): (usize, f64)) -> Vec<f64> {
    let row = w.data[row * w.n_in..][..w.n_in].iter().map(|w| factor * f64::from(*w));
    match &model.layers[layer].attn_norm {
        Some(norm) => {
            centered(model, row.zip(&norm.weight).map(|(w, g)| w * f64::from(*g)).collect())
        }
        None => row.collect(),
    }
}

fn of_layer(
    model: &Model,
    layer: usize,
    heads: &Range<usize>,
    n_directions: usize,
) -> Result<Vec<Circuit>> {
    let w = model.weights(layer);
    let g = &model.attention[layer].geometry;
    let site = model.site(layer, &model.plan.layers[layer].normalizers);
    let layer_condition = condition(&w.k, 0..w.k.data.len() / w.k.n_in)?;
    let of_head = |head: usize| -> Result<Circuit> {
        let kv = head / g.per_kv();
        let Factors { q, k, v, o } = Factors::of(model, layer, &w, head);
        // `W_V W_O` and `W_O W_V` have the same eigenvalues, but for zeros.
        let eigen = (o.transpose() * &v).eigenvalues().map_err(unsolved)?;
        let sizes: f64 = eigen.iter().map(|z| z.re.hypot(z.im)).sum();
        let sum: f64 = eigen.iter().map(|z| z.re).sum();
        Ok(Circuit {
            layer,
            head,
            key_condition: condition(&w.k, key_rows(model, layer, kv))?,
            value_condition: condition(&w.v, g.values(kv))?,
            layer_condition,
            copying: if sizes > 0.0 { sum / sizes } else { 0.0 },
            planes: planes(model, &site.frequencies, g.kv[kv].planes.as_deref(), (&q, &k)),
            qk: Product::of(q.as_ref(), k.as_ref(), n_directions)?,
            ov: Product::of(v.as_ref(), o.as_ref(), n_directions)?,
        })
    };
    (heads.start..heads.end.min(g.n_head)).into_par_iter().map(of_head).collect()
}

/// The planes of the rotation that are left.
fn planes(
    model: &Model,
    frequencies: &[f64],
    left: Option<&[usize]>,
    (q, k): (&Mat<f64>, &Mat<f64>),
) -> Vec<Plane> {
    let Some(rope) = model.hparams.ropes.first().filter(|_| !frequencies.is_empty()) else {
        return Vec::new();
    };
    let all: Vec<usize> = left.map_or((0..frequencies.len()).collect(), <[usize]>::to_vec);
    let size = |w: &Mat<f64>, pair: [usize; 2]| -> f64 {
        pair.iter().map(|i| w.col(*i).squared_norm_l2()).sum()
    };
    let energy = |at: usize| {
        let pair = rope.pairing.pair(at, all.len());
        size(q, pair) * size(k, pair)
    };
    let energies: Vec<f64> = (0..all.len()).map(energy).collect();
    let sum: f64 = energies.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let plane = |(plane, energy): (&usize, f64)| Plane {
        wavelength: std::f64::consts::TAU / frequencies[*plane],
        energy: energy / sum,
    };
    all.iter().zip(energies).map(plane).collect()
}

/// Most memory for products that are multiplied out.
const MAX_DENSE_BYTES: usize = 1 << 30;

/// `W_QK` and `W_OV` of one head, multiplied out. `[n_embd, n_embd]` each, inputs by row.
pub fn dense_products(model: &Model, layer: usize, head: usize) -> Result<[Vec<f32>; 2]> {
    no_latent(model)?;
    let n_layer = model.layers.len();
    if layer >= n_layer {
        bad_usage!("layer {layer}; allowed 0 to {}", n_layer - 1);
    }
    let n_head = model.attention[layer].geometry.n_head;
    if head >= n_head {
        bad_usage!("head {head}; allowed 0 to {}", n_head - 1);
    }
    let d = model.hparams.n_embd;
    let n_bytes = 2 * 4 * d * d;
    if n_bytes > MAX_DENSE_BYTES {
        bad_usage!("two products of {d} x {d} take {n_bytes} bytes; at most {MAX_DENSE_BYTES}");
    }
    let factors = Factors::of(model, layer, &model.weights(layer), head);
    let wide = |left: &Mat<f64>, right: &Mat<f64>| {
        let product = left * right.transpose();
        (0..d * d).map(|i| product[(i / d, i % d)] as f32).collect()
    };
    Ok([wide(&factors.q, &factors.k), wide(&factors.v, &factors.o)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_of_thin_factors_are_those_of_wide_ones() {
        let thin = |seed: usize| {
            Mat::from_fn(20, 4, |i, j| ((i * 31 + j * 17 + seed * 7) % 23) as f64 / 11.0 - 1.0)
        };
        let (a, b) = (thin(1), thin(2));
        let product = Product::of(a.as_ref(), b.as_ref(), 4).unwrap();
        let wide = &a * b.transpose();
        let values = wide.singular_values().unwrap();
        for (ours, theirs) in product.values.iter().zip(&values) {
            assert!((ours - theirs).abs() < 1e-9 * values[0], "{ours} {theirs}");
        }
        let scaled = Mat::from_fn(20, 4, |i, j| product.left[(i, j)] * product.values[j]);
        assert!((scaled * product.right.transpose() - &wide).norm_max() < 1e-9);
        assert!((product.norm() - wide.norm_l2()).abs() < 1e-9);
        assert!(product.effective_rank() > 1.0 && product.effective_rank() <= 4.0 + 1e-9);
        assert_eq!(product.energy(4), 1.0);
    }
}
