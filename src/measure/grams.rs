//! Second moments of what heads work with, over a text: what data-aware forms are made from.

use std::sync::Mutex;

use faer::Mat;

use crate::bad_usage;
use crate::cpu::{Observer, SeenHead, SeenRows};
use crate::error::Result;
use crate::merge::{Geometry, Grams};
use crate::session::Session;
use crate::simd;

/// Sums over tokens of outer products of rows with themselves, and of the rows.
struct Sums {
    dim: usize,
    /// `[dim, dim]`
    products: Vec<f64>,
    /// `[dim]`
    rows: Vec<f64>,
}

impl Sums {
    fn new(dim: usize) -> Sums {
        Sums { dim, products: vec![0.0; dim * dim], rows: vec![0.0; dim] }
    }

    /// Adds a batch, summed in `f32` first: some hundred tokens.
    fn add(&mut self, rows: SeenRows) {
        let n = self.dim;
        let (mut products, mut sum) = (vec![0.0f32; n * n], vec![0.0f32; n]);
        for row in rows.iter() {
            for (x, to) in row.iter().zip(products.chunks_exact_mut(n)) {
                simd::add_scaled(to, *x, row);
            }
            simd::add(&mut sum, row);
        }
        let add = |to: &mut [f64], from: &[f32]| {
            to.iter_mut().zip(from).for_each(|(to, x)| *to += f64::from(*x));
        };
        add(&mut self.products, &products);
        add(&mut self.rows, &sum);
    }

    fn merge(&mut self, other: &Sums) {
        self.products.iter_mut().zip(&other.products).for_each(|(to, x)| *to += x);
    }

    /// Means over `n` tokens.
    fn mean(&self, n: usize) -> Mat<f64> {
        let n = n.max(1) as f64;
        Mat::from_fn(self.dim, self.dim, |i, j| self.products[i * self.dim + j] / n)
    }

    fn mean_row(&self, n: usize) -> Vec<f64> {
        self.rows.iter().map(|x| x / n.max(1) as f64).collect()
    }
}

/// Sums of one layer.
struct LayerSums {
    /// Of each query head.
    queries: Vec<Mutex<Sums>>,
    outputs: Vec<Mutex<Sums>>,
    /// Of each kv head.
    keys: Vec<Mutex<Sums>>,
    /// Of each kv head, of values themselves. `[value_dim]`
    values: Vec<Mutex<Vec<f64>>>,
}

impl LayerSums {
    fn new(g: &Geometry) -> LayerSums {
        let sums = |dim: usize| Mutex::new(Sums::new(dim));
        LayerSums {
            queries: (0..g.n_head).map(|h| sums(g.queries(h).len())).collect(),
            outputs: (0..g.n_head).map(|h| sums(g.outputs(h).len())).collect(),
            keys: g.kv.iter().map(|kv| sums(kv.score_dim)).collect(),
            values: g.kv.iter().map(|kv| Mutex::new(vec![0.0; kv.value_dim])).collect(),
        }
    }

    fn grams(self, n_tokens: usize) -> Option<Grams> {
        let all = |sums: Vec<Mutex<Sums>>| -> Option<Vec<Sums>> {
            sums.into_iter().map(|s| s.into_inner().ok()).collect()
        };
        let (queries, keys) = (all(self.queries)?, all(self.keys)?);
        let outputs = all(self.outputs)?;
        let values = self.values.into_iter().map(|sum| {
            let sum = sum.into_inner().ok()?;
            Some(sum.iter().map(|x| x / n_tokens.max(1) as f64).collect())
        });
        let value_means = values.collect::<Option<Vec<Vec<f64>>>>()?;
        let per_kv = queries.len() / keys.len();
        let of_group = |group: &[Sums]| {
            let mut sum = Sums::new(group[0].dim);
            group.iter().for_each(|one| sum.merge(one));
            sum.mean(n_tokens)
        };
        Some(Grams {
            queries: queries.chunks(per_kv).map(of_group).collect(),
            key_means: keys.iter().map(|s| s.mean_row(n_tokens)).collect(),
            keys: keys.iter().map(|s| s.mean(n_tokens)).collect(),
            value_means,
            output_means: outputs.iter().map(|s| s.mean_row(n_tokens)).collect(),
            outputs: outputs.iter().map(|s| s.mean(n_tokens)).collect(),
        })
    }
}

/// What gathers.
struct Gatherer {
    layers: Vec<LayerSums>,
}

impl Observer for Gatherer {
    fn wants(&self, _: usize) -> bool {
        false
    }

    fn wants_heads(&self, _: usize) -> bool {
        true
    }

    fn see_head(&self, seen: &SeenHead) {
        let layer = &self.layers[seen.layer];
        let per_kv = layer.queries.len() / layer.keys.len();
        let add = |sums: &Mutex<Sums>, rows: SeenRows| {
            if let Ok(mut sums) = sums.lock() {
                sums.add(rows);
            }
        };
        add(&layer.queries[seen.head], seen.queries);
        add(&layer.outputs[seen.head], seen.outputs);
        if seen.head.is_multiple_of(per_kv) {
            add(&layer.keys[seen.head / per_kv], seen.keys);
            if let Ok(mut sum) = layer.values[seen.head / per_kv].lock() {
                for row in seen.values.iter() {
                    sum.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
                }
            }
        }
    }
}

/// Gathers the Grams of every layer over sequences of tokens, each read from position 0 on. The
/// session forgets all tokens. `progress` gets the number of sequences read.
pub fn gather(
    session: &mut Session,
    sequences: &[Vec<u32>],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Grams>> {
    let n_tokens: usize = sequences.iter().map(Vec::len).sum();
    let attention = &session.model().attention;
    let most =
        attention.iter().flat_map(|a| &a.geometry.kv).map(|kv| kv.score_dim.max(kv.value_dim));
    let needed = most.max().unwrap_or(0);
    if n_tokens < needed {
        bad_usage!(
            "the text for a data-aware form has {n_tokens} tokens; heads of {needed} elements need as many at least"
        );
    }
    let layers = attention.iter().map(|a| LayerSums::new(&a.geometry)).collect();
    let gatherer = Gatherer { layers };
    for (i, tokens) in sequences.iter().enumerate() {
        session.rewind(0);
        session.feed_observed(tokens, 0..0, &gatherer)?;
        progress(i + 1);
    }
    session.rewind(0);
    let grams = gatherer.layers.into_iter().map(|layer| layer.grams(n_tokens));
    Ok(grams.collect::<Option<Vec<_>>>().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_second_moments() {
        let data: Vec<f32> = (0..5 * 7).map(|i| (i * 37 % 11) as f32 - 5.0).collect();
        let mut sums = Sums::new(3);
        sums.add(SeenRows::new(&data, 7, 2..5));
        let (mean, row) = (sums.mean(5), sums.mean_row(5));
        for i in 0..3 {
            let of = |i: usize| data.chunks(7).map(move |r| f64::from(r[2 + i]));
            assert!((row[i] - of(i).sum::<f64>() / 5.0).abs() < 1e-9);
            for j in 0..3 {
                let wanted = of(i).zip(of(j)).map(|(a, b)| a * b).sum::<f64>() / 5.0;
                assert!((mean[(i, j)] - wanted).abs() < 1e-9);
            }
        }
    }
}
