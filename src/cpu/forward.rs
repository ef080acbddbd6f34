//! The forward pass.
#![allow(unsafe_code)]

use std::ops::Range;

use super::KvCache;
use super::kernels::{Activations, LANES, Scratch, multiply};
use super::ops::{Rotation, activate, norm_row};
use super::rows::Rows;
use super::threads::{Columns, Crew, Team};
use super::weights::{LayerMatrices, Matrices, Matrix};
use crate::attention::Attention;
use crate::error::Result;
use crate::model::{Layer, Model, NormWeight};
use crate::simd;

/// Tokens that go through the layers together.
const N_BATCH: usize = 512;
/// Query rows that share a pass over the cache, when a prompt is read.
const QUERY_ROWS: usize = 16;
/// Keys, and elements of values, of one task when a single token attends.
const KEYS_PER_TASK: usize = 128;
const VALUES_PER_TASK: usize = 16;
/// Keys up to which one token's attention is not split further than by kv heads.
const SHORT: usize = 256;
/// Tasks per thread and product that are aimed at, so that nobody waits long for the last.
const TASKS_PER_THREAD: usize = 4;
/// Rows of a matrix in one task at least.
const MIN_ROWS: usize = 32;

/// Threads, packed weights and buffers for one model.
pub struct Engine {
    team: Team,
    rotation: Option<Rotation>,
    matrices: Matrices,
    buffers: Buffers,
}

/// Everything that a batch of `n` tokens needs between operations.
#[derive(Default)]
struct Buffers {
    /// The residual stream. `[n, n_embd]`
    x: Vec<f32>,
    /// A normed copy of it. `[n, n_embd]`
    normed: Rows,
    /// What a block adds to it. `[n, n_embd]`
    added: Vec<f32>,
    /// Queries `[n, n_head * key_dim]`, keys and values `[n, n_head_kv * ..]`.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Outputs of the heads. `[n, n_head * value_dim]`
    heads: Rows,
    /// Scores of a single token. `[n_head, n_keys]`
    scores: Vec<f32>,
    /// `[n, n_ff]`
    gate: Vec<f32>,
    up: Rows,
    /// Cosines and sines. `[n]`, each `[rope.dim / 2]`
    angles: Vec<Vec<[f32; 2]>>,
    /// One for each thread.
    threads: Vec<ThreadBuffers>,
}

/// What one thread needs to itself.
#[derive(Default)]
struct ThreadBuffers {
    scratch: Scratch,
    /// Of a block of query rows: queries, scores, outputs.
    q: Vec<f32>,
    scores: Vec<f32>,
    out: Vec<f32>,
}

impl Engine {
    /// Starts `n_threads` threads for `model` and packs its weights. `pin`: each thread stays on a
    /// core of its own. `exact`: activations are never rounded to 8 bits.
    pub fn new(model: &Model, n_threads: usize, pin: bool, exact: bool) -> Result<Engine> {
        let team = Team::new(n_threads, pin)?;
        let rope = model.hparams.rope.as_ref();
        let rotation = rope.map(|r| Rotation::new(r, model.rope_freqs.as_deref()));
        let matrices = Matrices::new(model, &team, exact)?;
        let mut buffers = Buffers::default();
        buffers.threads.resize_with(n_threads, ThreadBuffers::default);
        Ok(Engine { team, rotation, matrices, buffers })
    }

    /// Number of threads.
    pub fn n_threads(&self) -> usize {
        self.team.n_threads()
    }

    /// Bytes of weights that a token reads.
    pub fn weight_bytes(&self) -> usize {
        self.matrices.all().map(Matrix::n_bytes).sum()
    }

    /// Products of weights and activations that a token needs.
    pub fn n_products(&self) -> usize {
        self.matrices.all().map(|m| m.n_in * m.n_out).sum()
    }

    /// Runs `tokens` at the positions from `n_past` on, which must fit the cache, and appends to
    /// `logits` those of the tokens in `wanted` (indices into `tokens`). `[wanted, n_vocab]`
    pub fn forward(
        &mut self,
        model: &Model,
        cache: &mut KvCache,
        (tokens, n_past): (&[u32], usize),
        wanted: Range<usize>,
        logits: &mut Vec<f32>,
    ) {
        let Engine { team, rotation, matrices, buffers } = self;
        team.enter(team.n_threads(), |crew| {
            for (i, batch) in tokens.chunks(N_BATCH).enumerate() {
                let start = i * N_BATCH;
                let part = |at: usize| at.clamp(start, start + batch.len()) - start;
                let wanted = part(wanted.start)..part(wanted.end).max(part(wanted.start));
                let rotation = rotation.as_ref();
                let pass = Pass { crew, model, rotation, matrices, n_past: n_past + start };
                buffers.forward(&pass, cache, batch, wanted, logits);
            }
        });
    }
}

/// What stays the same during the pass of one batch.
struct Pass<'a> {
    crew: &'a Crew,
    model: &'a Model,
    rotation: Option<&'a Rotation>,
    matrices: &'a Matrices,
    /// Position of the batch's first token.
    n_past: usize,
}

impl Buffers {
    fn forward(
        &mut self,
        pass: &Pass,
        cache: &mut KvCache,
        tokens: &[u32],
        wanted: Range<usize>,
        logits: &mut Vec<f32>,
    ) {
        self.embed(pass, tokens);
        let last = pass.model.layers.len() - 1;
        for (i, layer) in pass.model.layers.iter().enumerate() {
            // After the last cache is filled, only tokens whose logits are asked for go on.
            let rest = if i == last { wanted.clone() } else { 0..tokens.len() };
            self.layer(pass, (i, layer), cache, rest);
        }
        if !wanted.is_empty() {
            self.logits(pass, wanted.len(), logits);
        }
    }

    fn embed(&mut self, pass: &Pass, tokens: &[u32]) {
        let hp = &pass.model.hparams;
        self.x.resize(tokens.len() * hp.n_embd, 0.0);
        self.added.resize(hp.n_embd, 0.0);
        self.angles.resize(tokens.len(), Vec::new());
        for (i, (x, token)) in self.x.chunks_exact_mut(hp.n_embd).zip(tokens).enumerate() {
            let embd = &pass.model.token_embd;
            embd.format.dequantize(embd.row(*token as usize), x);
            simd::scale(x, hp.embedding_scale);
            if let Some(embd) = &pass.model.position_embd {
                embd.format.dequantize(embd.row(pass.n_past + i), &mut self.added);
                simd::add(x, &self.added);
            }
            if let Some(rotation) = pass.rotation {
                rotation.angles(pass.n_past + i, &mut self.angles[i]);
            }
        }
    }

    /// `x += attention(norm(x)); x += ffn(norm(x))`, or both from one norm where the model says
    /// so. Keys and values are those of all tokens; only the tokens in `rest` stay in `x`.
    fn layer(
        &mut self,
        pass: &Pass,
        (i, layer): (usize, &Layer),
        cache: &mut KvCache,
        rest: Range<usize>,
    ) {
        let hp = &pass.model.hparams;
        let w = &pass.matrices.layers[i];
        let n = self.x.len() / hp.n_embd;
        self.norm(pass, &layer.attn_norm, w.attn_q.integer || w.attn_k.integer || w.attn_v.integer);
        self.project(pass, w, n);
        self.rotate(pass, (i, layer), n);
        cache.store(pass.crew, i, pass.n_past, &self.k, &self.v);
        if rest.is_empty() {
            return;
        }
        if rest.len() < n {
            let keep = |data: &mut Vec<f32>, width: usize| {
                data.copy_within(rest.start * width..rest.end * width, 0);
                data.truncate(rest.len() * width);
            };
            keep(&mut self.x, hp.n_embd);
            keep(&mut self.q, w.attn_q.n_out);
            if hp.parallel {
                keep(&mut self.normed.floats, hp.n_embd);
                self.normed.resize(rest.len(), hp.n_embd);
                self.normed.finish(pass.crew, true, |_, _| {});
            }
        }
        let attention = &pass.model.attention[i];
        self.heads.resize(rest.len(), w.attn_output.n_in);
        let position = pass.n_past + rest.start;
        match rest.len() == 1 && attention.visible(position).len() > SHORT {
            true => self.attend_one(pass, attention, i, cache, position),
            false => self.attend(pass, attention, i, cache, position),
        }
        self.heads.finish(pass.crew, w.attn_output.integer, |_, _| {});
        self.add_product(pass, &w.attn_output, Source::Heads, layer.post_attention_norm.as_ref());
        if let Some(weight) = &layer.ffn_norm {
            let integer = w.ffn_up.integer || w.ffn_gate.as_ref().is_some_and(|g| g.integer);
            self.norm(pass, weight, integer);
        }
        self.ffn(pass, w, rest.len());
        self.add_product(pass, &w.ffn_down, Source::Up, layer.post_ffw_norm.as_ref());
    }

    /// A normed copy of the residual stream.
    fn norm(&mut self, pass: &Pass, weight: &NormWeight, integer: bool) {
        let hp = &pass.model.hparams;
        let Buffers { x, normed, .. } = self;
        normed.resize(x.len() / hp.n_embd, hp.n_embd);
        normed.finish(pass.crew, integer, |t, row| {
            row.copy_from_slice(&x[t * hp.n_embd..(t + 1) * hp.n_embd]);
            norm_row(hp.norm, weight, row);
        });
    }

    /// Queries, keys and values of the batch.
    fn project(&mut self, pass: &Pass, w: &LayerMatrices, n: usize) {
        let Buffers { normed, q, k, v, threads, .. } = self;
        let mut outs = [(&w.attn_q, q), (&w.attn_k, k), (&w.attn_v, v)];
        for (w, out) in &mut outs {
            out.resize(n * w.n_out, 0.0);
        }
        let outs = outs.map(|(w, out)| (w, Columns::new(out, w.n_out)));
        products(pass.crew, &outs, &normed.view(), threads);
    }

    /// Norms and rotates queries and keys, and scales queries by what scores are scaled with.
    fn rotate(&mut self, pass: &Pass, (i, layer): (usize, &Layer), n: usize) {
        let hp = &pass.model.hparams;
        let rotation = pass.rotation.filter(|_| hp.layers[i].rotates);
        let norms = layer.qk_norm.as_ref();
        let scale = pass.model.attention[i].scale();
        let angles = &self.angles;
        let head = |t: usize, norm: Option<&NormWeight>, x: &mut [f32]| {
            if let Some(norm) = norm {
                norm_row(hp.norm, norm, x);
            }
            if let Some(rotation) = rotation {
                rotation.rotate(&angles[t], x);
            }
        };
        let width = self.q.len() / n;
        pass.crew.chunks(&mut self.q, width, |_, t, row| {
            for x in row.chunks_exact_mut(hp.key_dim) {
                head(t, norms.map(|n| &n.0), x);
            }
            simd::scale(row, scale);
        });
        if rotation.is_none() && norms.is_none() {
            return;
        }
        let width = self.k.len() / n;
        pass.crew.chunks(&mut self.k, width, |_, t, row| {
            for x in row.chunks_exact_mut(hp.key_dim) {
                head(t, norms.map(|n| &n.1), x);
            }
        });
    }

    /// Attention of one token: over tasks of keys, then of heads, then of values.
    fn attend_one(
        &mut self,
        pass: &Pass,
        attention: &Attention,
        i: usize,
        cache: &KvCache,
        position: usize,
    ) {
        let g = attention.geometry;
        let per_kv = g.n_head / g.n_head_kv;
        let visible = attention.visible(position);
        // Whole panels of keys.
        let first = visible.start / LANES * LANES;
        let n_keys = visible.end - first;
        let width = n_keys.next_multiple_of(LANES);
        let Buffers { q, heads, scores, threads, .. } = self;
        scores.resize(g.n_head * width, 0.0);

        let n_tasks = n_keys.div_ceil(KEYS_PER_TASK);
        let out = Columns::new(&mut scores[..], width);
        pass.crew.each_with(threads, g.n_head_kv * n_tasks, |own, task| {
            let (head, start) = (task / n_tasks, task % n_tasks * KEYS_PER_TASK);
            let n = KEYS_PER_TASK.min(n_keys - start);
            let queries = Activations {
                n: per_kv,
                stride: g.score_dim,
                floats: &q[head * per_kv * g.score_dim..],
                ..Activations::default()
            };
            let keys = cache.keys(i, head, first + start, n);
            // SAFETY: tasks have keys of their own.
            unsafe {
                multiply(&keys, &queries, &mut own.scratch, out.skip(head * per_kv), start);
            }
        });
        let seen = visible.start - first..n_keys;
        pass.crew.chunks(scores, width, |_, head, row| {
            attention.weigh(position, head, &mut row[seen.clone()]);
        });
        let n_tasks = g.value_dim.div_ceil(VALUES_PER_TASK);
        let out = Columns::new(&mut heads.floats[..], g.value_dim);
        pass.crew.each_with(threads, g.n_head_kv * n_tasks, |own, task| {
            let (head, start) = (task / n_tasks, task % n_tasks * VALUES_PER_TASK);
            let n = VALUES_PER_TASK.min(g.value_dim - start);
            let weights = Activations {
                n: per_kv,
                stride: width,
                floats: &scores[head * per_kv * width + seen.start..],
                ..Activations::default()
            };
            let values = cache.values(i, head, (start, n), (visible.start, seen.len()));
            // SAFETY: tasks have elements of their own.
            unsafe {
                multiply(&values, &weights, &mut own.scratch, out.skip(head * per_kv), start);
            }
        });
    }

    /// Attention of several tokens: a task is a block of them at one kv head.
    fn attend(
        &mut self,
        pass: &Pass,
        attention: &Attention,
        i: usize,
        cache: &KvCache,
        n_past: usize,
    ) {
        let g = attention.geometry;
        let per_kv = g.n_head / g.n_head_kv;
        let (q_width, out_width) = (g.n_head * g.score_dim, g.n_head * g.value_dim);
        let n = self.q.len() / q_width;
        let n_block = (QUERY_ROWS / per_kv).max(1);
        let n_blocks = n.div_ceil(n_block);
        let Buffers { q, heads, threads, .. } = self;
        let heads = Columns::new(&mut heads.floats[..], out_width);
        // The longest rows first, so that no thread ends with one.
        pass.crew.each_with(threads, g.n_head_kv * n_blocks, |own, task| {
            let (head, block) = (task % g.n_head_kv, n_blocks - 1 - task / g.n_head_kv);
            let tokens = block * n_block..n.min((block + 1) * n_block);
            let n_rows = tokens.len() * per_kv;
            own.q.clear();
            for t in tokens.clone() {
                let at = t * q_width + head * per_kv * g.score_dim;
                own.q.extend_from_slice(&q[at..at + per_kv * g.score_dim]);
            }
            let range = |t: usize| attention.visible(n_past + t);
            let first = tokens.clone().map(|t| range(t).start).min().unwrap_or(0) / LANES * LANES;
            let end = tokens.clone().map(|t| range(t).end).max().unwrap_or(0);
            let width = (end - first).next_multiple_of(LANES);
            own.scores.resize(n_rows * width, 0.0);
            own.out.resize(n_rows * g.value_dim, 0.0);
            let rows = |floats, stride| Activations {
                n: n_rows,
                stride,
                floats,
                ..Activations::default()
            };

            let keys = cache.keys(i, head, first, end - first);
            let out = Columns::new(&mut own.scores[..], width);
            // SAFETY: the output is this thread's own.
            unsafe {
                multiply(&keys, &rows(&own.q, g.score_dim), &mut own.scratch, out, 0);
            }
            for (r, row) in own.scores.chunks_exact_mut(width).enumerate() {
                let (t, h) = (tokens.start + r / per_kv, head * per_kv + r % per_kv);
                let seen = range(t);
                row[..seen.start - first].fill(0.0);
                attention.weigh(n_past + t, h, &mut row[seen.start - first..seen.end - first]);
                row[seen.end - first..].fill(0.0);
            }
            let values = cache.values(i, head, (0, g.value_dim), (first, end - first));
            let out = Columns::new(&mut own.out[..], g.value_dim);
            // SAFETY: the output is this thread's own.
            unsafe {
                multiply(&values, &rows(&own.scores, width), &mut own.scratch, out, 0);
            }
            for (i, t) in tokens.enumerate() {
                let at = head * per_kv * g.value_dim;
                let n = per_kv * g.value_dim;
                // SAFETY: tasks have heads and tokens of their own.
                unsafe { heads.part(t, at, n) }.copy_from_slice(&own.out[i * n..(i + 1) * n]);
            }
        });
    }

    /// `act(gate) * up`, or `act(up)`. A task computes the same rows of both.
    fn ffn(&mut self, pass: &Pass, w: &LayerMatrices, n: usize) {
        let Buffers { normed, gate, up, threads, .. } = self;
        let activation = pass.model.hparams.activation;
        let n_ff = w.ffn_up.n_out;
        up.resize(n, n_ff);
        gate.resize(if w.ffn_gate.is_some() { n * n_ff } else { 0 }, 0.0);
        let x = normed.view();
        let (gate, up) = (Columns::new(gate, n_ff), up.parts(w.ffn_down.integer));
        let n_rows = rows_per_task(pass.crew, n_ff).next_multiple_of(32);
        pass.crew.each_with(threads, n_ff.div_ceil(n_rows), |own, task| {
            let start = task * n_rows;
            let len = n_rows.min(n_ff - start);
            // SAFETY: tasks have rows of their own.
            unsafe {
                w.ffn_up.multiply((start, len), &x, &mut own.scratch, up.floats, start);
                if let Some(w) = &w.ffn_gate {
                    w.multiply((start, len), &x, &mut own.scratch, gate, start);
                }
                for t in 0..n {
                    let up = up.floats.part(t, start, len);
                    if w.ffn_gate.is_some() {
                        let gate = gate.part(t, start, len);
                        activate(activation, gate);
                        simd::multiply(up, gate);
                    } else {
                        activate(activation, up);
                    }
                }
                up.quantize(0..n, start, len);
            }
        });
    }

    /// Adds a product to the residual stream, normed where the model norms it.
    fn add_product(&mut self, pass: &Pass, w: &Matrix, source: Source, post: Option<&NormWeight>) {
        let hp = &pass.model.hparams;
        let n_embd = hp.n_embd;
        let Buffers { x, added, heads, up, threads, .. } = self;
        let n = x.len() / n_embd;
        added.resize(x.len(), 0.0);
        let input = match source {
            Source::Heads => heads.view(),
            Source::Up => up.view(),
        };
        let (x, added) = (Columns::new(x, n_embd), Columns::new(added, n_embd));
        let n_rows = rows_per_task(pass.crew, n_embd);
        pass.crew.each_with(threads, n_embd.div_ceil(n_rows), |own, task| {
            let start = task * n_rows;
            let len = n_rows.min(n_embd - start);
            // SAFETY: tasks have rows of their own.
            unsafe {
                w.multiply((start, len), &input, &mut own.scratch, added, start);
                for t in (0..n).filter(|_| post.is_none()) {
                    let added = added.part(t, start, len);
                    simd::add_scaled(x.part(t, start, len), hp.residual_scale, added);
                }
            }
        });
        if let Some(weight) = post {
            pass.crew.each(n, |_, t| {
                // SAFETY: tasks have tokens of their own.
                let (x, added) = unsafe { (x.part(t, 0, n_embd), added.part(t, 0, n_embd)) };
                norm_row(hp.norm, weight, added);
                simd::add_scaled(x, hp.residual_scale, added);
            });
        }
    }

    fn logits(&mut self, pass: &Pass, n: usize, logits: &mut Vec<f32>) {
        let hp = &pass.model.hparams;
        let w = &pass.matrices.output;
        self.norm(pass, &pass.model.output_norm, w.integer);
        let start = logits.len();
        logits.resize(start + n * hp.n_vocab, 0.0);
        let out = &mut logits[start..];
        products(
            pass.crew,
            &[(w, Columns::new(out, hp.n_vocab))],
            &self.normed.view(),
            &mut self.threads,
        );
        if hp.logit_scale != 1.0 || hp.final_softcap.is_some() {
            pass.crew.chunks(out, hp.n_vocab, |_, _, row| {
                simd::scale(row, hp.logit_scale);
                if let Some(cap) = hp.final_softcap {
                    simd::softcap(row, cap);
                }
            });
        }
    }
}

/// Where a product's input lies.
enum Source {
    Heads,
    Up,
}

/// Rows of a matrix, or of several with `total` rows, that make one task: whole panels.
fn rows_per_task(crew: &Crew, total: usize) -> usize {
    total.div_ceil(crew.n_threads() * TASKS_PER_THREAD).next_multiple_of(LANES).max(MIN_ROWS)
}

/// Products of one input with several matrices, as one phase.
fn products(
    crew: &Crew,
    outs: &[(&Matrix, Columns<f32>)],
    x: &Activations,
    threads: &mut [ThreadBuffers],
) {
    let total: usize = outs.iter().map(|(w, _)| w.n_out).sum();
    let n_rows = rows_per_task(crew, total);
    let n_tasks: usize = outs.iter().map(|(w, _)| w.n_out.div_ceil(n_rows)).sum();
    crew.each_with(threads, n_tasks, |own, mut task| {
        for (w, out) in outs {
            let n_here = w.n_out.div_ceil(n_rows);
            if task < n_here {
                let start = task * n_rows;
                let n = n_rows.min(w.n_out - start);
                // SAFETY: tasks have rows of their own.
                unsafe {
                    w.multiply((start, n), x, &mut own.scratch, *out, start);
                }
                return;
            }
            task -= n_here;
        }
    });
}
