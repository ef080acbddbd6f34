//! Split: queries, keys and values are projected apart and keys and values are cached, as trained
//! (arXiv 1706.03762; grouped queries: arXiv 2305.13245). Exact for every model.

use super::{Form, Geometry};
use crate::arch::{Hparams, LayerHparams};

pub(super) struct Split;

impl Form for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn geometry(&self, hparams: &Hparams, layer: &LayerHparams) -> Geometry {
        Geometry {
            n_head: layer.n_head,
            n_head_kv: layer.n_head_kv,
            score_dim: hparams.key_dim,
            value_dim: hparams.value_dim,
        }
    }
}
