//! What a text must follow.

use crate::error::Result;

/// A grammar at a place in a text.
pub enum Grammar {}

impl Grammar {
    /// Bans what cannot follow.
    pub fn restrict(&mut self, _: &mut [f32]) -> Result<()> {
        match *self {}
    }

    /// Takes the token that was chosen.
    pub fn accept(&mut self, _: u32) -> Result<()> {
        match *self {}
    }

    /// Whether nothing can follow.
    pub fn is_over(&self) -> bool {
        match *self {}
    }
}
