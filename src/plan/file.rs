//! Plan files: what every layer and head uses, with fitted constants, in TOML.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Plan;
use crate::arch::Hparams;
use crate::bad_file;
use crate::bad_usage;
use crate::error::{Error, Result};

/// The version of the format that is read and written.
const FORMAT: u32 = 1;

/// What a plan file says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanFile {
    /// Version of the format.
    format: u32,
    /// The model that it was fitted to, see [`crate::gguf::Gguf::hash`]; without it, any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Normalizers, as [`Plan::set_normalizers`] reads them, later ones over earlier ones.
    pub norm: Vec<String>,
    /// Forms, as [`Plan::set_forms`] reads them; the model is to be opened with them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub form: Vec<String>,
    /// Masks, as [`Plan::set_masks`] reads them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mask: Vec<String>,
    /// By `LAYER.HEAD`, what is added to the head's output. `[value_dim]`
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    means: BTreeMap<String, Vec<f64>>,
}

impl PlanFile {
    /// Reads a file's text.
    pub fn parse(text: &str) -> Result<PlanFile> {
        let file: PlanFile = toml::from_str(text).map_err(|e| {
            let line = e.span().map_or(0, |s| text[..s.start.min(text.len())].lines().count());
            Error::File(format!("not a plan: line {}: {}", line.max(1), e.message()))
        })?;
        if file.format != FORMAT {
            bad_file!("plan of format {}; this program reads {FORMAT}", file.format);
        }
        Ok(file)
    }

    /// What `plan` says about a model of this hash, and differs from `trained`.
    pub fn of(plan: &Plan, trained: &Plan, model: &str) -> PlanFile {
        let (mut norm, mut form, mut mask) = (Vec::new(), Vec::new(), Vec::new());
        let mut means = BTreeMap::new();
        for (i, (layer, trained)) in plan.layers.iter().zip(&trained.layers).enumerate() {
            if layer.mask.text() != trained.mask.text() {
                mask.push(format!("{i}={}", layer.mask.text()));
            }
            if layer.form.text() != trained.form.text() {
                form.push(format!("{i}={}", layer.form.text()));
            }
            for (h, choice) in layer.normalizers.iter().enumerate() {
                if choice.text() != trained.normalizers[h].text() {
                    norm.push(format!("{i}.{h}={}", choice.text()));
                }
                if let Some(mean) = &layer.means[h] {
                    means.insert(format!("{i}.{h}"), mean.iter().map(|x| short(*x)).collect());
                }
            }
        }
        PlanFile { format: FORMAT, model: Some(model.into()), norm, form, mask, means }
    }

    /// The file's text.
    pub fn text(&self) -> Result<String> {
        toml::to_string_pretty(self).map_err(|e| Error::Runtime(format!("plan file: {e}")))
    }

    /// Changes a plan of a model with this hash and these hyper-parameters.
    pub fn apply(&self, plan: &mut Plan, model: &str, hparams: &Hparams) -> Result<()> {
        if let Some(fitted) = &self.model
            && fitted != model
        {
            bad_usage!("the plan was fitted to a model with hash {fitted}; this one has {model}");
        }
        let mut wanted = plan.clone();
        wanted.set_forms(&self.form.join(";"))?;
        if let Some(i) = plan.other_forms(&wanted).first() {
            bad_usage!(
                "the plan is for layer {i} in the form {}; the model has it as {}",
                wanted.layers[*i].form.text(),
                plan.layers[*i].form.text()
            );
        }
        for text in &self.norm {
            plan.set_normalizers(text)?;
        }
        // Together, because some are for all layers or none.
        plan.set_masks(&self.mask.join(";"))?;
        for (at, mean) in &self.means {
            let place = at.split_once('.').and_then(|(layer, head)| {
                let (i, head) = (layer.parse::<usize>().ok()?, head.parse::<usize>().ok()?);
                let layer = plan.layers.get_mut(i).filter(|layer| head < layer.means.len())?;
                let dim = layer.form.form().geometry(hparams, &hparams.layers[i]).outputs(head);
                Some((layer.means.get_mut(head)?, dim.len()))
            });
            let Some((place, value_dim)) = place else {
                bad_usage!("the plan has a mean for head \"{at}\", which the model does not have");
            };
            if mean.len() != value_dim || mean.iter().any(|x| !x.is_finite()) {
                bad_usage!(
                    "the plan's mean for head {at} has {} numbers; allowed {value_dim} finite ones",
                    mean.len()
                );
            }
            *place = Some(Arc::from_iter(mean.iter().map(|x| *x as f32)));
        }
        Ok(())
    }
}

/// A number with as many digits as matter, so that it is written short.
fn short(x: f32) -> f64 {
    format!("{x:.3e}").parse().unwrap_or(f64::from(x))
}
