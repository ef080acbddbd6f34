//! `qkov eval`: how well a model predicts a text, and what a change costs.

use std::path::PathBuf;

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::Run;
use super::heads;
use super::options::RunArgs;
use super::terminal::{print, print_json, progress, read_text};
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::{Sink, replace_file};
use crate::measure::heads::{HeadStats, observe};
use crate::measure::quality::{Base, Divergence, Estimate, Quality, Spread, Windows, evaluate};
use crate::measure::retrieval::{DEPTHS, Found, Needle, Probe, Retrieval, retrieve};
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
    /// Compares with the same model under another plan of normalizers, written as for --norm;
    /// without a plan, with the model as trained. Both are in memory at once
    #[arg(long, value_name = "PLAN", num_args = 0..=1, default_missing_value = "softmax", conflicts_with = "base")]
    against: Option<String>,
    /// Writes this model's log-probabilities to a file that can be a --base
    #[arg(long, value_name = "FILE")]
    save_base: Option<PathBuf>,
    /// Also hides passages in the text and asks for them at its end; models that can copy pass
    /// with `random` tokens too
    #[arg(long, value_name = "NEEDLE", num_args = 0..=1, default_missing_value = "passage")]
    retrieval: Option<Needle>,
    /// Also tells what every head does, over the first 8 windows
    #[arg(long)]
    heads: bool,
    /// Prints the result as JSON; shares and probabilities are from 0 to 1
    #[arg(long)]
    json: bool,
}

/// Window in tokens unless asked: llama.cpp's.
const DEFAULT_WINDOW: usize = 512;

/// Windows whose heads are looked at.
const HEAD_WINDOWS: usize = 8;

/// What was measured.
struct Measured {
    quality: Quality,
    retrieval: Option<Retrieval>,
    /// What the model was compared with, in words.
    base: Option<String>,
    base_retrieval: Option<Retrieval>,
    heads: Option<Vec<HeadStats>>,
}

impl Run for Eval {
    const NAME: &'static str = "eval";
    const ABOUT: &'static str = "Measure perplexity, divergence from a base, and retrieval";

    fn run(self) -> Result<()> {
        let text = self.file.as_deref().map(|path| read_text(Some(path))).transpose()?;
        let model = self.run.open()?;
        let n_vocab = model.hparams.n_vocab;
        let mut base = self.base.as_deref().map(|path| Base::open(path, n_vocab)).transpose()?;
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
        let Some(windows) = own.or_else(|| base.as_ref().map(|base| base.windows.clone())) else {
            bad_usage!("a text is needed: --file or --base");
        };
        let n_positions = windows.n_positions(model.plan.n_copies());
        let mut session = self.run.session(model, Some(n_positions))?;
        let mut base_name = self.base.as_ref().map(|path| path.to_string_lossy().into_owned());
        if let Some(plan) = &self.against {
            let other = self.run.base_session(plan, n_ctx)?;
            base_name = Some(other.model().plan.names()[0].clone());
            base = Some(Base::live(other, windows.clone()));
        }
        let quality = self.evaluate(&mut session, &windows, base.as_mut())?;
        let (mut retrieval, mut base_retrieval) = (None, None);
        if let Some(needle) = self.retrieval {
            retrieval = Some(find(&mut session, &windows, needle)?);
            if let Some(other) = base.as_mut().and_then(Base::session) {
                base_retrieval = Some(find(other, &windows, needle)?);
            }
        }
        let heads = match self.heads {
            true => Some(observe(&mut session, &windows, HEAD_WINDOWS, &mut |_| {})?),
            false => None,
        };
        let measured = Measured { quality, retrieval, base: base_name, base_retrieval, heads };
        match self.json {
            true => print_json(&self.report(&session, &measured)),
            false => print(self.text(&session, &measured).as_bytes()),
        }
    }
}

impl ValueEnum for Needle {
    fn value_variants<'a>() -> &'a [Needle] {
        &[Needle::Passage, Needle::Random]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        let name = match self {
            Needle::Passage => "passage",
            Needle::Random => "random",
        };
        Some(PossibleValue::new(name))
    }
}

/// Looks for needles in the windows' text.
fn find(session: &mut Session, windows: &Windows, needle: Needle) -> Result<Retrieval> {
    let probe = Probe { needle, n_ctx: windows.n_ctx, ..Probe::default() };
    let bar = progress(probe.n_trials, "needles");
    let found = retrieve(session, windows.tokens(), probe, &mut |n| bar.set_position(n as u64));
    bar.finish_and_clear();
    found
}

impl Eval {
    fn evaluate(
        &self,
        session: &mut Session,
        windows: &Windows,
        base: Option<&mut Base>,
    ) -> Result<Quality> {
        let bar = progress(windows.len(), "windows");
        let run = |save: Option<&mut Sink>| {
            evaluate(session, windows, base, save, &mut |n| bar.set_position(n as u64))
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
        Ok(quality)
    }

    fn report(&self, session: &Session, measured: &Measured) -> Value {
        let model = session.model();
        let [norm, form, mask] = model.plan.names();
        let quality = &measured.quality;
        let mut report = json!({
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
            "base": measured.base,
        });
        let retrieval = measured.retrieval.iter().flat_map(Retrieval::fields);
        let base_retrieval = measured.base_retrieval.iter().flat_map(Retrieval::fields);
        let base_retrieval = base_retrieval.map(|(name, x)| (format!("base_{name}"), x));
        for (name, x) in quality.fields().into_iter().chain(retrieval).chain(base_retrieval) {
            report[name] = json!(x);
        }
        if let Some(heads) = &measured.heads {
            report["heads"] = heads::report(heads);
        }
        report
    }

    fn text(&self, session: &Session, measured: &Measured) -> String {
        let (model, q) = (session.model(), &measured.quality);
        let [norm, ..] = model.plan.names();
        let mut text = format!(
            "{} ({}), {norm}\n{} tokens scored in windows of {}\n\nperplexity       {}\n",
            self.run.model.name(),
            model.kind(),
            q.tokens,
            q.n_ctx,
            estimate(q.ppl, 4),
        );
        if let (Some(d), Some(base)) = (&q.divergence, &measured.base) {
            text += &divergence(d, base);
        }
        if let Some(r) = &measured.retrieval {
            text += &retrieval(r, measured.base_retrieval.as_ref());
        }
        text += &measured.heads.as_deref().map_or(String::new(), heads::table);
        text
    }
}

/// The number and its error, in columns that line up.
fn estimate(x: Estimate, digits: usize) -> String {
    let width = 8 + digits;
    format!("{:width$.digits$} ± {:.digits$}", x.value, x.err)
}

fn divergence(d: &Divergence, base: &str) -> String {
    // The names of the points that a line has room for.
    const SHARES: [f64; 7] = [0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0];
    let row = |name: &str, spread: &Spread, factor: f64, digits: usize| {
        let points = SHARES.map(|s| format!("{:9.digits$}", factor * spread.at(s)));
        format!("{name:<17}{}\n", points.concat())
    };
    format!(
        "  of the base    {}   {base}\n  ratio          {}\n  difference     {}\n\
         same top token   {} %\nKL divergence    {}   nats per token\n\
         Δp               {} %, of the right token\nΔp, RMS          {} %\n\n\
         {:17}      min      1 %     10 %   median     90 %     99 %      max\n{}{}",
        estimate(d.base_ppl, 4),
        estimate(d.ppl_ratio, 4),
        estimate(d.ppl_diff, 4),
        estimate(d.same_top.times(100.0), 3),
        estimate(d.kl.mean, 6),
        estimate(d.dp.mean.times(100.0), 3),
        estimate(d.dp_rms.times(100.0), 3),
        "",
        row("KL divergence", &d.kl, 1.0, 5),
        row("Δp, %", &d.dp, 100.0, 2),
    )
}

fn retrieval(r: &Retrieval, base: Option<&Retrieval>) -> String {
    let Probe { needle, n_ctx, n_needle, n_cue, n_trials, .. } = r.probe;
    let what = match needle {
        Needle::Passage => "a passage",
        Needle::Random => "random tokens",
    };
    let titles = format!("{:>7}{:>11}{:>14}", "top-1 %", "p, %", "nats");
    let (names, titles) = match base {
        Some(_) => (format!("{:>18}{:>35}\n", "this", "base"), format!("{titles}   {titles}")),
        None => (String::new(), titles),
    };
    let mut text = format!(
        "\nretrieval: {what} of {n_needle} tokens hidden in {} of the text, {n_trials} texts;\n\
         after its first {n_cue} are repeated: share of the rest that is most likely, and\n\
         what hiding it added to the probability of a token, and to its logarithm\n\n\
         {names}depth  {titles}\n",
        n_ctx - n_needle,
    );
    let cells = |f: &Found| {
        let (top1, p, ln_p) = (100.0 * f.top1.value, f.p_gain.times(100.0), f.ln_p_gain);
        format!("{top1:5.1} {:+6.1} ± {:<4.1}{:+6.2} ± {:.2}", p.value, p.err, ln_p.value, ln_p.err)
    };
    let mut line = |name: String, pick: &dyn Fn(&Retrieval) -> Found| {
        let base = base.map_or(String::new(), |base| format!("   {}", cells(&pick(base))));
        text += &format!("{name:<7}{}{base}\n", cells(&pick(r)));
    };
    for (i, depth) in DEPTHS.iter().enumerate() {
        line(format!("{:.0} %", 100.0 * depth), &|r| r.depths[i]);
    }
    line("all".into(), &|r| r.all);
    let chance = |r: &Retrieval| format!("{:5.1}", 100.0 * r.chance.value);
    let base = base.map_or(String::new(), |base| format!("{:30}{}", "", chance(base)));
    text + &format!("none   {}{base}\n", chance(r))
}
