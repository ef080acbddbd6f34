//! One timeline of tokens: feed, rewind, read the logits of what comes next.

pub mod chat;
pub mod embed;
mod engine;
mod file;
pub mod grammar;
pub mod pool;
pub mod sampler;
mod timeline;

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use crate::attention::together;
use crate::bad_usage;
use crate::cpu::threads::default_threads;
use crate::cpu::{Observer, check_finite};
use crate::engine::{Asked, CacheType, Devices, Kind, Threads};
use crate::error::Result;
use crate::model::Model;
use crate::plan::Plan;
use timeline::{Timeline, copies};

/// Longest context that a session has unless asked: the cache should fit a laptop.
const DEFAULT_N_CTX: usize = 8192;
/// Tokens that are fed between two looks at whether to go on.
const N_STEP: usize = 256;

/// How a session is set up.
#[derive(Debug, Clone)]
pub struct Options {
    /// Context in tokens; `None`: what the model was trained for, at most 8192.
    pub n_ctx: Option<usize>,
    /// Threads that compute.
    pub n_threads: Threads,
    /// Whether each of them stays on a core of its own.
    pub pin: bool,
    /// Whether activations stay `f32` where they would be rounded to be multiplied; slow where that
    /// would be to 8 bits.
    pub exact: bool,
    /// Types of cached keys and values.
    pub cache: (CacheType, CacheType),
    /// What computes.
    pub engine: Kind,
    /// Where, if that is ggml.
    pub devices: Devices,
}

impl Default for Options {
    fn default() -> Options {
        let n = default_threads();
        Options {
            n_ctx: None,
            n_threads: Threads { one: n, batch: n },
            pin: true,
            exact: false,
            cache: (CacheType::F16, CacheType::F16),
            engine: Kind::Cpu,
            devices: Devices::default(),
        }
    }
}

/// A sequence of tokens that a model has read.
///
/// Some masks treat prompts differently ([`crate::mask`]), and what is a prompt is said, not guessed:
/// [`Session::feed_prompt`] and [`Session::become_tokens`] read prompts, [`Session::feed`] reads tokens
/// that see nothing after them, unless the model is not causal: then tokens that are fed together are a
/// prompt. [`Session::embed`] is for texts.
pub struct Session {
    model: Arc<Model>,
    engine: engine::Engine,
    timeline: Timeline,
    logits: Vec<f32>,
    /// Things worth telling that do not prevent use.
    pub warnings: Vec<String>,
}

/// The context of a session in which so many tokens are asked for.
pub fn context(model: &Model, asked: Option<usize>, warnings: &mut Vec<String>) -> Result<usize> {
    let trained = model.hparams.n_ctx_train;
    let n_ctx = asked.unwrap_or(trained.min(DEFAULT_N_CTX));
    if n_ctx == 0 {
        bad_usage!("context = 0; allowed 1 or more tokens");
    }
    if n_ctx > trained && model.hparams.learned_positions {
        bad_usage!("context = {n_ctx}; this model has positions for {trained} tokens");
    }
    if n_ctx > trained {
        warnings.push(format!("context {n_ctx} is longer than the {trained} tokens trained for"));
    }
    Ok(n_ctx)
}

impl Session {
    /// An empty timeline.
    pub fn new(model: Arc<Model>, options: &Options) -> Result<Session> {
        let mut warnings = Vec::new();
        let n_ctx = context(&model, options.n_ctx, &mut warnings)?;
        if options.exact && options.engine == Kind::Ggml {
            warnings.push(
                "--exact is for the engine cpu: ggml rounds activations as its devices do".into(),
            );
        }
        model.check_file()?;
        let engine = engine::Engine::new(&model, options, n_ctx)?;
        let (timeline, logits) = (Timeline::default(), Vec::new());
        Ok(Session { model, engine, timeline, logits, warnings })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The model, without the session.
    pub fn into_model(self) -> Arc<Model> {
        self.model
    }

    /// Tokens that fit.
    pub fn n_ctx(&self) -> usize {
        self.engine.n_ctx()
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> Threads {
        self.engine.n_threads()
    }

    /// Computes with other numbers of threads, at most as many as the session began with.
    pub fn set_threads(&mut self, n_threads: Threads) {
        self.engine.set_threads(n_threads);
    }

    /// Types of cached keys and values.
    pub fn cache_types(&self) -> (CacheType, CacheType) {
        self.engine.cache_types()
    }

    /// Size of the cache in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.engine.cache_bytes()
    }

    /// Bytes that a token at `position` reads: weights, and the keys and values that it sees.
    pub fn bytes_per_token(&self, position: usize) -> f64 {
        let cached = self.model.attention.iter().enumerate().map(|(i, attention)| {
            let n = attention.visible(position, &(0..0)).len();
            self.engine.layer_bytes(i) as f64 / self.n_ctx() as f64 * n as f64
        });
        self.engine.weight_bytes() as f64 + cached.sum::<f64>()
    }

    /// What is worth telling of how the last tokens were computed.
    pub fn notes(&self) -> Vec<String> {
        self.engine.notes()
    }

    /// Products of weights and activations that a token needs.
    pub fn n_products(&self) -> usize {
        self.engine.n_products()
    }

    /// Uses another plan, and forgets all tokens. Refused while others hold the model, and where a form
    /// needs other matrices or does not apply.
    pub fn set_plan(&mut self, plan: Plan) -> Result<()> {
        self.rewind(0);
        let Some(model) = Arc::get_mut(&mut self.model) else {
            bad_usage!("another plan: the model is in use elsewhere");
        };
        let changed = model.check_forms(&plan)?;
        self.engine.forget();
        let old = model.plan.clone();
        model.set_plan(plan);
        if !changed {
            return Ok(());
        }
        match self.engine.again(model) {
            Ok(engine) => self.engine = engine,
            Err(e) => {
                model.set_plan(old);
                return Err(e);
            }
        }
        Ok(())
    }

    /// Forgets all tokens and acts as if `n` others had been read, with zeros for everything that is
    /// cached of them: for times, which do not depend on what that is.
    pub fn pretend(&mut self, n: usize) -> Result<()> {
        self.check_room(n)?;
        self.rewind(0);
        self.engine.clear();
        self.timeline.extend(&vec![0; n]);
        Ok(())
    }

    /// Takes sequences through the layers, see [`crate::cpu::Engine::layer_by_layer`]; forgets all tokens.
    pub fn layer_by_layer(
        &mut self,
        sequences: &[Vec<u32>],
        observer: &dyn Observer,
        change: &mut dyn FnMut(&mut Model, usize) -> Result<bool>,
    ) -> Result<()> {
        self.rewind(0);
        for tokens in sequences {
            self.check_tokens(tokens)?;
            self.check_room(tokens.len())?;
        }
        self.engine.layer_by_layer(&mut self.model, sequences, observer, change)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let n_vocab = self.model.hparams.n_vocab;
        if let Some(token) = tokens.iter().find(|t| **t as usize >= n_vocab) {
            bad_usage!("token {token}; the vocabulary has {n_vocab}");
        }
        Ok(())
    }

    /// The tokens read so far, all copies of prompts among them: one for each position.
    pub fn tokens(&self) -> &[u32] {
        self.timeline.tokens()
    }

    /// Logits of the token after the last one fed; empty before the first. `[n_vocab]`
    pub fn logits(&self) -> &[f32] {
        let n_vocab = self.model.hparams.n_vocab;
        &self.logits[self.logits.len().saturating_sub(n_vocab)..]
    }

    /// The same, to choose a token by them.
    ///
    /// # Errors
    ///
    /// Logits that are not all finite: a line with the layer where that began.
    pub fn finite_logits(&self) -> Result<&[f32]> {
        let logits = self.logits();
        check_finite(logits, self.engine.fault(self.tokens().len()))?;
        Ok(logits)
    }

    /// Reads more tokens.
    pub fn feed(&mut self, tokens: &[u32]) -> Result<()> {
        let last = tokens.len().saturating_sub(1)..tokens.len();
        self.feed_wanting(tokens, last).map(|_| ())
    }

    /// Reads more tokens and returns the logits after each of those in `wanted`, indices into
    /// `tokens`. `[wanted, n_vocab]`
    pub fn feed_wanting(&mut self, tokens: &[u32], wanted: Range<usize>) -> Result<&[f32]> {
        self.feed_with(tokens, wanted, None)
    }

    /// The same, while `observer` looks into attention.
    pub fn feed_observed(
        &mut self,
        tokens: &[u32],
        wanted: Range<usize>,
        observer: &dyn Observer,
    ) -> Result<&[f32]> {
        self.feed_with(tokens, wanted, Some(observer))
    }

    fn feed_with(
        &mut self,
        tokens: &[u32],
        wanted: Range<usize>,
        observer: Option<&dyn Observer>,
    ) -> Result<&[f32]> {
        self.check(tokens, tokens.len())?;
        if !wanted.is_empty() {
            self.check_output()?;
        }
        let prompt = match self.model.hparams.causal {
            true => 0..0,
            false => self.begin_prompt(tokens.len(), tokens.len()),
        };
        self.read(tokens, &prompt, wanted, observer)?;
        Ok(&self.logits)
    }

    /// Reads a prompt, as often as the mask says. Tokens that see later ones are computed together,
    /// which takes memory for all of them at once.
    pub fn feed_prompt(&mut self, tokens: &[u32]) -> Result<()> {
        self.feed_prompt_with(tokens, usize::MAX, None, &mut |_| true).map(|_| ())
    }

    /// The same, while `observer` looks into attention.
    pub fn feed_prompt_observed(&mut self, tokens: &[u32], observer: &dyn Observer) -> Result<()> {
        self.feed_prompt_with(tokens, usize::MAX, Some(observer), &mut |_| true).map(|_| ())
    }

    /// The same in steps of about `n_step` tokens, after each of which `go_on` is asked, with the
    /// length of the timeline. False if it said no.
    fn feed_prompt_with(
        &mut self,
        tokens: &[u32],
        n_step: usize,
        observer: Option<&dyn Observer>,
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool> {
        let all = self.copies(tokens);
        self.check(tokens, all.len())?;
        let has_logits = self.model.output.is_some();
        // Who looks may need none.
        if observer.is_none() {
            self.check_output()?;
        }
        let prompt = self.begin_prompt(all.len(), tokens.len());
        let start = prompt.start;
        let mut at = start;
        while at < prompt.end {
            let end = prompt.end.min(at.saturating_add(n_step));
            let end = together(&self.model.attention, at..end, &prompt);
            let wanted = end - at - usize::from(has_logits && end == prompt.end)..end - at;
            self.read(&all[at - start..end - start], &prompt, wanted, observer)?;
            at = end;
            if !go_on(at) {
                // A prompt that was not read to its end is none.
                self.rewind(at);
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The positions of a prompt that follows, of `n` tokens in all copies and `n_first` in the first.
    fn begin_prompt(&mut self, n: usize, n_first: usize) -> Range<usize> {
        self.timeline.begin_prompt(&self.model.attention, n, n_first)
    }

    /// A prompt as often as it is read.
    fn copies<'a>(&self, tokens: &'a [u32]) -> Cow<'a, [u32]> {
        copies(tokens, self.model.plan.n_copies(), self.model.tokenizer.bos())
    }

    fn read(
        &mut self,
        tokens: &[u32],
        prompt: &Range<usize>,
        wanted: Range<usize>,
        observer: Option<&dyn Observer>,
    ) -> Result<()> {
        self.logits.clear();
        self.engine.forward(
            &self.model,
            (tokens, self.tokens().len(), prompt),
            wanted,
            observer,
            (Asked::Logits, &mut self.logits),
        )?;
        self.timeline.extend(tokens);
        Ok(())
    }

    /// Refuses tokens that are none, and `n` more that do not fit.
    fn check(&self, tokens: &[u32], n: usize) -> Result<()> {
        self.check_tokens(tokens)?;
        self.check_room(self.tokens().len() + n)
    }

    /// Refuses to give logits that the model does not have.
    fn check_output(&self) -> Result<()> {
        if self.model.output.is_none() {
            self.model.hparams.must_predict()?;
        }
        Ok(())
    }

    /// Refuses a timeline of `n` tokens that does not fit the context.
    pub fn check_room(&self, n: usize) -> Result<()> {
        let n_ctx = self.n_ctx();
        if n > n_ctx {
            bad_usage!("{n} tokens do not fit a context of {n_ctx}");
        }
        Ok(())
    }

    /// Forgets everything after the first `n` tokens, and of a prompt whose tokens have seen each
    /// other everything if it is cut. The logits are gone until the next feed.
    pub fn rewind(&mut self, n: usize) {
        self.timeline.rewind(n);
        self.engine.heal(self.timeline.tokens().len());
        self.logits.clear();
    }

    /// Length of the timeline that [`Session::become_tokens`] makes of these.
    pub fn n_positions(&self, prompt: &[u32], reply: &[u32]) -> usize {
        let (n, position) = self.timeline.shared(prompt, reply);
        let new = &prompt[n.min(prompt.len())..];
        position + self.copies(new).len() + prompt.len() + reply.len() - n - new.len()
    }

    /// Makes a prompt and what was generated after it the timeline, keeping what it shares with the
    /// present one: what is new of the prompt is read as a prompt of its own, whatever was a prompt,
    /// or generated, before. `go_on` is asked after each step, with the length of the timeline. False
    /// if it said no.
    pub fn become_tokens(
        &mut self,
        prompt: &[u32],
        reply: &[u32],
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool> {
        self.check_room(self.n_positions(prompt, reply))?;
        if let Some(fault) = self.engine.fault(self.tokens().len()) {
            self.rewind(fault.start);
        }
        let (n, position) = self.timeline.shared(prompt, reply);
        self.rewind(position);
        let new = &prompt[n.min(prompt.len())..];
        if !self.feed_prompt_with(new, N_STEP, None, go_on)? {
            return Ok(false);
        }
        for step in reply[n.saturating_sub(prompt.len())..].chunks(N_STEP) {
            self.feed(step)?;
            if !go_on(self.tokens().len()) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
