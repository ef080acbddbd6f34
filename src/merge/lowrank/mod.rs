//! Low rank: of each head only what carries most is kept, and all that is multiplied and cached
//! becomes smaller.
//!
//! Values and outputs can be mixed by any matrix, so their best directions are kept. So can queries
//! and keys where no rotation stands between them; planes of a rotation cannot be mixed, but kept or
//! dropped, one by one. Planes that hardly turn over the context count as not rotated, where that
//! leaves more room. With norms of heads, queries and keys stay as they are and only planes are
//! dropped, after the norm.

mod ranks;
mod solver;
#[cfg(test)]
mod tests;

use faer::{Mat, MatRef};
use rayon::prelude::*;

use self::ranks::{Part, Parts, Target, choose, shared};
use self::solver::{Factors, factor, refit};
use super::center::may_center;
use super::{
    BLOCK, Choice, Dense, Form, Geometry, Grams, KvHead, Rewritten, Site, Trained, Verdict,
    Weights, only_products,
};
use crate::arch::Pairing;
use crate::error::{Error, Result};
use crate::param::{Domain, Param, param};
use crate::simd;

pub(super) struct LowRank;

const SHARE: Domain = Domain::Above(0.0, 1.0);
/// 0 stands for what is not given.
const RANK: Domain = Domain::Whole(0.0, 65_536.0);
const YES: Domain = Domain::Word(&["no", "yes"]);

static PARAMS: &[Param] = &[
    param("ratio", "share of the elements of all heads that is kept", 1.0, SHARE),
    param("energy", "share of each head's energy that is kept; with 1, `ratio` says", 1.0, SHARE),
    param("qk", "elements of a query and a key; with 0, `ratio` or `energy` say", 0.0, RANK),
    param("ov", "the same of a value", 0.0, RANK),
    param(
        "slow",
        "planes that turn less than this, in radians, over `ctx` count as not rotated",
        0.1,
        Domain::From(0.0, 4.0),
    ),
    param(
        "ctx",
        "tokens; with 0, those that the model was trained for",
        0.0,
        Domain::Whole(0.0, 1e9),
    ),
    param(
        "kl",
        "most divergence from the model as trained, in nats per token; with 0, the others say",
        0.0,
        Domain::From(0.0, 100.0),
    ),
    param("shared", "whether all heads of all layers keep the same planes; needs `qk`", 0.0, YES),
    param("data", "whether directions are chosen by what heads make of a text", 1.0, YES),
    param(
        "center",
        "whether means of keys and outputs, which softmax does not see or passes on, are taken out first",
        0.0,
        YES,
    ),
];

impl Form for LowRank {
    fn name(&self) -> &'static str {
        "lowrank"
    }

    fn what(&self) -> &'static str {
        "of each head only the directions, and planes of the rotation, that carry most"
    }

    fn paper(&self) -> &'static str {
        "Wong et al. 2025 (A3), arXiv 2505.12942; without data: Meng et al. 2024 (CLOVER), arXiv 2411.17426"
    }

    fn params(&self) -> &'static [Param] {
        PARAMS
    }

    fn applies(&self, choice: &Choice, site: &Site) -> Verdict {
        only_products(site)?;
        let hp = site.hparams;
        if hp.qk_norm.is_some() && 2 * site.frequencies.len() < hp.key_dim {
            return Err(
                "elements that are normed but not rotated can be neither mixed nor dropped".into(),
            );
        }
        if choice.value("center") == Some(1.0) { may_center(site) } else { Ok(()) }
    }

    fn exact(&self, choice: &Choice, _: &Site) -> Verdict {
        let keeps_all = |name| choice.value(name) == Some(1.0);
        match keeps_all("ratio")
            && keeps_all("energy")
            && is_zero(choice, "qk")
            && is_zero(choice, "ov")
            && is_zero(choice, "kl")
        {
            true => Ok(()),
            false => Err("what is not kept is lost".into()),
        }
    }

    fn needs_grams(&self, choice: &Choice) -> bool {
        choice.value("data") == Some(1.0)
    }

    fn rewrites(&self) -> bool {
        true
    }

    fn rewrite(&self, choice: &Choice, layers: &[Trained]) -> Result<Vec<Option<Rewritten>>> {
        let solved = layers.par_iter().map(|layer| Solved::of(choice, layer));
        // All, so that it is the first layer's error that is told.
        let solved: Vec<Result<Solved>> = solved.collect();
        let solved = solved.into_iter().collect::<Result<Vec<_>>>()?;
        let heads = |parts: fn(&SolvedHead) -> &Vec<Part>| -> Vec<Parts> {
            let heads = solved.iter().flat_map(|l| l.heads.iter().map(move |h| (l.layer, h)));
            heads.map(|(layer, h)| Parts { layer, parts: parts(h).clone() }).collect()
        };
        let parts = heads(|h| &h.score_parts);
        let scores = match choice.value("shared") {
            Some(1.0) => shared(&parts, target(choice, "qk"))?,
            _ => choose("qk", &parts, target(choice, "qk"))?,
        };
        let values = choose("ov", &heads(|h| &h.value_parts), target(choice, "ov"))?;
        let mut at = 0;
        let mut kept = Vec::new();
        for layer in &solved {
            let here = at..at + layer.heads.len();
            kept.push((&scores[here.clone()], &values[here]));
            at += layer.heads.len();
        }
        let all = layers.par_iter().zip(&solved).zip(kept);
        all.map(|((layer, solved), kept)| match solved.keeps_all(kept) {
            true => Ok(None),
            false => solved.rewrite(layer, kept).map(Some),
        })
        .collect()
    }
}

fn is_zero(choice: &Choice, name: &str) -> bool {
    choice.value(name) == Some(0.0)
}

fn target(choice: &Choice, rank: &str) -> Target {
    let value = |name: &str| f64::from(choice.value(name).unwrap_or(0.0));
    match (value(rank), value("energy")) {
        (0.0, 1.0) => Target::Ratio(value("ratio")),
        (0.0, energy) => Target::Energy(energy),
        (rank, _) => Target::Rank(rank as usize),
    }
}

/// What is known of a layer before it is said how much is kept.
struct Solved {
    layer: usize,
    pairing: Pairing,
    heads: Vec<SolvedHead>,
    grams: Grams,
}

/// Of a kv head and the query heads that it serves.
struct SolvedHead {
    /// Planes that are kept or dropped, the first parts of `score_parts`.
    planes: Vec<usize>,
    /// Elements that are mixed, and how.
    band: Vec<usize>,
    band_factors: Factors,
    score_parts: Vec<Part>,
    value_factors: Factors,
    value_parts: Vec<Part>,
    /// What is taken from every key and every value first.
    key_mean: Option<Vec<f64>>,
    value_mean: Option<Vec<f64>>,
}

/// Directions that are kept or dropped together.
fn unit(width: usize) -> usize {
    // Whole panels of the cache, but not more than an eighth of a head, and all alike.
    let most = (width / 8).clamp(1, 8);
    1 << most.ilog2().min(width.trailing_zeros())
}

/// Directions in the order of their singular values, `unit` of them together.
fn direction_parts(values: &[f64], unit: usize) -> impl Iterator<Item = Part> {
    values
        .chunks(unit)
        .map(|some| Part { dims: some.len(), energy: some.iter().map(|s| s * s).sum() })
}

/// Some rows and columns.
fn part_of(gram: &Mat<f64>, at: &[usize]) -> Mat<f64> {
    Mat::from_fn(at.len(), at.len(), |i, j| gram[(at[i], at[j])])
}

/// A second moment of what has this mean, about `center`, or about zero.
fn about(gram: &Mat<f64>, mean: &[f64], center: Option<&[f64]>) -> Mat<f64> {
    let Some(c) = center else { return gram.clone() };
    let n = gram.nrows();
    Mat::from_fn(n, n, |i, j| gram[(i, j)] - mean[i] * c[j] - c[i] * mean[j] + c[i] * c[j])
}

/// The mean of some rows.
fn mean_of(rows: &[Vec<f64>]) -> Vec<f64> {
    let sum = |i: usize| rows.iter().map(|row| row[i]).sum::<f64>();
    (0..rows.first().map_or(0, Vec::len)).map(|i| sum(i) / rows.len() as f64).collect()
}

impl Solved {
    fn of(choice: &Choice, layer: &Trained) -> Result<Solved> {
        let weights = (layer.weights)();
        let site = &layer.site;
        let grams = match layer.grams.filter(|_| choice.value("data") == Some(1.0)) {
            Some(grams) => grams.clone(),
            None => Grams::of_weights(&weights, site),
        };
        let rope = site.hparams.rope(site.layer);
        let pairing = rope.map_or(Pairing::Adjacent, |r| r.pairing);
        let head = |kv| {
            SolvedHead::of(choice, site, pairing, (&weights.o, &grams, kv)).map_err(|e| {
                Error::Usage(format!("form lowrank, layer {}, kv head {kv}: {e}", site.layer))
            })
        };
        let heads = (0..site.at().n_head_kv).map(head).collect::<Result<_>>()?;
        Ok(Solved { layer: site.layer, pairing, heads, grams })
    }

    /// Whether these are all parts of all heads: then the layer stays as it is.
    fn keeps_all(&self, (scores, values): (&[Vec<usize>], &[Vec<usize>])) -> bool {
        let all = |kept: &Vec<usize>, parts: &Vec<Part>| kept.len() == parts.len();
        let pairs = self.heads.iter().zip(scores.iter().zip(values));
        pairs.into_iter().all(|(h, (s, v))| all(s, &h.score_parts) && all(v, &h.value_parts))
    }

    /// The layer with these parts of its heads, of scores and of values.
    fn rewrite(
        &self,
        layer: &Trained,
        (scores, values): (&[Vec<usize>], &[Vec<usize>]),
    ) -> Result<Rewritten> {
        let hp = layer.site.hparams;
        let (n_head, n_head_kv) = (layer.site.at().n_head, layer.site.at().n_head_kv);
        let per_kv = n_head / n_head_kv;
        let old = (layer.weights)();
        let mut new = Builder::new(&old);
        let mut kv_heads = Vec::new();
        let (mut score_errors, mut output_errors) = (Vec::new(), Vec::new());
        for (kv, head) in self.heads.iter().enumerate() {
            let (map, planes) = head.score_map(
                &scores[kv],
                (hp.key_dim, self.pairing),
                layer.site.frequencies.len(),
            );
            let keys = kv * hp.key_dim;
            if hp.qk_norm.is_some() {
                // Dropped by the engine, after the norm.
                let all = Mat::identity(hp.key_dim, hp.key_dim);
                (0..per_kv).for_each(|i| {
                    new.q.add(&old.q, (kv * per_kv + i) * hp.key_dim, all.as_ref(), None)
                });
                new.k.add(&old.k, keys, all.as_ref(), None);
            } else {
                let q_map = &map[0];
                (0..per_kv).for_each(|i| {
                    new.q.add(&old.q, (kv * per_kv + i) * hp.key_dim, q_map.as_ref(), None)
                });
                new.k.add(&old.k, keys, map[1].as_ref(), head.key_mean.as_deref());
            }
            let kept =
                |parts: &[Part], kept: &[usize]| kept.iter().map(|i| parts[*i].dims).sum::<usize>();
            let rank = kept(&head.value_parts, &values[kv]);
            let mean = head.value_mean.as_deref();
            let all = Mat::identity(hp.value_dim, hp.value_dim);
            let map = if rank == hp.value_dim {
                all.as_ref()
            } else {
                head.value_factors.left.subcols(0, rank)
            };
            new.v.add(&old.v, kv * hp.value_dim, map, mean);
            for h in kv * per_kv..(kv + 1) * per_kv {
                let gram = about(&self.grams.outputs[h], &self.grams.output_means[h], mean);
                let back =
                    if rank == hp.value_dim { all.clone() } else { refit(gram.as_ref(), map)? };
                new.add_outputs(&old.o, h * hp.value_dim, back.as_ref(), mean);
            }
            score_errors.push(lost(&head.score_parts, &scores[kv]));
            output_errors.push(lost(&head.value_parts, &values[kv]));
            kv_heads.push(KvHead {
                score_dim: kept(&head.score_parts, &scores[kv]),
                value_dim: rank,
                planes,
            });
        }
        let weights = new.finish();
        Ok(Rewritten {
            weights,
            geometry: Geometry::new(n_head, kv_heads),
            score_errors,
            output_errors,
            damped: self.heads.iter().map(SolvedHead::damped).sum(),
        })
    }
}

/// The root of the share of energy that is not kept.
fn lost(parts: &[Part], kept: &[usize]) -> f64 {
    let all: f64 = parts.iter().map(|p| p.energy).sum();
    let left = (0..parts.len()).filter(|i| !kept.contains(i)).map(|i| parts[i].energy).sum::<f64>();
    if all > 0.0 { (left / all).sqrt() } else { 0.0 }
}

impl SolvedHead {
    fn of(
        choice: &Choice,
        site: &Site,
        pairing: Pairing,
        (o, grams, kv): (&Dense, &Grams, usize),
    ) -> Result<SolvedHead> {
        let value = |name: &str| f64::from(choice.value(name).unwrap_or(0.0));
        let hp = site.hparams;
        let n_planes = site.frequencies.len();
        let n_ctx = if value("ctx") > 0.0 { value("ctx") } else { hp.n_ctx_train as f64 };
        let is_slow = |j: usize| {
            let turned = site.frequencies[j] * n_ctx;
            hp.qk_norm.is_none() && value("shared") == 0.0 && turned <= value("slow")
        };
        let planes: Vec<usize> = (0..n_planes).filter(|j| !is_slow(*j)).collect();
        let pair = |j: usize| pairing.pair(j, n_planes);
        let rotated: Vec<usize> = planes.iter().flat_map(|j| pair(*j)).collect();
        // With norms of heads nothing can be mixed: what is not rotated stays.
        let mut band: Vec<usize> = (0..hp.key_dim).filter(|i| !rotated.contains(i)).collect();
        if hp.qk_norm.is_some() {
            band.clear();
        }
        let per_kv = site.at().n_head / site.at().n_head_kv;
        let group = kv * per_kv..(kv + 1) * per_kv;
        let centers = value("center") == 1.0;
        let key_mean = (centers && n_planes == 0).then(|| grams.key_means[kv].clone());
        let value_mean = centers.then(|| mean_of(&grams.output_means[group.clone()]));
        let q = &grams.queries[kv];
        let k = about(&grams.keys[kv], &grams.key_means[kv], key_mean.as_deref());
        let band_factors = factor(part_of(q, &band).as_ref(), part_of(&k, &band).as_ref())?;
        // Averaged over distances, what one plane adds to the square of a logit.
        let size = |gram: &Mat<f64>, j: usize| pair(j).map(|i| gram[(i, i)]).iter().sum::<f64>();
        let plane_parts =
            planes.iter().map(|j| Part { dims: 2, energy: size(q, *j) * size(&k, *j) / 2.0 });
        let score_parts = plane_parts.chain(direction_parts(&band_factors.values, 2)).collect();
        let outs = group
            .clone()
            .map(|h| about(&grams.outputs[h], &grams.output_means[h], value_mean.as_deref()));
        let seen = outs.reduce(|a, b| a + b).unwrap_or_else(Mat::new);
        let products = group.map(|h| output_product(o, h * hp.value_dim, hp.value_dim));
        let written = products.reduce(|a, b| a + b).unwrap_or_else(Mat::new);
        let value_factors = factor(seen.as_ref(), written.as_ref())?;
        let value_parts = direction_parts(&value_factors.values, unit(hp.value_dim)).collect();
        Ok(SolvedHead {
            planes,
            band,
            band_factors,
            score_parts,
            value_factors,
            value_parts,
            key_mean,
            value_mean,
        })
    }

    /// Directions that second moments hardly show.
    fn damped(&self) -> usize {
        self.band_factors.damped + self.value_factors.damped
    }

    /// What rows of queries and keys are multiplied with, each `[key_dim, score_dim]`, and the planes
    /// that are left: `None` where that is all of a head that stays as it is.
    fn score_map(
        &self,
        kept: &[usize],
        (dim, pairing): (usize, Pairing),
        n_planes: usize,
    ) -> ([Mat<f64>; 2], Option<Vec<usize>>) {
        let n_parts = self.score_parts.len();
        if kept.len() == n_parts {
            return ([Mat::identity(dim, dim), Mat::identity(dim, dim)], None);
        }
        let n_own = kept.iter().filter(|i| **i < self.planes.len()).count();
        let (own, directions) = kept.split_at(n_own);
        let mut planes: Vec<usize> = own.iter().map(|i| self.planes[*i]).collect();
        // A band that stays whole need not be mixed: its planes turn as they did.
        let is_whole = own.len() + self.score_parts.len() - self.planes.len() == kept.len();
        if is_whole {
            planes.extend((0..n_planes).filter(|j| !self.planes.contains(j)));
            planes.sort_unstable();
        }
        let turns = |i: &usize| (0..n_planes).any(|j| pairing.pair(j, n_planes).contains(i));
        let band: Vec<usize> =
            self.band.iter().copied().filter(|i| !(is_whole && turns(i))).collect();
        let n_band: usize = match is_whole {
            true => band.len(),
            false => directions.iter().map(|i| self.score_parts[*i].dims).sum(),
        };
        let n_rotated = 2 * planes.len();
        let map = |side: MatRef<f64>| {
            let mut map = Mat::zeros(dim, n_rotated + n_band);
            for (at, j) in planes.iter().enumerate() {
                let (from, to) = (pairing.pair(*j, n_planes), pairing.pair(at, planes.len()));
                from.iter().zip(to).for_each(|(from, to)| map[(*from, to)] = 1.0);
            }
            for (i, from) in band.iter().enumerate() {
                for c in 0..n_band {
                    let own = if i == c { 1.0 } else { 0.0 };
                    map[(*from, n_rotated + c)] = if is_whole { own } else { side[(i, c)] };
                }
            }
            map
        };
        let Factors { left, right, .. } = &self.band_factors;
        ([map(left.as_ref()), map(right.as_ref())], (n_planes > 0).then_some(planes))
    }
}

/// Sums of products of the columns of `o` that belong to one head. `[dim, dim]`
fn output_product(o: &Dense, start: usize, dim: usize) -> Mat<f64> {
    let mut sums = vec![0.0f64; dim * dim];
    for rows in o.data.chunks(o.n_in * 64) {
        let mut some = vec![0.0f32; dim * dim];
        for row in rows.chunks_exact(o.n_in) {
            let row = &row[start..start + dim];
            row.iter()
                .zip(some.chunks_exact_mut(dim))
                .for_each(|(x, to)| simd::add_scaled(to, *x, row));
        }
        sums.iter_mut().zip(&some).for_each(|(sum, x)| *sum += f64::from(*x));
    }
    Mat::from_fn(dim, dim, |i, j| sums[i * dim + j])
}

/// New rows of a matrix.
#[derive(Default)]
struct Rows {
    data: Vec<f32>,
    bias: Option<Vec<f32>>,
}

impl Rows {
    /// Adds rows that are mixed from those of `old` from `start` on by the columns of `map`. `mean` is
    /// taken from what they give first.
    fn add(&mut self, old: &Dense, start: usize, map: MatRef<f64>, mean: Option<&[f64]>) {
        let n = old.n_in;
        let bias = |i: usize| {
            let own = old.bias.as_ref().map_or(0.0, |bias| f64::from(bias[start + i]));
            own - mean.map_or(0.0, |mean| mean[i])
        };
        for c in 0..map.ncols() {
            let at = self.data.len();
            self.data.resize(at + n, 0.0);
            for i in (0..map.nrows()).filter(|i| map[(*i, c)] != 0.0) {
                let row = &old.data[(start + i) * n..(start + i + 1) * n];
                simd::add_scaled(&mut self.data[at..], map[(i, c)] as f32, row);
            }
            if old.bias.is_some() || mean.is_some() {
                let sum = (0..map.nrows()).map(|i| map[(i, c)] * bias(i)).sum::<f64>();
                self.bias.get_or_insert_default().push(sum as f32);
            }
        }
    }

    fn dense(self, n_in: usize) -> Dense {
        Dense { n_in, data: self.data, bias: self.bias }
    }
}

/// New matrices in the making.
struct Builder {
    n_embd: usize,
    q: Rows,
    k: Rows,
    v: Rows,
    /// Rows of the output matrix, each a piece for every head so far.
    o: Vec<Vec<f32>>,
    o_bias: Option<Vec<f64>>,
}

impl Builder {
    fn new(old: &Weights) -> Builder {
        let n_embd = old.q.n_in;
        let o_bias = old.o.bias.as_ref().map(|b| b.iter().map(|x| f64::from(*x)).collect());
        let [q, k, v] = Default::default();
        Builder { n_embd, q, k, v, o: vec![Vec::new(); n_embd], o_bias }
    }

    /// Adds columns that are mixed from those of `old` from `start` on by the rows of `back`. `mean` of
    /// the values goes to the bias.
    fn add_outputs(&mut self, old: &Dense, start: usize, back: MatRef<f64>, mean: Option<&[f64]>) {
        let dim = back.ncols();
        let rows: Vec<Vec<f32>> =
            (0..back.nrows()).map(|r| (0..dim).map(|i| back[(r, i)] as f32).collect()).collect();
        if mean.is_some() {
            self.o_bias.get_or_insert_with(|| vec![0.0; self.n_embd]);
        }
        for (e, to) in self.o.iter_mut().enumerate() {
            let from = &old.data[e * old.n_in + start..][..dim];
            to.extend(rows.iter().map(|row| simd::dot(row, from)));
            if let (Some(mean), Some(bias)) = (mean, &mut self.o_bias) {
                bias[e] += mean.iter().zip(from).map(|(m, w)| m * f64::from(*w)).sum::<f64>();
            }
        }
    }

    fn finish(mut self) -> Weights {
        let n_in = self.o.first().map_or(0, Vec::len).next_multiple_of(BLOCK);
        self.o.iter_mut().for_each(|row| row.resize(n_in, 0.0));
        let bias = self.o_bias.map(|b| b.into_iter().map(|x| x as f32).collect());
        Weights {
            q: self.q.dense(self.n_embd),
            k: self.k.dense(self.n_embd),
            v: self.v.dense(self.n_embd),
            o: Dense { n_in, data: self.o.concat(), bias },
        }
    }
}

impl Grams {
    /// Those of inputs whose elements are independent, of mean zero and of one size: what weights alone
    /// tell.
    fn of_weights(weights: &Weights, site: &Site) -> Grams {
        let hp = site.hparams;
        let (n_head, n_head_kv) = (site.at().n_head, site.at().n_head_kv);
        let moment = |w: &Dense, head: usize, dim: usize| {
            let rows = &w.data[head * dim * w.n_in..(head + 1) * dim * w.n_in];
            let row = |i: usize| &rows[i * w.n_in..(i + 1) * w.n_in];
            let bias = |i: usize| w.bias.as_ref().map_or(0.0, |b| f64::from(b[head * dim + i]));
            Mat::from_fn(dim, dim, |i, j| f64::from(simd::dot(row(i), row(j))) + bias(i) * bias(j))
        };
        let mean = |w: &Dense, head: usize, dim: usize| -> Vec<f64> {
            let at = head * dim..(head + 1) * dim;
            w.bias
                .as_ref()
                .map_or(vec![0.0; dim], |b| b[at].iter().map(|x| f64::from(*x)).collect())
        };
        let per_kv = n_head / n_head_kv;
        let queries = |kv: usize| {
            let all = (kv * per_kv..(kv + 1) * per_kv).map(|h| moment(&weights.q, h, hp.key_dim));
            all.reduce(|a, b| a + b).unwrap_or_else(Mat::new)
        };
        let values: Vec<_> =
            (0..n_head_kv).map(|kv| moment(&weights.v, kv, hp.value_dim)).collect();
        Grams {
            queries: (0..n_head_kv).map(queries).collect(),
            keys: (0..n_head_kv).map(|kv| moment(&weights.k, kv, hp.key_dim)).collect(),
            outputs: (0..n_head).map(|h| values[h / per_kv].clone()).collect(),
            key_means: (0..n_head_kv).map(|kv| mean(&weights.k, kv, hp.key_dim)).collect(),
            value_means: (0..n_head_kv).map(|kv| mean(&weights.v, kv, hp.value_dim)).collect(),
            output_means: (0..n_head).map(|h| mean(&weights.v, h / per_kv, hp.value_dim)).collect(),
        }
    }
}
