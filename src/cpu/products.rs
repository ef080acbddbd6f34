//! Products of one input with several matrices.
#![allow(unsafe_code)]

use super::forward::ThreadBuffers;
use super::kernels::{Activations, LANES};
use super::lora::{give_back, lower};
use super::threads::{Columns, Crew};
use super::weights::Matrix;

/// Tasks per thread and product that are aimed at, so that nobody waits long for the last.
const TASKS_PER_THREAD: usize = 4;
/// Rows of a matrix in one task at least.
const MIN_ROWS: usize = 32;

/// Rows of a matrix, or of several with `total` rows, that make one task: whole panels.
pub(super) fn rows_per_task(crew: &Crew, total: usize) -> usize {
    total.div_ceil(crew.n_threads() * TASKS_PER_THREAD).next_multiple_of(LANES).max(MIN_ROWS)
}

/// Products of one input with several matrices, as one phase.
pub(super) fn products(
    crew: &Crew,
    outs: &[(&Matrix, Columns<f32>)],
    x: &Activations,
    threads: &mut [ThreadBuffers],
) {
    let total: usize = outs.iter().map(|(w, _)| w.n_out).sum();
    let n_rows = rows_per_task(crew, total);
    let n_tasks: usize = outs.iter().map(|(w, _)| w.n_out.div_ceil(n_rows)).sum();
    let low = lower(crew, outs.iter().map(|(w, _)| (*w, *x)), threads);
    crew.each_with(threads, n_tasks, |own, mut task| {
        let mut rest = &low[..];
        for (w, out) in outs {
            let x = w.lowered(x, &mut rest);
            let n_here = w.n_out.div_ceil(n_rows);
            if task < n_here {
                let start = task * n_rows;
                let n = n_rows.min(w.n_out - start);
                // SAFETY: tasks have rows of their own.
                unsafe {
                    w.multiply((start, n), &x, &mut own.scratch, *out, start);
                }
                return;
            }
            task -= n_here;
        }
    });
    give_back(threads, low);
}
