//! Split models: `NAME-00001-of-00003.gguf` and its siblings.

use std::path::{Path, PathBuf};

use super::{Bytes, Gguf};
use crate::bad_file;
use crate::error::{Result, escaped};

/// Most parts that a model may have.
const MAX_PARTS: u32 = 1024;

/// One part in the order of the model.
pub(super) enum Part {
    /// The part that was opened.
    This,
    /// A sibling.
    Other(Box<Gguf>),
}

/// All parts, in order.
pub(super) type Parts = Vec<Part>;

/// Opens the siblings of a part; `None` when the file is not split.
pub(super) fn other_parts(this: &Gguf, path: &Path) -> Result<Option<Parts>> {
    let count = this.u32("split.count")?.unwrap_or(0);
    if count <= 1 {
        return Ok(None);
    }
    if count > MAX_PARTS {
        bad_file!("split.count = {count}; allowed 1..={MAX_PARTS}");
    }
    let no = match this.u32("split.no")? {
        Some(no) if no < count => no,
        Some(no) => bad_file!("split.no = {no}; allowed 0..={}", count - 1),
        None => bad_file!("split.no is missing; split.count = {count}"),
    };
    let mut parts = Vec::new();
    let mut n_tensors = this.tensors().len();
    for i in 0..count {
        if i == no {
            parts.push(Part::This);
            continue;
        }
        let sibling = sibling(path, no, i, count)?;
        if !sibling.exists() {
            bad_file!(
                "part {} of {count} of this split model is missing: {}",
                i + 1,
                escaped(&sibling.to_string_lossy())
            );
        }
        let read = || -> Result<Gguf> {
            let gguf = Gguf::parse(Bytes::map(&sibling)?)?;
            for (key, expected) in [("split.no", i), ("split.count", count)] {
                match gguf.u32(key)? {
                    Some(n) if n == expected => {}
                    Some(n) => bad_file!("{key} = {n}; expected {expected}"),
                    None => bad_file!("{key} is missing; expected {expected}"),
                }
            }
            Ok(gguf)
        };
        let gguf = read().map_err(|e| e.at(&sibling))?;
        n_tensors += gguf.tensors().len();
        parts.push(Part::Other(Box::new(gguf)));
    }
    let first = match parts.first() {
        Some(Part::Other(gguf)) => gguf,
        _ => this,
    };
    if let Some(total) = first.u32("split.tensors.count")?.filter(|t| *t as usize != n_tensors) {
        bad_file!("split.tensors.count = {total}, but the parts have {n_tensors} tensors");
    }
    Ok(Some(parts))
}

/// The path of part `i`, from the path of part `no`.
fn sibling(path: &Path, no: u32, i: u32, count: u32) -> Result<PathBuf> {
    let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
    let ending = |n: u32| format!("-{:05}-of-{count:05}.gguf", n + 1);
    match name.strip_suffix(&ending(no)) {
        Some(stem) => Ok(path.with_file_name(format!("{stem}{}", ending(i)))),
        None => {
            bad_file!("is part {} of {count}, so its name must end in \"{}\"", no + 1, ending(no))
        }
    }
}
