//! What the samplers are told, and what is allowed.

use std::ops::RangeInclusive;

use super::{SAMPLERS, dry, penalties};
use crate::bad_usage;
use crate::error::Result;

/// How the next token is chosen. The default is llama.cpp's, but for the seed.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerParams {
    /// Seed of the random numbers.
    pub seed: u64,
    /// Names of the samplers in the order in which they apply; those left out do not.
    pub samplers: Vec<String>,
    /// Added to the logits of tokens: id, bias; minus infinity bans a token.
    pub logit_bias: Vec<(u32, f32)>,
    /// Past tokens that the penalties look at; 0: none.
    pub repeat_last_n: usize,
    /// Divides the logits of past tokens if positive, and multiplies them if negative; 1: off.
    pub repeat_penalty: f32,
    /// Subtracted from a logit for every time that its token occurred.
    pub frequency_penalty: f32,
    /// Subtracted from a logit if its token occurred.
    pub presence_penalty: f32,
    /// Strength of DRY; 0: off.
    pub dry_multiplier: f32,
    /// Growth of DRY's penalty per repeated token.
    pub dry_base: f32,
    /// Longest repetition that DRY leaves alone, in tokens.
    pub dry_allowed_length: usize,
    /// Past tokens that DRY looks at; `None`: all.
    pub dry_last_n: Option<usize>,
    /// Token sequences over which DRY sees no repetition.
    pub dry_breakers: Vec<Vec<u32>>,
    /// Standard deviations below the largest logit that are kept; 0: off.
    pub top_n_sigma: f32,
    /// Number of likeliest tokens that are kept; 0: off.
    pub top_k: usize,
    /// Probability that typical tokens keep together; 1: off.
    pub typical_p: f32,
    /// Probability that the likeliest tokens keep together; 1: off.
    pub top_p: f32,
    /// Least probability of a token, relative to the likeliest; 0: off.
    pub min_p: f32,
    /// How often XTC removes top choices; 0: off.
    pub xtc_probability: f32,
    /// Probability from which XTC takes a token for a top choice.
    pub xtc_threshold: f32,
    /// Temperature; 0: always the likeliest token.
    pub temperature: f32,
    /// How far the temperature follows the entropy; 0: off.
    pub dynatemp_range: f32,
    /// Exponent of the normalized entropy for it.
    pub dynatemp_exponent: f32,
    /// Whether mirostat takes the place of all samplers that truncate.
    pub mirostat: bool,
    /// The surprise that mirostat aims at, in bits.
    pub mirostat_tau: f32,
    /// How fast mirostat learns.
    pub mirostat_eta: f32,
}

impl Default for SamplerParams {
    fn default() -> SamplerParams {
        SamplerParams {
            seed: 0,
            samplers: SAMPLERS.iter().map(|s| s.name.into()).collect(),
            logit_bias: Vec::new(),
            repeat_last_n: 64,
            repeat_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            dry_multiplier: 0.0,
            dry_base: 1.75,
            dry_allowed_length: 2,
            dry_last_n: None,
            dry_breakers: Vec::new(),
            top_n_sigma: 0.0,
            top_k: 40,
            typical_p: 1.0,
            top_p: 0.95,
            min_p: 0.05,
            xtc_probability: 0.0,
            xtc_threshold: 0.1,
            temperature: 0.8,
            dynatemp_range: 0.0,
            dynatemp_exponent: 1.0,
            mirostat: false,
            mirostat_tau: 5.0,
            mirostat_eta: 0.1,
        }
    }
}

/// Any finite number.
const FINITE: RangeInclusive<f32> = f32::MIN..=f32::MAX;
/// Zero and more.
const POSITIVE: RangeInclusive<f32> = 0.0..=f32::MAX;
/// A probability.
const UNIT: RangeInclusive<f32> = 0.0..=1.0;

impl SamplerParams {
    /// How many past tokens the penalties look at; `usize::MAX`: all.
    pub fn n_history(&self) -> usize {
        dry::n_history(self).max(penalties::n_history(self))
    }

    /// Refuses what makes no sense, naming the option.
    pub fn check(&self, n_vocab: usize) -> Result<()> {
        if n_vocab == 0 {
            bad_usage!("vocabulary = 0 tokens; allowed 1 or more");
        }
        let least = f32::MIN_POSITIVE..=f32::MAX;
        for (option, value, allowed) in [
            ("temp", self.temperature, POSITIVE),
            ("dynatemp-range", self.dynatemp_range, POSITIVE),
            ("dynatemp-exp", self.dynatemp_exponent, POSITIVE),
            ("top-p", self.top_p, UNIT),
            ("min-p", self.min_p, UNIT),
            ("typical", self.typical_p, UNIT),
            ("top-n-sigma", self.top_n_sigma, POSITIVE),
            ("xtc-probability", self.xtc_probability, UNIT),
            ("xtc-threshold", self.xtc_threshold, UNIT),
            ("repeat-penalty", self.repeat_penalty, least),
            ("frequency-penalty", self.frequency_penalty, FINITE),
            ("presence-penalty", self.presence_penalty, FINITE),
            ("dry-multiplier", self.dry_multiplier, POSITIVE),
            ("dry-base", self.dry_base, 1.0..=f32::MAX),
            ("mirostat-tau", self.mirostat_tau, POSITIVE),
            ("mirostat-eta", self.mirostat_eta, UNIT),
        ] {
            // NaN is in no range.
            if !allowed.contains(&value) {
                bad_usage!("{option} = {value}; allowed {}", text(&allowed));
            }
        }
        for (id, bias) in &self.logit_bias {
            if *id as usize >= n_vocab {
                bad_usage!("logit-bias of token {id}; allowed 0 to {}", n_vocab - 1);
            }
            if !bias.is_finite() && *bias != f32::NEG_INFINITY {
                bad_usage!("logit-bias = {bias} of token {id}; allowed any number and -inf");
            }
        }
        for name in &self.samplers {
            if !SAMPLERS.iter().any(|s| s.name == name) {
                let known: Vec<_> = SAMPLERS.iter().map(|s| s.name).collect();
                bad_usage!("samplers = \"{name}\"; allowed {}", known.join(", "));
            }
        }
        Ok(())
    }
}

fn text(range: &RangeInclusive<f32>) -> String {
    match (*range.start(), *range.end()) {
        (f32::MIN, _) => "any finite number".into(),
        (f32::MIN_POSITIVE, _) => "above 0".into(),
        (start, f32::MAX) => format!("{start} or more"),
        (start, end) => format!("{start} to {end}"),
    }
}
