//! One timeline of tokens: feed, rewind, read the logits of what comes next.

pub mod chat;
pub mod sampler;

use std::ops::Range;
use std::sync::Arc;

use crate::bad_usage;
use crate::cpu::threads::default_threads;
use crate::cpu::{CacheType, Engine, KvCache, Observer, Threads};
use crate::error::Result;
use crate::model::Model;
use crate::plan::Plan;

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
        }
    }
}

/// A sequence of tokens that a model has read.
pub struct Session {
    model: Arc<Model>,
    engine: Engine,
    cache: KvCache,
    tokens: Vec<u32>,
    logits: Vec<f32>,
    /// Things worth telling that do not prevent use.
    pub warnings: Vec<String>,
}

impl Session {
    /// An empty timeline.
    pub fn new(model: Arc<Model>, options: &Options) -> Result<Session> {
        let trained = model.hparams.n_ctx_train;
        let n_ctx = options.n_ctx.unwrap_or(trained.min(DEFAULT_N_CTX));
        let mut warnings = Vec::new();
        if n_ctx == 0 {
            bad_usage!("context = 0; allowed 1 or more tokens");
        }
        if n_ctx > trained && model.hparams.learned_positions {
            bad_usage!("context = {n_ctx}; this model has positions for {trained} tokens");
        }
        if n_ctx > trained {
            warnings
                .push(format!("context {n_ctx} is longer than the {trained} tokens trained for"));
        }
        let geometry = model.attention.iter().map(|a| a.geometry);
        let cache = KvCache::new(geometry, n_ctx, options.cache)?;
        let engine = Engine::new(&model, options.n_threads, options.pin, options.exact)?;
        Ok(Session { model, engine, cache, tokens: Vec::new(), logits: Vec::new(), warnings })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Tokens that fit.
    pub fn n_ctx(&self) -> usize {
        self.cache.n_ctx()
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
        self.cache.types()
    }

    /// Size of the cache in bytes.
    pub fn cache_bytes(&self) -> usize {
        self.cache.n_bytes()
    }

    /// Bytes that a token at `position` reads: weights, keys and values.
    pub fn bytes_per_token(&self, position: usize) -> f64 {
        let cached = self.cache.n_bytes() as f64 / self.n_ctx() as f64;
        self.engine.weight_bytes() as f64 + cached * position as f64
    }

    /// Products of weights and activations that a token needs.
    pub fn n_products(&self) -> usize {
        self.engine.n_products()
    }

    /// Uses another plan, and forgets all tokens. Refused while others hold the model.
    pub fn set_plan(&mut self, plan: Plan) -> Result<()> {
        self.rewind(0);
        match Arc::get_mut(&mut self.model) {
            Some(model) => model.set_plan(plan),
            None => bad_usage!("another plan: the model is in use elsewhere"),
        }
        Ok(())
    }

    /// Takes sequences through the layers, see [`Engine::layer_by_layer`]; forgets all tokens.
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
        let Some(model) = Arc::get_mut(&mut self.model) else {
            bad_usage!("layer by layer: the model is in use elsewhere");
        };
        self.engine.layer_by_layer(model, &mut self.cache, sequences, observer, change)
    }

    fn check_tokens(&self, tokens: &[u32]) -> Result<()> {
        let n_vocab = self.model.hparams.n_vocab;
        if let Some(token) = tokens.iter().find(|t| **t as usize >= n_vocab) {
            bad_usage!("token {token}; the vocabulary has {n_vocab}");
        }
        Ok(())
    }

    /// The tokens read so far.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Logits of the token after the last one fed; empty before the first. `[n_vocab]`
    pub fn logits(&self) -> &[f32] {
        let n_vocab = self.model.hparams.n_vocab;
        &self.logits[self.logits.len().saturating_sub(n_vocab)..]
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
        self.check_tokens(tokens)?;
        let n_past = self.tokens.len();
        self.check_room(n_past + tokens.len())?;
        self.logits.clear();
        self.engine.forward(
            &self.model,
            &mut self.cache,
            (tokens, n_past),
            wanted,
            observer,
            &mut self.logits,
        );
        self.tokens.extend_from_slice(tokens);
        Ok(&self.logits)
    }

    /// Refuses a timeline of `n` tokens that does not fit the context.
    pub fn check_room(&self, n: usize) -> Result<()> {
        let n_ctx = self.n_ctx();
        if n > n_ctx {
            bad_usage!("{n} tokens do not fit a context of {n_ctx}");
        }
        Ok(())
    }

    /// Forgets everything after the first `n` tokens; the logits are gone until the next feed.
    pub fn rewind(&mut self, n: usize) {
        self.tokens.truncate(n);
        self.logits.clear();
    }

    /// Makes `tokens` the timeline, keeping what it shares with the present one, in steps after
    /// each of which `go_on` is asked, with the tokens fed so far. False if it said no.
    pub fn become_tokens(
        &mut self,
        tokens: &[u32],
        go_on: &mut dyn FnMut(usize) -> bool,
    ) -> Result<bool> {
        self.check_room(tokens.len())?;
        let shared = self.tokens.iter().zip(tokens).take_while(|(a, b)| a == b).count();
        // At least one token must be read again for its logits.
        self.rewind(shared.min(tokens.len().saturating_sub(1)));
        while self.tokens.len() < tokens.len() {
            let n_past = self.tokens.len();
            let end = tokens.len().min(n_past + N_STEP);
            self.feed(&tokens[n_past..end])?;
            if !go_on(end) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
