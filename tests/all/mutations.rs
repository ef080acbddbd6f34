//! Damage, systematically: whatever a file holds, reading it ends soon, cheaply and in an error or
//! a model.

use std::sync::Arc;

use qkov::engine::Threads;
use qkov::error::Result;
use qkov::gguf::{Bytes, Gguf, Value, ValueType};
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::bad_files::{EDGES, bounded, line};
use crate::tiny::{Kv, Tiny};

/// Reads a model, and takes two tokens forward.
fn forward(bytes: Bytes) -> Result<()> {
    let model = Arc::new(Model::from_gguf(Gguf::parse(bytes)?)?);
    let options =
        Options { n_threads: Threads { one: 1, batch: 1 }, pin: false, ..Options::default() };
    let mut session = Session::new(model, &options)?;
    let n = session.n_ctx().min(2);
    session.feed(&[1, 0][..n])?;
    // Damaged weights may lead anywhere, but not further.
    let _ = session.finite_logits();
    Ok(())
}

/// Anything but a panic, a giant allocation, a long time, or an error that is not one line.
fn survives<T>(name: &str, bytes: Vec<u8>, read: impl Fn(Bytes) -> Result<T>) -> usize {
    match bounded(name, bytes, read) {
        Ok(_) => 1,
        refused => {
            line(name, refused);
            0
        }
    }
}

/// Where tensor data begins, and so where structure ends.
fn header_len(bytes: &[u8]) -> usize {
    let gguf = Gguf::parse(Bytes::from(bytes.to_vec())).unwrap();
    gguf.tensors()[0].place().1.start
}

/// Every byte of the header, changed in all `ways`.
fn each_byte(bytes: &[u8], ways: &[fn(u8) -> u8], mut check: impl FnMut(&str, Vec<u8>)) {
    for at in 0..header_len(bytes) {
        for way in ways {
            let mut bytes = bytes.to_vec();
            bytes[at] = way(bytes[at]);
            check(&format!("byte {at} = {}", bytes[at]), bytes);
        }
    }
}

/// Small files with all kinds of fields, of which little is the vocabulary.
fn small() -> [Vec<u8>; 2] {
    [Tiny::llama(), Tiny::gpt2()].map(|tiny| {
        let tokens = ["<unk>", "a", "b", "<e>"].map(String::from).to_vec();
        let numbers = |ty, value| Kv::List(ty, vec![value; 4]);
        tiny.without("tokenizer.")
            .set("general.alignment", 8)
            .set("tokenizer.ggml.model", "llama")
            .set("tokenizer.ggml.tokens", Kv::Texts(tokens))
            .set("tokenizer.ggml.scores", numbers(ValueType::F32, Value::F32(0.5)))
            .set("tokenizer.ggml.token_type", numbers(ValueType::I32, Value::I32(1)))
            .set("tokenizer.ggml.bos_token_id", 3)
            .set("tokenizer.ggml.eos_token_id", 3)
            .tensor("token_embd.weight", &[8, 4])
            .bytes()
    })
}

#[test]
fn bytes_of_the_header() {
    let (mut n, mut n_accepted) = (0, 0);
    let ways: [fn(u8) -> u8; 7] = [
        |_| 0,
        |_| 1,
        |_| 0x7F,
        |_| 0x80,
        |_| 0xFF,
        |old| old.wrapping_add(1),
        |old| old.wrapping_sub(1),
    ];
    for file in small() {
        each_byte(&file, &ways, |name, bytes| {
            n += 1;
            n_accepted += survives(name, bytes, forward);
        });
    }
    println!("{n} mutants, {n_accepted} accepted");
    assert!(n > 15_000 && n_accepted > 0 && n_accepted < n / 2, "{n_accepted} of {n}");
}

#[test]
fn numbers_of_the_header() {
    let mut n = 0;
    for file in small() {
        // At every address, so also at that of every field.
        for at in 0..header_len(&file) - 8 {
            for edge in EDGES {
                for width in [4, 8] {
                    let mut bytes = file.clone();
                    bytes[at..at + width].copy_from_slice(&edge.to_le_bytes()[..width]);
                    survives(&format!("{width} bytes at {at} = {edge}"), bytes, forward);
                    n += 1;
                }
            }
        }
    }
    println!("{n} mutants");
    assert!(n > 80_000, "{n}");
}

#[test]
fn pairs_of_sizes() {
    let file = &small()[0];
    let find = |name: &[u8]| file.windows(name.len()).position(|w| w == name).unwrap();
    // Counts, lengths of a key and of a name, a string, and the fields of one tensor.
    let (key, tensor) = (find(b"general.architecture"), find(b"blk.0.attn_q.weight"));
    let after = tensor + b"blk.0.attn_q.weight".len();
    let fields = [
        8,
        16,
        key - 8,
        key + 20,
        key + 24,
        find(b"general.alignment") + 21,
        tensor - 8,
        after,
        after + 4,
        after + 12,
        after + 20,
        after + 24,
    ];
    for a in fields {
        for b in fields {
            for x in [0, 1 << 31, 1 << 61, u64::MAX] {
                for y in [0, 1 << 31, 1 << 61, u64::MAX] {
                    let mut bytes = file.clone();
                    bytes[a..a + 8].copy_from_slice(&x.to_le_bytes());
                    bytes[b..b + 8].copy_from_slice(&y.to_le_bytes());
                    survives(&format!("{a} = {x}, {b} = {y}"), bytes, forward);
                }
            }
        }
    }
}

/// A tokenizer that is made of regular expressions, for each file that gets so far.
#[test]
fn larger_vocabularies() {
    let file = Tiny::llama().bytes();
    let mut n = 0;
    each_byte(&file, &[|_| 0xFF, |old| old.wrapping_add(1)], |name, bytes| {
        survives(name, bytes, forward);
        n += 1;
    });
    println!("{n} mutants");
}

#[test]
fn every_bit_of_the_weights() {
    let file = &small()[0];
    for at in header_len(file)..file.len() {
        for bit in 0..8 {
            let mut bytes = file.clone();
            bytes[at] ^= 1 << bit;
            assert_eq!(survives(&format!("bit {bit} of byte {at}"), bytes, forward), 1);
        }
    }
    println!("{} mutants", 8 * (file.len() - header_len(file)));
}
