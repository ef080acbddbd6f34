//! Attention: queries, keys and values of a batch, the cache, and what heads give.

use std::ops::Range;

use ggml::{Rope, Shape, Tensor, Type};

use super::pass::{MaskKind, Pass};
use super::weigh::Softmax;
use super::weights::{Group, Place};
use crate::arch::{Pairing, QkNorm};
use crate::error::Result;
use crate::merge::Kept;

/// What attention is computed with, for heads that are alike. `k`: kv heads, `h`: their query heads.
pub(super) struct Heads {
    /// The first query head.
    pub(super) first: usize,
    /// `[score_dim, tokens, h]`
    pub(super) q: Tensor,
    /// `[score_dim, keys, k]`
    pub(super) k: Tensor,
    /// `[value_dim, keys, k]`, or for all heads `[value_dim, keys, 1]`.
    pub(super) v: Tensor,
    /// Added to products of queries and keys. `[1, tokens, h]`
    pub(super) shift: Option<Tensor>,
    /// Whether the sums of weights are needed.
    pub(super) wants_mass: bool,
}

impl Pass<'_> {
    /// Outputs of the heads for the tokens in `rest`; none of no tokens. What is cached is written.
    pub(super) fn attention(
        &mut self,
        i: usize,
        normed: Tensor,
        rest: Range<usize>,
    ) -> Result<Option<Tensor>> {
        let (hp, w) = (&self.model.hparams, &self.weights.layers[i]);
        let g = &self.model.attention[i].geometry;
        let (q, made) = match (&w.latent, &hp.latent) {
            (Some(latents), Some(latent)) => self.of_latent((w, latents), latent, normed),
            _ => (self.product(&w.attn_q, normed), normed),
        };
        let q = self.limited(q);
        let norms = w.qk_norm;
        let q = self.with_planes(i, q, (g.per_kv(), norms.map(|n| n.0)));
        let q = self.rotated(i, q, g.per_kv());
        match g.kept {
            Kept::KeysAndValues => {
                let (k, v) = match (&w.latent, &hp.latent) {
                    (Some(_), Some(latent)) => self.keys_of_latent((w, g), latent, made),
                    _ => {
                        let k = self.product(&w.attn_k, normed);
                        let v = self.product(&w.attn_v, normed);
                        let k = self.limited(k);
                        (self.with_planes(i, k, (1, norms.map(|n| n.1))), self.limited(v))
                    }
                };
                let k = self.rotated(i, k, 1);
                self.store(i, k, Some(v));
            }
            Kept::Keys { .. } => {
                let k = self.product(&w.attn_k, normed);
                let k = self.limited(k);
                let k = self.with_planes(i, k, (1, norms.map(|n| n.1)));
                self.store(i, k, None);
            }
            Kept::Latent { rank, n_rotated } => {
                let row = self.latent_row(i, made, (rank, n_rotated));
                self.store(i, row, None);
            }
        }
        if rest.is_empty() {
            return Ok(None);
        }
        let q = self.rows_of(q, &rest);
        let out = match g.kept {
            Kept::KeysAndValues => {
                let mut out: Option<Tensor> = None;
                for group in &w.groups {
                    let heads = self.cached_heads(i, group, q);
                    let (made, _) = self.attend(i, &heads, rest.start)?;
                    let made = self.flat(made);
                    out = Some(match out {
                        Some(before) => self.graph.concat(before, made, 0),
                        None => made,
                    });
                }
                out
            }
            Kept::Keys { .. } => Some(self.attend_keys(i, q, rest.start)?),
            Kept::Latent { rank, n_rotated } => {
                Some(self.attend_latent(i, q, (rank, n_rotated), rest.start)?)
            }
        };
        Ok(out.map(|out| self.finished(i, out)))
    }

    /// Queries, keys or values kept within the model's bounds.
    fn limited(&mut self, x: Tensor) -> Tensor {
        match self.model.hparams.qkv_limit {
            Some(limit) => self.graph.clamp(x, -limit, limit),
            None => x,
        }
    }

    /// Heads of queries or keys normed where the model norms them, and without elements that the layer
    /// has no planes for. `n`: heads for each kv head.
    fn with_planes(&mut self, i: usize, x: Tensor, (n, norm): (usize, Option<Place>)) -> Tensor {
        let (hp, w) = (&self.model.hparams, &self.weights.layers[i]);
        let Some(norm) = norm else { return x };
        let weight = self.tensor(norm);
        let [width, n_tokens, ..] = self.graph.shape(x).dims;
        let n_head = width / hp.key_dim;
        let rows = match hp.qk_norm {
            Some(QkNorm::Row) => x,
            _ => self.graph.reshape(x, [hp.key_dim, n_head, n_tokens, 1]),
        };
        let rows = self.normed(rows);
        let weight = match hp.qk_norm {
            Some(QkNorm::Row) => weight,
            _ => self.graph.reshape(weight, [hp.key_dim, n_head, 1, 1]),
        };
        let rows = self.graph.mul(rows, weight);
        let x = self.graph.reshape(rows, [width, n_tokens, 1, 1]);
        if w.groups.iter().all(|group| group.picked.is_none()) {
            return x;
        }
        let mut out: Option<Tensor> = None;
        for group in &w.groups {
            let heads = n * group.n;
            let part = self.heads_of(x, (hp.key_dim, heads), n * group.first * hp.key_dim);
            let part = match group.picked {
                Some(picked) => {
                    let picked = self.tensor(picked);
                    self.graph.mul_mat(picked, part)
                }
                None => self.graph.cont(part),
            };
            let part = self.graph.reshape(part, [group.head.score_dim * heads, n_tokens, 1, 1]);
            out = Some(match out {
                Some(before) => self.graph.concat(before, part, 0),
                None => part,
            });
        }
        out.unwrap_or(x)
    }

    /// Heads of rows `[width, tokens]`, from an element on: `[dim, heads, tokens]`.
    pub(super) fn heads_of(
        &mut self,
        x: Tensor,
        (dim, heads): (usize, usize),
        start: usize,
    ) -> Tensor {
        let [_, n, ..] = self.graph.shape(x).dims;
        let [element, row, ..] = self.graph.strides(x);
        self.graph.view(x, [dim, heads, n, 1], [dim * element, row, row * n], start * element)
    }

    /// Rotates heads of queries or keys. `n`: heads for each kv head.
    fn rotated(&mut self, i: usize, x: Tensor, n: usize) -> Tensor {
        let w = &self.weights.layers[i];
        if w.groups.iter().all(|group| group.divisors.is_none()) {
            return x;
        }
        let [width, n_tokens, ..] = self.graph.shape(x).dims;
        let positions = self.inputs.positions;
        let (mut out, mut start): (Option<Tensor>, usize) = (None, 0);
        for group in &w.groups {
            let (dim, heads) = (group.head.score_dim, n * group.n);
            let part = match w.groups.len() {
                1 => self.graph.reshape(x, [dim, heads, n_tokens, 1]),
                _ => self.heads_of(x, (dim, heads), start),
            };
            start += dim * heads;
            let part = self.turned(i, group, part, positions);
            let part = self.graph.reshape(part, [dim * heads, n_tokens, 1, 1]);
            out = Some(match out {
                Some(before) => self.graph.concat(before, part, 0),
                None => part,
            });
        }
        let out = out.unwrap_or(x);
        self.graph.reshape(out, [width, n_tokens, 1, 1])
    }

    /// Rotates `[dim, heads, rows]` by the positions of rows; contiguous.
    pub(super) fn turned(
        &mut self,
        i: usize,
        group: &Group,
        x: Tensor,
        positions: Tensor,
    ) -> Tensor {
        let rope = self.model.hparams.rope(i);
        let Some(((divisors, n_planes), rope)) = group.divisors.zip(rope) else {
            return self.graph.cont(x);
        };
        let divisors = self.tensor(divisors);
        let rope = Rope {
            dim: 2 * n_planes,
            halves: rope.pairing == Pairing::Half,
            scale: rope.frequencies(None).1,
        };
        self.graph.rope(x, positions, divisors, rope)
    }

    /// Writes rows to the cache.
    fn store(&mut self, i: usize, keys: Tensor, values: Option<Tensor>) {
        let cache = &self.cache[i];
        let rows = self.inputs.rows;
        let at = self.graph.stored(&cache.store, cache.keys);
        let written = self.graph.set_rows(at, keys, rows);
        self.graph.compute(written);
        if let (Some(at), Some(values)) = (cache.values, values) {
            let at = self.graph.stored(&cache.store, at);
            let written = self.graph.set_rows(at, values, rows);
            self.graph.compute(written);
        }
    }

    /// Cached rows of heads: `[dim, keys, heads]`, from an element of a row on.
    pub(super) fn cached(
        &mut self,
        i: usize,
        tensor: usize,
        (dim, heads): (usize, usize),
        start: usize,
    ) -> Tensor {
        let at = self.graph.stored(&self.cache[i].store, tensor);
        let [_, row, all, _] = self.graph.strides(at);
        let bytes = |n: usize| -> usize { self.graph.shape(at).ty.row_bytes(n) };
        let (head, start) = (bytes(dim), bytes(start));
        self.graph.view(at, [dim, self.sizes.n_keys, heads, 1], [row, head, all], start)
    }

    /// Heads of a group with cached keys and values.
    fn cached_heads(&mut self, i: usize, group: &Group, q: Tensor) -> Heads {
        let g = &self.model.attention[i].geometry;
        let (score_dim, value_dim) = (group.head.score_dim, group.head.value_dim);
        let cache = &self.cache[i];
        let (keys, values) = (cache.keys, cache.values.unwrap_or(cache.keys));
        let (n, first) = (group.n, group.first * g.per_kv());
        let q = self.heads_of(q, (score_dim, n * g.per_kv()), g.queries(first).start);
        let q = self.graph.permute(q, [0, 2, 1, 3]);
        let k = self.cached(i, keys, (score_dim, n), g.keys(group.first).start);
        let v = self.cached(i, values, (value_dim, n), g.values(group.first).start);
        Heads { first, q, k, v, shift: None, wants_mass: false }
    }

    /// What heads give, `[value_dim, h, tokens]`, and sums of weights, `[1, tokens, h]`, if they are
    /// wanted and not 1. `first`: the first of the tokens in the batch.
    pub(super) fn attend(
        &mut self,
        i: usize,
        heads: &Heads,
        first: usize,
    ) -> Result<(Tensor, Option<Tensor>)> {
        let model = self.model;
        let (hp, attention) = (&model.hparams, &model.attention[i]);
        let mut q = heads.q;
        let mut scale = attention.scale(0);
        if hp.temperature.is_some() {
            let factors = self.scales(first, self.graph.shape(q).dims[1]);
            q = self.graph.mul(q, factors);
            scale = 1.0;
        }
        let softmax = Softmax::of(attention);
        // A constant added to all scores of a row changes nothing, unless something else is not changed.
        let goes = |s: &Softmax| match heads.shift {
            Some(_) => s.sums_to_one() && s.softcap.is_none(),
            None => s.sums_to_one() || !heads.wants_mass,
        };
        let is_paired = self.graph.shape(heads.k).dims[2] == self.graph.shape(heads.v).dims[2];
        if let Some(softmax) = softmax.filter(|s| is_paired && goes(s)) {
            let max_bias = hp.max_alibi_bias.unwrap_or(0.0);
            let mask = self.mask(i, MaskKind::Added);
            let mask = self.rows_of(mask, &(first..first + self.graph.shape(q).dims[1]));
            let parts = [q, heads.k, heads.v, mask];
            let softcap = softmax.softcap.unwrap_or(0.0);
            let factor = softmax.factor * scale;
            let is_whole = self.graph.shape(q).dims[2] == attention.geometry.n_head;
            // Slopes are those of all heads in a row.
            if is_whole || max_bias == 0.0 {
                let out = self.graph.flash_attention(parts, factor, max_bias, softcap);
                if let Some(sinks) = softmax.sinks {
                    let n = self.graph.shape(q).dims[2];
                    let own = sinks[heads.first..heads.first + n].to_vec();
                    let sinks = self.constant(own, [n, 1, 1, 1]);
                    self.graph.add_sinks(out, sinks);
                }
                if self.graph.runs_on(out, self.devices[i]) {
                    return Ok((out, None));
                }
            }
        }
        let q = self.graph.cont(q);
        let mut scores = self.graph.mul_mat(heads.k, q);
        if let Some(shift) = heads.shift {
            scores = self.graph.add(scores, shift);
        }
        if scale != 1.0 {
            scores = self.graph.scale(scores, scale, 0.0);
        }
        let weights = match self.composed(i, first, scores) {
            Some(weights) => weights,
            None => self.weighed_by_rows(i, (heads.first, first), scores),
        };
        let mass = heads.wants_mass.then(|| self.graph.sum_rows(weights));
        let v = match self.graph.shape(heads.v).ty {
            Type::F32 | Type::F16 => heads.v,
            _ => self.graph.cast(heads.v, Type::F32),
        };
        let v = self.graph.transpose(v);
        let v = self.graph.cont(v);
        let out = self.graph.mul_mat(v, weights);
        Ok((self.graph.permute(out, [0, 2, 1, 3]), mass))
    }

    /// Factors on scores of tokens. `[1, tokens, 1]`
    fn scales(&mut self, first: usize, n: usize) -> Tensor {
        let n_all = self.sizes.n;
        let shape = Shape { ty: Type::F32, dims: [1, n_all, 1, 1] };
        let all = match self.inputs.scales {
            Some(scales) => scales,
            None => self.graph.input(shape),
        };
        self.inputs.scales = Some(all);
        self.rows_of(all, &(first..first + n))
    }

    /// `[dim, heads, tokens]` as rows.
    pub(super) fn flat(&mut self, x: Tensor) -> Tensor {
        let [dim, heads, n, _] = self.graph.shape(x).dims;
        let x = match self.graph.strides(x) {
            [4, row, all, _] if row == 4 * dim && all == row * heads => x,
            _ => self.graph.cont(x),
        };
        self.graph.reshape(x, [dim * heads, n, 1, 1])
    }

    /// Outputs of heads with their means, as long as the output matrix's rows.
    fn finished(&mut self, i: usize, mut x: Tensor) -> Tensor {
        let attention = &self.model.attention[i];
        let g = &attention.geometry;
        if (0..g.n_head).any(|head| attention.mean(head).is_some()) {
            let mut means = vec![0.0; g.output_width()];
            for head in 0..g.n_head {
                if let Some(mean) = attention.mean(head) {
                    means[g.outputs(head)].copy_from_slice(mean);
                }
            }
            let means = self.constant(means, [g.output_width(), 1, 1, 1]);
            x = self.graph.add(x, means);
        }
        match self.weights.layers[i].attn_output.n_in - g.output_width() {
            0 => x,
            n => self.graph.pad(x, n),
        }
    }
}
