//! Tensor types: sizes, reading and writing.

use std::ffi::c_void;

use crate::{sys, text};

/// A type of tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Type(pub(crate) sys::ggml_type);

impl Type {
    /// 32-bit floats.
    pub const F32: Type = Type(sys::GGML_TYPE_F32);
    /// 16-bit floats.
    pub const F16: Type = Type(sys::GGML_TYPE_F16);
    /// 32-bit integers.
    pub const I32: Type = Type(sys::GGML_TYPE_I32);
    /// 64-bit integers.
    pub const I64: Type = Type(sys::GGML_TYPE_I64);

    /// All of them.
    pub fn all() -> impl Iterator<Item = Type> {
        (0..sys::GGML_TYPE_COUNT).filter_map(Type::from_id)
    }

    /// The type of this number in files; numbers of removed types have none.
    pub fn from_id(id: u32) -> Option<Type> {
        let ty = Type(id);
        (id < sys::GGML_TYPE_COUNT && ty.block() > 0 && ty.block_bytes() > 0).then_some(ty)
    }

    /// Its number in files.
    pub fn id(self) -> u32 {
        self.0
    }

    /// Its name, as ggml writes it.
    pub fn name(self) -> String {
        // SAFETY: any type that is in the table has a name.
        text(unsafe { sys::ggml_type_name(self.0) })
    }

    /// Elements of a block.
    pub fn block(self) -> usize {
        // SAFETY: as above.
        unsafe { sys::ggml_blck_size(self.0) as usize }
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        // SAFETY: as above.
        unsafe { sys::ggml_type_size(self.0) }
    }

    /// Bytes of a row of `n` elements, whole blocks.
    pub fn row_bytes(self, n: usize) -> usize {
        n / self.block() * self.block_bytes()
    }

    /// Whether elements are not stored one by one.
    pub fn is_quantized(self) -> bool {
        // SAFETY: as above.
        unsafe { sys::ggml_is_quantized(self.0) }
    }

    /// Whether rows can be read as floats.
    pub fn is_readable(self) -> bool {
        self == Type::F32 || self.traits().to_float.is_some()
    }

    fn traits(self) -> sys::ggml_type_traits {
        // SAFETY: as above; the table is constant.
        unsafe { *sys::ggml_get_type_traits(self.0) }
    }

    /// Reads whole blocks as floats; false where the type cannot be read or sizes do not agree.
    pub fn dequantize(self, blocks: &[u8], out: &mut [f32]) -> bool {
        let fits = out.len().is_multiple_of(self.block())
            && blocks.len() == out.len() / self.block() * self.block_bytes();
        match self.traits().to_float {
            _ if !fits => false,
            _ if self == Type::F32 => {
                for (x, bytes) in out.iter_mut().zip(blocks.as_chunks().0) {
                    *x = f32::from_le_bytes(*bytes);
                }
                true
            }
            Some(read) => {
                // Blocks have 2-byte and 4-byte members.
                let mut words = vec![0u64; blocks.len().div_ceil(8)];
                // SAFETY: as many bytes are there on both sides; blocks and floats were counted.
                unsafe {
                    let copy = words.as_mut_ptr().cast::<u8>();
                    copy.copy_from_nonoverlapping(blocks.as_ptr(), blocks.len());
                    read(copy.cast::<c_void>(), out.as_mut_ptr(), out.len() as i64);
                }
                true
            }
            None => false,
        }
    }

    /// What writes this type, if anything does.
    pub fn quantizer(self) -> Option<Quantizer> {
        let is_written = match self.0 {
            sys::GGML_TYPE_F32 | sys::GGML_TYPE_F16 | sys::GGML_TYPE_BF16 => true,
            // Those that only activations are rounded to.
            sys::GGML_TYPE_Q8_1 | sys::GGML_TYPE_Q8_K => false,
            _ => self.is_quantized(),
        };
        is_written.then(|| {
            // SAFETY: makes tables that quantizing needs, once.
            unsafe { sys::ggml_quantize_init(self.0) };
            Quantizer(self)
        })
    }

    /// The dot product of two rows as the CPU computes it: `weights` in this type, `floats` rounded to
    /// the type that goes with it. None where there is no such product or sizes do not agree.
    pub fn dot(self, weights: &[u8], floats: &[f32]) -> Option<f32> {
        let n = floats.len();
        if !n.is_multiple_of(self.block()) || weights.len() != self.row_bytes(n) {
            return None;
        }
        // SAFETY: sets up tables once; the traits are constant; buffers are as large as rows.
        unsafe {
            sys::ggml_cpu_init();
            let traits = &*sys::ggml_get_type_traits_cpu(self.0);
            let other = Type(traits.vec_dot_type);
            let (dot, round) =
                (traits.vec_dot?, (*sys::ggml_get_type_traits_cpu(other.0)).from_float);
            if !n.is_multiple_of(other.block()) {
                return None;
            }
            let mut rounded = vec![0u64; other.row_bytes(n).div_ceil(8)];
            let rounded_at = rounded.as_mut_ptr().cast::<c_void>();
            match round {
                _ if other == Type::F32 => {
                    rounded_at.cast::<f32>().copy_from_nonoverlapping(floats.as_ptr(), n);
                }
                round => (round?)(floats.as_ptr(), rounded_at, n as i64),
            }
            let mut copy = vec![0u64; weights.len().div_ceil(8)];
            let copy_at = copy.as_mut_ptr().cast::<u8>();
            copy_at.copy_from_nonoverlapping(weights.as_ptr(), weights.len());
            let mut sum = 0.0;
            dot(n as i32, &mut sum, 0, copy_at.cast::<c_void>(), 0, rounded_at, 0, 1);
            Some(sum)
        }
    }
}

/// Writes rows in a type.
#[derive(Debug, Clone, Copy)]
pub struct Quantizer(Type);

impl Quantizer {
    /// Whether it cannot do without the importance of columns.
    pub fn needs_importance(self) -> bool {
        // SAFETY: any type that is in the table.
        unsafe { sys::ggml_quantize_requires_imatrix(self.0.0) }
    }

    /// Rows of `n` floats each as blocks; `importance` has one number for each column. None where sizes
    /// do not agree, or importance is missing.
    pub fn quantize(self, rows: &[f32], n: usize, importance: Option<&[f32]>) -> Option<Vec<u8>> {
        let fits = n > 0
            && n.is_multiple_of(self.0.block())
            && rows.len().is_multiple_of(n)
            && importance.is_none_or(|i| i.len() == n);
        if !fits || (importance.is_none() && self.needs_importance()) {
            return None;
        }
        let n_rows = rows.len() / n;
        let size = n_rows * self.0.row_bytes(n);
        // Blocks have 2-byte and 4-byte members.
        let mut words = vec![0u64; size.div_ceil(8)];
        let importance = importance.map_or(std::ptr::null(), <[f32]>::as_ptr);
        // SAFETY: rows, importance and the output have the sizes that are said here.
        unsafe {
            let out = words.as_mut_ptr().cast::<c_void>();
            let (n_rows, n) = (n_rows as i64, n as i64);
            sys::ggml_quantize_chunk(self.0.0, rows.as_ptr(), out, 0, n_rows, n, importance);
            Some(std::slice::from_raw_parts(words.as_ptr().cast::<u8>(), size).to_vec())
        }
    }

    /// Whether what it has written holds only numbers that are finite; says on stderr where not.
    pub fn is_valid(self, blocks: &[u8]) -> bool {
        // Blocks have 2-byte and 4-byte members.
        let mut words = vec![0u64; blocks.len().div_ceil(8)];
        // SAFETY: as many bytes are there on both sides; ggml checks that blocks are whole.
        unsafe {
            let copy = words.as_mut_ptr().cast::<u8>();
            copy.copy_from_nonoverlapping(blocks.as_ptr(), blocks.len());
            sys::ggml_validate_row_data(self.0.0, copy.cast::<c_void>(), blocks.len())
        }
    }
}
