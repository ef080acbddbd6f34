//! The plan: which form, mask and normalizer every layer and head uses.

use crate::arch::Hparams;
use crate::error::Result;
use crate::mask::{self, Mask};
use crate::merge::{self, Form};
use crate::normalizer::{self, Normalizer};

/// One choice per layer.
pub struct Plan {
    /// Indexed by layer.
    pub layers: Vec<LayerPlan>,
}

/// The choices of one layer.
#[derive(Clone)]
pub struct LayerPlan {
    /// How attention is factored.
    pub form: &'static dyn Form,
    /// Which keys are seen.
    pub mask: &'static dyn Mask,
    /// Indexed by query head.
    pub normalizers: Vec<&'static dyn Normalizer>,
}

impl Plan {
    /// The model as trained: `split`, `causal`, `softmax`.
    pub fn trained(hparams: &Hparams) -> Result<Plan> {
        let (form, mask) = (merge::find("split")?, mask::find("causal")?);
        let softmax = normalizer::find("softmax")?;
        let layer = |n_head| LayerPlan { form, mask, normalizers: vec![softmax; n_head] };
        Ok(Plan { layers: hparams.layers.iter().map(|l| layer(l.n_head)).collect() })
    }

    /// Names in use, each once, as reports carry them: normalizers, forms, masks.
    pub fn names(&self) -> [String; 3] {
        let once = |names: Vec<&'static str>| {
            let mut seen: Vec<&str> = Vec::new();
            names.into_iter().for_each(|n| {
                if !seen.contains(&n) {
                    seen.push(n)
                }
            });
            seen.join("+")
        };
        let layers = &self.layers;
        [
            once(layers.iter().flat_map(|l| l.normalizers.iter().map(|n| n.name())).collect()),
            once(layers.iter().map(|l| l.form.name()).collect()),
            once(layers.iter().map(|l| l.mask.name()).collect()),
        ]
    }
}
