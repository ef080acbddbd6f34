//! The second engine: ggml.

pub mod devices;
#[cfg(feature = "rpc")]
pub mod worker;
