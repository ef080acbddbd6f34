//! What signals do to the program: it ends soon, and leaves nothing half-done behind.
//!
//! SIGKILL leaves a temporary file, which the next one who writes into that folder removes. `serve` ends
//! at signals in a way of its own.

use std::sync::OnceLock;

use crate::error::Result;
use crate::gguf::abandon_files;

/// What Ctrl-C does instead; whether it did something.
static INTERRUPT: OnceLock<fn() -> bool> = OnceLock::new();

/// Has Ctrl-C do something else than end the program, unless that says that there was nothing to do.
pub(super) fn at_interrupt(instead: fn() -> bool) {
    let _ = INTERRUPT.set(instead);
}

/// Ends the program at once, without files that are being written.
pub(super) fn leave(code: i32) -> ! {
    let _held = abandon_files();
    std::process::exit(code)
}

/// Ends the program as shells have it after a signal of this number.
fn end(signal: i32) {
    if signal == INTERRUPTED && INTERRUPT.get().is_some_and(|instead| instead()) {
        return;
    }
    let _held = abandon_files();
    // At once: what computes on other threads is not asked.
    #[cfg(unix)]
    signal_hook::low_level::exit(128 + signal);
    #[cfg(not(unix))]
    std::process::exit(128 + signal);
}

/// The number of Ctrl-C's signal.
const INTERRUPTED: i32 = 2;

#[cfg(unix)]
pub(super) use unix::{guard, watch};

#[cfg(unix)]
mod unix {
    #![allow(unsafe_code)]

    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;

    use libc::{SIGBUS, SIGHUP, SIGINT, SIGTERM, SIGXFSZ};
    use signal_hook::iterator::Signals;

    use super::{Result, end};
    use crate::error::Error;
    use crate::gguf::mapped_at;

    /// Exit code for files that cannot be read.
    const FILE: i32 = 3;

    fn failed(error: std::io::Error) -> Error {
        Error::Runtime(format!("cannot watch for signals: {error}"))
    }

    /// Has the program end cleanly at signals that end programs, other than those that whoever started
    /// it wants ignored, as `nohup` does.
    pub(in crate::cli) fn watch() -> Result<()> {
        let wanted = [SIGINT, SIGTERM, SIGHUP].into_iter().filter(|signal| !is_ignored(*signal));
        let mut signals = Signals::new(wanted).map_err(failed)?;
        let watcher = std::thread::Builder::new().name("qkov-signals".into());
        watcher.spawn(move || signals.forever().for_each(end)).map_err(failed)?;
        Ok(())
    }

    fn is_ignored(signal: i32) -> bool {
        // SAFETY: nothing is changed; zeros are a valid value of the type, which is written to.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            libc::sigaction(signal, std::ptr::null(), &mut action) == 0
                && action.sa_sigaction == libc::SIG_IGN
        }
    }

    /// Makes two faults of files errors: writing more than a limit allows, and reading what a mapped
    /// file has no more.
    pub(in crate::cli) fn guard() -> Result<()> {
        // With a handler, what wrote too much is told so.
        signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false))).map_err(failed)?;
        // SAFETY: `shortened` is a handler of this kind, and does only what handlers may do. Zeros are a
        // valid value of the type.
        let done = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = shortened as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(SIGBUS, &action, std::ptr::null_mut())
        };
        if done == 0 { Ok(()) } else { Err(failed(std::io::Error::last_os_error())) }
    }

    /// Ends the program where a page of a mapped file is not there; other such faults end it as they
    /// would without this. Allocates nothing and waits for nobody.
    extern "C" fn shortened(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        const BEFORE: &[u8] = b"error: ";
        const AFTER: &[u8] = b": the file was shortened while in use\n";
        let mut line = [0; 600];
        // SAFETY: the system hands over a valid pointer.
        let at = unsafe { (*info).si_addr() }.addr();
        line[..BEFORE.len()].copy_from_slice(BEFORE);
        let room = line.len() - AFTER.len();
        let Some(n) = mapped_at(at, &mut line[BEFORE.len()..room]) else {
            // SAFETY: a handler may do that; back at the same place, the fault ends the program.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            return;
        };
        let end = BEFORE.len() + n;
        line[end..end + AFTER.len()].copy_from_slice(AFTER);
        // SAFETY: both are for handlers, and the bytes are there. Whether they arrive, nobody can tell.
        unsafe {
            libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), end + AFTER.len());
            libc::_exit(FILE)
        }
    }
}

/// Has the program end cleanly at Ctrl-C.
#[cfg(not(unix))]
pub(super) fn watch() -> Result<()> {
    let handler = ctrlc::set_handler(|| end(INTERRUPTED));
    handler.map_err(|e| crate::error::Error::Runtime(format!("cannot watch for Ctrl-C: {e}")))
}

/// Other systems have no such signals.
#[cfg(not(unix))]
pub(super) fn guard() -> Result<()> {
    Ok(())
}
