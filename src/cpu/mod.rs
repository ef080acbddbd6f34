//! The CPU engine: one forward pass for every architecture, on packed weights.
//!
//! A result has the same bits with any number of threads and however tokens are fed: together or
//! one by one; but where rows are cached that keys and values are made of, one by one is another
//! order of sums. It differs in the last bits between instruction sets ([`crate::simd::Level`]).

mod attend;
mod cache;
mod experts;
mod ffn;
mod finite;
mod forward;
mod held;
pub mod kernels;
mod latent;
mod limits;
mod lora;
mod needs;
mod observe;
mod ops;
mod products;
mod rows;
mod runs;
mod spans;
pub mod threads;
mod tiles;
mod two_steps;
mod weights;

pub use cache::KvCache;
pub use finite::{Fault, Place, check_finite};
pub use forward::Engine;
pub use limits::Limits;
pub use needs::Needs;
pub use observe::{Input, Observer, Seen, SeenHead, SeenInput, SeenRows};
pub use spans::Span;
