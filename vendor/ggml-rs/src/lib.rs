//! ggml through bindgen, behind a small safe interface: [tensor types](Type), [devices](Device),
//! [tensors that stay](Store) and [graphs](Graph) that a [scheduler](Scheduler) spreads over devices.
//!
//! ggml checks shapes with assertions that end the process: what this interface does not check itself
//! is safe, but a graph of wrong shapes is a fault of the program, not an error.

mod device;
mod graph;
mod ops;
#[cfg(feature = "rpc")]
mod rpc;
mod scheduler;
mod store;
mod types;

pub use device::{Backend, BufferType, Device, Kind, devices};
pub use graph::{Graph, Tensor};
pub use ops::{Gelu, Rope};
#[cfg(feature = "rpc")]
pub use rpc::{add_server, serve};
pub use scheduler::Scheduler;
pub use store::{Shape, Store};
pub use types::{Quantizer, Type};

use std::ffi::{CStr, c_char, c_void};
use std::fmt;
use std::sync::OnceLock;

#[allow(
    clippy::all,
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unused_qualifications
)]
mod sys {
    include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
}

/// What a device could not do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error(pub String);

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Error {}

/// What functions of this crate return.
pub type Result<T> = std::result::Result<T, Error>;

/// ggml's version.
pub fn version() -> String {
    // SAFETY: a constant string.
    text(unsafe { sys::ggml_version() })
}

/// Copies a string of C; none for none.
fn text(s: *const c_char) -> String {
    if s.is_null() {
        return String::new();
    }
    // SAFETY: strings of ggml end with zero.
    unsafe { CStr::from_ptr(s) }.to_string_lossy().into_owned()
}

static LAST: OnceLock<fn(&str) -> !> = OnceLock::new();

/// Gives the last words of ggml to `last` where it ends the process: of wrong shapes, out of memory on
/// some devices, and where a worker is gone. `last` is called by any thread. Only the first call counts.
pub fn abort_to(last: fn(&str) -> !) {
    unsafe extern "C" fn pass(message: *const c_char) {
        let message = text(message);
        // It begins with a file's path.
        let (path, rest) = message.split_once(": ").unwrap_or(("", &message));
        let place = path.rsplit('/').next().unwrap_or_default();
        if let Some(last) = LAST.get() {
            last(&format!("{} ({place})", rest.trim_end()));
        }
    }
    if LAST.set(last).is_ok() {
        // SAFETY: the callback lives as long as the program.
        unsafe { sys::ggml_set_abort_callback(Some(pass)) };
    }
}

static LOG: OnceLock<fn(&str)> = OnceLock::new();

/// Gives warnings and errors of ggml to `log`, line by line, and drops everything else that it says.
/// Only the first call counts.
pub fn log_to(log: fn(&str)) {
    unsafe extern "C" fn pass(level: sys::ggml_log_level, line: *const c_char, _: *mut c_void) {
        if let (sys::GGML_LOG_LEVEL_WARN | sys::GGML_LOG_LEVEL_ERROR, Some(log)) =
            (level, LOG.get())
        {
            log(text(line).trim_end());
        }
    }
    if LOG.set(log).is_ok() {
        // SAFETY: the callback lives as long as the program.
        unsafe { sys::ggml_log_set(Some(pass), std::ptr::null_mut()) };
    }
}
