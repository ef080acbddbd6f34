//! Options that commands share.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};

use super::memory;
use super::model_file::FileArgs;
use super::terminal::{note, progress, read_text, text_or_sample};
use crate::bad_usage;
use crate::cpu::threads::default_threads;
use crate::engine::{CacheType, Devices, Kind, Threads};
use crate::error::{Error, Result};
use crate::gguf::{Gguf, evict};
use crate::measure::choose::{self, Auto, Candidate};
use crate::measure::compare::text_hash;
use crate::measure::grams::gather;
use crate::measure::quality::{Base, MAX_BASE_BYTES, Windows};
use crate::measure::timing::shapes;
use crate::measure::{forms, grams_file};
use crate::merge::{self, Grams};
use crate::model::{self, Model, NewLayer};
use crate::plan::{LayerPlan, Plan, PlanFile};
use crate::session::{Options, Session};
use crate::simd::{self, Level};

/// Longest sequence of the text that forms are made with.
const FORM_WINDOW: usize = 512;

#[derive(Args)]
pub(super) struct ModelArgs {
    #[command(flatten)]
    file: FileArgs,
    /// GGUF file of a LoRA adapter, and what its effect is multiplied with; may be given again
    #[arg(long, value_name = "FILE[:SCALE]")]
    lora: Vec<String>,
}

impl ModelArgs {
    /// The file with the adapters beside it, without a look at what kind of model it is.
    pub(super) fn gguf(&self) -> Result<Gguf> {
        self.adapted(self.file.gguf()?)
    }

    /// A model's file with the adapters that were asked for beside it.
    pub(super) fn adapted(&self, mut gguf: Gguf) -> Result<Gguf> {
        for text in &self.lora {
            let (path, scale) = scaled(text)?;
            gguf = model::adapted(gguf, Gguf::open(path)?, scale).map_err(|e| e.at(path))?;
        }
        Ok(gguf)
    }

    /// A model that predicts tokens.
    pub(super) fn open_predictor(&self) -> Result<Model> {
        let model = self.open()?;
        model.hparams.must_predict().map_err(|e| self.at(e))?;
        Ok(model)
    }

    /// The model as it was trained.
    pub(super) fn open(&self) -> Result<Model> {
        Model::from_gguf(self.gguf()?).map_err(|e| self.at(e))
    }

    /// The names of the file and of adapters in reports.
    pub(super) fn name(&self) -> String {
        self.with_adapters(self.file.name())
    }

    /// A model's name with those of adapters.
    pub(super) fn with_adapters(&self, name: String) -> String {
        self.lora.iter().fold(name, |name, lora| format!("{name} + {lora}"))
    }

    /// Has the system forget what it holds of the file in memory.
    pub(super) fn evict(&self) -> Result<()> {
        let Some(path) = self.file.path()? else {
            bad_usage!("--cold: the built-in model has no file")
        };
        if Gguf::open(path)?.u32("split.count")?.is_some_and(|n| n > 1) {
            bad_usage!("--cold: the model is split into several files");
        }
        evict(path)
    }

    /// Names the file in an error about its content.
    pub(super) fn at(&self, error: Error) -> Error {
        self.file.at(error)
    }

    /// The name of the file in reports, without its folders and without adapters.
    pub(super) fn short_name(&self) -> String {
        self.file.short_name()
    }

    pub(super) fn is_shipped(&self) -> bool {
        self.file.is_shipped()
    }
}

/// The file of an adapter and what its effect is multiplied with, from `FILE[:SCALE]`. Names may have
/// colons.
fn scaled(text: &str) -> Result<(&Path, f32)> {
    let whole = Path::new(text);
    let Some((path, scale)) = text.rsplit_once(':').filter(|_| !whole.exists()) else {
        return Ok((whole, 1.0));
    };
    let path = Path::new(path);
    match scale.parse::<f32>() {
        Ok(scale) if scale.is_finite() => Ok((path, scale)),
        Err(_) if !path.exists() => Ok((whole, 1.0)),
        _ => bad_usage!("--lora {text}: scale \"{scale}\"; a finite number is needed"),
    }
}

/// A model that nobody else holds.
fn sole(model: Arc<Model>) -> Result<Model> {
    match Arc::into_inner(model) {
        Some(model) => Ok(model),
        None => bad_usage!("--form: the model is in use elsewhere"),
    }
}

#[derive(Args)]
pub(super) struct RunArgs {
    #[command(flatten)]
    pub(super) model: ModelArgs,
    /// Threads [default: one per core]; for `bench`, several numbers with commas
    #[arg(short, long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Vec<u16>,
    /// Threads that read prompts [default: as --threads]
    #[arg(long, visible_alias = "tb", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads_batch: Option<u16>,
    /// Leaves threads to the system, instead of one core for each
    #[arg(long)]
    no_pin: bool,
    /// Multiplies weights with activations in full precision; slow for quantized ones, which take 8
    /// bits otherwise, as those in BF16 take BF16 where the processor multiplies it
    #[arg(long)]
    pub(super) exact: bool,
    /// Instruction set [default: the best that the processor has]
    #[arg(long, value_name = "LEVEL", env = "QKOV_SIMD")]
    simd: Option<Level>,
    /// Context in tokens [default: as trained, at most 8192]
    #[arg(short, long, value_name = "N")]
    pub(super) ctx: Option<usize>,
    /// Normalizer instead of softmax: NAME[:key=value,..] for all heads, or by layers and heads,
    /// such as '*=softmax;0-3=sigmoid;5.2=entmax:alpha=1.1'; see `norms`. Given again, it goes over
    /// what was said before; for `compare`, each is a variant
    #[arg(long, value_name = "PLAN")]
    pub(super) norm: Vec<String>,
    /// Mask instead of causal: NAME[:key=value,..] for all layers, or by layers, such as
    /// '0-3=window:n=256;*=causal', later ones over earlier ones; see `masks`. Given again, as --norm
    #[arg(long, value_name = "PLAN")]
    pub(super) mask: Vec<String>,
    /// Form of attention instead of split: NAME[:key=value,..] for all layers, or by layers, as --mask;
    /// see `forms`. Given again, as --norm. `auto`: the one that takes least time here
    #[arg(long, value_name = "PLAN")]
    pub(super) form: Vec<String>,
    /// Text that data-aware forms are made with [default: pages of public-domain books, built in]
    #[arg(long, value_name = "FILE")]
    form_text: Option<PathBuf>,
    /// Tokens of that text; twice as many that follow judge what is within a budget
    #[arg(long, value_name = "N", default_value_t = 1024)]
    form_tokens: usize,
    /// File that keeps what heads make of that text: read, if it is of the same model and text, or
    /// else written [default: beside a plan file with forms, as PLAN.grams]
    #[arg(long, value_name = "FILE")]
    form_grams: Option<PathBuf>,
    /// Plan file, from `calibrate`; --norm and --mask go over what it says. For `compare`, one more
    /// variant
    #[arg(long, value_name = "FILE")]
    pub(super) plan: Option<PathBuf>,
    /// Engine: this program's own kernels, or ggml, in builds with the feature. `bench` takes several
    #[arg(long, value_delimiter = ',', value_name = "ENGINE", default_value = "cpu")]
    pub(super) engine: Vec<Kind>,
    /// Devices of ggml that have layers; see `inspect --devices` [default: all but the processor, or
    /// else that]
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    device: Vec<String>,
    /// Layers, the last ones, that are on those devices; the others are on the processor [default: all]
    #[arg(long, visible_alias = "ngl", value_name = "N")]
    gpu_layers: Option<usize>,
    /// Workers whose devices ggml uses too, in builds with the feature rpc; see `rpc-worker`
    #[arg(long, value_delimiter = ',', value_name = "HOST:PORT")]
    rpc: Vec<String>,
    /// Type of cached keys
    #[arg(long, visible_alias = "ctk", value_name = "TYPE", default_value = "f16")]
    cache_type_k: CacheType,
    /// Type of cached values
    #[arg(long, visible_alias = "ctv", value_name = "TYPE", default_value = "f16")]
    cache_type_v: CacheType,
}

/// An empty session, if memory has room for it.
fn started(model: Arc<Model>, options: &Options) -> Result<Session> {
    memory::check(&model, options)?;
    Session::new(model, options)
}

impl ValueEnum for Level {
    fn value_variants<'a>() -> &'a [Level] {
        &Level::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

impl ValueEnum for Kind {
    fn value_variants<'a>() -> &'a [Kind] {
        &Kind::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

impl ValueEnum for CacheType {
    fn value_variants<'a>() -> &'a [CacheType] {
        &CacheType::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

impl RunArgs {
    /// Opens a model that predicts tokens; warnings go to stderr.
    pub(super) fn open(&self) -> Result<Arc<Model>> {
        self.planned(self.formed(self.model.open_predictor()?)?)
    }

    /// Opens any model; warnings go to stderr.
    pub(super) fn open_any(&self) -> Result<Arc<Model>> {
        self.planned(self.formed(self.model.open()?)?)
    }

    /// A model in the forms that were asked for.
    pub(super) fn formed(&self, model: Model) -> Result<Model> {
        if let [text] = &self.form[..]
            && let Some(auto) = Auto::parse(text)?
        {
            return self.chosen(model, auto);
        }
        let plan = self.form_plan(&model)?;
        if plan.other_forms(&model.plan).is_empty() {
            return Ok(model);
        }
        let (model, layers) = self.new_layers(model, plan)?;
        Model::from_gguf(model.rewritten(&layers, None)?)
    }

    /// A model in the form that takes least here.
    fn chosen(&self, mut model: Model, auto: Auto) -> Result<Model> {
        if self.one_engine()? != Kind::Cpu {
            bad_usage!("--form auto: it knows the times of the engine cpu only; name a form");
        }
        let base = self.normalized(&model)?;
        model.set_plan(base.clone());
        let n_ctx = auto.n_ctx(&model);
        let mut session = self.quiet_session(Arc::new(model), n_ctx)?;
        let (parts, mut found) = auto.time(&mut session)?;
        let mut model = sole(session.into_model())?;
        let mut made = Vec::new();
        if let (true, Ok(timing)) = (auto.kl > 0.0, found[0].timing.clone()) {
            let mut plan = base.clone();
            let form = merge::Choice::parse(&format!("lowrank:kl={}", auto.kl))?;
            plan.layers.iter_mut().for_each(|layer| layer.form = form.clone());
            found.push(match forms::check(&model, &plan) {
                Ok(()) => {
                    (model, made) = self.new_layers(model, plan)?;
                    let at = (&model, self.cache_types());
                    Candidate::rewritten(at, &made, (&parts, &timing))?
                }
                Err(e) => Candidate::refused(&base, &form, e.to_string()),
            });
        }
        found.extend(auto.mixed(&found));
        note(&auto.table(&found));
        let Some(best) = auto.best(&found) else { return Ok(model) };
        if best.plan.other_forms(&base).is_empty() {
            return Ok(model);
        }
        let mut made = made.into_iter();
        let layer = |plan: &LayerPlan| match made.next() {
            Some(new) if new.form.text() == plan.form.text() => new,
            _ => NewLayer { form: plan.form.clone(), rewritten: None },
        };
        let layers: Vec<NewLayer> = best.plan.layers.iter().map(layer).collect();
        Model::from_gguf(model.rewritten(&layers, None)?)
    }

    /// A model's plan with the normalizers that were asked for.
    fn normalized(&self, model: &Model) -> Result<Plan> {
        let mut plan = model.plan.clone();
        if let Some(file) = self.plan_file()? {
            file.norm.iter().try_for_each(|text| plan.set_normalizers(text))?;
        }
        self.norm.iter().try_for_each(|text| plan.set_normalizers(text))?;
        Ok(plan)
    }

    /// The forms, and the normalizers they are to go with, that were asked for.
    pub(super) fn form_plan(&self, model: &Model) -> Result<Plan> {
        choose::refuse(&self.form)?;
        let mut plan = self.normalized(model)?;
        if let Some(file) = self.plan_file()? {
            file.form.iter().try_for_each(|text| plan.set_forms(text))?;
        }
        self.form.iter().try_for_each(|text| plan.set_forms(text))?;
        forms::check(model, &plan)?;
        Ok(plan)
    }

    /// A plan with the masks that were asked for.
    pub(super) fn masked(&self, mut plan: Plan) -> Result<Plan> {
        let file = self.plan_file()?;
        let texts = file.iter().flat_map(|file| &file.mask).chain(&self.mask);
        texts.into_iter().try_for_each(|text| plan.set_masks(text))?;
        Ok(plan)
    }

    /// What becomes of the layers of a model in the forms of `plan`.
    pub(super) fn new_layers(&self, model: Model, plan: Plan) -> Result<(Model, Vec<NewLayer>)> {
        if !forms::needs_grams(&model, &plan) && !forms::has_budget(&plan) {
            let layers = forms::new_layers(&model, &plan, &[])?;
            return Ok((model, layers));
        }
        let (sequences, judge) = self.form_windows(&model)?;
        let n_ctx = judge.n_ctx;
        // The engine that can be looked into.
        let options = self.options_of(Kind::Cpu, Some(n_ctx), self.one_threads()?)?;
        let model = Arc::new(model);
        let mut session = started(model.clone(), &options)?;
        let grams = self.grams(&mut session, &plan, &sequences)?;
        let mut plan = plan;
        if forms::has_budget(&plan) {
            let open = |gguf| started(Arc::new(Model::from_gguf(gguf)?), &options);
            let base = Base::in_memory(&mut session, &judge, MAX_BASE_BYTES, &mut |_| {})?;
            let Some(mut base) = base else {
                bad_usage!("--form-tokens: too many for a budget of divergence");
            };
            let at = (&mut base, &judge);
            plan = forms::within_budget(&model, (&plan, &grams), at, &open)?;
            note(&format!("form: {}", plan.names()[1]));
        }
        drop(session);
        let layers = forms::new_layers(&model, &plan, &grams)?;
        let damped = layers.iter().filter_map(|l| l.rewritten.as_ref()).map(|r| r.damped);
        match damped.sum::<usize>() {
            0 => {}
            n => note(&format!(
                "form: the text hardly shows {n} directions of heads, which are kept as if it did a little"
            )),
        }
        Ok((sole(model)?, layers))
    }

    /// What the heads of the session's model make of sequences, if the forms of a plan need it: from a
    /// file, or for it.
    fn grams(
        &self,
        session: &mut Session,
        plan: &Plan,
        sequences: &[Vec<u32>],
    ) -> Result<Vec<Grams>> {
        if !forms::needs_grams(session.model(), plan) {
            return Ok(Vec::new());
        }
        let path = self.grams_path()?;
        let of = self.grams_of(session.model(), sequences)?;
        if let Some(path) = &path
            && let Some(grams) = grams_file::read(path, &of, shapes(session.model()))?
        {
            return Ok(grams);
        }
        let bar = progress(sequences.len(), "windows for the form");
        let mut count = |n| bar.set_position(n as u64);
        let grams = gather(session, sequences, &mut count)?;
        bar.finish_and_clear();
        if let Some(path) = &path {
            grams_file::write(path, &of, &grams)?;
        }
        Ok(grams)
    }

    /// The file that keeps Grams, if there is to be one.
    fn grams_path(&self) -> Result<Option<PathBuf>> {
        let beside = match self.plan_file()? {
            Some(file) if !file.form.is_empty() => self.plan.as_ref(),
            _ => None,
        };
        let beside = beside.map(|path| path.with_added_extension("grams"));
        Ok(self.form_grams.clone().or(beside))
    }

    /// Everything that Grams depend on.
    fn grams_of(&self, model: &Model, sequences: &[Vec<u32>]) -> Result<String> {
        let plan = PlanFile::of(&model.plan, &model.trained, &model.gguf.hash()).text()?;
        let windows: Vec<usize> = sequences.iter().map(Vec::len).collect();
        let text = text_hash(&sequences.concat());
        let (k, v) = self.cache_types();
        let exact = self.exact;
        Ok(format!("{plan}text {text} {windows:?}, cache {} {}, exact {exact}", k.name(), v.name()))
    }

    /// Sequences of tokens that forms are made with, and what follows them to judge forms.
    pub(super) fn form_windows(&self, model: &Model) -> Result<(Vec<Vec<u32>>, Windows)> {
        let text = text_or_sample(self.form_text.as_deref())?;
        let mut tokens = model.tokenizer.encode(&text, true, false)?;
        let n = self.form_tokens.min(tokens.len() * 2 / 3);
        let mut rest = tokens.split_off(n);
        rest.truncate(2 * self.form_tokens);
        let n_ctx = FORM_WINDOW.min(model.hparams.n_ctx_train);
        let fitting = Windows::new(tokens, n_ctx)?.inputs(&model.tokenizer).collect();
        Ok((fitting, Windows::new(rest, n_ctx)?))
    }

    fn plan_file(&self) -> Result<Option<PlanFile>> {
        let Some(path) = &self.plan else { return Ok(None) };
        PlanFile::parse(&read_text(Some(path))?).map(Some).map_err(|e| e.at(path))
    }

    /// A model with the normalizers and masks that were asked for.
    pub(super) fn planned(&self, mut model: Model) -> Result<Arc<Model>> {
        if let Some(plan) = self.plan_from_file(&model, &model.plan)? {
            model.set_plan(plan);
        }
        self.norm.iter().try_for_each(|text| model.set_normalizers(text))?;
        self.mask.iter().try_for_each(|text| model.set_masks(text))?;
        model.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        Ok(Arc::new(model))
    }

    /// A plan for `model`, changed as --plan says; none without it.
    pub(super) fn plan_from_file(&self, model: &Model, plan: &Plan) -> Result<Option<Plan>> {
        let (Some(path), Some(file)) = (&self.plan, self.plan_file()?) else { return Ok(None) };
        model.planned(plan, &file).map(Some).map_err(|e| e.at(path))
    }

    /// Whether threads stay on cores of their own.
    pub(super) fn pin(&self) -> bool {
        !self.no_pin
    }

    /// Types of cached keys and values.
    pub(super) fn cache_types(&self) -> (CacheType, CacheType) {
        (self.cache_type_k, self.cache_type_v)
    }

    /// Numbers of threads, for one session after the other.
    pub(super) fn threads(&self) -> Vec<Threads> {
        let batch = |one: usize| self.threads_batch.map_or(one, usize::from);
        let numbers = self.threads.iter().map(|n| usize::from(*n));
        let threads: Vec<_> = numbers.map(|one| Threads { one, batch: batch(one) }).collect();
        let default = default_threads();
        match threads.is_empty() {
            true => vec![Threads { one: default, batch: batch(default) }],
            false => threads,
        }
    }

    /// An empty session with a context of `n_ctx`; warnings go to stderr.
    pub(super) fn session(&self, model: Arc<Model>, n_ctx: Option<usize>) -> Result<Session> {
        self.session_with(model, n_ctx, self.one_threads()?)
    }

    /// The same, with other numbers of threads than `--threads` says.
    pub(super) fn session_with(
        &self,
        model: Arc<Model>,
        n_ctx: Option<usize>,
        n_threads: Threads,
    ) -> Result<Session> {
        self.session_of(self.one_engine()?, model, n_ctx, n_threads)
    }

    /// The same, with one of the engines that were asked for.
    pub(super) fn session_of(
        &self,
        engine: Kind,
        model: Arc<Model>,
        n_ctx: Option<usize>,
        n_threads: Threads,
    ) -> Result<Session> {
        let session = started(model, &self.options_of(engine, n_ctx, n_threads)?)?;
        session.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        Ok(session)
    }

    /// A session beside another one, of the model as trained but for the normalizers in `norm`.
    /// What there is to warn of has been said.
    pub(super) fn base_session(&self, norm: &str, n_ctx: usize) -> Result<Session> {
        let mut session = self.trained_session(self.model.gguf()?, n_ctx)?;
        let mut plan = session.model().trained.clone();
        plan.set_normalizers(norm)?;
        session.set_plan(plan)?;
        Ok(session)
    }

    /// A session of the model in an open file, as it was trained. Of warnings nothing is said.
    pub(super) fn trained_session(&self, gguf: Gguf, n_ctx: usize) -> Result<Session> {
        let model = Model::from_gguf(gguf).map_err(|e| self.model.at(e))?;
        self.quiet_session(Arc::new(model), n_ctx)
    }

    /// An empty session; of warnings nothing is said.
    pub(super) fn quiet_session(&self, model: Arc<Model>, n_ctx: usize) -> Result<Session> {
        started(model, &self.options(Some(n_ctx), self.one_threads()?)?)
    }

    /// The numbers of threads, where one session is all there is.
    pub(super) fn one_threads(&self) -> Result<Threads> {
        match self.threads()[..] {
            [n_threads] => Ok(n_threads),
            _ => bad_usage!("--threads: one number; only `bench` takes several"),
        }
    }

    /// The engine, where one session is all there is.
    pub(super) fn one_engine(&self) -> Result<Kind> {
        match self.engine[..] {
            [kind] => Ok(kind),
            _ => bad_usage!("--engine: one; only `bench` takes several"),
        }
    }

    /// Where ggml computes.
    pub(super) fn devices(&self) -> Devices {
        Devices { names: self.device.clone(), n_layers: self.gpu_layers, workers: self.rpc.clone() }
    }

    /// Chooses the instruction set that was asked for.
    pub(super) fn set_level(&self) -> Result<()> {
        if let Some(level) = self.simd
            && !simd::set_level(level)
        {
            bad_usage!("--simd {}: this processor does not have it", level.name());
        }
        Ok(())
    }

    /// How many sequences at once are set up.
    pub(super) fn pool_options(&self) -> Result<Options> {
        self.options(self.ctx, self.one_threads()?)
    }

    fn options(&self, n_ctx: Option<usize>, n_threads: Threads) -> Result<Options> {
        self.options_of(self.one_engine()?, n_ctx, n_threads)
    }

    fn options_of(
        &self,
        engine: Kind,
        n_ctx: Option<usize>,
        n_threads: Threads,
    ) -> Result<Options> {
        self.set_level()?;
        Ok(Options {
            n_ctx,
            n_threads,
            pin: self.pin(),
            exact: self.exact,
            cache: (self.cache_type_k, self.cache_type_v),
            engine,
            devices: self.devices(),
        })
    }
}
