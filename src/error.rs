//! What can go wrong, in one line each: what, where, found, allowed.

use std::path::Path;

/// A failure, sorted by who can do something about it. Its text is one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A file that cannot be read, is broken, or is of a kind that is not supported. Exit code 3.
    #[error("{0}")]
    File(String),
    /// Options or input that contradict themselves or the model. Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Anything that fails while running. Exit code 1.
    #[error("{0}")]
    Runtime(String),
}

/// The result of everything in this crate that can fail.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// The process exit code that stands for this error.
    pub fn exit_code(&self) -> u8 {
        match self {
            Error::Runtime(_) => 1,
            Error::Usage(_) => 2,
            Error::File(_) => 3,
        }
    }

    /// Puts the file's name in front of the message.
    pub fn at(self, path: &Path) -> Error {
        let place = |text: String| format!("{}: {text}", escaped(&path.to_string_lossy()));
        match self {
            Error::File(text) => Error::File(place(text)),
            Error::Usage(text) => Error::Usage(place(text)),
            Error::Runtime(text) => Error::Runtime(place(text)),
        }
    }
}

/// Text from a file or a path, made safe for a terminal: control characters become escapes.
pub fn escaped(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let plain = !c.is_control();
            plain
                .then_some(c)
                .into_iter()
                .chain((!plain).then(|| c.escape_default()).into_iter().flatten())
        })
        .collect()
}

/// Longest name from inside a file that a message repeats, in characters.
const MAX_EXCERPT: usize = 64;

/// The beginning of a text from a file, [`escaped`]: a message stays one readable line, however
/// long the text is.
pub fn excerpt(text: &str) -> String {
    match text.char_indices().nth(MAX_EXCERPT) {
        Some((end, _)) => format!("{}...", escaped(&text[..end])),
        None => escaped(text),
    }
}

/// `Err(Error::File(format!(..)))`, for the many checks of a loader.
#[macro_export]
macro_rules! bad_file {
    ($($arg:tt)*) => { return Err($crate::error::Error::File(format!($($arg)*))) };
}

/// `Err(Error::Usage(format!(..)))`.
#[macro_export]
macro_rules! bad_usage {
    ($($arg:tt)*) => { return Err($crate::error::Error::Usage(format!($($arg)*))) };
}
