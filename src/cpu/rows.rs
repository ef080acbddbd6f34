//! Rows of activations with their quantized copies.
#![allow(unsafe_code)]

use super::kernels::Activations;
use super::threads::{Columns, Crew};
use crate::simd;

/// Activations of a batch. Buffers keep their memory from batch to batch.
#[derive(Default)]
pub(super) struct Rows {
    n: usize,
    width: usize,
    /// `[n, width]`
    pub(super) floats: Vec<f32>,
    quants: Vec<i8>,
    scales: Vec<f32>,
    sums16: Vec<f32>,
    sums32: Vec<f32>,
}

/// Rows that one task quantizes.
const ROWS_PER_TASK: usize = 8;

impl Rows {
    /// Makes room for `n` rows of `width`, whose content is undefined.
    pub(super) fn resize(&mut self, n: usize, width: usize) {
        (self.n, self.width) = (n, width);
        self.floats.resize(n * width, 0.0);
    }

    /// Fills the quantized copies, after `prepare` has been called for every row of floats.
    pub(super) fn finish(
        &mut self,
        crew: &Crew,
        integer: bool,
        prepare: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let width = self.width.max(1);
        let integer = self.make_room(integer);
        let blocks = if integer { width / 32 } else { 0 };
        struct Row<'a> {
            floats: &'a mut [f32],
            quants: &'a mut [i8],
            scales: &'a mut [f32],
            sums16: &'a mut [f32],
            sums32: &'a mut [f32],
        }
        let one = |i: usize, row: Row| {
            prepare(i, row.floats);
            if integer {
                simd::quantize(row.floats, row.quants, row.scales, row.sums16, row.sums32);
            }
        };
        if self.n == 1 {
            let Rows { floats, quants, scales, sums16, sums32, .. } = self;
            return one(0, Row { floats, quants, scales, sums16, sums32 });
        }
        let mut rows: Vec<Row> = Vec::with_capacity(self.n);
        let (mut q, mut s) = (&mut self.quants[..], &mut self.scales[..]);
        let (mut s16, mut s32) = (&mut self.sums16[..], &mut self.sums32[..]);
        for floats in self.floats.chunks_exact_mut(width) {
            let (quants, scales, sums16, sums32);
            (quants, q) = q.split_at_mut(blocks * 32);
            (scales, s) = s.split_at_mut(blocks);
            (sums16, s16) = s16.split_at_mut(blocks * 2);
            (sums32, s32) = s32.split_at_mut(blocks);
            rows.push(Row { floats, quants, scales, sums16, sums32 });
        }
        crew.chunks(&mut rows, ROWS_PER_TASK, |_, task, rows| {
            for (i, row) in rows.iter_mut().enumerate() {
                let Row { floats, quants, scales, sums16, sums32 } = row;
                one(task * ROWS_PER_TASK + i, Row { floats, quants, scales, sums16, sums32 });
            }
        });
    }

    /// The rows for several threads, each of which fills and quantizes parts of its own.
    pub(super) fn parts(&mut self, integer: bool) -> Parts<'_> {
        let width = self.width;
        let integer = self.make_room(integer);
        let blocks = if integer { width / 32 } else { 0 };
        let Rows { floats, quants, scales, sums16, sums32, .. } = self;
        Parts {
            integer,
            floats: Columns::new(floats, width),
            quants: Columns::new(quants, blocks * 32),
            scales: Columns::new(scales, blocks),
            sums16: Columns::new(sums16, blocks * 2),
            sums32: Columns::new(sums32, blocks),
        }
    }

    /// Makes room for the quantized copies; false if there will be none.
    fn make_room(&mut self, integer: bool) -> bool {
        // Integer kernels only ever see whole blocks.
        let integer = integer && self.width.is_multiple_of(32);
        let blocks = if integer { self.width / 32 } else { 0 };
        self.quants.resize(self.n * blocks * 32, 0);
        self.scales.resize(self.n * blocks, 0.0);
        self.sums16.resize(self.n * blocks * 2, 0.0);
        self.sums32.resize(self.n * blocks, 0.0);
        integer
    }

    /// What kernels read.
    pub(super) fn view(&self) -> Activations<'_> {
        Activations {
            n: self.n,
            stride: self.width,
            floats: &self.floats,
            quants: &self.quants,
            scales: &self.scales,
            sums16: &self.sums16,
            sums32: &self.sums32,
        }
    }
}

/// [`Rows`] in the hands of several threads.
pub(super) struct Parts<'a> {
    integer: bool,
    pub(super) floats: Columns<'a, f32>,
    quants: Columns<'a, i8>,
    scales: Columns<'a, f32>,
    sums16: Columns<'a, f32>,
    sums32: Columns<'a, f32>,
}

impl Parts<'_> {
    /// Fills the quantized copies of `len` elements of row `t` from `start` on, both multiples of 32.
    ///
    /// # Safety
    /// Nobody else uses this part meanwhile.
    pub(super) unsafe fn quantize(&self, t: usize, start: usize, len: usize) {
        if self.integer {
            // SAFETY: the caller's promise.
            unsafe {
                simd::quantize(
                    self.floats.part(t, start, len),
                    self.quants.part(t, start, len),
                    self.scales.part(t, start / 32, len / 32),
                    self.sums16.part(t, start / 16, len / 16),
                    self.sums32.part(t, start / 32, len / 32),
                );
            }
        }
    }
}
