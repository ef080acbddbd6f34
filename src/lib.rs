//! qkov: attention is `output(mix(normalize(mask(scores(x)))))`, and every part can be exchanged
//! in an already trained, quantized model while it is loaded.

pub mod error;
pub mod gguf;
pub mod quant;
pub mod session;
pub mod token;
