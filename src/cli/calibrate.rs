//! `qkov calibrate`: fit swapped normalizers to a model.

use std::path::{Path, PathBuf};

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use indicatif::ProgressBar;
use serde::{Deserialize, Serialize};

use super::Run;
use super::options::RunArgs;
use super::terminal::{note, print, progress, text_or_sample};
use crate::bad_usage;
use crate::error::{Error, Result};
use crate::gguf::replace_file;
use crate::measure::calibrate::{Fitted, Settings, apply, calibrate};
use crate::measure::quality::{Base, MAX_BASE_BYTES, Quality, Windows, evaluate};
use crate::measure::search::{Frontier, Unit, n_steps, search};
use crate::plan::{Plan, PlanFile};
use crate::session::Session;

#[derive(Args)]
pub(super) struct Calibrate {
    #[command(flatten)]
    run: RunArgs,
    /// Text to fit with, and to judge with what follows [default: pages of public-domain books,
    /// built in]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Tokens of the text that are used for the fit, from its beginning; half as many after them are
    /// used to judge it
    #[arg(long, value_name = "N", default_value_t = 4096)]
    tokens: usize,
    /// Rows of scores that a head is fitted to
    #[arg(long, value_name = "N", default_value_t = 256)]
    rows: usize,
    /// Adds no mean to the outputs of heads
    #[arg(long)]
    no_means: bool,
    /// Swaps only as much as keeps the divergence from the model as trained within this, in nats
    /// per token, beginning with what hurts least; prints the frontier
    #[arg(long, value_name = "KL")]
    search: Option<f64>,
    /// What --search swaps as one
    #[arg(long, value_name = "UNIT", default_value = "layer")]
    by: Unit,
    /// Plan file to write. An interrupted run leaves FILE.partial, with which the same command goes
    /// on
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

impl ValueEnum for Unit {
    fn value_variants<'a>() -> &'a [Unit] {
        &[Unit::Layer, Unit::Head]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let name = match self {
            Unit::Layer => "layer",
            Unit::Head => "head",
        };
        Some(PossibleValue::new(name))
    }
}

/// Longest sequence that heads are fitted to, unless --ctx says otherwise.
const DEFAULT_WINDOW: usize = 512;

/// What an interrupted run leaves.
#[derive(Serialize, Deserialize)]
struct Partial {
    /// Everything that the fits depend on.
    of: String,
    fits: Vec<Fitted>,
}

/// A text for the fit, and another for the judgment.
struct Texts {
    fit: Vec<Vec<u32>>,
    judge: Windows,
}

impl Run for Calibrate {
    const NAME: &'static str = "calibrate";
    const ABOUT: &'static str = "Fit swapped normalizers to a model, and write a plan file";

    fn run(self) -> Result<()> {
        let model = self.run.open()?;
        let (wanted, trained) = (model.plan.clone(), model.trained.clone());
        if PlanFile::of(&wanted, &trained, "").norm.is_empty() {
            bad_usage!("nothing to fit: --norm says what the model was trained with");
        }
        let n_ctx = self.run.ctx.unwrap_or(DEFAULT_WINDOW.min(model.hparams.n_ctx_train));
        let texts = self.texts(&model.tokenizer, n_ctx)?;
        let hash = model.gguf.hash();
        let mut session = self.run.session(model, Some(n_ctx))?;
        session.set_plan(trained.clone())?;
        let bar = progress(texts.judge.len(), "windows as trained");
        let mut count = |n| bar.set_position(n as u64);
        let base = Base::in_memory(&mut session, &texts.judge, MAX_BASE_BYTES, &mut count)?;
        let Some(mut base) = base else {
            bad_usage!(
                "--tokens {}: the judgment takes too much memory; ask for fewer",
                self.tokens
            )
        };
        bar.finish_and_clear();
        let mut wanted = wanted;
        if let Some(budget) = self.search {
            let frontier = self.search(&mut session, &texts, &mut base, &wanted)?;
            let step = frontier.within(budget);
            print(frontier_table(&frontier, budget).as_bytes())?;
            wanted =
                frontier.plan(step.map_or(0, |s| s.n), &wanted, &trained).with_masks_of(&wanted);
        }
        let fits = self.fit(&mut session, &texts, &wanted, &hash)?;
        let mut plan = trained.with_masks_of(&wanted);
        apply(&mut plan, &fits);
        // The model is to be opened with the forms that this one has been given.
        let in_file = self.run.model.open()?.trained;
        let file = PlanFile::of(&plan, &in_file, &hash).text()?;
        replace_file(&self.out, |out| out(file.as_bytes()))?;
        print(table(&fits).as_bytes())?;
        let mut judge = |plan: Plan| {
            session.set_plan(plan)?;
            evaluate(&mut session, &texts.judge, Some(&mut base), None, &mut |_| {})
        };
        print(judgment(&judge(wanted)?, &judge(plan)?).as_bytes())?;
        note(&format!("written: {}", self.out.display()));
        Ok(())
    }
}

impl Calibrate {
    fn texts(&self, tokenizer: &crate::token::Tokenizer, n_ctx: usize) -> Result<Texts> {
        let text = text_or_sample(self.file.as_deref())?;
        let mut tokens = tokenizer.encode(&text, true, false)?;
        let n_fit = self.tokens.min(tokens.len() * 2 / 3);
        let rest = tokens.split_off(n_fit);
        let n_judge = rest.len().min(self.tokens / 2).max(2 * n_ctx).min(rest.len());
        let fit = Windows::new(tokens, n_ctx)?.inputs(tokenizer).collect();
        Ok(Texts { fit, judge: Windows::new(rest[..n_judge].to_vec(), n_ctx)? })
    }

    fn settings(&self, session: &Session) -> Settings {
        let n_threads = session.n_threads().batch;
        Settings { rows: self.rows, means: !self.no_means, n_threads }
    }

    /// Fits layer by layer, and keeps what is done in a file beside the one to be written.
    fn fit(
        &self,
        session: &mut Session,
        texts: &Texts,
        wanted: &Plan,
        hash: &str,
    ) -> Result<Vec<Fitted>> {
        let settings = self.settings(session);
        let norm = PlanFile::of(wanted, &session.model().trained, hash);
        let of = format!("{:?} {} {} {:?}", norm, settings.rows, settings.means, texts.fit);
        let path = self.out.with_added_extension("partial");
        let mut partial =
            read_partial(&path).filter(|p| p.of == of).unwrap_or(Partial { of, fits: Vec::new() });
        let known = partial.fits.clone();
        let bar = progress(wanted.layers.len(), "layers");
        let mut done = |fits: &[Fitted], _: &Plan| {
            bar.inc(1);
            if fits.is_empty() || known.iter().any(|k| k.layer == fits[0].layer) {
                return Ok(());
            }
            partial.fits.extend_from_slice(fits);
            let text = serde_json::to_vec(&partial);
            let text = text.map_err(|e| Error::Runtime(format!("cannot write JSON: {e}")))?;
            replace_file(&path, |out| out(&text))
        };
        let fits = calibrate(session, &texts.fit, wanted, (settings, true), &known, &mut done)?;
        bar.finish_and_clear();
        // Nothing is lost if it stays: other fits will not take it for theirs.
        let _ = std::fs::remove_file(&path);
        Ok(fits)
    }

    fn search(
        &self,
        session: &mut Session,
        texts: &Texts,
        base: &mut Base,
        wanted: &Plan,
    ) -> Result<Frontier> {
        let settings = self.settings(session);
        let bar = progress(wanted.layers.len(), "layers");
        let mut done = |_: &[Fitted], _: &Plan| {
            bar.inc(1);
            Ok(())
        };
        let fits = calibrate(session, &texts.fit, wanted, (settings, false), &[], &mut done)?;
        bar.finish_and_clear();
        let bar: ProgressBar = progress(n_steps(self.by, &fits), "measurements");
        let frontier = search(session, (base, &texts.judge), &fits, self.by, &mut || bar.inc(1))?;
        bar.finish_and_clear();
        Ok(frontier)
    }
}

fn read_partial(path: &Path) -> Option<Partial> {
    serde_json::from_slice(&std::fs::read(path).ok()?).ok()
}

/// Errors of outputs before and after the fit, by layer.
fn table(fits: &[Fitted]) -> String {
    let mut text = "layer  heads  error before     after  (of outputs, relative)\n".to_string();
    for of_layer in fits.chunk_by(|a, b| a.layer == b.layer) {
        let mean = |of: fn(&Fitted) -> f64| {
            let squares = of_layer.iter().map(|f| f.size * of(f) * of(f)).sum::<f64>();
            (squares / of_layer.iter().map(|f| f.size).sum::<f64>()).sqrt()
        };
        let (layer, heads) = (of_layer[0].layer, of_layer.len());
        let (before, after) = (mean(|f| f.raw_err), mean(|f| f.err));
        text += &format!("{layer:5}  {heads:5}  {before:12.4}  {after:8.4}\n");
    }
    text
}

fn kl(quality: &Quality) -> (f64, f64) {
    quality.divergence.as_ref().map_or((f64::NAN, 0.0), |d| (d.kl.mean.value, d.kl.mean.err))
}

/// What the fit gains on text that it has not seen.
fn judgment(raw: &Quality, fitted: &Quality) -> String {
    let mut text = format!(
        "\non {} other tokens  perplexity  KL to the model as trained, nats per token\n",
        raw.tokens
    );
    if let Some(d) = &raw.divergence {
        text += &format!("{:20}  {:10.3}\n", "as trained", d.base_ppl.value);
    }
    for (name, quality) in [("swapped", raw), ("swapped and fitted", fitted)] {
        let (kl, err) = kl(quality);
        text += &format!("{name:20}  {:10.3}  {kl:.6} +/- {err:.6}\n", quality.ppl.value);
    }
    text
}

fn frontier_table(frontier: &Frontier, budget: f64) -> String {
    let chosen = frontier.within(budget).map_or(0, |s| s.n);
    let mut text = "swapped  last   perplexity  KL, nats per token\n".to_string();
    for step in &frontier.steps {
        let (kl, err) = kl(&step.quality);
        let mark = if step.n == chosen { "  <- within the budget" } else { "" };
        let ppl = step.quality.ppl.value;
        text += &format!("{:7}  {:5}  {ppl:10.3}  {kl:.6} +/- {err:.6}{mark}\n", step.n, step.last);
    }
    if chosen == 0 {
        text += &format!("nothing can be swapped within {budget}\n");
    }
    text += "\n";
    text
}
