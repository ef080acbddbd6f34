//! Whether a model finds again what it has read, which perplexity hardly shows.
//!
//! A needle of random tokens replaces a part of a text. The text ends with the needle's beginning,
//! and the model must go on with the rest: the probe of induction of Olsson et al. 2022 (arXiv
//! 2209.11895), at the depths of a search for a needle in a haystack (Hsieh et al. 2024, arXiv
//! 2404.06654). It is scored by likelihood, so that models too small to answer questions can take it.

use super::quality::{Estimate, Row};
use crate::bad_usage;
use crate::error::Result;
use crate::session::Session;
use crate::session::sampler::Random;

/// Where needles lie: shares of the text before them.
pub const DEPTHS: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];

/// How the probe is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// Tokens of a text with the needle repeated at its end.
    pub n_ctx: usize,
    /// Tokens of a needle.
    pub n_needle: usize,
    /// Tokens of it that are repeated before its rest is asked for.
    pub n_cue: usize,
    /// Texts, each with a needle at every depth.
    pub n_trials: usize,
    /// Chooses the needles.
    pub seed: u64,
}

impl Default for Probe {
    fn default() -> Probe {
        Probe { n_ctx: 512, n_needle: 16, n_cue: 8, n_trials: 16, seed: 0 }
    }
}

/// What was found. Errors are those of means over texts.
#[derive(Debug, Clone, PartialEq)]
pub struct Retrieval {
    /// How it was set up.
    pub probe: Probe,
    /// Share of the tokens asked for that is most likely where no needle was.
    pub chance: Estimate,
    /// In the order of [`DEPTHS`].
    pub depths: Vec<Found>,
    /// At all depths.
    pub all: Found,
}

/// What was found at one depth.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Found {
    /// Share of the tokens asked for that is most likely.
    pub top1: Estimate,
    /// What the needle adds to their log-probability, in nats per token.
    pub gain: Estimate,
}

impl Retrieval {
    /// Every number with its name in reports: `retrieval_top1`, `retrieval_d10_gain_err`, ..
    pub fn fields(&self) -> Vec<(String, f64)> {
        let depths = DEPTHS.iter().map(|depth| format!("retrieval_d{:.0}", 100.0 * depth));
        let mut out = Vec::new();
        let mut put = |name: String, x: Estimate| {
            out.extend([(name.clone(), x.value), (format!("{name}_err"), x.err)]);
        };
        put("retrieval_chance".into(), self.chance);
        let all = std::iter::once(("retrieval".to_string(), &self.all));
        for (name, found) in all.chain(depths.zip(&self.depths)) {
            put(format!("{name}_top1"), found.top1);
            put(format!("{name}_gain"), found.gain);
        }
        out
    }
}

/// Scores of each text: share of the tokens most likely, mean log-probability.
type Scores = Vec<[f64; 2]>;

/// Hides needles in the text that `tokens` are. `progress` is called after every text with its
/// number.
pub fn retrieve(
    session: &mut Session,
    tokens: &[u32],
    probe: Probe,
    progress: &mut dyn FnMut(usize),
) -> Result<Retrieval> {
    let Probe { n_ctx, n_needle, n_cue, n_trials, seed } = probe;
    if n_cue == 0 || n_needle <= n_cue || n_trials < 2 {
        bad_usage!(
            "{n_trials} needles of {n_needle} tokens, {n_cue} repeated; allowed 2 or more, 1 repeated at least, and 1 not"
        );
    }
    // Before the repeated needle.
    let n_text = n_ctx.saturating_sub(n_needle);
    if n_text < 2 * n_needle || tokens.len() < n_text {
        bad_usage!(
            "a probe of {n_ctx} tokens in a text of {}; allowed {} to {}",
            tokens.len(),
            3 * n_needle,
            tokens.len() + n_needle
        );
    }
    let mut known = tokens[1..].to_vec();
    known.sort_unstable();
    known.dedup();
    if known.len() < n_needle {
        bad_usage!("the text has {} different tokens; a needle has {n_needle}", known.len());
    }
    let mut random = Random::new(seed);
    let mut without: Scores = Vec::new();
    let mut with: Vec<Scores> = vec![Vec::new(); DEPTHS.len()];
    for trial in 0..n_trials {
        let start = trial * (tokens.len() - n_text) / (n_trials - 1);
        let needle = draw(&known, n_needle, &mut random);
        let mut text = tokens[start..start + n_text].to_vec();
        text.extend(&needle);
        let tokenizer = &session.model().tokenizer;
        if let (Some(bos), true) = (tokenizer.bos(), tokenizer.add_bos()) {
            text[0] = bos;
        }
        without.push(score(session, &text, probe)?);
        // The deepest first: each shares more with the text before than the next one.
        for (scores, depth) in with.iter_mut().zip(DEPTHS).rev() {
            let mut text = text.clone();
            let at = 1 + (depth * (n_text - n_needle - 1) as f64).round() as usize;
            text[at..at + n_needle].copy_from_slice(&needle);
            scores.push(score(session, &text, probe)?);
        }
        progress(trial + 1);
    }
    let each = |i: usize, scores: &Scores| scores.iter().map(|s| s[i]).collect::<Vec<_>>();
    let found = |scores: &Scores| {
        let gains = scores.iter().zip(&without).map(|(with, without)| with[1] - without[1]);
        let gain = Estimate::mean(&gains.collect::<Vec<_>>());
        Found { top1: Estimate::mean(&each(0, scores)), gain }
    };
    let mean = |trial: usize| {
        let sum = |i: usize| with.iter().map(|scores| scores[trial][i]).sum::<f64>();
        [sum(0), sum(1)].map(|sum| sum / with.len() as f64)
    };
    Ok(Retrieval {
        probe,
        chance: Estimate::mean(&each(0, &without)),
        depths: with.iter().map(found).collect(),
        all: found(&(0..n_trials).map(mean).collect()),
    })
}

/// `n` different tokens of those `known`.
fn draw(known: &[u32], n: usize, random: &mut Random) -> Vec<u32> {
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let token = known[(random.uniform() * known.len() as f64) as usize];
        if !out.contains(&token) {
            out.push(token);
        }
    }
    out
}

/// How well the tokens after the cue are predicted.
fn score(session: &mut Session, text: &[u32], probe: Probe) -> Result<[f64; 2]> {
    let n_asked = probe.n_needle - probe.n_cue;
    let (n_vocab, first) = (session.model().hparams.n_vocab, text.len() - n_asked);
    let shared = session.tokens().iter().zip(text).take_while(|(a, b)| a == b).count();
    let shared = shared.min(first - 1);
    session.rewind(shared);
    let input = &text[shared..text.len() - 1];
    let logits = session.feed_wanting(input, first - 1 - shared..input.len())?;
    let rows = logits.chunks_exact(n_vocab).map(Row::new).zip(&text[first..]);
    let scores =
        rows.map(|(row, token)| [f64::from(u8::from(row.top() == *token)), row.ln_p(*token)]);
    let sum = scores.fold([0.0, 0.0], |sum, score| [sum[0] + score[0], sum[1] + score[1]]);
    Ok(sum.map(|sum| sum / n_asked as f64))
}
