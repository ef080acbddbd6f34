//! Grammars, and texts that may follow them: a JSON schema or GBNF, and behind a line `---` a text.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use qkov::session::grammar::{Grammar, Spec, Vocabulary};
use qkov_fuzz::forgive;
use qkov_fuzz::vocabularies::spm;
use serde_json::Value;

/// Most bytes that are read: each may take as much work as is allowed for a token.
const MAX_TEXT: usize = 64;

/// One token for each byte, from the third on, and some longer ones.
static VOCABULARY: LazyLock<(Vocabulary, u32, usize)> = LazyLock::new(|| {
    let tokenizer = spm().open();
    let n_vocab = tokenizer.n_vocab();
    (Vocabulary::new(&tokenizer, n_vocab).unwrap(), tokenizer.eos().unwrap(), n_vocab)
});

/// Whether the text is one that the grammar has; none if the engine gave up.
fn follows(mut grammar: Grammar, text: &str) -> Option<bool> {
    let (_, end, n_vocab) = &*VOCABULARY;
    let allowed = |grammar: &mut Grammar, token: u32| -> Option<bool> {
        let mut logits = vec![0.0; *n_vocab];
        grammar.restrict(&mut logits).ok()?;
        Some(logits[token as usize] == 0.0)
    };
    for byte in text.bytes() {
        let token = u32::from(byte) + 3;
        let is_allowed = allowed(&mut grammar, token)?;
        assert_eq!(is_allowed, grammar.accept(token).is_ok(), "{text:?} at {byte}");
        if !is_allowed {
            return Some(false);
        }
    }
    let may_end = allowed(&mut grammar, *end)?;
    assert!(may_end || !grammar.is_over());
    assert_eq!(may_end, grammar.accept(*end).is_ok());
    Some(may_end)
}

fuzz_target!(init: forgive(&["llguidance"]), |data: &[u8]| {
    let Ok(input) = std::str::from_utf8(data) else { return };
    let (source, text) = input.split_once("\n---\n").unwrap_or((input, ""));
    let text = &text[..text.floor_char_boundary(MAX_TEXT)];
    let schema = serde_json::from_str::<Value>(source).ok().filter(Value::is_object);
    let is_json = schema.is_some();
    let spec = schema.map_or_else(|| Spec::Gbnf(source.into()), Spec::JsonSchema);
    match Grammar::new(&VOCABULARY.0, &spec) {
        Ok(grammar) => {
            let is_text = follows(grammar, text) == Some(true);
            if is_text && is_json {
                serde_json::from_str::<Value>(text).unwrap();
            }
        }
        Err(e) => assert!(!e.to_string().chars().any(char::is_control), "{e}"),
    }
});
