//! How scores become weights: in one operation with attention, or by the processor, row by row.

use ggml::Tensor;

use super::pass::{MaskKind, Pass};
use crate::attention::Attention;
use crate::normalizer::Choice;

/// What softmax is changed by.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Softmax {
    /// Factor on scores.
    pub(super) factor: f32,
    /// Bound of scores.
    pub(super) softcap: Option<f32>,
    /// Logits of what takes weight and gives nothing, of each head.
    pub(super) sinks: Option<Vec<f32>>,
}

impl Softmax {
    /// What the normalizers of a layer are, if ggml's attention can do it.
    pub(super) fn of(attention: &Attention) -> Option<Softmax> {
        let all: Option<Vec<_>> = attention.normalizers().iter().map(one_of).collect();
        let all = all?;
        let (first, ..) = *all.first()?;
        let (factor, softcap) = (first.factor, first.softcap);
        if all.iter().any(|(other, _)| *other != first) {
            return None;
        }
        // ggml bounds scores that have their factor, and then adds what is lost by distance.
        let is_biased = !attention.slopes().is_empty();
        let softcap = match (attention.softcap(), softcap) {
            (Some(_), Some(_)) => return None,
            (Some(_), None) if factor != 1.0 => return None,
            (cap, own) => cap.or(own),
        };
        if is_biased && (factor != 1.0 || softcap.is_some()) {
            return None;
        }
        let has_sinks = all.iter().any(|(_, sink)| *sink != f32::NEG_INFINITY);
        let sinks = has_sinks.then(|| all.iter().map(|(_, sink)| *sink).collect());
        Some(Softmax { factor, softcap, sinks })
    }

    /// Whether weights of a row sum to 1.
    pub(super) fn sums_to_one(&self) -> bool {
        self.sinks.is_none()
    }
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Map {
    factor: f32,
    softcap: Option<f32>,
}

/// What a normalizer does to scores before softmax, and its sink.
fn one_of(choice: &Choice) -> Option<(Map, f32)> {
    if !choice.is_plain() {
        return None;
    }
    let value = |name: &str| choice.value(name);
    let none = f32::NEG_INFINITY;
    let (factor, softcap, sink) = match choice.kind().name {
        "softmax" => (1.0, None, none),
        "temperature" => (1.0 / value("tau")?, None, none),
        "softermax" => (std::f32::consts::LN_2, None, none),
        "yarn" => ((0.1 * value("f")?.ln() + 1.0).powi(2), None, none),
        "softcap" => (1.0, Some(value("cap")?), none),
        "softmax1" => (1.0, None, 0.0),
        "softmax_n" => (1.0, None, value("n")?.ln()),
        "sink" => (1.0, None, value("s")?),
        _ => return None,
    };
    Some((Map { factor, softcap }, sink))
}

impl Pass<'_> {
    /// Weights of scores `[keys, tokens, n_head]` of the tokens from `first` on and the heads from
    /// `head` on, scaled, by the processor.
    pub(super) fn weighed_by_rows(
        &mut self,
        layer: usize,
        (head, first): (usize, usize),
        scores: Tensor,
    ) -> Tensor {
        if !self.by_rows.contains(&layer) {
            self.by_rows.push(layer);
        }
        let attention = self.model.attention[layer].clone();
        let batch = self.batch.clone();
        let [_, n, ..] = self.graph.shape(scores).dims;
        self.graph.rows(scores, move |row, scores| {
            let Ok(batch) = batch.read() else { return };
            let (head, position) = (head + row / n, batch.n_past + first + row % n);
            let seen = attention.visible(position, &batch.prompt);
            let [a, b] = seen.ranges();
            let mut own: Vec<f32> = [&scores[a.clone()], &scores[b.clone()]].concat();
            attention.weigh((position, &seen), head, &mut own);
            scores.fill(0.0);
            seen.spread(&own, scores);
        })
    }

    /// A mask of a layer.
    pub(super) fn mask(&mut self, layer: usize, kind: MaskKind) -> Tensor {
        let attention = &self.model.attention;
        let known = self
            .inputs
            .masks
            .iter()
            .find(|mask| mask.kind == kind && attention[mask.layer].sees_as(&attention[layer]));
        if let Some(mask) = known {
            return mask.tensor;
        }
        let tensor = self.graph.input(kind.shape(&self.sizes));
        self.inputs.masks.push(super::pass::Mask { layer, kind, tensor });
        tensor
    }
}
