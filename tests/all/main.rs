//! All integration tests, one binary.

// clippy.toml allows these in functions marked as tests; here every function is for tests.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

mod allocations;
mod bad_files;
mod bad_models;
mod bf16;
mod cache;
mod calibrate;
mod center;
mod choose;
mod circuits;
mod cli;
mod compare;
mod devices;
mod doctor;
mod embed;
#[cfg(feature = "ggml")]
mod engines;
mod export;
mod families;
mod family;
mod faults;
mod finite;
mod forms;
mod golden;
mod grammar;
mod imatrix;
mod layers;
mod lora;
mod lowrank;
mod masks;
mod mutations;
mod nmse;
mod normalizers;
mod observe;
#[cfg(feature = "ggml")]
mod oracle;
mod plans;
mod pool;
mod quality;
mod quant;
#[cfg(feature = "ggml")]
mod quantize;
mod sampler;
mod scheduler;
mod serve;
mod sessions;
mod shells;
mod ships;
mod stores;
mod template;
mod tiny;
mod token;
mod tools;
mod writer;

use std::path::PathBuf;

/// The folder of larger yardsticks beside a checkout; a clone has none, and its tests say so.
fn shared() -> Option<PathBuf> {
    let path = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared"));
    if path.is_dir() {
        return Some(path);
    }
    eprintln!("skipped: the yardsticks in {} are not here", path.display());
    None
}
