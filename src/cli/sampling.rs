//! Options on how the next token is chosen.

use std::sync::LazyLock;

use clap::Args;

use crate::bad_usage;
use crate::error::Result;
use crate::session::sampler::{SamplerParams, breakers, random_seed};
use crate::token::Tokenizer;

static DEFAULT: LazyLock<SamplerParams> = LazyLock::new(SamplerParams::default);
static ORDER: LazyLock<String> = LazyLock::new(|| DEFAULT.samplers.join(","));

#[derive(Args)]
#[command(next_help_heading = "Sampling")]
pub(super) struct SamplingArgs {
    /// Seed; the same seed gives the same text [default: a random one]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Temperature; 0: always the likeliest token
    #[arg(long, value_name = "T", default_value_t = DEFAULT.temperature)]
    temp: f32,
    /// Keeps the K likeliest tokens; 0: all
    #[arg(long, value_name = "K", default_value_t = DEFAULT.top_k)]
    top_k: usize,
    /// Keeps the likeliest tokens up to this probability together; 1: all
    #[arg(long, value_name = "P", default_value_t = DEFAULT.top_p)]
    top_p: f32,
    /// Keeps tokens of at least this probability, relative to the likeliest; 0: all
    #[arg(long, value_name = "P", default_value_t = DEFAULT.min_p)]
    min_p: f32,
    /// Keeps typical tokens up to this probability together; 1: all
    #[arg(long, value_name = "P", default_value_t = DEFAULT.typical_p)]
    typical: f32,
    /// Keeps tokens up to N standard deviations below the largest logit; 0: all
    #[arg(long, value_name = "N", default_value_t = DEFAULT.top_n_sigma)]
    top_n_sigma: f32,
    /// How often XTC removes top choices; 0: never
    #[arg(long, value_name = "P", default_value_t = DEFAULT.xtc_probability)]
    xtc_probability: f32,
    /// Probability from which XTC takes a token for a top choice
    #[arg(long, value_name = "P", default_value_t = DEFAULT.xtc_threshold)]
    xtc_threshold: f32,
    /// Past tokens that the three penalties look at
    #[arg(long, value_name = "N", default_value_t = DEFAULT.repeat_last_n)]
    repeat_last_n: usize,
    /// Divides the logits of past tokens; 1: off
    #[arg(long, value_name = "X", default_value_t = DEFAULT.repeat_penalty)]
    repeat_penalty: f32,
    /// Subtracted from a logit for every time the token occurred
    #[arg(
        long,
        value_name = "X",
        default_value_t = DEFAULT.frequency_penalty,
        allow_negative_numbers = true,
    )]
    frequency_penalty: f32,
    /// Subtracted from a logit if the token occurred
    #[arg(
        long,
        value_name = "X",
        default_value_t = DEFAULT.presence_penalty,
        allow_negative_numbers = true,
    )]
    presence_penalty: f32,
    /// Strength of DRY, against repeated sequences; 0: off, usual: 0.8
    #[arg(long, value_name = "X", default_value_t = DEFAULT.dry_multiplier)]
    dry_multiplier: f32,
    /// Growth of DRY's penalty per repeated token
    #[arg(long, value_name = "X", default_value_t = DEFAULT.dry_base)]
    dry_base: f32,
    /// Longest repetition that DRY leaves alone, in tokens
    #[arg(long, value_name = "N", default_value_t = DEFAULT.dry_allowed_length)]
    dry_allowed_length: usize,
    /// Past tokens that DRY looks at [default: all]
    #[arg(long, value_name = "N")]
    dry_last_n: Option<usize>,
    /// Text across which DRY sees no repetition; may be given several times
    #[arg(
        long,
        value_name = "TEXT",
        default_values = ["\n", ":", "\"", "*"],
        hide_default_value = true,
    )]
    dry_breaker: Vec<String>,
    /// How far the temperature follows the uncertainty of the model, up and down; 0: not
    #[arg(long, value_name = "X", default_value_t = DEFAULT.dynatemp_range)]
    dynatemp_range: f32,
    /// Exponent of the uncertainty for it
    #[arg(long, value_name = "X", default_value_t = DEFAULT.dynatemp_exponent)]
    dynatemp_exp: f32,
    /// Mirostat 2 instead of the options that keep or remove tokens
    #[arg(long)]
    mirostat: bool,
    /// The surprise that mirostat aims at, in bits
    #[arg(long, value_name = "X", default_value_t = DEFAULT.mirostat_tau)]
    mirostat_tau: f32,
    /// How fast mirostat learns
    #[arg(long, value_name = "X", default_value_t = DEFAULT.mirostat_eta)]
    mirostat_eta: f32,
    /// Adds to the logit of a token, given by id or text; -inf bans it; may be given several times
    #[arg(long, value_name = "TOKEN=X")]
    logit_bias: Vec<String>,
    /// Samplers in their order; those left out are off
    #[arg(long, value_name = "NAMES", value_delimiter = ',', default_value = ORDER.as_str())]
    samplers: Vec<String>,
}

impl SamplingArgs {
    /// What was asked for. Ranges are checked by the sampler.
    pub(super) fn params(&self, tokenizer: &Tokenizer) -> Result<SamplerParams> {
        let bias = self.logit_bias.iter().map(|text| logit_bias(text, tokenizer));
        let dry_breakers = if self.dry_multiplier > 0.0 {
            breakers(self.dry_breaker.iter().map(String::as_str), tokenizer)?
        } else {
            Vec::new()
        };
        Ok(SamplerParams {
            seed: self.seed.unwrap_or_else(random_seed),
            samplers: self.samplers.clone(),
            logit_bias: bias.collect::<Result<_>>()?,
            repeat_last_n: self.repeat_last_n,
            repeat_penalty: self.repeat_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            dry_multiplier: self.dry_multiplier,
            dry_base: self.dry_base,
            dry_allowed_length: self.dry_allowed_length,
            dry_last_n: self.dry_last_n,
            dry_breakers,
            top_n_sigma: self.top_n_sigma,
            top_k: self.top_k,
            typical_p: self.typical,
            top_p: self.top_p,
            min_p: self.min_p,
            xtc_probability: self.xtc_probability,
            xtc_threshold: self.xtc_threshold,
            temperature: self.temp,
            dynatemp_range: self.dynatemp_range,
            dynatemp_exponent: self.dynatemp_exp,
            mirostat: self.mirostat,
            mirostat_tau: self.mirostat_tau,
            mirostat_eta: self.mirostat_eta,
        })
    }
}

/// `ID=X` or `TEXT=X`, where the text is one token.
fn logit_bias(text: &str, tokenizer: &Tokenizer) -> Result<(u32, f32)> {
    let parts = text.rsplit_once('=').and_then(|(token, x)| Some((token, x.parse().ok()?)));
    let Some((token, bias)) = parts else {
        bad_usage!("logit-bias = {text:?}; allowed TOKEN=NUMBER, such as 13=-inf");
    };
    if let Ok(id) = token.parse() {
        return Ok((id, bias));
    }
    match tokenizer.encode(token, false, true)?[..] {
        [id] => Ok((id, bias)),
        ref ids => bad_usage!("logit-bias = {text:?}: the text is {} tokens; allowed 1", ids.len()),
    }
}
