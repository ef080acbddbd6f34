//! Small vocabularies, written as files by hand: the reader is not tested with the writer.

#![allow(clippy::unwrap_used, clippy::panic)]

use qkov::gguf::{Bytes, Gguf};
use qkov::token::Tokenizer;

/// A metadata value to write.
#[derive(Clone)]
pub enum V {
    U32(u32),
    I32(i32),
    Bool(bool),
    Str(Vec<u8>),
    Strs(Vec<Vec<u8>>),
    F32s(Vec<f32>),
    I32s(Vec<i32>),
    U8s(Vec<u8>),
}

/// A file of metadata alone.
#[derive(Clone, Default)]
pub struct File(Vec<(String, V)>);

impl File {
    /// Sets a key of the tokenizer, or replaces it.
    pub fn set(mut self, key: &str, value: V) -> File {
        let key = if key.contains('.') && !key.starts_with("normalizer") {
            key.to_string()
        } else {
            format!("tokenizer.ggml.{key}")
        };
        self.0.retain(|(k, _)| *k != key);
        self.0.push((key, value));
        self
    }

    pub fn without(mut self, key: &str) -> File {
        self.0.retain(|(k, _)| *k != format!("tokenizer.ggml.{key}"));
        self
    }

    pub fn str(self, key: &str, value: &str) -> File {
        self.set(key, V::Str(value.into()))
    }

    pub fn strs<T: AsRef<[u8]>>(self, key: &str, values: &[T]) -> File {
        self.set(key, V::Strs(values.iter().map(|v| v.as_ref().to_vec()).collect()))
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        let string = |out: &mut Vec<u8>, s: &[u8]| {
            out.extend((s.len() as u64).to_le_bytes());
            out.extend(s);
        };
        let array = |out: &mut Vec<u8>, ty: u32, len: usize| {
            out.extend(9u32.to_le_bytes());
            out.extend(ty.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        out.extend(0u64.to_le_bytes());
        out.extend((self.0.len() as u64).to_le_bytes());
        for (key, value) in &self.0 {
            string(&mut out, key.as_bytes());
            match value {
                V::U32(v) => out.extend([4u32.to_le_bytes(), v.to_le_bytes()].concat()),
                V::I32(v) => out.extend([5u32.to_le_bytes(), v.to_le_bytes()].concat()),
                V::Bool(v) => out.extend([&7u32.to_le_bytes()[..], &[u8::from(*v)]].concat()),
                V::Str(v) => {
                    out.extend(8u32.to_le_bytes());
                    string(&mut out, v);
                }
                V::Strs(v) => {
                    array(&mut out, 8, v.len());
                    v.iter().for_each(|s| string(&mut out, s));
                }
                V::F32s(v) => {
                    array(&mut out, 6, v.len());
                    v.iter().for_each(|x| out.extend(x.to_le_bytes()));
                }
                V::I32s(v) => {
                    array(&mut out, 5, v.len());
                    v.iter().for_each(|x| out.extend(x.to_le_bytes()));
                }
                V::U8s(v) => {
                    array(&mut out, 0, v.len());
                    out.extend(v);
                }
            }
        }
        out
    }

    pub fn load(&self) -> Result<Tokenizer, String> {
        let gguf = Gguf::parse(Bytes::from(self.bytes())).unwrap();
        Tokenizer::from_gguf(&gguf).map_err(|e| e.to_string())
    }

    pub fn open(&self) -> Tokenizer {
        self.load().unwrap()
    }

    /// The message of a file that is refused: one line that has all of `words`.
    pub fn refused(&self, words: &[&str]) {
        let message = self.load().err().unwrap_or_else(|| panic!("accepted, not {words:?}"));
        assert_eq!(message.lines().count(), 1, "{message}");
        words
            .iter()
            .for_each(|word| assert!(message.contains(word), "{word:?} not in {message:?}"));
    }
}

/// `<unk>`, `<s>`, `</s>`, all bytes, and a few pieces.
pub fn spm() -> File {
    let mut tokens: Vec<Vec<u8>> = ["<unk>", "<s>", "</s>"].map(|t| t.as_bytes().to_vec()).into();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>").into_bytes()));
    let mut types = vec![2, 3, 3];
    types.resize(259, 6);
    let pieces =
        ["▁", "a", "b", "c", "ab", "bc", "▁a", "▁abc", "ä", "▁▁", "abc", "<sep>", "<sep>b"];
    tokens.extend(pieces.map(|t| t.as_bytes().to_vec()));
    types.extend([1; 11]);
    types.extend([4, 3]);
    let mut scores = vec![0.0; 259];
    // "bc" goes before "ab", so that "abc" is "a" + "bc" first; then "abc" before "▁a".
    let own = [-9.0, -9.0, -9.0, -9.0, -3.0, -2.0, -5.0, -6.0, -9.0, -7.0, -4.0, 0.0, 0.0];
    scores.extend(own);
    File::default()
        .str("model", "llama")
        .strs("tokens", &tokens)
        .set("token_type", V::I32s(types))
        .set("scores", V::F32s(scores))
        .set("bos_token_id", V::U32(1))
        .set("eos_token_id", V::U32(2))
}

/// GPT-2's characters for all bytes, merges for "hello" and " w", and special tokens.
pub fn bpe() -> File {
    let chars = (0..=255u8).map(|b| match b {
        b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(b),
        0..=b' ' => char::from_u32(0x100 + u32::from(b)).unwrap(),
        0x7F..=0xA0 => char::from_u32(0x121 + u32::from(b) - 0x7F).unwrap(),
        0xAD => '\u{143}',
    });
    let mut tokens: Vec<String> = chars.map(String::from).collect();
    let more =
        ["he", "ll", "hell", "hello", "Ġw", "Ġworld", "<|im_end|>", "<|ctl|>", "<u>", "<u>x", ""];
    tokens.extend(more.map(String::from));
    let mut types = vec![1; 262];
    types.extend([1, 3, 4, 4, 3]);
    File::default()
        .str("model", "gpt2")
        .str("pre", "gpt-2")
        .strs("tokens", &tokens)
        .set("token_type", V::I32s(types))
        .strs("merges", &["h e", "l l", "he ll", "hell o", "Ġ w"])
        .set("bos_token_id", V::U32(262))
        .set("eos_token_id", V::U32(262))
}

pub fn wpm() -> File {
    let tokens = [
        "[PAD]", "[UNK]", "[CLS]", "[SEP]", "▁hello", "▁wor", "ld", "▁!", "▁cafe", "▁中", "▁it",
        "▁'", "▁s",
    ];
    let mut types = vec![3; 4];
    types.extend([1; 9]);
    File::default()
        .str("model", "bert")
        .strs("tokens", &tokens)
        .set("token_type", V::I32s(types))
        .set("unknown_token_id", V::U32(1))
        .set("bos_token_id", V::U32(2))
        .set("seperator_token_id", V::U32(3))
}

pub fn gemma4() -> File {
    let tokens = ["<pad>", "<eos>", "<bos>", "▁", "a", "b", "▁a", "\n", "\n\n", "<0xC3>", "<0xA4>"];
    File::default()
        .str("model", "gemma4")
        .strs("tokens", &tokens)
        .set("token_type", V::I32s(vec![3, 3, 3, 1, 1, 1, 1, 1, 1, 6, 6]))
        .strs("merges", &["▁ a"])
        .set("bos_token_id", V::U32(2))
}
