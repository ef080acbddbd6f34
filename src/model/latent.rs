//! Matrices of attention whose keys and values are made of a latent.

use super::{Binder, LatentLayer, Linear, Lora, Weight};
use crate::arch::{Bias, Hparams, Latent, LayerHparams};
use crate::error::{Error, Result};
use crate::gguf::Bytes;
use crate::quant;

impl Binder<'_> {
    /// Queries, keys without their rotated elements, and values; and what makes their latents.
    pub(super) fn of_latents(
        &mut self,
        blk: &str,
        (layer, latent): (&LayerHparams, &Latent),
        hp: &Hparams,
    ) -> Result<([Linear; 3], LatentLayer)> {
        let at = |name: &str| format!("{blk}.{name}");
        let (d, n) = (hp.n_embd, layer.n_head);
        let mut linear = |name: &str, n_in, n_out| self.linear(&at(name), n_in, n_out, Bias::Never);
        let (q, q_a) = match latent.query_rank {
            Some(rank) => {
                (linear("attn_q_b", rank, n * hp.key_dim)?, Some(linear("attn_q_a", d, rank)?))
            }
            None => (linear("attn_q", d, n * hp.key_dim)?, None),
        };
        let kv_a = linear("attn_kv_a_mqa", d, latent.rank + latent.n_rotated)?;
        let q_a = match (q_a, latent.query_rank) {
            (Some(q_a), Some(rank)) => Some((q_a, self.norm(&at("attn_q_a_norm"), rank, hp)?)),
            _ => None,
        };
        let kv_a_norm = self.norm(&at("attn_kv_a_norm"), latent.rank, hp)?;
        let (made, value_dim) = (hp.key_dim - latent.n_rotated, hp.value_dim);
        let is_apart =
            ["attn_k_b.weight", "attn_v_b.weight"].iter().any(|name| self.has(&at(name)));
        let [k, v] = match is_apart {
            false => {
                let both =
                    self.matrix(&at("attn_kv_b.weight"), latent.rank, n * (made + value_dim))?;
                let rows = |start: usize, n_rows: usize| {
                    let head = move |h: usize| {
                        (0..n_rows).map(move |i| h * (made + value_dim) + start + i)
                    };
                    both.picked((0..n).flat_map(head))
                };
                [rows(0, made), rows(made, value_dim)]
            }
            true => {
                let k = self.shaped(&at("attn_k_b.weight"), &[made, latent.rank, n])?;
                let v = self.shaped(&at("attn_v_b.weight"), &[latent.rank, value_dim, n])?;
                // Of many matrices side by side only floats can have their adapters added to them.
                let v = if v.loras.is_empty() { v } else { v.turned(n)?.turned(n)? };
                [k.turned(n)?, v]
            }
        };
        let [k, v] = [k, v].map(|weight| Linear { weight, bias: None });
        Ok(([q, k, v], LatentLayer { q_a, kv_a, kv_a_norm }))
    }
}

impl Weight {
    /// Some of its rows, copied.
    fn picked(&self, rows: impl Iterator<Item = usize> + Clone) -> Weight {
        let lora = |lora: &Lora| Lora { up: lora.up.picked(rows.clone()), ..lora.clone() };
        let loras = self.loras.iter().map(lora).collect();
        let (mut bytes, mut n_out) = (Vec::new(), 0);
        for i in rows.clone() {
            bytes.extend_from_slice(self.row(i));
            n_out += 1;
        }
        Weight { n_out, bytes: Bytes::from(bytes), loras, ..self.clone() }
    }

    /// The transposes of `n` matrices that lie one after the other, as floats, in which nothing is
    /// rounded, with what is added to them.
    pub(crate) fn turned(&self, n: usize) -> Result<Weight> {
        let Some(format) = quant::format_named("F32") else {
            return Err(Error::Runtime("no format of floats".into()));
        };
        let (n_in, n_out) = (self.n_in, self.n_out / n);
        let mut bytes = vec![0; 4 * self.n_in * self.n_out];
        let mut row = vec![0.0; n_in];
        for r in 0..self.n_out {
            self.dequantize_row(r, &mut row);
            let (matrix, column) = (r / n_out, r % n_out);
            for (i, x) in row.iter().enumerate() {
                let at = 4 * ((matrix * n_in + i) * n_out + column);
                bytes[at..at + 4].copy_from_slice(&x.to_le_bytes());
            }
        }
        Ok(Weight::new(format, [n_out, n * n_in], Bytes::from(bytes)))
    }
}
