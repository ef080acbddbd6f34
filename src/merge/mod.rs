//! Forms: how a layer's attention is factored, which decides what is multiplied and what is cached.
//!
//! A [`Form`] is an entry of the registry. A [`Choice`] is a form with values for its parameters:
//! `split`, `lowrank:ratio=0.75`. A form may rewrite a layer's weights before they are used, into
//! ones that look like those of a trained layer with other widths ([`Rewritten`]), or say that another
//! thing is cached ([`Geometry`]), or both.

mod absorb;
mod center;
mod cost;
mod lowrank;
mod mla;
mod slim;
mod split;

use std::ops::Range;

use faer::Mat;

pub use crate::arch::KvHead;
pub use cost::Cost;

use crate::arch::{Hparams, LayerHparams};
use crate::bad_usage;
use crate::error::Result;
use crate::param::{self, Param};

/// A way to factor the attention of a layer.
pub trait Form: Sync + Send {
    /// The name on the command line and in files.
    fn name(&self) -> &'static str;

    /// What it does.
    fn what(&self) -> &'static str;

    /// Where it was published.
    fn paper(&self) -> &'static str;

    /// Its parameters.
    fn params(&self) -> &'static [Param] {
        &[]
    }

    /// Whether a layer can have it with the values of `choice`; if not, the reason.
    fn applies(&self, choice: &Choice, site: &Site) -> Verdict;

    /// Whether a layer then computes what it was trained to, but for rounding; if not, the reason.
    fn exact(&self, choice: &Choice, site: &Site) -> Verdict;

    /// Whether it is made with what heads make of a text.
    fn needs_grams(&self, _: &Choice) -> bool {
        false
    }

    /// New matrices for layers that all have this form with the values of `choice`; `None` for those
    /// that keep theirs.
    fn rewrite(&self, _: &Choice, layers: &[Trained]) -> Result<Vec<Option<Rewritten>>> {
        Ok(vec![None; layers.len()])
    }

    /// The shape that attention has in a layer as it is in its file, rewritten or not.
    fn geometry(&self, hparams: &Hparams, layer: &LayerHparams) -> Geometry {
        Geometry::new(layer.n_head, hparams.kv_heads(layer))
    }

    /// Whether it gives layers other matrices, so that it cannot be changed in a model that is open.
    fn rewrites(&self) -> bool {
        false
    }

    /// What makes values of the keys of a token where those are all that is kept of it
    /// ([`Kept::Keys`]): `[k * value_dim, k * key_dim]`. An error is the reason why there is nothing.
    fn values(&self, _: &Choice, _: &Weights) -> std::result::Result<Option<Dense>, String> {
        Ok(None)
    }
}

/// Yes, or the reason why not.
pub type Verdict = std::result::Result<(), String>;

/// A layer that a form is to be used in.
#[derive(Clone)]
pub struct Site<'a> {
    /// Of the model.
    pub hparams: &'a Hparams,
    /// From 0.
    pub layer: usize,
    /// Whether a constant added to all scores of a row changes no weight, in every head.
    pub shift_invariant: bool,
    /// Whether weights of a row sum to 1, in every head.
    pub unit_sum: bool,
    /// Radians per position of every plane of the rotation; empty without one.
    pub frequencies: Vec<f64>,
}

impl Site<'_> {
    /// What differs between layers.
    pub fn at(&self) -> &LayerHparams {
        &self.hparams.layers[self.layer]
    }

    /// Whether queries and keys are rotated by their positions.
    pub fn rotates(&self) -> bool {
        self.at().rope.is_some()
    }
}

/// Refuses layers whose keys and values are made of a latent, or kept within bounds.
fn only_products(site: &Site) -> Verdict {
    match site.hparams.latent {
        Some(_) => {
            Err("keys and values are made of a latent; forms for that are split and mla".into())
        }
        None if site.hparams.qkv_limit.is_some() => {
            Err("queries, keys and values are kept within bounds; the form for that is split"
                .into())
        }
        None => Ok(()),
    }
}

/// A layer to be rewritten.
pub struct Trained<'a> {
    /// Where it is.
    pub site: Site<'a>,
    /// Reads its matrices; they are large, and not kept.
    pub weights: &'a (dyn Fn() -> Weights + Sync),
    /// What its heads make of a text, if the form needs it.
    pub grams: Option<&'a Grams>,
}

/// What attention looks like in one layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Geometry {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; each serves as many query heads in a row.
    pub kv: Vec<KvHead>,
    /// What the cache keeps of them.
    pub kept: Kept,
}

/// What the cache keeps of a token in one layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// The keys, rotated, and the values of all kv heads.
    KeysAndValues,
    /// The keys alone, before rotation. Values are made of them.
    Keys {
        /// Planes of the rotation.
        n_planes: usize,
    },
    /// A row for all heads: what keys and values are made of, and rotated elements that keys share.
    Latent {
        /// Elements that keys and values are made of: the layer's normed input, or what the model
        /// makes of it.
        rank: usize,
        /// Elements after them, with which every key begins.
        n_rotated: usize,
    },
}

/// A matrix that is to be rewritten, with its bias.
#[derive(Debug, Clone, PartialEq)]
pub struct Dense {
    /// Elements of a row.
    pub n_in: usize,
    /// Rows, one after the other. `[n_out, n_in]`
    pub data: Vec<f32>,
    /// `[n_out]`
    pub bias: Option<Vec<f32>>,
}

/// The matrices of a layer's attention, as in its file. `h`: query heads, `k`: kv heads.
#[derive(Debug, Clone, PartialEq)]
pub struct Weights {
    /// `[h * key_dim, n_embd]`
    pub q: Dense,
    /// `[k * key_dim, n_embd]`
    pub k: Dense,
    /// `[k * value_dim, n_embd]`
    pub v: Dense,
    /// `[n_embd, h * value_dim]`
    pub o: Dense,
}

/// A layer's attention in another form. Heads are those of `geometry`, which may differ in width;
/// the rows of `o` may have zeros after the last head's.
#[derive(Debug, Clone, PartialEq)]
pub struct Rewritten {
    /// The matrices, of the widths that `geometry` says.
    pub weights: Weights,
    /// The shape.
    pub geometry: Geometry,
    /// Of each kv head, how far its logits are changed, relative to their size: the root of the share
    /// of their squares that is lost.
    pub score_errors: Vec<f64>,
    /// The same of its outputs.
    pub output_errors: Vec<f64>,
    /// Directions of heads that second moments hardly show, and that count as if they did a little.
    pub damped: usize,
}

impl Rewritten {
    /// The root mean square of all errors.
    pub fn error(&self) -> f64 {
        let all = || self.score_errors.iter().chain(&self.output_errors);
        (all().map(|e| e * e).sum::<f64>() / all().count().max(1) as f64).sqrt()
    }
}

/// Second moments of what the heads of a layer make of a text, in `f64`, before any rotation and
/// after norms of heads. Means over tokens of outer products, biases included.
#[derive(Debug, Clone)]
pub struct Grams {
    /// For each kv head, the sum over its query heads. `[key_dim, key_dim]`
    pub queries: Vec<Mat<f64>>,
    /// For each kv head. `[key_dim, key_dim]`
    pub keys: Vec<Mat<f64>>,
    /// For each query head, of its output: values mixed with weights. `[value_dim, value_dim]`
    pub outputs: Vec<Mat<f64>>,
    /// For each kv head, means over tokens. `[key_dim]`
    pub key_means: Vec<Vec<f64>>,
    /// The same of values. `[value_dim]`
    pub value_means: Vec<Vec<f64>>,
    /// For each query head, the same of its output. `[value_dim]`
    pub output_means: Vec<Vec<f64>>,
}

/// Rows of a rewritten output matrix are whole blocks of this many elements.
pub const BLOCK: usize = 32;

/// Every form.
pub static FORMS: &[&dyn Form] =
    &[&split::Split, &center::Center, &lowrank::LowRank, &slim::Slim, &absorb::Absorb, &mla::Mla];

/// The form of this name.
pub fn find(name: &str) -> Result<&'static dyn Form> {
    match FORMS.iter().find(|f| f.name() == name) {
        Some(form) => Ok(*form),
        None => {
            let known: Vec<_> = FORMS.iter().map(|f| f.name()).collect();
            bad_usage!("form \"{name}\" is not known; known: {}", known.join(", "))
        }
    }
}

/// A form with values for its parameters.
#[derive(Clone)]
pub struct Choice {
    form: &'static dyn Form,
    values: Vec<f32>,
}

impl Choice {
    /// A form with its defaults.
    pub fn of(form: &'static dyn Form) -> Choice {
        Choice { form, values: form.params().iter().map(|p| p.default).collect() }
    }

    /// Reads `NAME[:key=value,..]`.
    pub fn parse(text: &str) -> Result<Choice> {
        let (name, rest) = param::split(text);
        let Choice { form, values } = Choice::of(find(name)?);
        let values = param::read(&format!("form {name}"), form.params().iter(), values, rest)?;
        Ok(Choice { form, values })
    }

    /// The form.
    pub fn form(&self) -> &'static dyn Form {
        self.form
    }

    /// The value of a parameter, if there is one of this name.
    pub fn value(&self, name: &str) -> Option<f32> {
        let at = self.form.params().iter().position(|p| p.name == name)?;
        Some(self.values[at])
    }

    /// The same with other values of some parameters.
    pub fn with_values(&self, values: &[(&str, f32)]) -> Result<Choice> {
        let pairs: Vec<String> = values.iter().map(|(name, x)| format!("{name}={x}")).collect();
        let owner = format!("form {}", self.form.name());
        let (params, own) = (self.form.params().iter(), self.values.clone());
        Ok(Choice { form: self.form, values: param::read(&owner, params, own, &pairs.join(","))? })
    }

    /// What [`Choice::parse`] reads, with those values that are not defaults.
    pub fn text(&self) -> String {
        param::show(self.form.name(), self.form.params().iter(), &self.values)
    }
}

impl Geometry {
    /// Attention that keeps keys and values.
    pub fn new(n_head: usize, kv: Vec<KvHead>) -> Geometry {
        Geometry { n_head, kv, kept: Kept::KeysAndValues }
    }

    /// What is cached, as if it were keys and values: heads without values where only keys are kept, one
    /// wide head where it is the input.
    pub fn stored(&self) -> Vec<KvHead> {
        let mut stored = self.kv.clone();
        match self.kept {
            Kept::KeysAndValues => {}
            Kept::Keys { .. } => stored.iter_mut().for_each(|head| head.value_dim = 0),
            Kept::Latent { rank, n_rotated } => {
                let score_dim = rank + n_rotated;
                stored = vec![KvHead { score_dim, value_dim: 0, planes: None }];
            }
        }
        stored
    }

    /// Kv heads.
    pub fn n_head_kv(&self) -> usize {
        self.kv.len()
    }

    /// Query heads that a kv head serves.
    pub fn per_kv(&self) -> usize {
        self.n_head / self.kv.len()
    }

    /// Place of a query head in a row of queries.
    pub fn queries(&self, head: usize) -> Range<usize> {
        self.place(head, |kv| kv.score_dim)
    }

    /// Place of a query head in a row of outputs.
    pub fn outputs(&self, head: usize) -> Range<usize> {
        self.place(head, |kv| kv.value_dim)
    }

    /// Place of a kv head in a row of keys.
    pub fn keys(&self, head: usize) -> Range<usize> {
        self.place_kv(head, |kv| kv.score_dim)
    }

    /// Place of a kv head in a row of values.
    pub fn values(&self, head: usize) -> Range<usize> {
        self.place_kv(head, |kv| kv.value_dim)
    }

    /// Cached elements per token.
    pub fn cached(&self) -> usize {
        self.stored().iter().map(|head| head.score_dim + head.value_dim).sum()
    }

    /// Elements of a row of keys.
    pub fn key_width(&self) -> usize {
        self.kv.iter().map(|kv| kv.score_dim).sum()
    }

    /// Elements of a row of values.
    pub fn value_width(&self) -> usize {
        self.kv.iter().map(|kv| kv.value_dim).sum()
    }

    /// Elements of a row of queries.
    pub fn query_width(&self) -> usize {
        self.per_kv() * self.key_width()
    }

    /// Elements of a row of outputs.
    pub fn output_width(&self) -> usize {
        self.per_kv() * self.value_width()
    }

    fn place(&self, head: usize, dim: impl Fn(&KvHead) -> usize) -> Range<usize> {
        let at = self.place_kv(head / self.per_kv(), dim);
        let start = at.start * self.per_kv() + head % self.per_kv() * at.len();
        start..start + at.len()
    }

    fn place_kv(&self, head: usize, dim: impl Fn(&KvHead) -> usize) -> Range<usize> {
        let start = self.kv[..head].iter().map(&dim).sum();
        start..start + dim(&self.kv[head])
    }
}
