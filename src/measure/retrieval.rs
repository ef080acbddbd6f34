//! Whether a model finds again what it has read, which perplexity hardly shows.
//!
//! A needle replaces a part of a text. At the text's end the needle's beginning is repeated, and
//! the model is to go on with the rest: the probe of induction of Olsson et al. 2022 (arXiv
//! 2209.11895), at the depths of a search for a needle in a haystack (Hsieh et al. 2024, arXiv
//! 2404.06654). It is scored by likelihood, against the same text without the needle, so that
//! models too small to answer questions can take it.

use std::ops::Range;

use super::quality::{Estimate, Row};
use crate::bad_usage;
use crate::error::Result;
use crate::session::Session;
use crate::session::sampler::Random;

/// Where needles lie: shares of the text before them.
pub const DEPTHS: [f64; 5] = [0.1, 0.3, 0.5, 0.7, 0.9];

/// What is hidden.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needle {
    /// A passage from elsewhere in the text, of which even a model that cannot copy keeps something.
    Passage,
    /// Different tokens of the text in random order, which nothing but copying can find.
    Random,
}

/// How the probe is set up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Probe {
    /// What is hidden.
    pub needle: Needle,
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
        let needle = Needle::Passage;
        Probe { needle, n_ctx: 512, n_needle: 32, n_cue: 16, n_trials: 24, seed: 0 }
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
    /// What the needle adds to their probability, from 0 to 1.
    pub p_gain: Estimate,
    /// What it adds to their log-probability, in nats. A damaged model can gain much of it, from
    /// almost impossible to very unlikely; only between sound models does it tell who copies.
    pub ln_p_gain: Estimate,
}

impl Retrieval {
    /// Every number with its name in reports: `retrieval_top1`, `retrieval_d10_p_gain_err`, ..
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
            put(format!("{name}_p_gain"), found.p_gain);
            put(format!("{name}_ln_p_gain"), found.ln_p_gain);
        }
        out
    }
}

/// Of each text, means over the tokens asked for: whether most likely, probability, its logarithm.
type Scores = Vec<[f64; 3]>;

/// Hides needles in the text that `tokens` are. `progress` is called after every text with its
/// number.
pub fn retrieve(
    session: &mut Session,
    tokens: &[u32],
    probe: Probe,
    progress: &mut dyn FnMut(usize),
) -> Result<Retrieval> {
    let n_text = probe.check(tokens.len())?;
    let mut known = tokens.to_vec();
    known.sort_unstable();
    known.dedup();
    if probe.needle == Needle::Random && known.len() < probe.n_needle {
        bad_usage!("{} different tokens; a needle has {}", known.len(), probe.n_needle);
    }
    let tokenizer = &session.model().tokenizer;
    let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
    let mut random = Random::new(probe.seed);
    let (mut without, mut with) = (Scores::new(), vec![Scores::new(); DEPTHS.len()]);
    for trial in 0..probe.n_trials {
        let start = trial * (tokens.len() - n_text) / (probe.n_trials - 1);
        let needle = match probe.needle {
            Needle::Passage => passage(tokens, start..start + n_text, probe.n_needle, &mut random),
            Needle::Random => draw(&known, probe.n_needle, &mut random),
        };
        let mut text = [&tokens[start..start + n_text], &needle].concat();
        text[0] = bos.unwrap_or(text[0]);
        without.push(probe.score(session, &text)?);
        // The deepest first: each begins with more of the text before it than the next one would.
        for (scores, depth) in with.iter_mut().zip(DEPTHS).rev() {
            let mut text = text.clone();
            let at = 1 + (depth * (n_text - needle.len() - 1) as f64).round() as usize;
            text[at..at + needle.len()].copy_from_slice(&needle);
            scores.push(probe.score(session, &text)?);
        }
        progress(trial + 1);
    }
    let mean = |trial: usize| {
        let sum = |i: usize| with.iter().map(|scores| scores[trial][i]).sum::<f64>();
        [0, 1, 2].map(|i| sum(i) / with.len() as f64)
    };
    let all: Scores = (0..probe.n_trials).map(mean).collect();
    Ok(Retrieval {
        probe,
        chance: Estimate::mean(&without.iter().map(|s| s[0]).collect::<Vec<_>>()),
        depths: with.iter().map(|scores| Found::new(scores, &without)).collect(),
        all: Found::new(&all, &without),
    })
}

impl Found {
    fn new(with: &Scores, without: &Scores) -> Found {
        let gain = |i: usize| {
            let gains = with.iter().zip(without).map(|(with, without)| with[i] - without[i]);
            Estimate::mean(&gains.collect::<Vec<_>>())
        };
        let top1 = Estimate::mean(&with.iter().map(|s| s[0]).collect::<Vec<_>>());
        Found { top1, p_gain: gain(1), ln_p_gain: gain(2) }
    }
}

/// `n` tokens that follow each other outside of `taken`, on one side of which there must be room.
fn passage(tokens: &[u32], taken: Range<usize>, n: usize, random: &mut Random) -> Vec<u32> {
    let before = (taken.start + 1).saturating_sub(n);
    let after = (tokens.len() + 1).saturating_sub(taken.end + n);
    let i = random.below(before + after);
    let start = if i < before { i } else { taken.end + i - before };
    tokens[start..start + n].to_vec()
}

/// `n` different tokens of those `known`.
fn draw(known: &[u32], n: usize, random: &mut Random) -> Vec<u32> {
    let mut out = Vec::with_capacity(n);
    while out.len() < n {
        let token = known[random.below(known.len())];
        if !out.contains(&token) {
            out.push(token);
        }
    }
    out
}

impl Probe {
    /// Refuses what cannot be measured in a text of `n_tokens`. Tokens before the repeated needle.
    fn check(&self, n_tokens: usize) -> Result<usize> {
        let Probe { n_ctx, n_needle, n_cue, n_trials, .. } = *self;
        if n_trials < 2 || n_cue == 0 || n_cue >= n_needle {
            bad_usage!(
                "{n_trials} needles of {n_needle} tokens, {n_cue} repeated; allowed 2 or more \
                 needles, and 1 to {} repeated",
                n_needle.saturating_sub(1)
            );
        }
        let n_text = n_ctx.saturating_sub(n_needle);
        if n_text < 2 * n_needle {
            bad_usage!(
                "a context of {n_ctx} tokens for retrieval; allowed {} or more",
                3 * n_needle
            );
        }
        if n_tokens < n_text + 2 * n_needle {
            bad_usage!("a text of {n_tokens} tokens; allowed {} or more", n_text + 2 * n_needle);
        }
        Ok(n_text)
    }

    /// How well the tokens after the cue are predicted.
    fn score(&self, session: &mut Session, text: &[u32]) -> Result<[f64; 3]> {
        let n_asked = self.n_needle - self.n_cue;
        let (n_vocab, first) = (session.model().hparams.n_vocab, text.len() - n_asked);
        let shared = session.tokens().iter().zip(text).take_while(|(a, b)| a == b).count();
        let shared = shared.min(first - 1);
        session.rewind(shared);
        let input = &text[shared..text.len() - 1];
        let logits = session.feed_wanting(input, first - 1 - shared..input.len())?;
        let mut sum = [0.0; 3];
        for (row, token) in logits.chunks_exact(n_vocab).map(Row::new).zip(&text[first..]) {
            sum[0] += f64::from(u8::from(row.top() == *token));
            sum[1] += row.ln_p(*token).exp();
            sum[2] += row.ln_p(*token);
        }
        Ok(sum.map(|sum| sum / n_asked as f64))
    }
}
