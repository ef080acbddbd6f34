//! Measuring what a model knows, and what a change costs.

pub mod latency;
pub mod quality;
pub mod shape;
