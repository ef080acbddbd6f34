//! `qkov imatrix`: what columns of matrices matter for a text.

use std::path::PathBuf;

use clap::Args;

use super::Run;
use super::options::RunArgs;
use super::terminal::{note, print, progress, read_text};
use crate::bad_usage;
use crate::error::Result;
use crate::measure::importance::{chunks, gather};

/// Tokens that are read together unless asked: llama.cpp's.
const DEFAULT_CHUNK: usize = 512;

#[derive(Args)]
pub(super) struct Imatrix {
    #[command(flatten)]
    run: RunArgs,
    /// The text, read in chunks of --ctx tokens [default: 512]; what is left over is not
    #[arg(short, long, value_name = "FILE")]
    file: PathBuf,
    /// File to write, a GGUF as llama-imatrix makes it
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
    /// Chunks that are read, from the beginning of the text [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    chunks: Option<u32>,
    /// Also gathers what the output matrix reads
    #[arg(long)]
    process_output: bool,
    /// Replaces a file of that name
    #[arg(long)]
    force: bool,
}

impl Run for Imatrix {
    const NAME: &'static str = "imatrix";
    const ABOUT: &'static str = "Write what the columns of matrices matter for a text";

    fn run(self) -> Result<()> {
        if self.out.exists() && !self.force {
            bad_usage!("--out {}: the file exists; --force replaces it", self.out.display());
        }
        let text = read_text(Some(&self.file))?;
        let file = self.run.model.open()?;
        if !self.run.form_plan(&file)?.other_forms(&file.plan).is_empty() {
            bad_usage!("--form: importance is that of matrices in a file, which `merge` writes");
        }
        let model = self.run.open_any()?;
        let n_ctx = self.run.ctx.unwrap_or(DEFAULT_CHUNK.min(model.hparams.n_ctx_train));
        let tokens = model.tokenizer.encode(&text, true, false)?;
        let mut chunks = chunks(&tokens, n_ctx, &model.tokenizer)?;
        chunks.truncate(self.chunks.map_or(usize::MAX, |n| n as usize));
        let mut session = self.run.session(model, Some(n_ctx))?;
        let bar = progress(chunks.len(), "chunks");
        let mut count = |n| bar.set_position(n as u64);
        let mut gathered = gather(&mut session, &chunks, self.process_output, &mut count)?;
        bar.finish_and_clear();
        gathered.datasets = vec![self.file.to_string_lossy().into_owned()];
        gathered.write(&self.out)?;
        let n_matrices: usize = gathered.entries.values().map(|e| e.counts.len()).sum();
        let n_idle = gathered.entries.values().flat_map(|e| &e.counts).filter(|n| **n == 0.0);
        print(
            format!(
                "{} tokens in {} chunks, {n_matrices} matrices\n",
                chunks.len() * n_ctx,
                chunks.len()
            )
            .as_bytes(),
        )?;
        if let n @ 1.. = n_idle.count() {
            note(&format!(
                "warning: nothing went through {n} matrices of experts; more text helps"
            ));
        }
        note(&format!("written: {}", self.out.display()));
        Ok(())
    }
}
