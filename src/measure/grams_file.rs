//! Grams in a file, so that a text need not be read again: a GGUF with tensors in F64, which loses nothing.

use std::path::Path;

use faer::Mat;

use crate::bad_file;
use crate::error::Result;
use crate::gguf::{Bytes, Data, Gguf, Writer};
use crate::merge::{Geometry, Grams};
use crate::quant::type_of;

/// Says what the Grams are of.
const OF: &str = "qkov.grams.of";
/// The number of F64 among types of GGUF.
const F64: u32 = 28;

/// The Grams in a file, if they are of this; none if there is no file, or it has those of something
/// else. Refuses any other file.
pub fn read<'a>(
    path: &Path,
    of: &str,
    layers: impl Iterator<Item = &'a Geometry>,
) -> Result<Option<Vec<Grams>>> {
    if !path.exists() {
        return Ok(None);
    }
    let gguf = Gguf::open(path)?;
    match gguf.str(OF)? {
        None => bad_file!("{}: not a file of Grams, and not to be overwritten", path.display()),
        Some(found) if found != of => return Ok(None),
        Some(_) => {}
    }
    let grams = layers.enumerate().map(|(i, g)| layer(&gguf, i, g));
    grams.collect::<Result<_>>().map(Some).map_err(|e| e.at(path))
}

/// Writes a file of Grams, over one that is there.
pub fn write(path: &Path, of: &str, layers: &[Grams]) -> Result<()> {
    let mut writer = Writer::new();
    writer.set(OF, of)?;
    for (i, grams) in layers.iter().enumerate() {
        let Grams { queries, keys, outputs, key_means, value_means, output_means } = grams;
        for (part, grams) in [("queries", queries), ("keys", keys), ("outputs", outputs)] {
            for (head, gram) in grams.iter().enumerate() {
                let rows = gram.row_iter().flat_map(|row| row.iter().copied());
                let dims = [gram.ncols() as u64, gram.nrows() as u64];
                tensor(&mut writer, &name(i, part, head), &dims, rows)?;
            }
        }
        let means = [
            ("key_means", key_means),
            ("value_means", value_means),
            ("output_means", output_means),
        ];
        for (part, means) in means {
            for (head, mean) in means.iter().enumerate() {
                let dims = [mean.len() as u64];
                tensor(&mut writer, &name(i, part, head), &dims, mean.iter().copied())?;
            }
        }
    }
    writer.write(path)
}

fn name(layer: usize, part: &str, head: usize) -> String {
    format!("blk.{layer}.{part}.{head}")
}

fn tensor(
    writer: &mut Writer,
    name: &str,
    dims: &[u64],
    elements: impl Iterator<Item = f64>,
) -> Result<()> {
    let Some(ty) = type_of(F64) else { bad_file!("there is no type {F64}") };
    let bytes: Vec<u8> = elements.flat_map(f64::to_le_bytes).collect();
    writer.tensor(name, ty, dims, Data::View(Bytes::from(bytes)))
}

/// The Grams of a layer of this shape.
fn layer(gguf: &Gguf, i: usize, g: &Geometry) -> Result<Grams> {
    let row = |part: &str, head: usize, n: usize| elements(gguf, &name(i, part, head), n);
    let gram = |part: &str, head: usize, n: usize| {
        let elements = row(part, head, n * n)?;
        Ok(Mat::from_fn(n, n, |i, j| elements[i * n + j]))
    };
    let kv = || g.kv.iter().enumerate();
    let outputs = || (0..g.n_head).map(|h| (h, g.outputs(h).len()));
    Ok(Grams {
        queries: kv().map(|(h, kv)| gram("queries", h, kv.score_dim)).collect::<Result<_>>()?,
        keys: kv().map(|(h, kv)| gram("keys", h, kv.score_dim)).collect::<Result<_>>()?,
        outputs: outputs().map(|(h, n)| gram("outputs", h, n)).collect::<Result<_>>()?,
        key_means: kv().map(|(h, kv)| row("key_means", h, kv.score_dim)).collect::<Result<_>>()?,
        value_means: kv()
            .map(|(h, kv)| row("value_means", h, kv.value_dim))
            .collect::<Result<_>>()?,
        output_means: outputs().map(|(h, n)| row("output_means", h, n)).collect::<Result<_>>()?,
    })
}

fn elements(gguf: &Gguf, name: &str, n: usize) -> Result<Vec<f64>> {
    let Some(tensor) = gguf.tensor(name) else { bad_file!("no tensor \"{name}\"") };
    if tensor.ty.id != F64 || tensor.n_elements() != n as u64 {
        let (n_found, ty) = (tensor.n_elements(), tensor.ty.name);
        bad_file!("tensor \"{name}\" has {n_found} elements of type {ty}; allowed {n} of F64");
    }
    let data = gguf.data(tensor);
    let elements: Vec<f64> =
        data.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect();
    match elements.iter().all(|x| x.is_finite()) {
        true => Ok(elements),
        false => bad_file!("tensor \"{name}\" has elements that are not finite"),
    }
}
