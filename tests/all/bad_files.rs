//! Broken containers: every one gives one line that says what is wrong, quickly and cheaply.
//!
//! The cases are the union of those in the test suites of llama.cpp, ollama and candle, and of
//! published defects of GGUF readers.

use std::path::Path;
use std::time::{Duration, Instant};

use qkov::error::{Error, Result};
use qkov::gguf::{Bytes, Gguf, Value, ValueType};

use crate::allocations::largest;
use crate::tiny::Tiny;

/// What a reader may allocate at once besides twice the file, in bytes: the tables of a compiled
/// regular expression take most of it.
pub const SLACK: usize = 512 << 10;

/// Numbers at which arithmetic breaks.
pub const EDGES: [u64; 14] = [
    0,
    1,
    0x7F,
    0xFF,
    65_535,
    65_536,
    i32::MAX as u64,
    1 << 31,
    u32::MAX as u64,
    1 << 32,
    1 << 60,
    i64::MAX as u64,
    1 << 63,
    u64::MAX,
];

/// Runs `read` on a file, within the bounds of time and memory that hold for every file.
pub fn bounded<T>(name: &str, bytes: Vec<u8>, read: impl Fn(Bytes) -> Result<T>) -> Result<T> {
    let len = bytes.len();
    let bytes = Bytes::from(bytes);
    let mut tries = 0..3;
    loop {
        let start = Instant::now();
        let (result, allocated) = largest(|| read(bytes.clone()));
        assert!(allocated <= 2 * len + SLACK, "{name}: {allocated} bytes for a file of {len}");
        // A machine that is busy elsewhere gets another chance.
        if cfg!(miri) || start.elapsed() < Duration::from_millis(100) {
            return result;
        }
        assert!(tries.next().is_some(), "{name}: too slow");
    }
}

/// The one line that an error of a file is.
pub fn line<T>(name: &str, result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("{name}: accepted"),
        Err(Error::File(text)) => {
            assert!(!text.is_empty() && text.len() < 500, "{name}: {} bytes: {text}", text.len());
            assert!(!text.chars().any(char::is_control), "{name}: {text:?}");
            text
        }
        Err(other) => panic!("{name}: {other:?}"),
    }
}

/// The file must be refused with a line that has all of `parts`.
pub fn refused(name: &str, bytes: Vec<u8>, parts: &[&str]) {
    let text = line(name, bounded(name, bytes, Gguf::parse));
    for part in parts {
        assert!(text.contains(part), "{name}: \"{text}\" does not say \"{part}\"");
    }
}

fn accepted(name: &str, bytes: Vec<u8>) -> Gguf {
    bounded(name, bytes, Gguf::parse).unwrap_or_else(|e| panic!("{name}: {e}"))
}

/// A file put together field by field.
#[derive(Clone)]
struct Raw(Vec<u8>);

impl Raw {
    fn new(n_tensors: u64, n_kv: u64) -> Raw {
        Raw(b"GGUF\x03\0\0\0".to_vec()).u64(n_tensors).u64(n_kv)
    }
    fn bytes(mut self, bytes: &[u8]) -> Raw {
        self.0.extend(bytes);
        self
    }
    fn u32(self, n: u32) -> Raw {
        self.bytes(&n.to_le_bytes())
    }
    fn u64(self, n: u64) -> Raw {
        self.bytes(&n.to_le_bytes())
    }
    fn text(self, text: &[u8]) -> Raw {
        self.u64(text.len() as u64).bytes(text)
    }
    fn key(self, key: &str, ty: u32) -> Raw {
        self.text(key.as_bytes()).u32(ty)
    }
    fn tensor(self, name: &str, dims: &[u64], ty: u32, offset: u64) -> Raw {
        let raw = self.text(name.as_bytes()).u32(dims.len() as u32);
        dims.iter().fold(raw, |raw, d| raw.u64(*d)).u32(ty).u64(offset)
    }
    /// Zeros up to a multiple of 32, and `n` more.
    fn data(mut self, n: usize) -> Vec<u8> {
        let len = self.0.len().next_multiple_of(32) + n;
        self.0.resize(len, 0);
        self.0
    }
}

/// One tensor of this shape, and enough data for small ones.
fn one(dims: &[u64], ty: u32, offset: u64) -> Vec<u8> {
    Raw::new(1, 0).tensor("t", dims, ty, offset).data(4096)
}

#[test]
fn names_that_lead_to_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let line_of = |path: &Path| {
        let text = line("open", Gguf::open(path));
        let shown: String = path.to_string_lossy().chars().filter(|c| !c.is_control()).collect();
        assert!(text.starts_with(shown.split("m.gguf").next().unwrap()), "{text}");
        text
    };
    std::fs::write(at("empty.gguf"), b"").unwrap();
    assert!(line_of(&at("none.gguf")).contains("No such file"));
    assert!(line_of(dir.path()).contains("is a directory; a GGUF file is needed"));
    assert!(line_of(&at("empty.gguf")).contains("file is empty"));
    assert!(line_of(&at(&"long".repeat(75))).contains("too long"));
    #[cfg(unix)]
    {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        for device in ["/dev/null", "/dev/zero", "/dev/random"] {
            assert!(line_of(Path::new(device)).contains("is not a regular file"));
        }
        let link = |to: &str, name: &str| std::os::unix::fs::symlink(at(to), at(name)).unwrap();
        link("none.gguf", "dangling.gguf");
        assert!(line_of(&at("dangling.gguf")).contains("No such file"));
        link("b.gguf", "a.gguf");
        link("a.gguf", "b.gguf");
        assert!(line_of(&at("a.gguf")).contains("symbolic link"));
        let socket = std::os::unix::net::UnixListener::bind(at("socket.gguf")).unwrap();
        assert!(line_of(&at("socket.gguf")).contains("is not a regular file"));
        drop(socket);
        if let Ok(status) = std::process::Command::new("mkfifo").arg(at("fifo.gguf")).status()
            && status.success()
        {
            assert!(line_of(&at("fifo.gguf")).contains("is not a regular file"));
        }
        let odd = dir.path().join(OsStr::from_bytes(b"a\nb\x1b\xff c.gguf"));
        std::fs::write(&odd, b"FUGG").unwrap();
        let text = line("odd", Gguf::open(&odd));
        assert!(text.contains("a\\nb\\u{1b}") && text.contains(" c.gguf: not a GGUF"), "{text}");
    }
}

#[test]
fn files_of_other_kinds_and_versions() {
    for (start, part) in [
        (&b"FUGG"[..], "it begins with 46 55 47 47 instead of 47 47 55 46"),
        (b"version https://git-lfs.github.com/spec/v1", "git-lfs pointer; download the real file"),
        (b"<!DOCTYPE html><html>", "looks like a web page"),
        (b"PK\x03\x04", "zip archive"),
        (b"GGML", "before GGUF"),
        (b"tjgg", "before GGUF"),
        (b"lmgg", "before GGUF"),
        (b"\x10\0\0\0\0\0\0\0{\"__metadata__\"", "safetensors"),
        (b"{\"a\": 1}", "it begins with 7b 22 61 22"),
        (b"X", "it begins with 58"),
    ] {
        let name = String::from_utf8_lossy(start);
        refused(&name, start.to_vec(), &["not a GGUF file", part]);
        refused(&name, [start, &[0; 64][..]].concat(), &["not a GGUF file", part]);
    }
    for (version, part) in [
        (0u32, "version 0 at byte 4; allowed 2..=3"),
        (1, "version 1 is too old (allowed 2..=3)"),
        (4, "version 4 at byte 4; allowed 2..=3"),
        (u32::MAX, "version 4294967295"),
        (0x0300_0000, "big-endian"),
        (0x0200_0000, "big-endian"),
        (0x0100_0000, "big-endian"),
    ] {
        let mut bytes = Tiny::llama().bytes();
        bytes[4..8].copy_from_slice(&version.to_le_bytes());
        refused(&format!("version {version}"), bytes, &[part]);
    }
    // A whole file for machines of the other order.
    let big = [&b"GGUF\0\0\0\x03\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..], &[0; 8][..]].concat();
    refused("big-endian", big, &["big-endian GGUF; only little-endian files are supported"]);
}

#[test]
fn every_truncation() {
    let bytes = Tiny::llama().bytes();
    let end = Gguf::parse(Bytes::from(bytes.clone())).unwrap();
    let end = end.tensors().last().unwrap().place().1.end;
    for n in 0..end {
        let text = line("cut", bounded("cut", bytes[..n].to_vec(), Gguf::parse));
        let known = ["truncated", "allowed", "incomplete"].iter().any(|w| text.contains(w));
        assert!(known, "at {n}: {text}");
        if n < 24 {
            assert_eq!(text, format!("truncated header: it has 24 bytes, the file has {n}"));
        }
    }
    refused("last byte", bytes[..end - 1].to_vec(), &["file is incomplete: tensor \"blk.1.ffn_d"]);
}

#[test]
fn counts_beyond_the_file() {
    let tiny = Tiny::llama();
    let counts = [tiny.tensors.len() as u64, tiny.keys.len() as u64];
    for (field, name) in [(0, "n_tensors"), (1, "n_kv")] {
        let real = counts[field];
        for n in EDGES.into_iter().chain([1 << 48, real + 1, real - 1]) {
            let at = 8 + 8 * field;
            let mut bytes = tiny.bytes();
            bytes[at..at + 8].copy_from_slice(&n.to_le_bytes());
            let case = format!("{name} = {n}");
            let beyond = n > bytes.len() as u64 / 14;
            match bounded(&case, bytes, Gguf::parse) {
                // Fewer tensors are a smaller file with bytes behind it.
                Ok(gguf) => {
                    assert!(field == 0 && n < real, "{case}");
                    assert!(n == 0 || gguf.warnings[0].contains("after the last tensor"));
                }
                result => {
                    let text = line(&case, result);
                    assert!(!beyond || text.starts_with(&case), "{text}");
                    assert!(!beyond || text.contains("are allowed"), "{text}");
                }
            }
        }
    }
    let two = Raw::new(5, 2).key("a", 0).bytes(&[1]).key("b", 0).bytes(&[1]);
    refused("5 tensors, then the end", two.0, &["n_tensors = 5", "1 are allowed"]);
    let ten = Raw::new(0, 10).key("a", 0).bytes(&[1]).bytes(&[0; 200]);
    refused("10 pairs, 1 there", ten.0, &["empty metadata key at byte 38"]);
    // Long enough for the count, but no file has so many.
    let many = Raw::new(0, 150_000).bytes(&[0; 15 * 150_000]).0;
    refused("many", many, &["n_kv = 150000", "131072 are allowed"]);
}

#[test]
fn keys_and_strings() {
    for n in EDGES.into_iter().skip(3) {
        let key = Raw::new(0, 1).u64(n).bytes(b"key").data(64);
        refused(&format!("key of {n}"), key, &["key at byte", &n.to_string()]);
        let value = Raw::new(0, 1).key("k", 8).u64(n).bytes(b"text").data(64);
        refused(&format!("string of {n}"), value, &["string value at byte", &n.to_string()]);
        let array = Raw::new(0, 1).key("k", 9).u32(8).u64(2).text(b"a").u64(n).data(64);
        refused(&format!("string in an array of {n}"), array, &["string in an array at byte"]);
    }
    refused("empty key", Raw::new(0, 1).key("", 4).u32(1).0, &["empty metadata key at byte 24"]);
    let lone = Raw::new(0, 1).key("", 0).bytes(&[0]).0;
    assert_eq!(lone.len(), 37);
    refused("37 bytes", lone, &["n_kv = 1", "0 are allowed"]);
    let key = Raw::new(0, 1).text(b"\xff\xfe").u32(4).u32(1).0;
    refused("key in no UTF-8", key, &["metadata key at byte 24 is not UTF-8"]);
    for ty in [13, 255, u32::MAX - 1, u32::MAX] {
        let file = Raw::new(0, 1).key("k", ty).u64(1).0;
        refused("type", file, &[&format!("type {ty} for key \"k\" at byte 33"), "allowed 0..=12"]);
    }
    let bool = Raw::new(0, 1).key("k", 7).bytes(&[2]).0;
    refused("bool", bool, &["key \"k\" at byte 37: bool must be 0 or 1"]);
    let bools = Raw::new(0, 1).key("k", 9).u32(7).u64(3).bytes(&[0, 1, 2]).0;
    refused("bools", bools, &["key \"k\"", "bools must be 0 or 1"]);
    let twice = Raw::new(0, 2).key("k", 4).u32(1).key("k", 4).u32(1).0;
    refused("twice", twice, &["duplicate key \"k\" at byte 41; first value at byte 37"]);
    // A message neither passes control characters on nor grows with the file.
    let hostile = "\x1b]0;x\x07\n\0".repeat(6000);
    let file = Raw::new(0, 1).key(&hostile, 99).u64(0).0;
    refused("hostile key", file, &["\\u{1b}]0;x\\u{7}\\n\\u{0}", "..."]);
    let strange = accepted("strange key", Raw::new(0, 1).key("a\nb\0", 0).bytes(&[1]).0);
    assert_eq!(strange.get("a\nb\0"), Some(Value::U8(1)));
}

#[test]
fn arrays() {
    let array = |element: u32, n: u64| Raw::new(0, 1).key("k", 9).u32(element).u64(n);
    for n in EDGES.into_iter().skip(4).chain([1 << 61, 1 << 62]) {
        for ty in ValueType::ALL.into_iter().filter(|t| *t != ValueType::Array) {
            let size = ty.size().unwrap_or(8);
            refused(
                &format!("{n} x {}", ty.name()),
                array(ty as u32, n).data(64),
                &["key \"k\" at byte 37", &format!("array of {n} x {size} bytes"), "are allowed"],
            );
        }
    }
    for n in [0, 1, 1 << 20, u64::MAX] {
        refused("nested", array(9, n).data(64), &["arrays of arrays are not supported"]);
        for ty in [13, u32::MAX] {
            let part = format!("unknown array element type {ty}");
            refused("element", array(ty, n).data(64), &["key \"k\" at byte 37", &part]);
        }
    }
    let nested = (0..10_000).fold(array(9, 1), |raw, _| raw.u32(9).u64(1));
    refused("deep", nested.0, &["arrays of arrays are not supported"]);
    let overrun = array(8, 3).text(b"a").text(b"b").u64(1000).0;
    refused("last string", overrun, &["string in an array at byte 75 has 1000 bytes"]);
    for ty in ValueType::ALL.into_iter().filter(|t| *t != ValueType::Array) {
        let gguf = accepted("empty array", array(ty as u32, 0).0);
        assert_eq!(gguf.array("k").unwrap().unwrap().len, 0);
    }
}

#[test]
fn tensor_table() {
    let wide = |n: u64| [n, n, n, n];
    let negative = i64::MIN as u64;
    for (name, file, part) in [
        ("5 dimensions", one(&[1; 5], 0, 0), "tensor \"t\" has 5 dimensions; allowed 0..=4"),
        ("8 dimensions", one(&[1; 8], 0, 0), "8 dimensions"),
        ("dimension -1", one(&[2, u64::MAX], 0, 0), "dimension 18446744073709551615; allowed"),
        ("dimension of 2^63", one(&[negative], 24, 0), "dimension 9223372036854775808; allowed"),
        ("-1 beside 0", one(&[0, u64::MAX], 0, 0), "dimension 18446744073709551615; allowed"),
        ("dimension of 2^32", one(&[1 << 32], 24, 0), "file is incomplete"),
        ("dimension of 2^63 - 1", one(&[i64::MAX as u64], 24, 0), "file is incomplete"),
        ("the same in F32", one(&[i64::MAX as u64], 0, 0), "more than 9223372036854775807 bytes"),
        ("product of 2^64", one(&wide(1 << 16), 24, 0), "elements"),
        ("product of 2^124", one(&wide(1 << 31), 24, 0), "elements"),
        ("product of 2^252", one(&wide(i64::MAX as u64), 24, 0), "elements"),
        (
            "2^64 - 16 bytes",
            one(&[4, (1 << 30) - 1, (1 << 30) + 1, 1], 0, 0),
            "4611686018427387900 elements of F32 have more than",
        ),
        ("Q4_0", one(&[31], 2, 0), "rows of 31 are not whole blocks of 32 (Q4_0)"),
        ("Q4_K", one(&[255, 2], 12, 0), "rows of 255 are not whole blocks of 256 (Q4_K)"),
        ("0 dimensions", one(&[], 8, 0), "rows of 1 are not whole blocks of 32 (Q8_0)"),
        ("type 43", one(&[32], 43, 0), "tensor \"t\": unknown tensor type 43 at byte 45"),
        ("type 255", one(&[32], 255, 0), "unknown tensor type 255"),
        ("type -1", one(&[32], u32::MAX, 0), "unknown tensor type 4294967295"),
        ("offset 1", one(&[8], 0, 1), "offset 1, but the data before it ends at 0"),
        ("offset 32", one(&[8], 0, 32), "offset 32, but the data before it ends at 0"),
        ("offset -1", one(&[8], 0, u64::MAX), "offset 18446744073709551615"),
        ("offset -256", one(&[8], 0, u64::MAX - 255), "offset 18446744073709551360"),
    ] {
        refused(name, file, &["tensor \"t\"", part]);
    }
    for ty in [4, 5, 31, 32, 33, 36, 37, 38] {
        let part = format!("type {ty} was removed from GGUF");
        refused("removed type", one(&[32], ty, 0), &["tensor \"t\"", &part]);
    }
    let dims = Raw::new(1, 0).text(b"t").u32(u32::MAX).data(64);
    refused("dimensions", dims, &["has 4294967295 dimensions; allowed 0..=4"]);
    let short = Raw::new(1, 0).tensor("t", &[8], 0, 0).data(31);
    refused("one byte short", short, &["tensor \"t\" needs bytes 64..96, the file has 95"]);
    let none = Raw::new(1, 0).tensor("t", &[8], 0, 0).0;
    refused("no data", none, &["file is incomplete", "64..96"]);
    for n in [1025, 65_536] {
        let name = Raw::new(1, 0).tensor(&"n".repeat(n), &[8], 0, 0).data(32);
        refused("name", name, &[&format!("tensor name at byte 24: length {n}, allowed 1024")]);
    }
    for n in [1, 63, 64, 1024] {
        let name = "n".repeat(n);
        let file = Raw::new(1, 0).tensor(&name, &[8], 0, 0).data(32);
        assert_eq!(accepted("name", file).tensor(&name).unwrap().n_bytes(), 32);
    }
    let name = Raw::new(1, 0).text(b"\xff").u32(0).u32(0).u64(0).data(32);
    refused("name in no UTF-8", name, &["tensor name at byte 24 is not UTF-8"]);
    let two = |name: &str, offset: u64, n: usize| {
        Raw::new(2, 0).tensor("a", &[8], 0, 0).tensor(name, &[8], 0, offset).data(n)
    };
    refused("twice", two("a", 32, 64), &["duplicate tensor \"a\""]);
    for offset in [0, 31, 33, 64] {
        refused("overlap or gap", two("b", offset, 128), &["\"b\": offset", "ends at 32"]);
    }
    let huge = 0x7FFF_FFFF_FFFF_FFC0;
    let sum = Raw::new(2, 0).tensor("a", &[huge], 24, 0).tensor("b", &[huge], 24, huge);
    refused("sum of sizes", sum.data(4096), &["file is incomplete: tensor \"a\""]);
}

#[test]
fn alignment() {
    let with = |ty: u32, value: &[u8]| {
        Raw::new(1, 1)
            .key("general.alignment", ty)
            .bytes(value)
            .tensor("t", &[8], 0, 0)
            .data(1 << 17)
    };
    for n in [0u32, 3, 13, 131_072, 1 << 31, u32::MAX] {
        let part = format!("general.alignment = {n}; must be a power of two, at most 65536");
        refused("alignment", with(4, &n.to_le_bytes()), &[&part]);
    }
    for (ty, value) in [(5, &32u32.to_le_bytes()[..]), (10, &32u64.to_le_bytes()), (0, &[32])] {
        refused("its type", with(ty, value), &["\"general.alignment\": expected u32, found"]);
    }
    let text = [&2u64.to_le_bytes()[..], b"32"].concat();
    refused("its type", with(8, &text), &["expected u32, found string"]);
    for n in [1u32, 2, 8, 64, 65_536] {
        accepted("alignment", with(4, &n.to_le_bytes()));
    }
    let twice = Raw::new(0, 2).key("general.alignment", 4).u32(32).key("general.alignment", 4);
    refused("twice", twice.u32(64).0, &["duplicate key \"general.alignment\""]);
    // Laid out for 32 bytes, declared as 64.
    let mut bytes = Raw::new(2, 1).key("general.alignment", 4).u32(64);
    bytes = bytes.tensor("a", &[8], 0, 0).tensor("b", &[8], 0, 32);
    refused("another layout", bytes.data(256), &["\"b\": offset 32, but", "ends at 64"]);
}

#[test]
fn strange_but_sound() {
    let empty = accepted("nothing in it", Raw::new(0, 0).0);
    assert_eq!((empty.tensors().len(), empty.metadata().count()), (0, 0));
    let mut bytes = Tiny::llama().bytes();
    bytes[4] = 2;
    assert_eq!(accepted("version 2", bytes.clone()).version, 2);
    bytes.push(0);
    let trailing = accepted("trailing", bytes);
    assert_eq!(trailing.warnings, ["1 bytes after the last tensor are ignored"]);
    let scalar = accepted("scalar", one(&[], 0, 0));
    assert_eq!((scalar.tensors()[0].n_elements(), scalar.tensors()[0].n_bytes()), (1, 4));
    for dims in [&[0][..], &[0, 7], &[32, 0], &[0, i64::MAX as u64, 9]] {
        for ty in [0, 8] {
            let gguf = accepted("no elements", one(dims, ty, 0));
            assert!(gguf.data(&gguf.tensors()[0]).is_empty());
        }
    }
    // Nothing is missing where nothing is needed.
    accepted("no elements, no padding", Raw::new(1, 0).tensor("t", &[0], 0, 0).0);
}

/// Parts of a split model, in a folder; `change` sees each part's index.
fn split(n: u32, change: impl Fn(u32, Tiny) -> Tiny) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let whole = Tiny::llama();
    let per_part = whole.tensors.len().div_ceil(n as usize);
    for (i, tensors) in whole.tensors.chunks(per_part).enumerate() {
        let mut part = Tiny { tensors: tensors.to_vec(), keys: Vec::new() };
        if i == 0 {
            part.keys = whole.keys.clone();
        }
        part = part
            .set("split.no", Value::U16(i as u16))
            .set("split.count", Value::U16(n as u16))
            .set("split.tensors.count", Value::I32(whole.tensors.len() as i32));
        let name = format!("m-{:05}-of-{n:05}.gguf", i + 1);
        change(i as u32, part).writer().write(&dir.path().join(name)).unwrap();
    }
    dir
}

#[test]
fn split_models() {
    let whole = Gguf::parse(Bytes::from(Tiny::llama().bytes())).unwrap();
    let dir = split(3, |_, part| part);
    for i in 1..=3 {
        let gguf = Gguf::open(&dir.path().join(format!("m-{i:05}-of-00003.gguf"))).unwrap();
        assert_eq!(gguf.str("general.architecture").unwrap(), Some("llama"));
        assert_eq!(gguf.tensors().len(), whole.tensors().len());
        for (ours, tensor) in gguf.tensors().iter().zip(whole.tensors()) {
            assert_eq!(ours.name, tensor.name);
            assert!(*gguf.data(ours) == *whole.data(tensor), "{} of part {i}", ours.name);
        }
    }
    let first = |dir: &tempfile::TempDir, parts: &[&str]| {
        let name = "m-00001-of-00003.gguf";
        let text = line("split", Gguf::open(&dir.path().join(name)));
        for part in parts {
            assert!(text.contains(part), "\"{text}\" does not say \"{part}\"");
        }
    };
    std::fs::remove_file(dir.path().join("m-00002-of-00003.gguf")).unwrap();
    first(&dir, &["part 2 of 3 of this split model is missing", "m-00002-of-00003.gguf"]);
    let one = dir.path().join("m-00001-of-00003.gguf");
    std::fs::copy(&one, dir.path().join("other.gguf")).unwrap();
    let text = line("name", Gguf::open(&dir.path().join("other.gguf")));
    assert!(text.contains("its name must end in \"-00001-of-00003.gguf\""), "{text}");

    type Change = fn(Tiny) -> Tiny;
    let change = |at: u32, change: Change, parts: &[&str]| {
        let dir = split(3, |i, part| if i == at { change(part) } else { part });
        first(&dir, parts);
    };
    change(0, |t| t.set("split.no", 3), &["split.no = 3", "0..=2"]);
    change(0, |t| t.set("split.no", 1), &["must end in \"-00002-of-00003.gguf\""]);
    change(0, |t| t.set("split.no", "0"), &["key \"split.no\": expected an integer, found string"]);
    change(0, |t| t.set("split.no", Value::I32(-1)), &["\"split.no\" = -1"]);
    change(0, |t| t.without("split.no"), &["split.no is missing"]);
    change(0, |t| t.set("split.count", "3"), &["\"split.count\": expected an integer"]);
    change(0, |t| t.set("split.count", u32::MAX), &["split.count = 4294967295; allowed 1..=1024"]);
    change(0, |t| t.set("split.count", 4), &["must end in \"-00001-of-00004.gguf\""]);
    change(1, |t| t.set("split.no", 2), &["m-00002-of-00003.gguf", "split.no = 2; expected 1"]);
    change(1, |t| t.set("split.count", 2), &["m-00002", "split.count = 2; expected 3"]);
    change(1, |t| t.without("split.no"), &["m-00002", "split.no is missing; expected 1"]);
    change(1, |t| t.set("split.count", 3.0), &["m-00002", "expected an integer, found f32"]);
    change(0, |t| t.set("split.tensors.count", 99), &["split.tensors.count = 99, but the parts"]);
    change(0, |t| t.set("split.tensors.count", "a"), &["split.tensors.count\": expected an inte"]);
    let dir = split(3, |i, part| match i {
        0 => part.without("split.tensors.count"),
        1 => part,
        _ => part.tensor("output_norm.weight", &[8]),
    });
    first(&dir, &["tensor \"output_norm.weight\" is in two parts"]);
    let dir = split(3, |_, part| part);
    let third = dir.path().join("m-00003-of-00003.gguf");
    let bytes = std::fs::read(&third).unwrap();
    std::fs::write(&third, &bytes[..bytes.len() - 32]).unwrap();
    first(&dir, &["m-00003-of-00003.gguf: file is incomplete"]);
    std::fs::write(&third, [&bytes[..], &[0; 5]].concat()).unwrap();
    let gguf = Gguf::open(&dir.path().join("m-00001-of-00003.gguf")).unwrap();
    assert_eq!(gguf.warnings, ["5 bytes after the last tensor are ignored"]);
}
