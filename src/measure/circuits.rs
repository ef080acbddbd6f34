//! What is inside a head, from its weights alone: the products that decide what it looks for, `W_QK = W_Q
//! W_K^T`, and what it writes, `W_OV = W_V W_O` (Elhage et al. 2021, "A Mathematical Framework for
//! Transformer Circuits"). Both are as wide as the model and no product of that size is made: factors
//! are reduced to squares as wide as a head, whose singular values are those of the product.
//!
//! Inputs are normed residuals before the norm's gain, which is folded into the weights. Biases and
//! rotations are left out: with a rotation, `W_QK` is what a head looks for at its own position.

use faer::{Mat, MatRef};
use rayon::prelude::*;

use crate::bad_usage;
use crate::error::{Error, Result};
use crate::merge::Dense;
use crate::model::{Model, NormWeight, Weight};

/// One head.
#[derive(Debug, Clone)]
pub struct Circuit {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// What it looks for. `[n_embd]` directions of queries and keys.
    pub qk: Product,
    /// What it reads and writes.
    pub ov: Product,
    /// Ratio of the largest to the smallest singular value of the keys' matrix, of this kv head and of
    /// all of the layer.
    pub key_condition: f64,
    /// The same of all keys of the layer; infinite where they have more elements than the model.
    pub layer_condition: f64,
    /// The same of this kv head's values.
    pub value_condition: f64,
    /// Sum of the eigenvalues of `W_OV` over the sum of their sizes: 1 for a head that copies (Elhage et
    /// al. 2021).
    pub copying: f64,
    /// Of each plane of the rotation its length of a turn in positions, and its share of the energy.
    pub planes: Vec<(f64, f64)>,
}

/// A product of two thin factors, by its singular values and vectors.
#[derive(Debug, Clone)]
pub struct Product {
    /// Largest first.
    pub values: Vec<f64>,
    /// Directions of inputs on either side, by column. `[n_embd, dim]`
    pub left: Mat<f64>,
    /// The other side.
    pub right: Mat<f64>,
}

impl Product {
    /// Of `left right^T`, both `[n_embd, dim]`.
    fn of(left: MatRef<f64>, right: MatRef<f64>) -> Result<Product> {
        let (l, r) = (left.qr(), right.qr());
        let core = l.thin_R() * r.thin_R().transpose();
        let svd =
            core.svd().map_err(|_| Error::Runtime("singular values did not converge".into()))?;
        Ok(Product {
            values: (0..core.nrows().min(core.ncols())).map(|i| svd.S()[i]).collect(),
            left: l.compute_thin_Q() * svd.U(),
            right: r.compute_thin_Q() * svd.V(),
        })
    }

    /// Root of the sum of the squares of all elements.
    pub fn norm(&self) -> f64 {
        self.values.iter().map(|s| s * s).sum::<f64>().sqrt()
    }

    /// Exponential of the entropy of the singular values' shares (Roy & Vetterli 2007, "The effective
    /// rank").
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
}

/// Rows of a matrix as columns, each element times a gain. `[n_in, rows]`
fn columns(w: &Dense, start: usize, n: usize, gain: &[f32]) -> Mat<f64> {
    Mat::from_fn(w.n_in, n, |e, i| f64::from(w.data[(start + i) * w.n_in + e]) * f64::from(gain[e]))
}

/// Ratio of the largest to the smallest singular value.
fn condition(w: MatRef<f64>) -> Result<f64> {
    if w.ncols() > w.nrows() {
        return Ok(f64::INFINITY);
    }
    let values = w.singular_values();
    let values = values.map_err(|_| Error::Runtime("singular values did not converge".into()))?;
    let (largest, smallest) = (values.first().copied(), values.last().copied());
    Ok(largest.unwrap_or(0.0) / smallest.unwrap_or(0.0).max(f64::MIN_POSITIVE))
}

/// All heads of some layers.
pub fn circuits(model: &Model, layers: std::ops::Range<usize>) -> Result<Vec<Circuit>> {
    let all = layers.into_par_iter().map(|layer| of_layer(model, layer));
    Ok(all.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn of_layer(model: &Model, layer: usize) -> Result<Vec<Circuit>> {
    let hp = &model.hparams;
    let w = model.weights(layer);
    let gain = &model.layers[layer].attn_norm.weight;
    let g = &model.attention[layer].geometry;
    let site = model.site(layer, &model.plan.layers[layer].normalizers);
    let all_keys = columns(&w.k, 0, w.k.data.len() / w.k.n_in, gain);
    let layer_condition = condition(all_keys.as_ref())?;
    let mut found = Vec::new();
    for head in 0..g.n_head {
        let kv = head / g.per_kv();
        let q_at =
            if hp.qk_norm { head * hp.key_dim..(head + 1) * hp.key_dim } else { g.queries(head) };
        let k_at = if hp.qk_norm { kv * hp.key_dim..(kv + 1) * hp.key_dim } else { g.keys(kv) };
        let (v_at, o_at) = (g.values(kv), g.outputs(head));
        let q = columns(&w.q, q_at.start, q_at.len(), gain);
        let k = columns(&w.k, k_at.start, k_at.len(), gain);
        let v = columns(&w.v, v_at.start, v_at.len(), gain);
        let o = Mat::from_fn(hp.n_embd, o_at.len(), |e, i| {
            f64::from(w.o.data[e * w.o.n_in + o_at.start + i])
        });
        let core = o.transpose() * &v;
        let eigen = core.eigenvalues();
        let eigen = eigen.map_err(|_| Error::Runtime("eigenvalues did not converge".into()))?;
        let sizes: f64 = eigen.iter().map(|z| z.re.hypot(z.im)).sum();
        let sum: f64 = eigen.iter().map(|z| z.re).sum();
        found.push(Circuit {
            layer,
            head,
            key_condition: condition(k.as_ref())?,
            value_condition: condition(v.as_ref())?,
            layer_condition,
            copying: if sizes > 0.0 { sum / sizes } else { 0.0 },
            planes: planes(model, &site.frequencies, g.kv[kv].planes.as_deref(), (&q, &k)),
            qk: Product::of(q.as_ref(), k.as_ref())?,
            ov: Product::of(v.as_ref(), o.as_ref())?,
        });
    }
    Ok(found)
}

/// Length of a turn and share of the energy of every plane that is left.
fn planes(
    model: &Model,
    frequencies: &[f64],
    left: Option<&[usize]>,
    (q, k): (&Mat<f64>, &Mat<f64>),
) -> Vec<(f64, f64)> {
    let Some(rope) = model.hparams.rope.as_ref().filter(|_| !frequencies.is_empty()) else {
        return Vec::new();
    };
    let all: Vec<usize> = left.map_or((0..frequencies.len()).collect(), <[usize]>::to_vec);
    let size = |w: &Mat<f64>, i: usize| w.col(i).squared_norm_l2();
    let energy = |at: usize| {
        let pair = rope.pairing.pair(at, all.len());
        pair.map(|i| size(q, i)).iter().sum::<f64>() * pair.map(|i| size(k, i)).iter().sum::<f64>()
    };
    let energies: Vec<f64> = (0..all.len()).map(energy).collect();
    let sum: f64 = energies.iter().sum::<f64>().max(f64::MIN_POSITIVE);
    let turn = |plane: &usize| std::f64::consts::TAU / frequencies[*plane];
    all.iter().map(turn).zip(energies.into_iter().map(|e| e / sum)).collect()
}

/// Most memory for products that are multiplied out.
const MAX_DENSE_BYTES: usize = 1 << 30;

/// `W_QK` and `W_OV` of one head, as they are multiplied out. `[n_embd, n_embd]` each, inputs by row.
pub fn dense_products(model: &Model, layer: usize, head: usize) -> Result<[Vec<f32>; 2]> {
    let d = model.hparams.n_embd;
    let n_bytes = 2 * 4 * d * d;
    if n_bytes > MAX_DENSE_BYTES {
        bad_usage!("two products of {d} x {d} take {n_bytes} bytes; allowed {MAX_DENSE_BYTES}");
    }
    let heads = of_layer(model, layer)?;
    let Some(c) = heads.get(head) else { bad_usage!("layer {layer} has no head {head}") };
    let wide = |p: &Product| {
        let scaled = Mat::from_fn(d, p.values.len(), |i, j| p.left[(i, j)] * p.values[j]);
        let wide = scaled * p.right.transpose();
        (0..d * d).map(|i| wide[(i / d, i % d)] as f32).collect()
    };
    Ok([wide(&c.qk), wide(&c.ov)])
}

/// A token and how well it fits a direction.
#[derive(Debug, Clone, PartialEq)]
pub struct Match {
    /// The token.
    pub token: u32,
    /// Cosine for what is read; for what is written, logit per unit of the direction.
    pub score: f64,
}

/// Which side of the model a direction is read through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Token embeddings, for what a head reads.
    Embedding,
    /// The output, for what it writes.
    Output,
}

/// For each direction, `[n_embd]`, the `n` tokens that fit it best, of either sign of the direction the one
/// that fits better; `signed`: only as it is. Every row of the vocabulary is read once.
pub fn matches(
    model: &Model,
    side: Side,
    directions: &[Vec<f64>],
    n: usize,
    signed: bool,
) -> Vec<Vec<Match>> {
    let (w, norm): (&Weight, Option<&NormWeight>) = match side {
        Side::Embedding => (&model.token_embd, None),
        Side::Output => (&model.output, Some(&model.output_norm)),
    };
    // `[directions, n_embd]`, with the gain of the norm before the output.
    let directions: Vec<Vec<f32>> = directions
        .iter()
        .map(|d| {
            let gain = |e: usize| norm.map_or(1.0, |norm| norm.weight[e]);
            d.iter().enumerate().map(|(e, x)| *x as f32 * gain(e)).collect()
        })
        .collect();
    let scores: Vec<Vec<f32>> = (0..w.n_out)
        .into_par_iter()
        .map_init(
            || vec![0.0f32; w.n_in],
            |row, token| {
                w.format.dequantize(w.row(token), row);
                let size = match side {
                    Side::Embedding => crate::simd::dot(row, row).sqrt().max(f32::MIN_POSITIVE),
                    Side::Output => 1.0,
                };
                directions.iter().map(|d| crate::simd::dot(row, d) / size).collect()
            },
        )
        .collect();
    let best = |d: usize, sign: f32| -> Vec<Match> {
        let mut all: Vec<(f32, usize)> =
            scores.iter().enumerate().map(|(token, s)| (sign * s[d], token)).collect();
        let n = n.min(all.len());
        if n < all.len() {
            all.select_nth_unstable_by(n, |a, b| b.0.total_cmp(&a.0));
        }
        all.truncate(n);
        all.sort_by(|a, b| b.0.total_cmp(&a.0));
        let found = |(score, token): &(f32, usize)| Match {
            token: *token as u32,
            score: f64::from(*score),
        };
        all.iter().map(found).collect()
    };
    let all = (0..directions.len()).into_par_iter().map(|d| {
        let (plus, minus) = (best(d, 1.0), best(d, -1.0));
        let first = |m: &[Match]| m.first().map_or(0.0, |m| m.score);
        if signed || first(&plus) >= first(&minus) { plus } else { minus }
    });
    all.collect()
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
        let product = Product::of(a.as_ref(), b.as_ref()).unwrap();
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
