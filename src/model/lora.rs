//! Adapters: files with what is added to a model's matrices (LoRA, arXiv 2106.09685).
//!
//! Keys, names and shapes are those of llama.cpp's converter. What is added is never rounded to the
//! formats of the matrices: a product with a matrix has a product with its adapter added to it.

use super::weight::format_of;
use super::{Binder, Weight};
use crate::bad_file;
use crate::error::{Result, excerpt};
use crate::gguf::{Gguf, HALVES, Tensor};
use crate::simd;

/// What is added to a matrix: `factor * up * down` (LoRA, section 4.1). To several matrices that lie one
/// after the other, as many halves are added that lie so.
#[derive(Clone)]
pub struct Lora {
    /// The first half. `[rank, n_in]`
    pub down: Weight,
    /// The second half. `[n_out, rank]`
    pub up: Weight,
    /// The adapter's factor, and the scale that was asked for.
    pub factor: f32,
}

/// A kind of file that has adapters for a model, and no model.
const KIND: &str = "adapter";
const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";
/// Where rows are looked up, the halves of what is added to them are in each other's place.
const LOOKED_UP: &str = "token_embd.weight";

impl Lora {
    /// Rows of the first half, and elements of a row of the second.
    pub fn rank(&self) -> usize {
        self.up.n_in
    }

    /// Rows that the second half has for each of several matrices.
    fn rows_of_one(&self) -> usize {
        self.up.n_out / (self.down.n_out / self.rank())
    }

    /// Adds its row to that of the matrix.
    pub(super) fn add_row(&self, i: usize, out: &mut [f32]) {
        let (mut up, mut down) = (vec![0.0; self.rank()], vec![0.0; out.len()]);
        self.up.dequantize_row(i, &mut up);
        let first = i / self.rows_of_one() * self.rank();
        for (j, x) in up.iter().enumerate() {
            self.down.dequantize_row(first + j, &mut down);
            simd::add_scaled(out, self.factor * x, &down);
        }
    }

    /// What is added to rows of one matrix.
    pub(super) fn rows(&self, start: usize, n_out: usize) -> Result<Lora> {
        let first = start / self.rows_of_one() * self.rank();
        let down = self.down.rows(first, self.rank())?;
        Ok(Lora { down, up: self.up.rows(start, n_out)?, factor: self.factor })
    }
}

/// Whether a file has adapters and no model.
pub fn is_adapter(gguf: &Gguf) -> Result<bool> {
    Ok(gguf.str("general.type")? == Some(KIND))
}

/// The file of a model with an adapter beside it, whose effect is multiplied with `scale`. Refuses one
/// that is not for this model.
pub fn adapted(mut gguf: Gguf, adapter: Gguf, scale: f32) -> Result<Gguf> {
    let expected = |key: &str, wanted: &str| -> Result<()> {
        match adapter.str(key)? {
            Some(found) if found == wanted => Ok(()),
            Some(found) => {
                bad_file!(
                    "no adapter for this model: {key} is \"{}\"; expected \"{wanted}\"",
                    excerpt(found)
                )
            }
            None => bad_file!("no adapter for this model: no key \"{key}\"; expected \"{wanted}\""),
        }
    };
    expected("general.type", KIND)?;
    expected("adapter.type", "lora")?;
    expected("general.architecture", gguf.str("general.architecture")?.unwrap_or_default())?;
    if adapter.array(INVOCATION)?.is_some() {
        bad_file!(
            "key \"{INVOCATION}\": an adapter that begins after certain tokens is not supported; \
             expected one for all tokens"
        );
    }
    if adapter.tensors().is_empty() {
        bad_file!("an adapter without tensors");
    }
    for tensor in adapter.tensors() {
        check(&gguf, &adapter, tensor, scale)?;
    }
    gguf.warnings.extend(adapter.warnings.iter().cloned());
    gguf.adapters.push((adapter, scale));
    Ok(gguf)
}

/// Refuses half an adapter that has no place in a model.
fn check(gguf: &Gguf, adapter: &Gguf, tensor: &Tensor, scale: f32) -> Result<()> {
    let shown = excerpt(&tensor.name);
    let half = HALVES.iter().find_map(|half| Some((half, tensor.name.strip_suffix(half)?)));
    let Some((half, name)) = half else {
        bad_file!(
            "tensor \"{shown}\" is no part of an adapter: its name must end in {}",
            HALVES.join(" or ")
        );
    };
    let Some([a, b]) = halves(adapter, name) else {
        let other = HALVES.iter().find(|other| *other != half).unwrap_or(half);
        bad_file!("tensor \"{shown}\" lacks its other half, \"{}{other}\"", excerpt(name));
    };
    let Some(whole) = gguf.tensor(name) else {
        bad_file!("tensor \"{shown}\": the model has no tensor \"{}\"", excerpt(name));
    };
    let turned = name == LOOKED_UP;
    if turned && gguf.tensor("output.weight").is_none() {
        bad_file!(
            "tensor \"{shown}\": embeddings are the output too in this model, for which no adapter is \
             made; allowed where \"output.weight\" is a tensor of its own"
        );
    }
    let [n_in, n_out, n] = shape(whole);
    let rank = if turned { shape(a)[0] } else { shape(a)[1] };
    let wanted = match turned {
        true => [[rank, n_out, n], [rank, n_in, n]],
        false => [[n_in, rank, n], [rank, n_out, n]],
    };
    for (half, wanted) in [a, b].into_iter().zip(wanted) {
        if shape(half) != wanted || rank == 0 {
            bad_file!(
                "tensor \"{}\" has shape {:?}; expected {wanted:?} with a rank of 1 or more, for \"{}\" of \
                 shape {:?}",
                excerpt(&half.name),
                half.dims,
                excerpt(name),
                whole.dims
            );
        }
    }
    format_of(tensor)?;
    match factor(adapter, scale, rank as usize)? {
        factor if factor.is_finite() => Ok(()),
        factor => bad_file!(
            "key \"{ALPHA}\": its factor with a scale of {scale} is {factor}; must be finite"
        ),
    }
}

/// Columns, rows and number of matrices.
fn shape(tensor: &Tensor) -> [u64; 3] {
    let at = |i: usize| tensor.dims.get(i).copied().unwrap_or(1);
    [at(0), at(1), tensor.dims.iter().skip(2).product()]
}

/// The two halves of what is added to the tensor of this name.
fn halves<'a>(adapter: &'a Gguf, name: &str) -> Option<[&'a Tensor; 2]> {
    let [a, b] = HALVES.map(|half| adapter.tensor(&format!("{name}{half}")));
    Some([a?, b?])
}

/// What the product of two halves is multiplied with: `scale * alpha / rank`; without an alpha, `scale`.
fn factor(adapter: &Gguf, scale: f32, rank: usize) -> Result<f32> {
    Ok(match adapter.f32(ALPHA)? {
        None | Some(0.0) => scale,
        Some(alpha) => scale * alpha / rank as f32,
    })
}

impl Binder<'_> {
    /// What is added to the tensor of this name.
    pub(super) fn loras(&self, name: &str) -> Result<Vec<Lora>> {
        let mut loras = Vec::new();
        for (adapter, scale) in &self.gguf.adapters {
            let Some(halves) = halves(adapter, name) else { continue };
            let half = |tensor: &Tensor| -> Result<Weight> {
                let [n_in, n_out, n] = shape(tensor).map(|n| n as usize);
                Ok(Weight::new(format_of(tensor)?, [n_in, n_out * n], adapter.data(tensor)))
            };
            let [a, b] = halves.map(half);
            let (down, up) = match name {
                LOOKED_UP => (b?.turned(1)?, a?),
                _ => (a?, b?),
            };
            let factor = factor(adapter, *scale, up.n_in)?;
            loras.push(Lora { down, up, factor });
        }
        Ok(loras)
    }
}
