//! Prints `tests/golden/mixes.txt`: a digest of the types that llama.cpp's quantizer gives to the tensors of
//! some models, for each kind of file, without importance and with it. The models have the shapes that
//! `tests/all/quantize.rs` has, and numbers that do not matter.

use std::error::Error;
use std::ffi::{CString, c_char};
use std::path::Path;

use llama_cpp_sys_2 as sys;
use qkov::gguf::{Bytes, Data, Gguf, Writer};
use qkov::quant::type_of;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Name, architecture, layers, query heads and kv heads, experts, whether embeddings are the output, and
/// whether queries, keys and values are fused.
type Shape = (&'static str, &'static str, u32, [u32; 2], u64, bool, bool);

const SHAPES: [Shape; 9] = [
    ("llama32", "llama", 32, [32, 8], 0, false, false),
    ("llama80", "llama", 80, [64, 8], 0, false, false),
    ("8x", "llama", 32, [32, 8], 8, false, false),
    ("4x", "llama", 16, [8, 8], 4, false, false),
    ("mha", "llama", 12, [8, 8], 0, true, false),
    ("qwen80", "qwen2", 80, [8, 4], 0, false, false),
    ("40x", "qwen3moe", 24, [32, 4], 40, true, false),
    ("falcon", "falcon", 32, [8, 1], 0, false, true),
    ("gpt2", "gpt2", 32, [8, 8], 0, true, true),
];

/// Kinds of files, with their numbers.
const KINDS: [(&str, u32); 35] = [
    ("Q1_0", 40),
    ("IQ1_S", 24),
    ("TQ1_0", 36),
    ("IQ1_M", 31),
    ("IQ2_XXS", 19),
    ("TQ2_0", 37),
    ("Q2_0", 41),
    ("IQ2_XS", 20),
    ("IQ2_S", 28),
    ("IQ2_M", 29),
    ("Q2_K_S", 21),
    ("Q2_K", 10),
    ("IQ3_XXS", 23),
    ("IQ3_XS", 22),
    ("IQ3_S", 26),
    ("Q3_K_S", 11),
    ("IQ3_M", 27),
    ("Q3_K_M", 12),
    ("Q3_K_L", 13),
    ("MXFP4_MOE", 38),
    ("IQ4_XS", 30),
    ("IQ4_NL", 25),
    ("Q4_0", 2),
    ("Q4_K_S", 14),
    ("Q4_K_M", 15),
    ("Q4_1", 3),
    ("Q5_0", 8),
    ("Q5_K_S", 16),
    ("Q5_K_M", 17),
    ("Q5_1", 9),
    ("Q6_K", 18),
    ("Q8_0", 7),
    ("F16", 1),
    ("BF16", 32),
    ("F32", 0),
];

/// A file of this shape; gives names and columns of matrices that have importance.
fn write(shape: &Shape, path: &Path) -> Result<Vec<(CString, usize)>> {
    let (_, arch, n_layer, [n_head, n_kv], n_expert, is_tied, is_fused) = *shape;
    let mut writer = Writer::new();
    let key = |name: &str| format!("{arch}.{name}");
    writer.set("general.architecture", arch)?;
    for (name, n) in [
        ("block_count", n_layer),
        ("context_length", 512),
        ("embedding_length", 256),
        ("feed_forward_length", 256),
        ("expert_feed_forward_length", 256),
        ("vocab_size", 100),
        ("attention.head_count", n_head),
        ("attention.head_count_kv", n_kv),
    ] {
        writer.set(&key(name), n)?;
    }
    for name in ["attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"] {
        writer.set(&key(name), 1e-5f32)?;
    }
    if n_expert > 0 {
        writer.set(&key("expert_count"), n_expert as u32)?;
        writer.set(&key("expert_used_count"), 2u32)?;
    }
    let mut columns = Vec::new();
    let mut add = |name: String, dims: &[u64]| -> Result<()> {
        let n: u64 = dims.iter().product();
        let numbers =
            (0..n as u32).map(|i| i.wrapping_mul(2_654_435_761) as f32 / 2f32.powi(32) - 0.5);
        let bytes: Vec<u8> = numbers.flat_map(f32::to_le_bytes).collect();
        if name.starts_with("blk") && dims.len() > 1 {
            let n = dims[0] * dims.get(2).copied().unwrap_or(1);
            columns.push((CString::new(&name[..])?, n as usize));
        }
        let floats = type_of(0).ok_or("no floats")?;
        Ok(writer.tensor(&name, floats, dims, Data::View(Bytes::from(bytes)))?)
    };
    add("token_embd.weight".into(), &[256, 3])?;
    add("output_norm.weight".into(), &[256])?;
    if !is_tied {
        add("output.weight".into(), &[256, 3])?;
    }
    let attention = if is_fused { &["attn_qkv"][..] } else { &["attn_q", "attn_k", "attn_v"] };
    let ffn =
        if is_fused { &["ffn_up", "ffn_down"][..] } else { &["ffn_gate", "ffn_up", "ffn_down"] };
    for i in 0..n_layer {
        add(format!("blk.{i}.attn_norm.weight"), &[256])?;
        for name in attention.iter().chain(&["attn_output"]) {
            add(format!("blk.{i}.{name}.weight"), &[256, 2])?;
        }
        for name in ffn {
            match n_expert {
                0 => add(format!("blk.{i}.{name}.weight"), &[256, 2])?,
                n => add(format!("blk.{i}.{name}_exps.weight"), &[256, 2, n])?,
            }
        }
        if n_expert > 0 {
            add(format!("blk.{i}.ffn_gate_inp.weight"), &[256, n_expert])?;
        }
    }
    writer.write(path)?;
    Ok(columns)
}

/// What llama.cpp makes of a file; none if it wants importance.
fn quantize(paths: [&Path; 2], kind: u32, importance: &[(CString, usize)]) -> Result<Option<Gguf>> {
    let [from, to] = paths.map(|path| CString::new(path.to_string_lossy().as_bytes()));
    let (from, to) = (from?, to?);
    let ones = vec![1.0f32; importance.iter().map(|(_, n)| *n).max().unwrap_or(0)];
    let entry = |(name, size): &(CString, usize)| sys::llama_model_imatrix_data {
        name: name.as_ptr(),
        data: ones.as_ptr(),
        size: *size,
    };
    let end = sys::llama_model_imatrix_data {
        name: std::ptr::null::<c_char>(),
        data: std::ptr::null(),
        size: 0,
    };
    let all: Vec<_> = importance.iter().map(entry).chain([end]).collect();
    // SAFETY: strings and lists live until it returns, and end as they should.
    let failed = unsafe {
        let mut params = sys::llama_model_quantize_default_params();
        params.ftype = kind as sys::llama_ftype;
        if !importance.is_empty() {
            params.imatrix = all.as_ptr();
        }
        sys::llama_model_quantize(from.as_ptr(), to.as_ptr(), &params)
    };
    Ok(if failed == 0 { Some(Gguf::open(paths[1])?) } else { None })
}

fn main() -> Result<()> {
    let folder = std::env::temp_dir();
    let [from, to] = ["mixes-from.gguf", "mixes-to.gguf"].map(|name| folder.join(name));
    for shape in &SHAPES {
        let columns = write(shape, &from)?;
        for (name, importance) in [("none", &columns[..0]), ("importance", &columns[..])] {
            let mut line = format!("{} {name}", shape.0);
            for (kind, id) in KINDS {
                let digest = match quantize([&from, &to], id, importance)? {
                    None => "refused".into(),
                    Some(gguf) => {
                        // FNV-1a (Fowler, Noll, Vo).
                        let mix = |h: u32, id: u32| (h ^ id).wrapping_mul(16_777_619);
                        let types = gguf.tensors().iter().map(|t| t.ty.id);
                        format!("{:08x}", types.fold(2_166_136_261, mix))
                    }
                };
                line += &format!(" {kind}:{digest}");
            }
            println!("{line}");
        }
    }
    for path in [from, to] {
        std::fs::remove_file(path)?;
    }
    Ok(())
}
