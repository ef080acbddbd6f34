//! Small models that were trained for this project: see models/README.md.

use std::path::PathBuf;

use qkov::gguf::Gguf;
use qkov::model::Model;

pub fn path(name: &str) -> PathBuf {
    [env!("CARGO_MANIFEST_DIR"), "models", &format!("{name}-q8_0.gguf")].iter().collect()
}

pub fn gguf(name: &str) -> Gguf {
    Gguf::open(&path(name)).unwrap()
}

/// The model with softmax, of 4 layers with 6 heads of 32 over 2 kv heads.
pub fn softmax() -> Model {
    Model::from_gguf(gguf("softmax")).unwrap()
}
