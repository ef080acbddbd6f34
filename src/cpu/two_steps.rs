//! Queries, keys and values of layers where keys and values are made of a latent, which is made of the
//! layer's input.
#![allow(unsafe_code)]

use super::forward::{Buffers, Pass};
use super::observe::{Input, SeenRows};
use super::ops::norm_row;
use super::products::products;
use super::threads::Columns;
use super::weights::LayerMatrices;
use crate::arch::Latent;
use crate::merge::{Geometry, Kept};
use crate::model::LatentLayer;

impl Buffers {
    /// Queries and latents of the batch, and keys and values if they are `kept`.
    pub(super) fn project_latent(
        &mut self,
        pass: &Pass,
        (i, kept): (usize, Kept),
        (layer, latent): (&LatentLayer, &Latent),
        n: usize,
    ) {
        let w = &pass.matrices.layers[i];
        let Some(down) = &w.latent else { return };
        let g = pass.geometry(i);
        let kind = pass.model.hparams.norm;
        self.q.resize(n * w.attn_q.n_out, 0.0);
        let q = Columns::new(&mut self.q, w.attn_q.n_out);
        match down.q_a.as_ref().zip(layer.q_a.as_ref()) {
            None => products(pass.crew, &[(&w.attn_q, q)], &self.normed.view(), &mut self.threads),
            Some((down, (_, norm))) => {
                let rows = &mut self.latent.rows;
                rows.resize(n, down.n_out);
                let out = Columns::new(&mut rows.floats, down.n_out);
                products(pass.crew, &[(down, out)], &self.normed.view(), &mut self.threads);
                rows.finish(pass.crew, w.attn_q.copies, |_, row| norm_row(kind, norm, row));
                pass.show(i, Input::Queries, rows.seen());
                products(pass.crew, &[(&w.attn_q, q)], &rows.view(), &mut self.threads);
            }
        }
        // What is rotated comes last in the file, and first here.
        let key_dim = self.q.len() / n / g.n_head;
        pass.crew.chunks(&mut self.q, key_dim, |_, _, head| head.rotate_right(latent.n_rotated));
        let made = &mut self.latent.made;
        made.resize(n * down.kv_a.n_out, 0.0);
        let out = Columns::new(made, down.kv_a.n_out);
        products(pass.crew, &[(&down.kv_a, out)], &self.normed.view(), &mut self.threads);
        pass.crew.chunks(made, down.kv_a.n_out, |_, _, row| {
            norm_row(kind, &layer.kv_a_norm, &mut row[..latent.rank]);
        });
        let latents = SeenRows::new(made, down.kv_a.n_out, 0..latent.rank);
        pass.show(i, Input::Latent, latents);
        if kept == Kept::KeysAndValues {
            let made = std::mem::take(&mut self.latent.made);
            let (mut k, mut v) = (std::mem::take(&mut self.k), std::mem::take(&mut self.v));
            let rows = |t: usize| &made[t * down.kv_a.n_out..][..down.kv_a.n_out];
            self.keys_and_values(pass, (w, g, latent.rank), n, rows, (&mut k, &mut v));
            (self.k, self.v, self.latent.made) = (k, v, made);
        }
    }

    /// Keys and values of `n` latents, each with the rotated elements after it that begin every key.
    pub(super) fn keys_and_values<'a>(
        &mut self,
        pass: &Pass,
        (w, g, rank): (&LayerMatrices, &Geometry, usize),
        n: usize,
        latents: impl Fn(usize) -> &'a [f32] + Sync,
        (keys, values): (&mut Vec<f32>, &mut Vec<f32>),
    ) {
        let mut rows = std::mem::take(&mut self.latent.latents);
        let mut made = std::mem::take(&mut self.latent.parts);
        rows.resize(n, rank);
        let copies = w.attn_k.copies | w.attn_v.copies;
        rows.finish(pass.crew, copies, |t, row| row.copy_from_slice(&latents(t)[..rank]));
        made.resize(n * w.attn_k.n_out, 0.0);
        keys.resize(n * g.key_width(), 0.0);
        values.resize(n * g.value_width(), 0.0);
        let outs = [
            (&w.attn_k, Columns::new(&mut made, w.attn_k.n_out)),
            (&w.attn_v, Columns::new(values, w.attn_v.n_out)),
        ];
        products(pass.crew, &outs, &rows.view(), &mut self.threads);
        let n_made = w.attn_k.n_out / g.n_head_kv();
        pass.crew.chunks(keys, g.key_width(), |_, t, row| {
            let shared = &latents(t)[rank..];
            let made = made[t * w.attn_k.n_out..].chunks_exact(n_made);
            for (key, made) in row.chunks_exact_mut(shared.len() + n_made).zip(made) {
                let (rotated, rest) = key.split_at_mut(shared.len());
                rotated.copy_from_slice(shared);
                rest.copy_from_slice(made);
            }
        });
        (self.latent.latents, self.latent.parts) = (rows, made);
    }
}
