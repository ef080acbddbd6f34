//! Parts of answers that endpoints have in common.

use std::borrow::Cow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use super::App;
use super::failure::{Answer, lost};
use super::texts::{Chosen, Cost, News, Reason, Texts};
use crate::serve::job::Logprobs;
use crate::session::sampler::random_seed;
use crate::token::Tokenizer;

/// What stands for the logarithm of 0, which JSON does not have, as OpenAI has it.
const LN_ZERO: f32 = -9999.0;

/// What every answer, and every part of a stream, begins with.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
}

impl Head {
    pub(super) fn new(kind: &str, app: &App, names: &[String; 3]) -> Head {
        Head {
            id: format!("{kind}-{:016x}{:016x}", random_seed(), random_seed()),
            created: now(),
            model: app.id.clone(),
            fingerprint: app.fingerprint(names),
        }
    }
}

/// A part of a stream.
#[derive(Serialize)]
pub(super) struct Chunk<'a, C> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    system_fingerprint: &'a str,
    choices: &'a [C],
    /// Null but for the last, if it was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    timings: Option<Timings>,
}

impl Head {
    /// A part of a stream of this kind.
    pub(super) fn chunk<'a, C>(
        &'a self,
        object: &'static str,
        choices: &'a [C],
        usage: Option<Option<Usage>>,
        timings: Option<Timings>,
    ) -> Chunk<'a, C> {
        Chunk {
            id: &self.id,
            object,
            created: self.created,
            model: &self.model,
            system_fingerprint: &self.fingerprint,
            choices,
            usage,
            timings,
        }
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Times, as llama-server names them.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Timings {
    prompt_n: usize,
    cached_n: usize,
    prompt_ms: f64,
    predicted_n: usize,
    predicted_ms: f64,
    predicted_per_second: f64,
}

impl From<&Cost> for Timings {
    fn from(cost: &Cost) -> Timings {
        let ms = |time: Duration| (time.as_secs_f64() * 1e6).round() / 1e3;
        // The first token comes with the prompt.
        let n_after = cost.n_predicted.saturating_sub(1) as f64;
        let seconds = cost.predicted_time.as_secs_f64();
        let rate = if seconds > 0.0 { n_after / seconds } else { 0.0 };
        Timings {
            prompt_n: cost.n_prompt - cost.n_cached,
            cached_n: cost.n_cached,
            prompt_ms: ms(cost.prompt_time),
            predicted_n: cost.n_predicted,
            predicted_ms: ms(cost.predicted_time),
            predicted_per_second: (rate * 1e3).round() / 1e3,
        }
    }
}

/// What a request took, all texts together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Total {
    /// Texts for each prompt.
    n: usize,
    /// Prompts are counted once, however many texts follow them.
    usage: Usage,
    cost: Cost,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(super) struct Usage {
    prompt_tokens: usize,
    completion_tokens: usize,
    total_tokens: usize,
    prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, Copy, Default, Serialize)]
struct PromptDetails {
    cached_tokens: usize,
}

impl Total {
    /// Nothing so far, of `n` texts for each prompt, which have `prompt_tokens` together.
    pub(super) fn new(n: usize, prompt_tokens: usize) -> Total {
        let usage = Usage { prompt_tokens, total_tokens: prompt_tokens, ..Usage::default() };
        Total { n, usage, cost: Cost::default() }
    }

    /// Adds a text.
    pub(super) fn add(&mut self, index: usize, cost: &Cost) {
        self.usage.completion_tokens += cost.n_predicted;
        self.usage.total_tokens += cost.n_predicted;
        if index.is_multiple_of(self.n) {
            self.usage.prompt_tokens_details.cached_tokens += cost.n_cached;
        }
        let all = &mut self.cost;
        all.n_prompt += cost.n_prompt;
        all.n_cached += cost.n_cached;
        all.n_predicted += cost.n_predicted;
        // They run beside each other.
        all.prompt_time = all.prompt_time.max(cost.prompt_time);
        all.predicted_time = all.predicted_time.max(cost.predicted_time);
    }

    pub(super) fn usage(&self) -> Usage {
        self.usage
    }

    pub(super) fn timings(&self) -> Timings {
        Timings::from(&self.cost)
    }
}

/// A text from beginning to end.
#[derive(Debug, Default)]
pub(super) struct Whole {
    pub(super) text: String,
    pub(super) tokens: Vec<Chosen>,
    pub(super) prompt: Vec<Logprobs>,
    pub(super) reason: Option<Reason>,
}

/// Waits for the ends of `n` texts.
pub(super) async fn collect(mut texts: Texts, n: usize, total: &mut Total) -> Answer<Vec<Whole>> {
    let mut all: Vec<Whole> = (0..n).map(|_| Whole::default()).collect();
    while let Some(news) = texts.next().await {
        let (index, news) = news?;
        let whole = all.get_mut(index).ok_or_else(lost)?;
        match news {
            News::Started => {}
            News::Prompt(logprobs) => whole.prompt = logprobs,
            News::More(text, tokens) => {
                whole.text += &text;
                whole.tokens.extend(tokens);
            }
            News::Ended(text, tokens, reason, cost) => {
                whole.text += &text;
                whole.tokens.extend(tokens);
                whole.reason = Some(reason);
                total.add(index, &cost);
            }
        }
    }
    Ok(all)
}

/// A logarithm that JSON can hold.
pub(super) fn ln(x: f32) -> f32 {
    if x.is_finite() { x } else { LN_ZERO }
}

/// The text that a token prints, those of control tokens too.
pub(super) fn shown(tokenizer: &Tokenizer, id: u32) -> Cow<'_, str> {
    String::from_utf8_lossy(tokenizer.piece(id, true))
}

/// Probabilities as chat completions have them.
pub(super) fn chat_logprobs(tokenizer: &Tokenizer, tokens: &[Chosen]) -> Value {
    let one = |id: u32, logprob: f32| {
        json!({
            "token": shown(tokenizer, id),
            "logprob": ln(logprob),
            "bytes": tokenizer.piece(id, true),
        })
    };
    let token = |chosen: &Chosen| {
        let Chosen { id, logprobs } = chosen;
        let mut token = one(*id, logprobs.own);
        token["top_logprobs"] = logprobs.top.iter().map(|(id, x)| one(*id, *x)).collect();
        token
    };
    json!({"content": tokens.iter().map(token).collect::<Vec<_>>(), "refusal": null})
}
