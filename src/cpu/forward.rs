//! The forward pass.

use std::ops::Range;

use rayon::ThreadPool;
use rayon::prelude::*;

use super::KvCache;
use super::ops::{Rotation, activate, add, linear, matmul, norm, norm_row, scale, softcap};
use crate::error::{Error, Result};
use crate::model::{Layer, Model};

/// Tokens that go through the layers together.
const N_BATCH: usize = 256;

/// Threads and buffers for one model.
pub struct Engine {
    pool: ThreadPool,
    rotation: Option<Rotation>,
    buffers: Buffers,
}

/// Everything that a batch of `n` tokens needs between operations.
#[derive(Default)]
struct Buffers {
    /// The residual stream. `[n, n_embd]`
    x: Vec<f32>,
    /// A normed copy of it. `[n, n_embd]`
    normed: Vec<f32>,
    /// What a block adds to it. `[n, n_embd]`
    added: Vec<f32>,
    /// Queries `[n, n_head * key_dim]`, keys and values `[n, n_head_kv * ..]`.
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Outputs of the heads. `[n, n_head * value_dim]`
    heads: Vec<f32>,
    /// `[n, n_ff]`
    gate: Vec<f32>,
    up: Vec<f32>,
    /// `[n]`, each `[rope.dim / 2]`
    angles: Vec<Vec<[f32; 2]>>,
    scratch: Vec<f32>,
}

impl Engine {
    /// Starts `n_threads` threads for `model`.
    pub fn new(model: &Model, n_threads: usize) -> Result<Engine> {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(n_threads)
            .thread_name(|i| format!("qkov-{i}"))
            .build()
            .map_err(|e| Error::Runtime(format!("cannot start {n_threads} threads: {e}")))?;
        let rope = model.hparams.rope.as_ref();
        let rotation = rope.map(|r| Rotation::new(r, model.rope_freqs.as_deref()));
        Ok(Engine { pool, rotation, buffers: Buffers::default() })
    }

    /// Number of threads.
    pub fn n_threads(&self) -> usize {
        self.pool.current_num_threads()
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
        let Engine { pool, rotation, buffers } = self;
        pool.install(|| {
            for (batch, tokens) in tokens.chunks(N_BATCH).enumerate() {
                let start = batch * N_BATCH;
                buffers.embed(model, tokens, n_past + start);
                buffers.angles(rotation.as_ref(), tokens.len(), n_past + start);
                for (i, layer) in model.layers.iter().enumerate() {
                    buffers.layer(model, (i, layer), rotation.as_ref(), cache, n_past + start);
                }
                let wanted = wanted.start.max(start)..wanted.end.min(start + tokens.len());
                if !wanted.is_empty() {
                    buffers.logits(model, wanted.start - start..wanted.end - start, logits);
                }
            }
        });
    }
}

impl Buffers {
    fn embed(&mut self, model: &Model, tokens: &[u32], n_past: usize) {
        let n_embd = model.hparams.n_embd;
        resize(&mut self.x, tokens.len() * n_embd);
        resize(&mut self.added, n_embd);
        for (i, (x, token)) in self.x.chunks_exact_mut(n_embd).zip(tokens).enumerate() {
            let embd = &model.token_embd;
            embd.format.dequantize(embd.row(*token as usize), x);
            scale(x, model.hparams.embedding_scale);
            if let Some(embd) = &model.position_embd {
                embd.format.dequantize(embd.row(n_past + i), &mut self.added);
                add(x, &self.added);
            }
        }
    }

    fn angles(&mut self, rotation: Option<&Rotation>, n: usize, n_past: usize) {
        self.angles.resize(n, Vec::new());
        if let Some(rotation) = rotation {
            self.angles.iter_mut().enumerate().for_each(|(i, a)| rotation.angles(n_past + i, a));
        }
    }

    /// `x += attention(norm(x)); x += ffn(norm(x))`, or both from one norm where the model says so.
    fn layer(
        &mut self,
        model: &Model,
        (i, layer): (usize, &Layer),
        rotation: Option<&Rotation>,
        cache: &mut KvCache,
        n_past: usize,
    ) {
        let hp = &model.hparams;
        resize(&mut self.normed, self.x.len());
        resize(&mut self.added, self.x.len());

        norm(hp.norm, &layer.attn_norm, &self.x, &mut self.normed);
        self.project(model, (i, layer), rotation);
        self.attend(model, i, cache, n_past);
        linear(&layer.attn_output, &self.heads, &mut self.added, &mut self.scratch);
        self.residual(model, layer.post_attention_norm.as_ref());

        if let Some(weight) = &layer.ffn_norm {
            norm(hp.norm, weight, &self.x, &mut self.normed);
        }
        self.ffn(model, layer);
        self.residual(model, layer.post_ffw_norm.as_ref());
    }

    /// Queries, keys and values of the batch, normed and rotated.
    fn project(&mut self, model: &Model, (i, layer): (usize, &Layer), rotation: Option<&Rotation>) {
        let hp = &model.hparams;
        let n = self.x.len() / hp.n_embd;
        let Buffers { normed, q, k, v, scratch, .. } = self;
        for (w, out) in [(&layer.attn_q, &mut *q), (&layer.attn_k, k), (&layer.attn_v, v)] {
            resize(out, n * w.weight.n_out);
            linear(w, normed, out, scratch);
        }
        if let Some((q_norm, k_norm)) = &layer.qk_norm {
            self.q.chunks_exact_mut(hp.key_dim).for_each(|q| norm_row(hp.norm, q_norm, q));
            self.k.chunks_exact_mut(hp.key_dim).for_each(|k| norm_row(hp.norm, k_norm, k));
        }
        let Some(rotation) = rotation.filter(|_| hp.layers[i].rotates) else { return };
        for heads in [&mut self.q, &mut self.k] {
            let width = heads.len() / n;
            for (row, angles) in heads.chunks_exact_mut(width).zip(&self.angles) {
                row.chunks_exact_mut(hp.key_dim).for_each(|head| rotation.rotate(angles, head));
            }
        }
    }

    /// Stores the batch's keys and values, then attends, one task per token and head.
    fn attend(&mut self, model: &Model, i: usize, cache: &mut KvCache, n_past: usize) {
        let attention = &model.attention[i];
        let g = attention.geometry;
        let n = self.x.len() / model.hparams.n_embd;
        let keys = self.k.chunks_exact(g.n_head_kv * g.score_dim);
        let values = self.v.chunks_exact(g.n_head_kv * g.value_dim);
        for (t, (keys, values)) in keys.zip(values).enumerate() {
            cache.store(i, n_past + t, keys, values);
        }
        resize(&mut self.heads, n * g.n_head * g.value_dim);
        let (cache, q) = (&*cache, &self.q);
        let tasks = self.heads.par_chunks_exact_mut(g.value_dim).enumerate();
        tasks.for_each_init(Vec::new, |scores, (task, out)| {
            let (t, head) = (task / g.n_head, task % g.n_head);
            let rows = cache.rows(i, head * g.n_head_kv / g.n_head);
            let q = &q[task * g.score_dim..(task + 1) * g.score_dim];
            attention.head((n_past + t, head), q, rows, scores, out);
        });
    }

    fn ffn(&mut self, model: &Model, layer: &Layer) {
        let n = self.x.len() / model.hparams.n_embd;
        let n_ff = layer.ffn_up.weight.n_out;
        resize(&mut self.up, n * n_ff);
        linear(&layer.ffn_up, &self.normed, &mut self.up, &mut self.scratch);
        if let Some(gate) = &layer.ffn_gate {
            resize(&mut self.gate, n * n_ff);
            linear(gate, &self.normed, &mut self.gate, &mut self.scratch);
            activate(model.hparams.activation, &mut self.gate);
            self.up.iter_mut().zip(&self.gate).for_each(|(up, gate)| *up *= gate);
        } else {
            activate(model.hparams.activation, &mut self.up);
        }
        linear(&layer.ffn_down, &self.up, &mut self.added, &mut self.scratch);
    }

    fn residual(&mut self, model: &Model, post: Option<&crate::model::NormWeight>) {
        let hp = &model.hparams;
        if let Some(weight) = post {
            self.added.chunks_exact_mut(hp.n_embd).for_each(|r| norm_row(hp.norm, weight, r));
        }
        scale(&mut self.added, hp.residual_scale);
        add(&mut self.x, &self.added);
    }

    fn logits(&mut self, model: &Model, wanted: Range<usize>, logits: &mut Vec<f32>) {
        let hp = &model.hparams;
        let x = &self.x[wanted.start * hp.n_embd..wanted.end * hp.n_embd];
        resize(&mut self.normed, x.len());
        norm(hp.norm, &model.output_norm, x, &mut self.normed);
        let start = logits.len();
        logits.resize(start + wanted.len() * hp.n_vocab, 0.0);
        let out = &mut logits[start..];
        matmul(&model.output, &self.normed, out, &mut self.scratch);
        scale(out, hp.logit_scale);
        if let Some(cap) = hp.final_softcap {
            softcap(out, cap);
        }
    }
}

fn resize(buffer: &mut Vec<f32>, n: usize) {
    buffer.resize(n, 0.0);
}
