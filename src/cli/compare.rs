//! `qkov compare`: a grid of variants in one table, one file, one page.

use std::path::PathBuf;

use clap::Args;

use super::Run;
use super::options::RunArgs;
use super::terminal::{note, print, print_json, progress, text_or_sample};
use crate::bad_usage;
use crate::error::Result;
use crate::measure::choose;
use crate::measure::compare::{
    Comparison, Job, Role, Settings, Variant, plan_named, plans, shard, text_hash,
};
use crate::measure::forms;
use crate::measure::quality::Windows;
use crate::measure::report::{Document, MAX_TOKENS, Patterns, check_folder, patterns};
use crate::measure::yardstick::smaller_formats;
use crate::model::Model;
use crate::normalizer;
use crate::plan::Plan;

#[derive(Args)]
pub(super) struct Compare {
    #[command(flatten)]
    run: RunArgs,
    /// Every normalizer with its defaults
    #[arg(long)]
    all_norms: bool,
    /// Every variant a second time, with parameters fitted to the text after the one measured on
    #[arg(long)]
    calibrate: bool,
    /// Leaves out what rounding the weights to smaller formats would cost
    #[arg(long)]
    no_yardsticks: bool,
    /// The text [default: pages of public-domain books, built in]
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Windows of --ctx tokens of the text, from its beginning, that are scored
    #[arg(long, value_name = "N", default_value = "6", value_parser = clap::value_parser!(u16).range(2..))]
    windows: u16,
    /// Passages that are hidden and searched for, at five depths each, as by `eval --retrieval`; 0 for
    /// no search
    #[arg(long, value_name = "N", default_value_t = 4)]
    trials: usize,
    /// Tokens of a text with a hidden passage
    #[arg(long, value_name = "N", default_value_t = 128)]
    trial_ctx: usize,
    /// Rounds of timing, in turns with the model as trained; 0 for none
    #[arg(long, value_name = "N", default_value_t = 6)]
    rounds: usize,
    /// Tokens that are read one by one at the context's end to be timed
    #[arg(short = 'n', long, value_name = "N", default_value = "32", value_parser = clap::value_parser!(u16).range(1..))]
    n_gen: u16,
    /// Every N-th variant from the I-th on, and the model as trained: 1/8 to 8/8
    #[arg(long, value_name = "I/N", value_parser = one_of, conflicts_with = "gather")]
    shard: Option<(usize, usize)>,
    /// Puts files together that --out wrote for shards, instead of measuring
    #[arg(long, value_name = "FILE", num_args = 1..)]
    gather: Vec<PathBuf>,
    /// File that is written after every variant; an interrupted run goes on from it
    #[arg(short, long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Prints an array with an object for each variant
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Prints comma-separated values
    #[arg(long)]
    csv: bool,
    /// Writes a page with charts, heads and attention patterns
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Text that the page shows attention patterns of [default: the beginning of the text]
    #[arg(long, value_name = "TEXT", requires = "html")]
    text: Option<String>,
}

/// Window in tokens unless asked.
const DEFAULT_WINDOW: usize = 512;
/// Tokens that variants are fitted to.
const N_FITTING: usize = 4096;
/// Tokens of the text that patterns are shown of unless asked.
const N_SHOWN: usize = 48;

fn one_of(text: &str) -> std::result::Result<(usize, usize), String> {
    let pair = text.split_once('/').and_then(|(i, n)| Some((i.parse().ok()?, n.parse().ok()?)));
    pair.ok_or_else(|| "two numbers with a slash between them".into())
}

/// What is measured, and with what.
struct Setup {
    settings: Settings,
    windows: Windows,
    fitting: Vec<Vec<u32>>,
    jobs: Vec<Job>,
}

/// Plans that were measured, with the names of their rows.
type Measured = Vec<(String, Plan)>;

impl Run for Compare {
    const NAME: &'static str = "compare";
    const ABOUT: &'static str = "Measure many variants against the model as trained, in one table";

    fn run(self) -> Result<()> {
        [&self.out, &self.html].into_iter().flatten().try_for_each(|path| check_folder(path))?;
        let (document, measured) = match self.gather.is_empty() {
            true => self.measure(&self.setup()?)?,
            false => (Document::gather(&self.gather)?, Vec::new()),
        };
        if let (Some(path), false) = (&self.out, self.gather.is_empty()) {
            document.save(path)?;
        }
        match (self.json, self.csv) {
            (true, _) => print_json(&document.records())?,
            (_, true) => print(document.csv()?.as_bytes())?,
            _ => print(document.table().as_bytes())?,
        }
        match &self.html {
            Some(path) => document.write_html(path, self.patterns(&document, measured)?.as_ref()),
            None => Ok(()),
        }
    }
}

impl Compare {
    fn model(&self) -> Result<Model> {
        self.run.model.open_predictor()
    }

    fn tokens(&self, model: &Model) -> Result<Vec<u32>> {
        let text = text_or_sample(self.file.as_deref())?;
        model.tokenizer.encode(&text, true, false)
    }

    fn setup(&self) -> Result<Setup> {
        self.run.set_level()?;
        let model = self.model()?;
        model.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        let n_ctx = self.run.ctx.unwrap_or(DEFAULT_WINDOW.min(model.hparams.n_ctx_train));
        let n_gen = usize::from(self.n_gen);
        if n_gen >= n_ctx {
            bad_usage!("--n-gen {n_gen}; allowed 1 to {}, in a context of {n_ctx}", n_ctx - 1);
        }
        let jobs = self.jobs(&model)?;
        let mut tokens = self.tokens(&model)?;
        let n_scored = n_ctx * usize::from(self.windows);
        let mut rest = tokens.split_off(n_scored.min(tokens.len()));
        let windows = Windows::new(tokens, n_ctx)?;
        let mut fitting = Vec::new();
        let uses = |job: &Job| match job {
            Job::Plan(_, plan) => forms::needs_grams(&model, plan),
            Job::Fitted(..) => true,
            Job::Rounded(_) => false,
        };
        if jobs.iter().any(uses) {
            if rest.len() < 2 * n_ctx {
                bad_usage!(
                    "--calibrate or a data-aware form: after what is scored, the text has {} tokens; {} are needed",
                    rest.len(),
                    2 * n_ctx
                );
            }
            rest.truncate(N_FITTING.max(2 * n_ctx));
            fitting.extend(Windows::new(rest, n_ctx)?.inputs(&model.tokenizer));
        }
        let settings = self.settings(&model, &windows)?;
        Ok(Setup { settings, windows, fitting, jobs })
    }

    fn settings(&self, model: &Model, windows: &Windows) -> Result<Settings> {
        let [n_threads] = self.run.threads()[..] else {
            bad_usage!("--threads: one number; only `bench` takes several");
        };
        let (type_k, type_v) = self.run.cache_types();
        let text = self.file.as_ref().map(|path| path.to_string_lossy().into_owned());
        let n_gen = usize::from(self.n_gen);
        Ok(Settings {
            model_filename: self.run.model.name(),
            model_type: model.kind(),
            model_hash: model.gguf.hash(),
            n_params: model.n_params(),
            build_commit: env!("QKOV_REVISION").into(),
            n_threads: n_threads.one,
            n_threads_batch: n_threads.batch,
            type_k: type_k.name().into(),
            type_v: type_v.name().into(),
            simd: crate::simd::level().name().into(),
            exact: self.run.exact,
            text: text.unwrap_or_else(|| "the built-in sample".into()),
            text_hash: text_hash(windows.tokens()),
            n_ctx: windows.n_ctx,
            n_windows: windows.len(),
            n_trials: self.trials,
            n_trial_ctx: self.trial_ctx,
            n_prompt: windows.n_ctx - n_gen,
            n_gen,
            n_rounds: self.rounds,
        })
    }

    fn jobs(&self, model: &Model) -> Result<Vec<Job>> {
        let mut norms = self.run.norm.clone();
        if self.all_norms {
            norms.extend(normalizer::kinds().iter().map(|kind| kind.name.to_string()));
        }
        choose::refuse(&self.run.form)?;
        let mut jobs = plans(model, (&norms, &self.run.form, &self.run.mask))?;
        if self.calibrate {
            let fitted = |job: &Job| match job {
                Job::Plan(name, plan) => vec![job.clone(), Job::Fitted(name.clone(), plan.clone())],
                _ => vec![job.clone()],
            };
            jobs = jobs.iter().flat_map(fitted).collect();
        }
        let planned = self.run.plan_from_file(model, &model.trained)?;
        if let (Some(path), Some(plan)) = (&self.run.plan, planned) {
            jobs.push(Job::Plan(path.to_string_lossy().into_owned(), plan));
        }
        if jobs.is_empty() {
            bad_usage!(
                "nothing to compare with the model as trained: --norm, --all-norms, --form, --mask or --plan"
            );
        }
        if !self.no_yardsticks {
            jobs.extend(smaller_formats(&model.gguf).into_iter().map(Job::Rounded));
        }
        match self.shard {
            Some(part) => shard(jobs, part),
            None => Ok(jobs),
        }
    }

    fn measure(&self, setup: &Setup) -> Result<(Document, Measured)> {
        let Setup { settings, windows, fitting, jobs, .. } = setup;
        let known = self.out.as_ref().map(|path| Document::resume(path, settings));
        let mut document = Document {
            settings: settings.clone(),
            variants: known.transpose()?.unwrap_or_default(),
        };
        let mut measured = Vec::new();
        let is_known =
            |document: &Document, name: &str| document.variants.iter().any(|v| v.name == name);
        let left: Vec<&Job> = jobs.iter().filter(|job| !is_known(&document, &job.name())).collect();
        let add = |document: &mut Document, variant: Variant| {
            document.variants.push(variant);
            self.out.as_ref().map_or(Ok(()), |path| document.save(path))
        };
        if document.baseline().is_some() && left.is_empty() {
            return Ok((document, measured));
        }
        let bar = progress(left.len() + 1, "variants");
        let n_copies = jobs.iter().map(Job::n_copies).max().unwrap_or(1);
        let n_ctx = n_copies * settings.n_ctx.max(settings.n_trial_ctx);
        let open = |gguf| self.run.trained_session(gguf, n_ctx);
        let again = || open(self.run.model.gguf()?);
        let mut comparison = Comparison::new(settings, (windows, fitting), again()?, &again)?;
        if document.baseline().is_none() {
            add(&mut document, comparison.baseline()?)?;
        }
        bar.inc(1);
        let gguf = self.run.model.gguf()?;
        for job in left {
            bar.set_message(job.name());
            let variant = comparison.run(job, &gguf, &open)?;
            if !matches!(job, Job::Rounded(_)) {
                measured.push((job.name(), comparison.plan()));
            }
            add(&mut document, variant)?;
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok((document, measured))
    }

    /// Patterns of the model as trained and of all variants whose plan is known, the best first. None
    /// if the model is not the one that was measured.
    fn patterns(&self, document: &Document, measured: Measured) -> Result<Option<Patterns>> {
        let model = self.model()?;
        let trained = model.trained.clone();
        if model.gguf.hash() != document.settings.model_hash {
            note("no attention patterns: --model is not the model that was measured");
            return Ok(None);
        }
        let mut tokens = match &self.text {
            Some(text) => model.tokenizer.encode(text, true, false)?,
            None => self.tokens(&model)?,
        };
        if self.text.is_none() {
            tokens.truncate(N_SHOWN);
        }
        if tokens.is_empty() {
            bad_usage!("--text: the text is empty");
        }
        if tokens.len() > MAX_TOKENS {
            note(&format!("--text: attention is shown for its first {MAX_TOKENS} tokens"));
            tokens.truncate(MAX_TOKENS);
        }
        let plan = |name: &str| {
            let known = measured.iter().find(|(known, _)| known == name);
            let parsed = || plan_named(&model, name).ok();
            known.map(|(_, plan)| plan.clone()).or_else(parsed)
        };
        let mut plans: Vec<(String, Plan)> = Vec::new();
        plans.extend(document.baseline().map(|v| (v.name.clone(), trained.clone())));
        for (_, v) in document.ranked() {
            if let (Role::Variant, Some(plan)) = (v.role, plan(&v.name)) {
                // What reads a prompt twice has other tokens, and another form is another model.
                let fits = plan.n_copies() == 1 && plan.other_forms(&model.plan).is_empty();
                plans.extend(fits.then(|| (v.name.clone(), plan)));
            }
        }
        let mut session = self.run.trained_session(self.run.model.gguf()?, tokens.len())?;
        patterns(&mut session, &tokens, &plans).map(Some)
    }
}
