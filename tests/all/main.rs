//! All integration tests, one binary.

mod bad_files;
mod golden;
mod quant;
mod sampler;
mod template;
mod token;
