//! The plan: which form, mask and normalizer every layer and head uses.

mod file;

pub use file::PlanFile;

use std::ops::Range;
use std::sync::Arc;

use crate::arch::Hparams;
use crate::bad_usage;
use crate::error::Result;
use crate::mask;
use crate::merge;
use crate::normalizer;

/// One choice per layer.
#[derive(Clone)]
pub struct Plan {
    /// Indexed by layer.
    pub layers: Vec<LayerPlan>,
}

/// The choices of one layer.
#[derive(Clone)]
pub struct LayerPlan {
    /// How attention is factored.
    pub form: merge::Choice,
    /// Which keys are seen.
    pub mask: mask::Choice,
    /// Indexed by query head.
    pub normalizers: Vec<normalizer::Choice>,
    /// Added to the output of a head, if anything is: what a swapped normalizer takes away or adds on
    /// average. Indexed by query head, each `[value_dim]`
    pub means: Vec<Option<Arc<[f32]>>>,
}

impl Plan {
    /// The model as trained: `split`, `softmax`, and `causal`, or, where all tokens of a text see each
    /// other, `prefix`: a text is a prompt.
    pub fn trained(hparams: &Hparams) -> Result<Plan> {
        let form = merge::Choice::of(merge::find("split")?);
        let mask = mask::Choice::of(mask::find(if hparams.causal { "causal" } else { "prefix" })?);
        let softmax = normalizer::Choice::of(normalizer::find("softmax")?);
        let layer = |n_head| LayerPlan {
            form: form.clone(),
            mask: mask.clone(),
            normalizers: vec![softmax.clone(); n_head],
            means: vec![None; n_head],
        };
        Ok(Plan { layers: hparams.layers.iter().map(|l| layer(l.n_head)).collect() })
    }

    /// Chooses normalizers: `NAME[:key=value,..]` for all heads, or several of
    /// `LAYERS[.HEADS]=NAME[:key=value,..]` with `;` between them, later ones over earlier ones. Layers
    /// and heads are `*`, a number, or two with `-` between them, both included.
    pub fn set_normalizers(&mut self, text: &str) -> Result<()> {
        for (selector, choice) in items(text) {
            let choice = normalizer::Choice::parse(choice)?;
            let (layers, heads) = selector.split_once('.').unwrap_or((selector, "*"));
            let n_layer = self.layers.len();
            for layer in &mut self.layers[range("layer", layers, n_layer)?] {
                let heads = range("head", heads, layer.normalizers.len())?;
                layer.normalizers[heads.clone()].fill(choice.clone());
                // They belong to what was there before.
                layer.means[heads].fill(None);
            }
        }
        Ok(())
    }

    /// Chooses forms, as [`Plan::set_normalizers`] does normalizers, but only by layers.
    pub fn set_forms(&mut self, text: &str) -> Result<()> {
        for (selector, choice) in items(text) {
            let choice = merge::Choice::parse(choice)?;
            let layers = whole_layers("form", &choice.text(), selector)?;
            let n_layer = self.layers.len();
            let layers = &mut self.layers[range("layer", layers, n_layer)?];
            layers.iter_mut().for_each(|layer| layer.form = choice.clone());
        }
        Ok(())
    }

    /// Layers that have another form in `other`, a plan for the same model.
    pub fn other_forms(&self, other: &Plan) -> Vec<usize> {
        let pairs = self.layers.iter().zip(&other.layers).enumerate();
        pairs.filter(|(_, (a, b))| a.form.text() != b.form.text()).map(|(i, _)| i).collect()
    }

    /// Chooses masks, as [`Plan::set_normalizers`] does normalizers, but only by layers. A mask that
    /// reads a prompt more than once is for all of them.
    pub fn set_masks(&mut self, text: &str) -> Result<()> {
        let mut layers = self.layers.clone();
        for (selector, choice) in items(text) {
            let choice = mask::Choice::parse(choice)?;
            let selector = whole_layers("mask", &choice.text(), selector)?;
            let n_layer = layers.len();
            layers[range("layer", selector, n_layer)?]
                .iter_mut()
                .for_each(|layer| layer.mask = choice.clone());
        }
        let copies = |layer: &LayerPlan| layer.mask.kind().copies;
        let most = layers.iter().max_by_key(|l| copies(l));
        let other = layers.iter().position(|l| most.is_some_and(|m| copies(m) != copies(l)));
        if let (Some(most), Some(other)) = (most, other) {
            bad_usage!(
                "mask {} is how a prompt is read, for all layers or none; layer {other} has {}",
                most.mask.text(),
                layers[other].mask.text()
            );
        }
        self.layers = layers;
        Ok(())
    }

    /// This plan with the masks of another one for the same model.
    pub fn with_masks_of(&self, other: &Plan) -> Plan {
        let mut plan = self.clone();
        for (layer, other) in plan.layers.iter_mut().zip(&other.layers) {
            layer.mask = other.mask.clone();
        }
        plan
    }

    /// How often a prompt is read.
    pub fn n_copies(&self) -> usize {
        self.layers.first().map_or(1, |l| l.mask.kind().copies)
    }

    /// What is in use, each once, as reports carry it: normalizers, forms, masks, with their
    /// parameters; of more than a few normalizers, only the kinds.
    pub fn names(&self) -> [String; 3] {
        let layers = &self.layers;
        let choices = || layers.iter().flat_map(|l| &l.normalizers);
        let norms = once(choices().map(normalizer::Choice::text));
        let norms = match norms.len() {
            0..=MAX_NAMED => norms.join("+"),
            n => {
                let kinds = once(choices().map(|c| c.kind().name.to_string()));
                format!("{} ({n} settings)", kinds.join("+"))
            }
        };
        let forms = once(layers.iter().map(|l| l.form.text()));
        [norms, forms.join("+"), once(layers.iter().map(|l| l.mask.text())).join("+")]
    }
}

/// Most normalizers that reports name with their parameters.
const MAX_NAMED: usize = 4;

/// Each of some names once, in their order.
fn once(names: impl Iterator<Item = String>) -> Vec<String> {
    let mut seen: Vec<String> = Vec::new();
    for name in names {
        if !seen.contains(&name) {
            seen.push(name);
        }
    }
    seen
}

/// What a text chooses for what: `CHOICE` for everything, or `SELECTOR=CHOICE` with `;` between them.
fn items(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let is_selector = |c: char| c.is_ascii_digit() || " *-.".contains(c);
    text.split(';').map(str::trim).filter(|item| !item.is_empty()).map(move |item| {
        match item.split_once('=') {
            Some((before, after)) if before.chars().all(is_selector) => (before, after),
            _ => ("*", item),
        }
    })
}

/// A selector, unless it tells heads apart.
fn whole_layers<'a>(what: &str, choice: &str, selector: &'a str) -> Result<&'a str> {
    match selector.split_once('.') {
        Some((_, heads)) => {
            bad_usage!("{what} {choice}: heads \"{heads}\"; all heads of a layer have one {what}")
        }
        None => Ok(selector),
    }
}

/// The part of `n` layers or heads that `text` selects.
pub(crate) fn range(what: &str, text: &str, n: usize) -> Result<Range<usize>> {
    let number = |text: &str| text.trim().parse::<usize>().ok().filter(|i| *i < n);
    let ends =
        text.split_once('-').map_or((number(text), number(text)), |(a, b)| (number(a), number(b)));
    match ends {
        _ if text.trim() == "*" => Ok(0..n),
        (Some(first), Some(last)) if first <= last => Ok(first..last + 1),
        _ => bad_usage!(
            "{what} \"{text}\"; allowed *, numbers 0 to {}, or two of them as 0-{}",
            n - 1,
            n - 1
        ),
    }
}
