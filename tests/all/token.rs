//! Tokenizers: reference ids, small vocabularies made here, and vocabularies that are broken.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

pub mod vocabularies;

use std::path::Path;
use std::process::{Command, Stdio};

use fancy_regex::Regex;
use qkov::gguf::{Bytes, Gguf};
use qkov::token::pre::{self, Splitter};
use qkov::token::{StreamDecoder, Tokenizer};

use crate::shared;
use vocabularies::{File, V, bpe, gemma4, spm, wpm};

/// Decompresses a vocabulary; `None`, with a message, without the program `xz`.
fn vocab(path: &Path) -> Option<Gguf> {
    let xz = Command::new("xz").arg("-dkc").arg(path).stderr(Stdio::null()).output();
    match xz {
        Ok(output) if output.status.success() => {
            Some(Gguf::parse(Bytes::from(output.stdout)).unwrap())
        }
        _ => {
            eprintln!("skipped: no program xz to open {}", path.display());
            None
        }
    }
}

#[test]
fn ids_equal_llama_cpp_on_its_own_cases() {
    let Some(folder) = shared().map(|path| path.join("vocabs")) else { return };
    let mut n_cases = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_string();
        let Some(stem) = name.strip_suffix(".gguf.xz") else { continue };
        let Some(gguf) = vocab(&path) else { return };
        let start = std::time::Instant::now();
        let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
        tokenizer.encode("Hello world", true, true).unwrap();
        eprintln!("{stem}: ready in {:?}, {:?}", start.elapsed(), tokenizer.warnings);
        let read = |ext| std::fs::read_to_string(path.with_file_name(format!("{stem}.{ext}")));
        let inputs = read("inp").unwrap();
        let outputs = read("out").unwrap();
        // Behind the last case there is a separator, too.
        let inputs = inputs.strip_suffix("\n__ggml_vocab_test__\n").unwrap();
        let inputs: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
        let outputs: Vec<&str> = outputs.lines().collect();
        assert_eq!(inputs.len(), outputs.len(), "{stem}");
        for (input, output) in inputs.iter().zip(&outputs) {
            let ids = tokenizer.encode(input, false, false).unwrap();
            let expected: Vec<u32> =
                output.split_whitespace().map(|id| id.parse().unwrap()).collect();
            assert_eq!(ids, expected, "{stem}: {input:?}");
            n_cases += 1;
        }
    }
    eprintln!("{n_cases} cases");
}

/// Strings that bring out differences: scripts, spaces, lines, digits, contractions, emoji.
fn samples() -> Vec<String> {
    const PARTS: &[&str] = &[
        "a",
        "Z",
        "hello",
        "World",
        "'s",
        "'LL",
        "'",
        " ",
        "  ",
        "\t",
        "\n",
        "\r\n",
        "\n\n",
        "1",
        "23",
        "4567",
        "½",
        ".",
        ",",
        "!?",
        "$",
        "+=",
        "_",
        "é",
        "e\u{301}",
        "ß",
        "İ",
        "Ω",
        "дом",
        "中文",
        "かな",
        "한국",
        "ไทย",
        "हिन्दी",
        "שלום",
        "🦀",
        "👩‍🚀",
        "\u{a0}",
        "\u{3000}",
        "\u{85}",
        "\u{200b}",
        "\u{fffd}",
        "ǅ",
        "ʰ",
        "<|end|>",
        "<0x0A>",
        "▁",
        "/",
        "()",
        "[x]",
        "~`^|",
    ];
    let mut state = 1u64;
    let mut next = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    (0..400).map(|i| (0..i % 24).map(|_| PARTS[next(PARTS.len())]).collect()).collect()
}

/// The words of a text by the definition: matches of each expression, and what is between them.
fn words_by_definition<'t>(regexes: &[Regex], text: &'t str) -> Vec<&'t str> {
    let mut words = vec![text];
    for regex in regexes {
        let mut parts = Vec::new();
        for word in words {
            let mut done = 0;
            for found in regex.find_iter(word) {
                let (start, end) = (found.as_ref().unwrap().start(), found.unwrap().end());
                parts.extend([&word[done..start], &word[start..end]]);
                done = end;
            }
            parts.push(&word[done..]);
        }
        words = parts;
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn every_pre_tokenizer_splits_by_its_definition_and_loses_nothing() {
    assert_eq!(pre::PRE_COUNT, pre::PRES.len());
    let samples = samples();
    for (i, row) in pre::PRES.iter().enumerate() {
        assert!(pre::PRES[..i].iter().all(|other| other.name != row.name), "{}", row.name);
        assert_eq!(pre::find(row.name).unwrap().name, row.name);
        let splitter = Splitter::new(row.patterns).unwrap();
        let regexes: Vec<_> = row.patterns.iter().map(|p| Regex::new(p).unwrap()).collect();
        for text in &samples {
            let mut words = Vec::new();
            splitter.split(text, &mut |word| words.push(word));
            assert_eq!(words.concat(), *text, "{}", row.name);
            assert!(words.iter().all(|word| !word.is_empty()), "{}: {text:?}", row.name);
            assert_eq!(words, words_by_definition(&regexes, text), "{}: {text:?}", row.name);
        }
    }
}

#[test]
fn pre_tokenizers_equal_the_list_taken_from_llama_cpp() {
    let Some(folder) = shared() else { return };
    let list = std::fs::read(folder.join("vocabs/pretypes.json")).unwrap();
    let list: serde_json::Value = serde_json::from_slice(&list).unwrap();
    let mut left_out = Vec::new();
    for (name, row) in list.as_object().unwrap() {
        let Some(pre) = pre::find(name) else {
            left_out.push(name.as_str());
            continue;
        };
        assert_eq!(pre.raw, !row["byte"].as_bool().unwrap(), "{name}");
        assert_eq!(pre.ignore_merges, row["ign"].as_bool().unwrap(), "{name}");
        let same = |text: &str| {
            let text = text.replace('\r', r"\r").replace('\n', r"\n");
            let text = text.replace(r"((?=[\p{L}])([^a-z]))", r"[\p{L}&&[^a-z]]");
            let text = text.replace(r"((?=[\p{L}])([^A-Z]))", r"[\p{L}&&[^A-Z]]");
            let text = text.replace(r"((?=[\p{L}\p{M}])([^a-z]))", r"[\p{L}\p{M}&&[^a-z]]");
            text.replace(r"((?=[\p{L}\p{M}])([^A-Z]))", r"[\p{L}\p{M}&&[^A-Z]]")
        };
        let patterns: Vec<String> =
            row["rx"].as_array().unwrap().iter().map(|p| same(p.as_str().unwrap())).collect();
        assert!(pre.patterns == patterns || name == "kimi-k2", "{name}: {patterns:?}");
    }
    assert_eq!(left_out, ["whitespace", "afmoe"]);
}

fn printed(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let mut decoder = StreamDecoder::default();
    let mut text: String = ids.iter().map(|id| decoder.push(tokenizer.piece(*id, true))).collect();
    text.push_str(&decoder.finish());
    text
}

#[test]
fn sentencepiece_merges_by_score() {
    let tokenizer = spm().open();
    let encode = |text: &str| tokenizer.encode(text, false, false).unwrap();
    let id = |text: &str| (0..272).find(|id| tokenizer.text(*id) == text.as_bytes()).unwrap();
    // "bc", then "abc", which leaves the space alone only if "▁abc" were not there.
    assert_eq!(encode("abc"), [id("▁abc")]);
    assert_eq!(encode("ab"), [id("▁"), id("ab")]);
    assert_eq!(encode("  a"), [id("▁▁"), id("▁a")]);
    // Bytes for what has no token; "ä" has one.
    assert_eq!(encode("ä"), [id("▁"), id("ä")]);
    assert_eq!(encode("é\n"), [id("▁"), 3 + 0xC3, 3 + 0xA9, 3 + 0x0A]);
    assert!(encode("").is_empty());
    assert_eq!(tokenizer.encode("", true, false).unwrap(), [1]);
    assert_eq!(tokenizer.encode("a", true, false).unwrap(), [1, id("▁a")]);
    assert_eq!((tokenizer.bos(), tokenizer.eos(), tokenizer.add_bos()), (Some(1), Some(2), true));
    assert!(tokenizer.is_eog(2) && !tokenizer.is_eog(1));
    // A space comes in front of every text, and again behind a special token.
    assert_eq!(encode("a<sep>a"), [id("▁a"), id("<sep>"), id("▁a")]);
    assert_eq!(encode("<sep>b"), [id("<sep>"), id("▁"), id("b")], "not the control token");
    assert_eq!(tokenizer.encode("<sep>b", false, true).unwrap(), [id("<sep>b")], "the longest");
    let bare = spm().set("add_space_prefix", V::Bool(false)).open();
    assert_eq!(bare.encode("abc", false, false).unwrap(), [id("abc")]);
    assert_eq!(bare.encode("b a", false, false).unwrap(), [id("b"), id("▁a")]);
    let none = spm().set("add_bos_token", V::Bool(false)).set("add_eos_token", V::Bool(true));
    assert_eq!(none.open().encode("a", true, false).unwrap(), [id("▁a"), 2]);
    for text in samples().iter().filter(|text| !text.is_empty()) {
        // A "▁" in a text is a space to SentencePiece.
        let expected = format!(" {}", text.replace('▁', " "));
        assert_eq!(printed(&tokenizer, &encode(text)), expected);
    }
}

#[test]
fn sentencepiece_without_bytes_has_one_unknown_token_for_a_run() {
    let file = File::default()
        .str("model", "llama")
        .strs("tokens", &["<unk>", "<s>", "</s>", "▁", "a"])
        .set("token_type", V::I32s(vec![2, 3, 3, 1, 1]))
        .set("scores", V::F32s(vec![0.0, 0.0, 0.0, -1.0, -2.0]));
    let tokenizer = file.open();
    assert_eq!(tokenizer.warnings.len(), 1);
    assert_eq!(tokenizer.encode("aéxaxxa", false, false).unwrap(), [3, 4, 0, 4, 0, 4]);
    assert_eq!(tokenizer.piece(0, false), b"");
    assert_eq!(tokenizer.piece(0, true), b"<unk>");
}

#[test]
fn byte_pairs_merge_by_rank() {
    let tokenizer = bpe().open();
    let encode = |text: &str| tokenizer.encode(text, false, false).unwrap();
    assert_eq!(encode("hello"), [259]);
    assert_eq!(encode("hello world"), [259, 260, 111, 114, 108, 100], "no merge makes Ġworld");
    assert_eq!(encode("\n"), [10]);
    assert_eq!(encode("é"), [0xC3, 0xA9]);
    let whole = bpe().str("pre", "llama-bpe").open();
    assert_eq!(whole.encode("hello world", false, false).unwrap(), [259, 261]);
    assert_eq!(whole.encode("a", true, false).unwrap(), [262, 97], "llama-bpe adds BOS");
    assert_eq!(tokenizer.encode("a", true, false).unwrap(), [97], "gpt-2 does not");
    // "<|im_end|>" is a control token whatever its type says; user-defined ones are always read.
    assert!(tokenizer.is_eog(262) && !tokenizer.is_eog(263));
    assert!(encode("<|im_end|>").len() > 1);
    assert_eq!(tokenizer.encode("a<|im_end|>b<|ctl|>", false, true).unwrap(), [97, 262, 98, 263]);
    assert_eq!(encode("a<u>b"), [97, 264, 98]);
    assert_eq!(encode("<u>x<u>"), [265, 264]);
    assert_eq!(tokenizer.piece(262, false), b"");
    assert_eq!(tokenizer.piece(262, true), b"<|im_end|>");
    assert_eq!((tokenizer.piece(260, false), tokenizer.text(260)), (&b" w"[..], "Ġw".as_bytes()));
    assert_eq!((tokenizer.piece(9999, true), tokenizer.text(9999)), (&b""[..], &b""[..]));
    assert!(tokenizer.warnings[0].contains("1 tokens have an empty text"));
    for text in samples() {
        assert_eq!(printed(&tokenizer, &encode(&text)), text);
    }
}

#[test]
fn gemma4_merges_characters_and_falls_back_to_bytes() {
    let tokenizer = gemma4().set("add_bos_token", V::Bool(false)).open();
    assert_eq!(tokenizer.encode("b a\n\nä", true, false).unwrap(), [2, 5, 6, 8, 9, 10]);
    assert_eq!(printed(&tokenizer, &[5, 6, 8, 9, 10]), "b a\n\nä");
    assert!(tokenizer.warnings.iter().any(|w| w.contains("add_bos_token")));
    assert!(tokenizer.is_eog(1));
}

#[test]
fn wordpiece_takes_the_longest() {
    let tokenizer = wpm().open();
    let encode = |text: &str| tokenizer.encode(text, false, false).unwrap();
    assert_eq!(encode("Hello  WORLD!"), [4, 5, 6, 7]);
    assert_eq!(encode("Café cafe\u{301} caf\u{200b}e"), [8, 8, 8]);
    assert_eq!(encode("hello中hello"), [4, 9, 4]);
    assert_eq!(encode("it's"), [10, 11, 12]);
    assert_eq!(encode("helloxx worxx hello"), [1, 1, 4], "a word is known or unknown as a whole");
    assert_eq!(tokenizer.encode("hello", true, false).unwrap(), [2, 4, 3]);
    assert_eq!(tokenizer.encode("[CLS]hello", false, true).unwrap(), [2, 4]);
    assert_eq!(printed(&tokenizer, &encode("hello world!")), " hello world !");
    let cased = wpm().set("normalizer.lowercase", V::Bool(false)).open();
    assert_eq!(cased.encode("hello Hello café", false, false).unwrap(), [4, 1, 1]);
}

#[test]
fn specials_of_phi_3_swallow_whitespace() {
    let file = spm().set("general.name", V::Str(b"Phi-3 mini".to_vec()));
    let tokenizer = file.open();
    let with = tokenizer.encode("<sep> \n a", false, false).unwrap();
    assert_eq!(with, tokenizer.encode("<sep>a", false, false).unwrap());
    let plain = spm().open();
    assert_ne!(plain.encode("<sep> \n a", false, false).unwrap(), with);
}

#[test]
fn ends_of_replies() {
    let names = ["<|end|>", "<|return|>", "<|call|>", "<|channel|>", "</s>", "<PAD>", "x"];
    let file = |names: &[&str]| {
        File::default()
            .str("model", "llama")
            .strs("tokens", names)
            .set("token_type", V::I32s(vec![3; names.len()]))
            .set("scores", V::F32s(vec![0.0; names.len()]))
            .set("bos_token_id", V::U32(0))
            .set("eos_token_id", V::U32(0))
            .set("eot_token_id", V::U32(1))
    };
    let ends = |file: File| {
        let tokenizer = file.open();
        (0..tokenizer.n_vocab() as u32).filter(|id| tokenizer.is_eog(*id)).collect::<Vec<_>>()
    };
    assert_eq!(ends(file(&names)), [1, 2, 4, 5], "<|end|> ends a message, not a reply");
    assert_eq!(ends(file(&names[..2])), [0, 1]);
    assert_eq!(ends(file(&["a", "b", "c"])), [0, 1]);
    assert_eq!(file(&names).open().piece(3, false), b"<|channel|>");
}

#[test]
fn streams_hold_back_unfinished_characters() {
    let mut decoder = StreamDecoder::default();
    assert_eq!(decoder.push("a\u{e9}".as_bytes()), "aé");
    let crab = "🦀".as_bytes();
    assert_eq!(decoder.push(&crab[..1]), "");
    assert_eq!(decoder.push(&crab[1..3]), "");
    assert_eq!(decoder.push(&[crab[3], b'b', 0xFF, b'c', 0xE2, 0x82]), "🦀b\u{fffd}c");
    assert_eq!(decoder.push(b"d"), "\u{fffd}d");
    assert_eq!(decoder.push(&[0xE2]), "");
    assert_eq!(decoder.finish(), "\u{fffd}");
    assert_eq!(decoder.finish(), "");
    let text: Vec<u8> =
        samples().concat().into_bytes().into_iter().chain([0xC3, 0x28, 0xF0]).collect();
    let mut all: String = text.iter().map(|byte| decoder.push(&[*byte])).collect();
    all.push_str(&decoder.finish());
    assert_eq!(all, String::from_utf8_lossy(&text));
}

#[test]
fn broken_vocabularies_are_refused() {
    let refuse = |file: File, words: &[&str]| file.refused(words);
    let model = "tokenizer.ggml.model";
    refuse(bpe().without("model"), &[model, "llama, gpt2, gemma4, bert"]);
    refuse(bpe().str("model", "none"), &[model, "\"none\"", "llama, gpt2"]);
    refuse(bpe().str("model", "t5\n"), &[model, "\"t5\\n\""]);
    refuse(bpe().set("model", V::U32(1)), &[model, "string", "u32"]);
    refuse(bpe().str("pre", "llama-9"), &["tokenizer.ggml.pre", "\"llama-9\""]);
    refuse(bpe().without("tokens"), &["tokenizer.ggml.tokens"]);
    refuse(bpe().strs::<&str>("tokens", &[]), &["tokenizer.ggml.tokens", "empty"]);
    refuse(bpe().set("tokens", V::U8s(vec![1])), &["tokenizer.ggml.tokens", "string", "u8"]);
    refuse(bpe().without("merges"), &["tokenizer.ggml.merges"]);
    refuse(bpe().set("merges", V::U32(1)), &["tokenizer.ggml.merges", "array", "u32"]);
    for merge in ["he", "", " ", "h  e", "q\u{4e00} e", "h e l", "h ", " h"] {
        refuse(bpe().strs("merges", &["h e", merge]), &["tokenizer.ggml.merges", "merge 1"]);
    }
    refuse(bpe().strs("merges", &["h x"]), &["merge 0", "\"hx\"", "vocabulary"]);
    for (types, word) in [(vec![1; 266], "266"), (vec![1; 268], "268"), (vec![99; 267], "99")] {
        refuse(bpe().set("token_type", V::I32s(types)), &["tokenizer.ggml.token_type", word]);
    }
    refuse(bpe().set("token_type", V::F32s(vec![1.0; 267])), &["token_type", "i32 or u32", "f32"]);
    for n in [271, 273] {
        refuse(spm().set("scores", V::F32s(vec![0.0; n])), &["scores", "272", &n.to_string()]);
    }
    refuse(spm().set("scores", V::F32s(vec![f32::NAN; 272])), &["scores", "token 0"]);
    refuse(spm().set("scores", V::I32s(vec![0; 272])), &["scores", "f32", "i32"]);
    refuse(spm().without("scores"), &["scores"]);
    for key in ["bos", "eos", "unknown", "padding", "eot", "seperator", "mask", "fim_pad"] {
        let key = format!("{key}_token_id");
        for id in [V::U32(272), V::U32(u32::MAX), V::I32(-1)] {
            refuse(spm().set(&key, id), &[&key]);
        }
        refuse(spm().str(&key, "1"), &[&key, "integer", "string"]);
    }
    for text in ["<0x-1>", "<0xGG>", "<0x100>", "x", ""] {
        let file = File::default()
            .str("model", "llama")
            .strs("tokens", &[text])
            .set("token_type", V::I32s(vec![6]))
            .set("scores", V::F32s(vec![0.0]));
        refuse(file, &["token 0", "byte", "<0x00>..=<0xFF>"]);
    }
    let one = |key: &str| {
        let file = File::default().str("model", "llama").strs("tokens", &["a"]);
        file.set("scores", V::F32s(vec![0.0])).set(key, V::Bool(true))
    };
    refuse(one("add_bos_token"), &["BOS"]);
    refuse(
        one("add_bos_token").set("bos_token_id", V::U32(1)),
        &["bos_token_id\" = 1;", "1 tokens"],
    );
    refuse(one("add_eos_token").set("add_bos_token", V::Bool(false)), &["EOS"]);
    refuse(one("add_bos_token").str("add_bos_token", "yes"), &["add_bos_token", "bool"]);
    refuse(wpm().without("seperator_token_id"), &["SEP"]);
}

#[test]
fn odd_vocabularies_are_used_as_they_are() {
    let file = bpe().without("pre");
    assert!(file.open().warnings.iter().any(|w| w.contains("tokenizer.ggml.pre")));
    // Of two tokens with the same text the first is used, of two merges, too.
    let twice = File::default()
        .str("model", "gpt2")
        .str("pre", "gpt-2")
        .strs("tokens", &["a", "b", "a", "ab", "ba", "\u{ff}x"])
        .strs("merges", &["a b", "b a", "a b", "b a"]);
    let tokenizer = twice.open();
    assert!(tokenizer.warnings[0].contains("token 2, \"a\""), "{:?}", tokenizer.warnings);
    assert_eq!(tokenizer.encode("aba", false, false).unwrap(), [3, 0]);
    // Bytes without a token are left out, after a warning.
    assert!(tokenizer.warnings[1].contains("bytes have no token"));
    assert_eq!(tokenizer.encode("axb", false, false).unwrap(), [0, 1]);
    // Texts that are not UTF-8, or long, are bytes like any other.
    let long = vec![b'x'; 1 << 20];
    let tokens: Vec<&[u8]> = vec![b"a", b"\xFF\xFE", &long, b"\xE2\x82"];
    let file = File::default()
        .str("model", "llama")
        .strs("tokens", &tokens)
        .set("token_type", V::I32s(vec![1, 1, 1, 3]))
        .set("scores", V::F32s(vec![0.0; 4]))
        .set("add_bos_token", V::Bool(false))
        .set("unknown_token_id", V::U32(0));
    let tokenizer = file.open();
    assert_eq!(tokenizer.piece(1, false), b"\xFF\xFE");
    assert_eq!(tokenizer.piece(2, false).len(), 1 << 20);
    assert_eq!(tokenizer.encode("€", false, true).unwrap(), [0]);
    let gpt2 = bpe().strs("tokens", &tokens).without("token_type").without("merges");
    let gpt2 = gpt2.strs::<&str>("merges", &[]).without("bos_token_id").without("eos_token_id");
    assert_eq!(gpt2.open().piece(1, false), b"\xFF\xFE");
}

#[test]
fn long_texts_take_no_more_than_their_share() {
    // One word of a megabyte, which merges from end to end, and one of spaces.
    for file in [spm(), bpe(), gemma4()] {
        let tokenizer = file.open();
        for part in ["abc", "hello", " ", "\n", " a", "🦀"] {
            let text = part.repeat((1 << 20) / part.len());
            let start = std::time::Instant::now();
            tokenizer.encode(&text, false, true).unwrap();
            assert!(start.elapsed().as_secs() < 20, "{part:?} took {:?}", start.elapsed());
        }
    }
}

/// The vocabulary of our models, and a SentencePiece vocabulary if there is one.
#[test]
fn models_give_back_every_text() {
    let ours = crate::family::path("softmax");
    let stories = shared().map(|path| path.join("models/stories260K-f32.gguf"));
    for path in [Some(ours), stories].into_iter().flatten() {
        let tokenizer = Tokenizer::from_gguf(&Gguf::open(&path).unwrap()).unwrap();
        let prefix = tokenizer.encode("a", false, false).unwrap();
        let prefix = if tokenizer.piece(prefix[0], false).starts_with(b" ") { " " } else { "" };
        for text in samples().iter().filter(|text| !text.is_empty()) {
            let ids = tokenizer.encode(text, false, false).unwrap();
            let expected = format!("{prefix}{text}");
            let expected = if prefix.is_empty() { expected } else { expected.replace('▁', " ") };
            assert_eq!(printed(&tokenizer, &ids), expected, "{}", path.display());
        }
    }
}
