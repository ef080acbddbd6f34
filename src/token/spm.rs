//! SentencePiece's byte pair encoding (arXiv 1808.06226), `llama` in a file: characters merge into
//! tokens, the token with the highest score first. Spaces are written `▁`, and characters that have
//! no token as bytes, `<0xNN>`.

use std::collections::{HashMap, HashSet};

use super::merge::{Merger, NONE};
use super::vocab::{Vocab, scores};
use super::{Algorithm, Defaults, Engine, Loaded, special, unescape_spaces};
use crate::bad_file;
use crate::error::Result;
use crate::gguf::Gguf;

/// SentencePiece.
pub(super) const LLAMA: Algorithm = Algorithm { name: "llama", read };

struct Spm {
    /// The order in which tokens are made, smallest first.
    priorities: Vec<u32>,
    /// Characters that stand side by side in some token. Between any two others no merge can
    /// ever happen, so a text falls apart there without a change of the result.
    joined: HashSet<(char, char)>,
    /// The token of each byte.
    bytes: [u32; 256],
    unknown: Option<u32>,
    space_prefix: bool,
}

fn read(gguf: &Gguf, vocab: &Vocab, warnings: &mut Vec<String>) -> Result<Loaded> {
    let mut joined = HashSet::new();
    for (_, text) in vocab.texts.iter() {
        // A token that is not UTF-8 is never found in a text.
        let Ok(text) = std::str::from_utf8(text) else { continue };
        joined.extend(text.chars().zip(text.chars().skip(1)));
    }
    let unknown = special::id(gguf, vocab, "tokenizer.ggml.unknown_token_id", Some(0))?;
    let bytes = std::array::from_fn(|byte| {
        // A vocabulary without byte tokens may have some bytes as texts.
        let byte = byte as u8;
        vocab.find_byte(byte).or_else(|| vocab.find(&[byte])).unwrap_or(NONE)
    });
    let missing = bytes.iter().filter(|id| **id == NONE).count();
    if missing > 0 {
        warnings.push(format!(
            "{missing} of 256 bytes have no token; characters of them become unknown tokens"
        ));
    }
    let spm = Spm {
        priorities: scores(gguf, vocab.len())?.into_iter().map(priority).collect(),
        joined,
        bytes,
        unknown,
        space_prefix: gguf.bool("tokenizer.ggml.add_space_prefix")?.unwrap_or(true),
    };
    let defaults = Defaults { bos: Some(1), eos: Some(2), add_bos: true, ..Defaults::default() };
    Ok((defaults, Box::new(spm)))
}

/// Numbers that rise as scores fall.
fn priority(score: f32) -> u32 {
    // The sum makes negative zero positive: the two are equal.
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { !(bits | 1 << 31) } else { bits }
}

impl Spm {
    /// Encodes a part of the text that no token reaches out of.
    fn part(&self, vocab: &Vocab, part: &str, m: &mut Merger, out: &mut Vec<u32>) -> Result<()> {
        let bytes = part.as_bytes();
        m.clear();
        for (start, c) in part.char_indices() {
            let end = start + c.len_utf8();
            m.push(end, vocab.find(&bytes[start..end]).unwrap_or(NONE));
        }
        m.run(|l, r| {
            let id = vocab.find(&bytes[l.start as usize..r.end as usize])?;
            Some((self.priorities[id as usize], id))
        });
        for symbol in m.finished() {
            if symbol.id != NONE {
                out.push(symbol.id);
                continue;
            }
            for byte in &bytes[symbol.start as usize..symbol.end as usize] {
                match (self.bytes[usize::from(*byte)], self.unknown) {
                    (NONE, None) => bad_file!("the vocabulary has no token for byte {byte:#04x}"),
                    (NONE, Some(unknown)) => out.push(unknown),
                    (id, _) => out.push(id),
                }
            }
        }
        Ok(())
    }
}

impl Engine for Spm {
    fn encode(&self, vocab: &Vocab, text: &str, first: bool, out: &mut Vec<u32>) -> Result<()> {
        let prefix = if self.space_prefix && first { "▁" } else { "" };
        let text = format!("{prefix}{}", text.replace(' ', "▁"));
        let begin = out.len();
        let mut merger = Merger::default();
        // Most parts of a text have come before: where in `out` they were encoded.
        let mut seen: HashMap<&str, (usize, usize)> = HashMap::new();
        let mut encode = |part| {
            if let Some((start, end)) = seen.get(part) {
                out.extend_from_within(*start..*end);
                return Ok(());
            }
            let start = out.len();
            self.part(vocab, part, &mut merger, out)?;
            seen.insert(part, (start, out.len()));
            Ok(())
        };
        let (mut start, mut last) = (0, None);
        for (at, c) in text.char_indices() {
            if last.is_some_and(|last| !self.joined.contains(&(last, c))) {
                encode(&text[start..at])?;
                start = at;
            }
            last = Some(c);
        }
        encode(&text[start..])?;
        if self.bytes.contains(&NONE) {
            // Unknown characters in a row are one unknown token, as in SentencePiece.
            let mut ids = out.split_off(begin);
            ids.dedup_by(|a, b| a == b && Some(*a) == self.unknown);
            out.append(&mut ids);
        }
        Ok(())
    }

    fn bytes(&self, text: &[u8], out: &mut Vec<u8>) {
        unescape_spaces(text, out);
    }
}
