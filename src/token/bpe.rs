//! Byte pair encoding (arXiv 1508.07909): words fall into bytes or characters, which merge in the
//! order of a list.
//!
//! `gpt2` works on bytes, each written as one printable character; `gemma4` on characters, with
//! `▁` for a space and `<0xNN>` for bytes of characters that have no token.

use std::collections::HashMap;

use super::merge::{Merger, NONE};
use super::pre::{self, Pre, Splitter};
use super::vocab::{Vocab, shown, strings};
use super::{Algorithm, Defaults, Engine, Loaded, unescape_spaces};
use crate::bad_file;
use crate::error::{Result, escaped};
use crate::gguf::Gguf;

/// Byte pair encoding of bytes.
pub(super) const GPT2: Algorithm = Algorithm { name: "gpt2", read: read_gpt2 };
/// Byte pair encoding of characters.
pub(super) const GEMMA4: Algorithm = Algorithm { name: "gemma4", read: read_gemma4 };

/// All merges, grouped by their left token.
struct Merges {
    /// Where the merges of each left token begin, and after the last, where they end.
    starts: Vec<u32>,
    /// Right token, rank, and what the two become; sorted within a group.
    merges: Vec<(u32, u32, u32)>,
}

impl Merges {
    /// Sorts merges, given as left, right and made tokens in the order of their rank.
    fn new(list: &[(u32, u32, u32)], n_vocab: usize) -> Merges {
        let mut starts = vec![0; n_vocab + 1];
        for (left, ..) in list {
            starts[*left as usize + 1] += 1;
        }
        for left in 0..n_vocab {
            starts[left + 1] += starts[left];
        }
        let mut next = starts.clone();
        let mut merges = vec![(0, 0, 0); list.len()];
        for (rank, (left, right, made)) in (0..).zip(list) {
            let at = &mut next[*left as usize];
            merges[*at as usize] = (*right, rank, *made);
            *at += 1;
        }
        for group in starts.windows(2) {
            merges[group[0] as usize..group[1] as usize].sort_unstable();
        }
        Merges { starts, merges }
    }

    /// The rank of a merge and the token that it makes. Of two equal merges the first counts.
    fn find(&self, left: u32, right: u32) -> Option<(u32, u32)> {
        let left = left as usize;
        let range = *self.starts.get(left)? as usize..*self.starts.get(left + 1)? as usize;
        let group = self.merges.get(range)?;
        let at = group.partition_point(|merge| merge.0 < right);
        group.get(at).filter(|merge| merge.0 == right).map(|merge| (merge.1, merge.2))
    }
}

struct Bpe {
    pre: &'static Pre,
    splitter: Splitter,
    merges: Merges,
    /// The token of each byte: a character of its own, or `<0xNN>`.
    bytes: [u32; 256],
}

fn read_gpt2(gguf: &Gguf, vocab: &Vocab, warnings: &mut Vec<String>) -> Result<Loaded> {
    let key = "tokenizer.ggml.pre";
    let name = match gguf.str(key)? {
        Some(name) => name,
        None => {
            warnings.push(format!("no key \"{key}\": \"default\" is used, which may be wrong"));
            "default"
        }
    };
    let Some(pre) = pre::find(name) else {
        bad_file!(
            "key \"{key}\" = \"{}\" is none of the {} known pre-tokenizers; any other would give wrong tokens",
            escaped(name),
            pre::PRE_COUNT
        );
    };
    read(gguf, vocab, pre, Some(11), warnings)
}

fn read_gemma4(gguf: &Gguf, vocab: &Vocab, warnings: &mut Vec<String>) -> Result<Loaded> {
    read(gguf, vocab, &pre::GEMMA4, None, warnings)
}

fn read(
    gguf: &Gguf,
    vocab: &Vocab,
    pre: &'static Pre,
    id: Option<u32>,
    warnings: &mut Vec<String>,
) -> Result<Loaded> {
    let merges = read_merges(gguf, vocab)?;
    let bytes: [u32; 256] = std::array::from_fn(|byte| {
        let id = match pre.raw {
            true => vocab.find_byte(byte as u8),
            false => vocab.find(char_of(byte as u8).encode_utf8(&mut [0; 4]).as_bytes()),
        };
        id.unwrap_or(NONE)
    });
    // 13 bytes are in no UTF-8 text.
    let occurs = |byte: usize| !matches!(byte, 0xC0 | 0xC1 | 0xF5..);
    let missing = (0..256).filter(|byte| occurs(*byte) && bytes[*byte] == NONE).count();
    if missing > 0 {
        warnings.push(format!("{missing} bytes have no token and are left out of texts"));
    }
    let defaults = Defaults {
        bos: id.filter(|_| pre.bos != pre::Bos::NoId),
        eos: id,
        add_bos: matches!(pre.bos, pre::Bos::On | pre::Bos::Always),
        always_bos: pre.bos == pre::Bos::Always,
        ..Defaults::default()
    };
    let splitter = Splitter::new(pre.patterns)?;
    Ok((defaults, Box::new(Bpe { pre, splitter, merges, bytes })))
}

fn read_merges(gguf: &Gguf, vocab: &Vocab) -> Result<Merges> {
    let key = "tokenizer.ggml.merges";
    let Some(list) = strings(gguf, key)? else { bad_file!("no key \"{key}\"") };
    let mut merges = Vec::with_capacity(list.len);
    let (mut both, mut made) = (Vec::new(), 0);
    for (rank, merge) in list.strings().enumerate() {
        // The first part has at least one byte, which may be a space.
        let space = merge.iter().skip(1).position(|b| *b == b' ').map(|at| at + 1);
        let Some((left, right)) = space.map(|at| (&merge[..at], &merge[at + 1..])) else {
            bad_file!(
                "key \"{key}\", merge {rank}: \"{}\" is not two parts with a space between them",
                shown(merge)
            );
        };
        both.clear();
        both.extend_from_slice(left);
        both.extend_from_slice(right);
        let id = |part: &[u8]| match vocab.find(part) {
            Some(id) => Ok(id),
            None => bad_file!(
                "key \"{key}\", merge {rank}: \"{}\" of \"{}\" is not in the vocabulary",
                shown(part),
                shown(merge)
            ),
        };
        // Most merges make the token after the one before; to look is cheaper than to search.
        made = match [made, made + 1].into_iter().find(|id| vocab.texts.get(*id) == both) {
            Some(id) => id,
            None => id(&both)?,
        };
        merges.push((id(left)?, id(right)?, made));
    }
    Ok(Merges::new(&merges, vocab.len()))
}

impl Bpe {
    /// Encodes one word. `text` is its spelling in the vocabulary.
    fn word(&self, vocab: &Vocab, word: &str, work: &mut Work, out: &mut Vec<u32>) {
        let Work { merger, spelled } = work;
        let newlines = self.pre.whole_newlines && word.bytes().all(|b| b == b'\n');
        if self.pre.ignore_merges || newlines {
            spelled.clear();
            match self.pre.raw {
                true => spelled.push_str(word),
                false => spelled.extend(word.bytes().map(char_of)),
            }
            if let Some(id) = vocab.find(spelled.as_bytes()) {
                out.push(id);
                return;
            }
        }
        merger.clear();
        if self.pre.raw {
            for (start, c) in word.char_indices() {
                let end = start + c.len_utf8();
                merger.push(end, vocab.find(&word.as_bytes()[start..end]).unwrap_or(NONE));
            }
        } else {
            for (at, byte) in word.bytes().enumerate() {
                merger.push(at + 1, self.bytes[usize::from(byte)]);
            }
        }
        merger.run(|l, r| self.merges.find(l.id, r.id));
        for symbol in merger.finished() {
            if symbol.id != NONE {
                out.push(symbol.id);
            } else if self.pre.raw {
                let bytes = &word.as_bytes()[symbol.start as usize..symbol.end as usize];
                let ids = bytes.iter().map(|b| self.bytes[usize::from(*b)]);
                out.extend(ids.filter(|id| *id != NONE));
            }
        }
    }
}

/// Buffers that live as long as a text.
#[derive(Default)]
struct Work {
    merger: Merger,
    spelled: String,
}

impl Engine for Bpe {
    fn encode(&self, vocab: &Vocab, text: &str, _: bool, out: &mut Vec<u32>) -> Result<()> {
        let escaped = if self.pre.raw { text.replace(' ', "▁") } else { String::new() };
        let text = if self.pre.raw { &escaped } else { text };
        let mut work = Work::default();
        // Most words of a text have come before: where in `out` they were encoded.
        let mut seen: HashMap<&str, (usize, usize)> = HashMap::new();
        self.splitter.split(text, &mut |word| {
            if let Some((start, end)) = seen.get(word) {
                out.extend_from_within(*start..*end);
                return;
            }
            let start = out.len();
            self.word(vocab, word, &mut work, out);
            seen.insert(word, (start, out.len()));
        });
        Ok(())
    }

    fn bytes(&self, text: &[u8], out: &mut Vec<u8>) {
        if self.pre.raw {
            return unescape_spaces(text, out);
        }
        let Ok(text) = std::str::from_utf8(text) else { return out.extend_from_slice(text) };
        for c in text.chars() {
            match byte_of(c) {
                Some(byte) => out.push(byte),
                None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
            }
        }
    }
}

/// Whether GPT-2's `bytes_to_unicode` writes a byte as the character of the same number.
const fn stands_for_itself(byte: u8) -> bool {
    matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF)
}

/// The character that stands for each byte (GPT-2, `encoder.py`, `bytes_to_unicode`): itself if
/// it is printable Latin-1, and otherwise the next one from U+0100 on.
static CHARS: [char; 256] = {
    let mut chars = ['\0'; 256];
    let (mut byte, mut next) = (0, 0x100);
    while byte < 256 {
        if stands_for_itself(byte as u8) {
            chars[byte] = byte as u8 as char;
        } else if let Some(c) = char::from_u32(next) {
            chars[byte] = c;
            next += 1;
        }
        byte += 1;
    }
    chars
};

fn char_of(byte: u8) -> char {
    CHARS[usize::from(byte)]
}

/// The bytes that characters from U+0100 on stand for.
static BYTES: [u8; 68] = {
    let mut bytes = [0; 68];
    let mut byte = 0;
    while byte < 256 {
        if let Some(at) = (CHARS[byte] as usize).checked_sub(0x100) {
            bytes[at] = byte as u8;
        }
        byte += 1;
    }
    bytes
};

/// The byte that a character stands for.
fn byte_of(c: char) -> Option<u8> {
    match u8::try_from(c) {
        Ok(byte) => stands_for_itself(byte).then_some(byte),
        Err(_) => BYTES.get((c as usize).checked_sub(0x100)?).copied(),
    }
}
