//! Giving a model's layers other forms: the file is rewritten, with what the forms need.

use crate::bad_usage;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::measure::grams::gather;
use crate::measure::quality::{Base, Windows, evaluate};
use crate::merge::{self, Grams, Trained};
use crate::model::{Model, NewLayer};
use crate::plan::{LayerPlan, Plan};
use crate::quant::Format;
use crate::session::Session;

/// Whether the forms that `plan` changes are made with what heads make of a text.
pub fn needs_grams(model: &Model, plan: &Plan) -> bool {
    plan.other_forms(&model.plan).into_iter().any(|i| {
        let form = &plan.layers[i].form;
        form.form().needs_grams(form)
    })
}

/// What the heads of the session's model make of sequences, if the forms of a plan need it. `progress`
/// gets the number of sequences read.
pub fn grams_for(
    session: &mut Session,
    plan: &Plan,
    sequences: &[Vec<u32>],
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<Grams>> {
    match needs_grams(session.model(), plan) {
        true => gather(session, sequences, progress),
        false => Ok(Vec::new()),
    }
}

/// Refuses forms that a layer cannot have.
pub fn check(model: &Model, plan: &Plan) -> Result<()> {
    for i in plan.other_forms(&model.plan) {
        let (old, new) = (&model.plan.layers[i].form, &plan.layers[i].form);
        if model.hparams.layers[i].rewritten.is_some() {
            bad_usage!(
                "form {}: layer {i} has been rewritten already, as {}",
                new.text(),
                old.text()
            );
        }
        if let Err(reason) = new.form().applies(new, &model.site(i, &plan.layers[i].normalizers)) {
            bad_usage!("form {}, layer {i}: {reason}", new.text());
        }
    }
    Ok(())
}

/// What becomes of every layer in the forms of `plan`; those that have them already keep theirs.
/// `grams`: of all layers, if the forms need any.
pub fn new_layers(model: &Model, plan: &Plan, grams: &[Grams]) -> Result<Vec<NewLayer>> {
    check(model, plan)?;
    let layer = |layer: &LayerPlan| NewLayer { form: layer.form.clone(), rewritten: None };
    let mut layers: Vec<NewLayer> = plan.layers.iter().map(layer).collect();
    let mut rest = plan.other_forms(&model.plan);
    while let Some(first) = rest.first() {
        let form = plan.layers[*first].form.clone();
        let (same, others): (Vec<usize>, Vec<usize>) =
            rest.iter().partition(|i| plan.layers[**i].form.text() == form.text());
        let weights: Vec<_> = same.iter().map(|i| move || model.weights(*i)).collect();
        let trained = same.iter().zip(&weights).map(|(i, weights)| Trained {
            site: model.site(*i, &plan.layers[*i].normalizers),
            weights,
            grams: grams.get(*i),
        });
        let rewritten = form.form().rewrite(&form, &trained.collect::<Vec<_>>())?;
        for (i, rewritten) in same.into_iter().zip(rewritten) {
            layers[i].rewritten = rewritten;
        }
        rest = others;
    }
    Ok(layers)
}

/// Whether a form of `plan` says how far it may be from the model as trained.
pub fn has_budget(plan: &Plan) -> bool {
    plan.layers.iter().any(|layer| budget(layer) > 0.0)
}

fn budget(layer: &LayerPlan) -> f64 {
    layer.form.value(BUDGET).map_or(0.0, f64::from)
}

/// The parameter that says so, and that which is chosen for it.
const BUDGET: &str = "kl";
const SHARE: &str = "ratio";
/// Shares that are tried are multiples of one over this.
const STEPS: usize = 32;

/// A form that keeps this share, and has no budget; none if it has no shares.
pub fn with_share(choice: &merge::Choice, share: f32) -> Option<merge::Choice> {
    choice.with_values(&[(BUDGET, 0.0), (SHARE, share)]).ok()
}

/// `plan` with the smallest share, the same for all layers that have a budget, that keeps the
/// divergence from the `base` of the model on `windows` within the smallest budget. `open` makes sessions
/// of rewritten files.
pub fn within_budget(
    model: &Model,
    (plan, grams): (&Plan, &[Grams]),
    (base, windows): (&mut Base, &Windows),
    open: &dyn Fn(Gguf) -> Result<Session>,
) -> Result<Plan> {
    let budgets = plan.layers.iter().map(budget).filter(|b| *b > 0.0);
    let most = budgets.fold(f64::INFINITY, f64::min);
    let with = |n: usize| {
        let mut plan = plan.clone();
        for layer in plan.layers.iter_mut().filter(|layer| budget(layer) > 0.0) {
            if let Some(form) = with_share(&layer.form, n as f32 / STEPS as f32) {
                layer.form = form;
            }
        }
        plan
    };
    // Nothing is known to be within the budget but everything.
    let (mut low, mut high) = (STEPS / 8 - 1, STEPS);
    while high - low > 1 {
        let middle = (low + high) / 2;
        let gguf = rewritten(model, &with(middle), grams, None)?;
        let quality = evaluate(&mut open(gguf)?, windows, Some(&mut *base), None, &mut |_| {})?;
        let kl = quality.divergence.map_or(f64::INFINITY, |d| d.kl.mean.value);
        if kl <= most { high = middle } else { low = middle }
    }
    Ok(with(high))
}

/// The file of a model whose layers have the forms of `plan`, in memory.
pub fn rewritten(
    model: &Model,
    plan: &Plan,
    grams: &[Grams],
    round: Option<&'static Format>,
) -> Result<Gguf> {
    model.rewritten(&new_layers(model, plan, grams)?, round)
}
