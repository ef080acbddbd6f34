//! Measuring what a model knows, and what a change costs.

pub mod heads;
pub mod latency;
pub mod quality;
pub mod record;
pub mod shape;
