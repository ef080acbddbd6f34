//! Metadata keys of one architecture, read with their allowed ranges.

use std::ops::RangeInclusive;

use super::{Bias, Experts, Gating, LayerHparams, Pairing, Pooling, Rope, Scaling};
use crate::bad_file;
use crate::error::Result;
use crate::gguf::{Gguf, Value};

/// Widths above this are taken for damage.
const MAX_WIDTH: u32 = 1 << 20;
/// Most layers of a model.
const MAX_LAYERS: u32 = 1024;

/// The keys that begin with an architecture's name.
pub struct Keys<'a> {
    /// The file.
    pub gguf: &'a Gguf,
    /// The prefix.
    pub arch: &'static str,
}

impl<'a> Keys<'a> {
    /// The keys of `arch` in `gguf`.
    pub fn new(gguf: &'a Gguf, arch: &'static str) -> Keys<'a> {
        Keys { gguf, arch }
    }

    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.arch)
    }

    /// A count that must be there and in range.
    pub fn count(&self, key: &str, range: RangeInclusive<u32>) -> Result<usize> {
        match self.count_or_none(key, range.clone())? {
            Some(count) => Ok(count),
            None => bad_file!(
                "missing key \"{}\"; allowed {}..={}",
                self.name(key),
                range.start(),
                range.end()
            ),
        }
    }

    /// A count that may be absent.
    pub fn count_or_none(&self, key: &str, range: RangeInclusive<u32>) -> Result<Option<usize>> {
        let name = self.name(key);
        match self.gguf.u32(&name)? {
            Some(n) if !range.contains(&n) => {
                bad_file!("key \"{name}\" = {n}; allowed {}..={}", range.start(), range.end())
            }
            found => Ok(found.map(|n| n as usize)),
        }
    }

    /// A positive width that must be there.
    pub fn width(&self, key: &str) -> Result<usize> {
        self.count(key, 1..=MAX_WIDTH)
    }

    /// `block_count`.
    pub fn n_layer(&self) -> Result<usize> {
        self.count("block_count", 1..=MAX_LAYERS)
    }

    /// `context_length`.
    pub fn n_ctx_train(&self) -> Result<usize> {
        self.count("context_length", 1..=1 << 30)
    }

    /// The context before it was extended.
    pub fn n_ctx_orig(&self) -> Result<usize> {
        let given = self.count_or_none("rope.scaling.original_context_length", 1..=1 << 30)?;
        given.map_or_else(|| self.n_ctx_train(), Ok)
    }

    /// A finite float above zero that may be absent.
    pub fn positive_or_none(&self, key: &str) -> Result<Option<f32>> {
        let name = self.name(key);
        match self.gguf.f32(&name)? {
            Some(x) if x <= 0.0 || !x.is_finite() => bad_file!("key \"{name}\" = {x}; must be > 0"),
            found => Ok(found),
        }
    }

    /// A finite float above zero that may be absent, or 0 for the same.
    pub fn not_negative_or_none(&self, key: &str) -> Result<Option<f32>> {
        match self.gguf.f32(&self.name(key))? {
            Some(0.0) => Ok(None),
            _ => self.positive_or_none(key),
        }
    }

    /// A finite float above zero that must be there.
    pub fn positive(&self, key: &str) -> Result<f32> {
        match self.positive_or_none(key)? {
            Some(x) => Ok(x),
            None => bad_file!("missing key \"{}\"; a float > 0", self.name(key)),
        }
    }

    /// A flag, or what it is without the key.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool> {
        Ok(self.gguf.bool(&self.name(key))?.unwrap_or(default))
    }

    /// `pooling_type`.
    pub fn pooling(&self) -> Result<Option<Pooling>> {
        let most = Pooling::ALL.len() as u32 - 1;
        let number = self.count_or_none("pooling_type", 0..=most)?;
        Ok(number.map(|i| Pooling::ALL[i]))
    }

    /// Kinds of tokens that have embeddings; if there is one kind, it may go without.
    pub fn token_types(&self) -> Result<Option<usize>> {
        let key = "tokenizer.ggml.token_type_count";
        match self.gguf.u32(key)?.unwrap_or(1) {
            1 if !self.has_tensor("token_types.weight") => Ok(None),
            n @ 1..=MAX_WIDTH => Ok(Some(n as usize)),
            n => bad_file!("key \"{key}\" = {n}; allowed 1..={MAX_WIDTH}"),
        }
    }

    /// Whether the file has a tensor of this name.
    pub fn has_tensor(&self, name: &str) -> bool {
        self.gguf.tensor(name).is_some()
    }

    /// One count per layer, from a single number or from an array of them.
    pub fn per_layer(&self, key: &str, n_layer: usize) -> Result<Option<Vec<usize>>> {
        let name = self.name(key);
        let Some(Value::Array(array)) = self.gguf.get(&name) else {
            let one = self.count_or_none(key, 1..=MAX_WIDTH)?;
            return Ok(one.map(|n| vec![n; n_layer]));
        };
        if array.len != n_layer {
            bad_file!(
                "key \"{name}\" has {} entries; expected {n_layer}, one per layer",
                array.len
            );
        }
        let mut counts = Vec::new();
        for (i, value) in array.iter().enumerate() {
            match value.integer() {
                Some(n) if (1..=i128::from(MAX_WIDTH)).contains(&n) => counts.push(n as usize),
                Some(n) => bad_file!("key \"{name}\", layer {i}: {n}; allowed 1..={MAX_WIDTH}"),
                None => bad_file!(
                    "key \"{name}\", layer {i}: expected an integer, found {}",
                    value.value_type().name()
                ),
            }
        }
        Ok(Some(counts))
    }

    /// Heads and FFN width of every layer; none rotates, and all see everything. The width is 0 without
    /// its key in a model with experts.
    pub fn layers(&self) -> Result<Vec<LayerHparams>> {
        let n_layer = self.n_layer()?;
        let has_experts = self.n_experts()?.is_some();
        let need = |key: &str| match self.per_layer(key, n_layer)? {
            Some(counts) => Ok(counts),
            None => bad_file!("missing key \"{}\"; allowed 1..={MAX_WIDTH}", self.name(key)),
        };
        let n_head = need("attention.head_count")?;
        let n_head_kv = self.per_layer("attention.head_count_kv", n_layer)?;
        let n_head_kv = n_head_kv.unwrap_or_else(|| n_head.clone());
        let n_ff = match has_experts {
            true => self.per_layer("feed_forward_length", n_layer)?.unwrap_or(vec![0; n_layer]),
            false => need("feed_forward_length")?,
        };
        let mut layers = Vec::new();
        for (i, ((n_head, n_head_kv), n_ff)) in
            n_head.into_iter().zip(n_head_kv).zip(n_ff).enumerate()
        {
            if n_head % n_head_kv != 0 {
                bad_file!(
                    "layer {i}: {n_head} query heads are not a multiple of {n_head_kv} key and value heads"
                );
            }
            layers.push(LayerHparams {
                n_head,
                n_head_kv,
                n_ff,
                has_experts,
                rope: None,
                window: None,
                rewritten: None,
            });
        }
        Ok(layers)
    }

    /// Gives layers the window of `attention.sliding_window`, or `window` without that key: the layers
    /// that `attention.sliding_window_pattern` names, or all but every `period`th.
    pub fn windows(
        &self,
        layers: &mut [LayerHparams],
        window: Option<usize>,
        period: u32,
    ) -> Result<()> {
        let given = self.count_or_none("attention.sliding_window", 0..=1 << 30)?;
        let window = given.or(window).filter(|n| *n > 0);
        let key = "attention.sliding_window_pattern";
        let name = self.name(key);
        let windowed: Vec<bool> = match self.gguf.get(&name) {
            Some(Value::Array(array)) => {
                let flag = |value: Value| match value {
                    Value::Bool(flag) => Some(flag),
                    other => other.integer().map(|n| n != 0),
                };
                match array.iter().map(flag).collect::<Option<Vec<_>>>() {
                    Some(flags) if flags.len() == layers.len() => flags,
                    _ => {
                        bad_file!("key \"{name}\": expected {} flags, one per layer", layers.len())
                    }
                }
            }
            _ => {
                let period = self.count_or_none(key, 0..=MAX_LAYERS)?.unwrap_or(period as usize);
                // None is left out by a period of 0.
                (0..layers.len()).map(|i| period == 0 || i % period < period - 1).collect()
            }
        };
        for (layer, windowed) in layers.iter_mut().zip(windowed) {
            layer.window = window.filter(|_| windowed);
        }
        Ok(())
    }

    /// Widths of key and value heads: their own keys, or an even share of the embedding.
    pub fn head_dims(&self, n_embd: usize, layers: &[LayerHparams]) -> Result<(usize, usize)> {
        let given = self.count_or_none("attention.key_length", 1..=MAX_WIDTH)?;
        let n_head = layers.first().map_or(1, |l| l.n_head);
        let key_dim = match given {
            Some(dim) => dim,
            None if n_embd.is_multiple_of(n_head) => n_embd / n_head,
            None => bad_file!(
                "embedding_length {n_embd} is not a multiple of {n_head} heads, and \"{}\" is missing",
                self.name("attention.key_length")
            ),
        };
        let value_dim = self.count_or_none("attention.value_length", 1..=MAX_WIDTH)?;
        Ok((key_dim, value_dim.unwrap_or(key_dim)))
    }

    /// `expert_count`, if there are any.
    fn n_experts(&self) -> Result<Option<usize>> {
        Ok(self.count_or_none("expert_count", 0..=1 << 16)?.filter(|n| *n > 0))
    }

    /// Experts, those of a family with this gating whose keys do not say another; none without them.
    pub fn experts(&self, gating: Gating, norm: bool) -> Result<Option<Experts>> {
        let Some(n) = self.n_experts()? else { return Ok(None) };
        let n_used = self.count("expert_used_count", 1..=n as u32)?;
        let gating = match self.count_or_none("expert_gating_func", 0..=3)? {
            None | Some(0) => gating,
            Some(2) => Gating::Sigmoid,
            // Softmax of those that are used is what dividing by their sum gives.
            _ => Gating::Softmax,
        };
        let groups = self.count_or_none("expert_group_count", 0..=n as u32)?.unwrap_or(0);
        let most = if groups > 0 { groups as u32 } else { u32::MAX };
        let groups_used = self.count_or_none("expert_group_used_count", 0..=most)?;
        if groups > 1 && n % groups != 0 {
            bad_file!("{n} experts are not a multiple of {groups} groups");
        }
        let n_ff = match self.count_or_none("expert_feed_forward_length", 1..=MAX_WIDTH)? {
            Some(n_ff) => n_ff,
            None => self.width("feed_forward_length")?,
        };
        Ok(Some(Experts {
            n,
            n_used,
            n_ff,
            gating,
            norm: self.flag("expert_weights_norm", norm)?,
            scale: self.positive_or_none("expert_weights_scale")?.unwrap_or(1.0),
            groups: (groups > 1).then(|| (groups, groups_used.unwrap_or(groups).max(1))),
            bias: Bias::Never,
            shared_gate: false,
        }))
    }

    /// Rotation with its scaling.
    pub fn rope(&self, pairing: Pairing, key_dim: usize) -> Result<Rope> {
        let dim = self.count_or_none("rope.dimension_count", 1..=MAX_WIDTH)?.unwrap_or(key_dim);
        if dim % 2 != 0 || dim > key_dim {
            bad_file!(
                "rope.dimension_count = {dim}; must be even and at most the head width {key_dim}"
            );
        }
        let base = self.positive_or_none("rope.freq_base")?.unwrap_or(10_000.0);
        let attn_factor = self.positive_or_none("rope.scaling.attn_factor")?.unwrap_or(1.0);
        Ok(Rope { pairing, dim, base, attn_factor, scaling: self.rope_scaling()? })
    }

    fn rope_scaling(&self) -> Result<Scaling> {
        let name = self.name("rope.scaling.type");
        let factor = self.positive_or_none("rope.scaling.factor")?;
        // Files from before `rope.scaling.*` carry a linear factor alone.
        let factor = factor.or(self.positive_or_none("rope.scale_linear")?).unwrap_or(1.0);
        let n_ctx_orig = self.n_ctx_orig()?;
        match self.gguf.str(&name)? {
            None if self.has_tensor("rope_factors_short.weight") => {
                Ok(Scaling::Long { n_ctx_orig })
            }
            Some("longrope") => Ok(Scaling::Long { n_ctx_orig }),
            None if factor == 1.0 => Ok(Scaling::None),
            None | Some("linear") => Ok(Scaling::Linear { factor }),
            Some("none") => Ok(Scaling::None),
            Some("yarn") => Ok(Scaling::Yarn {
                factor,
                n_ctx_orig,
                beta_fast: self.positive_or_none("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: self.positive_or_none("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            }),
            Some("dynamic") => bad_file!(
                "key \"{name}\" = \"dynamic\": frequencies would change with the length of a text, but \
                 keys are cached rotated; allowed none, linear, yarn, longrope"
            ),
            Some(other) => bad_file!(
                "key \"{name}\" = \"{}\"; allowed none, linear, yarn, longrope",
                crate::error::excerpt(other)
            ),
        }
    }
}
