//! Where messages come from: a line editor on a terminal, plain lines otherwise.

use std::borrow::Cow;
use std::io::{BufRead, IsTerminal};
use std::path::PathBuf;

use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{Config, Context, Editor, Helper};

use crate::error::{Error, Result};

/// What reading a message gives.
pub(super) enum Input {
    /// A message or a command, never empty.
    Text(String),
    /// Ctrl-C on an empty or unfinished line.
    Interrupted,
    /// Ctrl-D, or the end of stdin.
    End,
}

/// A source of messages.
pub(super) enum Source {
    Terminal(Box<Editor<Lines, FileHistory>>),
    Pipe(std::io::StdinLock<'static>),
}

impl Source {
    /// The terminal if there is one, with its history and `commands` to complete.
    pub(super) fn new(commands: Vec<&'static str>) -> Result<Source> {
        if !std::io::stdin().is_terminal() {
            return Ok(Source::Pipe(std::io::stdin().lock()));
        }
        let config = Config::builder().auto_add_history(true).max_history_size(1000);
        let config = config.map_err(failed)?.build();
        let mut editor = Editor::with_config(config).map_err(failed)?;
        editor.set_helper(Some(Lines { commands }));
        if let Some(path) = history_path() {
            // The first run has none.
            let _ = editor.load_history(&path);
        }
        Ok(Source::Terminal(Box::new(editor)))
    }

    pub(super) fn is_terminal(&self) -> bool {
        matches!(self, Source::Terminal(_))
    }

    /// The next message.
    pub(super) fn next(&mut self) -> Result<Input> {
        loop {
            let raw = match self {
                Source::Terminal(editor) => match editor.readline("> ") {
                    Ok(text) => text,
                    Err(ReadlineError::Interrupted) => return Ok(Input::Interrupted),
                    Err(ReadlineError::Eof) => return Ok(Input::End),
                    Err(error) => return Err(failed(error)),
                },
                Source::Pipe(stdin) => match piped(stdin)? {
                    Some(text) => text,
                    None => return Ok(Input::End),
                },
            };
            let text = message(&raw);
            if !text.trim().is_empty() {
                return Ok(Input::Text(text));
            }
        }
    }

    /// Keeps the history for the next time.
    pub(super) fn close(&mut self) {
        let Source::Terminal(editor) = self else { return };
        if let Some(path) = history_path() {
            // A history that cannot be kept is no reason to end with an error. What is new goes to the end
            // of the file, so that neither a kill nor another chat costs what is there.
            let _ = path.parent().map(std::fs::create_dir_all);
            let _ = editor.append_history(&path);
        }
    }
}

fn failed(error: ReadlineError) -> Error {
    Error::Runtime(format!("cannot read the terminal: {error}"))
}

fn history_path() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(state.join("qkov").join("history"))
}

/// Lines of a pipe up to the end of a message.
fn piped(stdin: &mut impl BufRead) -> Result<Option<String>> {
    let (mut text, mut line) = (String::new(), Vec::new());
    loop {
        line.clear();
        let n = stdin.read_until(b'\n', &mut line);
        if n.map_err(|e| Error::Runtime(format!("cannot read stdin: {e}")))? == 0 {
            return Ok((!text.is_empty()).then_some(text));
        }
        text.push_str(&String::from_utf8_lossy(&line));
        if text.ends_with('\n') {
            text.pop();
            text = text.strip_suffix('\r').map_or(text.clone(), str::to_string);
        }
        if is_complete(&text) {
            return Ok(Some(text));
        }
        text.push('\n');
    }
}

/// Whether Enter ends the message: not after `\`, and not inside `"""`.
fn is_complete(text: &str) -> bool {
    match text.trim_start().strip_prefix("\"\"\"") {
        Some(quoted) => quoted.trim_end().ends_with("\"\"\""),
        None => !text.ends_with('\\'),
    }
}

/// The message without the marks of a multi-line one.
fn message(text: &str) -> String {
    if let Some(quoted) = text.trim_start().strip_prefix("\"\"\"") {
        let quoted = quoted.trim_end();
        return quoted.strip_suffix("\"\"\"").unwrap_or(quoted).trim_matches('\n').to_string();
    }
    let lines: Vec<&str> =
        text.split('\n').map(|line| line.strip_suffix('\\').unwrap_or(line)).collect();
    lines.join("\n").trim().to_string()
}

/// What the line editor asks about a line.
pub(super) struct Lines {
    commands: Vec<&'static str>,
}

impl Validator for Lines {
    fn validate(&self, ctx: &mut ValidationContext) -> rustyline::Result<ValidationResult> {
        Ok(match is_complete(ctx.input()) {
            true => ValidationResult::Valid(None),
            false => ValidationResult::Incomplete,
        })
    }
}

impl Completer for Lines {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        pos: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        let typed = &line[..pos];
        let fits = |c: &&&str| typed.starts_with('/') && c.starts_with(typed);
        Ok((0, self.commands.iter().filter(fits).map(|c| c.to_string()).collect()))
    }
}

impl Highlighter for Lines {
    fn highlight_hint<'h>(&self, hint: &'h str) -> Cow<'h, str> {
        Cow::Borrowed(hint)
    }
}

impl Hinter for Lines {
    type Hint = String;
}

impl Helper for Lines {}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut text: &[u8]) -> Vec<String> {
        std::iter::from_fn(|| piped(&mut text).unwrap()).map(|t| message(&t)).collect()
    }

    #[test]
    fn one_line_is_a_message() {
        assert_eq!(all(b"hello\r\nyou\n"), ["hello", "you"]);
        assert_eq!(all(b"no line end"), ["no line end"]);
    }

    #[test]
    fn several_lines_are_one_message() {
        assert_eq!(all(b"a\\\nb\\\nc\nd\n"), ["a\nb\nc", "d"]);
        assert_eq!(all(b"\"\"\"\na\n\nb\n\"\"\"\nc\n"), ["a\n\nb", "c"]);
        assert_eq!(all(b"\"\"\"one\"\"\"\n"), ["one"]);
        assert_eq!(all(b"\"\"\"never closed\nat all"), ["never closed\nat all"]);
    }

    #[test]
    fn broken_utf8_is_replaced() {
        assert_eq!(all(b"a\xffb\n"), ["a\u{fffd}b"]);
    }
}
