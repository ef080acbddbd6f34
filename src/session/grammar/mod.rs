//! Text that follows a grammar: of the tokens that may come next, those that cannot are ruled out.
//!
//! The engine is the crate `llguidance`: lexemes by derivatives of regular expressions, rules by
//! Earley's algorithm. It sees bytes, so that a text may be cut into tokens in any way. Grammars are
//! from strangers: they are limited in size and work, and every limit ends in an error.

mod gbnf;
mod lark;
mod lexemes;
mod spec;

pub use spec::{Part, Spec};

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use llguidance::api::{ParserLimits, StopReason};
use llguidance::toktrie::{
    InferenceCapabilities, TokEnv, TokRxInfo, TokTrie, TokenId, TokenizerEnv,
};
use llguidance::{Matcher, ParserFactory};

use crate::bad_usage;
use crate::error::{Error, Result, escaped};
use crate::token::Tokenizer;

/// Longest token that can be chosen under a grammar, in bytes, which the engine sets.
const MAX_TOKEN: usize = 1000;
/// Bytes of different tokens that a vocabulary may have, which the engine sets: each that is not
/// shared with the beginning of another one takes a node, of 2^22.
const MAX_NODES: usize = 4_000_000;
/// Stack of the thread that a grammar is made on; untouched pages cost nothing.
const STACK_BYTES: usize = 256 << 20;
/// Time that making a grammar may take. Limits end it in a tenth of that, as far as is known.
const MAX_TIME: Duration = Duration::from_secs(4);
/// Longest excerpt of the engine's messages, in characters.
const MAX_MESSAGE: usize = 200;

/// A model's vocabulary as the engine knows it. Making it is expensive, sharing it is cheap.
#[derive(Clone)]
pub struct Vocabulary(Arc<Inner>);

struct Inner {
    factory: ParserFactory,
    /// Tokens that end a text.
    ends: Vec<u32>,
    /// Control tokens by name.
    controls: HashMap<Vec<u8>, u32>,
    n_vocab: usize,
}

/// What the engine asks of a tokenizer. It forces no tokens, so it need not make any.
struct Trie(TokTrie);

impl TokenizerEnv for Trie {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<TokenId> {
        self.0.greedy_tokenize(bytes)
    }

    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

impl Vocabulary {
    /// The vocabulary of a model with `n_vocab` logits.
    pub fn new(tokenizer: &Tokenizer, n_vocab: usize) -> Result<Vocabulary> {
        let ids = 0..n_vocab as u32;
        let ends: Vec<u32> = ids.clone().filter(|id| tokenizer.is_eog(*id)).collect();
        let mut controls = HashMap::new();
        let mut words = Vec::with_capacity(n_vocab);
        for id in ids {
            let (piece, name) = (tokenizer.piece(id, false), tokenizer.piece(id, true));
            if piece.is_empty() && !name.is_empty() {
                controls.entry(name.to_vec()).or_insert(id);
            }
            // No text has the byte 0xFF, which the engine takes for a mark.
            let is_text =
                !tokenizer.is_eog(id) && piece.len() <= MAX_TOKEN && !piece.contains(&0xFF);
            words.push(if is_text { piece.to_vec() } else { Vec::new() });
        }
        check_nodes(&words)?;
        let info = TokRxInfo::new(n_vocab as u32, llguidance::toktrie::INVALID_TOKEN);
        let trie = TokTrie::from(&info, &words);
        let trie = if ends.is_empty() { trie } else { trie.with_eos_tokens(&ends) };
        let environment: TokEnv = Arc::new(Trie(trie));
        let failed = |e: &dyn std::fmt::Display| Error::Runtime(format!("vocabulary: {}", line(e)));
        let slices = llguidance::earley::SlicedBiasComputer::general_slices();
        let factory = ParserFactory::new(&environment, InferenceCapabilities::default(), &slices);
        let mut factory = factory.map_err(|e| failed(&e))?;
        factory.quiet();
        *factory.limits_mut() = limits();
        Ok(Vocabulary(Arc::new(Inner { factory, ends, controls, n_vocab })))
    }
}

/// What the engine may use up.
fn limits() -> ParserLimits {
    ParserLimits {
        // A grammar that is read by characters looks at every byte of most tokens.
        step_max_items: 500_000,
        // A kilobyte or two for each.
        max_lexer_states: 50_000,
        max_grammar_size: 200_000,
        // Takes seconds where lexemes are long, and saves a mask a few milliseconds.
        precompute_large_lexemes: false,
        verbose_errors: false,
        ..ParserLimits::default()
    }
}

/// Refuses a vocabulary that is too large for the engine.
fn check_nodes(words: &[Vec<u8>]) -> Result<()> {
    let mut sorted: Vec<&[u8]> = words.iter().map(|w| &w[..]).collect();
    sorted.sort_unstable();
    let mut n_nodes = sorted.first().map_or(0, |w| w.len());
    for pair in sorted.windows(2) {
        let n_shared = pair[0].iter().zip(pair[1]).take_while(|(a, b)| a == b).count();
        n_nodes += pair[1].len().max(n_shared + 1) - n_shared;
    }
    if n_nodes > MAX_NODES {
        bad_usage!(
            "grammar: the vocabulary has {n_nodes} bytes in different tokens; allowed {MAX_NODES}"
        );
    }
    Ok(())
}

/// A grammar at a place in a text; a copy goes on by itself.
#[derive(Clone)]
pub struct Grammar {
    vocabulary: Vocabulary,
    matcher: Matcher,
}

impl Grammar {
    /// A grammar at the beginning of a text.
    ///
    /// # Errors
    ///
    /// An [`Error::Usage`] of one line: what is asked for is no grammar, or takes too much.
    pub fn new(vocabulary: &Vocabulary, spec: &Spec) -> Result<Grammar> {
        // Only what is not too deep can be copied.
        spec.check()?;
        let (inner, spec) = (vocabulary.0.clone(), spec.clone());
        let matcher = on_own_thread(move || {
            let control = |name: &str| inner.controls.get(name.as_bytes()).copied();
            let grammar = spec.compile(&control)?;
            let parser = inner.factory.create_parser(grammar);
            let mut matcher = Matcher::new(parser);
            // A grammar may be over before it begins, and the first mask is kept for later.
            let started = matcher.consume_tokens(&[]);
            let mask = started.and_then(|()| matcher.compute_mask_or_eos());
            mask.map_err(|e| match is_stuck(&e) {
                true => Error::Usage("grammar: no text follows it".into()),
                false => Error::Usage(told(&e)),
            })?;
            Ok(matcher)
        })?;
        Ok(Grammar { vocabulary: vocabulary.clone(), matcher })
    }

    /// Sets the logits of tokens that cannot follow to minus infinity. Tokens that end a text may
    /// follow where the grammar may end, and nothing else may where it must. `[n_vocab]`
    pub fn restrict(&mut self, logits: &mut [f32]) -> Result<()> {
        let n_vocab = self.vocabulary.0.n_vocab;
        if logits.len() != n_vocab {
            bad_usage!("grammar: {} logits; the vocabulary has {n_vocab}", logits.len());
        }
        if self.is_over() {
            let ends = &self.vocabulary.0.ends;
            let kept: Vec<f32> = ends.iter().map(|id| logits[*id as usize]).collect();
            logits.fill(f32::NEG_INFINITY);
            ends.iter().zip(kept).for_each(|(id, logit)| logits[*id as usize] = logit);
            return Ok(());
        }
        let mask = self.matcher.compute_mask().map_err(|e| {
            Error::Runtime(match is_stuck(&e) {
                true => "grammar: no token of the vocabulary can follow".into(),
                false => told(&e),
            })
        })?;
        for (bits, logits) in mask.as_slice().iter().zip(logits.chunks_mut(32)) {
            for (i, logit) in logits.iter_mut().enumerate() {
                if bits >> i & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
        Ok(())
    }

    /// Takes the token that was chosen. A token that cannot follow is refused, and changes nothing.
    pub fn accept(&mut self, token: u32) -> Result<()> {
        let is_end = self.vocabulary.0.ends.contains(&token);
        if self.is_over() && is_end {
            return Ok(());
        }
        let n = self.matcher.try_consume_tokens(&[token]);
        match n.map_err(|e| Error::Runtime(told(&e)))? {
            0 => bad_usage!("grammar: token {token} cannot follow"),
            _ => Ok(()),
        }
    }

    /// Whether the text is complete and nothing can follow.
    pub fn is_over(&self) -> bool {
        matches!(self.matcher.stop_reason(), StopReason::NoExtension | StopReason::EndOfSentence)
    }
}

/// Makes a grammar where neither deep recursion nor endless work ends the process.
fn on_own_thread<T: Send + 'static>(
    make: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    let thread = std::thread::Builder::new().stack_size(STACK_BYTES);
    let thread = thread.spawn(move || {
        // Nobody listens after the time is over.
        let _ = sender.send(make());
    });
    thread.map_err(|e| Error::Runtime(format!("cannot start a thread for the grammar: {e}")))?;
    match receiver.recv_timeout(MAX_TIME) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => {
            bad_usage!("grammar: not done after {} s", MAX_TIME.as_secs())
        }
        Err(RecvTimeoutError::Disconnected) => bad_usage!("grammar: the engine failed"),
    }
}

/// The engine's error as a message of ours.
fn told(error: &dyn std::fmt::Display) -> String {
    format!("grammar: {}", line(error))
}

/// Whether the engine stopped because nothing can follow.
fn is_stuck(error: &dyn std::fmt::Display) -> bool {
    error.to_string().starts_with(&StopReason::NoExtensionBias.to_string())
}

/// The beginning of an error's text, on one line, without what the engine tells of itself.
fn line(error: &dyn std::fmt::Display) -> String {
    let text = error.to_string();
    let end = text.find("<non-verbose/>").or(text.find("<backtrace>")).unwrap_or(text.len());
    let words: Vec<&str> = text[..end].split_whitespace().collect();
    escaped(&words.join(" ").chars().take(MAX_MESSAGE).collect::<String>())
}
