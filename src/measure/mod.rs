//! Measuring what a model knows, and what a change costs.

mod base;
pub mod calibrate;
pub mod choose;
pub mod circuits;
pub mod compare;
pub mod divergence;
pub mod export;
pub mod forms;
pub mod grams;
pub mod grams_file;
pub mod heads;
pub mod importance;
mod importance_file;
pub mod latency;
pub mod quality;
pub mod record;
pub mod report;
pub mod retrieval;
pub mod search;
pub mod shape;
pub mod sweep;
pub mod timing;
pub mod yardstick;

/// Text to measure and to fit with unless there is another: pages of 16 public-domain books.
pub static SAMPLE: &str = include_str!("sample.txt");
