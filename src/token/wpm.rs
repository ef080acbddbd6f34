//! WordPiece (arXiv 1609.08144), `bert` in a file: words fall into the longest tokens from the left.
//!
//! In a vocabulary, the beginning of a word is written with `▁` before it, and its continuation
//! without the `##` of BERT's own files: the converter changes both.

use std::collections::{BTreeSet, HashMap};

use fancy_regex::Regex;
use unicode_normalization::char::decompose_canonical;

use super::vocab::Vocab;
use super::{Algorithm, Defaults, Engine, Loaded, pre, special, unescape_spaces};
use crate::error::Result;
use crate::gguf::Gguf;

/// WordPiece.
pub(super) const BERT: Algorithm = Algorithm { name: "bert", read };

/// Characters that are words of their own: punctuation, ASCII symbols, and Chinese ones (the
/// ranges of BERT's `_is_chinese_char`, with the one of Hugging Face's that differs).
const ALONE: &str = concat!(
    r"[\p{P}$+<=>^`|~\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2B73F}",
    r"\x{2B740}-\x{2B81F}\x{2B920}-\x{2CEAF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}]"
);
/// Characters that are left out.
const DROPPED: &str = r"[\p{Cc}\p{Cf}\p{Co}\x{FFFD}]";
/// Characters that are left out with their accents.
const DROPPED_AND_ACCENTS: &str = r"[\p{Cc}\p{Cf}\p{Co}\x{FFFD}\p{M}]";

struct Wpm {
    lowercase: bool,
    strip_accents: bool,
    alone: Regex,
    dropped: Regex,
    unknown: Option<u32>,
    /// All lengths of tokens in bytes.
    lens: BTreeSet<usize>,
}

fn read(gguf: &Gguf, vocab: &Vocab, _: &mut Vec<String>) -> Result<Loaded> {
    let lowercase = gguf.bool("tokenizer.ggml.normalizer.lowercase")?.unwrap_or(true);
    let strip_accents = gguf.bool("tokenizer.ggml.normalizer.strip_accents")?.unwrap_or(lowercase);
    let wpm = Wpm {
        lowercase,
        strip_accents,
        alone: pre::regex(ALONE)?,
        dropped: pre::regex(if strip_accents { DROPPED_AND_ACCENTS } else { DROPPED })?,
        unknown: special::id(gguf, vocab, "tokenizer.ggml.unknown_token_id", Some(100))?,
        lens: vocab.texts.iter().map(|(_, text)| text.len()).filter(|len| *len > 0).collect(),
    };
    let defaults = Defaults { bos: Some(101), sep: Some(102), ..Defaults::default() };
    Ok((defaults, Box::new(wpm)))
}

impl Wpm {
    /// Base characters of letters with accents; the accents go, so they need not be kept.
    fn base(c: char, known: &mut HashMap<char, char>) -> char {
        // Hangul syllables stay whole in llama.cpp, although they decompose too.
        if c < '\u{C0}' || ('\u{AC00}'..='\u{D7A3}').contains(&c) {
            return c;
        }
        *known.entry(c).or_insert_with(|| {
            let mut first = None;
            decompose_canonical(c, |part| {
                first.get_or_insert(part);
            });
            first.unwrap_or(c)
        })
    }

    /// The tokens of a word, which begins with `▁`; all or nothing.
    fn word(&self, vocab: &Vocab, word: &[u8], out: &mut Vec<u32>) {
        let begin = out.len();
        let mut rest = word;
        while !rest.is_empty() {
            let longest = self.lens.range(..=rest.len()).rev().find_map(|len| {
                let (head, tail) = rest.split_at(*len);
                Some((vocab.find(head)?, tail))
            });
            let Some((id, tail)) = longest else {
                out.truncate(begin);
                return out.extend(self.unknown);
            };
            out.push(id);
            rest = tail;
        }
    }
}

impl Engine for Wpm {
    fn encode(&self, vocab: &Vocab, text: &str, _: bool, out: &mut Vec<u32>) -> Result<()> {
        let mut text = text.to_string();
        if self.strip_accents {
            let mut known = HashMap::new();
            text = text.chars().map(|c| Self::base(c, &mut known)).collect();
        }
        let mut spelled = String::new();
        let mut encode = |word: &str| {
            if !word.is_empty() {
                spelled.clear();
                spelled.push('▁');
                spelled.push_str(word);
                self.word(vocab, spelled.as_bytes(), out);
            }
        };
        for word in text.split_whitespace() {
            let mut kept = String::new();
            let mut done = 0;
            for (start, end) in pre::matches(&self.dropped, word) {
                kept.push_str(&word[done..start]);
                done = end;
            }
            kept.push_str(&word[done..]);
            if self.lowercase {
                kept = kept.to_lowercase();
            }
            let mut done = 0;
            for (start, end) in pre::matches(&self.alone, &kept) {
                encode(&kept[done..start]);
                encode(&kept[start..end]);
                done = end;
            }
            encode(&kept[done..]);
        }
        Ok(())
    }

    fn bytes(&self, text: &[u8], out: &mut Vec<u8>) {
        unescape_spaces(text, out);
    }
}
