//! The plan: which form, mask and normalizer every layer and head uses.

mod file;

pub use file::PlanFile;

use std::ops::Range;
use std::sync::Arc;

use crate::arch::Hparams;
use crate::bad_usage;
use crate::error::Result;
use crate::mask::{self, Mask};
use crate::merge::{self, Form};
use crate::normalizer::{self, Choice};

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
    pub form: &'static dyn Form,
    /// Which keys are seen.
    pub mask: &'static dyn Mask,
    /// Indexed by query head.
    pub normalizers: Vec<Choice>,
    /// Added to the output of a head, if anything is: what a swapped normalizer takes away or adds on
    /// average. Indexed by query head, each `[value_dim]`
    pub means: Vec<Option<Arc<[f32]>>>,
}

impl Plan {
    /// The model as trained: `split`, `causal`, `softmax`.
    pub fn trained(hparams: &Hparams) -> Result<Plan> {
        let (form, mask) = (merge::find("split")?, mask::find("causal")?);
        let softmax = Choice::of(normalizer::find("softmax")?);
        let layer = |n_head| LayerPlan {
            form,
            mask,
            normalizers: vec![softmax.clone(); n_head],
            means: vec![None; n_head],
        };
        Ok(Plan { layers: hparams.layers.iter().map(|l| layer(l.n_head)).collect() })
    }

    /// Chooses normalizers: `NAME[:key=value,..]` for all heads, or several of
    /// `LAYERS[.HEADS]=NAME[:key=value,..]` with `;` between them, later ones over earlier ones. Layers
    /// and heads are `*`, a number, or two with `-` between them, both included.
    pub fn set_normalizers(&mut self, text: &str) -> Result<()> {
        for item in text.split(';').map(str::trim).filter(|item| !item.is_empty()) {
            let is_selector = |c: char| c.is_ascii_digit() || " *-.".contains(c);
            let (selector, choice) = match item.split_once('=') {
                Some((before, after)) if before.chars().all(is_selector) => (before, after),
                _ => ("*", item),
            };
            let choice = Choice::parse(choice)?;
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

    /// What is in use, each once, as reports carry it: normalizers with their parameters, forms, masks.
    pub fn names(&self) -> [String; 3] {
        let once = |names: &mut dyn Iterator<Item = String>| {
            let mut seen: Vec<String> = Vec::new();
            for name in names {
                if !seen.contains(&name) {
                    seen.push(name);
                }
            }
            seen.join("+")
        };
        let layers = &self.layers;
        [
            once(&mut layers.iter().flat_map(|l| l.normalizers.iter().map(Choice::text))),
            once(&mut layers.iter().map(|l| l.form.name().to_string())),
            once(&mut layers.iter().map(|l| l.mask.name().to_string())),
        ]
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
