//! The CPU engine: one forward pass for every architecture, in plain `f32`.
//!
//! Sums have one definite order, whatever the machine and the number of threads, and functions
//! such as `exp` come from `libm` in Rust: the same file and tokens give the same bits everywhere.

mod cache;
mod forward;
mod ops;

pub use cache::{CacheType, KvCache};
pub use forward::Engine;
