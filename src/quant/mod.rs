//! Tensor formats: how numbers are laid out in a GGUF file, and how to read them back.
//!
//! Block layouts are those of ggml (`ggml-common.h`, `ggml-quants.c`).

mod float;
mod iq4;
mod k;
mod legacy;
mod mxfp4;
mod random;
#[cfg(feature = "ggml")]
mod rare;

use crate::simd;

/// A tensor type of the GGUF format: its number in the file, its name and its block geometry.
/// Numbers and sizes: ggml's type table (`ggml.h`, `ggml-common.h`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Type {
    /// The number that stands for the type in a file.
    pub id: u32,
    /// The name, as ggml writes it.
    pub name: &'static str,
    /// Elements in one block; a row is a whole number of blocks.
    pub block_len: usize,
    /// Bytes of one block.
    pub block_bytes: usize,
}

const fn ty(id: u32, name: &'static str, block_len: usize, block_bytes: usize) -> Type {
    Type { id, name, block_len, block_bytes }
}

/// Every type that a current file can hold, also those that qkov can only list.
pub static TYPES: &[Type] = &[
    ty(0, "F32", 1, 4),
    ty(1, "F16", 1, 2),
    ty(2, "Q4_0", 32, 18),
    ty(3, "Q4_1", 32, 20),
    ty(6, "Q5_0", 32, 22),
    ty(7, "Q5_1", 32, 24),
    ty(8, "Q8_0", 32, 34),
    ty(9, "Q8_1", 32, 36),
    ty(10, "Q2_K", 256, 84),
    ty(11, "Q3_K", 256, 110),
    ty(12, "Q4_K", 256, 144),
    ty(13, "Q5_K", 256, 176),
    ty(14, "Q6_K", 256, 210),
    ty(15, "Q8_K", 256, 292),
    ty(16, "IQ2_XXS", 256, 66),
    ty(17, "IQ2_XS", 256, 74),
    ty(18, "IQ3_XXS", 256, 98),
    ty(19, "IQ1_S", 256, 50),
    ty(20, "IQ4_NL", 32, 18),
    ty(21, "IQ3_S", 256, 110),
    ty(22, "IQ2_S", 256, 82),
    ty(23, "IQ4_XS", 256, 136),
    ty(24, "I8", 1, 1),
    ty(25, "I16", 1, 2),
    ty(26, "I32", 1, 4),
    ty(27, "I64", 1, 8),
    ty(28, "F64", 1, 8),
    ty(29, "IQ1_M", 256, 56),
    ty(30, "BF16", 1, 2),
    ty(34, "TQ1_0", 256, 54),
    ty(35, "TQ2_0", 256, 66),
    ty(39, "MXFP4", 32, 17),
    ty(40, "NVFP4", 64, 36),
    ty(41, "Q1_0", 128, 18),
    ty(42, "Q2_0", 64, 18),
];

/// Types that ggml reads for us, where it is built in.
const RARE: [&str; 12] = [
    "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "NVFP4",
    "Q1_0", "Q2_0",
];

/// The type with this number, if there is one.
pub fn type_of(id: u32) -> Option<&'static Type> {
    TYPES.iter().find(|t| t.id == id)
}

/// What rounds whole blocks of numbers to bytes.
type Encode = fn(&[f32], &mut [u8]);

/// A type that can be computed with.
pub struct Format {
    /// Its number, name and geometry.
    pub ty: &'static Type,
    /// Where the numbers lie that a block's size hangs on.
    pub scales: Scales,
    /// Reads whole blocks, at any address.
    decode: fn(&[u8], &mut [f32]),
    /// Writes whole blocks; only of formats that can be made.
    encode: Option<Encode>,
}

/// The floating-point numbers of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scales {
    /// Every element is one.
    None,
    /// Half-precision ones, at these bytes.
    Halves(&'static [usize]),
    /// The same, where elements are a few times as large at most.
    Units(&'static [usize]),
    /// A half-precision one whose digits to base 16 are the upper halves of these bytes, lowest first.
    Digits([usize; 4]),
    /// A power of two, whose exponent is the first byte.
    Exponent,
    /// 8-bit ones without a sign, 4 bits of exponent and 3 more (UE4M3): as many first bytes.
    Bytes(usize),
}

/// The type of this name; the program does not compile with a name that is not in the table.
const fn format(name: &str, scales: Scales, decode: fn(&[u8], &mut [f32])) -> Format {
    let mut i = 0;
    while !same(TYPES[i].name.as_bytes(), name.as_bytes()) {
        i += 1;
    }
    Format { ty: &TYPES[i], scales, decode, encode: None }
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

/// Every readable format.
pub static FORMATS: &[Format] = &[
    format("F32", Scales::None, float::f32).writable(float::to_f32),
    format("F16", Scales::None, float::f16).writable(float::to_f16),
    format("BF16", Scales::None, float::bf16).writable(float::to_bf16),
    format("Q4_0", Scales::Halves(&[0]), legacy::q4_0).writable(legacy::to_q4_0),
    format("Q4_1", Scales::Halves(&[0, 2]), legacy::q4_1).writable(legacy::to_q4_1),
    format("Q5_0", Scales::Halves(&[0]), legacy::q5_0).writable(legacy::to_q5_0),
    format("Q5_1", Scales::Halves(&[0, 2]), legacy::q5_1).writable(legacy::to_q5_1),
    format("Q8_0", Scales::Halves(&[0]), legacy::q8_0).writable(legacy::to_q8_0),
    format("Q2_K", Scales::Halves(&[80, 82]), k::q2_k).writable(k::to_q2_k),
    format("Q3_K", Scales::Halves(&[108]), k::q3_k).writable(k::to_q3_k),
    format("Q4_K", Scales::Halves(&[0, 2]), k::q4_k).writable(k::to_q4_k),
    format("Q5_K", Scales::Halves(&[0, 2]), k::q5_k).writable(k::to_q5_k),
    format("Q6_K", Scales::Halves(&[208]), k::q6_k).writable(k::to_q6_k),
    format("IQ4_NL", Scales::Halves(&[0]), iq4::iq4_nl),
    format("IQ4_XS", Scales::Halves(&[0]), iq4::iq4_xs),
    format("MXFP4", Scales::Exponent, mxfp4::mxfp4),
    #[cfg(feature = "ggml")]
    format("IQ2_XXS", Scales::Halves(&[0]), rare::read::<16>),
    #[cfg(feature = "ggml")]
    format("IQ2_XS", Scales::Halves(&[0]), rare::read::<17>),
    #[cfg(feature = "ggml")]
    format("IQ2_S", Scales::Halves(&[0]), rare::read::<22>),
    #[cfg(feature = "ggml")]
    format("IQ3_XXS", Scales::Halves(&[0]), rare::read::<18>),
    #[cfg(feature = "ggml")]
    format("IQ3_S", Scales::Halves(&[0]), rare::read::<21>),
    #[cfg(feature = "ggml")]
    format("IQ1_S", Scales::Halves(&[0]), rare::read::<19>),
    #[cfg(feature = "ggml")]
    format("IQ1_M", Scales::Digits([49, 51, 53, 55]), rare::read::<29>),
    #[cfg(feature = "ggml")]
    format("TQ1_0", Scales::Units(&[52]), rare::read::<34>),
    #[cfg(feature = "ggml")]
    format("TQ2_0", Scales::Units(&[64]), rare::read::<35>),
    #[cfg(feature = "ggml")]
    format("NVFP4", Scales::Bytes(4), rare::read::<40>),
    #[cfg(feature = "ggml")]
    format("Q1_0", Scales::Units(&[0]), rare::read::<41>),
    #[cfg(feature = "ggml")]
    format("Q2_0", Scales::Units(&[0]), rare::read::<42>),
];

/// The format with this number, if it can be read.
pub fn format_of(id: u32) -> Option<&'static Format> {
    FORMATS.iter().find(|f| f.ty.id == id)
}

/// The format of this name, if it can be read.
pub fn format_named(name: &str) -> Option<&'static Format> {
    FORMATS.iter().find(|f| f.ty.name == name)
}

/// The names of all readable formats.
pub fn readable() -> String {
    FORMATS.iter().map(|f| f.ty.name).collect::<Vec<_>>().join(", ")
}

/// Whether a build with the feature `ggml` reads a type, and any other does not.
pub fn is_rare(ty: &Type) -> bool {
    RARE.contains(&ty.name)
}

impl Format {
    const fn writable(self, encode: Encode) -> Format {
        Format { encode: Some(encode), ..self }
    }

    /// Bytes of a row of `n` elements, which must be whole blocks.
    pub fn row_bytes(&self, n: usize) -> usize {
        n / self.ty.block_len * self.ty.block_bytes
    }

    /// Reads a row. `out` is as long as the row.
    pub fn dequantize(&self, row: &[u8], out: &mut [f32]) {
        (self.decode)(row, out);
    }

    /// Bits per element.
    pub fn bits(&self) -> f64 {
        self.ty.block_bytes as f64 * 8.0 / self.ty.block_len as f64
    }

    /// Whether [`Format::quantize`] can write it.
    pub fn can_quantize(&self) -> bool {
        self.encode.is_some()
    }

    /// Writes a row, which must be whole blocks. `out` has [`Format::row_bytes`] bytes, which stay as
    /// they are where the format cannot be written.
    pub fn quantize(&self, row: &[f32], out: &mut [u8]) {
        if let Some(encode) = self.encode {
            encode(row, out);
        }
    }

    /// The dot product of a row with `x`, of the same length: exactly [`simd::dot`] of what
    /// [`Format::dequantize`] gives. The definition that faster products are checked against.
    pub fn dot(&self, row: &[u8], x: &[f32]) -> f32 {
        let mut floats = vec![0.0; x.len()];
        self.dequantize(row, &mut floats);
        simd::dot(&floats, x)
    }
}

/// A half-precision number of a block, as ggml stores its scales.
fn half(bytes: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32()
}

/// Stores a half-precision number where [`half`] reads it.
fn put_half(x: f32, out: &mut [u8]) {
    out.copy_from_slice(&half::f16::from_f32(x).to_le_bytes());
}
