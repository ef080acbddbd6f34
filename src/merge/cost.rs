//! What the attention of a layer costs, in numbers that no machine changes.

use super::{Geometry, Kept};
use crate::arch::Hparams;

/// Elements and products of the attention of one layer, or of several together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// Elements of the matrices, which a token alone reads.
    pub weights: usize,
    /// Products with them for each token.
    pub products: usize,
    /// Products of a token alone for each token that it sees.
    pub attended: usize,
    /// The same of tokens that are read together, which see keys and values in any form.
    pub attended_together: usize,
}

impl Geometry {
    /// What attention of this shape costs in such a model.
    pub fn cost(&self, hparams: &Hparams) -> Cost {
        let d = hparams.n_embd;
        let (q, k, v) = (self.query_width(), self.key_width(), self.value_width());
        let o = self.output_width();
        // Elements that queries, keys and values are made of, those of keys that are made at all, and what
        // makes the latents.
        let (q_in, kv_in, made, latents) = match hparams.latent {
            None => (d, d, k, 0),
            Some(l) => {
                let of_queries = l.query_rank.map_or(0, |rank| rank * d);
                let made = k - l.n_rotated * self.n_head_kv();
                let latents = of_queries + d * (l.rank + l.n_rotated);
                (l.query_rank.unwrap_or(d), l.rank, made, latents)
            }
        };
        let v_in = if let Kept::Keys { .. } = self.kept { k } else { kv_in };
        let weights = latents + q_in * q + kv_in * made + v_in * v + d * o;
        let (products, attended) = match self.kept {
            Kept::KeysAndValues => (weights, q + o),
            // Keys are mixed with the weights of every query head, and the mix is made an output.
            Kept::Keys { .. } => (d * (q + k + o) + k * o, q + self.n_head * k),
            // Queries are multiplied with what makes keys, instead of latents, and mixes of latents with
            // what makes values.
            Kept::Latent { rank, n_rotated } => {
                let absorbed = rank * (q - n_rotated * self.n_head + o);
                (latents + q_in * q + absorbed + d * o, self.n_head * (2 * rank + n_rotated))
            }
        };
        Cost { weights, products, attended, attended_together: q + o }
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(costs: I) -> Cost {
        costs.fold(Cost::default(), |a, b| Cost {
            weights: a.weights + b.weights,
            products: a.products + b.products,
            attended: a.attended + b.attended,
            attended_together: a.attended_together + b.attended_together,
        })
    }
}
