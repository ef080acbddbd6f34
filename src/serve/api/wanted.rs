//! What chat completions and completions have in common.

use serde_json::Value;

use super::App;
use super::failure::{Answer, Failure};
use super::fields::{Fields, wrong};
use super::sampling;
use super::stops::Stops;
use crate::serve::job::Generation;
use crate::session::grammar::{Grammar, Spec};
use crate::session::pool::Ask;
use crate::session::sampler::SamplerParams;

/// Most texts of a request for each prompt, as OpenAI has it.
const MAX_N: usize = 128;
/// Most texts that end a reply.
const MAX_STOPS: usize = 16;
/// Most tokens whose probabilities are told at a place.
pub(super) const MAX_TOP: usize = 20;

/// How texts are to be written.
pub(super) struct Wanted {
    pub(super) params: SamplerParams,
    pub(super) ask: Ask,
    /// Normalizers, forms and masks.
    pub(super) names: [String; 3],
    pub(super) stops: Stops,
    /// Texts for each prompt.
    pub(super) n: usize,
    pub(super) ignore_eos: bool,
    pub(super) grammar: Option<Spec>,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
}

/// What is asked of the tokens of a text.
#[derive(Clone, Copy)]
pub(super) struct Extent {
    pub(super) max_tokens: Option<usize>,
    pub(super) logprobs: Option<usize>,
    pub(super) prompt_logprobs: bool,
}

impl Wanted {
    /// Reads the fields.
    pub(super) fn read(fields: &mut Fields, app: &App) -> Answer<Wanted> {
        check_model(fields, app)?;
        let (ask, names) = ask(fields, "qkov", app)?;
        let hparams = &app.model.hparams;
        let params = sampling::params(fields, &app.model.tokenizer, hparams.n_vocab)?;
        let stream = fields.flag("stream")?.unwrap_or(false);
        let include_usage = include_usage(fields, stream)?;
        let grammar = fields.text("grammar")?;
        Ok(Wanted {
            params,
            ask,
            names,
            stops: Stops::new(&stops(fields)?),
            n: fields.whole("n", 1..=MAX_N)?.unwrap_or(1),
            ignore_eos: fields.flag("ignore_eos")?.unwrap_or(false),
            grammar: grammar.map(Spec::Gbnf),
            stream,
            include_usage,
        })
    }

    /// The jobs for these prompts, `n` for each.
    pub(super) fn generations(
        &self,
        app: &App,
        prompts: &[Vec<u32>],
        extent: Extent,
    ) -> Answer<Vec<Generation>> {
        let mut all = Vec::new();
        for prompt in prompts {
            check_prompt(app, prompt.len())?;
            for i in 0..self.n {
                let grammar = self.grammar.as_ref().map(|spec| grammar(app, spec)).transpose()?;
                let seed = self.params.seed.wrapping_add(i as u64);
                all.push(Generation {
                    prompt: prompt.clone(),
                    ask: self.ask.clone(),
                    params: SamplerParams { seed, ..self.params.clone() },
                    grammar,
                    max_tokens: extent.max_tokens,
                    ignore_eos: self.ignore_eos,
                    logprobs: extent.logprobs,
                    prompt_logprobs: extent.prompt_logprobs,
                });
            }
        }
        Ok(all)
    }
}

fn grammar(app: &App, spec: &Spec) -> Answer<Grammar> {
    let param = match spec {
        Spec::Gbnf(_) => "grammar",
        Spec::Parts(_) => "tools",
        _ => "response_format",
    };
    let grammar = app.vocabulary().and_then(|vocabulary| Grammar::new(vocabulary, spec));
    grammar.map_err(|e| Failure::from(e).about(param))
}

/// Refuses a model that is not here.
pub(super) fn check_model(fields: &mut Fields, app: &App) -> Answer<()> {
    let Some(name) = fields.text("model")?.filter(|name| !name.is_empty()) else { return Ok(()) };
    app.check_name(&name)
}

/// What a request attends with, and its names.
pub(super) fn ask(fields: &mut Fields, name: &str, app: &App) -> Answer<(Ask, [String; 3])> {
    let ask = match fields.object(name)? {
        Some(object) => parts(object, app)?,
        None => Ask::default(),
    };
    named(ask, name, app)
}

/// The same from an object of its own.
pub(super) fn ask_of(name: &str, value: Value, app: &App) -> Answer<(Ask, [String; 3])> {
    named(parts(Fields::of(name, value)?, app)?, name, app)
}

fn named(ask: Ask, name: &str, app: &App) -> Answer<(Ask, [String; 3])> {
    let plan = ask.plan(&app.model).map_err(|e| Failure::from(e).about(name))?;
    Ok((ask, plan.names()))
}

/// The three parts, each checked alone, so that an error names it.
fn parts(mut fields: Fields, app: &App) -> Answer<Ask> {
    let mut part = |name: &str, alone: fn(Option<String>) -> Ask| {
        let text = fields.text(name)?;
        let plan = alone(text.clone()).plan(&app.model);
        plan.map_err(|e| Failure::from(e).about(fields.name(name)))?;
        Ok::<_, Failure>(text)
    };
    let norm = part("norm", |norm| Ask { norm, ..Ask::default() })?;
    let form = part("form", |form| Ask { form, ..Ask::default() })?;
    let mask = part("mask", |mask| Ask { mask, ..Ask::default() })?;
    fields.end(&[])?;
    Ok(Ask { norm, form, mask })
}

/// Refuses a prompt that is longer than the context.
pub(super) fn check_prompt(app: &App, n: usize) -> Answer<()> {
    if n > app.n_ctx {
        let text = format!("the prompt has {n} tokens; the context holds {}", app.n_ctx);
        return Err(Failure::invalid(text).code("context_length_exceeded"));
    }
    Ok(())
}

fn include_usage(fields: &mut Fields, stream: bool) -> Answer<bool> {
    let Some(mut options) = fields.object("stream_options")? else { return Ok(false) };
    if !stream {
        let name = "stream_options";
        return Err(Failure::field(name, "stream_options without \"stream\": true"));
    }
    let include_usage = options.flag("include_usage")?.unwrap_or(false);
    options.end(&["include_obfuscation"])?;
    Ok(include_usage)
}

/// Texts that end a reply: one, or an array.
fn stops(fields: &mut Fields) -> Answer<Vec<String>> {
    let name = "stop";
    let list = match fields.take(name) {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(text @ Value::String(_)) => vec![text],
        Some(other) => return Err(wrong(name, &other, "a string or an array of strings")),
    };
    if list.len() > MAX_STOPS {
        let text = format!("{name} has {} texts; allowed {MAX_STOPS}", list.len());
        return Err(Failure::field(name, text));
    }
    let one = |(i, value): (usize, Value)| match value {
        Value::String(text) if text.is_empty() => Err(Failure::field(
            name,
            format!("{name}[{i}] is empty; 1 or more characters are needed"),
        )),
        Value::String(text) => Ok(text),
        other => Err(wrong(&format!("{name}[{i}]"), &other, "a string")),
    };
    list.into_iter().enumerate().map(one).collect()
}
