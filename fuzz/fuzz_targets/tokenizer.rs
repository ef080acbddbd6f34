//! Vocabularies of all kinds, sound or damaged, and any text.
//!
//! Four bytes say which kind, which pre-tokenizer, how texts are read, and how many bytes of damage
//! follow; then there is text.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use qkov::token::pre::PRES;
use qkov::token::{StreamDecoder, Tokenizer};
use qkov_fuzz::vocabularies::{bpe, gemma4, spm, wpm};
use qkov_fuzz::{File, Input, parse};

const SPM: usize = 0;
const BPE: usize = 1;

static FILES: LazyLock<Vec<File>> = LazyLock::new(|| {
    [spm(), bpe(), gemma4(), wpm()].map(|file| File::of(&parse(file.bytes()).unwrap())).into()
});

/// Those that are sound: with BPE, one for each pre-tokenizer.
static SOUND: LazyLock<[Vec<Tokenizer>; 4]> = LazyLock::new(|| {
    [0, 1, 2, 3].map(|kind| {
        let n = if kind == BPE { PRES.len() } else { 1 };
        (0..n).map(|pre| open(&file(kind, pre)).unwrap()).collect()
    })
});

fn file(kind: usize, pre: usize) -> File {
    let mut file = FILES[kind].clone();
    if kind == BPE {
        file.set_text("tokenizer.ggml.pre", PRES[pre].name);
    }
    file
}

fn open(file: &File) -> qkov::error::Result<Tokenizer> {
    Tokenizer::from_gguf(&parse(file.bytes())?)
}

fn streamed<'a>(parts: impl Iterator<Item = &'a [u8]>) -> String {
    let mut decoder = StreamDecoder::default();
    let mut text: String = parts.map(|part| decoder.push(part)).collect();
    text.push_str(&decoder.finish());
    text
}

fn check(tokenizer: &Tokenizer, text: &str, flags: u8) -> Option<Vec<u8>> {
    let ids = tokenizer.encode(text, flags & 1 > 0, flags & 2 > 0).ok()?;
    assert!(ids.iter().all(|id| (*id as usize) < tokenizer.n_vocab()));
    let pieces = || ids.iter().map(|id| tokenizer.piece(*id, flags & 4 > 0));
    let bytes = pieces().collect::<Vec<_>>().concat();
    assert_eq!(streamed(pieces()), String::from_utf8_lossy(&bytes));
    (flags & 3 == 0).then_some(bytes)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let kind = usize::from(input.byte()) % 4;
    let pre = usize::from(input.byte()) % PRES.len();
    let (flags, n_damage) = (input.byte(), input.byte());
    let damage = input.take(usize::from(n_damage));
    let rest = input.0;
    assert_eq!(streamed(rest.chunks(1 + usize::from(flags >> 4))), String::from_utf8_lossy(rest));
    let text = String::from_utf8_lossy(rest);
    if !damage.is_empty() {
        let mut file = file(kind, pre);
        file.damage(&mut Input(damage), &FILES);
        if let Ok(tokenizer) = open(&file) {
            check(&tokenizer, &text, flags);
        }
        return;
    }
    let sound = &SOUND[kind];
    let Some(bytes) = check(&sound[pre % sound.len()], &text, flags) else { return };
    match kind {
        BPE if !PRES[pre].raw && !text.contains('<') => assert_eq!(bytes, text.as_bytes()),
        SPM if !text.contains('<') => {
            // A space goes in front, and what stands for a space is one.
            let spaced = format!(" {}", text.replace('▁', " "));
            assert!(text.is_empty() || bytes == spaced.as_bytes(), "{text:?}");
        }
        _ => {}
    }
});
