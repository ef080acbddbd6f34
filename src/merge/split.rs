//! Split: queries, keys and values are projected apart and keys and values are cached, as trained
//! (arXiv 1706.03762; grouped queries: arXiv 2305.13245). Exact for every model.

use super::{Form, Geometry, KvHead, Site};
use crate::arch::{Hparams, LayerHparams};

pub(super) struct Split;

impl Form for Split {
    fn name(&self) -> &'static str {
        "split"
    }

    fn what(&self) -> &'static str {
        "queries, keys and values apart, as trained"
    }

    fn paper(&self) -> &'static str {
        "Vaswani et al. 2017, arXiv 1706.03762; grouped queries: Ainslie et al. 2023, arXiv 2305.13245"
    }

    fn applies(&self, _: &Site) -> Result<(), String> {
        Ok(())
    }

    fn exact(&self, _: &Site) -> Result<(), String> {
        Ok(())
    }

    fn geometry(&self, hparams: &Hparams, layer: &LayerHparams) -> Geometry {
        let head =
            KvHead { score_dim: hparams.key_dim, value_dim: hparams.value_dim, planes: None };
        Geometry::uniform(layer.n_head, layer.n_head_kv, head)
    }
}
