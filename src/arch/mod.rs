//! Architectures as data: GGUF metadata in, [`Hparams`] out. No graph lives here.
//!
//! An entry is one file that fills [`Hparams`]; engines read only that, and never the name.

mod bert;
mod bloom;
mod cohere2;
mod command_r;
mod decoder;
mod deepseek2;
mod exaone4;
mod falcon;
mod gemma2;
mod gemma3;
mod gpt2;
mod gpt_oss;
mod gptneox;
mod granite;
mod granitemoe;
mod internlm2;
mod keys;
mod llama;
mod mistral3;
mod mpt;
mod nomic_bert;
mod olmo2;
mod olmoe;
mod phi3;
mod qwen2;
mod qwen2moe;
mod qwen3;
mod qwen3moe;
pub mod rewritten;
mod rope;
mod smollm3;
mod stablelm;
mod starcoder2;

pub use keys::Keys;

use crate::error::{Result, excerpt};
use crate::gguf::Gguf;
use crate::{bad_file, bad_usage};

/// A family of models and how its metadata is read.
pub struct Arch {
    /// The value of `general.architecture`, and the prefix of its keys.
    pub name: &'static str,
    /// Fills the hyper-parameters; the model's `n_vocab` is set by the caller.
    pub read: fn(&Keys) -> Result<Hparams>,
}

/// Every architecture that can run.
pub static ARCHS: &[Arch] = &[
    llama::ARCH,
    qwen2::ARCH,
    qwen3::ARCH,
    qwen3moe::ARCH,
    qwen2moe::ARCH,
    gemma2::ARCH,
    gemma3::ARCH,
    phi3::ARCH,
    smollm3::ARCH,
    olmo2::ARCH,
    olmoe::ARCH,
    granite::ARCH,
    granitemoe::ARCH,
    gpt_oss::ARCH,
    mistral3::ARCH,
    exaone4::ARCH,
    command_r::ARCH,
    deepseek2::ARCH,
    cohere2::ARCH,
    internlm2::ARCH,
    stablelm::ARCH,
    starcoder2::ARCH,
    falcon::ARCH,
    gptneox::ARCH,
    gpt2::ARCH,
    bloom::ARCH,
    mpt::ARCH,
    bert::ARCH,
    nomic_bert::ARCH,
];

/// Everything an engine must know about a model besides its weights.
#[derive(Debug, Clone, PartialEq)]
pub struct Hparams {
    /// The architecture's name, for people.
    pub arch: &'static str,
    /// Entries of the vocabulary, and rows of `token_embd`.
    pub n_vocab: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Longest context that the model was trained for, in tokens.
    pub n_ctx_train: usize,
    /// Whether tokens see none that follow; if not, all tokens of a text see each other.
    pub causal: bool,
    /// What a text's embedding is made of, if the file says so.
    pub pooling: Option<Pooling>,
    /// What differs between layers; its length is the number of layers.
    pub layers: Vec<LayerHparams>,
    /// Width of a query and key head.
    pub key_dim: usize,
    /// Width of a value head.
    pub value_dim: usize,
    /// Factor on query-key products, usually `1 / sqrt(key_dim)`.
    pub attn_scale: f32,
    /// `cap * tanh(score / cap)` on scores (Gemma 2, arXiv 2408.00118).
    pub attn_softcap: Option<f32>,
    /// `cap * tanh(logit / cap)` on logits.
    pub final_softcap: Option<f32>,
    /// The kind of every norm.
    pub norm: Norm,
    /// Whether token embeddings are normed: `token_embd_norm`.
    pub embedding_norm: bool,
    /// Tensor of the norm of what attention reads; without one it reads the residual stream.
    pub attn_norm: Option<&'static str>,
    /// The same of the FFN, which without one reads the residual stream, or, in parallel layers,
    /// what attention reads.
    pub ffn_norm: Option<&'static str>,
    /// What of queries and keys is normed before rotation: `attn_q_norm`, `attn_k_norm`.
    pub qk_norm: Option<QkNorm>,
    /// What is normed after attention and FFN.
    pub post_norm: PostNorm,
    /// Whether states of the last layer are normed: `output_norm`.
    pub output_norm: bool,
    /// Whether they become logits, by `output` or `token_embd`.
    pub output: bool,
    /// Whether attention and FFN both read the residual stream as it enters the layer.
    pub parallel: bool,
    /// Whether all heads have sinks, `attn_sinks`; others may.
    pub needs_sinks: bool,
    /// Whether positions come from a learned table, `position_embd`.
    pub learned_positions: bool,
    /// Kinds of tokens that have an embedding each, `token_types`; all tokens are of the first.
    pub token_types: Option<usize>,
    /// Exponent of the steepest slope of linear biases: scores of `n` heads lose `2^(-max (i + 1) / n)`
    /// for every position between query and key (ALiBi, arXiv 2108.12409).
    pub max_alibi_bias: Option<f32>,
    /// Growth of scores with the query's position.
    pub temperature: Option<Temperature>,
    /// What queries, keys and values are kept between, this and its negative, before anything else.
    pub qkv_limit: Option<f32>,
    /// Where keys and values are made in two steps.
    pub latent: Option<Latent>,
    /// Rotations of queries and keys, which layers choose from; all pair and rotate the same elements.
    pub ropes: Vec<Rope>,
    /// Whether files may have divisors of their frequencies, `rope_freqs`.
    pub rope_freqs: bool,
    /// Whether queries, keys and values share one tensor, `attn_qkv`.
    pub fused_qkv: bool,
    /// Bias of `attn_q`, `attn_k`, `attn_v` (or `attn_qkv`).
    pub qkv_bias: Bias,
    /// Bias of `attn_output`.
    pub attn_output_bias: Bias,
    /// Bias of the FFN's matrices.
    pub ffn_bias: Bias,
    /// The FFN's nonlinearity.
    pub activation: Activation,
    /// Where the FFN has a gate, whose activation is multiplied with `ffn_up`.
    pub ffn_gate: Gate,
    /// FFNs that some layers have many of.
    pub experts: Option<Experts>,
    /// Factor on token embeddings.
    pub embedding_scale: f32,
    /// Factor on what attention and FFN add to the residual stream.
    pub residual_scale: f32,
    /// Factor on logits.
    pub logit_scale: f32,
}

/// What may differ from layer to layer.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerHparams {
    /// Query heads.
    pub n_head: usize,
    /// Key and value heads; divides `n_head`.
    pub n_head_kv: usize,
    /// Width of the FFN that all tokens go through; 0 for none, beside experts.
    pub n_ff: usize,
    /// Whether it has experts.
    pub has_experts: bool,
    /// Which of the model's rotations it has.
    pub rope: Option<usize>,
    /// Keys that a query sees, itself included; `None` is all.
    pub window: Option<usize>,
    /// Kv heads, where the layer has been rewritten; `None`: all have the model's widths.
    pub rewritten: Option<Vec<KvHead>>,
}

/// Widths of a key and value head, and of the query heads that it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvHead {
    /// Elements of a query and a cached key.
    pub score_dim: usize,
    /// Elements of a cached value and of a head's output.
    pub value_dim: usize,
    /// Planes of the rotation that are left of it, paired as the model pairs them, in front of
    /// elements that are not rotated; `None`: all of the model's.
    pub planes: Option<Vec<usize>>,
}

/// A norm: `x / rms(x) * weight`, or `(x - mean) / std * weight + bias`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// Which of the two.
    pub kind: NormKind,
    /// Added to the variance.
    pub eps: f32,
    /// Whether a bias follows.
    pub bias: bool,
}

/// Kinds of norms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// Root mean square (arXiv 1910.07467).
    Rms,
    /// Mean and variance (arXiv 1607.06450).
    Layer,
}

/// What is normed after attention and FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PostNorm {
    /// Nothing.
    None,
    /// Their outputs, before they are added: `post_attention_norm`, `post_ffw_norm`.
    Outputs,
    /// The residual stream, after they were added: `attn_output_norm`, `layer_output_norm`.
    Sums,
}

impl PostNorm {
    /// Tensors of the norms after attention and after the FFN.
    pub fn tensors(self) -> Option<[&'static str; 2]> {
        match self {
            PostNorm::None => None,
            PostNorm::Outputs => Some(["post_attention_norm", "post_ffw_norm"]),
            PostNorm::Sums => Some(["attn_output_norm", "layer_output_norm"]),
        }
    }
}

/// What the states of a text's tokens become: its embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// Each stays itself.
    None,
    /// Their mean.
    Mean,
    /// The first token's alone, which is CLS where texts begin with it.
    Cls,
    /// The last token's alone.
    Last,
    /// A number, by a head that ranks pairs of texts.
    Rank,
}

impl Pooling {
    /// All of them, in the order of their numbers in files.
    pub const ALL: [Pooling; 5] =
        [Pooling::None, Pooling::Mean, Pooling::Cls, Pooling::Last, Pooling::Rank];

    /// The name on the command line and in messages.
    pub fn name(self) -> &'static str {
        ["none", "mean", "cls", "last", "rank"][self as usize]
    }
}

/// What of queries and keys is normed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Every head for itself, all with one gain or each with its own.
    Heads,
    /// All heads together.
    Row,
}

/// Scores of a query at position `p` are multiplied by `1 + scale ln(1 + floor(p / length))`
/// (after Llama 4; arXiv 2501.19399).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Temperature {
    /// Factor of the logarithm.
    pub scale: f32,
    /// Tokens before it begins.
    pub length: usize,
}

/// Keys and values that are made of a latent, which is made of the layer's normed input (DeepSeek-V2,
/// arXiv 2405.04434, section 2.1). Rotated elements are apart: all keys share theirs, which come
/// with the latent, and in files they are the last of every query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Latent {
    /// Elements of the latent.
    pub rank: usize,
    /// The same of one that queries are made of, if they are.
    pub query_rank: Option<usize>,
    /// Rotated elements of a key.
    pub n_rotated: usize,
}

/// FFNs of which each token goes through a few (Shazeer et al. 2017, arXiv 1701.06538).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// How many there are.
    pub n: usize,
    /// How many a token goes through.
    pub n_used: usize,
    /// Width of each.
    pub n_ff: usize,
    /// What scores become weights by.
    pub gating: Gating,
    /// Whether weights of those that are used are divided by their sum.
    pub norm: bool,
    /// Factor on weights.
    pub scale: f32,
    /// Groups, of which those are used that have the best experts, and how many.
    pub groups: Option<(usize, usize)>,
    /// Bias of their matrices, and of what scores them.
    pub bias: Bias,
    /// Whether what all tokens go through beside them is multiplied with `1 / (1 + exp(-score))` of the
    /// token: `ffn_gate_inp_shexp`.
    pub shared_gate: bool,
}

/// What scores of experts become weights by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gating {
    /// Softmax over all experts.
    Softmax,
    /// `1 / (1 + exp(-score))` of each; those are used that are best once a bias is added, if there is
    /// one: `exp_probs_b` (DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
    Sigmoid,
}

/// Where a gate is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Nowhere.
    None,
    /// In a tensor of its own, `ffn_gate`.
    Own,
    /// In the first half of `ffn_up`'s rows.
    Fused,
}

/// Whether a matrix has a bias.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bias {
    /// Never; one in the file is unknown.
    Never,
    /// If the file has one.
    Optional,
    /// The file must have one.
    Required,
}

/// Nonlinearities of the FFN.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// `x * sigmoid(x)`.
    Silu,
    /// `x * P(X <= x)`, GELU (arXiv 1606.08415).
    Gelu,
    /// The same in its tanh approximation.
    GeluTanh,
    /// `g * sigmoid(1.702 g) * (u + 1)`, with `g` at most 7 and `u` between -7 and 7 (gpt-oss, arXiv
    /// 2508.10925).
    ClampedSwiglu,
}

/// Rotary position embedding (RoFormer, arXiv 2104.09864).
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Which elements form a pair.
    pub pairing: Pairing,
    /// Elements of a head that are rotated; the rest pass.
    pub dim: usize,
    /// Base of the wavelengths.
    pub base: f32,
    /// Factor on rotated queries and keys, besides that of a scaling.
    pub attn_factor: f32,
    /// How frequencies are changed for longer contexts.
    pub scaling: Scaling,
}

/// Which two elements rotate together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pairing {
    /// `2i` and `2i + 1`.
    Adjacent,
    /// `i` and `i + dim / 2` (GPT-NeoX).
    Half,
}

/// Changes of the rotation's frequencies. Divisors per frequency, such as Llama 3's, come as
/// tensors instead.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scaling {
    /// As trained.
    None,
    /// Positions divided by a factor (arXiv 2306.15595).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Interpolation by wavelength, and warmer attention (YaRN, arXiv 2309.00071).
    Yarn {
        /// The divisor of long wavelengths.
        factor: f32,
        /// The context before extension.
        n_ctx_orig: usize,
        /// Rotations over the context above which a frequency stays.
        beta_fast: f32,
        /// Rotations over the context below which it is divided in full.
        beta_slow: f32,
    },
    /// Divisors for short contexts and for long ones: `rope_factors_short`, `rope_factors_long`
    /// (LongRoPE, arXiv 2402.13753).
    Long {
        /// Longest context that is short.
        n_ctx_orig: usize,
    },
}

impl Hparams {
    /// Reads the hyper-parameters of a file whose vocabulary has `n_vocab` entries.
    pub fn read(gguf: &Gguf, n_vocab: usize) -> Result<Hparams> {
        let known = || ARCHS.iter().map(|a| a.name).collect::<Vec<_>>().join(", ");
        let Some(name) = gguf.str("general.architecture")? else {
            bad_file!("no key \"general.architecture\"; known architectures: {}", known());
        };
        let Some(arch) = ARCHS.iter().find(|a| a.name == name) else {
            bad_file!("architecture \"{}\" is not supported; known: {}", excerpt(name), known());
        };
        let mut hparams = (arch.read)(&Keys::new(gguf, arch.name))?;
        if hparams.experts.is_none() && hparams.layers.iter().any(|layer| layer.has_experts) {
            bad_file!(
                "key \"{name}.expert_count\": {name} with experts is not supported; expected 0 or none"
            );
        }
        rewritten::read(gguf, &mut hparams)?;
        Ok(Hparams { n_vocab, ..hparams })
    }

    /// The kv heads of a layer.
    pub fn kv_heads(&self, layer: &LayerHparams) -> Vec<KvHead> {
        let trained = KvHead { score_dim: self.key_dim, value_dim: self.value_dim, planes: None };
        layer.rewritten.clone().unwrap_or_else(|| vec![trained; layer.n_head_kv])
    }

    /// A context of `n` tokens, or of as many as the model has positions for.
    pub fn within_positions(&self, n: usize) -> usize {
        if self.learned_positions { n.min(self.n_ctx_train) } else { n }
    }

    /// What a text's embedding is made of: what the file says, or else the mean where all tokens see
    /// each other, and the last token's state where only that has seen them all.
    pub fn pooling(&self) -> Pooling {
        self.pooling.unwrap_or(if self.causal { Pooling::Last } else { Pooling::Mean })
    }

    /// Refuses models that do not say which token follows.
    pub fn must_predict(&self) -> Result<()> {
        if !self.output {
            bad_usage!(
                "this model ({}) has no output matrix, so it predicts no tokens; it makes embeddings of \
                 texts: qkov embed",
                self.arch
            );
        }
        if !self.causal {
            bad_usage!(
                "this model ({}) predicts no next token: its tokens see those that follow \
                 (attention.causal = false); it makes embeddings of texts: qkov embed",
                self.arch
            );
        }
        Ok(())
    }

    /// The rotation of a layer.
    pub fn rope(&self, layer: usize) -> Option<&Rope> {
        self.ropes.get(self.layers[layer].rope?)
    }

    /// Gives layers with a window another rotation than the model's first.
    fn rotate_windows(&mut self, change: impl Fn(Rope) -> Rope) {
        let windowed = |layer: &&mut LayerHparams| layer.window.is_some() && layer.rope.is_some();
        let Some(other) = self.ropes.first().cloned().map(change) else { return };
        if self.ropes[0] != other && self.layers.iter_mut().any(|l| windowed(&l)) {
            self.layers.iter_mut().filter(windowed).for_each(|layer| layer.rope = Some(1));
            self.ropes.push(other);
        }
    }

    /// Takes the rotation from layers without a window.
    fn rotate_windows_only(&mut self) {
        self.layers.iter_mut().filter(|l| l.window.is_none()).for_each(|l| l.rope = None);
    }

    /// Number of layers.
    pub fn n_layer(&self) -> usize {
        self.layers.len()
    }
}
