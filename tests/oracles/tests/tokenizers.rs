//! Hugging Face's tokenizers must make the same ids of the vocabulary of our models.

use std::path::Path;

use qkov::gguf::Gguf;
use qkov::token::{Tokenizer, pre};

fn samples() -> Vec<String> {
    let words = ["The", " old", " man's", "\n\n", "  ", " 1234", "!?", " Ünïcödé", "🦀", "\t", "l'été"];
    let mut state = 7u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) as usize
    };
    (0..500).map(|n| (0..n % 40).map(|_| words[next() % words.len()]).collect()).collect()
}

/// Another program's merge loop makes the same of the vocabulary of our models.
#[test]
fn ids_equal_hugging_face_tokenizers() {
    use tokenizers::models::bpe::{BPE, Vocab};
    use tokenizers::pre_tokenizers::byte_level::ByteLevel;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{PreTokenizerWrapper, SplitDelimiterBehavior};

    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/softmax-q8_0.gguf");
    let gguf = Gguf::open(&path).unwrap();
    let strings = |key| {
        let array = gguf.array(key).unwrap().unwrap();
        array.strings().map(|s| String::from_utf8(s.to_vec()).unwrap()).collect::<Vec<_>>()
    };
    let vocab: Vocab = strings("tokenizer.ggml.tokens").into_iter().zip(0..).collect();
    let merges = strings("tokenizer.ggml.merges");
    let merges = merges.iter().map(|m| m.split_once(' ').unwrap());
    let merges = merges.map(|(a, b)| (a.to_string(), b.to_string())).collect();
    let model = BPE::builder().vocab_and_merges(vocab, merges).build().unwrap();
    let mut other = tokenizers::Tokenizer::new(model);
    let pattern = SplitPattern::Regex(pre::find("gpt-2").unwrap().patterns[0].to_string());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap();
    other.with_pre_tokenizer(Some(Sequence::new(vec![
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false)),
    ])));
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    for text in samples() {
        let ids = tokenizer.encode(&text, false, false).unwrap();
        assert_eq!(ids, other.encode(text.as_str(), false).unwrap().get_ids(), "{text:?}");
    }
}
