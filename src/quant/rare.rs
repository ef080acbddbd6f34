//! Formats that few files have, read by ggml.

/// Reads whole blocks of the type with this number.
pub(super) fn read<const ID: u32>(blocks: &[u8], out: &mut [f32]) {
    let ty = ggml::Type::from_id(ID);
    let is_read = ty.is_some_and(|ty| ty.dequantize(blocks, out));
    assert!(is_read, "{} bytes for {} elements of type {ID}", blocks.len(), out.len());
}
