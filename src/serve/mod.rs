//! Answering requests of other programs.

pub mod tools;
