//! `qkov calibrate`: fit swapped normalizers to a model.

use std::path::PathBuf;

use clap::Args;

use super::Run;
use super::options::RunArgs;
use super::terminal::{note, print, progress, read_text};
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::replace_file;
use crate::measure::SAMPLE;
use crate::measure::calibrate::{Fitted, Settings, apply, calibrate};
use crate::measure::quality::Windows;
use crate::plan::{Plan, PlanFile};

#[derive(Args)]
pub(super) struct Calibrate {
    #[command(flatten)]
    run: RunArgs,
    /// Text to fit with [default: pages of public-domain books, built in]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens of the text that are used for the fit, from its beginning
    #[arg(long, value_name = "N", default_value_t = 4096)]
    tokens: usize,
    /// Rows of scores that a head is fitted to
    #[arg(long, value_name = "N", default_value_t = 256)]
    rows: usize,
    /// Adds no mean to the outputs of heads
    #[arg(long)]
    no_means: bool,
    /// Plan file to write; one that an interrupted run left is gone on with
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

/// Longest sequence that heads are fitted to, unless --ctx says otherwise.
const DEFAULT_WINDOW: usize = 512;

impl Run for Calibrate {
    const NAME: &'static str = "calibrate";
    const ABOUT: &'static str = "Fit swapped normalizers to a model, and write a plan file";

    fn run(self) -> Result<()> {
        let text = match &self.file {
            Some(path) => read_text(Some(path))?,
            None => SAMPLE.to_string(),
        };
        let model = self.run.open()?;
        let (wanted, trained) = (model.plan.clone(), model.trained.clone());
        if wanted.names() == trained.names() {
            bad_usage!("nothing to fit: --norm says what the model was trained with");
        }
        let n_ctx = self.run.ctx.unwrap_or(DEFAULT_WINDOW.min(model.hparams.n_ctx_train));
        let mut tokens = model.tokenizer.encode(&text, true, false)?;
        tokens.truncate(self.tokens.max(2 * n_ctx));
        let sequences: Vec<_> = Windows::new(tokens, n_ctx)?.inputs(&model.tokenizer).collect();
        let hash = model.gguf.hash();
        let mut session = self.run.session(model, Some(n_ctx))?;
        let n_threads = session.n_threads().batch;
        let settings = Settings { rows: self.rows, means: !self.no_means, n_threads };
        let bar = progress(wanted.layers.len(), "layers");
        let mut done = |_: &[Fitted], _: &Plan| {
            bar.inc(1);
            Ok(())
        };
        let fits = calibrate(&mut session, &sequences, &wanted, (settings, true), &[], &mut done)?;
        bar.finish_and_clear();
        let mut plan = trained.clone();
        apply(&mut plan, &fits);
        let file = PlanFile::of(&plan, &trained, &hash).text()?;
        replace_file(&self.out, |out| out(file.as_bytes()))?;
        print(table(&fits).as_bytes())?;
        note(&format!("written: {}", self.out.display()));
        Ok(())
    }
}

/// Errors of outputs before and after the fit, by layer.
fn table(fits: &[Fitted]) -> String {
    let mut text = "layer  heads  error before  after (of outputs, relative)\n".to_string();
    for of_layer in fits.chunk_by(|a, b| a.layer == b.layer) {
        let mean = |of: fn(&Fitted) -> f64| {
            let squares = of_layer.iter().map(|f| f.size * of(f) * of(f)).sum::<f64>();
            (squares / of_layer.iter().map(|f| f.size).sum::<f64>()).sqrt()
        };
        let (layer, heads) = (of_layer[0].layer, of_layer.len());
        text += &format!(
            "{layer:5}  {heads:5}  {:12.4}  {:.4}\n",
            mean(|f| f.raw_err),
            mean(|f| f.err)
        );
    }
    text
}
