//! Recordings of heads as arrays for other programs, with TransformerLens's names and axes.

use std::io::{Cursor, Write};

use safetensors::tensor::{Dtype, TensorView};
use zip::ZipWriter;
use zip::write::SimpleFileOptions;

use super::record::Record;
use crate::error::{Error, Result};

/// An array with its name.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    /// `blocks.LAYER.attn.hook_..`
    pub name: String,
    /// Sizes of its axes, the last one contiguous.
    pub shape: Vec<usize>,
    /// Its elements.
    pub data: Vec<f32>,
}

/// What was recorded of one sequence, in a batch of one: scores and patterns
/// `[1, head, query, key]`, values `[1, position, kv head, value_dim]`, outputs
/// `[1, position, head, value_dim]`. Query heads share kv heads in groups of `per_kv`.
pub fn arrays(records: &[Record], per_kv: usize) -> Vec<Array> {
    let mut arrays = Vec::new();
    for Record { layer, heads } in records {
        let n = heads.first().map_or(0, |h| h.scores.len().isqrt());
        let mut add = |name: &str, shape: [usize; 3], data: Vec<f32>| {
            let name = format!("blocks.{layer}.attn.hook_{name}");
            arrays.push(Array { name, shape: [&[1], &shape[..]].concat(), data });
        };
        let all = |of: fn(&super::record::HeadRecord) -> &[f32]| -> Vec<f32> {
            heads.iter().flat_map(of).copied().collect()
        };
        add("attn_scores", [heads.len(), n, n], all(|h| &h.scores));
        add("pattern", [heads.len(), n, n], all(|h| &h.weights));
        let values: Vec<&[f32]> = heads.iter().step_by(per_kv).map(|h| &h.values[..]).collect();
        let outputs: Vec<&[f32]> = heads.iter().map(|h| &h.outputs[..]).collect();
        for (name, of_heads) in [("v", values), ("z", outputs)] {
            let dim = of_heads.first().map_or(0, |h| h.len() / n.max(1));
            let rows = (0..n).flat_map(|t| of_heads.iter().map(move |h| &h[t * dim..][..dim]));
            add(name, [n, of_heads.len(), dim], rows.flatten().copied().collect());
        }
    }
    arrays
}

/// Arrays as NumPy reads them, `.npz` without compression.
pub fn npz(arrays: &[Array]) -> Result<Vec<u8>> {
    let failed = |e: std::io::Error| Error::Runtime(format!("cannot write arrays: {e}"));
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for array in arrays {
        // Large: beyond 4 GB, too.
        let options = SimpleFileOptions::default().large_file(true);
        zip.start_file(format!("{}.npy", array.name), options).map_err(|e| failed(e.into()))?;
        zip.write_all(&npy_header(&array.shape)).map_err(failed)?;
        zip.write_all(&bytes(array)).map_err(failed)?;
    }
    Ok(zip.finish().map_err(|e| failed(e.into()))?.into_inner())
}

/// What precedes the elements of a `.npy` file (NumPy, `numpy.lib.format`, version 1.0): a literal of
/// Python, padded so that elements begin at a multiple of 64 bytes.
fn npy_header(shape: &[usize]) -> Vec<u8> {
    let shape: String = shape.iter().map(|n| format!("{n}, ")).collect();
    let text = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape})}}");
    let len = (10 + text.len() + 1).next_multiple_of(64) - 10;
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend((len as u16).to_le_bytes());
    header.extend(format!("{text:<0$}\n", len - 1).bytes());
    header
}

fn bytes(array: &Array) -> Vec<u8> {
    array.data.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// Arrays as safetensors.
pub fn safetensors(arrays: &[Array]) -> Result<Vec<u8>> {
    let failed = |e| Error::Runtime(format!("cannot write arrays: {e}"));
    let data: Vec<Vec<u8>> = arrays.iter().map(bytes).collect();
    let views = arrays.iter().zip(&data).map(|(array, data)| {
        let view = TensorView::new(Dtype::F32, array.shape.clone(), data).map_err(failed)?;
        Ok((array.name.as_str(), view))
    });
    let views: Vec<_> = views.collect::<Result<_>>()?;
    safetensors::serialize(views, None).map_err(failed)
}
