//! Matrices as they lie in files, with what is added to them.

use super::Lora;
use crate::bad_file;
use crate::error::{Result, excerpt};
use crate::gguf::{Bytes, Tensor};
use crate::quant::{self, Format};

/// A matrix in its format: `n_out` rows of `n_in` elements.
#[derive(Clone)]
pub struct Weight {
    /// How a row is read.
    pub format: &'static Format,
    /// Elements of a row.
    pub n_in: usize,
    /// Rows.
    pub n_out: usize,
    /// What is added to it.
    pub loras: Vec<Lora>,
    pub(super) bytes: Bytes,
}

/// A matrix with its bias. `[n_out]`
pub struct Linear {
    /// The matrix.
    pub weight: Weight,
    /// Added to its product.
    pub bias: Option<Vec<f32>>,
}

/// How a tensor's rows are read.
pub(super) fn format_of(tensor: &Tensor) -> Result<&'static Format> {
    match quant::format_of(tensor.ty.id) {
        Some(format) => Ok(format),
        None => {
            let why = match quant::is_rare(tensor.ty) {
                true => "which only a build with the feature ggml reads",
                false => "which cannot be computed with",
            };
            bad_file!(
                "tensor \"{}\" is {}, {why}; readable: {}",
                excerpt(&tensor.name),
                tensor.ty.name,
                quant::readable()
            )
        }
    }
}

impl Weight {
    /// A matrix to which nothing is added.
    pub(super) fn new(format: &'static Format, [n_in, n_out]: [usize; 2], bytes: Bytes) -> Weight {
        Weight { format, n_in, n_out, loras: Vec::new(), bytes }
    }

    /// The bytes of one row, without what is added to it.
    pub fn row(&self, i: usize) -> &[u8] {
        let n = self.format.row_bytes(self.n_in);
        &self.bytes[i * n..(i + 1) * n]
    }

    /// The bytes of all rows, without what is added to them.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The numbers of one row, with what is added to it. `[n_in]`
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        self.format.dequantize(self.row(i), out);
        self.loras.iter().for_each(|lora| lora.add_row(i, out));
    }

    /// Rows `start..start + n_out` as a matrix of their own.
    pub(super) fn rows(&self, start: usize, n_out: usize) -> Result<Weight> {
        let n = self.format.row_bytes(self.n_in);
        let Some(bytes) = self.bytes.slice(start * n..(start + n_out) * n) else {
            bad_file!("a matrix of {} rows; expected {} or more", self.n_out, start + n_out);
        };
        let loras = self.loras.iter().map(|lora| lora.rows(start, n_out));
        Ok(Weight { n_out, bytes, loras: loras.collect::<Result<_>>()?, ..self.clone() })
    }
}

impl Linear {
    /// Rows `start..start + n_out` as a matrix of their own.
    pub(super) fn rows(&self, start: usize, n_out: usize) -> Result<Linear> {
        let weight = self.weight.rows(start, n_out)?;
        Ok(Linear { weight, bias: self.bias.as_ref().map(|b| b[start..start + n_out].to_vec()) })
    }
}
