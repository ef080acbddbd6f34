//! Matrix products on packed panels: one table of functions per instruction set.
//!
//! `out[t][r] = sum_k x[t][k] w[r][k]`. For integer layouts, `x` is quantized to 8 bits in blocks of
//! 32 ([`Activations`]); whole-number sums of a block are exact, and are then scaled and added in
//! `f32` in the order of the blocks. For float layouts everything is `f32`, added in the order of `k`;
//! but where a processor multiplies pairs of BF16, weights of that format take `x` rounded to it.
//! So a result has the same bits whatever else is computed with it: one token or many, any thread.
#![allow(unsafe_code)]

mod layout;
#[cfg(target_arch = "aarch64")]
mod neon;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
use neon as native;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
use scalar as native;
#[cfg(target_arch = "x86_64")]
use x86 as native;

use std::ops::BitOr;

pub use layout::{LAYOUTS, layout_of};

use super::threads::Columns;
use crate::simd::{self, Level};

/// Rows that a panel interleaves.
pub const LANES: usize = 8;

/// Panels that lie one after the other, and the shape of what is in them.
#[derive(Clone, Copy)]
pub struct Panels<'a> {
    /// Index into [`LAYOUTS`].
    pub layout: usize,
    /// The first panel and what follows it.
    pub bytes: &'a [u8],
    /// Bytes from one panel to the next; at least what `n_in` elements need.
    pub stride: usize,
    /// Elements of a row.
    pub n_in: usize,
    /// Rows; the last panel may have fewer than [`LANES`].
    pub n_rows: usize,
}

/// Tokens that share a pass over a panel: their quants lie side by side, block by block.
pub const TILE: usize = 4;

/// Copies of activations that a product reads beside, or instead of, those in `f32`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Copies {
    /// Quantized to 8 bits.
    pub quants: bool,
    /// Rounded to BF16.
    pub pairs: bool,
}

impl Copies {
    /// What products with a layout, by its index, read at the level in use.
    pub fn of(layout: usize) -> Copies {
        let pairs = simd::level() == Level::Avx512Bf16 && LAYOUTS[layout].name == "BF16";
        Copies { quants: LAYOUTS[layout].integer, pairs }
    }
}

impl BitOr for Copies {
    type Output = Copies;

    fn bitor(self, other: Copies) -> Copies {
        Copies { quants: self.quants | other.quants, pairs: self.pairs | other.pairs }
    }
}

/// Rows of activations, as `f32` and, for products that read such copies, rounded.
///
/// Quantized rows come in tiles of `tile` rows, the last one filled up: for each 32 elements, the
/// quants of all rows of the tile, one row after the other; scales and sums likewise.
#[derive(Clone, Copy, Default)]
pub struct Activations<'a> {
    /// Number of rows.
    pub n: usize,
    /// Elements from one row of floats to the next.
    pub stride: usize,
    /// `[n, stride]`
    pub floats: &'a [f32],
    /// Rows of a tile: [`tile_of`] `n`.
    pub tile: usize,
    /// `[n / tile, n_in / 32, tile, 32]`
    pub quants: &'a [i8],
    /// `[n / tile, n_in / 32, tile]`
    pub scales: &'a [f32],
    /// Sums of `scale * quant`. `[n / tile, n_in / 16, tile]`
    pub sums16: &'a [f32],
    /// `[n / tile, n_in / 32, tile]`
    pub sums32: &'a [f32],
    /// BF16, two elements in a word; without them, BF16 weights are multiplied with `floats`.
    /// `[n, stride / 2]`
    pub pairs: &'a [u32],
    /// What the first half of a matrix's adapters makes of them, if that is known. `[n, rank]`
    pub low: &'a [f32],
}

/// Rows of a tile among `n` rows of activations.
pub fn tile_of(n: usize) -> usize {
    if n == 1 { 1 } else { TILE }
}

/// A matrix in panels of its own.
pub struct Packed {
    layout: usize,
    bytes: Vec<u8>,
    n_in: usize,
    n_rows: usize,
}

impl Packed {
    /// Packs rows of `n_in` elements as they lie in a file, for a layout: its index.
    pub fn new(layout: usize, n_in: usize, rows: &[Vec<u8>]) -> Packed {
        let stride = LAYOUTS[layout].panel_bytes(n_in);
        let mut bytes = vec![0; stride * rows.len().div_ceil(LANES)];
        for (panel, rows) in bytes.chunks_exact_mut(stride).zip(rows.chunks(LANES)) {
            LAYOUTS[layout].pack_panel(rows.iter().map(|r| &r[..]), panel);
        }
        Packed { layout, bytes, n_in, n_rows: rows.len() }
    }

    /// The panels.
    pub fn panels(&self) -> Panels<'_> {
        let Packed { layout, bytes, n_in, n_rows } = self;
        let stride = LAYOUTS[*layout].panel_bytes(*n_in);
        Panels { layout: *layout, bytes, stride, n_in: *n_in, n_rows: *n_rows }
    }
}

/// Memory that a thread keeps for unpacked panels, and for one that is packed as it is read.
#[derive(Default)]
pub struct Scratch(Vec<Aligned>, PackedPanel);

/// Memory for a packed panel.
#[derive(Default)]
pub struct PackedPanel(Vec<Aligned>);

/// What the widest load needs.
#[derive(Clone, Copy)]
#[repr(align(64))]
#[allow(dead_code)]
struct Aligned([u8; 64]);

impl Scratch {
    /// At least `n` bytes.
    fn bytes(&mut self, n: usize) -> *mut u8 {
        if self.0.len() * 64 < n {
            self.0.resize(n.div_ceil(64), Aligned([0; 64]));
        }
        self.0.as_mut_ptr().cast()
    }

    /// Memory for a panel of `n` bytes, until it is put back.
    pub fn take_panel(&mut self, n: usize) -> PackedPanel {
        let mut panel = std::mem::take(&mut self.1);
        panel.0.resize(n.div_ceil(64), Aligned([0; 64]));
        panel
    }

    /// Puts it back.
    pub fn put_panel(&mut self, panel: PackedPanel) {
        self.1 = panel;
    }
}

impl PackedPanel {
    /// Its first `n` bytes, as many as were asked for.
    pub fn bytes(&mut self, n: usize) -> &mut [u8] {
        // SAFETY: these are bytes, and no fewer.
        unsafe {
            std::slice::from_raw_parts_mut(self.0.as_mut_ptr().cast(), n.min(64 * self.0.len()))
        }
    }
}

/// Multiplies: panels, activations, scratch, output, and the output's element of the first row.
type Multiply = unsafe fn(&Panels, &Activations, &mut Scratch, Columns<f32>, usize);

/// The functions of a level, in the order of [`LAYOUTS`].
fn table(level: Level) -> &'static [Multiply] {
    match level {
        Level::Scalar => scalar::table(level),
        _ => native::table(level),
    }
}

/// Writes the products of all rows of `x` with all rows of `panels` to `out[t][start..]`.
///
/// # Safety
/// Nobody else uses those parts of `out` meanwhile.
pub unsafe fn multiply(
    panels: &Panels,
    x: &Activations,
    scratch: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    let layout = &LAYOUTS[panels.layout];
    let (n, k) = (x.n, panels.n_in);
    if n == 0 || panels.n_rows == 0 || k == 0 {
        return;
    }
    // What the functions below rely on.
    let n_panels = panels.n_rows.div_ceil(LANES);
    let panel = layout.panel_bytes(k);
    assert!(k.is_multiple_of(layout.block_len));
    assert!(panels.bytes.len() >= (n_panels - 1) * panels.stride + panel && panels.stride >= panel);
    let last = (n - 1) * x.stride;
    match layout.integer {
        true => {
            let all = n.next_multiple_of(tile_of(n)) * k;
            assert!(x.tile == tile_of(n) && x.quants.len() >= all && x.scales.len() * 32 >= all);
            assert!(x.sums16.len() * 16 >= all && x.sums32.len() * 32 >= all);
        }
        false => assert!(x.stride >= k && x.floats.len() >= last + k),
    }
    assert!(out.n() >= n);
    let level = match simd::level() {
        Level::Avx512Bf16 if x.pairs.is_empty() => Level::Avx512,
        level => level,
    };
    assert!(x.pairs.is_empty() || x.stride.is_multiple_of(2) && 2 * x.pairs.len() >= last + k);
    // SAFETY: the level is available, the lengths are as checked; the caller promises the rest.
    unsafe { table(level)[panels.layout](panels, x, scratch, out, start) }
}

/// Operations (multiplications and additions) of one round of [`products_in_registers`].
pub fn ops_per_round() -> usize {
    match simd::level() {
        Level::Scalar => scalar::ops_per_round(Level::Scalar),
        level => native::ops_per_round(level),
    }
}

/// Multiplies and adds 8-bit integers as fast as the level can, without touching memory.
pub fn products_in_registers(rounds: usize) {
    // SAFETY: the level is available.
    unsafe {
        match simd::level() {
            Level::Scalar => scalar::products_in_registers(Level::Scalar, rounds),
            level => native::products_in_registers(level, rounds),
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::layout::Layout;
    use super::*;
    use crate::quant::format_named;

    struct Input {
        n: usize,
        floats: Vec<f32>,
        quants: Vec<i8>,
        scales: Vec<f32>,
        sums16: Vec<f32>,
        sums32: Vec<f32>,
        pairs: Vec<u32>,
    }

    fn input(floats: Vec<f32>, k: usize) -> Input {
        let n = floats.len() / k;
        let tile = tile_of(n);
        let all = n.next_multiple_of(tile) * k;
        let mut x = Input {
            n,
            floats,
            quants: vec![0; all],
            scales: vec![0.0; all / 32],
            sums16: vec![0.0; all / 16],
            sums32: vec![0.0; all / 32],
            pairs: vec![0; n * k / 2],
        };
        if k.is_multiple_of(2) {
            simd::round_pairs(&x.floats, &mut x.pairs);
        }
        if k.is_multiple_of(32) {
            let Input { floats, quants, scales, sums16, sums32, .. } = &mut x;
            for (t, row) in floats.chunks(k).enumerate() {
                let at = t / tile * tile * k;
                let (q, s) = (&mut quants[at..], &mut scales[at / 32..]);
                let (s16, s32) = (&mut sums16[at / 16..], &mut sums32[at / 32..]);
                simd::quantize(row, t % tile, tile, q, s, s16, s32);
            }
        }
        x
    }

    fn random(n: usize, seed: &mut u64) -> Vec<f32> {
        let mut floats = vec![0.0; n];
        let format = format_named("F32").unwrap();
        format.dequantize(&format.random_row(n, seed), &mut floats);
        floats
    }

    impl Input {
        /// Element `i` of row `t` as integer kernels see it.
        fn rounded(&self, t: usize, i: usize, k: usize) -> f64 {
            let tile = tile_of(self.n);
            let at = (t / tile * (k / 32) + i / 32) * tile + t % tile;
            f64::from(self.quants[at * 32 + i % 32]) * f64::from(self.scales[at])
        }
    }

    fn run(level: Level, panels: &Panels, x: &Input) -> Vec<f32> {
        let x_view = Activations {
            n: x.n,
            stride: panels.n_in,
            floats: &x.floats,
            tile: tile_of(x.n),
            quants: &x.quants,
            scales: &x.scales,
            sums16: &x.sums16,
            sums32: &x.sums32,
            pairs: &x.pairs,
            low: &[],
        };
        let mut out = vec![f32::NAN; x.n * panels.n_rows];
        let columns = Columns::new(&mut out, panels.n_rows);
        // SAFETY: nobody else knows `out`; the level is available.
        unsafe {
            table(level)[panels.layout](panels, &x_view, &mut Scratch::default(), columns, 0)
        };
        out
    }

    /// A row as it lies in a file, or, of layouts that no file has, as `pack_panel` takes it.
    fn random_row(layout: &Layout, k: usize, seed: &mut u64) -> Vec<u8> {
        match layout.name {
            "I8" | "I4" => format_named("F32")
                .unwrap()
                .random_row(k / layout.block_len, seed)
                .chunks(4)
                .map(|x| x[0] ^ x[2])
                .collect(),
            name => format_named(name).unwrap().random_row(k, seed),
        }
    }

    fn elements(layout: &Layout, row: &[u8], k: usize) -> Vec<f32> {
        let mut w = vec![0.0; k];
        for (i, w) in w.iter_mut().enumerate() {
            match layout.name {
                "I8" => *w = f32::from(row[i] as i8),
                "I4" => *w = f32::from((row[i / 2] >> (i % 2 * 4) & 15) as i8 - 8),
                _ => {}
            }
        }
        if let Some(format) = format_named(layout.name) {
            format.dequantize(row, &mut w);
        }
        w
    }

    /// Every level that this processor has.
    fn levels() -> Vec<Level> {
        let levels: Vec<_> = Level::ALL.into_iter().filter(|l| l.is_available()).collect();
        println!("{levels:?}");
        levels
    }

    /// Every layout on every level against the sum of products of what the format stores.
    #[test]
    fn products_are_sums_of_products() {
        let (mut seed, levels) = (1u64, levels());
        for (index, layout) in LAYOUTS.iter().enumerate() {
            let widths: &[usize] = match layout.block_len {
                1 => &[1, 2, 7, 64, 172],
                2 => &[2, 8, 66, 1100],
                32 => &[32, 64, 160],
                _ => &[256, 768],
            };
            for (k, n_rows) in widths.iter().flat_map(|k| [1, 7, 8, 9, 40].map(|n| (*k, n))) {
                let rows: Vec<_> = (0..n_rows).map(|_| random_row(layout, k, &mut seed)).collect();
                let packed = Packed::new(index, k, &rows);
                let panels = packed.panels();
                let x = input(random(9 * k, &mut seed), k);
                for &level in &levels {
                    let got = run(level, &panels, &x);
                    for (t, r) in (0..x.n).flat_map(|t| (0..n_rows).map(move |r| (t, r))) {
                        let w = elements(layout, &rows[r], k);
                        let in_pairs = level == Level::Avx512Bf16 && layout.name == "BF16";
                        let x = |i: usize| match x.floats[t * k + i] {
                            _ if layout.integer => x.rounded(t, i, k),
                            x if in_pairs => bf16::from_f32(x).to_f64(),
                            x => f64::from(x),
                        };
                        let products = || (0..k).map(|i| x(i) * f64::from(w[i]));
                        let (exact, size) =
                            (products().sum::<f64>(), products().map(f64::abs).sum::<f64>());
                        let got = f64::from(got[t * n_rows + r]);
                        assert!(
                            (got - exact).abs() <= 4e-6 * size + 1e-9,
                            "{} {} [{k}, {n_rows}] token {t} row {r}: {got} {exact}",
                            layout.name,
                            level.name(),
                        );
                    }
                }
            }
        }
    }

    /// A token's results do not depend on what is computed beside them.
    #[test]
    fn batches_do_not_change_bits() {
        let (mut seed, levels) = (2u64, levels());
        for (index, layout) in LAYOUTS.iter().enumerate() {
            let (k, n_rows) = (512, 37);
            let rows: Vec<_> = (0..n_rows).map(|_| random_row(layout, k, &mut seed)).collect();
            let packed = Packed::new(index, k, &rows);
            let panels = packed.panels();
            for &level in &levels {
                for n in 2..12 {
                    let x = input(random(n * k, &mut seed), k);
                    let all = run(level, &panels, &x);
                    for t in 0..n {
                        let one = input(x.floats[t * k..(t + 1) * k].to_vec(), k);
                        let one = run(level, &panels, &one);
                        assert_eq!(
                            one,
                            all[t * n_rows..(t + 1) * n_rows],
                            "{} {}",
                            layout.name,
                            level.name()
                        );
                    }
                }
            }
        }
    }
}
