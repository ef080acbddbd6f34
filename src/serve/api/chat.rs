//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::App;
use super::calls::{CallDelta, Calls, Written, calls};
use super::conversation::Conversation;
use super::failure::{Answer, Failure, answer};
use super::fields::{Fields, wrong};
use super::reply::{Head, Timings, Total, Usage, Whole, chat_logprobs, collect};
use super::stream::{Shape, event, response};
use super::texts::{Chosen, Cost, News, Reason, Texts};
use super::wanted::{Extent, MAX_TOP, Wanted};
use crate::error::excerpt;
use crate::serve::job::Generation;
use crate::serve::tools::Event;
use crate::session::grammar::Spec;

/// Fields that change nothing of a reply.
const IGNORED: &[&str] = &[
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
];

/// A request, checked.
struct Ready {
    wanted: Wanted,
    generations: Vec<Generation>,
    n_prompt: usize,
    calls: Option<Calls>,
}

/// Answers a request.
pub(super) async fn run(app: Arc<App>, fields: Fields) -> Answer<Response<Body>> {
    let Ready { wanted, generations, n_prompt, calls } =
        app.prepare(move |app| Ready::new(fields, app)).await?;
    let n = wanted.n;
    let head = Head::new("chatcmpl", &app, &wanted.names);
    let mut total = Total::new(n, n_prompt);
    let controls = calls.as_ref().map_or(Vec::new(), |calls| calls.controls(&app));
    let texts = Texts::new(&app, generations, wanted.stops, controls)?;
    let written = (0..n).map(|_| calls.as_ref().map(Calls::written)).collect();
    if wanted.stream {
        let include_usage = wanted.include_usage;
        let chunks = Chunks { app: app.clone(), head, written, include_usage };
        return Ok(response(texts, chunks, total));
    }
    let all = collect(texts, n, &mut total).await?;
    Ok(answer(StatusCode::OK, &whole(&app, &head, (all, written), &total)))
}

impl Ready {
    fn new(mut fields: Fields, app: &Arc<App>) -> Answer<Ready> {
        app.model.hparams.must_predict()?;
        let messages = fields.list("messages")?.ok_or_else(|| fields.missing("messages"))?;
        let mut conversation = Conversation::read(messages)?;
        let mut wanted = Wanted::read(&mut fields, app)?;
        let extent = Extent {
            max_tokens: max_tokens(&mut fields)?,
            logprobs: logprobs(&mut fields)?,
            prompt_logprobs: false,
        };
        if let Some(format) = response_format(&mut fields)? {
            if wanted.grammar.is_some() {
                let text = "response_format and grammar: one of them";
                return Err(Failure::field("response_format", text));
            }
            wanted.grammar = Some(format);
        }
        conversation.extra = extra(&mut fields)?;
        let calls = calls(&mut fields, app, &mut conversation, &mut wanted)?;
        modalities(&mut fields)?;
        fields.end(IGNORED)?;
        let prompt = conversation.tokens(app)?;
        let n_prompt = prompt.len();
        let generations = wanted.generations(app, &[prompt], extent)?;
        Ok(Ready { wanted, generations, n_prompt, calls })
    }
}

/// The limit on a reply, by its new name or its old one.
fn max_tokens(fields: &mut Fields) -> Answer<Option<usize>> {
    let [new, old] = ["max_completion_tokens", "max_tokens"];
    let (new, old) = (fields.whole(new, 1..=usize::MAX)?, fields.whole(old, 1..=usize::MAX)?);
    match (new, old) {
        (Some(new), Some(old)) if new != old => Err(Failure::field(
            "max_tokens",
            format!("max_tokens = {old}, max_completion_tokens = {new}; they mean the same"),
        )),
        (new, old) => Ok(new.or(old)),
    }
}

fn logprobs(fields: &mut Fields) -> Answer<Option<usize>> {
    let wants = fields.flag("logprobs")?.unwrap_or(false);
    match fields.whole("top_logprobs", 0..=MAX_TOP)? {
        Some(_) if !wants => {
            Err(Failure::field("top_logprobs", "top_logprobs without \"logprobs\": true"))
        }
        n_top => Ok(wants.then_some(n_top.unwrap_or(0))),
    }
}

fn response_format(fields: &mut Fields) -> Answer<Option<Spec>> {
    let Some(mut format) = fields.object("response_format")? else { return Ok(None) };
    let spec = match format.needed_text("type")?.as_str() {
        "text" => None,
        "json_object" => Some(Spec::JsonObject),
        "json_schema" => {
            let named = format.object("json_schema")?;
            let mut named = named.ok_or_else(|| format.missing("json_schema"))?;
            let schema = named.take("schema").ok_or_else(|| named.missing("schema"))?;
            if !(schema.is_object() || schema.is_boolean()) {
                return Err(wrong(&named.name("schema"), &schema, "an object"));
            }
            // A schema is always kept to, strict or not.
            named.end(&["name", "description", "strict"])?;
            Some(Spec::JsonSchema(schema))
        }
        other => {
            let name = format.name("type");
            let text =
                format!("{name} = \"{}\"; allowed text, json_object, json_schema", excerpt(other));
            return Err(Failure::field(name, text));
        }
    };
    format.end(&[])?;
    Ok(spec)
}

/// More variables for the template.
fn extra(fields: &mut Fields) -> Answer<Map<String, Value>> {
    let mut extra = match fields.object("chat_template_kwargs")? {
        Some(object) => object.into_map(),
        None => Map::new(),
    };
    for name in ["messages", "tools"] {
        if extra.contains_key(name) {
            let text = format!("chat_template_kwargs.{name}: it has a field of its own");
            return Err(Failure::field("chat_template_kwargs", text));
        }
    }
    if let Some(effort) = fields.text("reasoning_effort")? {
        extra.insert("reasoning_effort".into(), effort.into());
    }
    Ok(extra)
}

/// Text is all there is.
fn modalities(fields: &mut Fields) -> Answer<()> {
    let name = "modalities";
    match fields.list(name)? {
        Some(list) if list != [json!("text")] => {
            Err(Failure::field(name, "modalities: allowed [\"text\"]"))
        }
        _ => Ok(()),
    }
}

fn whole(
    app: &App,
    head: &Head,
    (all, written): (Vec<Whole>, Vec<Option<Written>>),
    total: &Total,
) -> Value {
    let choice = |(index, (whole, written)): (usize, (Whole, Option<Written>))| {
        let logprobs = match whole.tokens.is_empty() {
            true => Value::Null,
            false => chat_logprobs(&app.model.tokenizer, &whole.tokens),
        };
        let Whole { text, reason, .. } = whole;
        let (message, reason) = match written {
            Some(written) => written.message(&text, reason),
            None => (json!({"role": "assistant", "content": text, "refusal": null}), reason),
        };
        json!({
            "index": index, "message": message, "logprobs": logprobs, "finish_reason": reason,
        })
    };
    json!({
        "id": head.id,
        "object": "chat.completion",
        "created": head.created,
        "model": head.model,
        "system_fingerprint": head.fingerprint,
        "choices": all.into_iter().zip(written).enumerate().map(choice).collect::<Vec<_>>(),
        "usage": total.usage(),
        "timings": total.timings(),
    })
}

/// The parts of a streamed reply.
struct Chunks {
    app: Arc<App>,
    head: Head,
    /// Of each reply, if there are tools.
    written: Vec<Option<Written>>,
    include_usage: bool,
}

#[derive(Serialize)]
struct Choice<'a> {
    index: usize,
    delta: Delta<'a>,
    logprobs: Option<Value>,
    finish_reason: Option<Reason>,
}

#[derive(Default, Serialize)]
struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tool_calls: Option<[CallDelta<'a>; 1]>,
}

impl Chunks {
    fn write(
        &self,
        choices: &[Choice],
        (usage, timings): (Option<Usage>, Option<Timings>),
        out: &mut Vec<u8>,
    ) {
        let usage = self.include_usage.then_some(usage);
        event(&self.head.chunk("chat.completion.chunk", choices, usage, timings), out);
    }

    fn one(&self, index: usize, delta: Delta, tokens: &[Chosen], out: &mut Vec<u8>) {
        let logprobs =
            (!tokens.is_empty()).then(|| chat_logprobs(&self.app.model.tokenizer, tokens));
        let choice = Choice { index, delta, logprobs, finish_reason: None };
        self.write(&[choice], (None, None), out);
    }

    /// Writes more of a reply, `text` or what is found in it; the probabilities go with the first part.
    fn more(&mut self, index: usize, text: &str, tokens: &[Chosen], out: &mut Vec<u8>) {
        let content = |text| Delta { content: Some(text), ..Delta::default() };
        let events = match self.written.get_mut(index).and_then(Option::as_mut) {
            Some(written) => written.push(text),
            None if text.is_empty() && tokens.is_empty() => return,
            None => return self.one(index, content(text), tokens, out),
        };
        self.found(index, &events, tokens, out);
    }

    fn found(&self, index: usize, events: &[Event], tokens: &[Chosen], out: &mut Vec<u8>) {
        let mut tokens = tokens;
        for event in events {
            let delta = match event {
                Event::Content(text) => Delta { content: Some(text), ..Delta::default() },
                event => match CallDelta::of(event) {
                    Some(call) => Delta { tool_calls: Some([call]), ..Delta::default() },
                    None => continue,
                },
            };
            self.one(index, delta, std::mem::take(&mut tokens), out);
        }
        if !tokens.is_empty() {
            self.one(index, Delta::default(), tokens, out);
        }
    }

    fn end(&mut self, index: usize, reason: Reason, cost: &Cost, out: &mut Vec<u8>) {
        let mut reason = reason;
        if let Some(written) = self.written.get_mut(index).and_then(Option::as_mut) {
            let events = written.finish();
            reason = written.reason(reason);
            self.found(index, &events, &[], out);
        }
        let (delta, finish_reason) = (Delta::default(), Some(reason));
        let choice = Choice { index, delta, logprobs: None, finish_reason };
        self.write(&[choice], (None, Some(Timings::from(cost))), out);
    }
}

impl Shape for Chunks {
    fn news(&mut self, index: usize, news: News, out: &mut Vec<u8>) {
        match news {
            News::Started => {
                let (role, content) = (Some("assistant"), Some(""));
                self.one(index, Delta { role, content, tool_calls: None }, &[], out);
            }
            News::Prompt(_) => {}
            News::More(text, tokens) => self.more(index, &text, &tokens, out),
            News::Ended(text, tokens, reason, cost) => {
                self.more(index, &text, &tokens, out);
                self.end(index, reason, &cost, out);
            }
        }
    }

    fn last(&mut self, total: &Total, out: &mut Vec<u8>) {
        if self.include_usage {
            self.write(&[], (Some(total.usage()), None), out);
        }
    }
}
