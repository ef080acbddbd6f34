//! The second engine: the same model as a graph of ggml, on any of its devices.

mod attend;
mod compose;
mod engine;
mod experts;
mod latent;
mod pass;
mod weigh;
mod weights;

pub use engine::{Engine, Setup};

use crate::error::Error;

/// What a device could not do, as an error of this program.
fn fault(e: ggml::Error) -> Error {
    Error::Runtime(format!("ggml: {e}"))
}
