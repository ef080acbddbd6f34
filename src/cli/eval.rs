//! `qkov eval`: how well a model predicts a text.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Run;
use super::options::RunArgs;
use super::terminal::{print, print_json, progress, read_text};
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::{Sink, replace_file};
use crate::measure::quality::{Base, Quality, Windows, evaluate};
use crate::session::Session;

#[derive(Args)]
pub(super) struct Eval {
    #[command(flatten)]
    run: RunArgs,
    /// The text; with --base, its own text is used and this one must be the same
    #[arg(short, long, value_name = "FILE", required_unless_present = "base")]
    file: Option<PathBuf>,
    /// Log-probabilities to compare with, from --save-base or llama-perplexity's
    /// --kl-divergence-base
    #[arg(long, value_name = "FILE")]
    base: Option<PathBuf>,
    /// Writes this model's log-probabilities to a file that can be a --base
    #[arg(long, value_name = "FILE")]
    save_base: Option<PathBuf>,
    /// Prints the result as JSON
    #[arg(long)]
    json: bool,
}

/// Window in tokens unless asked: llama.cpp's.
const DEFAULT_WINDOW: usize = 512;

impl Run for Eval {
    const NAME: &'static str = "eval";
    const ABOUT: &'static str = "Measure perplexity, and divergence from a base";

    fn run(self) -> Result<()> {
        let text = self.file.as_deref().map(|path| read_text(Some(path))).transpose()?;
        let model = self.run.open()?;
        let n_vocab = model.hparams.n_vocab;
        let base = self.base.as_deref().map(|path| Base::open(path, n_vocab)).transpose()?;
        let n_ctx = match (&base, self.run.ctx) {
            (Some(base), Some(asked)) if asked != base.windows.n_ctx => {
                bad_usage!("--ctx {asked}, but the base has windows of {}", base.windows.n_ctx)
            }
            (Some(base), _) => base.windows.n_ctx,
            (None, asked) => asked.unwrap_or(DEFAULT_WINDOW),
        };
        let own = match text {
            Some(text) => Some(Windows::new(model.tokenizer.encode(&text, true, false)?, n_ctx)?),
            None => None,
        };
        if let (Some(base), Some(own)) = (&base, &own)
            && base.windows.tokens() != own.tokens()
        {
            bad_usage!("the base was made from another text, or with another tokenizer");
        }
        let Some(windows) = base.as_ref().map(|b| &b.windows).or(own.as_ref()) else {
            bad_usage!("a text is needed: --file or --base");
        };
        let mut session = self.run.session(model, Some(n_ctx))?;
        let bar = progress(windows.len(), "windows");
        let mut run = |save: Option<&mut Sink>| {
            let mut progress = |n| bar.set_position(n as u64);
            evaluate(&mut session, windows, base.as_ref(), save, &mut progress)
        };
        let quality = match &self.save_base {
            None => run(None)?,
            Some(path) => {
                let mut quality = None;
                replace_file(path, |out| {
                    quality = Some(run(Some(out))?);
                    Ok(())
                })?;
                let Some(quality) = quality else { bad_usage!("nothing was measured") };
                quality
            }
        };
        bar.finish_and_clear();
        match self.json {
            true => print_json(&self.report(&session, &quality)),
            false => print(self.text(&session, &quality).as_bytes()),
        }
    }
}

impl Eval {
    fn report(&self, session: &Session, quality: &Quality) -> Value {
        let model = session.model();
        let [norm, form, mask] = model.plan.names();
        let d = quality.divergence.as_ref();
        json!({
            "model_filename": self.run.model.name(),
            "model_type": model.kind(),
            "n_params": model.n_params(),
            "n_threads": session.n_threads().one,
            "type_k": session.cache_types().0.name(),
            "type_v": session.cache_types().1.name(),
            "build_commit": env!("QKOV_REVISION"),
            "norm": norm,
            "form": form,
            "mask": mask,
            "tokens": quality.tokens,
            "n_ctx": quality.n_ctx,
            "ppl": quality.ppl,
            "ppl_err": quality.ppl_err,
            "base": self.base.as_ref().map(|p| p.to_string_lossy()),
            "base_ppl": d.map(|d| d.base_ppl),
            "kl_mean": d.map(|d| d.kl_mean),
            "kl_err": d.map(|d| d.kl_err),
            "kl_p99": d.map(|d| d.kl_p99),
            "kl_max": d.map(|d| d.kl_max),
            "same_top": d.map(|d| d.same_top),
            "same_top_err": d.map(|d| d.same_top_err),
        })
    }

    fn text(&self, session: &Session, q: &Quality) -> String {
        let mut text = format!(
            "{} ({}), {} tokens scored in windows of {}\nperplexity   {:.4} +/- {:.4}\n",
            self.run.model.name(),
            session.model().kind(),
            q.tokens,
            q.n_ctx,
            q.ppl,
            q.ppl_err
        );
        if let Some(d) = &q.divergence {
            text += &format!(
                "of the base  {:.4}\nKL mean      {:.6} +/- {:.6} nats per token\nKL 99 %      {:.6}\n\
                 KL max       {:.6}\nsame top     {:.3} +/- {:.3} %\n",
                d.base_ppl,
                d.kl_mean,
                d.kl_err,
                d.kl_p99,
                d.kl_max,
                d.same_top * 100.0,
                d.same_top_err * 100.0
            );
        }
        text
    }
}
