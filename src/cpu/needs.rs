//! What a model takes on this engine, told without making the engine.

use super::kernels::LAYOUTS;
use super::lora::LoraMatrix;
use super::weights::{linears, packed};
use crate::error::Result;
use crate::model::{Model, Weight};

/// What a model takes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Needs {
    /// Bytes of weights that a token reads.
    pub weight_bytes: usize,
    /// Bytes of the copy of weights that is made when the engine starts.
    pub copied_bytes: usize,
    /// Bytes of weights that are read where the file is mapped: all experts, formats without a layout.
    pub mapped_bytes: usize,
    /// Products of weights and activations that a token needs.
    pub n_products: usize,
    /// Those of them that are of 8-bit integers.
    pub n_integer: usize,
    /// Bytes of weights that a token reads in formats without a layout, which are decoded to floats
    /// again for every product, by format.
    pub decoded: Vec<(&'static str, usize)>,
}

impl Needs {
    /// What an engine for `model` would take; `exact` as in [`super::Engine::new`].
    pub fn of(model: &Model, exact: bool) -> Result<Needs> {
        let mut needs = Needs::default();
        for (i, layer) in model.layers.iter().enumerate() {
            let map = model.value_map(i, &model.attention[i], exact)?;
            linears(layer, &map).for_each(|l| needs.copy(&l.weight, exact));
            let n_used = model.hparams.experts.map_or(0, |e| e.n_used);
            for (i, expert) in layer.experts.iter().flat_map(|e| e.all.iter().enumerate()) {
                let matrices = expert.gate.iter().chain([&expert.up, &expert.down]);
                for w in matrices.chain(&expert.share).map(|l| &l.weight) {
                    needs.mapped_bytes += in_file(w);
                    if i < n_used {
                        needs.read(w, in_file(w), exact);
                    }
                }
            }
        }
        model.output.iter().for_each(|w| needs.copy(w, exact));
        Ok(needs)
    }

    /// Adds a matrix that is copied if it has a layout.
    fn copy(&mut self, w: &Weight, exact: bool) {
        let bytes = packed(w, exact).map(|(_, bytes)| bytes);
        match bytes {
            Some(bytes) => self.copied_bytes += bytes,
            None => self.mapped_bytes += in_file(w),
        }
        self.read(w, bytes.unwrap_or(in_file(w)), exact);
    }

    /// Adds what a token does with a matrix of so many bytes.
    fn read(&mut self, w: &Weight, bytes: usize, exact: bool) {
        let lora = LoraMatrix::of(w);
        let rank: usize = w.loras.iter().map(|lora| lora.rank()).sum();
        let n = w.n_in * w.n_out;
        self.weight_bytes += bytes + lora.map_or(0, |lora| lora.n_bytes());
        self.n_products += n + rank * (w.n_in + w.n_out);
        match packed(w, exact) {
            Some((layout, _)) if LAYOUTS[layout].integer => self.n_integer += n,
            Some(_) => {}
            None => {
                let name = w.format.ty.name;
                match self.decoded.iter_mut().find(|(known, _)| *known == name) {
                    Some((_, all)) => *all += bytes,
                    None => self.decoded.push((name, bytes)),
                }
            }
        }
    }
}

fn in_file(w: &Weight) -> usize {
    w.format.row_bytes(w.n_in) * w.n_out
}
