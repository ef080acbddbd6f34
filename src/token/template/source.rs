//! A look at a template's source before the engine sees it: limits that keep its recursion
//! shallow, and the one tag that it does not know.

use crate::bad_file;
use crate::error::Result;

/// Longest source in bytes. The longest of 18 known templates has 17 thousand.
const MAX_BYTES: usize = 256 << 10;
/// Operators, brackets and words in one tag, each of which can nest the expression once more.
/// Known templates have up to 40.
const MAX_OPERATORS: usize = 1024;
/// `elif` tags, which the engine nests.
const MAX_ELIF: usize = 256;

/// The source as the engine can read it.
///
/// `{% generation %}` and its end, with which `transformers` marks the text of the assistant, have
/// no effect on the output and become a condition that always holds.
pub(super) fn prepare(source: &str) -> Result<String> {
    if source.len() > MAX_BYTES {
        bad_file!("chat template: {} bytes; allowed {MAX_BYTES}", source.len());
    }
    // Jinja2 knows one kind of line end.
    let source = &source.replace("\r\n", "\n").replace('\r', "\n");
    let mut result = String::with_capacity(source.len());
    let (mut rest, mut n_elif) = (&source[..], 0);
    while let Some(start) = rest.find("{").filter(|at| at + 1 < rest.len()) {
        let (text, tag) = rest.split_at(start);
        result.push_str(text);
        let end = match &tag.as_bytes()[1] {
            b'#' => tag[2..].find("#}").map_or(tag.len(), |at| at + 4),
            b'{' | b'%' => tag_end(tag, source.len() - tag.len(), source)?,
            _ => 1,
        };
        let (tag, after) = tag.split_at(end);
        rest = after;
        match name(tag) {
            "generation" => result.push_str(&tag.replacen("generation", "if true", 1)),
            "endgeneration" => result.push_str(&tag.replacen("endgeneration", "endif", 1)),
            "raw" => {
                let end = raw_end(rest);
                result.push_str(tag);
                result.push_str(&rest[..end]);
                rest = &rest[end..];
            }
            other => {
                n_elif += usize::from(other == "elif");
                result.push_str(tag);
            }
        }
    }
    if n_elif > MAX_ELIF {
        bad_file!("chat template: {n_elif} elif tags; allowed {MAX_ELIF}");
    }
    result.push_str(rest);
    Ok(result)
}

/// The first word of a `{% %}` tag; empty for anything else.
fn name(tag: &str) -> &str {
    let Some(inner) = tag.strip_prefix("{%") else { return "" };
    let inner = inner.trim_start_matches(['-', '+']).trim_start();
    let end = inner.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inner.len());
    &inner[..end]
}

/// Where the content of a raw block ends.
fn raw_end(text: &str) -> usize {
    let ends = text.match_indices("{%").map(|(at, _)| at);
    ends.into_iter().find(|at| name(&text[*at..]) == "endraw").unwrap_or(text.len())
}

/// Length of the expression tag at the beginning of `tag`. `offset`: where it is in `source`.
fn tag_end(tag: &str, offset: usize, source: &str) -> Result<usize> {
    let bytes = tag.as_bytes();
    let close: &[u8] = if bytes[1] == b'{' { b"}}" } else { b"%}" };
    let (mut at, mut depth, mut n_operators) = (2, 0usize, 0);
    while at < bytes.len() {
        let c = bytes[at];
        if depth == 0 && bytes[at..].starts_with(close) {
            return Ok(at + 2);
        }
        match c {
            b'"' | b'\'' => {
                at = string_end(bytes, at);
                continue;
            }
            b'(' | b'[' | b'{' => depth += 1,
            b')' | b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        // Words may be operators too: "and", "not", "is", "if".
        let word = |c: u8| c.is_ascii_alphanumeric() || c == b'_';
        let starts_word = c.is_ascii_lowercase() && !word(bytes[at - 1]);
        let operator = c.is_ascii_punctuation() && !b",:)]}_".contains(&c);
        n_operators += usize::from(starts_word || operator);
        if n_operators > MAX_OPERATORS {
            let line = source[..offset].matches('\n').count() + 1;
            bad_file!("chat template line {line}: more than {MAX_OPERATORS} operators in one tag");
        }
        at += 1;
    }
    Ok(bytes.len())
}

/// Where the string that begins at `at` ends.
fn string_end(bytes: &[u8], at: usize) -> usize {
    let mut end = at + 1;
    while end < bytes.len() && bytes[end] != bytes[at] {
        end += if bytes[end] == b'\\' { 2 } else { 1 };
    }
    (end + 1).min(bytes.len())
}
