//! Files with their matrices in smaller types, as llama.cpp's quantizer makes them: ggml rounds, and
//! [`KINDS`] and a table say to what.

mod kinds;
mod mix;

pub use kinds::{KINDS, Kind, kind_named};

use std::collections::HashMap;
use std::path::Path;

use fancy_regex::Regex;
use rayon::prelude::*;

use crate::error::{Error, Result, excerpt};
use crate::gguf::{Bytes, Data, Gguf, Sink, Tensor, Value, Writer};
use crate::quant::{self, Type};
use crate::{bad_file, bad_usage};
use mix::{Mix, is_embedding, layer_of, needs_importance, that_fits};

/// Elements of a piece that one thread rounds.
const PIECE: usize = 1 << 15;
/// Pieces that are in memory at once.
const PIECES: usize = 256;
/// The version of ggml's types (`GGML_QNT_VERSION`).
const VERSION: u32 = 2;

/// Means of squared inputs by names of matrices: a number for each column, and for each of several
/// matrices in a tensor. `[n_matrices, n_in]`
pub type Importance = HashMap<String, Vec<f32>>;

/// What is asked for.
pub struct Settings<'a> {
    /// The kind of file.
    pub kind: &'static Kind,
    /// The type of the output, and of embeddings that are the output as well.
    pub output: Option<&'static Type>,
    /// The type of embeddings of tokens.
    pub embedding: Option<&'static Type>,
    /// Types of tensors whose names these are found in; the first counts.
    pub chosen: &'a [(Regex, &'static Type)],
    /// Whether all matrices get the kind's own type.
    pub pure: bool,
    /// Whether matrices may be rounded that are rounded already.
    pub again: bool,
    /// What columns matter for.
    pub importance: Option<&'a Importance>,
}

/// What becomes of a tensor.
pub struct Step<'a> {
    /// The tensor.
    pub tensor: &'a Tensor,
    /// Its new type, or its own.
    pub new: &'static Type,
    /// The type that it would have if its rows were whole blocks of that.
    pub wanted: &'static Type,
    /// What its columns matter, where it is rounded and that is known.
    importance: Option<&'a [f32]>,
    /// Whether that has to be known.
    pub needs_importance: bool,
}

/// What becomes of a file.
pub struct Plan<'a> {
    gguf: &'a Gguf,
    kind: &'static Kind,
    /// The tensors, in the order of the new file.
    pub steps: Vec<Step<'a>>,
}

/// The type of this name, in any case, if ggml can write it.
pub fn writable(name: &str) -> Result<&'static Type> {
    let can = |ty: &&Type| rounding(ty).is_ok();
    match quant::TYPES.iter().filter(can).find(|ty| ty.name.eq_ignore_ascii_case(name)) {
        Some(ty) => Ok(ty),
        None => {
            let all: Vec<_> = quant::TYPES.iter().filter(can).map(|ty| ty.name).collect();
            bad_usage!("type \"{name}\" cannot be written; allowed {}", all.join(", "))
        }
    }
}

/// What rounds to a type.
fn rounding(ty: &Type) -> Result<ggml::Quantizer> {
    match ggml::Type::from_id(ty.id).and_then(ggml::Type::quantizer) {
        Some(quantizer) => Ok(quantizer),
        None => bad_usage!("type {} cannot be written", ty.name),
    }
}

/// Whether floats, even short ones, are stored one by one.
fn is_floats(ty: &Type) -> bool {
    ["F32", "F16", "BF16"].contains(&ty.name)
}

impl<'a> Plan<'a> {
    /// Decides what becomes of every tensor of a file.
    pub fn new(gguf: &'a Gguf, settings: &Settings<'a>) -> Result<Plan<'a>> {
        let mut mix = Mix::new(gguf, settings.kind, settings.importance.is_some())?;
        let mut tensors: Vec<&Tensor> = gguf.tensors().iter().collect();
        // llama.cpp's order, which rules that count depend on.
        tensors.sort_by_key(|t| (layer_of(&t.name).map(|i| i + 1), &t.name));
        let mut steps = Vec::new();
        for tensor in tensors {
            let wanted = match mix.changes(tensor) {
                true => settings.type_of(tensor, &mut mix)?,
                false => tensor.ty,
            };
            // What is asked for by name, or in floats, is taken as it is.
            let is_asked = settings.of_place(tensor).is_some();
            let new = match is_floats(settings.kind.base) || is_asked || wanted == tensor.ty {
                true => wanted,
                false => that_fits(tensor, wanted)?,
            };
            steps.push(settings.step(tensor, (new, wanted))?);
        }
        Ok(Plan { gguf, kind: settings.kind, steps })
    }

    /// Bytes of all tensors in the new file.
    pub fn n_bytes(&self) -> u64 {
        self.steps.iter().map(Step::n_bytes).sum()
    }

    /// Refuses a plan that lacks importance.
    pub fn check(&self) -> Result<()> {
        let lacks = |step: &&Step| step.needs_importance && step.importance.is_none();
        match self.steps.iter().find(lacks) {
            None => Ok(()),
            Some(step) => bad_usage!(
                "{}: tensor \"{}\" as {} is of no use without an importance matrix that has it; see --imatrix",
                self.kind.name,
                excerpt(&step.tensor.name),
                step.new.name
            ),
        }
    }

    /// Names of tensors that are rounded although the importance that is there has nothing of them.
    pub fn unknown(&self) -> impl Iterator<Item = &str> {
        let rounded = self.steps.iter().filter(|step| step.changes() && !is_floats(step.new));
        rounded.filter(|s| s.importance.is_none()).map(|s| s.tensor.name.as_str())
    }

    /// Writes the file, over one that is there, with all keys of the old one and with `keys`.
    /// `progress` gets bytes of old tensors that are done.
    pub fn write(
        self,
        path: &Path,
        keys: &[(&str, Value)],
        progress: &(dyn Fn(usize) + Sync),
    ) -> Result<()> {
        self.check()?;
        let mut writer = Writer::new();
        writer.copy_metadata(self.gguf)?;
        let own = [
            ("general.quantization_version", VERSION.into()),
            ("general.file_type", self.kind.id.into()),
        ];
        for (key, value) in own.iter().chain(keys) {
            writer.remove(key);
            writer.set(key, *value)?;
        }
        for step in self.steps {
            let (Tensor { name, dims, .. }, new) = (step.tensor, step.new);
            let data = self.gguf.data(step.tensor);
            let source = match step.changes() {
                true => Data::stream(move |out| step.round(&data, out, progress)),
                false => Data::stream(move |out| {
                    out(&data)?;
                    progress(data.len());
                    Ok(())
                }),
            };
            writer.tensor(name, new, dims, source)?;
        }
        writer.write(path)
    }
}

impl<'a> Settings<'a> {
    /// The type that was asked for what a tensor is.
    fn of_place(&self, tensor: &Tensor) -> Option<&'static Type> {
        let is_named = || tensor.name.starts_with("per_layer") && self.chosen(tensor).is_some();
        match tensor.name.as_str() {
            "output.weight" => self.output,
            name if is_embedding(name) && !is_named() => self.embedding,
            _ => None,
        }
    }

    /// The type that was asked for a tensor's name.
    fn chosen(&self, tensor: &Tensor) -> Option<&'static Type> {
        let is_found = |pattern: &Regex| pattern.is_match(&tensor.name).unwrap_or(false);
        self.chosen.iter().find(|(pattern, _)| is_found(pattern)).map(|(_, ty)| *ty)
    }

    /// The type of a tensor that gets one, rows being whole blocks of it or not.
    fn type_of(&self, tensor: &Tensor, mix: &mut Mix) -> Result<&'static Type> {
        let base = self.kind.base;
        if let Some(ty) = self.of_place(tensor) {
            return Ok(ty);
        }
        if is_floats(base) {
            return Ok(base);
        }
        match self.chosen(tensor) {
            Some(ty) => Ok(ty),
            None if self.pure => Ok(base),
            None => match self.output.filter(|_| mix.is_tied_output(tensor)) {
                Some(ty) => Ok(ty),
                None => mix.next(tensor),
            },
        }
    }

    fn step(
        &self,
        tensor: &'a Tensor,
        (new, wanted): (&'static Type, &'static Type),
    ) -> Result<Step<'a>> {
        let name = excerpt(&tensor.name);
        let mut step = Step { tensor, new, wanted, importance: None, needs_importance: false };
        if !step.changes() {
            return Ok(step);
        }
        let old = ggml::Type::from_id(tensor.ty.id).filter(|ty| ty.is_readable());
        let Some(old) = old else {
            bad_file!("tensor \"{name}\" is {}, which cannot be read as numbers", tensor.ty.name);
        };
        if old.is_quantized() && !self.again {
            bad_usage!(
                "tensor \"{name}\" is rounded to {} already; --allow-requantize rounds it again, which costs \
                 more than rounding once",
                tensor.ty.name
            );
        }
        if !tensor.dims[0].is_multiple_of(new.block_len as u64) {
            bad_usage!(
                "tensor \"{name}\" has rows of {} elements, not whole blocks of {} ({})",
                tensor.dims[0],
                new.block_len,
                new.name
            );
        }
        step.needs_importance =
            needs_importance(&tensor.name, new, self.kind) || rounding(new)?.needs_importance();
        let Some(all) = self.importance.and_then(|all| all.get(&tensor.name)) else {
            return Ok(step);
        };
        let n = tensor.dims[0] * tensor.dims.get(2).copied().unwrap_or(1);
        match all.len() as u64 == n {
            true => step.importance = Some(all),
            // Rows of embeddings are looked up, not multiplied: a file may have anything of them.
            false if is_embedding(&tensor.name) => {}
            false => bad_usage!(
                "the importance matrix has {} columns for tensor \"{name}\", which has {n}: is it of another model?",
                all.len()
            ),
        }
        Ok(step)
    }
}

impl Step<'_> {
    /// Whether the tensor gets another type.
    pub fn changes(&self) -> bool {
        self.new != self.tensor.ty
    }

    /// Bytes of the tensor in the new file.
    pub fn n_bytes(&self) -> u64 {
        self.tensor.n_elements() / self.new.block_len as u64 * self.new.block_bytes as u64
    }

    /// Rounds the tensor, some rows at a time.
    fn round(&self, data: &Bytes, out: &mut Sink, progress: &dyn Fn(usize)) -> Result<()> {
        let dims = &self.tensor.dims;
        let (n, n_rows) = (dims[0] as usize, dims[1] as usize);
        let n_matrices = dims[2..].iter().product::<u64>() as usize;
        // Whole rows of one matrix, each of which has importance of its own.
        let step = (PIECE / n.max(1)).max(1);
        let pieces: Vec<(usize, usize, usize)> = (0..n_matrices)
            .flat_map(|m| (0..n_rows).step_by(step).map(move |r| (m, r, step.min(n_rows - r))))
            .collect();
        let (old, new) = (ggml::Type::from_id(self.tensor.ty.id), rounding(self.new)?);
        let Some(old) = old else { return Err(self.failed("cannot be read")) };
        let row = old.row_bytes(n);
        for pieces in pieces.chunks(PIECES) {
            let round = |(m, first, count): &(usize, usize, usize)| {
                let start = (m * n_rows + first) * row;
                let bytes = &data[start..start + count * row];
                let mut floats = vec![0.0; count * n];
                if !old.dequantize(bytes, &mut floats) {
                    return Err(self.failed("cannot be read"));
                }
                // ggml looks for the nearest point of a lattice, and ends the process if there is none.
                if !floats.iter().all(|x| x.is_finite()) {
                    bad_file!(
                        "tensor \"{}\" has elements that are not finite",
                        excerpt(&self.tensor.name)
                    );
                }
                let importance = self.importance.map(|all| &all[m * n..(m + 1) * n]);
                match new.quantize(&floats, n, importance) {
                    Some(bytes) if new.is_valid(&bytes) => Ok(bytes),
                    Some(_) => Err(self.failed("has elements too large for it")),
                    None => Err(self.failed("cannot be written")),
                }
            };
            // All, so that it is the first error in the file that is told.
            let all: Vec<Result<Vec<u8>>> = pieces.par_iter().map(round).collect();
            for bytes in all {
                out(&bytes?)?;
            }
            progress(pieces.iter().map(|(_, _, count)| count * row).sum());
        }
        Ok(())
    }

    fn failed(&self, why: &str) -> Error {
        let (name, new) = (excerpt(&self.tensor.name), self.new.name);
        Error::File(format!("tensor \"{name}\" as {new}: {why}"))
    }
}
