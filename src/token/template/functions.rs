//! Functions and Python methods that templates call.

use std::fmt::Write;

use chrono::NaiveDateTime;
use chrono::format::{Fixed, Item, StrftimeItems};
use minijinja::value::{Tuple, from_args};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

/// What a template raised.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

/// `raise_exception(text)`: the template refuses the messages.
pub(super) fn raise_exception(text: String) -> Result<Value, Error> {
    let error = Error::new(ErrorKind::InvalidOperation, text.clone());
    Err(error.with_source(Raised(text)))
}

/// `strftime_now(format)`: a time, as Python's `datetime.strftime` writes it in the C locale.
pub(super) fn strftime(now: NaiveDateTime, format: &str) -> Result<String, Error> {
    let bad = || {
        let text = format!("strftime_now: format {format:?} is not known");
        Error::new(ErrorKind::InvalidOperation, text)
    };
    let mut text = String::new();
    for item in StrftimeItems::new(&python_format(format)) {
        match item {
            Item::Error => return Err(bad()),
            // A time without a zone has no name for it.
            Item::Fixed(Fixed::TimezoneName | Fixed::TimezoneOffset) => {}
            item => write!(text, "{}", now.format_with_items(std::iter::once(item)))
                .map_err(|_| bad())?,
        }
    }
    Ok(text)
}

/// Python's `%f` has six digits.
fn python_format(format: &str) -> String {
    let mut result = String::with_capacity(format.len());
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        result.push(c);
        if c == '%' {
            match chars.next() {
                Some('f') => result.push_str("6f"),
                next => result.extend(next),
            }
        }
    }
    result
}

/// Python's methods of strings, lists and dictionaries.
pub(super) fn method(
    state: &mut State,
    value: &Value,
    name: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return unknown_method_callback(state, value, name, args);
    };
    match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let first = name == "partition";
            let split =
                if first { text.split_once(separator) } else { text.rsplit_once(separator) };
            let parts = match split {
                Some((before, after)) => [before, separator, after],
                None if first => [text, "", ""],
                None => ["", "", text],
            };
            Ok(Tuple::from(parts.map(Value::from)).into())
        }
        "rsplit" => {
            let (separator, n): (&str, Option<usize>) = from_args(args)?;
            let parts = text.rsplitn(n.map_or(usize::MAX, |n| n.saturating_add(1)), separator);
            let mut parts: Vec<Value> = parts.map(Value::from).collect();
            parts.reverse();
            Ok(parts.into())
        }
        _ => unknown_method_callback(state, value, name, args),
    }
}
