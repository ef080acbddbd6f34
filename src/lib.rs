//! qkov: attention is `output(mix(normalize(mask(scores(x)))))`, and every part can be exchanged
//! in an already trained, quantized model while it is loaded.
//!
//! A model is opened with [`model::Model::open`], read with a [`session::Session`], talked to with
//! [`session::chat::Chat`], and measured with [`measure::quality::evaluate`].

pub mod arch;
pub mod attention;
pub mod cli;
pub mod cpu;
pub mod engine;
pub mod error;
#[cfg(feature = "ggml")]
pub mod ggml;
pub mod gguf;
pub mod mask;
pub mod measure;
pub mod merge;
pub mod model;
pub mod normalizer;
pub mod param;
pub mod plan;
pub mod quant;
pub mod serve;
pub mod session;
pub mod simd;
pub mod token;
