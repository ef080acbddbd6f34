//! Files of every family: what they lack, or have in another shape or range, is told.

use std::path::Path;

use qkov::error::Result;
use qkov::gguf::{Bytes, Data, Gguf, Value, ValueType, Writer};
use qkov::model::Model;
use qkov::quant::format_named;

pub fn files() -> Vec<(String, Gguf)> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "gguf"));
    paths.sort();
    let name = |path: &Path| path.file_stem().unwrap().to_str().unwrap().to_string();
    paths.iter().map(|path| (name(path), Gguf::open(path).unwrap())).collect()
}

fn arch(gguf: &Gguf) -> &str {
    gguf.str("general.architecture").unwrap().unwrap()
}

/// The model of a file without a tensor, or with zeros in another shape in its place.
fn with_tensor(gguf: &Gguf, name: &str, dims: Option<&[u64]>) -> Result<Model> {
    let mut writer = Writer::new();
    writer.copy_metadata(gguf).unwrap();
    for tensor in gguf.tensors().iter().filter(|t| t.name != name) {
        let data = Data::View(gguf.data(tensor));
        writer.tensor(&tensor.name, tensor.ty, &tensor.dims, data).unwrap();
    }
    if let Some(dims) = dims {
        let zeros = vec![0; 4 * dims.iter().product::<u64>() as usize];
        let floats = format_named("F32").unwrap().ty;
        writer.tensor(name, floats, dims, Data::View(Bytes::from(zeros))).unwrap();
    }
    Model::from_gguf(Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap())
}

/// The model of a file with another value of a key, or without it.
pub fn with_key(gguf: &Gguf, key: &str, value: Option<Value>) -> Result<Model> {
    let mut writer = Writer::new();
    writer.copy_metadata(gguf).unwrap();
    writer.remove(key);
    if let Some(value) = value {
        writer.set(key, value).unwrap();
    }
    let metadata = Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap();
    Model::from_gguf(gguf.overlaid(metadata))
}

/// Whether a file without this tensor is sound: another one serves, or it is another member of the
/// family, whose layers are as the first.
fn can_lack(arch: &str, name: &str) -> bool {
    let biases = ["gpt2", "gptneox", "bloom", "starcoder2", "gpt-oss", "bert"];
    let is_norm = name.contains("norm");
    match name {
        "output.weight" => true,
        "rope_freqs.weight" | "rope_factors_short.weight" => true,
        "blk.0.attn_norm_2.weight" | "blk.0.attn_q_norm.weight" => {
            ["falcon", "stablelm", "command-r"].contains(&arch)
        }
        "blk.0.ffn_norm.weight" => arch == "stablelm",
        _ if !name.ends_with(".bias") || is_norm => false,
        _ if name.contains(".attn_q.")
            || name.contains(".attn_k.")
            || name.contains(".attn_v.") =>
        {
            !["qwen2", "qwen2moe", "gpt-oss", "bert"].contains(&arch)
        }
        _ => !biases.contains(&arch),
    }
}

fn says(case: &str, result: Result<Model>, parts: &[&str]) {
    let Err(error) = result else { panic!("{case} is accepted") };
    let text = error.to_string();
    assert!(parts.iter().all(|part| text.contains(part)), "{case}: {text}");
    assert!(!text.contains('\n'), "{case}: {text}");
}

#[test]
fn every_tensor_is_needed_in_its_shape() {
    for (name, gguf) in files() {
        for tensor in gguf.tensors() {
            let case = format!("{name} without {}", tensor.name);
            match can_lack(arch(&gguf), &tensor.name) {
                true => drop(with_tensor(&gguf, &tensor.name, None).expect(&case)),
                false => says(&case, with_tensor(&gguf, &tensor.name, None), &[&tensor.name]),
            }
            for grown in 0..tensor.dims.len() {
                let mut dims = tensor.dims.clone();
                dims[grown] += 1;
                let case = format!("{name} with {} of {dims:?}", tensor.name);
                let parts = [&tensor.name, "has shape", &format!("{dims:?}")];
                says(&case, with_tensor(&gguf, &tensor.name, Some(&dims)), &parts);
            }
        }
    }
}

#[test]
fn every_key_is_read_in_its_range() {
    for (name, gguf) in files() {
        let prefix = format!("{}.", arch(&gguf));
        for (key, value) in gguf.metadata().filter(|(key, _)| key.starts_with(&prefix)) {
            if let Err(error) = with_key(&gguf, key, None) {
                // Heads of another width than an even share of the embedding show in what depends on it.
                let text = error.to_string();
                let is_told = ["has shape", "missing tensor", "head width", key]
                    .iter()
                    .any(|s| text.contains(s));
                assert!(is_told, "{name} without {key}: {text}");
            }
            let bad = match value {
                Value::F32(_) => Value::F32(f32::NAN),
                Value::U32(_) => Value::U32(u32::MAX),
                _ => Value::F64(0.5),
            };
            for value in [bad, Value::I8(-1), Value::String(b"\xFF")] {
                let case = format!("{name} with another {key}, {value:?}");
                says(&case, with_key(&gguf, key, Some(value)), &[key]);
            }
        }
    }
}

#[test]
fn kinds_of_tokens_may_go_without_embeddings_if_there_is_one() {
    let (_, gguf) = files().into_iter().find(|(name, _)| name == "bert").unwrap();
    let (key, tensor) = ("tokenizer.ggml.token_type_count", "token_types.weight");
    let mut writer = Writer::new();
    writer.copy_metadata(&gguf).unwrap();
    writer.remove(key);
    gguf.tensors().iter().filter(|t| t.name != tensor).for_each(|t| {
        writer.tensor(&t.name, t.ty, &t.dims, Data::View(gguf.data(t))).unwrap();
    });
    let bytes = writer.to_bytes().unwrap();
    let one = Model::from_gguf(Gguf::parse(Bytes::from(bytes)).unwrap()).unwrap();
    assert!(one.type_embd.is_none() && one.warnings.is_empty());
    says("one of two", with_key(&gguf, key, Some(Value::U32(1))), &[tensor, "has shape"]);
    for bad in [0, u32::MAX] {
        let parts = [key, "allowed 1..=", &bad.to_string()];
        says("a count", with_key(&gguf, key, Some(Value::U32(bad))), &parts);
    }
}

#[test]
fn experts_are_refused_where_the_family_has_none() {
    let (_, gguf) = files().into_iter().find(|(name, _)| name == "falcon").unwrap();
    let mut writer = Writer::new();
    writer.copy_metadata(&gguf).unwrap();
    for key in ["expert_count", "expert_feed_forward_length"] {
        writer.set(&format!("falcon.{key}"), Value::U32(8)).unwrap();
    }
    let metadata = Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap();
    let model = Model::from_gguf(gguf.overlaid(metadata));
    says("experts", model, &["key \"falcon.expert_count\"", "not supported"]);
}

#[test]
fn windows_are_flags_or_a_period() {
    let (_, gguf) = files().into_iter().find(|(name, _)| name == "gemma2").unwrap();
    let key = "gemma2.attention.sliding_window_pattern";
    let windows = |model: Model| -> Vec<bool> {
        model.hparams.layers.iter().map(|layer| layer.window.is_some()).collect()
    };
    let every = |n| windows(with_key(&gguf, key, Some(Value::U32(n))).unwrap());
    assert_eq!(every(0), [true; 3]);
    assert_eq!(every(1), [false; 3]);
    assert_eq!(every(2), [true, false, true]);
    assert_eq!(every(3), [true, true, false]);
    let flags = |flags: &[bool]| {
        let mut writer = Writer::new();
        writer.copy_metadata(&gguf).unwrap();
        let flags = flags.iter().map(|flag| Value::Bool(*flag));
        writer.set_array(key, ValueType::Bool, flags).unwrap();
        let metadata = Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap();
        Model::from_gguf(gguf.overlaid(metadata))
    };
    assert_eq!(windows(flags(&[false, true, true]).unwrap()), [false, true, true]);
    says("too few", flags(&[true; 2]), &[key, "expected 3 flags, one per layer"]);
    let none = with_key(&gguf, "gemma2.attention.sliding_window", Some(Value::U32(0))).unwrap();
    assert_eq!(windows(none), [false; 3]);
}
