//! Measuring what a model knows, and what a change costs.

pub mod quality;
