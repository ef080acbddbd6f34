//! One form at several ranks: what is lost, and what is gained.

use super::forms::{grams_for, rewritten, with_share};
use super::latency::{duel, median};
use super::quality::{Base, MAX_BASE_BYTES, Windows, evaluate};
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::model::Model;
use crate::plan::Plan;
use crate::session::Session;

/// Shares of all elements of heads that are tried.
const RATIOS: [f32; 8] = [1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125];
/// Tokens one by one, and rounds, that are timed.
const N_GEN: usize = 32;
const N_ROUNDS: usize = 3;

/// What a form costs at one rank, beside the model as trained.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// The form.
    pub form: String,
    /// Divergence from the model as trained, nats per token.
    pub kl: f64,
    /// Perplexity.
    pub ppl: f64,
    /// Size of the weights.
    pub weight_bytes: f64,
    /// Size of a token in the cache.
    pub cache_bytes: f64,
    /// Speed of reading a prompt, over that of the model as trained.
    pub prefill: f64,
    /// The same of tokens one by one.
    pub decode: f64,
}

/// What is to be measured.
pub struct Sweep {
    plans: Vec<Plan>,
    fitting: Vec<Vec<u32>>,
    windows: Windows,
}

impl Sweep {
    /// The ranks of a form such as `lowrank`; the texts are for making it, and for judging it.
    pub fn new(
        model: &Model,
        form: &str,
        (fitting, windows): (Vec<Vec<u32>>, Windows),
    ) -> Result<Sweep> {
        let plan = |ratio: &f32| -> Result<Plan> {
            let mut plan = model.trained.clone();
            plan.set_forms(form)?;
            for layer in &mut plan.layers {
                let Some(form) = with_share(&layer.form, *ratio) else {
                    bad_usage!("--sweep: the form {} has no ranks", layer.form.form().name());
                };
                layer.form = form;
            }
            super::forms::check(model, &plan)?;
            Ok(plan)
        };
        let plans = RATIOS.iter().map(plan).collect::<Result<_>>()?;
        Ok(Sweep { plans, fitting, windows })
    }

    /// Ranks.
    pub fn len(&self) -> usize {
        self.plans.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.plans.is_empty()
    }

    /// Tokens that sessions need room for.
    pub fn n_ctx(&self) -> usize {
        self.windows.n_ctx
    }

    /// Measures. `trained` makes a session of the model as trained, `open` one of a rewritten file.
    pub fn run(
        &self,
        trained: &dyn Fn() -> Result<Session>,
        open: &dyn Fn(Gguf) -> Result<Session>,
        progress: &mut dyn FnMut(),
    ) -> Result<Vec<Point>> {
        let mut session = trained()?;
        let base = Base::in_memory(&mut session, &self.windows, MAX_BASE_BYTES, &mut |_| {})?;
        let Some(mut base) = base else { bad_usage!("--form-tokens: too many for a sweep") };
        // What they need does not depend on the rank.
        let grams = grams_for(&mut session, &self.plans[0], &self.fitting, &mut |_| {})?;
        let as_trained = session.model().trained.clone();
        let mut points = Vec::new();
        for plan in &self.plans {
            let mut own = open(rewritten(session.model(), plan, &grams, None)?)?;
            let quality = evaluate(&mut own, &self.windows, Some(&mut base), None, &mut |_| {})?;
            let plans = [&as_trained, &own.model().plan.clone()];
            let n_gen = N_GEN.min(self.n_ctx() / 2);
            let tokens = &self.windows.tokens()[..self.n_ctx()];
            let weight_bytes = own.model().n_bytes() as f64;
            let cache_bytes = own.cache_bytes() as f64 / own.n_ctx() as f64;
            let texts = tokens.split_at(tokens.len() - n_gen);
            let duel = duel((&mut session, Some(&mut own)), plans, texts, N_ROUNDS)?;
            points.push(Point {
                form: plan.names()[1].clone(),
                kl: quality.divergence.as_ref().map_or(f64::NAN, |d| d.kl.mean.value),
                ppl: quality.ppl.value,
                weight_bytes,
                cache_bytes,
                prefill: median(&duel.prefill().ratios),
                decode: median(&duel.decode().ratios),
            });
            progress();
        }
        Ok(points)
    }
}
