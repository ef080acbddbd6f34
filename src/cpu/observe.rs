//! A look into attention: scores, weights, values and outputs of every head.
#![allow(unsafe_code)]

use std::ops::Range;

use super::KvCache;
use super::attend::{Head, fill_queries, rows};
use super::forward::{Buffers, Engine, Pass, ThreadBuffers};
use super::kernels::LANES;
use super::runs::Runs;
use super::spans::Part;
use super::threads::Columns;
use crate::error::Result;
use crate::model::Model;
use crate::simd;

/// Looks into attention while tokens are read. What is computed stays the same, bit for bit.
pub trait Observer: Sync {
    /// Whether a layer is looked at; others run as fast as ever.
    fn wants(&self, layer: usize) -> bool;

    /// Sees what one query head made of a batch of tokens. Called from several threads, once for
    /// every head and batch.
    fn see(&self, _: &Seen) {}

    /// Whether what the heads of a layer work with is looked at, without scores and weights.
    fn wants_heads(&self, _: usize) -> bool {
        false
    }

    /// Sees it. Called from several threads, once for every query head and batch.
    fn see_head(&self, _: &SeenHead) {}

    /// Whether what matrices are multiplied with is looked at.
    fn wants_inputs(&self) -> bool {
        false
    }

    /// Sees it, for one kind of input and batch after the other.
    fn see_input(&self, _: &SeenInput) {}
}

/// What some matrices of a layer are multiplied with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Input {
    /// What queries, keys and values, or latents that they are made of, are made of.
    Attention,
    /// Latents of queries.
    Queries,
    /// Latents of keys and values.
    Latent,
    /// Outputs of the heads.
    Heads,
    /// What the FFN reads, and what says how much of it, or which experts, are for a token.
    Ffn,
    /// The product in the FFN.
    Hidden,
    /// What an expert reads.
    Expert(usize),
    /// The product in an expert.
    ExpertHidden(usize),
    /// What logits are made of.
    Output,
}

/// What some matrices of a layer are multiplied with for a batch.
#[derive(Debug, Clone, Copy)]
pub struct SeenInput<'a> {
    /// Layer, from 0; 0 for the output.
    pub layer: usize,
    /// Which matrices.
    pub input: Input,
    /// A row for each of the tokens that are multiplied.
    pub rows: SeenRows<'a>,
}

/// What one query head of a batch of `n` tokens works with: before rotation, after norms of heads.
#[derive(Debug, Clone, Copy)]
pub struct SeenHead<'a> {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// Queries, `dim` elements from `start` on of every row.
    pub queries: SeenRows<'a>,
    /// Keys of the kv head that serves this one.
    pub keys: SeenRows<'a>,
    /// Values of the same.
    pub values: SeenRows<'a>,
    /// Outputs: values mixed with weights.
    pub outputs: SeenRows<'a>,
}

/// A part of every row of a matrix.
#[derive(Debug, Clone, Copy)]
pub struct SeenRows<'a> {
    data: &'a [f32],
    width: usize,
    start: usize,
    dim: usize,
}

impl<'a> SeenRows<'a> {
    /// Elements `at` of every row of `width`.
    pub fn new(data: &'a [f32], width: usize, at: Range<usize>) -> SeenRows<'a> {
        SeenRows { data, width, start: at.start, dim: at.len() }
    }

    /// The rows, one for each token.
    pub fn iter(&self) -> impl Iterator<Item = &'a [f32]> {
        let SeenRows { start, dim, .. } = *self;
        self.data.chunks_exact(self.width).map(move |row| &row[start..start + dim])
    }
}

/// What one query head made of a batch of `n` tokens. `n_keys`: the tokens up to the batch's last.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// Position of the first of the batch's tokens.
    pub position: usize,
    /// Cached tokens, those of the batch included.
    pub n_keys: usize,
    /// What the normalizer gets: scaled and, where the model does so, biased and capped; minus infinity where
    /// the mask hides the key. `[n, n_keys]`
    pub scores: &'a [f32],
    /// What the normalizer makes of them. `[n, n_keys]`
    pub weights: &'a [f32],
    /// Of the kv head that serves this one. `[n_keys, value_dim]`
    pub values: &'a [f32],
    /// `weights * values`. `[n, value_dim]`
    pub outputs: &'a [f32],
}

/// Positions whose values are read at once.
const VALUE_ROWS: usize = 2 * LANES;

impl Head<'_> {
    /// Values of the first `n` positions, as the kernels see them. `[n, value_dim]`
    fn all_values(self, own: &mut ThreadBuffers, n: usize, value_dim: usize) -> Vec<f32> {
        let mut values = vec![0.0; n * value_dim];
        let mut identity = [0.0; VALUE_ROWS * VALUE_ROWS];
        identity.iter_mut().step_by(VALUE_ROWS + 1).for_each(|w| *w = 1.0);
        for (i, out) in values.chunks_mut(VALUE_ROWS * value_dim).enumerate() {
            let n = out.len() / value_dim;
            let weights = rows(n, &identity, VALUE_ROWS);
            let buffers = (&mut own.scratch, &mut own.mix);
            let out = Columns::new(out, value_dim);
            // SAFETY: the output is this thread's own.
            unsafe { self.mix(buffers, &weights, (i * VALUE_ROWS, n), 0..value_dim, out) };
        }
        values
    }
}

impl Pass<'_> {
    /// Whether what matrices are multiplied with is looked at.
    pub(super) fn shows_inputs(&self) -> bool {
        self.observer.is_some_and(|o| o.wants_inputs())
    }

    /// Shows what matrices of a layer are multiplied with to who looks.
    pub(super) fn show(&self, layer: usize, input: Input, rows: SeenRows) {
        if let Some(observer) = self.observer.filter(|o| o.wants_inputs()) {
            observer.see_input(&SeenInput { layer, input, rows });
        }
    }
}

impl Buffers {
    /// Shows the product in the FFN of a layer, without what tokens take of it.
    pub(super) fn show_hidden(&self, pass: &Pass, layer: usize) {
        let up = &self.up;
        if self.shares.is_empty() || !pass.shows_inputs() {
            return pass.show(layer, Input::Hidden, up.seen());
        }
        let mut rows = up.floats.clone();
        for (row, share) in rows.chunks_exact_mut(up.width).zip(&self.shares) {
            simd::scale(row, 1.0 / share.max(f32::MIN_POSITIVE));
        }
        pass.show(layer, Input::Hidden, SeenRows::new(&rows, up.width, 0..up.width));
    }

    /// Shows the heads of a layer to `observer`; `q` and `k` are as they were before rotation.
    pub(super) fn show_heads(
        &self,
        pass: &Pass,
        layer: usize,
        (q, k): (&[f32], &[f32]),
        observer: &dyn Observer,
    ) {
        let g = pass.geometry(layer);
        let heads = &self.heads;
        pass.crew.each(g.n_head, |_, head| {
            let kv = head / g.per_kv();
            observer.see_head(&SeenHead {
                layer,
                head,
                queries: SeenRows::new(q, g.query_width(), g.queries(head)),
                keys: SeenRows::new(k, g.key_width(), g.keys(kv)),
                values: SeenRows::new(&self.v, g.value_width(), g.values(kv)),
                outputs: SeenRows::new(&heads.floats, heads.width, g.outputs(head)),
            });
        });
    }

    /// Attention of a part's tokens into `heads`, a head at a time, each of which is shown to
    /// `observer`.
    pub(super) fn observe(
        &mut self,
        pass: &Pass,
        layer: usize,
        part: &Part,
        observer: &dyn Observer,
    ) {
        let (attention, position) = (&part.attention[layer], part.position);
        let (cache, at) = part.keys_and_values(layer);
        let g = &attention.geometry;
        let (q_width, per_kv) = (g.query_width(), g.per_kv());
        let n = part.rows.len();
        let n_keys = position + n;
        let visible = |t: usize| part.visible(layer, t);
        let runs = Runs::by((0..n).map(visible));
        let width = runs.width();
        let copies = cache.key_copies();
        let Buffers { q, heads, threads, .. } = self;
        let q = part.of(q, q_width);
        let heads = Columns::new(&mut heads.floats[..], heads.width).skip(part.rows.start);
        pass.crew.each_with(threads, g.n_head, |own, head| {
            let (place, value_dim) = (g.queries(head), g.kv[head / per_kv].value_dim);
            let dims = (place.len(), cache.types().0.whole(place.len()));
            fill_queries(&mut own.q, n, dims, copies, |t| &q[t * q_width..][place.clone()]);
            let kv = Head { cache, layer: at, head: head / per_kv };
            let mut padded = vec![0.0; n * width];
            let out = Columns::new(&mut padded, width);
            for run in runs.0 {
                // SAFETY: the output is this thread's own.
                unsafe { kv.score(&mut own.scratch, &own.q.view(), run, out) };
            }
            let mut scores = vec![f32::NEG_INFINITY; n * n_keys];
            let mut weights = vec![0.0; n * n_keys];
            for (t, row) in padded.chunks_exact_mut(width).enumerate() {
                let (visible, at) = (visible(t), t * n_keys..(t + 1) * n_keys);
                runs.weigh(row, &visible, |row| {
                    attention.bias((position + t, &visible), head, row);
                    visible.spread(row, &mut scores[at.clone()]);
                    attention.normalize(position + t, head, row);
                    visible.spread(row, &mut weights[at]);
                });
            }
            let values = kv.all_values(own, n_keys, value_dim);
            let mut outputs = vec![0.0; n * value_dim];
            let out = Columns::new(&mut outputs, value_dim);
            let buffers = (&mut own.scratch, &mut own.mix);
            // SAFETY: the output is this thread's own.
            unsafe {
                kv.mix_runs(buffers, &rows(n, &padded, width), &runs, 0..value_dim, out);
            }
            for (t, output) in outputs.chunks_exact(value_dim).enumerate() {
                // SAFETY: tasks have heads of their own.
                unsafe { heads.part(t, g.outputs(head).start, value_dim) }.copy_from_slice(output);
            }
            observer.see(&Seen {
                layer,
                head,
                position,
                n_keys,
                scores: &scores,
                weights: &weights,
                values: &values,
                outputs: &outputs,
            });
        });
    }
}

impl Engine {
    /// Takes windows of tokens, each from position 0 on, through the layers, all of them through one
    /// layer before the next. At each layer `observer` sees every window, then `change` may give
    /// the layer another plan, with which the windows go on; false ends it.
    pub fn layer_by_layer(
        &mut self,
        model: &mut Model,
        cache: &mut KvCache,
        windows: &[Vec<u32>],
        observer: &dyn Observer,
        change: &mut dyn FnMut(&mut Model, usize) -> Result<bool>,
    ) -> Result<()> {
        let mut streams = Vec::new();
        for tokens in windows {
            self.in_pass(model, cache.n_ctx(), None, |pass, buffers| {
                let alone = Part::alone(tokens.len(), &model.attention, cache);
                buffers.embed(pass, tokens, &[alone]);
                streams.push(std::mem::take(&mut buffers.x));
            });
        }
        for layer in 0..model.layers.len() {
            for x in &streams {
                self.in_pass(model, cache.n_ctx(), Some(observer), |pass, buffers| {
                    buffers.x.clone_from(x);
                    let n = x.len() / model.hparams.n_embd;
                    let parts = &mut [Part::alone(n, &model.attention, cache)];
                    buffers.place(pass, parts);
                    buffers.attention(pass, layer, parts, false);
                });
            }
            if !change(model, layer)? {
                break;
            }
            for x in &mut streams {
                self.in_pass(model, cache.n_ctx(), None, |pass, buffers| {
                    std::mem::swap(&mut buffers.x, x);
                    let n = buffers.x.len() / model.hparams.n_embd;
                    let parts = &mut [Part::alone(n, &model.attention, cache)];
                    buffers.place(pass, parts);
                    buffers.layer(pass, layer, parts, false);
                    std::mem::swap(&mut buffers.x, x);
                });
            }
        }
        Ok(())
    }
}
