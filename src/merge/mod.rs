//! Forms: how a layer's attention is factored, which decides what is multiplied and what is cached.

mod split;

use crate::arch::{Hparams, LayerHparams};
use crate::error::{Error, Result};

/// A way to factor the attention of a layer.
pub trait Form: Sync + Send {
    /// The name on the command line and in files.
    fn name(&self) -> &'static str;

    /// The shape that attention has in this form.
    fn geometry(&self, hparams: &Hparams, layer: &LayerHparams) -> Geometry;
}

/// What attention looks like in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Query heads.
    pub n_head: usize,
    /// Cached key and value heads; each serves `n_head / n_head_kv` query heads in a row.
    pub n_head_kv: usize,
    /// Width of a query and a cached key.
    pub score_dim: usize,
    /// Width of a cached value and of a head's output.
    pub value_dim: usize,
}

impl Geometry {
    /// Cached elements per token.
    pub fn cached(&self) -> usize {
        self.n_head_kv * (self.score_dim + self.value_dim)
    }
}

/// Every form.
pub static FORMS: &[&dyn Form] = &[&split::Split];

/// The form of this name.
pub fn find(name: &str) -> Result<&'static dyn Form> {
    FORMS.iter().find(|f| f.name() == name).copied().ok_or_else(|| {
        let known: Vec<_> = FORMS.iter().map(|f| f.name()).collect();
        Error::Usage(format!("form \"{name}\" is not known; known: {}", known.join(", ")))
    })
}
