//! The forward pass.
#![allow(unsafe_code)]

use std::ops::Range;
use std::sync::Arc;

use super::attend::MixBuffers;
use super::experts::ExpertBuffers;
use super::finite::Place;
use super::kernels::{Copies, Scratch};
use super::latent::{LatentBuffers, Tiles};
use super::lora::{give_back, lower};
use super::observe::{Input, Observer};
use super::ops::{Rotation, Rotations, norm_row, norm_with};
use super::products::{products, rows_per_task};
use super::rows::Rows;
use super::spans::{Part, Span, narrow, next_batch};
use super::threads::{Columns, Crew, Team};
use super::weights::{LayerMatrices, Matrices, Matrix};
use crate::arch::{PostNorm, QkNorm};
use crate::attention::Attention;
use crate::engine::{Asked, Threads};
use crate::error::Result;
use crate::merge::{Geometry, Kept};
use crate::model::{Layer, Model, NormWeight};
use crate::simd;

/// Tokens that go through the layers together, unless they must see later ones.
const N_BATCH: usize = 512;

/// Threads, packed weights and buffers for one model.
pub struct Engine {
    team: Arc<Team>,
    n_threads: Threads,
    exact: bool,
    rotations: Rotations,
    matrices: Matrices,
    buffers: Buffers,
}

/// Everything that a batch of `n` tokens needs between operations.
#[derive(Default)]
pub(super) struct Buffers {
    /// The residual stream. `[n, n_embd]`
    pub(super) x: Vec<f32>,
    /// A normed copy of it. `[n, n_embd]`
    pub(super) normed: Rows,
    /// What a block adds to it. `[n, n_embd]`
    added: Vec<f32>,
    /// The tokens, and where they are. `[n]`
    tokens: Vec<u32>,
    positions: Vec<usize>,
    /// Rows that go on at the end.
    kept: Vec<Range<usize>>,
    /// Where the tasks of each part end.
    pub(super) ends: Vec<usize>,
    /// Queries `[n, n_head * key_dim]`, keys and values `[n, n_head_kv * ..]`.
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) v: Vec<f32>,
    /// Outputs of the heads. `[n, n_head * value_dim]`
    pub(super) heads: Rows,
    /// Scores of a single token. `[n_head, n_keys]`
    pub(super) scores: Vec<f32>,
    /// `[n, n_ff]`
    pub(super) gate: Vec<f32>,
    pub(super) up: Rows,
    /// How much each token takes of an FFN. `[n]`
    pub(super) shares: Vec<f32>,
    /// Cosines and sines, for each of the model's rotations. `[n]`, each `[rope.dim / 2]`
    angles: Vec<Vec<Vec<[f32; 2]>>>,
    /// Where tokens go through experts.
    pub(super) experts: ExpertBuffers,
    /// Where rows are cached that keys and values are made of.
    pub(super) latent: LatentBuffers,
    /// One for each thread.
    pub(super) threads: Vec<ThreadBuffers>,
}

/// What one thread needs to itself.
#[derive(Default)]
pub(super) struct ThreadBuffers {
    pub(super) scratch: Scratch,
    /// Of a block of query rows: queries, scores, what mixing needs, outputs.
    pub(super) q: Rows,
    pub(super) scores: Vec<f32>,
    pub(super) mix: MixBuffers,
    pub(super) out: Vec<f32>,
    pub(super) tiles: Tiles,
    /// Of the first thread: what first halves of adapters make of an input.
    pub(super) low: Vec<f32>,
}

impl Engine {
    /// Starts threads for `model` and packs its weights. `pin`: each thread stays on a core of its
    /// own. `exact`: activations are never rounded to be multiplied with weights.
    pub fn new(model: &Model, n_threads: Threads, pin: bool, exact: bool) -> Result<Engine> {
        let team = Arc::new(Team::new(n_threads.most(), pin)?);
        Engine::of(model, &model.attention, (team, n_threads), exact)
    }

    /// Another one for the model, which attends so, with the same threads.
    pub fn again(&self, model: &Model, attention: &[Attention]) -> Result<Engine> {
        Engine::of(model, attention, (self.team.clone(), self.n_threads), self.exact)
    }

    fn of(
        model: &Model,
        attention: &[Attention],
        (team, n_threads): (Arc<Team>, Threads),
        exact: bool,
    ) -> Result<Engine> {
        let rotations = Rotations::new(model);
        let matrices = Matrices::new(model, attention, &team, exact)?;
        let mut buffers = Buffers::default();
        buffers.threads.resize_with(team.n_threads(), ThreadBuffers::default);
        Ok(Engine { team, n_threads, exact, rotations, matrices, buffers })
    }

    /// Calls `f` for every number below `n`, on all threads.
    pub fn each(&self, n: usize, f: impl Fn(usize) + Sync) {
        self.team.enter(self.n_threads.batch, |crew| crew.each(n, |_, i| f(i)));
    }

    /// Numbers of threads.
    pub fn n_threads(&self) -> Threads {
        self.n_threads
    }

    /// Uses other numbers of threads, at most as many as were started.
    pub fn set_threads(&mut self, n_threads: Threads) {
        self.n_threads = n_threads;
    }

    /// Bytes of weights that a token reads.
    pub fn weight_bytes(&self) -> usize {
        self.matrices.all().map(Matrix::n_bytes).sum()
    }

    /// Products of weights and activations that a token needs.
    pub fn n_products(&self) -> usize {
        self.matrices.all().map(Matrix::n_products).sum()
    }

    /// Takes the tokens out of spans of different sequences through the layers, and appends to `out` what is asked of
    /// their wanted tokens, those of the first span first: `[wanted, n_vocab]` or `[wanted, n_embd]`; no
    /// logits of a model that has none. What comes of a span does not depend on the others.
    /// Tokens that see later ones go through the layers together, however many they are, and buffers
    /// grow with them: about `14 n_embd + 10 n_head * head_dim + 10 n_ff` bytes for each.
    pub fn forward(
        &mut self,
        model: &Model,
        spans: &mut [Span],
        observer: Option<&dyn Observer>,
        (asked, out): (Asked, &mut Vec<f32>),
    ) {
        let Some(first) = spans.first() else { return };
        let (n_ctx, attention) = (first.cache.n_ctx(), first.attention);
        let Engine { team, n_threads, rotations, matrices, buffers, .. } = self;
        let rotations = rotations.within(n_ctx);
        let n_tokens: usize = spans.iter().map(|span| span.tokens.len()).sum();
        let n = if n_tokens == 1 { n_threads.one } else { n_threads.batch };
        team.enter(n, |crew| {
            let pass = Pass { crew, model, attention, rotations, matrices, observer };
            let mut tokens = std::mem::take(&mut buffers.tokens);
            while spans.iter().any(|span| !span.tokens.is_empty()) {
                let mut parts = next_batch(spans, &mut tokens, N_BATCH);
                buffers.forward(&pass, &tokens, &mut parts, (asked, &mut *out));
            }
            buffers.tokens = tokens;
        });
    }

    /// Enters the team for work on a batch in a context of `n_ctx` tokens.
    pub(super) fn in_pass(
        &mut self,
        model: &Model,
        n_ctx: usize,
        observer: Option<&dyn Observer>,
        work: impl FnOnce(&Pass, &mut Buffers) + Send,
    ) {
        let Engine { team, n_threads, rotations, matrices, buffers, .. } = self;
        let rotations = rotations.within(n_ctx);
        team.enter(n_threads.batch, |crew| {
            let attention = &model.attention;
            work(&Pass { crew, model, attention, rotations, matrices, observer }, buffers);
        });
    }
}

/// What stays the same during the pass of one batch.
pub(super) struct Pass<'a> {
    pub(super) crew: &'a Crew,
    pub(super) model: &'a Model,
    /// In the forms of all that goes through together.
    attention: &'a [Attention],
    rotations: &'a [Rotation],
    pub(super) matrices: &'a Matrices,
    pub(super) observer: Option<&'a dyn Observer>,
}

impl Pass<'_> {
    /// The shape of a layer's attention.
    pub(super) fn geometry(&self, layer: usize) -> &Geometry {
        &self.attention[layer].geometry
    }

    /// The rotation of a layer.
    pub(super) fn rotation(&self, layer: usize) -> Option<&Rotation> {
        self.rotations.get(self.model.hparams.layers[layer].rope?)
    }
}

impl Buffers {
    fn forward(
        &mut self,
        pass: &Pass,
        tokens: &[u32],
        parts: &mut [Part],
        (asked, out): (Asked, &mut Vec<f32>),
    ) {
        self.embed(pass, tokens, parts);
        self.check_finite(pass, Place::Embedding, parts);
        let last = pass.model.layers.len() - 1;
        // After the last cache is filled, only tokens of which something is asked go on.
        let looks = |o: &dyn Observer| o.wants(last) || o.wants_heads(last) || o.wants_inputs();
        let early = !pass.observer.is_some_and(looks);
        for i in 0..=last {
            self.layer(pass, i, parts, i == last && early);
            self.check_finite(pass, Place::Layer(i), parts);
        }
        if pass.shows_inputs() {
            self.norm(pass, pass.model.output_norm.as_ref(), Copies::default());
            pass.show(0, Input::Output, self.normed.seen());
        }
        if !early {
            narrow(parts, &mut self.kept);
            keep(&mut self.x, pass.model.hparams.n_embd, &self.kept);
        }
        match asked {
            _ if self.x.is_empty() => {}
            Asked::States => self.states(pass, out),
            Asked::Logits => self.logits(pass, out),
        }
    }

    pub(super) fn embed(&mut self, pass: &Pass, tokens: &[u32], parts: &[Part]) {
        self.place(pass, parts);
        let hp = &pass.model.hparams;
        self.x.resize(tokens.len() * hp.n_embd, 0.0);
        let rows = self.x.chunks_exact_mut(hp.n_embd);
        for ((x, token), position) in rows.zip(tokens).zip(&self.positions) {
            pass.model.embed(*token, *position, x);
            if let Some(norm) = &pass.model.embedding_norm {
                norm_row(hp.norm, norm, x);
            }
        }
    }

    /// Takes the positions of a batch.
    pub(super) fn place(&mut self, pass: &Pass, parts: &[Part]) {
        self.positions.clear();
        for part in parts {
            self.positions.extend(part.position..part.position + part.rows.len());
        }
        self.angles.resize(pass.rotations.len(), Vec::new());
        for (rotation, angles) in pass.rotations.iter().zip(&mut self.angles) {
            angles.resize(self.positions.len(), Vec::new());
            for (position, angles) in self.positions.iter().zip(angles) {
                rotation.angles(*position, angles);
            }
        }
    }

    /// `x += attention(norm(x)); x += ffn(norm(x))`, or both from one `x` where the model says so.
    /// Keys and values are those of all tokens; if it `ends` the pass, only wanted tokens stay in `x`.
    pub(super) fn layer(&mut self, pass: &Pass, i: usize, parts: &mut [Part], ends: bool) {
        self.attention(pass, i, parts, ends);
        if self.x.is_empty() {
            return;
        }
        let n = self.x.len() / pass.model.hparams.n_embd;
        let layer = &pass.model.layers[i];
        let w = &pass.matrices.layers[i];
        // In a parallel layer before `x` changes, unless the FFN reads what attention has read.
        let norm = layer.ffn_norm.as_ref();
        let is_parallel = pass.model.hparams.parallel;
        if is_parallel && norm.is_some() {
            self.norm(pass, norm, w.ffn_copies());
        }
        pass.show(i, Input::Heads, self.heads.seen());
        self.add_product(pass, &w.attn_output, Source::Heads, layer.post_attention_norm.as_ref());
        if !is_parallel {
            self.norm(pass, norm, w.ffn_copies());
        }
        pass.show(i, Input::Ffn, self.normed.seen());
        if let Some(w) = &w.ffn {
            self.ffn(pass, w, n);
            self.show_hidden(pass, i);
            self.add_product(pass, &w.down, Source::Up, layer.post_ffw_norm.as_ref());
        }
        if let Some((w, layer)) = w.experts.as_ref().zip(layer.experts.as_ref()) {
            self.experts(pass, i, (w, layer), n);
        }
    }

    /// Outputs of the heads; if the layer `ends` the pass, for wanted tokens, which alone stay in `x`.
    pub(super) fn attention(&mut self, pass: &Pass, i: usize, parts: &mut [Part], ends: bool) {
        let hp = &pass.model.hparams;
        let layer = &pass.model.layers[i];
        let w = &pass.matrices.layers[i];
        let n = self.x.len() / hp.n_embd;
        let is_shared = hp.parallel && layer.ffn_norm.is_none();
        let others = if is_shared { w.ffn_copies() } else { Copies::default() };
        self.norm(pass, layer.attn_norm.as_ref(), w.qkv_copies() | others);
        pass.show(i, Input::Attention, self.normed.seen());
        let looks = pass.observer.filter(|o| o.wants_heads(i));
        let kept = match looks {
            Some(_) => Kept::KeysAndValues,
            None => pass.geometry(i).kept,
        };
        match layer.latent.as_ref().zip(hp.latent.as_ref()) {
            Some(latent) => self.project_latent(pass, (i, kept), latent, n),
            None => self.project(pass, w, (i, kept), n),
        }
        if let Some(limit) = hp.qkv_limit {
            for x in [&mut self.q, &mut self.k, &mut self.v] {
                pass.crew.chunks(x, hp.n_embd, |_, _, x| {
                    x.iter_mut().for_each(|x| *x = x.clamp(-limit, limit));
                });
            }
        }
        self.norm_heads(pass, (i, layer));
        let before = looks.map(|_| (self.q.clone(), self.k.clone()));
        self.rotate(pass, i, n);
        self.store(pass, i, parts);
        let g = pass.geometry(i);
        if ends {
            narrow(parts, &mut self.kept);
            keep(&mut self.x, hp.n_embd, &self.kept);
            keep(&mut self.q, g.query_width(), &self.kept);
            if is_shared {
                keep(&mut self.normed.floats, hp.n_embd, &self.kept);
                self.normed.resize(self.x.len() / hp.n_embd, hp.n_embd);
                self.normed.finish(pass.crew, w.ffn_copies(), |_, _| {});
            }
        }
        if self.x.is_empty() {
            return;
        }
        self.heads.resize(self.x.len() / hp.n_embd, w.attn_output.n_in);
        self.attend(pass, i, parts);
        let parts = &*parts;
        self.heads.finish(pass.crew, w.attn_output.copies, |t, row| {
            let part = parts.partition_point(|part| part.rows.end <= t);
            for head in 0..g.n_head {
                if let Some(mean) = parts[part].attention[i].mean(head) {
                    simd::add(&mut row[g.outputs(head)], mean);
                }
            }
            row[g.output_width()..].fill(0.0);
        });
        if let (Some(observer), Some((q, k))) = (looks, before) {
            self.show_heads(pass, i, (&q, &k), observer);
        }
    }

    /// A copy of the residual stream, normed if there is a norm.
    fn norm(&mut self, pass: &Pass, weight: Option<&NormWeight>, copies: Copies) {
        let hp = &pass.model.hparams;
        let Buffers { x, normed, .. } = self;
        normed.resize(x.len() / hp.n_embd, hp.n_embd);
        normed.finish(pass.crew, copies, |t, row| {
            row.copy_from_slice(&x[t * hp.n_embd..(t + 1) * hp.n_embd]);
            if let Some(weight) = weight {
                norm_row(hp.norm, weight, row);
            }
        });
    }

    /// Queries, keys and values of the batch, or those of them that are needed for what is `kept`.
    fn project(&mut self, pass: &Pass, w: &LayerMatrices, (i, kept): (usize, Kept), n: usize) {
        let Buffers { normed, q, k, v, threads, .. } = self;
        let mut outs = [(&w.attn_q, q), (&w.attn_k, k), (&w.attn_v, v)];
        for (w, out) in &mut outs {
            out.resize(n * w.n_out, 0.0);
        }
        let outs = outs.map(|(w, out)| (w, Columns::new(out, w.n_out)));
        let of_keys = matches!(pass.geometry(i).kept, Kept::Keys { .. });
        let n_outs = match kept {
            Kept::Latent { .. } => 1,
            _ if of_keys => 2,
            _ => 3,
        };
        products(pass.crew, &outs[..n_outs], &normed.view(), threads);
        if of_keys && kept == Kept::KeysAndValues {
            let mut keys = Rows::default();
            keys.fill(n, w.attn_v.n_in, w.attn_v.copies, |floats| floats.copy_from_slice(&self.k));
            let outs = [(&w.attn_v, Columns::new(&mut self.v, w.attn_v.n_out))];
            products(pass.crew, &outs, &keys.view(), &mut self.threads);
        }
    }

    /// Stores what the caches keep of the batch.
    fn store(&mut self, pass: &Pass, i: usize, parts: &mut [Part]) {
        let g = pass.geometry(i);
        let rope = pass.model.hparams.layers[i].rope;
        let of = |part: &mut Part, crew: Option<&Crew>| {
            let (at, position) = ((i, part.position), part.position);
            let keys = |width: usize| part.of(&self.k, width);
            match g.kept {
                Kept::KeysAndValues => {
                    let values = part.of(&self.v, g.value_width());
                    let keys = keys(g.key_width());
                    part.cache.store(crew, at, keys, values);
                }
                Kept::Keys { n_planes } => {
                    let keys = keys(g.key_width());
                    if let Some(rope) = rope.filter(|_| n_planes > 0) {
                        part.cache.turn(position, &self.angles[rope][part.rows.clone()]);
                    }
                    part.cache.store(crew, at, keys, &[]);
                }
                Kept::Latent { rank, n_rotated } => {
                    let all = match n_rotated {
                        0 => &self.normed.floats,
                        _ => &self.latent.made,
                    };
                    let rows = part.of(all, rank + n_rotated);
                    part.cache.store(crew, at, rows, &[]);
                }
            }
        };
        match parts {
            [part] => of(part, Some(pass.crew)),
            _ => pass.crew.chunks(parts, 1, |_, _, parts| of(&mut parts[0], None)),
        }
    }

    /// Norms queries and keys, and drops what the layer has no planes for.
    fn norm_heads(&mut self, pass: &Pass, (i, layer): (usize, &Layer)) {
        let Some((q_norm, k_norm)) = &layer.qk_norm else { return };
        let hp = &pass.model.hparams;
        let g = pass.geometry(i);
        for (x, NormWeight { weight, .. }) in [(&mut self.q, q_norm), (&mut self.k, k_norm)] {
            let width = match hp.qk_norm {
                Some(QkNorm::Row) => weight.len(),
                _ => hp.key_dim,
            };
            pass.crew.chunks(x, width, |_, at, x| {
                norm_with(hp.norm, &weight[at * width % weight.len()..][..width], x);
            });
        }
        let Some(rotation) = pass.rotation(i).filter(|_| hp.layers[i].rewritten.is_some()) else {
            return;
        };
        for (x, per_kv) in [(&mut self.q, g.per_kv()), (&mut self.k, 1)] {
            let heads = g.kv.iter().flat_map(|kv| std::iter::repeat_n(kv, per_kv));
            let mut end = 0;
            for (at, kv) in (0..x.len()).step_by(hp.key_dim).zip(heads.cycle()) {
                // What is kept never comes before where it goes.
                let head = x[at..at + hp.key_dim].to_vec();
                rotation.keep(kv.planes.as_deref(), &head, &mut x[end..end + kv.score_dim]);
                end += kv.score_dim;
            }
            x.truncate(end);
        }
    }

    /// Rotates queries and those keys that are cached so, and scales queries by what scores are scaled
    /// with.
    fn rotate(&mut self, pass: &Pass, i: usize, n: usize) {
        let rotation = pass.rotation(i).zip(pass.model.hparams.layers[i].rope);
        let g = pass.geometry(i);
        let of_kv = |t: usize, kv: usize, x: &mut [f32]| {
            let Some((rotation, rope)) = rotation else { return };
            let angles = &self.angles[rope];
            rotation.rotate(&angles[t], g.kv[kv].planes.as_deref(), x);
        };
        let width = self.q.len() / n;
        pass.crew.chunks(&mut self.q, width, |_, t, row| {
            let mut rest = &mut row[..];
            for head in 0..g.n_head {
                let kv = head / g.per_kv();
                let (x, next) = rest.split_at_mut(g.kv[kv].score_dim);
                of_kv(t, kv, x);
                rest = next;
            }
            simd::scale(row, pass.attention[i].scale(self.positions[t]));
        });
        if rotation.is_none() {
            return;
        }
        if let Kept::Latent { rank, n_rotated: n @ 1.. } = g.kept {
            let of_key = |t, row: &mut [f32]| of_kv(t, 0, &mut row[rank..]);
            pass.crew.chunks(&mut self.latent.made, rank + n, |_, t, row| of_key(t, row));
        }
        if g.kept != Kept::KeysAndValues {
            return;
        }
        let width = self.k.len() / n;
        pass.crew.chunks(&mut self.k, width, |_, t, row| {
            let mut rest = &mut row[..];
            for (kv, at) in g.kv.iter().enumerate() {
                let (x, next) = rest.split_at_mut(at.score_dim);
                of_kv(t, kv, x);
                rest = next;
            }
        });
    }

    /// Adds a product to the residual stream; either is normed where the model norms it.
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
        let low = lower(pass.crew, [(w, input)].into_iter(), threads);
        let input = w.lowered(&input, &mut &low[..]);
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
        give_back(threads, low);
        if let Some(weight) = post {
            pass.crew.each(n, |_, t| {
                // SAFETY: tasks have tokens of their own.
                let (x, added) = unsafe { (x.part(t, 0, n_embd), added.part(t, 0, n_embd)) };
                if hp.post_norm == PostNorm::Outputs {
                    norm_row(hp.norm, weight, added);
                }
                simd::add_scaled(x, hp.residual_scale, added);
                if hp.post_norm == PostNorm::Sums {
                    norm_row(hp.norm, weight, x);
                }
            });
        }
    }

    /// Normed states of the tokens in `x`.
    fn states(&mut self, pass: &Pass, out: &mut Vec<f32>) {
        self.norm(pass, pass.model.output_norm.as_ref(), Copies::default());
        out.extend_from_slice(&self.normed.floats);
    }

    fn logits(&mut self, pass: &Pass, logits: &mut Vec<f32>) {
        let hp = &pass.model.hparams;
        let n = self.x.len() / hp.n_embd;
        let Some(w) = &pass.matrices.output else { return };
        self.norm(pass, pass.model.output_norm.as_ref(), w.copies);
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

/// Drops all rows but some.
fn keep(data: &mut Vec<f32>, width: usize, rows: &[Range<usize>]) {
    let mut end = 0;
    for rows in rows {
        data.copy_within(rows.start * width..rows.end * width, end);
        end += rows.len() * width;
    }
    data.truncate(end);
}

/// Where a product's input lies.
enum Source {
    Heads,
    Up,
}
