//! Models of known shapes with random weights, made in memory: for speed, only shapes and formats
//! matter.

use crate::bad_usage;
use crate::error::Result;
use crate::gguf::{Bytes, Data, Gguf, Value, ValueType, Writer};
use crate::quant;

/// The shape of a model.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    /// The name on the command line.
    pub name: &'static str,
    /// The architecture.
    pub arch: &'static str,
    /// Width of the residual stream.
    pub n_embd: u64,
    /// Layers.
    pub n_layer: u32,
    /// Query heads.
    pub n_head: u64,
    /// Key and value heads.
    pub n_head_kv: u64,
    /// Elements of a head.
    pub head_dim: u64,
    /// Width of the feed-forward network, or of each expert.
    pub n_ff: u64,
    /// Experts in place of a feed-forward network, and how many of them a token goes through.
    pub experts: Option<(u32, u32)>,
    /// Tokens of the vocabulary.
    pub n_vocab: u64,
    /// Whether the embeddings are also the output matrix.
    pub tied: bool,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether queries and keys are normed, all heads together.
    pub qk_norm: bool,
    /// Base of the rotation's frequencies; without one, positions are learned, as are biases of all
    /// norms and matrices.
    pub rope_base: Option<f32>,
}

/// Shapes of published models, from their configurations.
pub static SHAPES: &[Shape] = &[
    Shape {
        name: "gpt2",
        arch: "gpt2",
        n_embd: 768,
        n_layer: 12,
        n_head: 12,
        n_head_kv: 12,
        head_dim: 64,
        n_ff: 3072,
        experts: None,
        n_vocab: 50_257,
        tied: true,
        qkv_bias: true,
        qk_norm: false,
        rope_base: None,
    },
    Shape {
        name: "smollm2-135m",
        arch: "llama",
        n_embd: 576,
        n_layer: 30,
        n_head: 9,
        n_head_kv: 3,
        head_dim: 64,
        n_ff: 1536,
        experts: None,
        n_vocab: 49_152,
        tied: true,
        qkv_bias: false,
        qk_norm: false,
        rope_base: Some(1e5),
    },
    Shape {
        name: "qwen2.5-0.5b",
        arch: "qwen2",
        n_embd: 896,
        n_layer: 24,
        n_head: 14,
        n_head_kv: 2,
        head_dim: 64,
        n_ff: 4864,
        experts: None,
        n_vocab: 151_936,
        tied: true,
        qkv_bias: true,
        qk_norm: false,
        rope_base: Some(1e6),
    },
    Shape {
        name: "llama-3.2-1b",
        arch: "llama",
        n_embd: 2048,
        n_layer: 16,
        n_head: 32,
        n_head_kv: 8,
        head_dim: 64,
        n_ff: 8192,
        experts: None,
        n_vocab: 128_256,
        tied: true,
        qkv_bias: false,
        qk_norm: false,
        rope_base: Some(5e5),
    },
    Shape {
        name: "olmoe-1b-7b",
        arch: "olmoe",
        n_embd: 2048,
        n_layer: 16,
        n_head: 16,
        n_head_kv: 16,
        head_dim: 128,
        n_ff: 1024,
        experts: Some((64, 8)),
        n_vocab: 50_304,
        tied: false,
        qkv_bias: false,
        qk_norm: true,
        rope_base: Some(1e4),
    },
    Shape {
        name: "llama-3.1-8b",
        arch: "llama",
        n_embd: 4096,
        n_layer: 32,
        n_head: 32,
        n_head_kv: 8,
        head_dim: 128,
        n_ff: 14_336,
        experts: None,
        n_vocab: 128_256,
        tied: false,
        qkv_bias: false,
        qk_norm: false,
        rope_base: Some(5e5),
    },
];

/// A mixture of formats as `llama-quantize` makes it.
struct Mixture {
    name: &'static str,
    most: &'static str,
    /// `attn_v` and `ffn_down` of the layers that get more bits.
    more: &'static str,
    /// The output matrix, or the embeddings where they are it.
    output: &'static str,
}

const fn plain(name: &'static str, output: &'static str) -> Mixture {
    Mixture { name, most: name, more: name, output }
}

static MIXTURES: &[Mixture] = &[
    plain("F32", "F32"),
    plain("F16", "F16"),
    plain("BF16", "BF16"),
    plain("Q4_0", "Q6_K"),
    plain("Q4_1", "Q6_K"),
    plain("Q5_0", "Q6_K"),
    plain("Q5_1", "Q6_K"),
    plain("Q8_0", "Q8_0"),
    plain("IQ4_NL", "Q6_K"),
    plain("IQ4_XS", "Q6_K"),
    plain("Q6_K", "Q6_K"),
    Mixture { name: "Q4_K_M", most: "Q4_K", more: "Q6_K", output: "Q6_K" },
    Mixture { name: "Q5_K_M", most: "Q5_K", more: "Q6_K", output: "Q6_K" },
];

/// The shape of this name.
pub fn find(name: &str) -> Result<&'static Shape> {
    match SHAPES.iter().find(|s| s.name == name) {
        Some(shape) => Ok(shape),
        None => {
            let known: Vec<_> = SHAPES.iter().map(|s| s.name).collect();
            bad_usage!("shape \"{name}\" is not known; known: {}", known.join(", "))
        }
    }
}

/// The format for rows of `n_in` elements: what was asked for, or where its blocks do not fit, what
/// `llama-quantize` takes instead.
fn fitting(name: &'static str, n_in: u64) -> &'static str {
    match name {
        _ if n_in.is_multiple_of(256) => name,
        "Q4_K" => "Q5_0",
        "Q5_K" => "Q5_1",
        "Q6_K" => "Q8_0",
        "IQ4_XS" => "IQ4_NL",
        name => name,
    }
}

/// A model of this shape whose matrices have the formats of a mixture such as `Q4_K_M`.
pub fn synthetic(shape: &Shape, mixture: &str) -> Result<Gguf> {
    Gguf::parse(Bytes::from(file(shape, mixture)?.to_bytes()?))
}

/// The same as a file that can be written.
pub fn file(shape: &Shape, mixture: &str) -> Result<Writer<'static>> {
    let Some(mixture) = MIXTURES.iter().find(|m| m.name == mixture) else {
        let known: Vec<_> = MIXTURES.iter().map(|m| m.name).collect();
        bad_usage!("type \"{mixture}\" is not known; known: {}", known.join(", "));
    };
    let mut writer = Writer::new();
    metadata(shape, &mut writer)?;
    let mut seed = 0x9E37_79B9_7F4A_7C15;
    let mut matrix =
        |writer: &mut Writer, name: &str, format: &'static str, [n_in, n_out, n]: [u64; 3]| {
            let Some(format) = quant::format_named(fitting(format, n_in)) else {
                bad_usage!("type \"{format}\" cannot be computed with");
            };
            seed += 1;
            let mut state = seed;
            // Made row by row while the file is, so that there is one copy only.
            let rows = Data::stream(move |sink| {
                (0..n * n_out).try_for_each(|_| sink(&format.random_row(n_in as usize, &mut state)))
            });
            writer.tensor(name, format.ty, &[n_in, n_out, n][..if n > 1 { 3 } else { 2 }], rows)
        };
    let Some(f32s) = quant::format_named("F32") else { bad_usage!("no F32") };
    let vector = |writer: &mut Writer, name: &str, n: u64, x: f32| {
        let data: Vec<u8> = std::iter::repeat_n(x.to_le_bytes(), n as usize).flatten().collect();
        writer.tensor(name, f32s.ty, &[n], Data::View(Bytes::from(data)))
    };
    let w = &mut writer;
    let (e, q, kv) =
        (shape.n_embd, shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim);
    let embd = if shape.tied { mixture.output } else { mixture.most };
    let norm = |w: &mut Writer, name: &str| {
        vector(w, &format!("{name}.weight"), e, 1.0)?;
        match shape.rope_base {
            Some(_) => Ok(()),
            None => vector(w, &format!("{name}.bias"), e, 0.01),
        }
    };
    matrix(w, "token_embd.weight", embd, [e, shape.n_vocab, 1])?;
    norm(w, "output_norm")?;
    if shape.rope_base.is_none() {
        matrix(w, "position_embd.weight", mixture.most, [e, n_ctx(shape).into(), 1])?;
    }
    if !shape.tied {
        matrix(w, "output.weight", mixture.output, [e, shape.n_vocab, 1])?;
    }
    let n = shape.n_layer;
    for i in 0..n {
        // As `use_more_bits` of llama.cpp's quantizer.
        let more = i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2;
        let more = if more { mixture.more } else { mixture.most };
        let at = |name: &str| format!("blk.{i}.{name}");
        for (name, format, dims) in matrices(shape, mixture.most, more) {
            matrix(w, &at(&format!("{name}.weight")), format, dims)?;
            let is_qkv = ["attn_q", "attn_k", "attn_v"].contains(&name);
            if shape.rope_base.is_none() || is_qkv && shape.qkv_bias {
                vector(w, &at(&format!("{name}.bias")), dims[1], 0.01)?;
            }
        }
        if shape.qk_norm {
            vector(w, &at("attn_q_norm.weight"), q, 1.0)?;
            vector(w, &at("attn_k_norm.weight"), kv, 1.0)?;
        }
        for name in ["attn_norm", "ffn_norm"] {
            norm(w, &at(name))?;
        }
    }
    Ok(writer)
}

/// A matrix of a layer: its name, its format, and its dims `[n_in, n_out, experts]`.
type Matrix = (&'static str, &'static str, [u64; 3]);

/// The matrices of a layer, most in one format, some in another.
fn matrices(shape: &Shape, most: &'static str, more: &'static str) -> Vec<Matrix> {
    let (e, ff) = (shape.n_embd, shape.n_ff);
    let (q, kv) = (shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim);
    let is_gated = shape.rope_base.is_some();
    let mut all = match is_gated {
        true => vec![
            ("attn_q", most, [e, q, 1]),
            ("attn_k", most, [e, kv, 1]),
            ("attn_v", more, [e, kv, 1]),
        ],
        false => vec![("attn_qkv", most, [e, q + 2 * kv, 1])],
    };
    all.push(("attn_output", most, [q, e, 1]));
    match shape.experts {
        Some((n, _)) => all.extend([
            ("ffn_gate_inp", "F32", [e, n.into(), 1]),
            ("ffn_gate_exps", most, [e, ff, n.into()]),
            ("ffn_up_exps", most, [e, ff, n.into()]),
            ("ffn_down_exps", more, [ff, e, n.into()]),
        ]),
        None => {
            all.extend(is_gated.then_some(("ffn_gate", most, [e, ff, 1])));
            all.extend([("ffn_up", most, [e, ff, 1]), ("ffn_down", more, [ff, e, 1])]);
        }
    }
    all
}

/// Context in tokens: long enough to time any depth, but not longer than a table of positions may be.
fn n_ctx(shape: &Shape) -> u32 {
    if shape.rope_base.is_some() { 32_768 } else { 4096 }
}

fn metadata(shape: &Shape, w: &mut Writer) -> Result<()> {
    let arch = shape.arch;
    w.set("general.architecture", Value::String(arch.as_bytes()))?;
    w.set("general.name", Value::String(shape.name.as_bytes()))?;
    for (key, n) in [
        ("context_length", n_ctx(shape)),
        ("embedding_length", shape.n_embd as u32),
        ("block_count", shape.n_layer),
        ("feed_forward_length", shape.n_ff as u32),
        ("attention.head_count", shape.n_head as u32),
        ("attention.head_count_kv", shape.n_head_kv as u32),
        ("attention.key_length", shape.head_dim as u32),
        ("attention.value_length", shape.head_dim as u32),
        ("rope.dimension_count", shape.head_dim as u32),
    ] {
        if shape.rope_base.is_some() || !key.starts_with("rope.") {
            w.set(&format!("{arch}.{key}"), Value::U32(n))?;
        }
    }
    if let Some((n, n_used)) = shape.experts {
        w.set(&format!("{arch}.expert_count"), Value::U32(n))?;
        w.set(&format!("{arch}.expert_used_count"), Value::U32(n_used))?;
    }
    let epsilon = match shape.rope_base {
        Some(base) => {
            w.set(&format!("{arch}.rope.freq_base"), Value::F32(base))?;
            "layer_norm_rms_epsilon"
        }
        None => "layer_norm_epsilon",
    };
    w.set(&format!("{arch}.attention.{epsilon}"), Value::F32(1e-5))?;
    // A vocabulary of the right size, so that texts become tokens: what ASCII shows, as GPT-2 writes it,
    // and what stands for nothing.
    w.set("tokenizer.ggml.model", Value::String(b"gpt2"))?;
    w.set("tokenizer.ggml.pre", Value::String(b"gpt-2"))?;
    let letters = ('!'..='~').chain(['\u{120}', '\u{10a}']).map(String::from);
    let rest = (0..shape.n_vocab).map(|i| format!("t{i}"));
    let tokens: Vec<String> = letters.chain(rest).take(shape.n_vocab as usize).collect();
    let tokens = tokens.iter().map(|t| Value::String(t.as_bytes()));
    w.set_array("tokenizer.ggml.tokens", ValueType::String, tokens)?;
    w.set_array("tokenizer.ggml.merges", ValueType::String, std::iter::empty::<Value>())
}
