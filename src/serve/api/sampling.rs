//! How tokens are chosen, as requests say it: OpenAI's names, and llama-server's for what OpenAI does
//! not have.

use serde_json::{Map, Value, json};

use super::failure::{Answer, Failure};
use super::fields::{Fields, wrong};
use crate::error::{Error, excerpt};
use crate::session::sampler::{SamplerParams, breakers, random_seed};
use crate::token::Tokenizer;

/// A number by its name in requests, and in the samplers' own messages.
struct Number {
    name: &'static str,
    option: &'static str,
    of: fn(&mut SamplerParams) -> &mut f32,
}

const fn number(
    name: &'static str,
    option: &'static str,
    of: fn(&mut SamplerParams) -> &mut f32,
) -> Number {
    Number { name, option, of }
}

static NUMBERS: &[Number] = &[
    number("temperature", "temp", |p| &mut p.temperature),
    number("top_p", "top-p", |p| &mut p.top_p),
    number("frequency_penalty", "frequency-penalty", |p| &mut p.frequency_penalty),
    number("presence_penalty", "presence-penalty", |p| &mut p.presence_penalty),
    number("min_p", "min-p", |p| &mut p.min_p),
    number("typical_p", "typical", |p| &mut p.typical_p),
    number("top_n_sigma", "top-n-sigma", |p| &mut p.top_n_sigma),
    number("xtc_probability", "xtc-probability", |p| &mut p.xtc_probability),
    number("xtc_threshold", "xtc-threshold", |p| &mut p.xtc_threshold),
    number("repeat_penalty", "repeat-penalty", |p| &mut p.repeat_penalty),
    number("dry_multiplier", "dry-multiplier", |p| &mut p.dry_multiplier),
    number("dry_base", "dry-base", |p| &mut p.dry_base),
    number("dynatemp_range", "dynatemp-range", |p| &mut p.dynatemp_range),
    number("dynatemp_exponent", "dynatemp-exp", |p| &mut p.dynatemp_exponent),
    number("mirostat_tau", "mirostat-tau", |p| &mut p.mirostat_tau),
    number("mirostat_eta", "mirostat-eta", |p| &mut p.mirostat_eta),
];

/// A count by its name.
type Count = (&'static str, fn(&mut SamplerParams) -> &mut usize);

static COUNTS: &[Count] = &[
    ("top_k", |p| &mut p.top_k),
    ("repeat_last_n", |p| &mut p.repeat_last_n),
    ("dry_allowed_length", |p| &mut p.dry_allowed_length),
];

/// The least bias that OpenAI has, which bans a token.
const BANNED: f64 = -100.0;
/// Texts across which DRY sees no repetition.
const DRY_BREAKERS: [&str; 4] = ["\n", ":", "\"", "*"];

/// Reads what a request says of sampling.
pub(super) fn params(
    fields: &mut Fields,
    tokenizer: &Tokenizer,
    n_vocab: usize,
) -> Answer<SamplerParams> {
    let mut params = SamplerParams { seed: seed(fields)?, ..SamplerParams::default() };
    for number in NUMBERS {
        if let Some(x) = fields.number(number.name)? {
            *(number.of)(&mut params) = x as f32;
        }
    }
    for (name, of) in COUNTS {
        if let Some(n) = fields.whole(name, 0..=usize::MAX)? {
            *of(&mut params) = n;
        }
    }
    params.mirostat = fields.flag("mirostat")?.unwrap_or(false);
    if let Some(list) = fields.list("samplers")? {
        let name = |value: Value| match value {
            Value::String(name) => Ok(excerpt(&name)),
            other => Err(wrong("samplers", &other, "an array of strings")),
        };
        params.samplers = list.into_iter().map(name).collect::<Answer<_>>()?;
        if params.samplers.len() > NUMBERS.len() {
            let text = format!("samplers: {} names; each once is enough", params.samplers.len());
            return Err(Failure::field("samplers", text));
        }
    }
    params.logit_bias = logit_bias(fields)?;
    if params.dry_multiplier > 0.0 {
        params.dry_breakers = breakers(DRY_BREAKERS, tokenizer)?;
    }
    params.check(n_vocab).map_err(named)?;
    Ok(params)
}

/// A seed, or a random one. Negative ones are seeds too.
fn seed(fields: &mut Fields) -> Answer<u64> {
    let Some(value) = fields.take("seed") else { return Ok(random_seed()) };
    if !value.is_number() {
        return Err(wrong("seed", &value, "a whole number"));
    }
    value.as_u64().or_else(|| value.as_i64().map(|x| x as u64)).ok_or_else(|| {
        let text = format!("seed = {value}; allowed whole numbers of 64 bits");
        Failure::field("seed", text)
    })
}

fn logit_bias(fields: &mut Fields) -> Answer<Vec<(u32, f32)>> {
    let name = "logit_bias";
    let Some(biases) = fields.object(name)? else { return Ok(Vec::new()) };
    let one = |(id, value): (String, Value)| {
        let Ok(token) = id.parse::<u32>() else {
            let text = format!("{name}: \"{}\" is not the number of a token", excerpt(&id));
            return Err(Failure::field(name, text));
        };
        match value.as_f64() {
            Some(BANNED) => Ok((token, f32::NEG_INFINITY)),
            Some(bias) if (BANNED..=-BANNED).contains(&bias) => Ok((token, bias as f32)),
            _ => {
                let text = format!("{name} of token {id} = {value}; allowed {BANNED} to 100");
                Err(Failure::field(name, text))
            }
        }
    };
    biases.into_map().into_iter().map(one).collect()
}

/// The samplers' message with the name that requests have.
fn named(error: Error) -> Failure {
    let text = error.to_string();
    let known = NUMBERS.iter().map(|n| (n.option, n.name));
    let known = known.chain([("logit-bias", "logit_bias"), ("samplers", "samplers")]);
    for (option, name) in known {
        if let Some(rest) = text.strip_prefix(option).filter(|rest| rest.starts_with(' ')) {
            return Failure::field(name, format!("{name}{rest}"));
        }
    }
    Failure::from(error)
}

/// What holds unless a request says otherwise.
pub(super) fn defaults() -> Value {
    let mut params = SamplerParams::default();
    let mut all = Map::new();
    for number in NUMBERS {
        // Through the shortest decimal: 0.8, not 0.800000011920929.
        let x = (number.of)(&mut params).to_string().parse::<f64>();
        all.insert(number.name.into(), x.map_or(Value::Null, Value::from));
    }
    for (name, of) in COUNTS {
        all.insert((*name).into(), (*of(&mut params)).into());
    }
    all.insert("mirostat".into(), params.mirostat.into());
    all.insert("samplers".into(), json!(params.samplers));
    all.insert("seed".into(), Value::Null);
    Value::Object(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_of_the_samplers_gets_a_name() {
        for number in NUMBERS {
            let mut params = SamplerParams::default();
            *(number.of)(&mut params) = f32::NAN;
            let failure = named(params.check(10).unwrap_err());
            let json = failure.json();
            assert_eq!(json["error"]["param"], number.name);
            let start = format!("{} = NaN; allowed ", number.name);
            assert!(json["error"]["message"].as_str().unwrap().starts_with(&start), "{json}");
        }
    }
}
