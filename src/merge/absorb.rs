//! Absorb: of a token only the layer's normed input is cached, one row for all heads, and keys and
//! values are never made of it while tokens are written one by one.
//!
//! `q . (W_K x + b_K) = (W_K^T q) . x + q . b_K`, and `sum_n p_n (W_V x_n + b_V) = W_V (sum_n p_n x_n) +
//! b_V sum_n p_n`, so queries are multiplied once and outputs once, with the matrices that the file has.
//! The cache is smaller where kv heads are wider than half the model together: half as large without
//! grouping. Each cached element takes part in a product with every query head, twice.

use super::{Choice, Form, Geometry, Kept, Site, Verdict, only_products};
use crate::arch::{Hparams, LayerHparams};

pub(super) struct Absorb;

impl Form for Absorb {
    fn name(&self) -> &'static str {
        "absorb"
    }

    fn what(&self) -> &'static str {
        "the normed input is cached instead of keys and values, as n_embd elements: fewer where \
         n_embd < n_head_kv * (key_dim + value_dim), else more; without rotation only"
    }

    fn paper(&self) -> &'static str {
        "after the absorbed products of DeepSeek-AI 2024, arXiv 2405.04434, section 2.1.2"
    }

    fn applies(&self, _: &Choice, site: &Site) -> Verdict {
        only_products(site)?;
        if site.rotates() {
            return Err(
                "queries and keys are rotated, so an absorbed query would be another one for \
                        every cached token; without rotation only"
                    .into(),
            );
        }
        not_between(site)
    }

    fn exact(&self, _: &Choice, _: &Site) -> Verdict {
        Ok(())
    }

    fn geometry(&self, hparams: &Hparams, layer: &LayerHparams) -> Geometry {
        let kept = Kept::Latent { rank: hparams.n_embd, n_rotated: 0 };
        Geometry { kept, ..Geometry::new(layer.n_head, hparams.kv_heads(layer)) }
    }
}

/// Refuses layers where more than a product and a rotation makes keys and values.
pub(super) fn not_between(site: &Site) -> Verdict {
    if site.hparams.qk_norm.is_some() {
        return Err("keys are normed after they are made, which cached rows are not".into());
    }
    if site.at().rewritten.is_some() {
        return Err("its heads have been rewritten; only those of a trained layer".into());
    }
    Ok(())
}
