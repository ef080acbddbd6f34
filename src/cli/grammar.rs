//! Options on what a text must follow.

use std::path::{Path, PathBuf};

use clap::Args;

use super::terminal::read_text;
use crate::error::{Error, Result};
use crate::session::grammar::{Grammar, Spec, Vocabulary};
use crate::token::Tokenizer;

#[derive(Args)]
#[command(next_help_heading = "Grammar")]
pub(super) struct GrammarArgs {
    /// Has the text be JSON that is valid under a schema: a file, or the schema itself
    #[arg(long, value_name = "SCHEMA")]
    json_schema: Option<String>,
    /// Has the text follow a grammar in llama.cpp's notation (GBNF)
    #[arg(long, value_name = "FILE", conflicts_with = "json_schema")]
    grammar: Option<PathBuf>,
}

impl GrammarArgs {
    /// The grammar that was asked for, at the beginning of a text.
    pub(super) fn open(&self, tokenizer: &Tokenizer, n_vocab: usize) -> Result<Option<Grammar>> {
        let spec = match (&self.json_schema, &self.grammar) {
            (Some(schema), _) => Spec::JsonSchema(json_schema(schema)?),
            (None, Some(path)) => Spec::Gbnf(read_text(Some(path))?),
            (None, None) => return Ok(None),
        };
        Grammar::new(&Vocabulary::new(tokenizer, n_vocab)?, &spec).map(Some)
    }
}

/// The schema of a file, or in the text itself if that begins as an object does.
fn json_schema(given: &str) -> Result<serde_json::Value> {
    let text = match given.trim_start().starts_with('{') {
        true => given.to_string(),
        false => read_text(Some(Path::new(given)))?,
    };
    serde_json::from_str(&text).map_err(|e| Error::Usage(format!("JSON schema: {e}")))
}
