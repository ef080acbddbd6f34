//! Files of all families, damaged: what is still a model reads a few tokens.
//!
//! The first byte says which file, the others how it is damaged; see `qkov_fuzz::File`.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use qkov::arch::Pooling;
use qkov::model::Model;
use qkov_fuzz::{File, Input, golden, parse, session};

static FILES: LazyLock<Vec<File>> = LazyLock::new(|| golden().iter().map(File::of).collect());

fuzz_target!(|data: &[u8]| {
    let mut input = Input(data);
    let Some(file) = input.one_of(&FILES) else { return };
    let mut file = file.clone();
    file.damage(&mut input, &FILES);
    let Ok(gguf) = parse(file.bytes()) else { return };
    let Ok(model) = Model::from_gguf(gguf) else { return };
    let n_vocab = model.hparams.n_vocab as u32;
    let has_output = model.output.is_some();
    let Ok(mut session) = session(model) else { return };
    let tokens: Vec<u32> = (0..6).map(|i| i * 5 % n_vocab).collect();
    match has_output {
        true => {
            if session.feed_prompt(&tokens).is_ok() {
                // A model may have weights that make no numbers.
                let _ = session.feed(&tokens[..1]);
            }
        }
        false => drop(session.embed(&tokens, Pooling::Mean)),
    }
});
