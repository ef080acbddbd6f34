//! Tool calls: how a model's template has it write them, making it write one, and telling them
//! from the rest of a reply.
//!
//! A format is one entry of [`FORMATS`]. Which one a model was trained on is in its template alone,
//! which writes calls of earlier turns, or says in the system prompt how to write them.

mod reply;

pub use reply::{Event, Reply};

use serde_json::{Map, Value, json};

use crate::bad_usage;
use crate::error::{Error, Result, excerpt};
use crate::session::grammar::{Part, Spec};

/// Longest name of a function, as in OpenAI's interface.
const MAX_NAME: usize = 64;

/// How a model writes calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    /// A name for it, for messages.
    pub name: &'static str,
    /// All of these are in the templates that use it.
    marks: &'static [&'static str],
    /// None of these is.
    others: &'static [&'static str],
    /// What calls begin with; nothing if they are the whole reply.
    open: &'static str,
    /// What may stand before calls that are the whole reply.
    optional: &'static str,
    shape: Shape,
    /// What calls end with.
    close: &'static str,
}

/// How the parts of a call stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// A JSON object with the name and the arguments under these keys.
    Object(&'static str, &'static str),
    /// An array of such objects.
    List(&'static str, &'static str),
    /// The name, this, and the arguments.
    Named(&'static str),
}

/// Every format that is known; the first whose marks are there counts.
pub static FORMATS: &[Format] = &[
    Format {
        name: "hermes",
        marks: &["<tool_call>", "arguments"],
        others: &["<arg_key>", "<function="],
        open: "<tool_call>",
        optional: "",
        shape: Shape::Object("name", "arguments"),
        close: "</tool_call>",
    },
    Format {
        name: "mistral-args",
        marks: &["[TOOL_CALLS]", "[ARGS]"],
        others: &[],
        open: "[TOOL_CALLS]",
        optional: "",
        shape: Shape::Named("[ARGS]"),
        close: "",
    },
    Format {
        name: "mistral",
        marks: &["[TOOL_CALLS]"],
        others: &[],
        open: "[TOOL_CALLS]",
        optional: "",
        shape: Shape::List("name", "arguments"),
        close: "",
    },
    Format {
        name: "granite",
        marks: &["<|tool_call|>", "JSON list"],
        others: &[],
        open: "<|tool_call|>",
        optional: "",
        shape: Shape::List("name", "arguments"),
        close: "",
    },
    Format {
        name: "command-r7b",
        marks: &["<|START_ACTION|>", "\"tool_name\"", "\"parameters\""],
        others: &[],
        open: "<|START_ACTION|>",
        optional: "",
        shape: Shape::List("tool_name", "parameters"),
        close: "<|END_ACTION|>",
    },
    Format {
        name: "llama3",
        marks: &["{\"name\": ", "\"parameters\": "],
        others: &["<tool_call>"],
        open: "",
        optional: "<|python_tag|>",
        shape: Shape::Object("name", "parameters"),
        close: "",
    },
];

impl Format {
    /// The format that a template, by its source, has a model write calls in.
    ///
    /// # Errors
    ///
    /// The template tells the model of no tools, or its format is none of [`FORMATS`].
    pub fn of(template: &str) -> Result<Format> {
        if !names_tools(template) {
            bad_usage!("tools: the model's chat template has no tools");
        }
        let has = |text: &&str| template.contains(*text);
        let fits = |f: &&Format| f.marks.iter().all(has) && !f.others.iter().any(has);
        match FORMATS.iter().find(fits) {
            Some(format) => Ok(*format),
            None => {
                let known: Vec<_> = FORMATS.iter().map(|f| f.name).collect();
                bad_usage!(
                    "tools: the format of calls in the model's chat template is not known; known: {}",
                    known.join(", ")
                )
            }
        }
    }

    /// Control tokens whose names must be seen as text in a reply for calls to be found in it.
    pub fn controls(&self) -> Vec<&'static str> {
        let middle = if let Shape::Named(middle) = self.shape { middle } else { "" };
        let mut all = vec![self.open, self.optional, middle, self.close];
        all.retain(|name| !name.is_empty());
        all
    }

    /// Whether a reply may have more than one call.
    pub fn is_parallel(&self) -> bool {
        !self.open.is_empty()
    }

    /// What a reply must follow that is a call, or several if `parallel` and the format has them,
    /// of these tools.
    pub fn spec(&self, tools: &[Tool], parallel: bool) -> Spec {
        let calls = Part::OneOf(tools.iter().map(|tool| self.call(tool)).collect());
        let several = |between: Vec<Part>| match parallel && self.is_parallel() {
            true => Part::OneOrMore(vec![calls.clone()], between),
            false => calls.clone(),
        };
        let text = |text: &str| Part::Text(text.into());
        Spec::Parts(match self.shape {
            Shape::List(..) => {
                let mut parts =
                    vec![Part::Control(self.open.into()), text("["), several(vec![text(", ")])];
                parts.push(text("]"));
                parts.push(Part::Control(self.close.into()));
                parts
            }
            Shape::Object(..) if self.close.is_empty() => vec![calls],
            Shape::Object(..) => vec![several(vec![text("\n")])],
            Shape::Named(_) => vec![several(Vec::new())],
        })
    }

    /// A call of this tool.
    fn call(&self, tool: &Tool) -> Vec<Part> {
        let text = |text: String| Part::Text(text);
        let arguments = Part::Json(tool.parameters.clone());
        let object = |name: &str, arguments_key: &str| {
            text(format!("{{\"{name}\": \"{}\", \"{arguments_key}\": ", tool.name))
        };
        match self.shape {
            Shape::Named(middle) => vec![
                Part::Control(self.open.into()),
                text(tool.name.clone()),
                Part::Control(middle.into()),
                arguments,
            ],
            Shape::List(name, key) => vec![object(name, key), arguments, text("}".into())],
            Shape::Object(name, key) if self.close.is_empty() => {
                vec![object(name, key), arguments, text("}".into())]
            }
            Shape::Object(name, key) => vec![
                Part::Control(self.open.into()),
                text("\n".into()),
                object(name, key),
                arguments,
                text("}\n".into()),
                Part::Control(self.close.into()),
            ],
        }
    }
}

/// Whether a template uses the variable that tools are in, outside of comments and texts.
fn names_tools(template: &str) -> bool {
    let mut rest = template;
    while let Some(start) = rest.find('{') {
        let tag = &rest[start..];
        let (open, close) = match tag.as_bytes().get(1) {
            Some(b'%') => ("{%", "%}"),
            Some(b'{') => ("{{", "}}"),
            Some(b'#') => ("{#", "#}"),
            _ => {
                rest = &tag[1..];
                continue;
            }
        };
        let end = tag.find(close).map_or(tag.len(), |at| at + close.len());
        let word = |c: char| c.is_alphanumeric() || c == '_' || c == '.';
        // Loops over tools, and conditions on them, are statements.
        if open == "{%" && tag[..end].split(|c| !word(c)).any(|w| w == "tools") {
            return true;
        }
        rest = &tag[end..];
    }
    false
}

/// A function that a model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments, an object.
    pub parameters: Value,
}

/// Reads the `tools` of a request in OpenAI's form, `[{"type": "function", "function": {..}}]`.
///
/// A function that lists its arguments and does not say that there may be others has no others.
pub fn tools(list: &Value) -> Result<Vec<Tool>> {
    let Value::Array(list) = list else { bad_usage!("tools: expected an array") };
    list.iter().enumerate().map(|(i, tool)| read_tool(i, tool)).collect()
}

fn read_tool(i: usize, tool: &Value) -> Result<Tool> {
    if tool["type"] != "function" {
        bad_usage!("tools[{i}]: expected the type \"function\"");
    }
    let function = &tool["function"];
    let Some(name) = function["name"].as_str() else {
        bad_usage!("tools[{i}].function.name: expected a string");
    };
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(allowed) {
        bad_usage!(
            "tools[{i}].function.name = \"{}\"; allowed 1 to {MAX_NAME} of a-z A-Z 0-9 _ -",
            excerpt(name)
        );
    }
    let mut parameters = match &function["parameters"] {
        Value::Null => Map::from_iter([("properties".to_string(), json!({}))]),
        Value::Object(schema) => schema.clone(),
        _ => bad_usage!("tools[{i}].function.parameters: expected a JSON schema, an object"),
    };
    if parameters.contains_key("properties") {
        parameters.entry("additionalProperties").or_insert(Value::Bool(false));
    }
    // Formats have objects only.
    if !["$ref", "anyOf", "oneOf", "allOf"].iter().any(|key| parameters.contains_key(*key)) {
        parameters.insert("type".into(), "object".into());
    }
    Ok(Tool { name: name.into(), parameters: Value::Object(parameters) })
}

/// Which calls a request asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Choice {
    /// None; tools are not even told.
    None,
    /// If the model wants.
    Auto,
    /// At least one.
    Required,
    /// Of this function.
    Function(String),
}

impl Choice {
    /// Reads the `tool_choice` of a request; null, if it has none. `tools`: those that there are.
    pub fn read(choice: &Value, tools: &[Tool]) -> Result<Choice> {
        let choice = match choice {
            Value::Null if tools.is_empty() => Choice::None,
            Value::Null => Choice::Auto,
            Value::String(text) => match text.as_str() {
                "none" => Choice::None,
                "auto" => Choice::Auto,
                "required" => Choice::Required,
                other => bad_usage!(
                    "tool_choice = \"{}\"; allowed none, auto, required, or a function",
                    excerpt(other)
                ),
            },
            choice => match choice["function"]["name"].as_str() {
                Some(name) => Choice::Function(name.into()),
                None => bad_usage!("tool_choice.function.name: expected a string"),
            },
        };
        match &choice {
            Choice::Required if tools.is_empty() => bad_usage!("tool_choice: there are no tools"),
            Choice::Function(name) if !tools.iter().any(|t| t.name == *name) => {
                bad_usage!("tool_choice: there is no tool \"{}\"", excerpt(name))
            }
            _ => Ok(choice),
        }
    }

    /// What a reply must follow, if this forces a call.
    pub fn spec(&self, format: &Format, tools: &[Tool], parallel: bool) -> Option<Spec> {
        match self {
            Choice::None | Choice::Auto => None,
            Choice::Required => Some(format.spec(tools, parallel)),
            Choice::Function(name) => {
                let tools: Vec<Tool> = tools.iter().filter(|t| t.name == *name).cloned().collect();
                Some(format.spec(&tools, false))
            }
        }
    }
}

/// Messages in OpenAI's form as templates expect them: contents are texts, arguments of calls are
/// objects, and results say which function they are of.
pub fn messages(messages: &Value) -> Result<Value> {
    let Value::Array(messages) = messages else { bad_usage!("messages: expected an array") };
    let mut names: Map<String, Value> = Map::new();
    let mut result = Vec::new();
    for (i, message) in messages.iter().enumerate() {
        let Value::Object(message) = message else {
            bad_usage!("messages[{i}]: expected an object");
        };
        let mut message = message.clone();
        let content = content(message.get("content"), i)?;
        message.insert("content".into(), content.into());
        if let Some(calls) = message.remove("tool_calls") {
            let calls = read_calls(&calls, i, &mut names)?;
            // To some templates a message that has the key is a call.
            if !calls.is_empty() {
                message.insert("tool_calls".into(), calls.into());
            }
        }
        let id = message.get("tool_call_id").and_then(Value::as_str);
        if let Some(name) = id.and_then(|id| names.get(id)).cloned() {
            message.entry("name").or_insert(name);
        }
        result.push(Value::Object(message));
    }
    Ok(Value::Array(result))
}

/// A content as text: itself, all of its parts, or nothing.
fn content(content: Option<&Value>, i: usize) -> Result<String> {
    match content {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            let text = |(k, part): (usize, &Value)| match (&part["type"], &part["text"]) {
                (Value::String(kind), Value::String(text)) if kind == "text" => Ok(text.clone()),
                _ => bad_usage!("messages[{i}].content[{k}]: expected a text"),
            };
            parts.iter().enumerate().map(text).collect()
        }
        Some(_) => bad_usage!("messages[{i}].content: expected a string or an array"),
    }
}

/// The calls of a message with their arguments as objects; `names`: of functions, by id of call.
fn read_calls(calls: &Value, i: usize, names: &mut Map<String, Value>) -> Result<Vec<Value>> {
    let calls = match calls {
        Value::Null => return Ok(Vec::new()),
        Value::Array(calls) => calls,
        _ => bad_usage!("messages[{i}].tool_calls: expected an array"),
    };
    let mut result = Vec::new();
    for (k, call) in calls.iter().enumerate() {
        let place = || format!("messages[{i}].tool_calls[{k}].function");
        let mut call = call.clone();
        let Some(Value::Object(function)) = call.get_mut("function") else {
            bad_usage!("{}: expected an object", place());
        };
        let Some(name @ Value::String(_)) = function.get("name").cloned() else {
            bad_usage!("{}.name: expected a string", place());
        };
        let arguments = match function.get("arguments") {
            Some(Value::Object(arguments)) => Some(arguments.clone()),
            Some(Value::String(text)) if text.trim().is_empty() => Some(Map::new()),
            Some(Value::String(text)) => serde_json::from_str(text).ok(),
            None | Some(Value::Null) => Some(Map::new()),
            Some(_) => None,
        };
        let arguments = arguments.ok_or_else(|| {
            Error::Usage(format!("{}.arguments: expected a JSON object as a string", place()))
        })?;
        function.insert("arguments".into(), Value::Object(arguments));
        if let Some(id) = call["id"].as_str() {
            names.insert(id.into(), name);
        }
        result.push(call);
    }
    Ok(result)
}
