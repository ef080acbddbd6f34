//! The vocabulary of a file: texts and kinds of its tokens, checked, and the way from text to id.

use std::hash::{BuildHasher, RandomState};

use super::merge::NONE;
use crate::bad_file;
use crate::error::{Result, escaped};
use crate::gguf::{Array, Gguf, Value, ValueType};

/// Many byte strings in one allocation.
#[derive(Default)]
pub(super) struct Texts {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Texts {
    /// Appends a string.
    pub fn push(&mut self, text: &[u8]) {
        self.bytes.extend_from_slice(text);
        self.ends.push(self.bytes.len());
    }

    /// The string at `id`; empty when there is none.
    pub fn get(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let start = id.checked_sub(1).map_or(Some(0), |i| self.ends.get(i).copied());
        let range = start.zip(self.ends.get(id).copied());
        range.and_then(|(start, end)| self.bytes.get(start..end)).unwrap_or_default()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// All of them with their ids.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &[u8])> {
        (0..self.len() as u32).map(|id| (id, self.get(id)))
    }
}

/// What a token is for; numbers as in `tokenizer.ggml.token_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Undefined = 0,
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

impl Kind {
    const ALL: [Kind; 7] = {
        use Kind::*;
        [Undefined, Normal, Unknown, Control, UserDefined, Unused, Byte]
    };
}

/// All tokens.
pub(super) struct Vocab {
    /// Raw texts, by id.
    pub texts: Texts,
    /// Kinds, by id.
    pub kinds: Vec<Kind>,
    /// A hash table with open addressing: ids, or [`NONE`] in free places, each with a part of
    /// its hash. It holds no texts, so a vocabulary is stored once.
    table: Vec<(u32, u32)>,
    hasher: RandomState,
}

impl Vocab {
    /// Reads `tokenizer.ggml.tokens` and `tokenizer.ggml.token_type`.
    pub fn read(gguf: &Gguf, warnings: &mut Vec<String>) -> Result<Vocab> {
        let key = "tokenizer.ggml.tokens";
        let Some(tokens) = strings(gguf, key)? else { bad_file!("no key \"{key}\"") };
        if tokens.len == 0 {
            bad_file!("key \"{key}\" is empty; a vocabulary has at least one token");
        }
        let mut vocab = Vocab {
            texts: Texts::default(),
            kinds: kinds(gguf, tokens.len)?,
            table: vec![(NONE, 0); (tokens.len * 2).next_power_of_two()],
            hasher: RandomState::new(),
        };
        let (mut empty, mut duplicates) = (Vec::new(), Vec::new());
        for (id, text) in (0..).zip(tokens.strings()) {
            vocab.texts.push(text);
            let (place, tag) = vocab.place(text);
            if text.is_empty() {
                empty.push(id);
            } else if vocab.table[place].0 == NONE {
                vocab.table[place] = (id, tag);
            } else {
                duplicates.push(id);
            }
        }
        if let Some(first) = empty.first() {
            let n = empty.len();
            warnings.push(format!("{n} tokens have an empty text, the first is token {first}"));
        }
        if let Some(first) = duplicates.first() {
            let text = vocab.shown(*first);
            warnings.push(format!(
                "{} tokens repeat the text of an earlier one, which is used; the first is token {first}, \"{text}\"",
                duplicates.len()
            ));
        }
        for (id, text) in vocab.texts.iter() {
            if vocab.kinds[id as usize] == Kind::Byte && byte(text).is_none() {
                bad_file!(
                    "token {id} is of type byte, but its text is \"{}\"; allowed <0x00>..=<0xFF>",
                    vocab.shown(id)
                );
            }
        }
        Ok(vocab)
    }

    /// The place in the table that holds the id of `text`, or the free one that would, and the
    /// part of the hash that is kept there.
    fn place(&self, text: &[u8]) -> (usize, u32) {
        let mask = self.table.len() - 1;
        let hash = self.hasher.hash_one(text);
        let (mut place, tag) = (hash as usize & mask, (hash >> 32) as u32);
        loop {
            let (id, found) = self.table[place];
            if id == NONE || (found == tag && self.texts.get(id) == text) {
                return (place, tag);
            }
            place = (place + 1) & mask;
        }
    }

    /// The first token with this text.
    pub fn find(&self, text: &[u8]) -> Option<u32> {
        let (place, _) = self.place(text);
        Some(self.table[place].0).filter(|id| *id != NONE)
    }

    /// The token that stands for one byte, `<0x0A>`.
    pub fn find_byte(&self, byte: u8) -> Option<u32> {
        self.find(format!("<0x{byte:02X}>").as_bytes())
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.texts.len()
    }

    /// The kind of a token.
    pub fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Undefined)
    }

    /// A token's text for a message.
    pub fn shown(&self, id: u32) -> String {
        shown(self.texts.get(id))
    }
}

/// A text for a message: safe for a terminal, and not too long.
pub(super) fn shown(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", escaped(&text[..end])),
        None => escaped(&text),
    }
}

/// The byte that `<0x0A>` stands for.
pub(super) fn byte(text: &[u8]) -> Option<u8> {
    let digits = text.strip_prefix(b"<0x")?.strip_suffix(b">")?;
    // `from_str_radix` would take a sign.
    if digits.len() != 2 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

/// An array of strings, if the key is there.
pub(super) fn strings<'a>(gguf: &'a Gguf, key: &str) -> Result<Option<Array<'a>>> {
    match gguf.array(key)? {
        Some(array) if array.element != ValueType::String => {
            bad_file!("key \"{key}\": expected array of string, found {}", array.element.name())
        }
        found => Ok(found),
    }
}

/// An array with one number per token, of one of the types `allowed`.
fn per_token<'a>(
    gguf: &'a Gguf,
    key: &str,
    allowed: &[ValueType],
    n_vocab: usize,
) -> Result<Option<Array<'a>>> {
    let Some(array) = gguf.array(key)? else { return Ok(None) };
    if !allowed.contains(&array.element) {
        let names: Vec<_> = allowed.iter().map(|t| t.name()).collect();
        bad_file!(
            "key \"{key}\": expected array of {}, found {}",
            names.join(" or "),
            array.element.name()
        );
    }
    if array.len != n_vocab {
        bad_file!("key \"{key}\" has {} entries; expected {n_vocab}, one per token", array.len);
    }
    Ok(Some(array))
}

fn kinds(gguf: &Gguf, n_vocab: usize) -> Result<Vec<Kind>> {
    let key = "tokenizer.ggml.token_type";
    let Some(types) = per_token(gguf, key, &[ValueType::I32, ValueType::U32], n_vocab)? else {
        return Ok(vec![Kind::Normal; n_vocab]);
    };
    let mut kinds = Vec::with_capacity(n_vocab);
    for (id, value) in types.iter().enumerate() {
        let number = value.integer().unwrap_or(-1);
        let kind = usize::try_from(number).ok().and_then(|n| Kind::ALL.get(n));
        let Some(kind) = kind else {
            bad_file!("key \"{key}\", token {id}: type {number}; allowed 0..=6");
        };
        kinds.push(*kind);
    }
    Ok(kinds)
}

/// `tokenizer.ggml.scores`, which must be there.
pub(super) fn scores(gguf: &Gguf, n_vocab: usize) -> Result<Vec<f32>> {
    let key = "tokenizer.ggml.scores";
    let Some(array) = per_token(gguf, key, &[ValueType::F32], n_vocab)? else {
        bad_file!("no key \"{key}\"; this kind of tokenizer needs a score per token");
    };
    let mut scores = Vec::with_capacity(n_vocab);
    for (id, value) in array.iter().enumerate() {
        match value {
            Value::F32(score) if !score.is_nan() => scores.push(score),
            _ => bad_file!("key \"{key}\", token {id}: the score is not a number"),
        }
    }
    Ok(scores)
}
