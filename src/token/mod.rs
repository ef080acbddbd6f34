//! Text to token ids and back, and messages to text.
//!
//! A model knows a text only as the ids that its training's tokenizer made of it, so exactly these
//! must come out here. The yardstick is llama.cpp, for which files are made; what is not known for
//! certain is refused.
//!
//! An algorithm is one file and one line in `ALGORITHMS`.

mod bpe;
mod merge;
pub mod pre;
mod special;
mod spm;
mod stream;
pub mod template;
mod vocab;
mod wpm;

pub use stream::StreamDecoder;

use crate::error::{Result, escaped};
use crate::gguf::Gguf;
use crate::{bad_file, bad_usage};
use special::{Fragment, Specials};
use vocab::{Kind, Texts, Vocab};

/// Longest text that is encoded, in bytes.
const MAX_TEXT: usize = 1 << 30;

/// Every algorithm that can run.
static ALGORITHMS: &[Algorithm] = &[spm::LLAMA, bpe::GPT2, bpe::GEMMA4, wpm::BERT];

/// A way from text to tokens.
struct Algorithm {
    /// The value of `tokenizer.ggml.model`.
    name: &'static str,
    /// Reads what it needs besides the vocabulary; the strings are warnings.
    read: fn(&Gguf, &Vocab, &mut Vec<String>) -> Result<Loaded>,
}

/// What reading gives.
type Loaded = (Defaults, Box<dyn Engine>);

/// What holds where a file has no key, as in llama.cpp.
#[derive(Default)]
struct Defaults {
    bos: Option<u32>,
    eos: Option<u32>,
    /// BERT's separator; a model that has one puts it behind every text.
    sep: Option<u32>,
    add_bos: bool,
    /// Whether BOS is added even if the file says otherwise.
    always_bos: bool,
}

/// An algorithm with the data of one file.
trait Engine: Send + Sync {
    /// Appends the tokens of a text without special tokens; `first` says that it begins the text
    /// or comes behind a special token.
    fn encode(&self, vocab: &Vocab, text: &str, first: bool, out: &mut Vec<u32>) -> Result<()>;

    /// Appends what a normal token with this text prints.
    fn bytes(&self, text: &[u8], out: &mut Vec<u8>);
}

/// A model's tokenizer.
pub struct Tokenizer {
    /// Things worth telling that do not prevent use.
    pub warnings: Vec<String>,
    vocab: Vocab,
    /// What every token prints.
    pieces: Texts,
    specials: Specials,
    engine: Box<dyn Engine>,
}

impl Tokenizer {
    /// Reads the tokenizer of a file, and checks all of it.
    pub fn from_gguf(gguf: &Gguf) -> Result<Tokenizer> {
        let key = "tokenizer.ggml.model";
        let known = || ALGORITHMS.iter().map(|a| a.name).collect::<Vec<_>>().join(", ");
        let Some(name) = gguf.str(key)? else {
            bad_file!("no key \"{key}\"; known tokenizers: {}", known());
        };
        let Some(algorithm) = ALGORITHMS.iter().find(|a| a.name == name) else {
            bad_file!(
                "key \"{key}\" = \"{}\" is not supported; known tokenizers: {}",
                escaped(name),
                known()
            );
        };
        let mut warnings = Vec::new();
        let mut vocab = Vocab::read(gguf, &mut warnings)?;
        let (defaults, engine) = (algorithm.read)(gguf, &vocab, &mut warnings)?;
        let specials = Specials::read(gguf, &mut vocab, &defaults, &mut warnings)?;
        let pieces = pieces(&vocab, engine.as_ref());
        Ok(Tokenizer { warnings, vocab, pieces, specials, engine })
    }

    /// The tokens of a text. `add_special` adds what the model puts around texts, such as BOS;
    /// `parse_special` reads the names of control tokens in the text as these tokens.
    ///
    /// # Errors
    ///
    /// The text is longer than 1 GiB, or has a character for which the vocabulary has nothing.
    pub fn encode(&self, text: &str, add_special: bool, parse_special: bool) -> Result<Vec<u32>> {
        if text.len() > MAX_TEXT {
            bad_usage!("the text has {} bytes; at most {MAX_TEXT} are encoded", text.len());
        }
        let mut ids = Vec::new();
        ids.extend(self.specials.before.filter(|_| add_special));
        let mut first = true;
        for fragment in self.specials.split(&self.vocab, text, parse_special) {
            first = match fragment {
                Fragment::Text(range) => {
                    self.engine.encode(&self.vocab, &text[range], first, &mut ids)?;
                    false
                }
                Fragment::Token(id) => {
                    ids.push(id);
                    true
                }
            };
        }
        ids.extend(self.specials.after.filter(|_| add_special));
        Ok(ids)
    }

    /// The bytes that a token prints, which may be a part of a character. Control tokens print
    /// nothing unless `special`; ids outside the vocabulary print nothing.
    pub fn piece(&self, id: u32, special: bool) -> &[u8] {
        match self.vocab.kind(id) {
            Kind::Control | Kind::Unknown if !special => &[],
            _ => self.pieces.get(id),
        }
    }

    /// The text of a token as it is in the vocabulary; empty for ids outside it.
    pub fn text(&self, id: u32) -> &[u8] {
        self.vocab.texts.get(id)
    }

    /// Number of tokens.
    pub fn n_vocab(&self) -> usize {
        self.vocab.len()
    }

    /// The token that begins texts.
    pub fn bos(&self) -> Option<u32> {
        self.specials.bos
    }

    /// The token that ends texts.
    pub fn eos(&self) -> Option<u32> {
        self.specials.eos
    }

    /// Whether texts get a token in front of them.
    pub fn add_bos(&self) -> bool {
        self.specials.before.is_some()
    }

    /// Whether a token ends a reply.
    pub fn is_eog(&self, id: u32) -> bool {
        self.specials.is_end(id)
    }
}

/// What every token prints.
fn pieces(vocab: &Vocab, engine: &dyn Engine) -> Texts {
    let mut pieces = Texts::default();
    let mut bytes = Vec::new();
    for (id, text) in vocab.texts.iter() {
        bytes.clear();
        match vocab.kind(id) {
            Kind::Normal => engine.bytes(text, &mut bytes),
            Kind::Unknown | Kind::Control | Kind::UserDefined => bytes.extend_from_slice(text),
            Kind::Byte => bytes.extend(vocab::byte(text)),
            Kind::Unused | Kind::Undefined => (),
        }
        pieces.push(&bytes);
    }
    pieces
}

/// Appends a text in which spaces are written `▁`.
fn unescape_spaces(mut text: &[u8], out: &mut Vec<u8>) {
    let escape = "▁".as_bytes();
    while let Some((first, rest)) = text.split_first() {
        match text.strip_prefix(escape) {
            Some(behind) => {
                out.push(b' ');
                text = behind;
            }
            None => {
                out.push(*first);
                text = rest;
            }
        }
    }
}
