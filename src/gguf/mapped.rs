//! Mapped files: what has become of them since, and whose an address is.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use memmap2::Mmap;

use crate::bad_file;
use crate::error::Result;

/// Files whose addresses are known at a time; of more, a fault cannot be told from others.
const N_SLOTS: usize = 1024;
/// Longest part of a path that is kept for it, in bytes.
const MAX_NAME: usize = 500;

/// A file in memory, as it was when it was mapped.
pub(super) struct Mapped {
    pub(super) map: Mmap,
    path: PathBuf,
    seen: Seen,
    slot: Option<usize>,
}

/// What tells that a file is another or has been written to.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    len: u64,
    written: Option<SystemTime>,
    /// Device and number on it, where there are such.
    id: (u64, u64),
}

impl Seen {
    fn of(data: &std::fs::Metadata) -> Seen {
        #[cfg(unix)]
        let id = {
            use std::os::unix::fs::MetadataExt;
            (data.dev(), data.ino())
        };
        #[cfg(not(unix))]
        let id = (0, 0);
        Seen { len: data.len(), written: data.modified().ok(), id }
    }
}

/// What has become of a file since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Nothing that shows.
    Same,
    /// It was written to: what is read may be of either.
    Changed,
    /// Its name is gone or another file's: what is read is as it was.
    Replaced,
}

impl Fate {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Fate::Same => "same",
            Fate::Changed => "changed",
            Fate::Replaced => "replaced",
        }
    }
}

impl Mapped {
    pub(super) fn new(map: Mmap, path: &Path, data: &std::fs::Metadata) -> Mapped {
        let slot = Slot::fill(&map, &path.to_string_lossy());
        Mapped { map, path: path.into(), seen: Seen::of(data), slot }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file as it is now, if it is still the one that was opened.
    fn now(&self) -> Option<Seen> {
        let now = std::fs::metadata(&self.path).ok().map(|data| Seen::of(&data));
        now.filter(|now| now.id == self.seen.id)
    }

    pub(super) fn fate(&self) -> Fate {
        match self.now() {
            None => Fate::Replaced,
            Some(now) if now == self.seen => Fate::Same,
            Some(_) => Fate::Changed,
        }
    }

    /// Refuses to have bytes up to `end` read that the file has no more.
    pub(super) fn check(&self, end: usize) -> Result<()> {
        match self.now() {
            Some(now) if now.len < end as u64 => {
                bad_file!(
                    "the file was shortened while in use: it has {} bytes, {end} are needed",
                    now.len
                )
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if let Some(i) = self.slot {
            SLOTS[i].end.store(0, Ordering::Release);
        }
    }
}

/// Where a file lies in memory, and its name, in a form that a handler of signals may read: nothing of it
/// moves, and nothing has to be waited for.
struct Slot {
    start: AtomicUsize,
    /// 0: nobody's.
    end: AtomicUsize,
    n: AtomicUsize,
    name: [AtomicU8; MAX_NAME],
}

static SLOTS: [Slot; N_SLOTS] = [const { Slot::empty() }; N_SLOTS];
/// Has one at a time look for an empty one.
static FILLING: Mutex<()> = Mutex::new(());

impl Slot {
    const fn empty() -> Slot {
        Slot {
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            n: AtomicUsize::new(0),
            name: [const { AtomicU8::new(0) }; MAX_NAME],
        }
    }

    fn fill(map: &[u8], name: &str) -> Option<usize> {
        let _one = FILLING.lock().unwrap_or_else(PoisonError::into_inner);
        let i = SLOTS.iter().position(|slot| slot.end.load(Ordering::Relaxed) == 0)?;
        let slot = &SLOTS[i];
        // The end of a path says most.
        let shown = crate::error::escaped(name);
        let from = shown.len().saturating_sub(MAX_NAME);
        let bytes = &shown.as_bytes()[from..];
        slot.name.iter().zip(bytes).for_each(|(to, byte)| to.store(*byte, Ordering::Relaxed));
        slot.n.store(bytes.len(), Ordering::Relaxed);
        let start = map.as_ptr().addr();
        slot.start.store(start, Ordering::Relaxed);
        slot.end.store(start + map.len(), Ordering::Release);
        Some(i)
    }
}

/// Writes the path of the file that is mapped at an address to `name`: its length, if there is one. May
/// be called by a handler of signals.
pub fn mapped_at(address: usize, name: &mut [u8]) -> Option<usize> {
    let at = |slot: &&Slot| {
        let end = slot.end.load(Ordering::Acquire);
        (slot.start.load(Ordering::Relaxed)..end).contains(&address)
    };
    let slot = SLOTS.iter().find(at)?;
    let n = slot.n.load(Ordering::Relaxed).min(name.len());
    name.iter_mut()
        .zip(&slot.name)
        .take(n)
        .for_each(|(to, byte)| *to = byte.load(Ordering::Relaxed));
    Some(n)
}
