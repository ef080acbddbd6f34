//! Yardsticks: what rounding the same weights to a smaller format costs, for a feeling of size.

use crate::bad_usage;
use crate::error::Result;
use crate::gguf::{Bytes, Data, Gguf, Tensor, Writer};
use crate::quant::{self, FORMATS, Format};

/// Whether a tensor is a matrix whose rows a format can hold. Positions stay as they are, as
/// `llama-quantize --pure` leaves them.
fn fits(tensor: &Tensor, format: &Format) -> bool {
    let is_matrix = tensor.dims.len() == 2 && tensor.dims[1] > 1;
    let whole = tensor.dims[0].is_multiple_of(format.ty.block_len as u64);
    is_matrix
        && whole
        && tensor.name != "position_embd.weight"
        && quant::format_of(tensor.ty.id).is_some()
}

/// Formats that can be written and take less room than the model's matrices do, largest first.
pub fn smaller_formats(gguf: &Gguf) -> Vec<&'static Format> {
    let is_smaller = |format: &&Format| {
        let matrices = || gguf.tensors().iter().filter(|t| fits(t, format));
        let n: u64 = matrices().map(|t| t.n_elements()).sum();
        let own: usize = matrices().map(|t| 8 * t.n_bytes()).sum();
        // Rounding to a format that is as large would tell something else.
        let rounds = format.can_quantize() && format.ty.block_len > 1;
        rounds && format.bits() < 0.99 * own as f64 / n as f64
    };
    let mut formats: Vec<_> = FORMATS.iter().filter(is_smaller).collect();
    formats.sort_by(|a, b| b.bits().total_cmp(&a.bits()));
    formats
}

/// The same file with all matrices rounded to `format`, in memory.
pub fn requantized(gguf: &Gguf, format: &'static Format) -> Result<Gguf> {
    let mut writer = Writer::new();
    writer.copy_metadata(gguf)?;
    for tensor in gguf.tensors() {
        if !fits(tensor, format) {
            writer.copy_tensor(gguf, tensor)?;
            continue;
        }
        let Some(from) = quant::format_of(tensor.ty.id) else {
            bad_usage!("tensor \"{}\" cannot be read", tensor.name);
        };
        let n = tensor.dims[0] as usize;
        let data = gguf.data(tensor);
        let rows = Data::stream(move |sink| {
            let (mut floats, mut out) = (vec![0.0; n], vec![0; format.row_bytes(n)]);
            data.chunks_exact(from.row_bytes(n)).try_for_each(|row| {
                from.dequantize(row, &mut floats);
                format.quantize(&floats, &mut out);
                sink(&out)
            })
        });
        writer.tensor(&tensor.name, format.ty, &tensor.dims, rows)?;
    }
    let mut rounded = Gguf::parse(Bytes::from(writer.to_bytes()?))?;
    rounded.adapters.clone_from(&gguf.adapters);
    Ok(rounded)
}
