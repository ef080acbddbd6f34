//! Tensor formats: how numbers are laid out in a GGUF file, and how to read them back.

/// A tensor type of the GGUF format: its number in the file, its name and its block geometry.
/// Numbers and sizes: ggml's type table (`ggml.h`, `ggml-common.h`).
#[derive(Debug, PartialEq, Eq)]
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
];

/// The type with this number, if there is one.
pub fn type_of(id: u32) -> Option<&'static Type> {
    TYPES.iter().find(|t| t.id == id)
}
