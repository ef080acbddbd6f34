//! What a text must follow.

use crate::error::Result;

/// A grammar at a place in a text.
pub enum Grammar {}

impl Grammar {
    /// Bans what cannot follow.
    pub fn restrict(&mut self, _: &mut [f32]) -> Result<()> {
        match *self {}
    }

    /// Takes the token that was chosen.
    pub fn accept(&mut self, _: u32) -> Result<()> {
        match *self {}
    }

    /// Whether nothing can follow.
    pub fn is_over(&self) -> bool {
        match *self {}
    }
}

/// A model's vocabulary.
#[derive(Clone)]
pub struct Vocabulary;

/// What a text must follow.
#[derive(Debug, Clone, PartialEq)]
pub enum Spec {
    /// Any JSON object.
    JsonObject,
    /// JSON that is valid under a schema.
    JsonSchema(serde_json::Value),
    /// A grammar in llama.cpp's notation.
    Gbnf(String),
}

impl Vocabulary {
    /// That of a model.
    pub fn new(_: &crate::token::Tokenizer, _: usize) -> Result<Vocabulary> {
        Ok(Vocabulary)
    }
}

impl Grammar {
    /// A grammar.
    pub fn new(_: &Vocabulary, _: &Spec) -> Result<Grammar> {
        crate::bad_usage!("grammars are not supported")
    }
}
