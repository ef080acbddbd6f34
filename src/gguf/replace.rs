//! Files that appear complete under their name, or not at all, and files that one process at a time
//! works with.
//!
//! Both stand on locks that the system drops when a process ends, however it ends: a temporary file
//! that nobody has locked was left by a writer that was killed, and the next writer removes it.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use super::bytes::io_text;
use super::write::Sink;
use crate::error::{Error, Result};

/// Names that a writer tries.
const N_NAMES: u32 = 100;
/// How the names of temporary files begin and end.
const ENDS: (&str, &str) = (".qkov-", ".tmp");

/// Files that are to vanish with the process: those that are being written, and locks.
static OWN: Mutex<Vec<PathBuf>> = Mutex::new(Vec::new());

fn own() -> MutexGuard<'static, Vec<PathBuf>> {
    OWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Removes files that are being written, and locks, for a process that ends without ado. Until what this
/// returns is dropped, no file is begun or gets its name.
#[must_use = "the process ends while this is held"]
pub fn abandon_files() -> impl Sized {
    let mut own = own();
    for path in own.drain(..) {
        // Nobody is left to tell.
        let _ = std::fs::remove_file(path);
    }
    own
}

/// Writes a file of any kind, replacing one of this name. If anything fails, the old file stays as
/// it is and nothing is left behind.
pub fn replace_file(path: &Path, make: impl FnOnce(&mut Sink) -> Result<()>) -> Result<()> {
    let write = || {
        let target = led_to(path);
        // Replacing `/dev/null` by a file would be a surprise.
        if target.exists() && !target.is_file() {
            return Err(Error::Runtime("is not a regular file".into()));
        }
        let temporary = Temporary::create(&target)?;
        let mut file = io::BufWriter::with_capacity(1 << 20, &temporary.file);
        make(&mut |bytes| file.write_all(bytes).map_err(write_error))?;
        file.into_inner().map_err(|e| write_error(e.into_error()))?;
        temporary.file.sync_all().map_err(write_error)?;
        temporary.rename(&target)
    };
    write().map_err(|e: Error| e.at(path))
}

/// A name that leads elsewhere keeps doing so: this is what it leads to.
fn led_to(path: &Path) -> PathBuf {
    std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf())
}

/// A locked file that vanishes unless it is renamed.
struct Temporary {
    file: File,
    path: PathBuf,
}

impl Temporary {
    /// Creates a file in the folder of `target`, where a rename cannot leave the file system.
    fn create(target: &Path) -> Result<Temporary> {
        if target.file_name().is_none() {
            return Err(Error::Runtime("is not the name of a file".into()));
        }
        #[cfg(unix)]
        clean(folder(target));
        // So that others have rarely taken the name.
        let moment = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_nanos());
        for attempt in 0..N_NAMES {
            let (begin, end) = ENDS;
            let path = target.with_file_name(format!("{begin}{moment}-{attempt}{end}"));
            let mut own = own();
            // Created anew, so that two writers never share one.
            let file = match File::create_new(&path) {
                Ok(file) => file,
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(e) => return Err(write_error(e)),
            };
            if has(&file, &path) {
                own.push(path.clone());
                return Ok(Temporary { file, path });
            }
        }
        Err(Error::Runtime("cannot write: every temporary name is taken".into()))
    }

    /// Gives the file its name, durably.
    fn rename(self, target: &Path) -> Result<()> {
        let mut own = own();
        std::fs::rename(&self.path, target).map_err(write_error)?;
        own.retain(|path| *path != self.path);
        drop(own);
        // The name is an entry of the folder, which has to reach the disk as well. Only on Unix
        // can a folder be opened for that.
        #[cfg(unix)]
        File::open(folder(target)).and_then(|f| f.sync_all()).map_err(write_error)?;
        Ok(())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        forget(&self.path);
    }
}

/// Removes a file that was to vanish, unless it has got another name.
fn forget(path: &Path) {
    let mut own = own();
    if own.iter().any(|known| known == path) {
        own.retain(|known| known != path);
        // Nobody is left to tell.
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(unix)]
fn folder(target: &Path) -> &Path {
    target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Locks a file that was just created. False if another took it for left behind in between.
fn has(file: &File, path: &Path) -> bool {
    match file.try_lock() {
        Ok(()) => is_at(file, path),
        Err(TryLockError::WouldBlock) => false,
        // Where a file system has no locks, nobody takes what is here for left behind.
        Err(TryLockError::Error(_)) => true,
    }
}

/// Whether a path still leads to an open file.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let id = |data: io::Result<std::fs::Metadata>| data.ok().map(|data| (data.dev(), data.ino()));
    let open = id(file.metadata());
    open.is_some() && open == id(std::fs::symlink_metadata(path))
}

/// Whether a path still leads to an open file: elsewhere, open files are not removed.
#[cfg(not(unix))]
fn is_at(_: &File, _: &Path) -> bool {
    true
}

/// Removes what writers left in a folder that were killed: temporary files that nobody has locked.
#[cfg(unix)]
fn clean(folder: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let is_file = entry.file_type().is_ok_and(|kind| kind.is_file());
        if !is_file || !is_temporary(&entry.file_name()) {
            continue;
        }
        let path = entry.path();
        if let Ok(file) = OpenOptions::new().write(true).open(&path)
            && file.try_lock().is_ok()
            // What it was opened by may be another's file by now.
            && is_at(&file, &path)
        {
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Whether a name is one that writers give: of a moment and an attempt.
#[cfg(unix)]
fn is_temporary(name: &OsStr) -> bool {
    let numbers = name.to_str().and_then(|n| n.strip_prefix(ENDS.0)?.strip_suffix(ENDS.1));
    let pair = numbers.and_then(|numbers| numbers.split_once('-'));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    pair.is_some_and(|(moment, attempt)| is_number(moment) && is_number(attempt))
}

/// A file that other processes leave alone until this is dropped or the process ends.
pub struct Lock {
    /// Holds it.
    _file: File,
    path: PathBuf,
}

impl Lock {
    /// Takes the file at `path`, which need not be there yet. What is locked is a file beside it,
    /// `.NAME.lock`, as the one at `path` becomes another whenever it is written.
    ///
    /// # Errors
    ///
    /// Another has it, in this process or in another one.
    pub fn take(path: &Path) -> Result<Lock> {
        Lock::beside(&led_to(path)).map_err(|e| e.at(path))
    }

    fn beside(target: &Path) -> Result<Lock> {
        let Some(name) = target.file_name() else {
            return Err(Error::Runtime("is not the name of a file".into()));
        };
        let path = target
            .with_file_name([OsStr::new("."), name, OsStr::new(".lock")].join(OsStr::new("")));
        loop {
            let mut own = own();
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path);
            let file = file.map_err(|e| Error::Runtime(format!("cannot lock: {}", io_text(&e))))?;
            match file.try_lock() {
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Runtime("in use by another process".into()));
                }
                // Whoever had it has just removed it.
                Ok(()) if !is_at(&file, &path) => {}
                // Not every file system has locks.
                _ => {
                    own.push(path.clone());
                    return Ok(Lock { _file: file, path });
                }
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        forget(&self.path);
    }
}

fn write_error(error: io::Error) -> Error {
    Error::Runtime(format!("cannot write: {}", io_text(&error)))
}
