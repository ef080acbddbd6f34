//! Latent attention as it was meant: the latent that keys and values are made of is cached, with the
//! rotated elements that all keys share, and keys and values are never made of it while tokens are
//! written one by one. Prompts make them once, which costs less than products with the latent there.

use super::{Choice, Form, Geometry, Kept, Site, Verdict};
use crate::arch::{Hparams, LayerHparams};

pub(super) struct Mla;

impl Form for Mla {
    fn name(&self) -> &'static str {
        "mla"
    }

    fn what(&self) -> &'static str {
        "of models whose keys and values are made of a latent, that is cached, once for all heads"
    }

    fn paper(&self) -> &'static str {
        "DeepSeek-AI 2024, arXiv 2405.04434, section 2.1"
    }

    fn applies(&self, _: &Choice, site: &Site) -> Verdict {
        match site.hparams.latent {
            Some(_) => Ok(()),
            None => Err("keys and values are not made of a latent".into()),
        }
    }

    fn exact(&self, _: &Choice, _: &Site) -> Verdict {
        Ok(())
    }

    fn geometry(&self, hparams: &Hparams, layer: &LayerHparams) -> Geometry {
        let geometry = Geometry::new(layer.n_head, hparams.kv_heads(layer));
        match hparams.latent {
            Some(latent) => {
                let kept = Kept::Latent { rank: latent.rank, n_rotated: latent.n_rotated };
                Geometry { kept, ..geometry }
            }
            None => geometry,
        }
    }
}
