//! Kinds of files: names and numbers of llama.cpp's `llama_ftype` (`llama.h`), and what each is mostly of.

use crate::quant::{TYPES, Type};

/// What a quantized file is mostly of.
#[derive(Debug, PartialEq, Eq)]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// Its number in `general.file_type`.
    pub id: u32,
    /// The type that most matrices get.
    pub base: &'static Type,
}

/// The type of this name; the program does not compile with a name that is not in the table.
pub(super) const fn ty(name: &str) -> &'static Type {
    let mut i = 0;
    while !is_same(TYPES[i].name.as_bytes(), name.as_bytes()) {
        i += 1;
    }
    &TYPES[i]
}

pub(super) const fn is_same(a: &[u8], b: &[u8]) -> bool {
    let mut i = 0;
    while i < a.len() && i < b.len() && a[i] == b[i] {
        i += 1;
    }
    i == a.len() && i == b.len()
}

const fn kind(name: &'static str, id: u32, base: &str) -> Kind {
    Kind { name, id, base: ty(base) }
}

/// Every kind, from the smallest to the largest.
pub static KINDS: &[Kind] = &[
    kind("Q1_0", 40, "Q1_0"),
    kind("IQ1_S", 24, "IQ1_S"),
    kind("TQ1_0", 36, "TQ1_0"),
    kind("IQ1_M", 31, "IQ1_M"),
    kind("IQ2_XXS", 19, "IQ2_XXS"),
    kind("TQ2_0", 37, "TQ2_0"),
    kind("Q2_0", 41, "Q2_0"),
    kind("IQ2_XS", 20, "IQ2_XS"),
    kind("IQ2_S", 28, "IQ2_XS"),
    kind("IQ2_M", 29, "IQ2_S"),
    kind("Q2_K_S", 21, "Q2_K"),
    kind("Q2_K", 10, "Q2_K"),
    kind("IQ3_XXS", 23, "IQ3_XXS"),
    kind("IQ3_XS", 22, "IQ3_S"),
    kind("IQ3_S", 26, "IQ3_S"),
    kind("Q3_K_S", 11, "Q3_K"),
    kind("IQ3_M", 27, "IQ3_S"),
    kind("Q3_K_M", 12, "Q3_K"),
    kind("Q3_K_L", 13, "Q3_K"),
    kind("MXFP4_MOE", 38, "MXFP4"),
    kind("IQ4_XS", 30, "IQ4_XS"),
    kind("IQ4_NL", 25, "IQ4_NL"),
    kind("Q4_0", 2, "Q4_0"),
    kind("Q4_K_S", 14, "Q4_K"),
    kind("Q4_K_M", 15, "Q4_K"),
    kind("Q4_1", 3, "Q4_1"),
    kind("Q5_0", 8, "Q5_0"),
    kind("Q5_K_S", 16, "Q5_K"),
    kind("Q5_K_M", 17, "Q5_K"),
    kind("Q5_1", 9, "Q5_1"),
    kind("Q6_K", 18, "Q6_K"),
    kind("Q8_0", 7, "Q8_0"),
    kind("F16", 1, "F16"),
    kind("BF16", 32, "BF16"),
    kind("F32", 0, "F32"),
];

/// Names that stand for a kind of another name.
const ALIASES: [(&str, &str); 3] = [("Q3_K", "Q3_K_M"), ("Q4_K", "Q4_K_M"), ("Q5_K", "Q5_K_M")];

/// The kind of this name, in any case.
pub fn kind_named(name: &str) -> Option<&'static Kind> {
    let is = |other: &str| other.eq_ignore_ascii_case(name);
    let alias = ALIASES.iter().find(|(alias, _)| is(alias));
    let name = alias.map_or(name, |(_, name)| name);
    KINDS.iter().find(|kind| kind.name.eq_ignore_ascii_case(name))
}
