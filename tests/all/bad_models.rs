//! Sound containers whose metadata and tensors make no model, and strange ones that do.

use std::sync::Arc;

use qkov::arch::{ARCHS, Hparams};
use qkov::engine::Threads;
use qkov::error::Result;
use qkov::gguf::{Gguf, Value, ValueType};
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::bad_files::{bounded, line};
use crate::tiny::{EOS, Kv, N_VOCAB, Tiny};

fn hparams(tiny: &Tiny) -> Result<Hparams> {
    bounded("hparams", tiny.bytes(), |b| Hparams::read(&Gguf::parse(b)?, N_VOCAB))
}

fn model(bytes: Vec<u8>) -> Result<Model> {
    bounded("model", bytes, |b| Model::from_gguf(Gguf::parse(b)?))
}

fn says<T>(name: &str, result: Result<T>, parts: &[&str]) {
    let text = line(name, result);
    for part in parts {
        assert!(text.contains(part), "{name}: \"{text}\" does not say \"{part}\"");
    }
}

/// A Llama with every key that its loader reads.
fn all_keys() -> Tiny {
    Tiny::llama()
        .set("llama.attention.key_length", 4)
        .set("llama.attention.value_length", 4)
        .set("llama.expert_count", 0)
        .set("llama.vocab_size", N_VOCAB as u32)
        .set("llama.rope.scaling.type", "yarn")
        .set("llama.rope.scaling.factor", 2.0)
        .set("llama.rope.scale_linear", 1.0)
        .set("llama.rope.scaling.original_context_length", 32)
        .set("llama.rope.scaling.attn_factor", 1.0)
        .set("llama.rope.scaling.yarn_beta_fast", 32.0)
        .set("llama.rope.scaling.yarn_beta_slow", 1.0)
}

/// Counts, each with the value it has in [`all_keys`].
const COUNTS: [(&str, u8); 11] = [
    ("llama.block_count", 2),
    ("llama.context_length", 64),
    ("llama.embedding_length", 8),
    ("llama.feed_forward_length", 16),
    ("llama.attention.head_count", 2),
    ("llama.attention.head_count_kv", 1),
    ("llama.attention.key_length", 4),
    ("llama.attention.value_length", 4),
    ("llama.rope.dimension_count", 4),
    ("llama.rope.scaling.original_context_length", 32),
    ("llama.expert_count", 0),
];

/// Those that may also be an array with an entry per layer.
const PER_LAYER: [&str; 3] =
    ["llama.feed_forward_length", "llama.attention.head_count", "llama.attention.head_count_kv"];

const FLOATS: [&str; 7] = [
    "llama.attention.layer_norm_rms_epsilon",
    "llama.rope.freq_base",
    "llama.rope.scaling.factor",
    "llama.rope.scale_linear",
    "llama.rope.scaling.attn_factor",
    "llama.rope.scaling.yarn_beta_fast",
    "llama.rope.scaling.yarn_beta_slow",
];

const STRINGS: [&str; 2] = ["general.architecture", "llama.rope.scaling.type"];

/// The number `n` in every type.
fn in_every_type(n: u8) -> [(ValueType, Kv); 13] {
    ValueType::ALL.map(|ty| {
        let value = match ty {
            ValueType::U8 => Value::U8(n),
            ValueType::I8 => Value::I8(n as i8),
            ValueType::U16 => Value::U16(n.into()),
            ValueType::I16 => Value::I16(n.into()),
            ValueType::U32 => Value::U32(n.into()),
            ValueType::I32 => Value::I32(n.into()),
            ValueType::F32 => Value::F32(n.into()),
            ValueType::Bool => Value::Bool(true),
            ValueType::String => return (ty, Kv::from("8")),
            ValueType::Array => return (ty, Kv::List(ValueType::F32, vec![Value::F32(8.0); 2])),
            ValueType::U64 => Value::U64(n.into()),
            ValueType::I64 => Value::I64(n.into()),
            ValueType::F64 => Value::F64(n.into()),
        };
        (ty, Kv::One(value))
    })
}

fn is_integer(ty: ValueType) -> bool {
    use ValueType::*;
    matches!(ty, U8 | I8 | U16 | I16 | U32 | I32 | U64 | I64)
}

#[test]
fn every_key_in_every_type() {
    let sound = hparams(&all_keys()).unwrap();
    let refuses = |key: &str, ty: ValueType, value: Kv, expected: &str| {
        let case = format!("{key} as {}", ty.name());
        says(&case, hparams(&all_keys().set(key, value)), &[key, expected, ty.name()]);
    };
    for (key, n) in COUNTS {
        for (ty, value) in in_every_type(n) {
            match ty {
                // The value is all that counts, not its width.
                ty if is_integer(ty) => {
                    assert_eq!(hparams(&all_keys().set(key, value)).unwrap(), sound, "{key}")
                }
                ValueType::Array if PER_LAYER.contains(&key) => says(
                    key,
                    hparams(&all_keys().set(key, value)),
                    &[key, "layer 0: expected an integer, found f32"],
                ),
                ty => refuses(key, ty, value, "expected an integer, found"),
            }
        }
    }
    for key in FLOATS {
        for (ty, value) in in_every_type(2) {
            match ty {
                ValueType::F32 | ValueType::F64 => {
                    hparams(&all_keys().set(key, value)).unwrap();
                }
                ty => refuses(key, ty, value, "expected a float, found"),
            }
        }
    }
    for key in STRINGS {
        for (ty, value) in in_every_type(2).into_iter().filter(|(ty, _)| *ty != ValueType::String) {
            refuses(key, ty, value, "expected string, found");
        }
        let bytes = Kv::Text(b"\xff".to_vec());
        says(key, hparams(&all_keys().set(key, bytes)), &[key, "the string is not UTF-8"]);
    }
}

#[test]
fn counts_out_of_range() {
    for (key, _) in COUNTS {
        for (value, shown) in [
            (Value::I8(-1), "-1"),
            (Value::I64(i64::MIN), "-9223372036854775808"),
            (Value::U64(u64::MAX), "18446744073709551615"),
            (Value::U64(1 << 32), "4294967296"),
            (Value::U32(u32::MAX), "4294967295"),
            (Value::U32(0), "0"),
        ] {
            if (key, value) == ("llama.expert_count", Value::U32(0)) {
                continue;
            }
            let result = hparams(&all_keys().set(key, value));
            says(key, result, &[&format!("key \"{key}\" = {shown}")]);
        }
    }
    for key in PER_LAYER {
        let list = |values: &[i64]| {
            let values = values.iter().map(|v| Value::I64(*v)).collect();
            hparams(&all_keys().set(key, Kv::List(ValueType::I64, values)))
        };
        for n in [0, 1, 3] {
            let part = format!("has {n} entries; expected 2, one per layer");
            says(key, list(&vec![2; n]), &[key, &part]);
        }
        for n in [0, -1, i64::MAX] {
            says(key, list(&[2, n]), &[key, &format!("layer 1: {n}; allowed 1..=1048576")]);
        }
        list(&[2, 2]).unwrap();
        // The message must not repeat the text.
        let long = Kv::Texts(vec!["x".repeat(100_000); 2]);
        let found = "layer 0: expected an integer, found string";
        says(key, hparams(&all_keys().set(key, long)), &[key, found]);
    }
}

#[test]
fn floats_out_of_range() {
    for key in FLOATS {
        for value in [
            Value::F32(f32::NAN),
            Value::F32(f32::INFINITY),
            Value::F32(f32::NEG_INFINITY),
            Value::F32(0.0),
            Value::F32(-0.0),
            Value::F32(-1.0),
            Value::F64(f64::NAN),
            Value::F64(1e300),
            Value::F64(1e-300),
        ] {
            says(key, hparams(&all_keys().set(key, value)), &[&format!("key \"{key}\" ="), "must"]);
        }
        hparams(&all_keys().set(key, f32::MIN_POSITIVE)).unwrap();
    }
}

#[test]
fn rules_between_keys() {
    let set = |key: &str, n: u32| hparams(&all_keys().set(key, n));
    says("layers", set("llama.block_count", 1025), &["= 1025; allowed 1..=1024"]);
    says("width", set("llama.embedding_length", 1 << 21), &["= 2097152; allowed 1..=1048576"]);
    let heads = "layer 0: 2 query heads are not a multiple of 3 key and value heads";
    says("groups", set("llama.attention.head_count_kv", 3), &[heads]);
    let uneven = hparams(&Tiny::llama().set("llama.attention.head_count", 3));
    says("heads", uneven, &["embedding_length 8 is not a multiple of 3 heads"]);
    let odd = "must be even and at most the head width 4";
    says("odd", set("llama.rope.dimension_count", 3), &["dimension_count = 3", odd]);
    says("wide", set("llama.rope.dimension_count", 6), &["dimension_count = 6", odd]);
    let missing = "missing key \"llama.expert_used_count\"; allowed 1..=8";
    says("experts", set("llama.expert_count", 8), &[missing]);
    let dynamic = hparams(&all_keys().set("llama.rope.scaling.type", "dynamic"));
    says("dynamic", dynamic, &["llama.rope.scaling.type", "length of a text"]);
    let scaling = hparams(&all_keys().set("llama.rope.scaling.type", "long\nrope"));
    says("scaling", scaling, &["= \"long\\nrope\"; allowed none, linear, yarn, longrope"]);

    let known: Vec<&str> = ARCHS.iter().map(|a| a.name).collect();
    let known = format!("known: {}", known.join(", "));
    let named = |name: &str| hparams(&Tiny::llama().set("general.architecture", name));
    for name in ["foo", "", "LLAMA", "llama "] {
        let part = format!("architecture \"{name}\" is not supported");
        says("architecture", named(name), &[&part, &known]);
    }
    let long = named(&"\x1b[2J".repeat(50_000));
    says("architecture", long, &["architecture \"\\u{1b}[2J", "...\" is not supported", &known]);
    let none = hparams(&Tiny::llama().without("general.architecture"));
    says("architecture", none, &["no key \"general.architecture\"; known architectures: llama"]);
}

#[test]
fn missing_keys() {
    for (tiny, optional) in [
        (Tiny::llama(), &["attention.head_count_kv", "rope.dimension_count", "rope.freq_base"][..]),
        (Tiny::qwen2(), &["attention.head_count_kv", "rope.dimension_count", "rope.freq_base"]),
        (Tiny::gpt2(), &[]),
    ] {
        let arch = hparams(&tiny).unwrap().arch;
        let (mut n_needed, prefix) = (0, format!("{arch}."));
        for key in tiny.keys.iter().filter_map(|(k, _)| k.strip_prefix(&prefix)) {
            let mut without = tiny.clone();
            without.keys.retain(|(k, _)| k.strip_prefix(&prefix) != Some(key));
            match optional.contains(&key) {
                true => drop(hparams(&without).unwrap()),
                false => {
                    let part = format!("missing key \"{arch}.{key}\"");
                    says(key, hparams(&without), &[&part]);
                    n_needed += 1;
                }
            }
        }
        assert_eq!(n_needed, 6, "{arch}");
    }
}

#[test]
fn tensors_that_do_not_fit() {
    for tiny in [Tiny::llama(), Tiny::qwen2(), Tiny::gpt2()] {
        let sound = model(tiny.bytes()).unwrap();
        assert!(sound.warnings.is_empty(), "{:?}", sound.warnings);
        for tensor in &tiny.tensors {
            let name = tensor.name.as_str();
            let part = format!("missing tensor \"{name}\"");
            says(name, model(tiny.clone().without_tensor(name).bytes()), &[&part]);
            let (first, rest) = tensor.dims.split_first().unwrap();
            for dims in [
                [&[first + 1], rest].concat(),
                [&[*first, 2], rest].concat(),
                [&[0], rest].concat(),
                tensor.dims.iter().rev().copied().collect(),
                Vec::new(),
            ] {
                if dims == tensor.dims {
                    continue;
                }
                let part = format!("tensor \"{name}\" has shape {dims:?}; expected [");
                says(name, model(tiny.clone().tensor(name, &dims).bytes()), &[&part]);
            }
            let ints = tensor.data.clone();
            let ints = tiny.clone().tensor_of(name, 26, &tensor.dims, ints);
            let part = format!("tensor \"{name}\" is I32, which cannot be computed with; readable");
            says(name, model(ints.bytes()), &[&part, "Q8_0"]);
        }
    }
}

#[test]
#[cfg(not(feature = "ggml"))]
fn types_that_ggml_reads() {
    use qkov::quant::{TYPES, is_rare};

    let rare: Vec<_> = TYPES.iter().filter(|ty| is_rare(ty)).collect();
    assert_eq!(rare.len(), 12);
    for ty in rare {
        let name = "blk.0.ffn_down.weight";
        let part =
            format!("tensor \"{name}\" is {}, which only a build with the feature ggml", ty.name);
        let blocks = vec![0; 8 * 256 / ty.block_len * ty.block_bytes];
        let tiny = Tiny::llama().set("llama.feed_forward_length", 256);
        let tiny = tiny.tensor("blk.0.ffn_gate.weight", &[8, 256]);
        let tiny = tiny.tensor("blk.0.ffn_up.weight", &[8, 256]);
        says(ty.name, model(tiny.tensor_of(name, ty.id, &[256, 8], blocks).bytes()), &[&part]);
    }
}

#[test]
fn models_against_their_metadata() {
    for n in [3, 1024] {
        let more = Tiny::llama().set("llama.block_count", n);
        says("layers", model(more.bytes()), &["missing tensor \"blk.2.attn_q.weight\" of shape"]);
    }
    let fewer = model(Tiny::llama().set("llama.block_count", 1).bytes()).unwrap();
    assert_eq!(fewer.warnings.len(), 1);
    assert!(fewer.warnings[0].starts_with("9 unknown tensors are ignored: \"blk.1.attn_norm"));
    for (ty, value) in in_every_type(9) {
        let found = model(Tiny::llama().set("llama.vocab_size", value).bytes());
        match is_integer(ty) {
            true => says("size", found, &["vocab_size = 9, but the vocabulary has 257 tokens"]),
            false => says("size", found, &["vocab_size\": expected an integer, found"]),
        }
    }
    model(Tiny::llama().set("llama.vocab_size", N_VOCAB as u32).bytes()).unwrap();
    let freqs = |x: &[f32]| {
        let data = x.iter().flat_map(|x| x.to_le_bytes()).collect();
        Tiny::llama().tensor_of("rope_freqs.weight", 0, &[x.len() as u64], data)
    };
    for x in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let part = "\"rope_freqs.weight\": every divisor must be finite and > 0";
        says("divisor", model(freqs(&[1.0, x]).bytes()), &[part]);
    }
    says("divisors", model(freqs(&[1.0]).bytes()), &["rope_freqs.weight\" has shape [1]; expec"]);
    model(freqs(&[1.0, 8.0]).bytes()).unwrap();
}

#[test]
fn special_ids_outside_the_vocabulary() {
    for name in ["bos", "eos"] {
        let key = format!("tokenizer.ggml.{name}_token_id");
        for id in [N_VOCAB as u32, u32::MAX] {
            let found = model(Tiny::llama().set(&key, id).bytes());
            says(&key, found, &[&format!("{name}_token_id"), &id.to_string()]);
        }
        for (ty, value) in in_every_type(7).into_iter().filter(|(ty, _)| !is_integer(*ty)) {
            let found = model(Tiny::llama().set(&key, value).bytes());
            says(&key, found, &[&format!("{name}_token_id"), ty.name()]);
        }
    }
}

fn logits(bytes: Vec<u8>) -> Vec<f32> {
    let model = Arc::new(model(bytes).unwrap());
    let options = Options { n_threads: Threads { one: 1, batch: 1 }, ..Options::default() };
    let mut session = Session::new(model, &options).unwrap();
    session.feed(&[72, 105, 10, EOS, 0]).unwrap();
    let logits = session.logits().to_vec();
    assert!(logits.len() == N_VOCAB && logits.iter().all(|x| x.is_finite()));
    logits
}

#[test]
fn data_at_any_address() {
    for tiny in [Tiny::llama(), Tiny::qwen2(), Tiny::gpt2()] {
        // Half-precision weights as well, whose reads also have an alignment.
        let data: Vec<u8> =
            (0..8 * N_VOCAB).flat_map(|i| [i as u8, 0x30 + (i % 5) as u8]).collect();
        let tiny = tiny.tensor_of("token_embd.weight", 1, &[8, N_VOCAB as u64], data);
        let aligned = logits(tiny.bytes());
        for alignment in [1, 2] {
            let mut odd = Tiny::default().set("general.alignment", alignment).tensor_of(
                "shift",
                24,
                &[alignment.into()],
                vec![0; alignment as usize],
            );
            odd.keys.extend(tiny.keys.iter().cloned());
            odd.tensors.extend(tiny.tensors.iter().cloned());
            // One more byte of metadata at a time moves the data to every address.
            for n in 0..4 {
                let name = "x".repeat(n);
                let bytes = odd.clone().set("general.name", name.as_str()).bytes();
                assert!(logits(bytes) == aligned, "alignment {alignment}, {n} bytes further");
            }
        }
        let mut second = tiny.bytes();
        second[4] = 2;
        assert!(logits(second) == aligned, "version 2");
        let mut trailing = tiny.bytes();
        trailing.extend([7; 1000]);
        assert!(logits(trailing.clone()) == aligned, "trailing bytes");
        let warnings = model(trailing).unwrap().warnings;
        assert_eq!(warnings, ["1000 bytes after the last tensor are ignored"]);
        let unused = tiny.clone().tensor("unused", &[0, 7]);
        assert!(logits(unused.bytes()) == aligned, "a tensor without elements");
        let warnings = model(unused.bytes()).unwrap().warnings;
        assert_eq!(warnings, ["1 unknown tensors are ignored: \"unused\""]);
    }
}
