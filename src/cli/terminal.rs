//! Reading from and writing to whoever started the program.

use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::path::Path;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::signals::leave;
use crate::error::{Error, Result};
use crate::measure::SAMPLE;

/// A line on stderr. Nothing can be done if that fails.
pub(super) fn note(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Writes to stdout at once. A reader that has gone away ends the program quietly.
pub(super) fn print(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == ErrorKind::BrokenPipe => leave(0),
        Err(e) => Err(Error::Runtime(format!("cannot write to stdout: {e}"))),
    }
}

/// A model's text: on a terminal, control characters other than line breaks and tabs are shown as
/// escapes, so that no text can move the cursor or set a title.
pub(super) fn print_text(text: &str) -> Result<()> {
    if !std::io::stdout().is_terminal() {
        return print(text.as_bytes());
    }
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => safe.push(c),
            c if c.is_control() => safe.extend(c.escape_default()),
            c => safe.push(c),
        }
    }
    print(safe.as_bytes())
}

/// A value as JSON, indented, with a line end.
pub(super) fn print_json(value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value);
    let text = text.map_err(|e| Error::Runtime(format!("cannot write JSON: {e}")))?;
    print(format!("{text}\n").as_bytes())
}

/// All of a file, or of stdin for none.
pub(super) fn read(path: Option<&Path>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    match path {
        Some(path) => std::fs::read(path).map_err(|e| Error::File(e.to_string()).at(path)),
        None => match std::io::stdin().lock().read_to_end(&mut bytes) {
            Ok(_) => Ok(bytes),
            Err(e) => Err(Error::Runtime(format!("cannot read stdin: {e}"))),
        },
    }
}

/// The same, which must be UTF-8.
pub(super) fn read_text(path: Option<&Path>) -> Result<String> {
    let place = path.map_or("stdin".into(), |p| p.to_string_lossy().into_owned());
    String::from_utf8(read(path)?).map_err(|e| {
        let at = e.utf8_error().valid_up_to();
        Error::File(format!("{place}: the text is not UTF-8 at byte {at}"))
    })
}

/// The text of a file, or without one the sample that is built in.
pub(super) fn text_or_sample(path: Option<&Path>) -> Result<String> {
    match path {
        Some(path) => read_text(Some(path)),
        None => Ok(SAMPLE.to_string()),
    }
}

/// A progress bar on stderr; nothing unless that is a terminal.
pub(super) fn progress(len: usize, what: &str) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(len as u64), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{msg} {bar:30} {pos}/{len} {eta}") {
        bar.set_style(style);
    }
    bar.set_message(what.to_string());
    bar
}
