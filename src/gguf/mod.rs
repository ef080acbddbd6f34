//! The GGUF container: metadata and a tensor table in front of aligned tensor data.
//!
//! Written from the format's description (ggml, `docs/gguf.md`). Everything read is a view into
//! the mapped file; opening a model touches its metadata once and its weights not at all.

mod bytes;
mod read;
mod split;
mod value;

pub use bytes::Bytes;
pub use read::{Gguf, Tensor};
pub use value::{Array, Value, ValueType};

/// The first four bytes of every file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Versions that are read; the writer writes the newest.
pub const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
/// Tensor data begins at, and every tensor is padded to, a multiple of this many bytes unless
/// `general.alignment` says otherwise.
pub const DEFAULT_ALIGNMENT: u64 = 32;
