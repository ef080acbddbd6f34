//! Pre-tokenizers: how a text falls into words before byte pair encoding, by the name at
//! `tokenizer.ggml.pre`.
//!
//! A pre-tokenizer is a list of regular expressions. The first splits the text into its matches and
//! what lies between them, each further one splits these parts; no text is lost. Names, expressions
//! and flags are facts from llama.cpp (`src/llama-vocab.cpp`), apart from these:
//!
//! - `kimi-k2` is the expression of the model's own `tokenization_kimi.py`, for which llama.cpp has
//!   a program instead.
//! - `((?=[\p{L}])([^a-z]))` is written as the class that it means, `[\p{L}&&[^a-z]]`.
//! - `afmoe` and `whitespace`, programs too, are left out and so refused.
//!
//! A pre-tokenizer is one line in [`PRES`].

use fancy_regex::Regex;

use crate::bad_file;
use crate::error::Result;

/// Number of names that are known.
pub const PRE_COUNT: usize = PRES.len();

/// A pre-tokenizer.
#[derive(Debug)]
pub struct Pre {
    /// The value of `tokenizer.ggml.pre`.
    pub name: &'static str,
    /// The expressions, in the order in which they split.
    pub patterns: Patterns,
    /// Whether a word that is a token is this token, whatever merges would make of it.
    pub ignore_merges: bool,
    /// Whether that holds for words of newlines only.
    pub whole_newlines: bool,
    /// Whether symbols are characters, and `▁` a space, instead of bytes.
    pub raw: bool,
    /// About BOS, where the file says nothing.
    pub bos: Bos,
}

/// What a pre-tokenizer's name says about BOS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bos {
    /// It is not added.
    Off,
    /// It is not added, and has no usual id.
    NoId,
    /// It is added.
    On,
    /// It is added, even if the file says otherwise.
    Always,
}

/// Regular expressions.
type Patterns = &'static [&'static str];

impl Pre {
    const fn bytes(name: &'static str, patterns: Patterns) -> Pre {
        let (ignore_merges, whole_newlines, raw, bos) = (false, false, false, Bos::Off);
        Pre { name, patterns, ignore_merges, whole_newlines, raw, bos }
    }

    const fn characters(name: &'static str, patterns: Patterns) -> Pre {
        Pre { raw: true, ..Pre::bytes(name, patterns) }
    }

    const fn gemma4(name: &'static str) -> Pre {
        Pre { whole_newlines: true, bos: Bos::Always, ..Pre::characters(name, LINES) }
    }

    const fn whole_words(self) -> Pre {
        Pre { ignore_merges: true, ..self }
    }

    const fn bos(self, bos: Bos) -> Pre {
        Pre { bos, ..self }
    }
}

/// The pre-tokenizer of this name.
pub fn find(name: &str) -> Option<&'static Pre> {
    PRES.iter().find(|pre| pre.name == name)
}

/// Compiles an expression of this program's own tables.
pub(super) fn regex(pattern: &str) -> Result<Regex> {
    match Regex::new(pattern) {
        Ok(regex) => Ok(regex),
        Err(error) => bad_file!("regular expression \"{pattern}\": {error}"),
    }
}

/// The matches of an expression. One that gives up, as on a text made to make it search for ever,
/// matches no more; the rest of the text stays in one piece.
pub(super) fn matches(regex: &Regex, text: &str) -> impl Iterator<Item = (usize, usize)> {
    regex.find_iter(text).map_while(|found| found.ok()).map(|found| (found.start(), found.end()))
}

/// A compiled list of expressions.
pub struct Splitter {
    steps: Vec<Step>,
}

struct Step {
    regex: Regex,
    spaces: Spaces,
}

/// What becomes of a match that is whitespace.
///
/// Most expressions end in `|\s+(?!\S)|\s+`: of whitespace before a word, the last character
/// belongs to the word. Looking ahead makes the engine slow, so the match is `\s+` instead, and the
/// last character is given back afterwards.
#[derive(Clone, Copy, PartialEq)]
enum Spaces {
    /// Nothing; the expression is as in the table.
    Keep,
    /// The last character is given back.
    GiveBack,
    /// The same, unless it ends a line: `\s*[\r\n]+` has made this match.
    GiveBackInLine,
}

impl Step {
    fn new(pattern: &str) -> Result<Step> {
        let tail = [r"|\s+(?!\S)|\s+", r"|\s+(?!\S)"].iter().find(|tail| pattern.ends_with(**tail));
        let head = pattern.strip_suffix(tail.copied().unwrap_or_default()).unwrap_or(pattern);
        let looks = head.contains("(?!") || head.contains("(?=") || head.contains(r"\b");
        let lines = head.contains(r"\s*[\r\n]");
        // Another way to match nothing but whitespace.
        let other = !lines && (head.contains(r"|[\r\n]") || head.starts_with(r"[\r\n]"));
        if tail.is_none() || looks || other {
            return Ok(Step { regex: regex(pattern)?, spaces: Spaces::Keep });
        }
        let spaces = if lines { Spaces::GiveBackInLine } else { Spaces::GiveBack };
        Ok(Step { regex: regex(&format!(r"{head}|\s+"))?, spaces })
    }

    /// The end of a match, after giving back.
    fn end(&self, text: &str, start: usize, end: usize) -> usize {
        let found = &text[start..end];
        let last = match found.chars().next_back() {
            Some(last) if self.spaces != Spaces::Keep && end < text.len() => last,
            _ => return end,
        };
        let line = matches!(last, '\r' | '\n') && self.spaces == Spaces::GiveBackInLine;
        if line || last.len_utf8() == found.len() || !found.chars().all(char::is_whitespace) {
            return end;
        }
        end - last.len_utf8()
    }
}

impl Splitter {
    /// Compiles a list of expressions.
    pub fn new(patterns: &[&str]) -> Result<Splitter> {
        Ok(Splitter { steps: patterns.iter().map(|p| Step::new(p)).collect::<Result<_>>()? })
    }

    /// Calls `each` with every word of `text`, in order.
    pub fn split<'t>(&self, text: &'t str, each: &mut dyn FnMut(&'t str)) {
        split(&self.steps, text, each);
    }
}

fn split<'t>(steps: &[Step], text: &'t str, each: &mut dyn FnMut(&'t str)) {
    let Some((step, rest)) = steps.split_first() else {
        return each(text);
    };
    let mut done = 0;
    let mut part = |start: usize, end: usize| {
        if start < end {
            split(rest, &text[start..end], each);
        }
    };
    'again: loop {
        let base = done;
        for (start, end) in matches(&step.regex, &text[base..]) {
            let (start, found) = (base + start, base + end);
            let end = step.end(text, start, found);
            part(done, start);
            part(start, end);
            done = end;
            if end < found {
                continue 'again;
            }
        }
        break;
    }
    part(done, text.len());
}

/// English contractions in both cases.
macro_rules! contractions {
    () => {
        r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
    };
}

/// The end of most expressions: lines, and spaces but for the one that belongs to a word.
macro_rules! spaces {
    () => {
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    };
}

/// GPT-2's expression.
macro_rules! gpt2 {
    () => {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
    };
}

const DEFAULT: Patterns = &[r"[\p{P}\$\+<=>\^~\|]+", gpt2!(), r"\p{N}+", r"[0-9][0-9][0-9]"];
const MINICPM5: Patterns = &[
    r"\p{N}{1,3}",
    concat!(
        contractions!(),
        r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}+| ?[^\s\p{L}\p{N}]+[\r\n]*",
        spaces!()
    ),
];
const LLAMA3: Patterns = &[concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    spaces!()
)];
const DEEPSEEK_LLM: Patterns = &[
    r"[\r\n]",
    concat!(
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-Ρ",
        r"Σ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ",
        r"-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ",
        r"-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-",
        r"ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
    ),
    r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
    r"\s+$",
    r"[一-龥ࠀ-一가-퟿]+",
    r"\p{N}+",
];
const DEEPSEEK_CODER: Patterns =
    &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"];
const DEEPSEEK_V3: Patterns = &[
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*",
        spaces!()
    ),
];
const SPARK2_5: Patterns = &[
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    concat!(
        r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"##,
        r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+|[\r\n]|\s+(?!\S)|\s+"
    ),
    r"\p{N}",
];
const YOUTU: Patterns = &[
    r"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|[一-龥぀-ゟ゠-ヿ]+",
    concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        contractions!(),
        r"?",
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        contractions!(),
        r"?|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
        spaces!()
    ),
];
const FALCON: Patterns = &[r"[\p{P}\$\+<=>\^~\|`]+", gpt2!(), r"[0-9][0-9][0-9]"];
const GPT2: Patterns = &[gpt2!()];
const STARCODER: Patterns = &[r"\p{N}", gpt2!()];
const JAIS2: Patterns = &[concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+",
    r"|\s{512}(?!\S)|\s{256}(?!\S)|\s{128}(?!\S)|\s{64}(?!\S)|\s{32}(?!\S)",
    r"|\s{16}(?!\S)|\s{8}(?!\S)|\s{4}(?!\S)|\s{1,2}(?!\S)|\s{1}"
)];
const LINES: Patterns = &[r"[^\n]+|[\n]+"];
const QWEN2: Patterns = &[concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    spaces!()
)];
const QWEN35: Patterns = &[concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
    spaces!()
)];
const BLOOM: Patterns = &[r" ?[^(\s|.,!?…。，、।۔،)]+"];
const VIKING: Patterns = &[r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"];
const TEKKEN: Patterns = &[concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    spaces!()
)];
const EXAONE_MOE: Patterns = &[concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)];
const CHAMELEON: Patterns = &[
    r"<sentinel:[0-9]+>",
    r"(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
    r"([\t\n]|    |  )",
    r"\p{N}",
    r"[\p{P}!-/:-@\[-`{-~]",
    gpt2!(),
];
const GPT4O: Patterns = &[concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]*[\p{L}&&[^A-Z]]+",
    contractions!(),
    r"?",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}&&[^a-z]]+[\p{L}&&[^A-Z]]*",
    contractions!(),
    r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    spaces!()
)];
const GRANITE_EMBED: Patterns = &[concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^a-z]]*[\p{L}\p{M}&&[^A-Z]]+",
    contractions!(),
    r"?",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^a-z]]+[\p{L}\p{M}&&[^A-Z]]*",
    contractions!(),
    r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
    spaces!()
)];
const TINY_AYA: Patterns = &[
    r"\d{1,3}(?=(?:\d{3})*\b)",
    concat!(
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
        contractions!(),
        r"?",
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
        contractions!(),
        r"?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*",
        spaces!()
    ),
];
const SUPERBPE: Patterns = &[r"\p{N}+", r"(?=(\d{3})+(?!\d))"];
const BAILINGMOE: Patterns = &[concat!(
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)];
const SEED_CODER: Patterns = &[concat!(
    contractions!(),
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+",
    spaces!()
)];
const KIMI_K2: Patterns = &[concat!(
    r"[\p{Han}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*",
    spaces!()
)];
const UFAKZEKA: Patterns =
    &[concat!(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*", spaces!())];
const LAGUNA: Patterns = &[
    r"[^\n]+|[\n]+",
    concat!(
        contractions!(),
        r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*",
        spaces!()
    ),
];

/// The one of models whose tokenizer is `gemma4`.
pub const GEMMA4: Pre = Pre::gemma4("gemma4");

/// Every pre-tokenizer, families together.
pub static PRES: &[Pre] = &[
    Pre::bytes("default", DEFAULT),
    Pre::bytes("minicpm5", MINICPM5).whole_words(),
    Pre::bytes("llama3", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("llama-v3", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("llama-bpe", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("falcon3", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("falcon-h1", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("pixtral", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("midm-2.0", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("lfm2", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("jina-v5-nano", LLAMA3).whole_words().bos(Bos::On),
    Pre::bytes("dbrx", LLAMA3),
    Pre::bytes("smaug-bpe", LLAMA3),
    Pre::bytes("chatglm-bpe", LLAMA3).bos(Bos::NoId),
    Pre::bytes("glm4", LLAMA3).whole_words().bos(Bos::NoId),
    Pre::bytes("glm5", LLAMA3).whole_words().bos(Bos::NoId),
    Pre::bytes("deepseek-llm", DEEPSEEK_LLM),
    Pre::bytes("deepseek-coder", DEEPSEEK_CODER),
    Pre::bytes("deepseek-v3", DEEPSEEK_V3),
    Pre::bytes("hunyuan-dense", DEEPSEEK_V3),
    Pre::bytes("hy_v4", DEEPSEEK_V3),
    Pre::bytes("joyai-llm", DEEPSEEK_V3),
    Pre::bytes("spark2_5", SPARK2_5),
    Pre::bytes("youtu", YOUTU).whole_words(),
    Pre::bytes("falcon", FALCON),
    Pre::bytes("mpt", GPT2),
    Pre::bytes("gpt-2", GPT2),
    Pre::bytes("phi-2", GPT2),
    Pre::bytes("jina-es", GPT2),
    Pre::bytes("jina-de", GPT2),
    Pre::bytes("gigachat", GPT2),
    Pre::bytes("jina-v2-es", GPT2),
    Pre::bytes("jina-v2-de", GPT2),
    Pre::bytes("a.x-4.0", GPT2),
    Pre::bytes("mellum", GPT2),
    Pre::bytes("modern-bert", GPT2),
    Pre::bytes("jina-v1-en", GPT2),
    Pre::bytes("jina-v2-code", GPT2),
    Pre::bytes("roberta-bpe", GPT2),
    Pre::bytes("olmo", GPT2),
    Pre::bytes("jais", GPT2),
    Pre::bytes("exaone4", GPT2),
    Pre::bytes("trillion", GPT2),
    Pre::bytes("granite-docling", GPT2),
    Pre::bytes("starcoder", STARCODER),
    Pre::bytes("refact", STARCODER),
    Pre::bytes("command-r", STARCODER),
    Pre::bytes("smollm", STARCODER),
    Pre::bytes("codeshell", STARCODER),
    Pre::bytes("exaone", STARCODER),
    Pre::bytes("minerva-7b", STARCODER),
    Pre::bytes("mellum2", STARCODER),
    Pre::bytes("jais-2", JAIS2),
    GEMMA4,
    Pre::gemma4("granite-embed-multi-311m"),
    Pre::characters("sarvam-moe", LINES),
    Pre::bytes("qwen2", QWEN2),
    Pre::bytes("deepseek-r1-qwen", QWEN2),
    Pre::bytes("kormo", QWEN2),
    Pre::bytes("f2llmv2", QWEN2),
    Pre::bytes("stablelm2", QWEN2),
    Pre::bytes("megrez", QWEN2),
    Pre::bytes("hunyuan", QWEN2),
    Pre::bytes("grok-2", QWEN2),
    Pre::bytes("solar-open", QWEN2),
    Pre::bytes("qwen35", QWEN35),
    Pre::bytes("poro-chat", BLOOM),
    Pre::bytes("bloom", BLOOM),
    Pre::bytes("gpt3-finnish", BLOOM),
    Pre::bytes("viking", VIKING),
    Pre::bytes("tekken", TEKKEN).whole_words().bos(Bos::On),
    Pre::bytes("exaone-moe", EXAONE_MOE),
    Pre::bytes("chameleon", CHAMELEON).bos(Bos::On),
    Pre::bytes("gpt-4o", GPT4O),
    Pre::bytes("llama4", GPT4O),
    Pre::bytes("kanana2", GPT4O),
    Pre::bytes("talkie", GPT4O),
    Pre::bytes("minimax-m2", GPT4O),
    Pre::bytes("granite-embed-multi-97m", GRANITE_EMBED).whole_words(),
    Pre::bytes("tiny_aya", TINY_AYA),
    Pre::bytes("cohere2moe", TINY_AYA),
    Pre::bytes("superbpe", SUPERBPE),
    Pre::bytes("bailingmoe", BAILINGMOE),
    Pre::bytes("bailingmoe2", BAILINGMOE),
    Pre::bytes("llada-moe", BAILINGMOE),
    Pre::bytes("seed-coder", SEED_CODER),
    Pre::bytes("kimi-k2", KIMI_K2),
    Pre::bytes("ufakzeka", UFAKZEKA),
    Pre::bytes("laguna", LAGUNA),
];
