//! `qkov patterns`: what the heads do with a text, as arrays for other programs.

use std::path::PathBuf;

use clap::Args;

use super::Run;
use super::options::RunArgs;
use super::terminal::{note, read_text};
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::replace_file;
use crate::measure::export::{arrays, npz, safetensors};
use crate::measure::record::record;
use crate::plan::range;

#[derive(Args)]
pub(super) struct Patterns {
    #[command(flatten)]
    run: RunArgs,
    /// The text
    #[arg(short, long, value_name = "TEXT", conflicts_with = "file")]
    prompt: Option<String>,
    /// File with the text; stdin without this and --prompt
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Layers: *, a number, or two with - between them
    #[arg(long, value_name = "LAYERS", default_value = "*")]
    layers: String,
    /// File to write, .npz or .safetensors: scores, patterns, values and outputs, with
    /// TransformerLens's names
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

impl Run for Patterns {
    const NAME: &'static str = "patterns";
    const ABOUT: &'static str = "Write attention scores, weights and outputs of a text to a file";

    fn run(self) -> Result<()> {
        let write = match self.out.extension().and_then(|e| e.to_str()) {
            Some("npz") => npz,
            Some("safetensors") => safetensors,
            _ => bad_usage!("--out {}: allowed .npz, .safetensors", self.out.display()),
        };
        let text = match self.prompt {
            Some(text) => text,
            None => read_text(self.file.as_deref())?,
        };
        let model = self.run.open_any()?;
        let layers = range("layer", &self.layers, model.layers.len())?;
        let tokens = model.tokenizer.encode(&text, true, false)?;
        if tokens.is_empty() {
            bad_usage!("the text is empty");
        }
        let per_kv = model.attention[layers.start].geometry.per_kv();
        let n_ctx = tokens.len() * model.plan.n_copies();
        let mut session = self.run.session(model, Some(n_ctx))?;
        let records = record(&mut session, &tokens, layers)?;
        let arrays = arrays(&records, per_kv);
        let bytes = write(&arrays)?;
        replace_file(&self.out, |out| out(&bytes))?;
        for array in &arrays {
            note(&format!("{} {:?}", array.name, array.shape));
        }
        Ok(())
    }
}
