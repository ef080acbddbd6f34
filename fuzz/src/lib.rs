//! What fuzz targets share: files to damage, and small models to ask.

mod file;
mod limit;

pub use file::{File, Input, Tensor};

use std::path::PathBuf;
use std::sync::Arc;

use qkov::engine::Threads;
use qkov::gguf::{Bytes, Gguf};
use qkov::model::Model;
use qkov::session::{Options, Session};

#[path = "../../tests/all/tiny.rs"]
pub mod tiny;
#[path = "../../tests/all/token/vocabularies.rs"]
pub mod vocabularies;

/// Tokens of a context.
pub const N_CTX: usize = 32;

/// The small files of all families, by name.
pub fn golden() -> Vec<Gguf> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden");
    let mut paths: Vec<PathBuf> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|e| e == "gguf"));
    paths.sort();
    paths.iter().map(|path| Gguf::open(path).unwrap()).collect()
}

/// A file in memory.
pub fn parse(bytes: Vec<u8>) -> qkov::error::Result<Gguf> {
    Gguf::parse(Bytes::from(bytes))
}

/// A small model that is sound.
pub fn model() -> Model {
    let tiny = tiny::Tiny::llama().set("tokenizer.chat_template", TEMPLATE);
    Model::from_gguf(parse(tiny.bytes()).unwrap()).unwrap()
}

/// One that can tell of tools.
const TEMPLATE: &str = "{% if tools %}<tool_call>{{ tools | tojson }} arguments\n{% endif %}\
    {% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:";

/// One thread, so that the same input always does the same.
pub fn options() -> Options {
    let n_threads = Threads { one: 1, batch: 1 };
    Options { n_ctx: Some(N_CTX), n_threads, pin: false, ..Options::default() }
}

/// A session of a model.
pub fn session(model: Model) -> qkov::error::Result<Session> {
    Session::new(Arc::new(model), &options())
}

/// Has panics in these crates pass: what they get wrong becomes an error, because they run on threads of
/// their own.
pub fn forgive(crates: &'static [&'static str]) {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let file = info.location().map_or("", |at| at.file());
        if !crates.iter().any(|name| file.contains(&format!("/{name}-"))) {
            hook(info);
        }
    }));
}
