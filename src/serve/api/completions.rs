//! `POST /v1/completions`.

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::App;
use super::failure::{Answer, Failure, answer};
use super::fields::{Fields, tokens, wrong};
use super::reply::{Head, Timings, Total, Usage, Whole, collect, ln};
use super::stream::{Shape, event, response};
use super::texts::{Chosen, News, Reason, Texts};
use super::wanted::{Extent, MAX_TOP, Wanted};
use crate::serve::job::{Generation, Logprobs};
use crate::token::{StreamDecoder, Tokenizer};

/// Fields that change nothing of a text.
const IGNORED: &[&str] = &["user"];
/// Tokens of a text unless asked, as OpenAI has it.
const MAX_TOKENS: usize = 16;
/// Most prompts of a request.
const MAX_PROMPTS: usize = 2048;

/// A prompt.
struct Prompt {
    /// As it was sent, if it was text.
    text: Option<String>,
    tokens: Vec<u32>,
}

/// A request, checked.
struct Ready {
    wanted: Wanted,
    prompts: Vec<Prompt>,
    generations: Vec<Generation>,
    echo: bool,
    logprobs: bool,
}

/// Answers a request.
pub(super) async fn run(app: Arc<App>, fields: Fields) -> Answer<Response<Body>> {
    let Ready { wanted, prompts, generations, echo, logprobs } =
        app.prepare(move |app| Ready::new(fields, app)).await?;
    let head = Head::new("cmpl", &app, &wanted.names);
    let n_prompt = prompts.iter().map(|prompt| prompt.tokens.len()).sum();
    let mut total = Total::new(wanted.n, n_prompt);
    let n = generations.len();
    let texts = Texts::new(&app, generations, wanted.stops, Vec::new())?;
    let places = vec![0; n];
    let include_usage = wanted.include_usage;
    let mut chunks =
        Chunks { app, head, prompts, n: wanted.n, echo, logprobs, places, include_usage };
    if wanted.stream {
        return Ok(response(texts, chunks, total));
    }
    let all = collect(texts, n, &mut total).await?;
    Ok(answer(StatusCode::OK, &chunks.whole(&all, &total)))
}

impl Ready {
    fn new(mut fields: Fields, app: &Arc<App>) -> Answer<Ready> {
        app.model.hparams.must_predict()?;
        let wanted = Wanted::read(&mut fields, app)?;
        let prompts = prompts(&mut fields, app)?;
        let echo = fields.flag("echo")?.unwrap_or(false);
        let n_top = fields.whole("logprobs", 0..=MAX_TOP)?;
        let least = usize::from(!echo);
        let max_tokens = fields.whole("max_tokens", least..=usize::MAX)?.unwrap_or(MAX_TOKENS);
        if let Some(best_of) = fields.whole("best_of", 1..=usize::MAX)?
            && best_of != wanted.n
        {
            let text = format!("best_of = {best_of}; allowed {}, as n", wanted.n);
            return Err(Failure::field("best_of", text));
        }
        if fields.text("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
            return Err(Failure::field(
                "suffix",
                "suffix: texts are not written up to another one",
            ));
        }
        fields.end(IGNORED)?;
        let extent = Extent {
            max_tokens: Some(max_tokens),
            logprobs: n_top,
            prompt_logprobs: echo && n_top.is_some(),
        };
        let tokens: Vec<Vec<u32>> = prompts.iter().map(|prompt| prompt.tokens.clone()).collect();
        let generations = wanted.generations(app, &tokens, extent)?;
        Ok(Ready { wanted, prompts, generations, echo, logprobs: n_top.is_some() })
    }
}

/// A text, tokens, or an array of either.
fn prompts(fields: &mut Fields, app: &App) -> Answer<Vec<Prompt>> {
    let name = "prompt";
    let needed = "a string, an array of strings, of tokens, or of arrays of tokens";
    let list = match fields.take(name) {
        Some(Value::String(text)) => return Ok(vec![Prompt::text(text, app)?]),
        Some(Value::Array(list)) => list,
        Some(other) => return Err(wrong(name, &other, needed)),
        None => return Err(fields.missing(name)),
    };
    let n_vocab = app.model.hparams.n_vocab;
    if list.is_empty() || (!list[0].is_number() && list.len() > MAX_PROMPTS) {
        let text = format!("{name}: an array of {}; allowed 1 to {MAX_PROMPTS}", list.len());
        return Err(Failure::field(name, text));
    }
    if list[0].is_number() {
        return Ok(vec![Prompt { text: None, tokens: tokens(name, &list, n_vocab)? }]);
    }
    let one = |(i, value)| match value {
        Value::String(text) => Prompt::text(text, app),
        Value::Array(ids) if !ids.is_empty() => {
            let tokens = tokens(&format!("{name}[{i}]"), &ids, n_vocab)?;
            Ok(Prompt { text: None, tokens })
        }
        other => Err(wrong(&format!("{name}[{i}]"), &other, "a string or an array of tokens")),
    };
    list.into_iter().enumerate().map(one).collect()
}

impl Prompt {
    fn text(text: String, app: &App) -> Answer<Prompt> {
        let tokens = encode(&text, app)?;
        Ok(Prompt { text: Some(text), tokens })
    }
}

/// The tokens of a text that something is to follow.
pub(super) fn encode(text: &str, app: &App) -> Answer<Vec<u32>> {
    let tokenizer = &app.model.tokenizer;
    let mut tokens = tokenizer.encode(text, true, true)?;
    if tokens.is_empty() {
        // Something must be read before anything can follow.
        tokens.extend(tokenizer.bos().or(tokenizer.eos()));
    }
    if tokens.is_empty() {
        return Err(Failure::field("prompt", "the prompt has no tokens; 1 or more are needed"));
    }
    Ok(tokens)
}

/// Makes answers, or parts of streamed ones.
struct Chunks {
    app: Arc<App>,
    head: Head,
    prompts: Vec<Prompt>,
    /// Texts for each prompt.
    n: usize,
    echo: bool,
    logprobs: bool,
    /// Characters of each text that came before.
    places: Vec<usize>,
    include_usage: bool,
}

#[derive(Serialize)]
struct Choice<'a> {
    text: &'a str,
    index: usize,
    logprobs: Option<Table>,
    finish_reason: Option<Reason>,
}

/// Probabilities, in columns.
#[derive(Default, Serialize)]
struct Table {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token begins, in characters.
    text_offset: Vec<usize>,
}

impl Table {
    fn push(&mut self, tokenizer: &Tokenizer, id: u32, logprobs: Option<&Logprobs>, at: usize) {
        let name = |id: u32| name(tokenizer.piece(id, true));
        self.tokens.push(name(id));
        self.token_logprobs.push(logprobs.map(|l| ln(l.own)));
        self.text_offset.push(at);
        let top = logprobs.map(|l| {
            let mut top = Map::new();
            // The likeliest of those that look alike.
            for (id, x) in l.top.iter().copied().chain([(id, l.own)]) {
                top.entry(name(id)).or_insert(ln(x).into());
            }
            top
        });
        self.top_logprobs.push(top);
    }
}

/// A token as a text, also where it is a part of a character.
fn name(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.into(),
        Err(_) => {
            let bytes = bytes.iter().map(|byte| format!("\\x{byte:02x}"));
            format!("bytes:{}", bytes.collect::<String>())
        }
    }
}

impl Chunks {
    fn prompt(&self, index: usize) -> &Prompt {
        &self.prompts[index / self.n]
    }

    /// The text of a prompt.
    fn prompt_text(&self, index: usize) -> String {
        let prompt = self.prompt(index);
        let decode = || {
            let pieces = prompt.tokens.iter().map(|id| self.app.model.tokenizer.piece(*id, false));
            String::from_utf8_lossy(&pieces.collect::<Vec<_>>().concat()).into_owned()
        };
        prompt.text.clone().unwrap_or_else(decode)
    }

    /// Where the tokens of the prompt are in its text; each but the first with its probability.
    fn prompt_table(&mut self, index: usize, logprobs: &[Logprobs], table: &mut Table) {
        let tokenizer = &self.app.model.tokenizer;
        let (prompt, text) = (self.prompt(index), self.prompt_text(index));
        let n_text = text.chars().count();
        let (mut decoder, mut at) = (StreamDecoder::default(), 0);
        // Some tokenizers put a space in front of a text.
        let mut n_before = usize::from(prompt.text.is_some() && !text.starts_with(' '));
        for (i, id) in prompt.tokens.iter().enumerate() {
            let logprobs = i.checked_sub(1).and_then(|i| logprobs.get(i));
            table.push(tokenizer, *id, logprobs, at.min(n_text));
            let text = decoder.push(tokenizer.piece(*id, false));
            let n_skipped = if text.starts_with(' ') { n_before } else { 0 };
            if !text.is_empty() {
                n_before = 0;
            }
            at += text.chars().count() - n_skipped;
        }
    }

    /// The probabilities of tokens that were written, from character `at` of the text.
    fn table(&self, mut at: usize, tokens: &[Chosen], table: &mut Table) {
        let tokenizer = &self.app.model.tokenizer;
        let mut decoder = StreamDecoder::default();
        for Chosen { id, logprobs } in tokens {
            table.push(tokenizer, *id, Some(logprobs), at);
            at += decoder.push(tokenizer.piece(*id, false)).chars().count();
        }
    }

    fn whole(&mut self, all: &[Whole], total: &Total) -> Value {
        let mut choices = Vec::new();
        for (index, whole) in all.iter().enumerate() {
            let prompt = if self.echo { self.prompt_text(index) } else { String::new() };
            let mut table = Table::default();
            if self.echo && self.logprobs {
                self.prompt_table(index, &whole.prompt, &mut table);
            }
            self.table(prompt.chars().count(), &whole.tokens, &mut table);
            choices.push(json!({
                "text": prompt + &whole.text,
                "index": index,
                "logprobs": self.logprobs.then_some(table),
                "finish_reason": whole.reason,
            }));
        }
        json!({
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.model,
            "system_fingerprint": self.head.fingerprint,
            "choices": choices,
            "usage": total.usage(),
            "timings": total.timings(),
        })
    }

    fn write(
        &self,
        choices: &[Choice],
        (usage, timings): (Option<Usage>, Option<Timings>),
        out: &mut Vec<u8>,
    ) {
        let usage = self.include_usage.then_some(usage);
        event(&self.head.chunk("text_completion", choices, usage, timings), out);
    }

    /// Writes more of a text, with what is known of its tokens.
    fn more(&mut self, index: usize, text: &str, table: Option<Table>, out: &mut Vec<u8>) {
        self.places[index] += text.chars().count();
        let choice = Choice { text, index, logprobs: table, finish_reason: None };
        self.write(&[choice], (None, None), out);
    }

    fn echo(&mut self, index: usize, logprobs: &[Logprobs], out: &mut Vec<u8>) {
        let mut table = self.logprobs.then(Table::default);
        if let Some(table) = &mut table {
            self.prompt_table(index, logprobs, table);
        }
        let text = self.prompt_text(index);
        self.more(index, &text, table, out);
    }
}

impl Shape for Chunks {
    fn news(&mut self, index: usize, news: News, out: &mut Vec<u8>) {
        let table = |chunks: &Chunks, tokens: &[Chosen]| {
            chunks.logprobs.then(|| {
                let mut table = Table::default();
                chunks.table(chunks.places[index], tokens, &mut table);
                table
            })
        };
        match news {
            News::Started if self.echo && !self.logprobs => self.echo(index, &[], out),
            News::Started => {}
            News::Prompt(logprobs) => self.echo(index, &logprobs, out),
            News::More(text, tokens) => {
                let table = table(self, &tokens);
                self.more(index, &text, table, out);
            }
            News::Ended(text, tokens, reason, cost) => {
                let logprobs = table(self, &tokens);
                let choice = Choice { text: &text, index, logprobs, finish_reason: Some(reason) };
                self.write(&[choice], (None, Some(Timings::from(&cost))), out);
            }
        }
    }

    fn last(&mut self, total: &Total, out: &mut Vec<u8>) {
        if self.include_usage {
            self.write(&[], (Some(total.usage()), None), out);
        }
    }
}
