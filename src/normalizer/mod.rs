//! Normalizers: what turns one row of attention scores into weights.
//!
//! A [`Kind`] is an entry of the registry: a name, a formula with its paper, parameters with defaults
//! and ranges. A [`Choice`] is a kind with values for its parameters, and for those that all kinds
//! have ([`COMMON`]): `softmax`, `entmax:alpha=1.1`, `sigmoid:offset=2,renorm=l1`.

mod entmax;
mod length;
mod pointwise;
mod rectified;
mod softmax;
mod truncate;

use std::sync::{Arc, RwLock};

use serde::{Deserialize, Serialize};

use crate::bad_usage;
use crate::error::{Error, Result};
use crate::param;
pub use crate::param::{Domain, MAX, Param, param};
use crate::simd;

/// Turns scores into weights, one row at a time.
pub trait Normalizer: Sync + Send {
    /// Replaces the scores of the visible keys by their weights. A row is never empty, and holds
    /// no masked keys: the mask has removed them. NaN in gives NaN out.
    fn row(&self, scores: &mut [f32], at: Row);
}

/// Where a row of scores belongs. The number of visible keys is the row's length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Row {
    /// Position of the query in the sequence, from 0.
    pub position: usize,
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// Tokens of the context that the model was trained with.
    pub n_ctx_train: usize,
}

/// What a row costs beside the products with keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Every weight depends on its own score and the length of the row alone.
    Pointwise,
    /// One pass with running sums.
    Streaming,
    /// A statistic of the whole row comes before the weights.
    TwoPass,
    /// Scores are selected, sorted, or a root is searched.
    Selecting,
    /// Weights depend on the order of the keys.
    Ordered,
}

/// An entry of the registry.
pub struct Kind {
    /// The name on the command line and in files.
    pub name: &'static str,
    /// Weights `w` of scores `x` of `n` visible keys.
    pub formula: &'static str,
    /// Where it was published.
    pub paper: &'static str,
    /// Its parameters.
    pub params: &'static [Param],
    /// What it costs.
    pub class: Class,
    /// Whether, with its defaults, a constant added to all scores of a row changes nothing.
    pub shift_invariant: bool,
    /// Whether, with its defaults, the weights of a row sum to 1.
    pub sums_to_one: bool,
    /// Makes one with these values, in the order of `params`.
    pub make: fn(&[f32]) -> Box<dyn Normalizer>,
}

/// What the kinds of one file have in common.
struct Family {
    class: Class,
    shift_invariant: bool,
    sums_to_one: bool,
}

impl Family {
    const fn kind(
        &self,
        name: &'static str,
        formula: &'static str,
        paper: &'static str,
        params: &'static [Param],
        make: fn(&[f32]) -> Box<dyn Normalizer>,
    ) -> Kind {
        let Family { class, shift_invariant, sums_to_one } = *self;
        Kind { name, formula, paper, params, class, shift_invariant, sums_to_one, make }
    }
}

/// Parameters that every kind has. Scores are mapped to `(scale + scale_n ln n) x + offset + offset_n
/// ln n` before the kind sees them, and its weights are multiplied by `gain`.
pub static COMMON: &[Param] = &[
    param("scale", "factor on scores", 1.0, Domain::From(-MAX, MAX)),
    param("scale_n", "factor on scores, times ln n", 0.0, Domain::From(-MAX, MAX)),
    param("offset", "added to scores", 0.0, Domain::From(-MAX, MAX)),
    param("offset_n", "added to scores, times ln n", 0.0, Domain::From(-MAX, MAX)),
    param("gain", "factor on weights", 1.0, Domain::From(-MAX, MAX)),
    param(
        "renorm",
        "divides weights by the sum of their sizes",
        0.0,
        Domain::Word(&["none", "l1"]),
    ),
    param("sinks", "first keys that keep their softmax weights", 0.0, Domain::Whole(0.0, 1024.0)),
];

/// Every kind that the program has.
pub static NORMALIZERS: &[&Kind] = &[
    &softmax::SOFTMAX,
    &softmax::TEMPERATURE,
    &softmax::SOFTCAP,
    &softmax::SOFTMAX1,
    &softmax::SOFTMAX_N,
    &softmax::SINK,
    &softmax::SOFTERMAX,
    &softmax::SIGSOFTMAX,
    &softmax::L2,
    &softmax::GUMBEL,
    &softmax::DIFFERENTIAL,
    &length::SSMAX,
    &length::LOG_N,
    &length::LLAMA4,
    &length::YARN,
    &length::ADAPTIVE,
    &truncate::TOP_K,
    &truncate::TOP_P,
    &truncate::THRESHOLD,
    &truncate::SKIP,
    &truncate::HARDMAX,
    &truncate::CLIPPED,
    &entmax::SPARSEMAX,
    &entmax::ENTMAX15,
    &entmax::ENTMAX,
    &entmax::ASENTMAX,
    &pointwise::SIGMOID,
    &pointwise::RELU,
    &pointwise::RELU2,
    &pointwise::SOFTPLUS,
    &pointwise::SQUAREPLUS,
    &pointwise::ELU1,
    &pointwise::TAYLOR2,
    &pointwise::POWER,
    &pointwise::CONSMAX,
    &pointwise::LAPLACE,
    &pointwise::POLYMAX,
    &rectified::SOFTPICK,
    &rectified::LSSA,
    &rectified::LSSAR,
    &rectified::REWEIGHT,
    &rectified::STICK_BREAKING,
    &rectified::HCCS,
];

static REGISTERED: RwLock<Vec<&'static Kind>> = RwLock::new(Vec::new());

/// Adds a kind of one's own; it can then be chosen by its name like any other.
pub fn register(kind: &'static Kind) -> Result<()> {
    if kinds().iter().any(|k| k.name == kind.name) {
        bad_usage!("normalizer \"{}\" exists already", kind.name);
    }
    if let Ok(mut registered) = REGISTERED.write() {
        registered.push(kind);
    }
    Ok(())
}

/// Every kind, those registered from outside last.
pub fn kinds() -> Vec<&'static Kind> {
    let registered = REGISTERED.read().map(|r| r.clone()).unwrap_or_default();
    [NORMALIZERS, &registered].concat()
}

/// The kind of this name.
pub fn find(name: &str) -> Result<&'static Kind> {
    let kinds = kinds();
    match kinds.iter().find(|k| k.name == name) {
        Some(kind) => Ok(kind),
        None => {
            let known: Vec<_> = kinds.iter().map(|k| k.name).collect();
            bad_usage!("normalizer \"{name}\" is not known; known: {}", known.join(", "))
        }
    }
}

/// A kind with values for its parameters. Its form in files is its text.
#[derive(Clone, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Choice {
    kind: &'static Kind,
    /// Of the kind's parameters, then of [`COMMON`].
    values: Vec<f32>,
    inner: Arc<dyn Normalizer>,
    /// Whether the common parameters change nothing.
    plain: bool,
}

impl Choice {
    /// A kind with its defaults.
    pub fn of(kind: &'static Kind) -> Choice {
        let values = kind.params.iter().chain(COMMON).map(|p| p.default).collect();
        Choice::with(kind, values)
    }

    fn with(kind: &'static Kind, values: Vec<f32>) -> Choice {
        let (own, common) = values.split_at(kind.params.len());
        let plain = common.iter().zip(COMMON).all(|(value, param)| *value == param.default);
        let inner = Arc::from((kind.make)(own));
        Choice { kind, values, inner, plain }
    }

    /// Reads `NAME[:key=value,..]`.
    pub fn parse(text: &str) -> Result<Choice> {
        let (name, rest) = param::split(text);
        Choice::of(find(name)?).changed(rest)
    }

    /// The same with other values, those that `key=value,..` says.
    fn changed(&self, text: &str) -> Result<Choice> {
        let params = self.kind.params.iter().chain(COMMON);
        let owner = format!("normalizer {}", self.kind.name);
        Ok(Choice::with(self.kind, param::read(&owner, params, self.values.clone(), text)?))
    }

    /// The same with other values of some parameters.
    pub fn with_values(&self, values: &[(&str, f32)]) -> Result<Choice> {
        let pairs = values.iter().map(|(name, value)| format!("{name}={value}"));
        self.changed(&pairs.collect::<Vec<_>>().join(","))
    }

    /// The value of a parameter, if there is one of this name.
    pub fn value(&self, name: &str) -> Option<f32> {
        let at = self.kind.params.iter().chain(COMMON).position(|p| p.name == name)?;
        Some(self.values[at])
    }

    /// The value of one of [`COMMON`], if there is one of this name: kinds may use the name themselves.
    pub fn common(&self, name: &str) -> Option<f32> {
        let at = COMMON.iter().position(|p| p.name == name)?;
        Some(self.values[self.kind.params.len() + at])
    }

    /// The kind.
    pub fn kind(&self) -> &'static Kind {
        self.kind
    }

    /// Whether parameters that all kinds have change nothing.
    pub fn is_plain(&self) -> bool {
        self.plain
    }

    /// Whether a constant added to all scores of a row changes nothing.
    pub fn is_shift_invariant(&self) -> bool {
        self.kind.shift_invariant && self.is_default()
    }

    /// Whether the weights of a row sum to 1.
    pub fn sums_to_one(&self) -> bool {
        self.kind.sums_to_one && self.is_default()
    }

    fn is_default(&self) -> bool {
        let params = self.kind.params.iter().chain(COMMON);
        params.zip(&self.values).all(|(param, value)| param.default == *value)
    }

    /// What [`Choice::parse`] reads, with those values that are not defaults.
    pub fn text(&self) -> String {
        param::show(self.kind.name, self.kind.params.iter().chain(COMMON), &self.values)
    }

    /// Turns scores into weights. See [`Normalizer::row`].
    pub fn row(&self, scores: &mut [f32], at: Row) {
        if self.plain {
            return self.inner.row(scores, at);
        }
        let [scale, scale_n, offset, offset_n, gain, renorm, sinks] =
            self.values[self.kind.params.len()..]
        else {
            return;
        };
        let sinks = (sinks as usize).min(scores.len());
        let mut kept = 0.0;
        let mut first = [0.0f32; 16];
        let mut more = Vec::new();
        let first = match sinks {
            0..=16 => &mut first[..sinks],
            _ => {
                more.resize(sinks, 0.0);
                &mut more[..]
            }
        };
        if sinks > 0 {
            // Weights that softmax gives to the first keys, which the others must leave to them.
            let max = simd::max(scores);
            let sum = simd::sum_of_exp(scores, max);
            for (kept_here, x) in first.iter_mut().zip(scores.iter()) {
                *kept_here = simd::exp1(x - max) / sum;
                kept += *kept_here;
            }
        }
        let rest = &mut scores[sinks..];
        if !rest.is_empty() {
            let ln_n = (rest.len() as f32).ln();
            let (scale, offset) = (scale + scale_n * ln_n, offset + offset_n * ln_n);
            simd::map(rest, |x| scale * x + offset);
            self.inner.row(rest, at);
            if renorm == 1.0 {
                let size = simd::sum_of_sizes(rest);
                simd::scale(rest, if size > 0.0 { 1.0 / size } else { 0.0 });
            }
            simd::scale(rest, gain * (1.0 - kept));
        }
        scores[..sinks].copy_from_slice(first);
    }
}

impl From<Choice> for String {
    fn from(choice: Choice) -> String {
        choice.text()
    }
}

impl TryFrom<String> for Choice {
    type Error = Error;

    fn try_from(text: String) -> Result<Choice> {
        Choice::parse(&text)
    }
}

/// `max(x, 0)`, but NaN for NaN.
#[inline(always)]
fn positive(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

thread_local! {
    static MEMORY: std::cell::RefCell<[Vec<f32>; 2]> =
        const { std::cell::RefCell::new([Vec::new(), Vec::new()]) };
}

/// Calls `work` with memory of this thread, which has any content.
fn with_memory<T>(work: impl FnOnce(&mut [Vec<f32>; 2]) -> T) -> T {
    MEMORY.with_borrow_mut(work)
}

/// Calls `work` with a row and a copy of it.
fn with_copy<T>(x: &mut [f32], work: impl FnOnce(&mut [f32], &mut Vec<f32>) -> T) -> T {
    with_memory(|[copy, _]| {
        copy.clear();
        copy.extend_from_slice(x);
        work(x, copy)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::Level;

    #[test]
    fn every_level_gives_the_same_bits() {
        let row: Vec<f32> = (0..1037).map(|i| (i * 7919 % 1009) as f32 * 0.02 - 9.0).collect();
        let weights = || -> Vec<Vec<u32>> {
            let of = |kind: &&'static Kind| {
                let mut row = row.clone();
                Choice::of(kind).row(&mut row, Row { n_ctx_train: 512, ..Row::default() });
                row.into_iter().map(f32::to_bits).collect()
            };
            NORMALIZERS.iter().map(of).collect()
        };
        let best = simd::level();
        let fast = weights();
        assert!(simd::set_level(Level::Scalar));
        let plain = weights();
        simd::set_level(best);
        for (kind, (fast, plain)) in NORMALIZERS.iter().zip(fast.iter().zip(&plain)) {
            assert!(fast == plain, "{}", kind.name);
        }
    }
}
