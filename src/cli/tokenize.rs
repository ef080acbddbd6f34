//! `qkov tokenize`: text to token ids.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::Run;
use super::model_file::FileArgs;
use super::terminal::{note, print, print_json, read_text};
use crate::error::{Result, escaped};
use crate::token::Tokenizer;

#[derive(Args)]
pub(super) struct Tokenize {
    #[command(flatten)]
    model: FileArgs,
    /// The text [default: stdin]
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// Reads the text from a file
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Prints the ids alone, separated by spaces
    #[arg(long, conflicts_with = "json")]
    ids: bool,
    /// Prints an array of ids and texts as JSON
    #[arg(long)]
    json: bool,
    /// Adds the tokens that the model puts around a text, such as BOS
    #[arg(long)]
    add_special: bool,
    /// Reads the names of special tokens in the text as these tokens
    #[arg(long)]
    parse_special: bool,
}

impl Run for Tokenize {
    const NAME: &'static str = "tokenize";
    const ABOUT: &'static str = "Show the tokens of a text";

    fn run(self) -> Result<()> {
        let text = match &self.prompt {
            Some(text) => text.clone(),
            None => read_text(self.file.as_deref())?,
        };
        let gguf = self.model.gguf()?;
        let tokenizer = Tokenizer::from_gguf(&gguf).map_err(|e| self.model.at(e))?;
        tokenizer.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        let ids = tokenizer.encode(&text, self.add_special, self.parse_special)?;
        let piece = |id: u32| String::from_utf8_lossy(tokenizer.piece(id, true)).into_owned();
        if self.ids {
            let ids: Vec<String> = ids.iter().map(u32::to_string).collect();
            return print(format!("{}\n", ids.join(" ")).as_bytes());
        }
        if self.json {
            let rows: Vec<_> = ids.iter().map(|id| json!({"id": id, "text": piece(*id)})).collect();
            return print_json(&rows);
        }
        let lines: Vec<String> =
            ids.iter().map(|id| format!("{id:>8}  \"{}\"\n", escaped(&piece(*id)))).collect();
        print(lines.concat().as_bytes())
    }
}
