//! Products with adapters: `W x + B (A x)`.
//!
//! What the first halves of the adapters make of an input, `A x`, is made once for all tasks that
//! multiply it with `W`, which then add their rows of `B (A x)`. Formats of `W` do not matter.
#![allow(unsafe_code)]

use super::forward::ThreadBuffers;
use super::kernels::{Activations, LANES, Packed, Panels, Scratch, layout_of, multiply, tile_of};
use super::threads::{Columns, Crew};
use super::weights::Matrix;
use crate::model::{Lora, Weight};
use crate::quant;
use crate::simd;

/// Tokens of one task.
const TOKENS_PER_TASK: usize = 64;

/// All adapters of a matrix, as one.
pub(super) struct LoraMatrix {
    rank: usize,
    /// First halves, one over the other. `[rank, n_in]`
    down: Packed,
    /// Second halves with their factors, column after column. `[rank, n_out]`
    up: Vec<f32>,
}

impl LoraMatrix {
    /// Those of a matrix, if it has any.
    pub(super) fn of(w: &Weight) -> Option<Box<LoraMatrix>> {
        let rank = w.loras.iter().map(Lora::rank).sum();
        if rank == 0 {
            return None;
        }
        let is_short = w.loras.iter().all(|lora| lora.down.format.ty.name == "F16");
        let format = quant::format_named(if is_short { "F16" } else { "F32" })?;
        let (mut rows, mut up) = (Vec::new(), vec![0.0; rank * w.n_out]);
        let mut floats = vec![0.0; w.n_in];
        for lora in &w.loras {
            let first = rows.len();
            for j in 0..lora.rank() {
                lora.down.dequantize_row(j, &mut floats);
                let mut row = vec![0; format.row_bytes(w.n_in)];
                format.quantize(&floats, &mut row);
                rows.push(row);
            }
            let mut row = vec![0.0; lora.rank()];
            for i in 0..w.n_out {
                lora.up.dequantize_row(i, &mut row);
                for (j, x) in row.iter().enumerate() {
                    up[(first + j) * w.n_out + i] = lora.factor * x;
                }
            }
        }
        let down = Packed::new(layout_of(format)?, w.n_in, &rows);
        Some(Box::new(LoraMatrix { rank, down, up }))
    }

    /// Bytes of both halves.
    pub(super) fn n_bytes(&self) -> usize {
        let down = self.down.panels();
        down.stride * down.n_rows.div_ceil(LANES) + 4 * self.up.len()
    }

    /// Adds products of `n_rows` rows from `row` on to `out[t][start..]`.
    ///
    /// # Safety
    /// Nobody else uses those parts of `out` meanwhile.
    pub(super) unsafe fn add(
        &self,
        (row, n_rows): (usize, usize),
        x: &Activations,
        scratch: &mut Scratch,
        out: Columns<f32>,
        start: usize,
    ) {
        let (n_out, mut own) = (self.up.len() / self.rank, Vec::new());
        if x.low.is_empty() {
            own.resize(x.n * self.rank, 0.0);
            let out = Columns::new(&mut own, self.rank);
            for panel in 0..self.rank.div_ceil(LANES) {
                // SAFETY: nobody else knows it.
                unsafe { self.lower((panel, 0, x.n), x, scratch, out) };
            }
        }
        let low = if x.low.is_empty() { &own } else { x.low };
        for (t, low) in low.chunks_exact(self.rank).enumerate() {
            // SAFETY: the caller's promise.
            let out = unsafe { out.part(t, start, n_rows) };
            simd::add_rows(out, low, &self.up[row..], n_out);
        }
    }

    /// Products of a panel of first halves with `n` tokens from `first` on.
    ///
    /// # Safety
    /// Nobody else uses those parts of `out` meanwhile.
    unsafe fn lower(
        &self,
        (panel, first, n): (usize, usize, usize),
        x: &Activations,
        scratch: &mut Scratch,
        out: Columns<f32>,
    ) {
        let (all, row) = (self.down.panels(), panel * LANES);
        let bytes = &all.bytes[panel * all.stride..];
        let panels = Panels { bytes, n_rows: LANES.min(self.rank - row), ..all };
        let floats = &x.floats[first * x.stride..];
        let x =
            Activations { n, stride: x.stride, floats, tile: tile_of(n), ..Activations::default() };
        // SAFETY: the caller's promise.
        unsafe { multiply(&panels, &x, scratch, out.skip(first), row) };
    }
}

impl Matrix {
    /// Ranks of all its adapters together.
    pub(super) fn rank(&self) -> usize {
        self.lora.as_ref().map_or(0, |lora| lora.rank)
    }

    /// `x` with what the first halves of this matrix's adapters make of it, taken from the beginning of
    /// `low`, which goes on with what is left.
    pub(super) fn lowered<'a>(&self, x: &Activations<'a>, low: &mut &'a [f32]) -> Activations<'a> {
        let (own, rest) = low.split_at(x.n * self.rank());
        *low = rest;
        Activations { low: own, ..*x }
    }
}

/// What first halves of adapters make of the inputs of matrices, one after the other, in memory that
/// has to be given back.
pub(super) fn lower<'a>(
    crew: &Crew,
    readers: impl Iterator<Item = (&'a Matrix, Activations<'a>)> + Clone + Sync,
    threads: &mut [ThreadBuffers],
) -> Vec<f32> {
    let mut low = threads.first_mut().map_or(Vec::new(), |own| std::mem::take(&mut own.low));
    let n_tasks = |lora: &LoraMatrix, x: &Activations| {
        (lora.rank.div_ceil(LANES), x.n.div_ceil(TOKENS_PER_TASK))
    };
    let (mut total, mut n) = (0, 0);
    for (w, x) in readers.clone() {
        let Some(lora) = &w.lora else { continue };
        let (n_panels, n_parts) = n_tasks(lora, &x);
        (total, n) = (total + x.n * lora.rank, n + n_panels * n_parts);
    }
    low.resize(total, 0.0);
    if n == 0 {
        return low;
    }
    let all = Columns::new(&mut low, total);
    crew.each_with(threads, n, |own, mut task| {
        let mut start = 0;
        for (w, x) in readers.clone() {
            let Some(lora) = &w.lora else { continue };
            let (n_panels, n_parts) = n_tasks(lora, &x);
            if task < n_panels * n_parts {
                let first = task / n_panels * TOKENS_PER_TASK;
                let tokens = TOKENS_PER_TASK.min(x.n - first);
                let out = all.cut(start, lora.rank);
                let part = (task % n_panels, first, tokens);
                // SAFETY: tasks have tokens and panels of their own.
                unsafe { lora.lower(part, &x, &mut own.scratch, out) };
                return;
            }
            (task, start) = (task - n_panels * n_parts, start + x.n * lora.rank);
        }
    });
    low
}

/// Gives that memory back.
pub(super) fn give_back(threads: &mut [ThreadBuffers], low: Vec<f32>) {
    if let Some(own) = threads.first_mut() {
        own.low = low;
    }
}
