//! gguf-rs and qkov must see the same file.
//!
//! Of gguf-rs, only what it reads is used: its tensor sizes are guesses for some types.

use std::io::{Cursor, Read};
use std::path::Path;

use gguf_rs::{ByteOrder, GGUFContainer, GGUFModel};
use qkov::gguf::{Bytes, Data, Gguf, Value, ValueType, Writer};
use qkov::quant::TYPES;

/// Types that gguf-rs does not know.
const TOO_NEW: [&str; 3] = ["NVFP4", "Q1_0", "Q2_0"];

fn theirs(bytes: &[u8]) -> GGUFModel {
    let mut reader = Cursor::new(bytes.to_vec());
    // The container begins after the magic.
    reader.read_exact(&mut [0; 4]).unwrap();
    GGUFContainer::new(ByteOrder::LE, Box::new(reader), u64::MAX).decode().unwrap()
}

fn json(value: Value) -> serde_json::Value {
    use serde_json::Value as Json;
    match value {
        Value::U8(v) => Json::from(v),
        Value::I8(v) => Json::from(v),
        Value::U16(v) => Json::from(v),
        Value::I16(v) => Json::from(v),
        Value::U32(v) => Json::from(v),
        Value::I32(v) => Json::from(v),
        Value::F32(v) => Json::from(v),
        Value::Bool(v) => Json::from(v),
        Value::String(v) => Json::from(String::from_utf8_lossy(v)),
        Value::Array(v) => v.iter().map(json).collect(),
        Value::U64(v) => Json::from(v),
        Value::I64(v) => Json::from(v),
        Value::F64(v) => Json::from(v),
    }
}

/// Compares everything; the number of pairs and of tensors.
fn compare(bytes: &[u8]) -> (usize, usize) {
    let ours = Gguf::parse(Bytes::from(bytes.to_vec())).unwrap();
    let theirs = theirs(bytes);
    let mut n_pairs = 0;
    for (key, value) in ours.metadata() {
        let found = theirs.metadata().get(key).unwrap_or_else(|| panic!("{key} is not there"));
        // Not `assert_eq`, which would print a vocabulary.
        assert!(*found == json(value), "{key} differs");
        n_pairs += 1;
    }
    assert_eq!(n_pairs, theirs.metadata().len());
    assert_eq!(ours.tensors().len(), theirs.tensors().len());
    for (ours, other) in ours.tensors().iter().zip(theirs.tensors()) {
        assert_eq!(ours.name, other.name);
        assert_eq!(ours.ty.id, other.kind, "{}", ours.name);
        assert_eq!(ours.dims, other.shape, "{}", ours.name);
        let start = theirs.data_offset() + other.offset;
        assert_eq!(ours.place(), (0, start as usize..start as usize + ours.n_bytes()));
    }
    (n_pairs, ours.tensors().len())
}

#[test]
fn a_model_of_ours() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/softmax-q8_0.gguf");
    let (n_pairs, n_tensors) = compare(&std::fs::read(path).unwrap());
    assert!(n_pairs > 10 && n_tensors > 10, "{n_pairs} {n_tensors}");
}

/// Two values of every type; the second is the more unusual one.
fn values() -> [[Value<'static>; 2]; 12] {
    [
        [Value::U8(7), Value::U8(u8::MAX)],
        [Value::I8(7), Value::I8(i8::MIN)],
        [Value::U16(7), Value::U16(u16::MAX)],
        [Value::I16(7), Value::I16(i16::MIN)],
        [Value::U32(7), Value::U32(u32::MAX)],
        [Value::I32(7), Value::I32(i32::MIN)],
        [Value::F32(0.1), Value::F32(f32::MIN_POSITIVE)],
        [Value::Bool(true), Value::Bool(false)],
        [Value::String("Straße\n\u{1F600}".as_bytes()), Value::String(b"")],
        [Value::U64(7), Value::U64(u64::MAX)],
        [Value::I64(7), Value::I64(i64::MIN)],
        [Value::F64(0.1), Value::F64(-1e300)],
    ]
}

#[test]
fn files_of_our_writer() {
    for alignment in [8u32, 32, 256] {
        let mut writer = Writer::new();
        writer.set("general.alignment", alignment).unwrap();
        for pair in values() {
            let element = pair[0].value_type();
            for (i, value) in pair.into_iter().enumerate() {
                writer.set(&format!("{}.{i}", element.name()), value).unwrap();
            }
            for n in 0..=2 {
                let key = format!("array.{}.{n}", element.name());
                writer.set_array(&key, element, pair[..n].iter().copied()).unwrap();
            }
        }
        let types = || TYPES.iter().filter(|t| !TOO_NEW.contains(&t.name));
        for (i, ty) in types().enumerate() {
            let dims = [ty.block_len as u64 * 2, i as u64 % 3 + 1, 1, 2];
            let dims = &dims[..i % 4 + 1];
            let n = dims.iter().product::<u64>() as usize / ty.block_len * ty.block_bytes;
            let data = Data::stream(move |out| (0..n).try_for_each(|j| out(&[(i + j) as u8])));
            writer.tensor(&format!("{}.weight", ty.name), ty, dims, data).unwrap();
        }
        let bytes = writer.to_bytes().unwrap();
        let counts = compare(&bytes);
        assert_eq!(counts, (1 + 12 * 5, types().count()));
        assert_eq!(ValueType::ALL.len(), 12 + 1, "every type but arrays of arrays");
    }
}
