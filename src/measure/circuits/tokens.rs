//! Directions of the residual stream as tokens.

use std::sync::Mutex;

use faer::MatRef;
use rayon::prelude::*;
use serde_json::{Value, json};

use super::{Circuit, Factors, Plane, Product, SHARES, Selection, centered, circuits};
use crate::cpu::{Observer, SeenHead, SeenRows};
use crate::error::Result;
use crate::model::Model;
use crate::session::Session;
use crate::token::Tokenizer;

/// A token and how well it fits a direction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Match {
    /// The token.
    pub token: u32,
    /// Product of the direction and the token's row: of unit length for what is read, so that this is a
    /// cosine for directions of unit length; for what is written, what it adds to the logit where the
    /// last norm divides by 1.
    pub score: f64,
}

/// Which side of the model a direction is read through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Token embeddings, for what a head reads.
    Embedding,
    /// The last norm's gain and the output, for what it writes; token embeddings where there is none.
    Output,
}

/// A head with its first directions as tokens.
#[derive(Debug, Clone)]
pub struct Described {
    /// What its weights say.
    pub circuit: Circuit,
    /// Of `W_QK`: queries and the keys that they look for.
    pub qk: Vec<Direction>,
    /// Of `W_OV`: what is read and what is then written.
    pub ov: Vec<Direction>,
}

/// A pair of singular vectors as tokens: both as they are, and both with the other sign. What fits
/// better comes first.
pub type Direction = [Pole; 2];

/// One sign of a pair of singular vectors.
#[derive(Debug, Clone, PartialEq)]
pub struct Pole {
    /// Tokens that the left vector stands for.
    pub left: Vec<Match>,
    /// And the right one.
    pub right: Vec<Match>,
}

/// What a head makes of every token of a text.
#[derive(Debug, Clone)]
pub struct Reading {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// For each token its pattern, `q W_K^T`, as the tokens whose embedding as a key would score most at
    /// the same position, and the scores.
    pub patterns: Vec<Vec<Match>>,
    /// Its message, `v W_O`, as the tokens that it makes likelier where it has all of the weight.
    pub messages: Vec<Vec<Match>>,
}

/// Rows of the vocabulary that are multiplied at once.
const BLOCK: usize = 256;

/// The tokens that fit best, best first; of those that fit alike, the first.
#[derive(Clone, Default)]
struct Best(Vec<(f32, u32)>);

impl Best {
    fn add(&mut self, found: (f32, u32), n: usize) {
        let before =
            |other: &(f32, u32)| other.0 > found.0 || other.0 == found.0 && other.1 < found.1;
        let at = self.0.partition_point(before);
        if at < n {
            self.0.truncate(n - 1);
            self.0.insert(at, found);
        }
    }

    fn matches(&self) -> Vec<Match> {
        self.0
            .iter()
            .map(|(score, token)| Match { token: *token, score: f64::from(*score) })
            .collect()
    }
}

/// For each direction, `[n_embd]`, the `n` tokens that fit it best, and those that fit its opposite.
pub fn matches(
    model: &Model,
    side: Side,
    directions: &[Vec<f64>],
    n: usize,
) -> Vec<[Vec<Match>; 2]> {
    let w = match side {
        Side::Embedding => &model.token_embd,
        Side::Output => model.output.as_ref().unwrap_or(&model.token_embd),
    };
    let through = |direction: &Vec<f64>| -> Vec<f32> {
        let direction = centered(model, direction.clone());
        let gain = model.output_norm.as_ref().filter(|_| side == Side::Output);
        let factor = |e: usize| gain.map_or(1.0, |norm| norm.weight[e]);
        direction.iter().enumerate().map(|(e, x)| *x as f32 * factor(e)).collect()
    };
    if directions.is_empty() {
        return Vec::new();
    }
    let columns: Vec<f32> = directions.iter().flat_map(through).collect();
    let columns = MatRef::from_column_major_slice(&columns, w.n_in, directions.len());
    let start = || vec![[Best::default(), Best::default()]; directions.len()];
    let block = |mut best: Vec<[Best; 2]>, first: usize| {
        let last = (first + BLOCK).min(w.n_out);
        let mut rows = vec![0.0f32; (last - first) * w.n_in];
        for (token, row) in (first..last).zip(rows.chunks_exact_mut(w.n_in)) {
            w.dequantize_row(token, row);
            if side == Side::Embedding {
                unit(model, row);
            }
        }
        let rows = MatRef::from_row_major_slice(&rows, last - first, w.n_in);
        let scores = rows * columns;
        for ([plus, minus], scores) in best.iter_mut().zip(scores.col_iter()) {
            for (token, score) in (first as u32..).zip(scores.iter()) {
                plus.add((*score, token), n);
                minus.add((-score, token), n);
            }
        }
        best
    };
    let both = |mut a: Vec<[Best; 2]>, b: Vec<[Best; 2]>| {
        for (to, from) in a.iter_mut().flatten().zip(b.into_iter().flatten()) {
            from.0.into_iter().for_each(|found| to.add(found, n));
        }
        a
    };
    let blocks = (0..w.n_out.div_ceil(BLOCK)).into_par_iter().map(|i| i * BLOCK);
    let best = blocks.fold(start, block).reduce(start, both);
    best.iter().map(|both| both.each_ref().map(Best::matches)).collect()
}

/// An embedding as what a layer's norm makes of it, but of unit length.
fn unit(model: &Model, row: &mut [f32]) {
    let centered = centered(model, row.iter().map(|x| f64::from(*x)).collect());
    let size = centered.iter().map(|x| x * x).sum::<f64>().sqrt().max(f64::MIN_POSITIVE);
    row.iter_mut().zip(centered).for_each(|(x, c)| *x = (c / size) as f32);
}

/// The heads of a selection, with their directions as tokens.
pub fn describe(model: &Model, selection: &Selection) -> Result<Vec<Described>> {
    let found = circuits(model, selection)?;
    let qk = directions(model, &found, |c| &c.qk, [Side::Embedding; 2], selection.n_tokens);
    let ov =
        directions(model, &found, |c| &c.ov, [Side::Embedding, Side::Output], selection.n_tokens);
    let (mut qk, mut ov) = (qk.into_iter(), ov.into_iter());
    let described = found.into_iter().map(|circuit| {
        let (n_qk, n_ov) = (circuit.qk.left.ncols(), circuit.ov.left.ncols());
        let (qk, ov) = (qk.by_ref().take(n_qk).collect(), ov.by_ref().take(n_ov).collect());
        Described { circuit, qk, ov }
    });
    Ok(described.collect())
}

/// The directions of one product of all heads, one head after the other.
fn directions(
    model: &Model,
    found: &[Circuit],
    product: impl Fn(&Circuit) -> &Product,
    sides: [Side; 2],
    n: usize,
) -> Vec<Direction> {
    let columns = |of: &dyn Fn(&Product) -> MatRef<f64>| -> Vec<Vec<f64>> {
        let all = found.iter().map(|c| of(product(c)));
        all.flat_map(|m| m.col_iter().map(|c| c.iter().copied().collect::<Vec<f64>>())).collect()
    };
    let left = matches(model, sides[0], &columns(&|p| p.left.as_ref()), n);
    let right = matches(model, sides[1], &columns(&|p| p.right.as_ref()), n);
    let first = |found: &[Match]| found.first().map_or(0.0, |m| m.score);
    let mut out = Vec::new();
    for (left, right) in left.into_iter().zip(right) {
        let mut poles = left.into_iter().zip(right).map(|(left, right)| Pole { left, right });
        let (Some(plus), Some(minus)) = (poles.next(), poles.next()) else { continue };
        // Scores of the output are no cosines, so that only what is read decides there.
        let fit = |p: &Pole| match sides[1] {
            Side::Embedding => first(&p.left) + first(&p.right),
            Side::Output => first(&p.left),
        };
        out.push(if fit(&plus) >= fit(&minus) { [plus, minus] } else { [minus, plus] });
    }
    out
}

/// Queries and values of a text at one head.
struct Seen {
    layer: usize,
    head: usize,
    queries: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
}

/// Keeps them of the selected heads.
struct Reader<'a> {
    selection: &'a Selection,
    seen: Mutex<Vec<Seen>>,
}

impl Observer for Reader<'_> {
    fn wants(&self, _: usize) -> bool {
        false
    }

    fn wants_heads(&self, layer: usize) -> bool {
        self.selection.layers.contains(&layer)
    }

    fn see_head(&self, seen: &SeenHead) {
        if self.selection.heads.contains(&seen.head)
            && let Ok(mut all) = self.seen.lock()
        {
            let rows = |rows: SeenRows| rows.iter().map(<[f32]>::to_vec).collect();
            let (queries, values) = (rows(seen.queries), rows(seen.values));
            all.push(Seen { layer: seen.layer, head: seen.head, queries, values });
        }
    }
}

/// Reads a text from its beginning, in one batch, and tells what heads make of every token.
pub fn read_text(
    session: &mut Session,
    selection: &Selection,
    tokens: &[u32],
) -> Result<Vec<Reading>> {
    let reader = Reader { selection, seen: Mutex::default() };
    session.feed_observed(tokens, 0..0, &reader)?;
    let model = session.model().clone();
    let mut seen = reader.seen.into_inner().unwrap_or_default();
    seen.sort_by_key(|seen| (seen.layer, seen.head));
    let mut readings = Vec::new();
    for Seen { layer, head, queries, values } in seen {
        let Factors { k, o, .. } = Factors::of(&model, layer, &model.weights(layer), head);
        // Normed inputs are longer than one by the root of their number of elements.
        let scale = f64::from(model.hparams.attn_scale) * (k.nrows() as f64).sqrt();
        let through = |m: MatRef<f64>, x: &Vec<f32>, scale: f64| -> Vec<f64> {
            let row =
                |e: usize| m.row(e).iter().zip(x).map(|(m, x)| m * f64::from(*x)).sum::<f64>();
            (0..m.nrows()).map(|e| scale * row(e)).collect()
        };
        let patterns: Vec<_> = queries.iter().map(|q| through(k.as_ref(), q, scale)).collect();
        let messages: Vec<_> = values.iter().map(|v| through(o.as_ref(), v, 1.0)).collect();
        let tokens = |side, directions: &[Vec<f64>]| -> Vec<Vec<Match>> {
            let found = matches(&model, side, directions, selection.n_tokens);
            found.into_iter().map(|[as_it_is, _]| as_it_is).collect()
        };
        readings.push(Reading {
            layer,
            head,
            patterns: tokens(Side::Embedding, &patterns),
            messages: tokens(Side::Output, &messages),
        });
    }
    Ok(readings)
}

/// Tokens with their texts.
fn as_json(found: &[Match], tokenizer: &Tokenizer) -> Vec<Value> {
    let piece = |id: u32| String::from_utf8_lossy(tokenizer.piece(id, true)).into_owned();
    let entry = |m: &Match| json!({"id": m.token, "token": piece(m.token), "score": m.score});
    found.iter().map(entry).collect()
}

impl Described {
    /// All of it; numbers that are not finite are null.
    pub fn json(&self, tokenizer: &Tokenizer) -> Value {
        let c = &self.circuit;
        let product = |p: &Product, directions: &[Direction], [left, right]: [&str; 2]| {
            let pole = |pole: &Pole| json!({left: as_json(&pole.left, tokenizer), right: as_json(&pole.right, tokenizer)});
            let directions: Vec<[Value; 2]> =
                directions.iter().map(|d| d.each_ref().map(pole)).collect();
            json!({"singular_values": p.values, "norm": p.norm(), "effective_rank": p.effective_rank(),
                   "energy_at": SHARES, "energy": p.energies(), "directions": directions})
        };
        let plane = |p: &Plane| json!({"wavelength": p.wavelength, "energy": p.energy});
        let planes: Vec<Value> = c.planes.iter().map(plane).collect();
        json!({"layer": c.layer, "head": c.head,
               "qk": product(&c.qk, &self.qk, ["query", "key"]),
               "ov": product(&c.ov, &self.ov, ["read", "write"]),
               "key_condition": c.key_condition, "value_condition": c.value_condition,
               "layer_key_condition": c.layer_condition, "copying": c.copying, "planes": planes})
    }
}

impl Reading {
    /// All of it, token by token.
    pub fn json(&self, tokens: &[u32], tokenizer: &Tokenizer) -> Value {
        let piece = |id: u32| String::from_utf8_lossy(tokenizer.piece(id, true)).into_owned();
        let rows = tokens.iter().zip(&self.patterns).zip(&self.messages);
        let rows: Vec<Value> = rows
            .map(|((token, pattern), message)| {
                json!({"id": token, "token": piece(*token), "looks_for": as_json(pattern, tokenizer),
                       "writes": as_json(message, tokenizer)})
            })
            .collect();
        json!({"layer": self.layer, "head": self.head, "tokens": rows})
    }
}
