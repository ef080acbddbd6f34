//! One timeline of tokens: prompt, step, sample.

pub mod sampler;
