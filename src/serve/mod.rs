//! The server: one thread that runs the model for many requests at once, and what speaks HTTP with
//! those who ask.

pub mod api;
pub mod job;
mod scheduler;
mod slot;
mod task;
pub mod tools;

pub use scheduler::{Counters, Handle, Refused, SlotStatus, Status, start};
