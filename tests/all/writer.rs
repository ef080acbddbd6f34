//! The GGUF writer: what it writes is read back, and a failure leaves everything as it was.

use std::path::Path;

use qkov::error::{Error, Result};
use qkov::gguf::{Bytes, Data, Gguf, Value, ValueType, Writer};
use qkov::quant::{TYPES, type_of};

use crate::tiny::Tiny;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn message<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("accepted"),
        Err(Error::Runtime(text)) => text,
        Err(other) => panic!("{other:?}"),
    }
}

/// A file with every type of value and of tensor.
fn everything<'a>(alignment: u32) -> Writer<'a> {
    let mut writer = Writer::new();
    writer.set("general.alignment", alignment).unwrap();
    writer.set("u8", u8::MAX).unwrap();
    writer.set("i8", i8::MIN).unwrap();
    writer.set("u16", u16::MAX).unwrap();
    writer.set("i16", i16::MIN).unwrap();
    writer.set("u32", u32::MAX).unwrap();
    writer.set("i32", i32::MIN).unwrap();
    writer.set("u64", u64::MAX).unwrap();
    writer.set("i64", i64::MIN).unwrap();
    writer.set("f32", -0.1f32).unwrap();
    writer.set("f64", f64::INFINITY).unwrap();
    writer.set("bool", true).unwrap();
    writer.set("string", "two\nlines").unwrap();
    writer.set("bytes", &b"\xff\0"[..]).unwrap();
    writer.set_array("array.i16", ValueType::I16, [1i16, -2]).unwrap();
    writer.set_array("array.bool", ValueType::Bool, [true, false]).unwrap();
    writer.set_array("array.string", ValueType::String, ["", "a", "bc"]).unwrap();
    writer.set_array("array.none", ValueType::F64, [0.0f64; 0]).unwrap();
    for (i, ty) in TYPES.iter().enumerate() {
        let dims = [ty.block_len as u64, 3, 1, 2];
        let dims = &dims[..i % 4 + 1];
        let n = dims.iter().product::<u64>() as usize / ty.block_len * ty.block_bytes;
        let data: Vec<u8> = (0..n).map(|j| (i * 31 + j) as u8).collect();
        let data = match i % 2 {
            0 => Data::View(Bytes::from(data)),
            _ => Data::stream(move |out| data.chunks(7).try_for_each(out)),
        };
        writer.tensor(ty.name, ty, dims, data).unwrap();
    }
    writer
}

#[test]
fn reads_back_what_it_writes() {
    for alignment in [1, 2, 32, 65_536] {
        let n_bytes = everything(alignment).n_bytes().unwrap();
        let bytes = everything(alignment).to_bytes().unwrap();
        assert_eq!(bytes.len() as u64, n_bytes);
        let gguf = Gguf::parse(Bytes::from(bytes.clone())).unwrap();
        assert_eq!((gguf.version, gguf.warnings.len()), (3, 0));
        assert_eq!(gguf.get("i64"), Some(Value::I64(i64::MIN)));
        assert_eq!(gguf.get("f64"), Some(Value::F64(f64::INFINITY)));
        assert_eq!(gguf.get("bytes"), Some(Value::String(b"\xff\0")));
        let array = gguf.array("array.string").unwrap().unwrap();
        assert_eq!(array.strings().collect::<Vec<_>>(), [&b""[..], b"a", b"bc"]);
        let array = gguf.array("array.i16").unwrap().unwrap();
        assert_eq!(array.iter().collect::<Vec<_>>(), [Value::I16(1), Value::I16(-2)]);
        assert_eq!(gguf.tensors().len(), TYPES.len());
        for (i, tensor) in gguf.tensors().iter().enumerate() {
            assert_eq!(tensor.place().1.start % alignment as usize, 0);
            let data = gguf.data(tensor);
            assert!(data.iter().enumerate().all(|(j, b)| *b == (i * 31 + j) as u8), "{tensor:?}");
        }

        let mut copy = Writer::new();
        copy.copy_metadata(&gguf).unwrap();
        gguf.tensors().iter().for_each(|t| copy.copy_tensor(&gguf, t).unwrap());
        assert!(copy.to_bytes().unwrap() == bytes, "a copy is the same to the byte");
    }
}

#[test]
fn a_copy_is_one_file_and_can_be_changed() {
    let tiny = Tiny::llama().set("split.count", 1).set("split.no", 0);
    let gguf = Gguf::parse(Bytes::from(tiny.bytes())).unwrap();
    let mut copy = Writer::new();
    copy.copy_metadata(&gguf).unwrap();
    assert!(copy.remove("llama.block_count") && !copy.remove("llama.block_count"));
    copy.set("llama.block_count", 1u32).unwrap();
    let copy = Gguf::parse(Bytes::from(copy.to_bytes().unwrap())).unwrap();
    assert_eq!(copy.u32("llama.block_count").unwrap(), Some(1));
    assert!(copy.metadata().all(|(key, _)| !key.starts_with("split.")));
}

#[test]
fn refuses_what_no_reader_would_take() {
    let f32s = type_of(0).unwrap();
    let mut w = Writer::new();
    w.set("key", 1u32).unwrap();
    w.tensor("t", f32s, &[2], &[0u8; 8][..]).unwrap();
    let data = &[0u8; 8][..];
    for (text, cause) in [
        (message(w.set("key", 2u32)), "key \"key\" is set twice"),
        (message(w.set("", 2u32)), "metadata key of 0 bytes"),
        (message(w.set(&"k".repeat(65_536), 2u32)), "key of 65536 bytes"),
        (message(w.set("general.alignment", 3u32)), "power of two"),
        (message(w.set("general.alignment", 32u64)), "expected u32, got u64"),
        (
            message(w.set_array("a", ValueType::U8, [Value::U8(1), Value::I8(1)])),
            "key \"a\": element 1 is i8, the array is of u8",
        ),
        (message(w.tensor("t", f32s, &[2], data)), "tensor \"t\" is added twice"),
        (message(w.tensor("s", f32s, &[3], data)), "got 8 bytes; F32 [3] has 12"),
        (message(w.tensor("s", f32s, &[1 << 62, 4], data)), "elements"),
        (message(w.tensor("s", f32s, &[1, 1, 1, 1, 2], data)), "5 dimensions"),
        (message(w.tensor(&"s".repeat(1025), f32s, &[2], data)), "name of 1025 bytes"),
        (message(w.tensor("s", type_of(8).unwrap(), &[31], data)), "not whole blocks"),
    ] {
        assert!(text.contains(cause), "{text}");
    }
    let stream = |n: usize| Data::stream(move |out| (0..n).try_for_each(|_| out(&[0; 4])));
    for (n, cause) in [(1, "got 4 of its 8 bytes"), (3, "got more than its 8 bytes")] {
        let mut w = Writer::new();
        w.tensor("t", f32s, &[2], stream(n)).unwrap();
        assert!(message(w.to_bytes()).contains(cause));
    }
}

#[test]
fn a_file_appears_complete_or_not_at_all() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    let f32s = type_of(0).unwrap();
    let bad = || {
        let mut writer = Writer::new();
        let data = Data::stream(|out| {
            out(&[0; 1 << 21])?;
            Err(Error::Runtime("the source ends".into()))
        });
        writer.tensor("t", f32s, &[1 << 20], data).unwrap();
        writer
    };
    let text = message(bad().write(&path));
    assert!(text.contains("model.gguf: the source ends"), "{text}");
    assert!(names(dir.path()).is_empty());

    Tiny::llama().writer().write(&path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    assert!(bytes == Tiny::llama().bytes());
    message(bad().write(&path));
    assert!(std::fs::read(&path).unwrap() == bytes, "the old file stays");
    assert_eq!(names(dir.path()), ["model.gguf"]);

    // Onto itself: the map keeps the old file.
    let gguf = Gguf::open(&path).unwrap();
    let mut copy = Writer::new();
    gguf.tensors().iter().for_each(|t| copy.copy_tensor(&gguf, t).unwrap());
    copy.write(&path).unwrap();
    let copy = Gguf::open(&path).unwrap();
    assert_eq!((copy.tensors().len(), copy.metadata().count()), (gguf.tensors().len(), 0));
    assert_eq!(names(dir.path()), ["model.gguf"]);

    let text = message(Writer::new().write(dir.path()));
    assert!(text.contains("is not a regular file"), "{text}");
    let text = message(Writer::new().write(&dir.path().join("none").join("m.gguf")));
    assert!(text.contains("m.gguf: cannot write: No such file"), "{text}");
    #[cfg(unix)]
    {
        let link = dir.path().join("link.gguf");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        Tiny::llama().writer().write(&link).unwrap();
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
        assert!(std::fs::read(&path).unwrap() == bytes);
    }
}
