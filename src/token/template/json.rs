//! JSON into the engine and out of it.
//!
//! `tojson` is as `transformers` defines it: Python's `json.dumps` with its options, and without
//! the escapes for HTML of Jinja's own filter.

use std::fmt::Write;

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use serde_json::Value as Json;

use super::MAX_OUTPUT;

/// Lists and objects inside each other.
const MAX_DEPTH: usize = 200;

struct Writer {
    out: String,
    ascii: bool,
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
    depth: usize,
}

/// A JSON value as the engine's.
pub(super) fn to_engine(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(b) => Value::from(*b),
        Json::Number(n) => match (n.as_u64(), n.as_i64()) {
            (Some(n), _) => Value::from(n),
            (_, Some(n)) => Value::from(n),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(to_engine).collect::<Vec<_>>().into(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), to_engine(value))))
        }
    }
}

/// The filter: `tojson(ensure_ascii=false, indent=none, separators=none, sort_keys=false)`.
pub(super) fn tojson(
    state: &State,
    value: &Value,
    given: Rest<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    if given.len() > 4 {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    let option = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match given.get(at) {
            Some(value) => Some(value.clone()),
            None => options.get(name)?,
        };
        Ok(value.filter(|v| !v.is_none() && !v.is_undefined()))
    };
    let is_true = |v: Option<Value>| v.is_some_and(|v| v.is_true());
    let ascii = is_true(option(0, "ensure_ascii")?);
    let indent = match option(1, "indent")? {
        Some(indent) => Some(indentation(&indent)?),
        None => None,
    };
    let separators = option(2, "separators")?;
    let sort_keys = is_true(option(3, "sort_keys")?);
    options.assert_all_used()?;
    let (item_separator, key_separator) = match separators {
        Some(pair) => (pair.get_item_by_index(0)?, pair.get_item_by_index(1)?),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let mut writer = Writer {
        out: String::new(),
        ascii,
        indent,
        item_separator: item_separator.to_string(),
        key_separator: key_separator.to_string(),
        sort_keys,
        depth: 0,
    };
    writer.value(state, value)?;
    Ok(writer.out)
}

fn bad(text: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("tojson: {}", text.into()))
}

/// A number of blanks, or the text itself.
fn indentation(indent: &Value) -> Result<String, Error> {
    match (indent.as_i64(), indent.as_str()) {
        (Some(n), _) if n <= 64 => Ok(" ".repeat(n.max(0) as usize)),
        (_, Some(text)) if text.len() <= 64 => Ok(text.into()),
        _ => Err(bad(format!("indent = {indent}; allowed up to 64 blanks"))),
    }
}

impl Writer {
    fn value(&mut self, state: &State, value: &Value) -> Result<(), Error> {
        // Shared parts can make a small value large on paper.
        if self.out.len() > MAX_OUTPUT {
            return Err(bad(format!("more than {MAX_OUTPUT} bytes")));
        }
        state.consume_fuel(1)?;
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked();
                self.container(state, ['[', ']'], items, |writer, item| {
                    writer.value(state, &item?)
                })?;
            }
            ValueKind::Map => self.map(state, value)?,
            kind => return Err(bad(format!("a value of kind {kind} is not JSON"))),
        }
        Ok(())
    }

    fn map(&mut self, state: &State, value: &Value) -> Result<(), Error> {
        let mut keys = value.try_iter()?.checked().collect::<Result<Vec<_>, _>>()?;
        if self.sort_keys {
            keys.sort();
        }
        self.container(state, ['{', '}'], keys.into_iter(), |writer, key| {
            match key.kind() {
                ValueKind::String => writer.string(key.as_str().unwrap_or_default()),
                ValueKind::None | ValueKind::Bool | ValueKind::Number => {
                    writer.out.push('"');
                    writer.value(state, &key)?;
                    writer.out.push('"');
                }
                kind => return Err(bad(format!("a key of kind {kind} is not JSON"))),
            }
            writer.out.push_str(&writer.key_separator.clone());
            writer.value(state, &value.get_item(&key)?)
        })
    }

    fn container<T>(
        &mut self,
        state: &State,
        [open, close]: [char; 2],
        items: impl Iterator<Item = T>,
        mut item: impl FnMut(&mut Writer, T) -> Result<(), Error>,
    ) -> Result<(), Error> {
        if self.depth == MAX_DEPTH {
            return Err(bad(format!("nested more than {MAX_DEPTH} times")));
        }
        self.depth += 1;
        self.out.push(open);
        let mut empty = true;
        for each in items {
            if !empty {
                self.out.push_str(&self.item_separator);
            }
            empty = false;
            self.line();
            state.consume_fuel(1)?;
            item(self, each)?;
        }
        self.depth -= 1;
        if !empty {
            self.line();
        }
        self.out.push(close);
        Ok(())
    }

    /// With an indentation, every item has its line.
    fn line(&mut self) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            (0..self.depth).for_each(|_| self.out.push_str(indent));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.out, "\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A number as Python's `repr` writes it.
fn number(value: &Value) -> String {
    if value.is_integer() {
        return value.to_string();
    }
    let Ok(x) = f64::try_from(value.clone()) else { return value.to_string() };
    if x.is_nan() {
        return "NaN".into();
    }
    if x.is_infinite() {
        return if x > 0.0 { "Infinity".into() } else { "-Infinity".into() };
    }
    // Rust's debug format switches to exponents where Python does, but writes them shorter.
    let text = format!("{x:?}");
    match text.split_once('e') {
        None => text,
        Some((digits, exponent)) => match exponent.strip_prefix('-') {
            Some(exponent) => format!("{digits}e-{exponent:0>2}"),
            None => format!("{digits}e+{exponent:0>2}"),
        },
    }
}
