//! Where bytes come from: a mapped file, the program itself, or memory.

use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::Arc;

use memmap2::Mmap;

use super::mapped::{Fate, Mapped};
use crate::error::{Error, Result};

/// A cheap, shared view of bytes. Cloning and slicing copy nothing.
#[derive(Clone)]
pub struct Bytes {
    source: Source,
    range: Range<usize>,
}

#[derive(Clone)]
enum Source {
    Map(Arc<Mapped>),
    Static(&'static [u8]),
    Owned(Arc<Vec<u8>>),
}

impl Bytes {
    /// Maps a regular file, read-only.
    pub fn map(path: &Path) -> Result<Bytes> {
        let fail = |e: std::io::Error| Error::File(io_text(&e));
        // Asked of the name, before opening: opening a FIFO would block.
        let kind = std::fs::metadata(path).map_err(fail)?.file_type();
        if kind.is_dir() {
            crate::bad_file!("is a directory; a GGUF file is needed");
        }
        if !kind.is_file() {
            crate::bad_file!("is not a regular file");
        }
        let file = File::open(path).map_err(fail)?;
        let data = file.metadata().map_err(fail)?;
        if data.len() == 0 {
            crate::bad_file!("file is empty");
        }
        // SAFETY: the map is read-only and private to this process. Another process that shortens
        // the file while it is mapped makes reads fault; that is the known price of mapping, paid
        // by every runtime that maps weights, and cannot lead to a write. `mapped_at` tells a
        // program whose file that was.
        #[allow(unsafe_code)]
        let map = unsafe { Mmap::map(&file) }.map_err(fail)?;
        let range = 0..map.len();
        let mapped = Mapped::new(map, path, &data);
        Ok(Bytes { source: Source::Map(Arc::new(mapped)), range })
    }

    /// Refuses bytes that their file has no more: reading them would end the process.
    pub fn check(&self) -> Result<()> {
        match &self.source {
            Source::Map(mapped) if !self.is_empty() => mapped.check(self.range.end),
            _ => Ok(()),
        }
    }

    /// What has become of their file since it was opened.
    pub fn fate(&self) -> Fate {
        match &self.source {
            Source::Map(mapped) => mapped.fate(),
            _ => Fate::Same,
        }
    }

    /// Names their file in an error.
    pub fn at(&self, error: Error) -> Error {
        match &self.source {
            Source::Map(mapped) => error.at(mapped.path()),
            _ => error,
        }
    }

    /// The part of these bytes at `range`; `None` when it reaches outside.
    pub fn slice(&self, range: Range<usize>) -> Option<Bytes> {
        self.get(range.clone())?;
        let start = self.range.start;
        Some(Bytes { source: self.source.clone(), range: start + range.start..start + range.end })
    }

    /// These bytes and those that follow, to the end of `last`; `None` where that is not in the same
    /// place, after these.
    pub fn through(&self, last: &Bytes) -> Option<Bytes> {
        let is_same = match (&self.source, &last.source) {
            (Source::Map(a), Source::Map(b)) => Arc::ptr_eq(a, b),
            (Source::Static(a), Source::Static(b)) => std::ptr::eq(*a, *b),
            (Source::Owned(a), Source::Owned(b)) => Arc::ptr_eq(a, b),
            _ => false,
        };
        let range = self.range.start..last.range.end;
        let is_after = last.range.start >= self.range.start;
        (is_same && is_after).then(|| Bytes { source: self.source.clone(), range })
    }
}

/// Has the system forget what it holds of a file in memory, so that it is read from the disk.
#[cfg(target_os = "linux")]
pub fn evict(path: &Path) -> Result<()> {
    let forget = || -> std::io::Result<()> {
        let file = File::open(path)?;
        // Pages that are not yet on the disk could not be dropped.
        file.sync_all()?;
        Ok(rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?)
    };
    forget().map_err(|e| Error::File(io_text(&e)).at(path))
}

/// Has the system forget what it holds of a file in memory: only Linux can.
#[cfg(not(target_os = "linux"))]
pub fn evict(_: &Path) -> Result<()> {
    crate::bad_usage!("this system cannot be told to forget a file")
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &self.source {
            Source::Map(mapped) => &mapped.map,
            Source::Static(bytes) => bytes,
            Source::Owned(bytes) => bytes,
        };
        &all[self.range.clone()]
    }
}

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl From<&'static [u8]> for Bytes {
    fn from(bytes: &'static [u8]) -> Bytes {
        Bytes { source: Source::Static(bytes), range: 0..bytes.len() }
    }
}

impl From<Vec<u8>> for Bytes {
    fn from(bytes: Vec<u8>) -> Bytes {
        let range = 0..bytes.len();
        Bytes { source: Source::Owned(Arc::new(bytes)), range }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

/// An operating-system error without its number: "No such file or directory".
pub(super) fn io_text(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_string(),
        None => text,
    }
}
