//! Packed layouts: the rows of a matrix interleaved, so that every lane of a vector has a row.
//!
//! A panel holds [`LANES`] rows, block after block, with every bit that the file has. In a block, the
//! scales of all rows come first, each kind of them as one vector; then the quants, in vectors of
//! [`LANES`] words of 4 bytes: word `r` of vector `j` has elements `4 j .. 4 j + 4` of row `r`. Low
//! and high halves of a byte belong to vectors `j` and `j + 4`. Fifth bits of 32 elements make
//! one vector (bit `j` for vector `j`), fifth and sixth bits two (bits `2 (j % 4)` of vector
//! `j / 4`). So one multiplication serves all rows, nothing is summed across lanes, and the numbers
//! that go into a row's sum come in one order whatever else is computed beside it. Floats are vectors of
//! an element of each row; BF16 of two, so that they fit instructions that add pairs of products.

use super::LANES;
use super::native::{prefetch, transpose};
use crate::quant::Format;

/// A packed layout, one for a tensor format.
pub struct Layout {
    /// The tensor format, by its name; `I8` and `I4` are whole numbers whose scales are elsewhere.
    pub name: &'static str,
    /// Elements of a row in one block.
    pub block_len: usize,
    /// Bytes of one row in one block.
    pub row_bytes: usize,
    /// Whether activations are multiplied as 8-bit integers, else as floats.
    pub integer: bool,
    /// Packs rows of whole blocks into a panel.
    pack: fn(&[&[u8]; LANES], &mut [u8]),
}

/// Every layout; kernels have a table with one entry for each, in this order.
pub static LAYOUTS: &[Layout] = &[
    Layout { name: "F32", block_len: 1, row_bytes: 4, integer: false, pack: words },
    Layout { name: "F16", block_len: 1, row_bytes: 2, integer: false, pack: halves },
    Layout { name: "BF16", block_len: 2, row_bytes: 4, integer: false, pack: words },
    Layout { name: "Q4_0", block_len: 32, row_bytes: 18, integer: true, pack: scaled::<18> },
    Layout { name: "Q4_1", block_len: 32, row_bytes: 20, integer: true, pack: q4_1 },
    Layout { name: "Q5_0", block_len: 32, row_bytes: 22, integer: true, pack: q5_0 },
    Layout { name: "Q5_1", block_len: 32, row_bytes: 24, integer: true, pack: q5_1 },
    Layout { name: "Q8_0", block_len: 32, row_bytes: 34, integer: true, pack: scaled::<34> },
    Layout { name: "IQ4_NL", block_len: 32, row_bytes: 18, integer: true, pack: scaled::<18> },
    Layout { name: "MXFP4", block_len: 32, row_bytes: 17, integer: true, pack: mxfp4 },
    Layout { name: "Q4_K", block_len: 256, row_bytes: 148, integer: true, pack: q4_k },
    Layout { name: "Q5_K", block_len: 256, row_bytes: 180, integer: true, pack: q5_k },
    Layout { name: "Q6_K", block_len: 256, row_bytes: 210, integer: true, pack: q6_k },
    Layout { name: "IQ4_XS", block_len: 256, row_bytes: 138, integer: true, pack: iq4_xs },
    Layout { name: "I8", block_len: 1, row_bytes: 1, integer: false, pack: bytes },
    Layout { name: "I4", block_len: 2, row_bytes: 1, integer: false, pack: i4 },
];

/// The layout of a format: its place in [`LAYOUTS`]. Other formats are read where they lie.
pub fn layout_of(format: &Format) -> Option<usize> {
    LAYOUTS.iter().position(|l| l.name == format.ty.name)
}

impl Layout {
    /// Bytes of a panel of rows of `n_in` elements.
    pub fn panel_bytes(&self, n_in: usize) -> usize {
        n_in / self.block_len * self.row_bytes * LANES
    }

    /// Packs the rows of one panel, at most [`LANES`], each as it lies in the file; missing ones
    /// become zeros.
    pub fn pack_panel<'a>(&self, rows: impl Iterator<Item = &'a [u8]>, out: &mut [u8]) {
        let mut panel: [&[u8]; LANES] = [&[]; LANES];
        let mut n = 0;
        for (to, row) in panel.iter_mut().zip(rows) {
            (*to, n) = (row, n + 1);
        }
        let zeros = vec![0u8; if n < LANES { panel[0].len() } else { 0 }];
        panel[n..].fill(&zeros);
        (self.pack)(&panel, out);
    }
}

/// One block of every row.
type Blocks<'a, const N: usize> = [&'a [u8; N]; LANES];

/// Calls `pack` for each block of `N` bytes of all rows.
#[inline(always)]
fn blocks<const N: usize>(
    rows: &[&[u8]; LANES],
    out: &mut [u8],
    pack: impl Fn(&Blocks<N>, &mut Words),
) {
    let rows = rows.map(|row| row.as_chunks::<N>().0);
    let n_blocks = rows.iter().map(|r| r.len()).min().unwrap_or(0);
    let rows = rows.map(|row| &row[..n_blocks]);
    let mut out = Words(out);
    for i in 0..n_blocks {
        // Written out, as `map` would be a call.
        let [a, b, c, d, e, f, g, h] = rows;
        pack(&[&a[i], &b[i], &c[i], &d[i], &e[i], &f[i], &g[i], &h[i]], &mut out);
        // A share of the next panel's rows, which follow these in a file: eight short rows in turns are
        // not what the processor foresees.
        let next = a.as_ptr().cast::<u8>().wrapping_add((n_blocks + i) * N * LANES);
        (0..N * LANES).step_by(64).for_each(|line| prefetch(next.wrapping_add(line)));
    }
}

/// 16 bytes from `start` on.
#[inline(always)]
fn sixteen(bytes: &[u8], start: usize) -> [u8; 16] {
    bytes[start..].first_chunk().copied().unwrap_or_default()
}

#[inline(always)]
fn word(bytes: &[u8], i: usize) -> u32 {
    let b = &bytes[4 * i..4 * i + 4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Where vectors of one word per row are written, one after the other.
struct Words<'a>(&'a mut [u8]);

impl Words<'_> {
    #[inline(always)]
    fn vector(&mut self, words: Vector) {
        self.bytes(|r| words[r].to_le_bytes());
    }

    /// Four words per row, which lie together there, as four vectors.
    #[inline(always)]
    fn four(&mut self, of_row: impl Fn(usize) -> [u8; 16]) {
        let (vectors, rest) = std::mem::take(&mut self.0).split_at_mut(16 * LANES);
        if let Ok(vectors) = vectors.try_into() {
            transpose(&std::array::from_fn(of_row), vectors);
        }
        self.0 = rest;
    }

    /// `N` bytes per row.
    #[inline(always)]
    fn bytes<const N: usize>(&mut self, of_row: impl Fn(usize) -> [u8; N]) {
        let (vector, rest) = std::mem::take(&mut self.0).split_at_mut(N * LANES);
        for (r, out) in vector.as_chunks_mut::<N>().0.iter_mut().enumerate() {
            *out = of_row(r);
        }
        self.0 = rest;
    }
}

fn words(rows: &[&[u8]; LANES], out: &mut [u8]) {
    let whole = rows[0].len() / 16 * 16;
    let (fours, rest) = out.split_at_mut(whole * LANES);
    blocks::<16>(&rows.map(|row| &row[..whole]), fours, |rows, to| to.four(|r| *rows[r]));
    blocks::<4>(&rows.map(|row| &row[whole..]), rest, |rows, to| to.bytes(|r| *rows[r]));
}

fn halves(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<2>(rows, out, |rows, to| to.bytes(|r| *rows[r]));
}

fn bytes(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<1>(rows, out, |rows, to| to.bytes(|r| *rows[r]));
}

/// Two elements in a byte, low half first; then, for each element, rows `r` and `r + 4` in a byte.
fn i4(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<1>(rows, out, |rows, to| {
        to.bytes(|r| {
            let (row, shift) = (r % 4, r / 4 * 4);
            let four = |r: usize| rows[r][0] >> shift & 15;
            [four(row) | four(row + 4) << 4]
        });
    });
}

/// A half-precision scale, then quants that already lie in the order of the layout.
fn scaled<const N: usize>(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<N>(rows, out, |rows, to| {
        to.bytes(|r| [rows[r][0], rows[r][1]]);
        for j in 0..(N - 2) / 16 {
            to.four(|r| sixteen(rows[r], 2 + 16 * j));
        }
    });
}

fn q4_1(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<20>(rows, out, |rows, to| {
        to.bytes(|r| [rows[r][0], rows[r][1]]);
        to.bytes(|r| [rows[r][2], rows[r][3]]);
        to.four(|r| sixteen(rows[r], 4));
    });
}

/// A word of every row.
type Vector = [u32; LANES];

/// `j` of a row's words, of every row.
#[inline(always)]
fn vector<const N: usize>(rows: &Blocks<N>, start: usize, j: usize) -> Vector {
    let mut words = [0; LANES];
    words.iter_mut().zip(rows).for_each(|(to, row)| *to = word(&row[start..], j));
    words
}

/// What `bits` makes of the words of every row and a number below `n`, all of them together.
#[inline(always)]
fn gathered(n: usize, bits: impl Fn(usize) -> (Vector, usize, u32, usize)) -> Vector {
    let mut all = [0; LANES];
    for j in 0..n {
        let (words, right, mask, left) = bits(j);
        all.iter_mut().zip(words).for_each(|(to, w)| *to |= (w >> right & mask) << left);
    }
    all
}

/// Bit `k` of a file's word goes to bit `k / 4` of byte `k % 4`.
#[inline(always)]
fn fifth_bits(mut high: Vector) -> Vector {
    for high in &mut high {
        // Each group of four bits spread over the bytes, by a product that moves bit i to 8 i.
        *high = (0..8).fold(0, |bits, j| {
            let four = (*high >> (4 * j) & 15).wrapping_mul(0x0020_4081) & 0x0101_0101;
            bits | four << j
        });
    }
    high
}

fn q5_0(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<22>(rows, out, |rows, to| {
        to.bytes(|r| [rows[r][0], rows[r][1]]);
        to.four(|r| sixteen(rows[r], 6));
        to.vector(fifth_bits(vector(rows, 2, 0)));
    });
}

fn q5_1(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<24>(rows, out, |rows, to| {
        to.bytes(|r| [rows[r][0], rows[r][1]]);
        to.bytes(|r| [rows[r][2], rows[r][3]]);
        to.four(|r| sixteen(rows[r], 8));
        to.vector(fifth_bits(vector(rows, 4, 0)));
    });
}

fn mxfp4(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<17>(rows, out, |rows, to| {
        to.bytes(|r| [rows[r][0]]);
        to.four(|r| sixteen(rows[r], 1));
    });
}

/// The 4 low bits of sub-block `sub`, from files where 32 bytes hold two sub-blocks: vectors
/// `j` and `j + 4` in one word.
#[inline(always)]
fn nibbles(quants: &[u8], sub: usize) -> [u8; 16] {
    let start = sub / 2 * 32;
    let (low, high) = (sixteen(quants, start), sixteen(quants, start + 16));
    halves_of(low, high, sub % 2)
}

/// The low (0) or high (1) halves of two times 16 bytes: those of the first below those of the second.
#[inline(always)]
fn halves_of(first: [u8; 16], second: [u8; 16], half: usize) -> [u8; 16] {
    // Not by `from_fn`, which does it byte by byte.
    let mut out = [0; 16];
    for ((out, first), second) in out.iter_mut().zip(first).zip(second) {
        *out = match half {
            0 => first & 15 | second << 4,
            _ => first >> 4 | second & 0xF0,
        };
    }
    out
}

/// Scales and minima of all sub-blocks, 6 bits each, from their 12 bytes.
#[inline(always)]
fn scales_and_minima(packed: &[u8]) -> [[u8; 8]; 2] {
    const LOW: u32 = 0x0F0F_0F0F;
    let [a, b, c] = [0, 1, 2].map(|i| word(packed, i));
    let high = |x: u32| (x >> 6 & 0x0303_0303) << 4;
    let both = |low: u32, high: u32| (u64::from(high) << 32 | u64::from(low)).to_le_bytes();
    [both(a & 0x3F3F_3F3F, c & LOW | high(a)), both(b & 0x3F3F_3F3F, c >> 4 & LOW | high(b))]
}

/// `d`, `dmin`; for each sub-block its scale, its minimum, its nibbles.
fn q4_k(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<144>(rows, out, |rows, to| {
        let scales = rows.map(|row| scales_and_minima(&row[4..16]));
        let scale = |r: usize, kind: usize, sub: usize| scales[r][kind][sub];
        to.bytes(|r| [rows[r][0], rows[r][1]]);
        to.bytes(|r| [rows[r][2], rows[r][3]]);
        for sub in 0..8 {
            (0..2).for_each(|kind| to.bytes(|r| [scale(r, kind, sub)]));
            to.four(|r| nibbles(&rows[r][16..], sub));
        }
    });
}

/// As Q4_K, and a vector of fifth bits after the nibbles.
fn q5_k(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<176>(rows, out, |rows, to| {
        let scales = rows.map(|row| scales_and_minima(&row[4..16]));
        let scale = |r: usize, kind: usize, sub: usize| scales[r][kind][sub];
        to.bytes(|r| [rows[r][0], rows[r][1]]);
        to.bytes(|r| [rows[r][2], rows[r][3]]);
        for sub in 0..8 {
            (0..2).for_each(|kind| to.bytes(|r| [scale(r, kind, sub)]));
            to.four(|r| nibbles(&rows[r][48..], sub));
            to.vector(gathered(8, |j| (vector(rows, 16, j), sub, 0x0101_0101, j)));
        }
    });
}

/// `d`; for each 32 elements two scales, the nibbles, two vectors of high bits.
fn q6_k(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<210>(rows, out, |rows, to| {
        to.bytes(|r| [rows[r][208], rows[r][209]]);
        for sub in 0..8 {
            let (part, i) = (sub / 4, sub % 4);
            to.bytes(|r| [rows[r][192 + 2 * sub]]);
            to.bytes(|r| [rows[r][193 + 2 * sub]]);
            to.four(|r| {
                let start = part * 64 + i % 2 * 32;
                halves_of(sixteen(rows[r], start), sixteen(rows[r], start + 16), i / 2)
            });
            for v in 0..2 {
                let start = 128 + part * 32 + 16 * v;
                to.vector(gathered(4, |j| (vector(rows, start, j), 2 * i, 0x0303_0303, 2 * j)));
            }
        }
    });
}

/// `d`; for each sub-block its scale and its nibbles.
fn iq4_xs(rows: &[&[u8]; LANES], out: &mut [u8]) {
    blocks::<136>(rows, out, |rows, to| {
        to.bytes(|r| [rows[r][0], rows[r][1]]);
        for sub in 0..8 {
            to.bytes(|r| {
                let row = rows[r];
                let low = row[4 + sub / 2] >> (sub % 2 * 4) & 15;
                let high = (u16::from_le_bytes([row[2], row[3]]) >> (2 * sub) & 3) as u8;
                [((low | high << 4) as i8 - 32) as u8]
            });
            to.four(|r| sixteen(rows[r], 8 + 16 * sub));
        }
    });
}
