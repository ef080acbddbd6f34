//! Rows of activations with their rounded copies.
#![allow(unsafe_code)]

use std::ops::Range;

use super::kernels::{Activations, Copies, tile_of};
use super::observe::SeenRows;
use super::threads::{Columns, Crew};
use crate::simd;

/// Activations of a batch. Buffers keep their memory from batch to batch.
#[derive(Default)]
pub(super) struct Rows {
    n: usize,
    pub(super) width: usize,
    /// `[n, width]`
    pub(super) floats: Vec<f32>,
    quants: Vec<i8>,
    scales: Vec<f32>,
    sums16: Vec<f32>,
    sums32: Vec<f32>,
    pairs: Vec<u32>,
}

/// Rows that one task rounds: whole tiles.
const ROWS_PER_TASK: usize = 8;

impl Rows {
    /// Makes room for `n` rows of `width`, whose content is undefined.
    pub(super) fn resize(&mut self, n: usize, width: usize) {
        (self.n, self.width) = (n, width);
        self.floats.resize(n * width, 0.0);
    }

    /// Takes `n` rows of `width` from `fill`, and fills these copies.
    pub(super) fn fill(
        &mut self,
        n: usize,
        width: usize,
        copies: Copies,
        fill: impl FnOnce(&mut [f32]),
    ) {
        self.resize(n, width);
        fill(&mut self.floats);
        // SAFETY: nobody else knows the parts.
        unsafe { self.parts(copies).round(0..n, 0, width) };
    }

    /// Fills these copies, after `prepare` has been called for every row of floats.
    pub(super) fn finish(
        &mut self,
        crew: &Crew,
        copies: Copies,
        prepare: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let (n, width) = (self.n, self.width);
        let parts = self.parts(copies);
        crew.each(n.div_ceil(ROWS_PER_TASK), |_, task| {
            let rows = task * ROWS_PER_TASK..n.min((task + 1) * ROWS_PER_TASK);
            // SAFETY: tasks have rows of their own, and whole tiles.
            unsafe {
                rows.clone().for_each(|t| prepare(t, parts.floats.part(t, 0, width)));
                parts.round(rows, 0, width);
            }
        });
    }

    /// The rows for several threads, each of which fills and rounds parts of its own.
    pub(super) fn parts(&mut self, mut copies: Copies) -> Parts<'_> {
        let (n, width, tile) = (self.n, self.width, tile_of(self.n));
        // Kernels only ever see whole blocks.
        copies.quants &= width.is_multiple_of(32);
        copies.pairs &= width.is_multiple_of(2);
        let all = if copies.quants { n.next_multiple_of(tile) * width } else { 0 };
        self.quants.resize(all, 0);
        self.scales.resize(all / 32, 0.0);
        self.sums16.resize(all / 16, 0.0);
        self.sums32.resize(all / 32, 0.0);
        self.pairs.resize(if copies.pairs { n * width / 2 } else { 0 }, 0);
        let Rows { floats, quants, scales, sums16, sums32, pairs, .. } = self;
        let blocks = width / 32 * tile;
        Parts {
            copies,
            tile,
            floats: Columns::new(floats, width),
            quants: Columns::new(quants, blocks * 32),
            scales: Columns::new(scales, blocks),
            sums16: Columns::new(sums16, blocks * 2),
            sums32: Columns::new(sums32, blocks),
            pairs: Columns::new(pairs, width / 2),
        }
    }

    /// All rows of floats.
    pub(super) fn seen(&self) -> SeenRows<'_> {
        SeenRows::new(&self.floats, self.width, 0..self.width)
    }

    /// What kernels read.
    pub(super) fn view(&self) -> Activations<'_> {
        Activations {
            n: self.n,
            stride: self.width,
            floats: &self.floats,
            tile: tile_of(self.n),
            quants: &self.quants,
            scales: &self.scales,
            sums16: &self.sums16,
            sums32: &self.sums32,
            pairs: &self.pairs,
            low: &[],
        }
    }
}

/// [`Rows`] in the hands of several threads.
pub(super) struct Parts<'a> {
    copies: Copies,
    tile: usize,
    pub(super) floats: Columns<'a, f32>,
    quants: Columns<'a, i8>,
    scales: Columns<'a, f32>,
    sums16: Columns<'a, f32>,
    sums32: Columns<'a, f32>,
    pairs: Columns<'a, u32>,
}

impl Parts<'_> {
    /// Fills the copies of `len` elements from `start` on, both multiples of 32, of whole
    /// tiles of rows.
    ///
    /// # Safety
    /// Nobody else uses this part meanwhile.
    pub(super) unsafe fn round(&self, rows: Range<usize>, start: usize, len: usize) {
        let n = self.tile;
        for t in rows {
            let tile = t / n;
            // SAFETY: the caller's promise; the parts of one tile are used one after the other.
            unsafe {
                let floats = self.floats.part(t, start, len);
                if self.copies.pairs {
                    simd::round_pairs(floats, self.pairs.part(t, start / 2, len / 2));
                }
                if !self.copies.quants {
                    continue;
                }
                simd::quantize(
                    floats,
                    t % n,
                    n,
                    self.quants.part(tile, start * n, len * n),
                    self.scales.part(tile, start / 32 * n, len / 32 * n),
                    self.sums16.part(tile, start / 16 * n, len / 16 * n),
                    self.sums32.part(tile, start / 32 * n, len / 32 * n),
                );
            }
        }
    }
}
