//! Packed layouts: the rows of a matrix interleaved, so that every lane of a vector has a row.
//!
//! A panel holds `lanes` rows, block after block, with every bit that the file has. In a block, the
//! scales of all rows come first, each kind of them as one vector; then the quants, in vectors of
//! `lanes` words of 4 bytes: word `r` of vector `j` has elements `4 j .. 4 j + 4` of row `r`. Low
//! and high halves of a byte belong to vectors `j` and `j + 4`. Fifth bits of 32 elements make
//! one vector (bit `j` for vector `j`), fifth and sixth bits two (bits `2 (j % 4)` of vector
//! `j / 4`). So one multiplication serves all rows, nothing is summed across lanes, and the numbers
//! that go into a row's sum come in one order whatever else is computed beside it.

use crate::quant::Format;

/// A packed layout, one for a tensor format.
pub struct Layout {
    /// The tensor format, by its name.
    pub name: &'static str,
    /// Elements of a row in one block.
    pub block_len: usize,
    /// Bytes of one row in one block.
    pub row_bytes: usize,
    /// Whether activations are multiplied as 8-bit integers, else as `f32`.
    pub integer: bool,
    /// Packs one block: the blocks of all rows, and where they go.
    pack: fn(&[&[u8]], &mut [u8]),
}

/// Every layout; kernels have a table with one entry for each, in this order.
pub static LAYOUTS: &[Layout] = &[
    Layout { name: "F32", block_len: 1, row_bytes: 4, integer: false, pack: words },
    Layout { name: "F16", block_len: 1, row_bytes: 2, integer: false, pack: halves },
    Layout { name: "BF16", block_len: 1, row_bytes: 2, integer: false, pack: halves },
    Layout { name: "Q4_0", block_len: 32, row_bytes: 18, integer: true, pack: scaled_words },
    Layout { name: "Q4_1", block_len: 32, row_bytes: 20, integer: true, pack: q4_1 },
    Layout { name: "Q5_0", block_len: 32, row_bytes: 22, integer: true, pack: q5_0 },
    Layout { name: "Q5_1", block_len: 32, row_bytes: 24, integer: true, pack: q5_1 },
    Layout { name: "Q8_0", block_len: 32, row_bytes: 34, integer: true, pack: scaled_words },
    Layout { name: "IQ4_NL", block_len: 32, row_bytes: 18, integer: true, pack: scaled_words },
    Layout { name: "MXFP4", block_len: 32, row_bytes: 17, integer: true, pack: mxfp4 },
    Layout { name: "Q4_K", block_len: 256, row_bytes: 148, integer: true, pack: q4_k },
    Layout { name: "Q5_K", block_len: 256, row_bytes: 180, integer: true, pack: q5_k },
    Layout { name: "Q6_K", block_len: 256, row_bytes: 210, integer: true, pack: q6_k },
    Layout { name: "IQ4_XS", block_len: 256, row_bytes: 138, integer: true, pack: iq4_xs },
];

/// The layout of a format: its place in [`LAYOUTS`]. Other formats are read where they lie.
pub fn layout_of(format: &Format) -> Option<usize> {
    LAYOUTS.iter().position(|l| l.name == format.ty.name)
}

impl Layout {
    /// Bytes of a panel of `lanes` rows of `n_in` elements.
    pub fn panel_bytes(&self, n_in: usize, lanes: usize) -> usize {
        n_in / self.block_len * self.row_bytes * lanes
    }

    /// Packs the rows of one panel, each as it lies in the file; missing rows become zeros.
    pub fn pack_panel<'a>(
        &self,
        format: &Format,
        rows: impl Iterator<Item = &'a [u8]>,
        lanes: usize,
        out: &mut [u8],
    ) {
        let from = format.row_bytes(self.block_len);
        let mut rows: Vec<&[u8]> = rows.collect();
        let zeros = vec![0u8; rows.first().map_or(0, |r| r.len())];
        rows.resize(lanes, &zeros);
        let mut blocks: Vec<&[u8]> = rows.clone();
        for (i, out) in out.chunks_exact_mut(self.row_bytes * lanes).enumerate() {
            for (block, row) in blocks.iter_mut().zip(&rows) {
                *block = &row[i * from..(i + 1) * from];
            }
            (self.pack)(&blocks, out);
        }
    }
}

fn word(bytes: &[u8], i: usize) -> u32 {
    let b = &bytes[4 * i..4 * i + 4];
    u32::from_le_bytes([b[0], b[1], b[2], b[3]])
}

/// Writes vector after vector of one word per row.
struct Words<'a> {
    out: &'a mut [u8],
    lanes: usize,
    at: usize,
}

impl Words<'_> {
    fn push(&mut self, word_of_row: impl Fn(usize) -> u32) {
        let end = self.at + 4 * self.lanes;
        for (r, out) in self.out[self.at..end].as_chunks_mut::<4>().0.iter_mut().enumerate() {
            *out = word_of_row(r).to_le_bytes();
        }
        self.at = end;
    }

    /// One or two bytes per row.
    fn bytes<const N: usize>(&mut self, of_row: impl Fn(usize) -> [u8; N]) {
        let end = self.at + N * self.lanes;
        for (r, out) in self.out[self.at..end].as_chunks_mut::<N>().0.iter_mut().enumerate() {
            *out = of_row(r);
        }
        self.at = end;
    }
}

fn writer<'a>(rows: &[&[u8]], out: &'a mut [u8]) -> Words<'a> {
    Words { out, lanes: rows.len(), at: 0 }
}

fn words(rows: &[&[u8]], out: &mut [u8]) {
    writer(rows, out).push(|r| word(rows[r], 0));
}

fn halves(rows: &[&[u8]], out: &mut [u8]) {
    writer(rows, out).bytes(|r| [rows[r][0], rows[r][1]]);
}

/// A half-precision scale, then quants that already lie in the order of the layout.
fn scaled_words(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0], rows[r][1]]);
    for j in 0..(rows[0].len() - 2) / 4 {
        to.push(|r| word(&rows[r][2..], j));
    }
}

fn q4_1(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0], rows[r][1]]);
    to.bytes(|r| [rows[r][2], rows[r][3]]);
    for j in 0..4 {
        to.push(|r| word(&rows[r][4..], j));
    }
}

/// Bit `k` of a file's word goes to bit `k / 4` of byte `k % 4`.
fn fifth_bits(high: u32) -> u32 {
    (0..32).fold(0, |bits, k| bits | (high >> k & 1) << (k % 4 * 8 + k / 4))
}

fn q5_0(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0], rows[r][1]]);
    for j in 0..4 {
        to.push(|r| word(&rows[r][6..], j));
    }
    to.push(|r| fifth_bits(word(&rows[r][2..], 0)));
}

fn q5_1(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0], rows[r][1]]);
    to.bytes(|r| [rows[r][2], rows[r][3]]);
    for j in 0..4 {
        to.push(|r| word(&rows[r][8..], j));
    }
    to.push(|r| fifth_bits(word(&rows[r][4..], 0)));
}

fn mxfp4(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0]]);
    for j in 0..4 {
        to.push(|r| word(&rows[r][1..], j));
    }
}

/// The 4 low bits of sub-block `sub`, from files where 32 bytes hold two sub-blocks: vectors
/// `j` and `j + 4` in one word.
fn nibbles(quants: &[u8], sub: usize, j: usize) -> u32 {
    let (a, b) = (word(quants, sub / 2 * 8 + j), word(quants, sub / 2 * 8 + j + 4));
    match sub % 2 {
        0 => a & 0x0F0F_0F0F | (b & 0x0F0F_0F0F) << 4,
        _ => (a >> 4) & 0x0F0F_0F0F | b & 0xF0F0_F0F0,
    }
}

/// Scale and minimum of sub-block `sub`, 6 bits each, from their 12 bytes.
fn scale_and_min(packed: &[u8], sub: usize) -> [u8; 2] {
    match sub {
        0..4 => [packed[sub] & 63, packed[sub + 4] & 63],
        _ => [
            packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4,
            packed[sub + 4] >> 4 | packed[sub] >> 6 << 4,
        ],
    }
}

/// `d`, `dmin`; for each sub-block its scale, its minimum, its nibbles.
fn q4_k(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0], rows[r][1]]);
    to.bytes(|r| [rows[r][2], rows[r][3]]);
    for sub in 0..8 {
        to.bytes(|r| [scale_and_min(&rows[r][4..16], sub)[0]]);
        to.bytes(|r| [scale_and_min(&rows[r][4..16], sub)[1]]);
        for j in 0..4 {
            to.push(|r| nibbles(&rows[r][16..], sub, j));
        }
    }
}

/// As Q4_K, and a vector of fifth bits after the nibbles.
fn q5_k(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0], rows[r][1]]);
    to.bytes(|r| [rows[r][2], rows[r][3]]);
    for sub in 0..8 {
        to.bytes(|r| [scale_and_min(&rows[r][4..16], sub)[0]]);
        to.bytes(|r| [scale_and_min(&rows[r][4..16], sub)[1]]);
        for j in 0..4 {
            to.push(|r| nibbles(&rows[r][48..], sub, j));
        }
        to.push(|r| {
            let high = |j: usize| (word(&rows[r][16..], j) >> sub & 0x0101_0101) << j;
            (0..8).fold(0, |bits, j| bits | high(j))
        });
    }
}

/// `d`; for each 32 elements two scales, the nibbles, two vectors of high bits.
fn q6_k(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][208], rows[r][209]]);
    for sub in 0..8 {
        let (part, i) = (sub / 4, sub % 4);
        to.bytes(|r| [rows[r][192 + 2 * sub]]);
        to.bytes(|r| [rows[r][193 + 2 * sub]]);
        for j in 0..4 {
            to.push(|r| {
                let low = |j: usize| {
                    word(&rows[r][part * 64 + i % 2 * 32..], j) >> (i / 2 * 4) & 0x0F0F_0F0F
                };
                low(j) | low(j + 4) << 4
            });
        }
        for v in 0..2 {
            to.push(|r| {
                let high = |j: usize| {
                    (word(&rows[r][128 + part * 32..], 4 * v + j) >> (2 * i) & 0x0303_0303)
                        << (2 * j)
                };
                (0..4).fold(0, |bits, j| bits | high(j))
            });
        }
    }
}

/// `d`; for each sub-block its scale and its nibbles.
fn iq4_xs(rows: &[&[u8]], out: &mut [u8]) {
    let mut to = writer(rows, out);
    to.bytes(|r| [rows[r][0], rows[r][1]]);
    for sub in 0..8 {
        to.bytes(|r| {
            let row = rows[r];
            let low = row[4 + sub / 2] >> (sub % 2 * 4) & 15;
            let high = (u16::from_le_bytes([row[2], row[3]]) >> (2 * sub) & 3) as u8;
            [((low | high << 4) as i8 - 32) as u8]
        });
        for j in 0..4 {
            to.push(|r| word(&rows[r][8 + sub * 16..], j));
        }
    }
}
