//! Giving a model's layers other forms: the file is rewritten, with what the forms need.

use crate::bad_usage;
use crate::error::Result;
use crate::gguf::Gguf;
use crate::merge::{Grams, Trained};
use crate::model::{Model, NewLayer};
use crate::plan::Plan;
use crate::quant::Format;

/// Layers whose form `plan` changes.
pub fn changed(model: &Model, plan: &Plan) -> Vec<usize> {
    let pairs = model.plan.layers.iter().zip(&plan.layers).enumerate();
    pairs.filter(|(_, (old, new))| old.form.text() != new.form.text()).map(|(i, _)| i).collect()
}

/// Whether the forms of `plan` are made with what heads make of a text.
pub fn needs_grams(model: &Model, plan: &Plan) -> bool {
    changed(model, plan).into_iter().any(|i| {
        let form = &plan.layers[i].form;
        form.form().needs_grams(form)
    })
}

/// Refuses forms that a layer cannot have.
pub fn check(model: &Model, plan: &Plan) -> Result<()> {
    for i in changed(model, plan) {
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
    let layer =
        |layer: &crate::plan::LayerPlan| NewLayer { form: layer.form.clone(), rewritten: None };
    let mut layers: Vec<NewLayer> = plan.layers.iter().map(layer).collect();
    let mut rest = changed(model, plan);
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

/// The file of a model whose layers have the forms of `plan`, in memory.
pub fn rewritten(
    model: &Model,
    plan: &Plan,
    grams: &[Grams],
    round: Option<&'static Format>,
) -> Result<Gguf> {
    model.rewritten(&new_layers(model, plan, grams)?, round)
}
