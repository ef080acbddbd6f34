//! The second engine: the same model as a graph of ggml, on any of its devices; and what rounds
//! matrices.

mod attend;
mod compose;
pub mod devices;
mod engine;
mod experts;
mod latent;
mod pass;
pub mod quantize;
mod weigh;
mod weights;
#[cfg(feature = "rpc")]
pub mod worker;

pub use engine::{Engine, Setup};

use crate::error::Error;

/// What a device could not do, as an error of this program.
fn fault(e: ggml::Error) -> Error {
    Error::Runtime(format!("ggml: {e}"))
}
