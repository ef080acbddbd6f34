//! Tools of a chat, and calls of them in replies.

use serde::Serialize;
use serde_json::{Value, json};

use super::App;
use super::conversation::Conversation;
use super::failure::{Answer, Failure};
use super::fields::Fields;
use super::texts::Reason;
use super::wanted::Wanted;
use crate::serve::tools::{Choice, Event, Format, Reply, Tool, tools};
use crate::session::sampler::random_seed;

/// What calls in a reply look like.
pub(super) struct Calls {
    format: Format,
    tools: Vec<Tool>,
    /// Whether there may be several.
    parallel: bool,
}

/// Reads the tools of a request, tells the template of them, and has a call written if one is forced.
pub(super) fn calls(
    fields: &mut Fields,
    app: &App,
    conversation: &mut Conversation,
    wanted: &mut Wanted,
) -> Answer<Option<Calls>> {
    let list = fields.list("tools")?.map(Value::Array);
    let choice = fields.take("tool_choice").unwrap_or_default();
    let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
    let about = |name: &'static str| move |e| Failure::from(e).about(name);
    let read = list.as_ref().map_or(Ok(Vec::new()), tools).map_err(about("tools"))?;
    let choice = Choice::read(&choice, &read).map_err(about("tool_choice"))?;
    let (Some((_, source)), false) = (&app.template, choice == Choice::None || read.is_empty())
    else {
        return Ok(None);
    };
    if wanted.grammar.is_some() {
        let text = "tools: a reply that has a grammar or a response_format has no calls; \"tool_choice\": \"none\" allows it";
        return Err(Failure::field("tools", text));
    }
    let format = Format::of(source).map_err(about("tools"))?;
    wanted.grammar = choice.spec(&format, &read, parallel);
    conversation.tools = list;
    Ok(Some(Calls { format, tools: read, parallel }))
}

impl Calls {
    /// Control tokens that must be seen in a reply.
    pub(super) fn controls(&self, app: &App) -> Vec<u32> {
        let tokenizer = &app.model.tokenizer;
        let id = |name: &str| match tokenizer.encode(name, false, true).ok()?[..] {
            [id] => Some(id),
            _ => None,
        };
        self.format.controls().into_iter().filter_map(id).collect()
    }

    /// A reply that begins.
    pub(super) fn written(&self) -> Written {
        let reply = Reply::new(self.format, &self.tools);
        Written { reply, parallel: self.parallel, has_calls: false }
    }
}

/// A reply as far as it was written.
pub(super) struct Written {
    reply: Reply,
    parallel: bool,
    has_calls: bool,
}

impl Written {
    /// What is found in more text.
    pub(super) fn push(&mut self, text: &str) -> Vec<Event> {
        let events = self.reply.push(text);
        self.wanted(events)
    }

    /// What is found when no more text comes.
    pub(super) fn finish(&mut self) -> Vec<Event> {
        let events = self.reply.finish();
        self.wanted(events)
    }

    /// Leaves out calls behind the first, if only one is wanted.
    fn wanted(&mut self, mut events: Vec<Event>) -> Vec<Event> {
        let parallel = self.parallel;
        events.retain(|event| match event {
            Event::Content(text) => !text.is_empty(),
            Event::Begin { index, .. } | Event::Arguments { index, .. } | Event::End { index } => {
                parallel || *index == 0
            }
        });
        self.has_calls |= events.iter().any(|event| matches!(event, Event::Begin { .. }));
        events
    }

    /// Why the reply ended, if it ended so.
    pub(super) fn reason(&self, reason: Reason) -> Reason {
        match reason {
            Reason::Stop if self.has_calls => Reason::ToolCalls,
            reason => reason,
        }
    }

    /// The message that a whole reply is.
    pub(super) fn message(mut self, text: &str, reason: Option<Reason>) -> (Value, Option<Reason>) {
        let mut events = self.push(text);
        events.extend(self.finish());
        let (mut content, mut calls) = (String::new(), Vec::<(String, String)>::new());
        for event in events {
            match event {
                Event::Content(text) => content += &text,
                Event::Begin { name, .. } => calls.push((name, String::new())),
                Event::Arguments { text, .. } => {
                    if let Some((_, arguments)) = calls.last_mut() {
                        *arguments += &text;
                    }
                }
                Event::End { .. } => {}
            }
        }
        let call = |(name, arguments): (String, String)| {
            let function = json!({"name": name, "arguments": arguments});
            json!({"id": id(), "type": "function", "function": function})
        };
        let mut message = json!({"role": "assistant", "content": content, "refusal": null});
        if !calls.is_empty() {
            if content.trim().is_empty() {
                message["content"] = Value::Null;
            }
            message["tool_calls"] = calls.into_iter().map(call).collect();
        }
        (message, reason.map(|reason| self.reason(reason)))
    }
}

/// A name for a call.
fn id() -> String {
    format!("call_{:016x}", random_seed())
}

/// A part of a call in a stream.
#[derive(Serialize)]
pub(super) struct CallDelta<'a> {
    index: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    function: FunctionDelta<'a>,
}

#[derive(Serialize)]
struct FunctionDelta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<&'a str>,
    arguments: &'a str,
}

impl CallDelta<'_> {
    /// What is told of this, if anything.
    pub(super) fn of(event: &Event) -> Option<CallDelta<'_>> {
        match event {
            Event::Begin { index, name } => Some(CallDelta {
                index: *index,
                id: Some(id()),
                r#type: Some("function"),
                function: FunctionDelta { name: Some(name), arguments: "" },
            }),
            Event::Arguments { index, text } => Some(CallDelta {
                index: *index,
                id: None,
                r#type: None,
                function: FunctionDelta { name: None, arguments: text },
            }),
            Event::Content(_) | Event::End { .. } => None,
        }
    }
}
