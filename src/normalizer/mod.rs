//! Normalizers: what turns one row of attention scores into weights.

mod softmax;

use crate::error::{Error, Result};

/// Turns scores into weights, one row at a time.
pub trait Normalizer: Sync + Send {
    /// The name on the command line and in files.
    fn name(&self) -> &'static str;

    /// Replaces the scores of the visible keys by their weights. A row is never empty, and holds
    /// no masked keys: the mask has removed them. NaN in gives NaN out.
    fn row(&self, scores: &mut [f32], at: Row);
}

/// Where a row of scores belongs. The number of visible keys is the row's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row {
    /// Position of the query in the sequence, from 0.
    pub position: usize,
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
}

/// Every normalizer.
pub static NORMALIZERS: &[&dyn Normalizer] = &[&softmax::Softmax];

/// The normalizer of this name.
pub fn find(name: &str) -> Result<&'static dyn Normalizer> {
    NORMALIZERS.iter().find(|n| n.name() == name).copied().ok_or_else(|| {
        let known: Vec<_> = NORMALIZERS.iter().map(|n| n.name()).collect();
        Error::Usage(format!("normalizer \"{name}\" is not known; known: {}", known.join(", ")))
    })
}
