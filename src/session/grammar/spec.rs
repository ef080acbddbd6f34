//! What a text can be asked to follow, and that in the engine's terms.

use std::fmt::Write;

use llguidance::api::TopLevelGrammar;
use serde_json::{Value, json};

use super::gbnf::Rules;
use super::lark;
use super::lexemes::Lexemes;
use crate::bad_usage;
use crate::error::Result;

/// Largest JSON schema, in values.
const MAX_VALUES: usize = 20_000;
/// Longest names and texts of a JSON schema together, in bytes.
const MAX_BYTES: usize = 256 << 10;
/// Most names in one object of a JSON schema: the engine's time grows with their square.
const MAX_NAMES: usize = 1_000;
/// Values in each other in a JSON schema at most.
const MAX_DEPTH: usize = 100;
/// White space between the tokens of JSON: a blank, or a new line with its indentation, as people write
/// it. A model that likes blanks must come to an end.
const WHITE_SPACE: &str = r"\x20|\x0A[\x20\x09]{0,20}";

/// What a text must follow.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under a schema. `oneOf` counts as `anyOf`; what else cannot be kept is
    /// refused, and so are references to other documents.
    JsonSchema(Value),
    /// A grammar in llama.cpp's notation.
    Gbnf(String),
    /// These one after the other.
    Parts(Vec<Part>),
}

/// A part of a text.
#[derive(Debug, Clone, PartialEq)]
pub enum Part {
    /// This text.
    Text(String),
    /// The control token of this name, or the name as text in a vocabulary that has no such token.
    Control(String),
    /// JSON that is valid under a schema.
    Json(Value),
    /// One of these sequences.
    OneOf(Vec<Vec<Part>>),
    /// A sequence, once or several times, with another between.
    OneOrMore(Vec<Part>, Vec<Part>),
}

impl Spec {
    /// Refuses JSON schemas that are too large.
    pub(super) fn check(&self) -> Result<()> {
        match self {
            Spec::JsonObject | Spec::Gbnf(_) => Ok(()),
            Spec::JsonSchema(schema) => check_size(schema),
            Spec::Parts(parts) => parts.iter().try_for_each(Part::check),
        }
    }

    /// The grammar of the engine. `control`: the id of a control token.
    pub(super) fn compile(&self, control: &dyn Fn(&str) -> Option<u32>) -> Result<TopLevelGrammar> {
        Ok(match self {
            Spec::JsonObject => TopLevelGrammar::from_json_schema(object()),
            Spec::JsonSchema(schema) => TopLevelGrammar::from_json_schema(prepared(schema)?),
            Spec::Gbnf(text) => {
                let lexemes = Lexemes::cut(Rules::parse(text)?)?;
                TopLevelGrammar::from_lark(lark::write(&lexemes))
            }
            Spec::Parts(parts) => {
                let mut writer = Writer { control, text: String::new(), n: 0 };
                let start = writer.sequence(parts)?;
                TopLevelGrammar::from_lark(format!("start: {start}\n{}", writer.text))
            }
        })
    }
}

impl Part {
    fn check(&self) -> Result<()> {
        match self {
            Part::Text(_) | Part::Control(_) => Ok(()),
            Part::Json(schema) => check_size(schema),
            Part::OneOf(options) => options.iter().flatten().try_for_each(Part::check),
            Part::OneOrMore(item, between) => item.iter().chain(between).try_for_each(Part::check),
        }
    }
}

/// Writes parts in the engine's notation, each sequence with a name of its own.
struct Writer<'a> {
    control: &'a dyn Fn(&str) -> Option<u32>,
    text: String,
    n: usize,
}

impl Writer<'_> {
    /// A rule with this body; its name.
    fn rule(&mut self, body: &str) -> String {
        self.n += 1;
        // Writing to a string cannot fail.
        let _ = writeln!(self.text, "r{}: {body}", self.n);
        format!("r{}", self.n)
    }

    fn sequence(&mut self, parts: &[Part]) -> Result<String> {
        let mut items = Vec::new();
        let mut text = String::new();
        for part in parts {
            let item = match part {
                // Texts beside each other are one, so that none is taken for a longer one.
                Part::Text(more) => {
                    text.push_str(more);
                    continue;
                }
                Part::Control(name) => match (self.control)(name) {
                    Some(id) => format!("<[{id}]>"),
                    None => {
                        text.push_str(name);
                        continue;
                    }
                },
                Part::Json(schema) => format!("%json {}", prepared(schema)?),
                Part::OneOf(options) => {
                    let names = options.iter().map(|parts| self.sequence(parts));
                    let names = names.collect::<Result<Vec<_>>>()?;
                    self.rule(&names.join(" | "))
                }
                Part::OneOrMore(item, between) => {
                    let (item, between) = (self.sequence(item)?, self.sequence(between)?);
                    let more = self.rule(&format!("{between} {item}"));
                    self.rule(&format!("{item} {more}*"))
                }
            };
            items.extend(literal(&mut text));
            items.push(item);
        }
        items.extend(literal(&mut text));
        let body = if items.is_empty() { "\"\"".into() } else { items.join(" ") };
        Ok(self.rule(&body))
    }
}

/// The text that was gathered as a literal, if there is any.
fn literal(text: &mut String) -> Option<String> {
    let text = std::mem::take(text);
    (!text.is_empty()).then(|| {
        let code = |c: char| format!("\\x{{{:X}}}", u32::from(c));
        format!("/{}/", text.chars().map(code).collect::<String>())
    })
}

/// The schema of any object.
fn object() -> Value {
    json!({"type": "object", "x-guidance": options()})
}

fn options() -> Value {
    json!({
        "whitespace_pattern": WHITE_SPACE,
        "coerce_one_of": true,
        "json_allow_general_unicode_escapes": true,
    })
}

/// A schema with the options of the engine, which a schema may not choose.
fn prepared(schema: &Value) -> Result<Value> {
    let mut schema = match schema {
        Value::Object(fields) => fields.clone(),
        Value::Bool(true) => serde_json::Map::new(),
        _ => bad_usage!("JSON schema: it is no object"),
    };
    schema.insert("x-guidance".into(), options());
    Ok(Value::Object(schema))
}

fn check_size(schema: &Value) -> Result<()> {
    let (mut n_values, mut n_bytes) = (0, 0);
    let mut open = vec![(schema, 1)];
    while let Some((value, depth)) = open.pop() {
        n_values += 1;
        if depth > MAX_DEPTH {
            bad_usage!("JSON schema: more than {MAX_DEPTH} values in each other");
        }
        match value {
            Value::Array(items) => open.extend(items.iter().map(|item| (item, depth + 1))),
            Value::Object(fields) => {
                if fields.len() > MAX_NAMES {
                    let n = fields.len();
                    bad_usage!("JSON schema: an object with {n} names; allowed {MAX_NAMES}");
                }
                n_bytes += fields.keys().map(String::len).sum::<usize>();
                open.extend(fields.values().map(|field| (field, depth + 1)));
            }
            Value::String(text) => n_bytes += text.len(),
            _ => {}
        }
        if n_values > MAX_VALUES || n_bytes > MAX_BYTES {
            bad_usage!("JSON schema: more than {MAX_VALUES} values or {MAX_BYTES} bytes of text");
        }
    }
    Ok(())
}
