//! Special tokens: which there are, which end a reply, and where a text names them.
//!
//! The names and rules are those of llama.cpp (`src/llama-vocab.cpp`), which files rely on: their
//! types and ids are often incomplete.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashSet};
use std::ops::Range;

use aho_corasick::AhoCorasick;

use super::Defaults;
use super::vocab::{Kind, Vocab};
use crate::bad_file;
use crate::error::{Error, Result};
use crate::gguf::Gguf;

/// Tokens that end a reply, whatever else a file says about them.
const END_OF_GENERATION: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Names of the tokens of fill-in-the-middle by the key that may hold their id. A model that
/// begins a new file, or pads, has nothing more to say: the last three end a reply.
const FILL_IN_THE_MIDDLE: &[(&str, bool, &[&str])] = &[
    (
        "tokenizer.ggml.fim_pre_token_id",
        false,
        &[
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ],
    ),
    (
        "tokenizer.ggml.fim_suf_token_id",
        false,
        &[
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ],
    ),
    (
        "tokenizer.ggml.fim_mid_token_id",
        false,
        &[
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ],
    ),
    (
        "tokenizer.ggml.fim_pad_token_id",
        true,
        &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    ),
    (
        "tokenizer.ggml.fim_rep_token_id",
        true,
        &["<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"],
    ),
    ("tokenizer.ggml.fim_sep_token_id", true, &["<|file_sep|>"]),
];

/// Parts of gpt-oss's replies that its template needs to see.
const ALWAYS_SHOWN: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// The id at `key`, or else `default` if the vocabulary reaches that far.
pub(super) fn id(
    gguf: &Gguf,
    vocab: &Vocab,
    key: &str,
    default: Option<u32>,
) -> Result<Option<u32>> {
    match gguf.u32(key)? {
        Some(id) if id as usize >= vocab.len() => {
            bad_file!("key \"{key}\" = {id}; the vocabulary has {} tokens", vocab.len())
        }
        Some(id) => Ok(Some(id)),
        None => Ok(default.filter(|id| (*id as usize) < vocab.len())),
    }
}

/// What a tokenizer knows about its special tokens.
pub(super) struct Specials {
    pub bos: Option<u32>,
    pub eos: Option<u32>,
    /// The token that is put in front of a text.
    pub before: Option<u32>,
    /// The token that is put behind it.
    pub after: Option<u32>,
    /// Tokens that end a reply.
    ends: HashSet<u32>,
    /// Finds the names of special tokens, at the index of their id in `ids`.
    names: Option<AhoCorasick>,
    ids: Vec<u32>,
    /// Special tokens that swallow the whitespace behind them.
    strips: HashSet<u32>,
}

/// A part of a text.
pub(super) enum Fragment {
    Text(Range<usize>),
    Token(u32),
}

impl Specials {
    /// Reads ids, and corrects the kinds of tokens whose text says what they are.
    pub fn read(
        gguf: &Gguf,
        vocab: &mut Vocab,
        defaults: &Defaults,
        warnings: &mut Vec<String>,
    ) -> Result<Specials> {
        for (key, _) in gguf.metadata() {
            if key.starts_with("tokenizer.ggml.") && key.ends_with("_token_id") {
                id(gguf, vocab, key, None)?;
            }
        }
        let bos = id(gguf, vocab, "tokenizer.ggml.bos_token_id", defaults.bos)?;
        let eos = id(gguf, vocab, "tokenizer.ggml.eos_token_id", defaults.eos)?;
        let ends = ends(gguf, vocab, eos)?;
        let flag = |key, default| gguf.bool(key).map(|flag| flag.unwrap_or(default));
        let mut add_bos = flag("tokenizer.ggml.add_bos_token", defaults.add_bos)?;
        if defaults.always_bos && !add_bos {
            warnings.push("add_bos_token is false, but this kind of model needs BOS".to_string());
            add_bos = true;
        }
        let add_eos = flag("tokenizer.ggml.add_eos_token", false)?;
        let sep = id(gguf, vocab, "tokenizer.ggml.seperator_token_id", defaults.sep)?;
        let needed = |add: bool, id: Option<u32>, name: &str| match id {
            None if add => bad_file!("{name} is to be added to texts, but no key gives its id"),
            id => Ok(id.filter(|_| add)),
        };
        let (before, after) = match defaults.sep {
            // BERT has no choice.
            Some(_) => (needed(true, bos, "CLS")?, needed(true, sep, "SEP")?),
            None => (needed(add_bos, bos, "BOS")?, needed(add_eos, eos, "EOS")?),
        };
        // A name that is empty is everywhere; one that is not UTF-8, nowhere.
        let special = |kind| matches!(kind, Kind::Unknown | Kind::Control | Kind::UserDefined);
        let named = |(id, text): &(u32, &[u8])| {
            special(vocab.kind(*id)) && !text.is_empty() && std::str::from_utf8(text).is_ok()
        };
        let (ids, texts): (Vec<u32>, Vec<&[u8]>) = vocab.texts.iter().filter(named).unzip();
        let names = match texts.is_empty() {
            true => None,
            false => Some(AhoCorasick::new(&texts).map_err(|e| {
                Error::File(format!("the names of {} special tokens: {e}", texts.len()))
            })?),
        };
        let strips = strips(gguf, vocab, &ids)?;
        Ok(Specials { bos, eos, before, after, ends, names, ids, strips })
    }

    /// Whether a token ends a reply.
    pub fn is_end(&self, id: u32) -> bool {
        self.ends.contains(&id)
    }

    /// Splits a text at the names of special tokens: user-defined ones always, control and unknown
    /// ones only with `parse`. A longer name goes before a shorter one that overlaps it.
    pub fn split(&self, vocab: &Vocab, text: &str, parse: bool) -> Vec<Fragment> {
        let mut found: Vec<(Reverse<usize>, u32, usize)> = Vec::new();
        for hit in self.names.iter().flat_map(|names| names.find_overlapping_iter(text)) {
            let id = self.ids[hit.pattern().as_usize()];
            if parse || vocab.kind(id) == Kind::UserDefined {
                found.push((Reverse(hit.end() - hit.start()), id, hit.start()));
            }
        }
        found.sort_unstable();
        // Where each accepted token begins, and the text behind it.
        let mut taken: BTreeMap<usize, (usize, u32)> = BTreeMap::new();
        for (Reverse(len), id, start) in found {
            let mut end = start + len;
            let next = taken.range(start..).next().map_or(text.len(), |(next, _)| *next);
            let free = taken.range(..start).next_back().is_none_or(|(_, (end, _))| *end <= start);
            if !free || next < end {
                continue;
            }
            if self.strips.contains(&id) {
                let space = |b: &&u8| b.is_ascii_whitespace() || **b == 0x0B;
                end += text.as_bytes()[end..next].iter().take_while(space).count();
            }
            taken.insert(start, (end, id));
        }
        let mut fragments = Vec::new();
        let mut done = 0;
        for (start, (end, id)) in taken {
            if start > done {
                fragments.push(Fragment::Text(done..start));
            }
            fragments.push(Fragment::Token(id));
            done = end;
        }
        if done < text.len() {
            fragments.push(Fragment::Text(done..text.len()));
        }
        fragments
    }
}

/// Collects the tokens that end a reply.
fn ends(gguf: &Gguf, vocab: &mut Vocab, eos: Option<u32>) -> Result<HashSet<u32>> {
    let mut ends = HashSet::new();
    let control = |vocab: &mut Vocab, name: &str| {
        let id = vocab.find(name.as_bytes())?;
        vocab.kinds[id as usize] = Kind::Control;
        Some(id)
    };
    for (key, is_end, names) in FILL_IN_THE_MIDDLE {
        let given = id(gguf, vocab, key, None)?;
        let found = given.or_else(|| names.iter().find_map(|name| control(vocab, name)));
        ends.extend(found.filter(|_| *is_end));
    }
    ends.extend(END_OF_GENERATION.iter().filter_map(|name| control(vocab, name)));
    for name in ALWAYS_SHOWN {
        if let Some(id) = vocab.find(name.as_bytes()) {
            vocab.kinds[id as usize] = Kind::UserDefined;
        }
    }
    ends.extend(eos);
    for key in ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ends.extend(id(gguf, vocab, key, None)?);
    }
    let end = |name: &str| vocab.find(name.as_bytes()).filter(|id| ends.contains(id));
    let all = |names: &[&str]| names.iter().all(|name| end(name).is_some());
    // In the formats of gpt-oss and Solar Open this ends a message, and more may follow.
    let goes_on = all(&["<|return|>", "<|call|>"])
        || (end("<|call|>").or(end("<|calls|>")).is_some() && all(&["<|flush|>"]));
    let message = end("<|end|>").filter(|_| goes_on);
    // Gemma 4 has this as a tag of HTML.
    let tag = end("</s>").filter(|_| all(&["<|tool_response>"]));
    for (id, kind) in [(message, Kind::UserDefined), (tag, Kind::Normal)] {
        if let Some(id) = id {
            ends.remove(&id);
            vocab.kinds[id as usize] = kind;
        }
    }
    Ok(ends)
}

/// Special tokens that swallow the whitespace behind them, which no key tells: Phi-3 has them.
fn strips(gguf: &Gguf, vocab: &Vocab, specials: &[u32]) -> Result<HashSet<u32>> {
    let name = gguf.str("general.name")?.unwrap_or_default().to_lowercase();
    if !name.contains("phi-3") && !name.contains("phi3") {
        return Ok(HashSet::new());
    }
    let keep = ["<unk>", "<s>", "<|endoftext|>"].map(|name| vocab.find(name.as_bytes()));
    let mut strips: HashSet<u32> = specials.iter().copied().collect();
    strips.retain(|id| !keep.contains(&Some(*id)));
    Ok(strips)
}
