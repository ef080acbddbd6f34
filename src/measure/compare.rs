//! A grid of variants of one model: what each costs in quality and gains in time, beside the model
//! as it was trained, and beside what rounding its weights further costs.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::bad_usage;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::mask;
use crate::measure::calibrate::{self, calibrate};
use crate::measure::forms;
use crate::measure::heads::{HeadStats, RowStats, observe};
use crate::measure::latency::{Duel, Pace, duel, mean_and_deviation, median, percentile};
use crate::measure::quality::{Base, MAX_BASE_BYTES, Windows, evaluate};
use crate::measure::retrieval::{Probe, Retrieval, retrieve};
use crate::measure::yardstick::requantized;
use crate::merge::{self, Grams};
use crate::model::Model;
use crate::normalizer;
use crate::plan::Plan;
use crate::quant::Format;
use crate::session::Session;

/// Rows of scores that a head is fitted to.
const N_ROWS: usize = 256;
/// Bins of a histogram.
pub const N_BINS: usize = 32;
/// The base-2 logarithm of the smallest and the largest row mass in a histogram.
pub const MASS_RANGE: (f32, f32) = (-8.0, 8.0);

/// What all variants of a comparison share, and what makes two comparisons one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// The model's file.
    pub model_filename: String,
    /// Architecture and format.
    pub model_type: String,
    /// Of its tensors.
    pub model_hash: String,
    /// Weights.
    pub n_params: u64,
    /// The revision that measured.
    pub build_commit: String,
    /// Threads for a token alone.
    pub n_threads: usize,
    /// Threads for tokens read together.
    pub n_threads_batch: usize,
    /// Type of cached keys.
    pub type_k: String,
    /// Type of cached values.
    pub type_v: String,
    /// Instruction set.
    pub simd: String,
    /// Whether activations stay in full precision.
    pub exact: bool,
    /// The text's file.
    pub text: String,
    /// Of its tokens.
    pub text_hash: String,
    /// Window in tokens.
    pub n_ctx: usize,
    /// Windows.
    pub n_windows: usize,
    /// Texts with hidden passages; 0 for no search.
    pub n_trials: usize,
    /// Tokens of each of them.
    pub n_trial_ctx: usize,
    /// Tokens that are read together to be timed.
    pub n_prompt: usize,
    /// Tokens after them that are read one by one.
    pub n_gen: usize,
    /// Rounds of timing; 0 for none.
    pub n_rounds: usize,
}

/// What a row of a comparison is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The model as trained.
    Baseline,
    /// The model with another plan.
    Variant,
    /// The model as trained, with rounded weights.
    Yardstick,
}

/// One row of a comparison.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Variant {
    /// What it is called.
    pub name: String,
    /// What it is.
    pub role: Role,
    /// Normalizers, as `--norm` takes them.
    pub norm: String,
    /// Forms.
    pub form: String,
    /// Masks.
    pub mask: String,
    /// What every head does; of yardsticks nothing.
    pub heads: Vec<HeadSummary>,
    /// Rows by their mass, in steps of its logarithm over [`MASS_RANGE`].
    pub mass_histogram: Vec<u64>,
    /// Rows by their entropy, from 0 to `ln n_ctx`.
    pub entropy_histogram: Vec<u64>,
    /// Everything that `eval` and `bench` say, by their names.
    #[serde(flatten)]
    pub numbers: Map<String, Value>,
}

/// Means of [`HeadStats`] over rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HeadSummary {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// Its normalizer.
    pub norm: String,
    /// Distance of its outputs to those of the normalizer trained with.
    pub output_err: Option<f64>,
    /// In nats.
    pub entropy: Option<f64>,
    /// Weight of the first token.
    pub sink: Option<f64>,
    /// Sum of weights.
    pub mass: Option<f64>,
    /// Share of the visible keys that have a weight.
    pub support: Option<f64>,
}

/// Something to measure.
#[derive(Clone)]
pub enum Job {
    /// The model with another plan, by what it is called.
    Plan(String, Plan),
    /// The same once its parameters are fitted.
    Fitted(String, Plan),
    /// The model as trained, rounded.
    Rounded(&'static Format),
}

impl Job {
    /// How often it reads a prompt.
    pub fn n_copies(&self) -> usize {
        match self {
            Job::Plan(_, plan) | Job::Fitted(_, plan) => plan.n_copies(),
            Job::Rounded(_) => 1,
        }
    }

    /// The name of its row.
    pub fn name(&self) -> String {
        match self {
            Job::Plan(name, _) => name.clone(),
            Job::Fitted(name, _) => format!("{name} fitted"),
            Job::Rounded(format) => format!("as {}", format.ty.name),
        }
    }
}

/// What stands between the normalizers, the forms and the masks in a row's name.
const WITH: &str = " / ";

/// A plan for each of these normalizers in each of these forms under each of these masks, each once,
/// but not the model as trained; without one of the lists, what was trained with stands for it.
pub fn plans(
    model: &Model,
    (norms, forms, masks): (&[String], &[String], &[String]),
) -> Result<Vec<Job>> {
    let [norm, form, mask] = model.trained.names();
    let baseline = baseline_name(model);
    let or = |all: &[String], trained: &String| match all.is_empty() {
        true => vec![trained.clone()],
        false => all.to_vec(),
    };
    let (norms, forms, masks) = (or(norms, &norm), or(forms, &form), or(masks, &mask));
    let mut jobs: Vec<Job> = Vec::new();
    for own_mask in &masks {
        for (own_form, norm) in forms.iter().flat_map(|f| norms.iter().map(move |n| (f, n))) {
            let mut name = normalizer::Choice::parse(norm).map_or(norm.trim().into(), |c| c.text());
            let own_form =
                merge::Choice::parse(own_form).map_or(own_form.trim().into(), |c| c.text());
            let own_mask =
                mask::Choice::parse(own_mask).map_or(own_mask.trim().into(), |c| c.text());
            for (own, trained) in [(&own_form, &form), (&own_mask, &mask)] {
                if own != trained {
                    name = [&name, WITH, own].concat();
                }
            }
            if name != baseline && !jobs.iter().any(|job| job.name() == name) {
                let plan = plan_named(model, &name)?;
                jobs.push(Job::Plan(name, plan));
            }
        }
    }
    Ok(jobs)
}

/// The plan of a row that [`plans`] named.
pub fn plan_named(model: &Model, name: &str) -> Result<Plan> {
    let mut plan = model.trained.clone();
    if name != baseline_name(model) {
        let mut parts = name.split(WITH);
        plan.set_normalizers(parts.next().unwrap_or_default())?;
        for part in parts {
            // Names of forms and masks are never the same.
            let is_form = merge::FORMS.iter().any(|form| {
                let at = part.rfind(form.name());
                at.is_some_and(|at| at == 0 || part[..at].ends_with('='))
            });
            if is_form { plan.set_forms(part)? } else { plan.set_masks(part)? }
        }
        forms::check(model, &plan)?;
        model.check(&plan)?;
    }
    Ok(plan)
}

/// The name of the row of the model as trained.
fn baseline_name(model: &Model) -> String {
    let [norm, ..] = model.trained.names();
    norm
}

/// The jobs of one shard of `n`, from 1.
pub fn shard(jobs: Vec<Job>, (i, n): (usize, usize)) -> Result<Vec<Job>> {
    if i < 1 || i > n {
        bad_usage!("shard {i}/{n}; allowed I/N with I from 1 to N, such as 1/8");
    }
    Ok(jobs.into_iter().skip(i - 1).step_by(n).collect())
}

/// Measures variants against the model as trained.
pub struct Comparison<'a> {
    settings: &'a Settings,
    windows: &'a Windows,
    /// Sequences of tokens that plans are fitted to, and forms are made with.
    fitting: &'a [Vec<u32>],
    session: Session,
    base: Base,
    trained: Plan,
    /// What was measured last.
    plan: Plan,
    /// What heads make of `fitting`, once a form has asked for it.
    grams: Vec<Grams>,
}

impl<'a> Comparison<'a> {
    /// Begins with a session of the model as trained, which nobody else may be using. `open` makes
    /// another one, for a text whose logits do not fit in memory.
    pub fn new(
        settings: &'a Settings,
        (windows, fitting): (&'a Windows, &'a [Vec<u32>]),
        mut session: Session,
        open: &dyn Fn() -> Result<Session>,
    ) -> Result<Comparison<'a>> {
        let trained = session.model().trained.clone();
        session.set_plan(trained.clone())?;
        // A larger one reads the text again for every variant.
        let kept = Base::in_memory(&mut session, windows, MAX_BASE_BYTES, &mut |_| {})?;
        let base = match kept {
            Some(base) => base,
            None => Base::live(open()?, windows.clone()),
        };
        let (plan, grams) = (trained.clone(), Vec::new());
        Ok(Comparison { settings, windows, fitting, session, base, trained, plan, grams })
    }

    /// The model as trained. Timed against itself: what it differs from 1 by is noise.
    pub fn baseline(&mut self) -> Result<Variant> {
        let name = baseline_name(self.session.model());
        self.planned(&name, self.trained.clone(), Role::Baseline, None)
    }

    /// A plan whose forms keep within their budgets, and a session of the model in these forms, if those
    /// are not the trained ones.
    fn formed(
        &mut self,
        plan: &Plan,
        open: &dyn Fn(Gguf) -> Result<Session>,
    ) -> Result<(Plan, Option<Session>)> {
        self.session.set_plan(self.trained.clone())?;
        let mut plan = plan.clone();
        if plan.other_forms(&self.trained).is_empty() {
            return Ok((plan, None));
        }
        if self.grams.is_empty() {
            self.grams = forms::grams_for(&mut self.session, &plan, self.fitting, &mut |_| {})?;
        }
        let (model, grams) = (self.session.model(), &self.grams);
        if forms::has_budget(&plan) {
            let at = (&mut self.base, self.windows);
            plan = forms::within_budget(model, (&plan, grams), at, open)?;
        }
        let gguf = forms::rewritten(model, &plan, grams, None)?;
        Ok((plan, Some(open(gguf)?)))
    }

    /// The plan that was measured last.
    pub fn plan(&self) -> Plan {
        self.plan.clone()
    }

    /// A variant or a yardstick. `open` makes sessions like those that this was begun with.
    pub fn run(
        &mut self,
        job: &Job,
        gguf: &Gguf,
        open: &dyn Fn(Gguf) -> Result<Session>,
    ) -> Result<Variant> {
        match job {
            Job::Plan(name, plan) => {
                let (plan, own) = self.formed(plan, open)?;
                self.planned(name, plan, Role::Variant, own)
            }
            Job::Fitted(_, plan) => {
                let n_threads = self.session.n_threads().batch;
                let how = calibrate::Settings { rows: N_ROWS, means: true, n_threads };
                let (plan, mut own) = self.formed(plan, open)?;
                let fitting = self.fitting;
                let session = own.as_mut().unwrap_or(&mut self.session);
                calibrate(session, fitting, &plan, (how, true), &[], &mut |_, _| Ok(()))?;
                let fitted = session.model().plan.clone();
                self.planned(&job.name(), fitted, Role::Variant, own)
            }
            Job::Rounded(format) => {
                let mut session = open(requantized(gguf, format)?)?;
                let mut variant = Variant::of(&job.name(), Role::Yardstick, session.model());
                let windows = self.windows;
                let quality =
                    evaluate(&mut session, windows, Some(&mut self.base), None, &mut |_| {})?;
                variant.put(quality.fields());
                variant.number("model_size", session.model().n_bytes() as f64);
                Ok(variant)
            }
        }
    }

    /// Measures a plan with the session of the model as trained, or with one of its own.
    fn planned(
        &mut self,
        name: &str,
        plan: Plan,
        role: Role,
        mut own: Option<Session>,
    ) -> Result<Variant> {
        self.plan.clone_from(&plan);
        let windows = self.windows;
        let session = own.as_mut().unwrap_or(&mut self.session);
        session.set_plan(plan.clone())?;
        let mut variant = Variant::of(name, role, session.model());
        let quality = evaluate(session, windows, Some(&mut self.base), None, &mut |_| {})?;
        variant.put(quality.fields());
        if self.settings.n_trials > 0 {
            let Settings { n_trials, n_trial_ctx, .. } = *self.settings;
            let probe = Probe { n_ctx: n_trial_ctx, n_trials, ..Probe::default() };
            let found = retrieve(session, windows.tokens(), probe, &mut |_| {})?;
            variant.put(Retrieval::fields(&found));
        }
        let stats = observe(session, windows, 1, &mut |_| {})?;
        variant.heads = stats.iter().map(HeadSummary::of).collect();
        variant.count(&stats, windows.n_ctx);
        variant.number("model_size", session.model().n_bytes() as f64);
        let per_token = session.cache_bytes() as f64 / session.n_ctx() as f64;
        variant.number("cache_bytes_per_token", per_token);
        let Settings { n_prompt, n_gen, n_rounds, .. } = *self.settings;
        if n_rounds > 0 {
            let text = windows.tokens().iter().copied().cycle();
            let tokens: Vec<u32> = text.take(n_prompt + n_gen).collect();
            let plans = [&self.trained, &plan];
            let sessions = (&mut self.session, own.as_mut());
            let duel = duel(sessions, plans, tokens.split_at(n_prompt), n_rounds)?;
            variant.time(&duel);
        }
        Ok(variant)
    }
}

impl Variant {
    fn of(name: &str, role: Role, model: &Model) -> Variant {
        let [norm, form, mask] = model.plan.names();
        Variant {
            name: name.into(),
            role,
            norm,
            form,
            mask,
            heads: Vec::new(),
            mass_histogram: Vec::new(),
            entropy_histogram: Vec::new(),
            numbers: Map::new(),
        }
    }

    fn put(&mut self, fields: Vec<(String, f64)>) {
        fields.iter().for_each(|(name, x)| self.number(name, *x));
    }

    fn number(&mut self, name: &str, x: f64) {
        self.numbers.insert(name.into(), json!(x));
    }

    /// A number that was measured, if it was and is one.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.numbers.get(name)?.as_f64()
    }

    /// Whether the range of a speed over the base's holds 1; then nothing was measured but noise.
    pub fn is_noise(&self, what: &str) -> bool {
        let get = |end| self.get(&format!("{what}_ratio_{end}"));
        get("min").zip(get("max")).is_some_and(|(low, high)| low <= 1.0 && 1.0 <= high)
    }

    /// Decoding speed over the base's; 1 where no difference was measured.
    pub fn gain(&self) -> f64 {
        match self.is_noise("decode") {
            true => 1.0,
            false => self.get("decode_ratio").unwrap_or(1.0),
        }
    }

    fn time(&mut self, duel: &Duel) {
        for (what, pace) in [("prefill", duel.prefill()), ("decode", duel.decode())] {
            let Pace { rates, ratios } = &pace;
            let (avg, stddev) = mean_and_deviation(rates);
            let (low, high) = pace.range();
            for (name, x) in [
                ("avg_ts", avg),
                ("stddev_ts", stddev),
                ("ratio", median(ratios)),
                ("ratio_min", low),
                ("ratio_max", high),
            ] {
                self.number(&format!("{what}_{name}"), x);
            }
        }
        let own = || duel.turns.iter().map(|[_, own]| own);
        let mut steps: Vec<f64> = own().flat_map(|turn| turn.steps.iter().copied()).collect();
        steps.sort_by(f64::total_cmp);
        let first: Vec<f64> = own().map(|turn| turn.first).collect();
        self.number("ttft_ms", 1e3 * median(&first));
        self.number("p50_ms", 1e3 * percentile(&steps, 0.5));
        self.number("p99_ms", 1e3 * percentile(&steps, 0.99));
    }

    fn count(&mut self, stats: &[HeadStats], n_ctx: usize) {
        let (low, high) = MASS_RANGE;
        let rows = || stats.iter().flat_map(|head| &head.rows);
        let share = |x: f32, from: f32, to: f32| (x - from) / (to - from);
        let mass = |row: &RowStats| share(row.mass.max(0.0).log2(), low, high);
        let entropy = |row: &RowStats| share(row.entropy, 0.0, (n_ctx as f32).ln());
        self.mass_histogram = histogram(rows().map(mass));
        self.entropy_histogram = histogram(rows().map(entropy));
    }
}

/// Counts of shares in bins of the same width; what lies outside is in the first or last bin.
fn histogram(shares: impl Iterator<Item = f32>) -> Vec<u64> {
    let mut counts = vec![0; N_BINS];
    for share in shares.filter(|x| !x.is_nan()) {
        counts[((share * N_BINS as f32) as usize).min(N_BINS - 1)] += 1;
    }
    counts
}

impl HeadSummary {
    fn of(stats: &HeadStats) -> HeadSummary {
        let number = |x: f64| x.is_finite().then_some(x);
        HeadSummary {
            layer: stats.layer,
            head: stats.head,
            norm: stats.norm.clone(),
            output_err: number(stats.output_err),
            entropy: number(stats.mean(|r| r.entropy)),
            sink: number(stats.mean(|r| r.sink)),
            mass: number(stats.mean(|r| r.mass)),
            support: number(stats.mean(RowStats::support_share)),
        }
    }
}

/// Ranks of points by cost, lower is better, and gain, higher is better: 1 for those that no other
/// beats in one without losing in the other, 2 for those that are so once the former are gone, and
/// so on (non-dominated sorting; Deb et al. 2002, NSGA-II, section III.A).
pub fn pareto_ranks(points: &[(f64, f64)]) -> Vec<usize> {
    let cost = |i: usize| if points[i].0.is_nan() { f64::INFINITY } else { points[i].0 };
    let gain = |i: usize| if points[i].1.is_nan() { 0.0 } else { points[i].1 };
    let beats = |a: usize, b: usize| {
        let as_good = cost(a) <= cost(b) && gain(a) >= gain(b);
        as_good && (cost(a) < cost(b) || gain(a) > gain(b))
    };
    let mut ranks = vec![0; points.len()];
    let mut rank = 0;
    while ranks.contains(&0) {
        rank += 1;
        let left: Vec<usize> = (0..points.len()).filter(|i| ranks[*i] == 0).collect();
        for i in left.iter().filter(|i| !left.iter().any(|other| beats(*other, **i))) {
            ranks[*i] = rank;
        }
    }
    ranks
}

/// A number for a text's tokens, in hexadecimal: SHA-256, cut to 64 bits.
pub fn text_hash(tokens: &[u32]) -> String {
    let mut hash = Sha256::new();
    tokens.iter().for_each(|token| hash.update(token.to_le_bytes()));
    hash.finalize()[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}
