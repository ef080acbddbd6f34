//! Layers whose cache has rows that keys and values are made of: latents, inputs, or keys alone.
//!
//! Queries are multiplied with what makes keys, and what makes values with mixed rows, so that neither
//! is made: `sum_n p_n (W r_n + b) = W sum_n p_n r_n + b sum_n p_n`.

use ggml::{Shape, Tensor, Type};

use super::attend::Heads;
use super::pass::Pass;
use super::weights::{Latents, LayerWeights};
use crate::arch::Latent;
use crate::error::Result;
use crate::merge::Geometry;

impl Pass<'_> {
    /// Queries, with rotated elements first, and what keys and values are made of, with those that keys
    /// share after it.
    pub(super) fn of_latent(
        &mut self,
        (w, latents): (&LayerWeights, &Latents),
        latent: &Latent,
        normed: Tensor,
    ) -> (Tensor, Tensor) {
        let x = match &latents.q_a {
            Some((q_a, norm)) => {
                let low = self.product(q_a, normed);
                self.norm(low, Some(norm))
            }
            None => normed,
        };
        let q = self.product(&w.attn_q, x);
        let [width, n, ..] = self.graph.shape(q).dims;
        let dim = self.model.hparams.key_dim;
        let made = dim - latent.n_rotated;
        // What is rotated comes last in the file.
        let heads = self.graph.reshape(q, [dim, width / dim, n, 1]);
        let [rotated, rest] = self.split(heads, made);
        let q = self.graph.concat(rest, rotated, 0);
        let q = self.graph.reshape(q, [width, n, 1, 1]);
        let row = self.product(&latents.kv_a, normed);
        let row = self.graph.reshape(row, [latent.rank + latent.n_rotated, 1, n, 1]);
        let [low, shared] = self.split(row, latent.rank);
        let low = self.graph.cont(low);
        let low = self.norm(low, Some(&latents.kv_a_norm));
        let row = self.graph.concat(low, shared, 0);
        (q, self.graph.reshape(row, [latent.rank + latent.n_rotated, n, 1, 1]))
    }

    /// The first elements of heads, and the others.
    fn split(&mut self, x: Tensor, n: usize) -> [Tensor; 2] {
        let [dim, heads, tokens, _] = self.graph.shape(x).dims;
        let [element, head, row, all] = self.graph.strides(x);
        let mut part = |n: usize, start: usize| {
            self.graph.view(x, [n, heads, tokens, 1], [head, row, all], start * element)
        };
        [part(n, 0), part(dim - n, n)]
    }

    /// Keys and values of latents.
    pub(super) fn keys_of_latent(
        &mut self,
        (w, g): (&LayerWeights, &Geometry),
        latent: &Latent,
        row: Tensor,
    ) -> (Tensor, Tensor) {
        let [_, n, ..] = self.graph.shape(row).dims;
        let row = self.graph.reshape(row, [latent.rank + latent.n_rotated, 1, n, 1]);
        let [low, shared] = self.split(row, latent.rank);
        let low = self.graph.cont(low);
        let low = self.graph.reshape(low, [latent.rank, n, 1, 1]);
        let (heads, made) = (g.n_head_kv(), w.attn_k.n_out / g.n_head_kv());
        let k = self.product(&w.attn_k, low);
        let k = self.graph.reshape(k, [made, heads, n, 1]);
        let shared = self.graph.repeat(shared, [latent.n_rotated, heads, n, 1]);
        let k = self.graph.concat(shared, k, 0);
        let k = self.graph.reshape(k, [g.key_width(), n, 1, 1]);
        (k, self.product(&w.attn_v, low))
    }

    /// The row that is cached of each token, with its rotated elements rotated.
    pub(super) fn latent_row(
        &mut self,
        i: usize,
        row: Tensor,
        (rank, n_rotated): (usize, usize),
    ) -> Tensor {
        if n_rotated == 0 {
            return row;
        }
        let [width, n, ..] = self.graph.shape(row).dims;
        let heads = self.graph.reshape(row, [width, 1, n, 1]);
        let [low, shared] = self.split(heads, rank);
        let (w, positions) = (&self.weights.layers[i], self.inputs.positions);
        let shared = match w.groups.first() {
            Some(group) => self.turned(i, group, shared, positions),
            None => shared,
        };
        let row = self.graph.concat(low, shared, 0);
        self.graph.reshape(row, [width, n, 1, 1])
    }

    /// Attention over rows that keys and values are products of.
    pub(super) fn attend_latent(
        &mut self,
        i: usize,
        q: Tensor,
        (rank, n_rotated): (usize, usize),
        first: usize,
    ) -> Result<Tensor> {
        let (w, g) = (&self.weights.layers[i], &self.model.attention[i].geometry);
        let (n_kv, dim) = (g.n_head_kv(), g.kv[0].score_dim);
        let heads = self.heads_of(q, (dim, g.n_head), 0);
        let heads = self.graph.permute(heads, [0, 2, 1, 3]);
        let [rotated, made] = self.split(heads, n_rotated);
        let made = self.graph.cont(made);
        let mut absorbed = made;
        if let Some(turned) = w.turned_k {
            let turned = self.tensor(turned);
            absorbed = self.graph.mul_mat(turned, made);
        }
        if n_rotated > 0 {
            let rotated = self.graph.cont(rotated);
            absorbed = self.graph.concat(absorbed, rotated, 0);
        }
        let shift = match w.attn_k.bias {
            Some(bias) => {
                let bias = self.tensor(bias);
                let bias = self.graph.reshape(bias, [dim - n_rotated, 1, n_kv, 1]);
                Some(self.graph.mul_mat(bias, made))
            }
            None => None,
        };
        let keys = self.cache[i].keys;
        let k = self.cached(i, keys, (rank + n_rotated, 1), 0);
        let v = match self.graph.shape(k).ty {
            Type::F32 | Type::F16 => k,
            _ => self.graph.cast(k, Type::F32),
        };
        let v = self.split(v, rank)[0];
        let heads =
            Heads { first: 0, q: absorbed, k, v, shift, wants_mass: w.attn_v.bias.is_some() };
        let (mixed, mass) = self.attend(i, &heads, first)?;
        self.values_of(i, mixed, (rank, mass))
    }

    /// Attention over cached keys that are not rotated yet, and that values are products of.
    pub(super) fn attend_keys(&mut self, i: usize, q: Tensor, first: usize) -> Result<Tensor> {
        let (w, g) = (&self.weights.layers[i], &self.model.attention[i].geometry);
        let (n_kv, dim, n_keys) = (g.n_head_kv(), g.kv[0].score_dim, self.sizes.n_keys);
        let keys = self.cache[i].keys;
        let rows = self.cached(i, keys, (g.key_width(), 1), 0);
        let rows = match self.graph.shape(rows).ty {
            Type::F32 => rows,
            _ => self.graph.cast(rows, Type::F32),
        };
        let positions = match self.inputs.key_positions {
            Some(positions) => positions,
            None => self.graph.input(Shape { ty: Type::I32, dims: [n_keys, 1, 1, 1] }),
        };
        self.inputs.key_positions = Some(positions);
        let heads = self.heads_of(rows, (dim, n_kv), 0);
        let k = match w.groups.first() {
            Some(group) => self.turned(i, group, heads, positions),
            None => heads,
        };
        let k = self.graph.permute(k, [0, 2, 1, 3]);
        let k = self.graph.cont(k);
        let heads = self.heads_of(q, (dim, g.n_head), 0);
        let q = self.graph.permute(heads, [0, 2, 1, 3]);
        let wants_mass = w.attn_v.bias.is_some();
        let heads = Heads { first: 0, q, k, v: rows, shift: None, wants_mass };
        let (mixed, mass) = self.attend(i, &heads, first)?;
        self.values_of(i, mixed, (g.key_width(), mass))
    }

    /// Values of rows that are mixed, `[width, n_head, tokens]`, as rows.
    fn values_of(
        &mut self,
        i: usize,
        mixed: Tensor,
        (width, mass): (usize, Option<Tensor>),
    ) -> Result<Tensor> {
        let (w, g) = (&self.weights.layers[i], &self.model.attention[i].geometry);
        let (n_kv, dim) = (g.n_head_kv(), g.kv[0].value_dim);
        let mixed = self.graph.permute(mixed, [0, 2, 1, 3]);
        let mixed = self.graph.cont(mixed);
        let v = self.tensor(w.attn_v.at);
        let [_, row, ..] = self.graph.strides(v);
        let v = self.graph.view(v, [width, dim, n_kv, 1], [row, row * dim, row * dim * n_kv], 0);
        let mut out = self.graph.mul_mat(v, mixed);
        if let Some(bias) = w.attn_v.bias {
            let bias = self.tensor(bias);
            let added = match mass {
                Some(mass) => {
                    let bias = self.graph.reshape(bias, [1, dim, n_kv, 1]);
                    self.graph.mul_mat(bias, mass)
                }
                None => {
                    let [_, n, heads, _] = self.graph.shape(out).dims;
                    let bias = self.graph.reshape(bias, [dim, 1, 1, n_kv]);
                    let like = [dim, n, heads / n_kv, n_kv];
                    let bias = self.graph.repeat(bias, like);
                    self.graph.reshape(bias, [dim, n, heads, 1])
                }
            };
            out = self.graph.add(out, added);
        }
        let out = self.graph.permute(out, [0, 2, 1, 3]);
        Ok(self.flat(out))
    }
}
