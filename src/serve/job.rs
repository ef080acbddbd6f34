//! What the model's thread is asked, and what it answers.

use std::time::Instant;

use tokio::sync::mpsc::UnboundedSender;

use crate::arch::Pooling;
use crate::error::{Error, Result};
use crate::session::grammar::Grammar;
use crate::session::pool::Ask;
use crate::session::sampler::SamplerParams;

/// A text to continue.
pub struct Generation {
    /// What is read first.
    pub prompt: Vec<u32>,
    /// What it attends with.
    pub ask: Ask,
    /// How tokens are chosen.
    pub params: SamplerParams,
    /// What the text must follow.
    pub grammar: Option<Grammar>,
    /// Tokens at most; `None`: until the context is full.
    pub max_tokens: Option<usize>,
    /// Whether it goes on after a token that ends texts.
    pub ignore_eos: bool,
    /// For how many of the likeliest tokens probabilities are told, beside that of the chosen one.
    pub logprobs: Option<usize>,
    /// Whether those of the prompt's tokens are told too.
    pub prompt_logprobs: bool,
}

/// Logarithms of probabilities at one place of a text, before any sampling.
#[derive(Debug, Clone, PartialEq)]
pub struct Logprobs {
    /// Of the token that is there.
    pub own: f32,
    /// The likeliest ones, likeliest first.
    pub top: Vec<(u32, f32)>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The model or the grammar ended it.
    Stop,
    /// It is as long as was allowed, or the context is full.
    Length,
}

/// What is told of a generation, in this order: started, the prompt's probabilities if they were asked
/// for, tokens, the end.
#[derive(Debug)]
pub enum Event {
    /// It has a place; so many tokens of the prompt need not be read.
    Started {
        /// Tokens of the prompt, and those of them that were read before.
        n_prompt: usize,
        /// The latter.
        n_cached: usize,
        /// When the prompt was begun.
        at: Instant,
    },
    /// Of every token of the prompt but the first.
    Prompt(Vec<Logprobs>),
    /// The next token.
    Token {
        /// Its number.
        id: u32,
        /// Its probability, if that was asked for.
        logprobs: Option<Logprobs>,
    },
    /// Nothing follows.
    Ended(End),
    /// Something went wrong; nothing follows.
    Failed(Error),
}

/// Anything that is asked. Whoever asks drops the receiving end to say that it is no longer wanted.
pub enum Job {
    /// A text to continue.
    Generate(Box<Generation>, UnboundedSender<Event>),
    /// Texts to embed, each a vector; as many answers as texts.
    Embed {
        /// Tokens of the texts.
        texts: Vec<Vec<u32>>,
        /// What they attend with.
        ask: Ask,
        /// How states become one.
        pooling: Pooling,
        /// Where vectors go, in the order of the texts.
        answer: UnboundedSender<Result<Vec<f32>>>,
    },
    /// A text to score with two variants.
    Compare(Comparison, UnboundedSender<Result<Scored>>),
    /// A look at a head.
    Look(Look, UnboundedSender<Result<Map>>),
}

/// A text to score with two variants.
pub struct Comparison {
    /// What both read first.
    pub prompt: Vec<u32>,
    /// What is scored.
    pub reply: Vec<u32>,
    /// The variants.
    pub asks: [Ask; 2],
    /// For how many of the likeliest tokens probabilities are told.
    pub n_top: usize,
}

/// A token of the reply, scored by both variants.
pub struct Scored {
    /// The token.
    pub id: u32,
    /// Divergence of the second variant's distribution from the first's before it, in nats.
    pub kl: f64,
    /// What each says of it.
    pub logprobs: [Logprobs; 2],
}

/// A head to look at.
pub struct Look {
    /// What is read, as a prompt up to `n_prompt`.
    pub tokens: Vec<u32>,
    /// See above.
    pub n_prompt: usize,
    /// What it attends with.
    pub ask: Ask,
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
}

/// What a head, and its layer, do with a text.
pub struct Map {
    /// Weights of keys for every query. `[n, n]`
    pub weights: Vec<f32>,
    /// Mean entropy of every head of the layer, in nats.
    pub entropy: Vec<f32>,
    /// Mean weight of the first token, of every head.
    pub first: Vec<f32>,
}

impl Job {
    /// Whether anybody still waits for what comes of it.
    pub fn is_wanted(&self) -> bool {
        match self {
            Job::Generate(_, events) => !events.is_closed(),
            Job::Embed { answer, .. } => !answer.is_closed(),
            Job::Compare(_, answer) => !answer.is_closed(),
            Job::Look(_, answer) => !answer.is_closed(),
        }
    }
}
