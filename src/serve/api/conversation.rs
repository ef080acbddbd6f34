//! Messages of requests, and the tokens that the model's template makes of them.

use serde_json::{Map, Value, json};

use super::App;
use super::failure::{Answer, Failure};
use super::fields::{Fields, wrong};
use crate::error::excerpt;
use crate::serve::tools;
use crate::session::chat::{encode_rendered, template_context};
use crate::token::template::Context;

/// Most messages.
const MAX_MESSAGES: usize = 10_000;

/// What a template is given.
pub(super) struct Conversation {
    messages: Value,
    pub(super) tools: Option<Value>,
    /// More variables of the template.
    pub(super) extra: Map<String, Value>,
}

impl Conversation {
    /// Reads messages.
    pub(super) fn read(list: Vec<Value>) -> Answer<Conversation> {
        let name = "messages";
        if list.is_empty() || list.len() > MAX_MESSAGES {
            let text = format!("{name}: {}; allowed 1 to {MAX_MESSAGES}", list.len());
            return Err(Failure::field(name, text));
        }
        let one = |(i, value)| message(Fields::of(&format!("{name}[{i}]"), value)?);
        let messages = list.into_iter().enumerate().map(one).collect::<Answer<_>>()?;
        // Arguments of calls become objects.
        let messages = tools::messages(&Value::Array(messages));
        let messages = messages.map_err(|e| Failure::from(e).about(name))?;
        Ok(Conversation { messages, tools: None, extra: Map::new() })
    }

    /// The tokens of the whole, up to the beginning of a reply.
    pub(super) fn tokens(&self, app: &App) -> Answer<Vec<u32>> {
        let Some((template, _)) = &app.template else {
            return Err(Failure::field(
                "messages",
                "this model has no chat template; use /v1/completions, or start the server with --template",
            ));
        };
        let tokenizer = &app.model.tokenizer;
        let context = Context {
            tools: self.tools.clone(),
            extra: self.extra.clone(),
            ..template_context(tokenizer)
        };
        let text = template.render(&self.messages, &context);
        let text = text.map_err(|e| Failure::invalid(e.to_string()).about("messages"))?;
        Ok(encode_rendered(tokenizer, &text)?)
    }
}

/// A message as templates know it.
fn message(mut fields: Fields) -> Answer<Value> {
    let name = fields.name("role");
    let role = match fields.needed_text("role")?.as_str() {
        "developer" => "system".into(),
        role @ ("system" | "user" | "assistant" | "tool") => role.to_string(),
        role => {
            let text = format!(
                "{name} = \"{}\"; allowed system, developer, user, assistant, tool",
                excerpt(role)
            );
            return Err(Failure::field(name, text));
        }
    };
    let mut message = Map::new();
    let content = content(&mut fields)?;
    let calls = if role == "assistant" { calls(&mut fields)? } else { None };
    if content.is_none() && calls.is_none() {
        return Err(fields.missing("content"));
    }
    message.insert("role".into(), role.as_str().into());
    message.insert("content".into(), content.unwrap_or_default().into());
    if let Some(calls) = calls {
        message.insert("tool_calls".into(), calls);
    }
    if role == "tool" {
        let id = fields.needed_text("tool_call_id")?;
        message.insert("tool_call_id".into(), id.into());
    }
    for more in ["name", "reasoning_content"] {
        if let Some(text) = fields.text(more)? {
            message.insert(more.into(), text.into());
        }
    }
    // What clients send back of a reply.
    fields.end(&["refusal", "annotations"])?;
    Ok(Value::Object(message))
}

/// A text, or parts of one.
fn content(fields: &mut Fields) -> Answer<Option<String>> {
    let name = fields.name("content");
    let list = match fields.take("content") {
        None => return Ok(None),
        Some(Value::String(text)) => return Ok(Some(text)),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(&name, &other, "a string or an array of parts")),
    };
    let part = |(i, value)| {
        let mut part = Fields::of(&format!("{name}[{i}]"), value)?;
        let kind = part.needed_text("type")?;
        if kind != "text" {
            let name = part.name("type");
            let text = format!("{name} = \"{}\"; allowed text", excerpt(&kind));
            return Err(Failure::field(name, text));
        }
        let text = part.needed_text("text")?;
        part.end(&[]).map(|()| text)
    };
    let parts: Vec<String> = list.into_iter().enumerate().map(part).collect::<Answer<_>>()?;
    Ok(Some(parts.join("\n")))
}

/// Calls that an earlier reply made.
fn calls(fields: &mut Fields) -> Answer<Option<Value>> {
    let name = fields.name("tool_calls");
    let Some(list) = fields.list("tool_calls")? else { return Ok(None) };
    let call = |(i, value)| {
        let mut call = Fields::of(&format!("{name}[{i}]"), value)?;
        let id = call.needed_text("id")?;
        call.text("type")?;
        let mut function = call.object("function")?.ok_or_else(|| call.missing("function"))?;
        let called = function.needed_text("name")?;
        let arguments = function.needed_text("arguments")?;
        function.end(&[])?;
        call.end(&["index"])?;
        let function = json!({"name": called, "arguments": arguments});
        Ok(json!({"id": id, "type": "function", "function": function}))
    };
    let calls: Vec<Value> = list.into_iter().enumerate().map(call).collect::<Answer<_>>()?;
    Ok((!calls.is_empty()).then_some(Value::Array(calls)))
}
