//! Masks: which keys a query sees.

use std::ops::Range;

use crate::error::{Error, Result};

/// Which keys a query sees.
pub trait Mask: Sync + Send {
    /// The name on the command line and in files.
    fn name(&self) -> &'static str;

    /// The positions that the query at `position` sees, never empty. `window` is the number of
    /// keys that the model's layer was trained to see, itself included.
    fn visible(&self, position: usize, window: Option<usize>) -> Range<usize>;
}

/// Every mask.
pub static MASKS: &[&dyn Mask] = &[&Causal];

/// Every key up to the query itself, within the layer's trained window.
struct Causal;

impl Mask for Causal {
    fn name(&self) -> &'static str {
        "causal"
    }

    fn visible(&self, position: usize, window: Option<usize>) -> Range<usize> {
        window.map_or(0, |w| (position + 1).saturating_sub(w))..position + 1
    }
}

/// The mask of this name.
pub fn find(name: &str) -> Result<&'static dyn Mask> {
    MASKS.iter().find(|m| m.name() == name).copied().ok_or_else(|| {
        let known: Vec<_> = MASKS.iter().map(|m| m.name()).collect();
        Error::Usage(format!("mask \"{name}\" is not known; known: {}", known.join(", ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causal_sees_itself_and_before() {
        assert_eq!(Causal.visible(0, None), 0..1);
        assert_eq!(Causal.visible(7, None), 0..8);
        assert_eq!(Causal.visible(7, Some(3)), 5..8);
        assert_eq!(Causal.visible(1, Some(3)), 0..2);
    }
}
