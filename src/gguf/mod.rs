//! The GGUF container: metadata and a tensor table in front of aligned tensor data.
//!
//! Written from the format's description (ggml, `docs/gguf.md`). Everything read is a view into
//! the mapped file; opening a model touches its metadata once and its weights not at all.

mod bytes;
mod cursor;
mod mapped;
mod read;
mod replace;
mod split;
mod value;
mod write;

pub use bytes::{Bytes, evict};
pub use mapped::{Fate, mapped_at};
pub use read::{Gguf, HALVES, Tensor};
pub use replace::{Lock, abandon_files, replace_file};
pub use value::{Array, Value, ValueType};
pub use write::{Data, Sink, Source, Writer};

use crate::quant::Type;

/// The first four bytes of every file.
pub const MAGIC: [u8; 4] = *b"GGUF";
/// Versions that are read; the writer writes the newest.
pub const VERSIONS: std::ops::RangeInclusive<u32> = 2..=3;
/// Tensor data begins at, and every tensor is padded to, a multiple of this many bytes unless
/// `general.alignment` says otherwise.
pub const DEFAULT_ALIGNMENT: u64 = 32;
/// Largest `general.alignment` that is accepted, in bytes.
const MAX_ALIGNMENT: u64 = 65_536;
/// Most dimensions of a tensor.
const MAX_DIMS: u32 = 4;
/// Longest metadata key, in bytes.
const MAX_KEY: u64 = 65_535;
/// Longest tensor name, in bytes.
const MAX_NAME: u64 = 1024;

/// Whether the tensors of a file may be padded to multiples of `value` bytes; if not, the reason.
fn check_alignment(value: u64) -> Result<(), String> {
    match value.is_power_of_two() && value <= MAX_ALIGNMENT {
        true => Ok(()),
        false => Err(format!(
            "general.alignment = {value}; must be a power of two, at most {MAX_ALIGNMENT}"
        )),
    }
}

/// Where data of `n_bytes` from `start` on ends, and the multiple of `alignment` that comes next; `None`
/// if that is beyond all files.
fn end_of(start: u64, n_bytes: u64, alignment: u64) -> Option<(u64, u64)> {
    let end = start.checked_add(n_bytes)?;
    Some((end, end.checked_next_multiple_of(alignment)?))
}

/// Bytes of a tensor of this type and shape; if there can be no such tensor, the reason. Sizes are
/// bounded by `i64`, in which other readers hold them.
fn data_size(ty: &Type, dims: &[u64]) -> Result<u64, String> {
    const MAX: u64 = i64::MAX as u64;
    // A zero among the dimensions must not hide a negative one.
    if let Some(dim) = dims.iter().find(|d| **d > MAX) {
        return Err(format!("dimension {dim}; allowed 0..={MAX}"));
    }
    let total = dims.iter().try_fold(1u64, |n, d| n.checked_mul(*d)).filter(|n| *n <= MAX);
    let Some(total) = total else {
        return Err(format!("shape {dims:?} has more than {MAX} elements"));
    };
    let (row, len) = (dims.first().copied().unwrap_or(1), ty.block_len as u64);
    if !row.is_multiple_of(len) {
        return Err(format!("rows of {row} are not whole blocks of {len} ({})", ty.name));
    }
    match (total / len).checked_mul(ty.block_bytes as u64).filter(|n| *n <= MAX) {
        Some(n) => Ok(n),
        None => Err(format!("{total} elements of {} have more than {MAX} bytes", ty.name)),
    }
}
