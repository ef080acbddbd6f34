//! Attention over the cache: products of queries with keys, and of weights with values.
#![allow(unsafe_code)]

use std::ops::Range;

use super::KvCache;
use super::cache::GROUP;
use super::forward::{Buffers, Pass, ThreadBuffers};
use super::kernels::{Activations, Copies, LANES, Scratch, multiply};
use super::rows::Rows;
use super::runs::{Run, Runs};
use super::spans::Part;
use super::threads::Columns;
use crate::merge::Kept;
use crate::simd;

/// Query rows that share a pass over the cache, when a prompt is read.
const QUERY_ROWS: usize = 16;
/// Keys, and elements of values, of one task when a single token attends.
const KEYS_PER_TASK: usize = 128;
const VALUES_PER_TASK: usize = GROUP;
/// Keys up to which one token's attention is not split further than by kv heads.
const SHORT: usize = 256;

/// The cache of one kv head.
#[derive(Clone, Copy)]
pub(super) struct Head<'a> {
    pub(super) cache: &'a KvCache,
    pub(super) layer: usize,
    pub(super) head: usize,
}

impl Head<'_> {
    /// Scores of queries with the keys of a run, into their columns of `out`.
    ///
    /// # Safety
    /// Nobody else uses those parts of `out` meanwhile.
    pub(super) unsafe fn score(
        self,
        scratch: &mut Scratch,
        queries: &Activations,
        run: Run,
        out: Columns<f32>,
    ) {
        let keys = self.cache.keys(self.layer, self.head, run.start, run.n);
        // SAFETY: the caller's promise.
        unsafe { multiply(&keys, queries, scratch, out, run.column) };
    }

    /// Mixes `elements` of all values that are seen into `out[..][elements]`: what is before a gap is
    /// added to what is after it.
    ///
    /// # Safety
    /// Nobody else uses those parts of `out` meanwhile.
    pub(super) unsafe fn mix_runs(
        self,
        (scratch, own): (&mut Scratch, &mut MixBuffers),
        weights: &Activations,
        runs: &Runs,
        elements: Range<usize>,
        out: Columns<f32>,
    ) {
        let [far, near] = runs.0;
        let of = |run: Run| Activations { floats: &weights.floats[run.column..], ..*weights };
        let (start, n) = (elements.start, elements.len());
        if near.n == 0 {
            // SAFETY: the caller's promise.
            (0..weights.n).for_each(|t| unsafe { out.part(t, start, n) }.fill(0.0));
            return;
        }
        let places = (near.start, near.n);
        // SAFETY: the caller's promise.
        unsafe { self.mix((scratch, own), &of(near), places, elements.clone(), out) };
        if far.n == 0 {
            return;
        }
        let mut added = std::mem::take(&mut own.added);
        added.resize(weights.n * elements.end, 0.0);
        let places = (far.start, far.n);
        let to = Columns::new(&mut added, elements.end);
        // SAFETY: `added` is this thread's own.
        unsafe { self.mix((scratch, own), &of(far), places, elements.clone(), to) };
        for (t, added) in added.chunks_exact(elements.end).enumerate() {
            // SAFETY: the caller's promise.
            simd::add(unsafe { out.part(t, start, n) }, &added[elements.clone()]);
        }
        own.added = added;
    }

    /// Mixes `elements` of the values at `n` positions from `start` on into `out[..][elements]`.
    /// Weights have room for as many positions as are multiples of [`LANES`], zeros after the last.
    /// Where few positions have a weight, only their values are read; the bits are the same.
    ///
    /// # Safety
    /// Nobody else uses those parts of `out` meanwhile.
    pub(super) unsafe fn mix(
        self,
        (scratch, own): (&mut Scratch, &mut MixBuffers),
        weights: &Activations,
        (start, n): (usize, usize),
        elements: Range<usize>,
        out: Columns<f32>,
    ) {
        let Head { cache, layer, head } = self;
        let MixBuffers { scaled, few, values: columns, kept, kept_scales, .. } = own;
        let is_sparse = find_few(weights, n, few);
        let weights = match is_sparse {
            true => {
                kept.clear();
                for row in weights.floats.chunks(weights.stride).take(weights.n) {
                    kept.extend(few.iter().map(|at| row[*at as usize]));
                }
                rows(weights.n, kept, few.len())
            }
            false => *weights,
        };
        let width = if is_sparse { few.len() } else { n.next_multiple_of(LANES) };
        // Elements that share a scale, if there are scales.
        let rounded = cache.types().1.is_rounded();
        let step = if rounded { GROUP } else { elements.len().max(1) };
        for row in elements.clone().step_by(step) {
            let n_rows = step.min(elements.end - row);
            let mut weights = weights;
            let places = (start, n.next_multiple_of(LANES));
            if let Some(scales) = cache.value_scales(layer, head, row, places) {
                kept_scales.clear();
                kept_scales.extend(few.iter().flat_map(|at| &scales[2 * *at as usize..][..2]));
                let scales = if is_sparse { &kept_scales[..] } else { scales };
                scaled.resize(weights.n * width, 0.0);
                let rows = weights.floats.chunks(weights.stride);
                for (scaled, row) in scaled.chunks_exact_mut(width).zip(rows) {
                    simd::multiply_halves(scaled, row, scales);
                }
                weights = Activations { floats: scaled, stride: width, ..weights };
            }
            let values = match is_sparse {
                true => cache.values_at((layer, head), (row, n_rows), (start, few), columns),
                false => cache.values(layer, head, (row, n_rows), (start, n)),
            };
            // SAFETY: the caller's promise.
            unsafe { multiply(&values, &weights, scratch, out, row) };
        }
    }
}

/// What [`Head::mix`] needs.
#[derive(Default)]
pub(super) struct MixBuffers {
    /// Weights times the scales of values.
    scaled: Vec<f32>,
    /// The positions that have a weight, where they are few; their weights, the scales of
    /// their values, their values.
    few: Vec<u32>,
    kept: Vec<f32>,
    kept_scales: Vec<u8>,
    values: Vec<u8>,
    /// What is mixed from before a gap.
    added: Vec<f32>,
}

/// Share of the positions up to which it pays to pick their values out.
const FEW: usize = 4;

/// Lists the positions below `n` at which any row has a weight, an even number of them; false if they
/// are more than one in [`FEW`].
fn find_few(weights: &Activations, n: usize, few: &mut Vec<u32>) -> bool {
    few.clear();
    for at in (0..n).step_by(LANES) {
        let mut any = [0u32; LANES];
        for t in 0..weights.n {
            let row = &weights.floats[t * weights.stride + at..][..LANES];
            for i in 0..LANES {
                // Without the sign, so that -0 is nothing.
                any[i] |= row[i].to_bits() << 1;
            }
        }
        few.extend((0..LANES).filter(|i| any[*i] != 0).map(|i| (at + i) as u32));
        if few.len() * FEW > n {
            few.clear();
            return false;
        }
    }
    // Whole blocks of every layout; one more position, without a weight, does no harm.
    if few.len() % 2 == 1 {
        let free = few.iter().zip(0..).find(|(at, i)| *at != i);
        few.push(free.map_or(few.len() as u32, |(_, i)| i));
    }
    !few.is_empty()
}

pub(super) fn rows(n: usize, floats: &[f32], stride: usize) -> Activations<'_> {
    Activations { n, stride, floats, ..Activations::default() }
}

/// Takes queries of `dim` elements, with zeros up to `whole` of them.
pub(super) fn fill_queries<'a>(
    rows: &mut Rows,
    n: usize,
    (dim, whole): (usize, usize),
    copies: Copies,
    query: impl Fn(usize) -> &'a [f32],
) {
    rows.fill(n, whole, copies, |floats| {
        for (i, to) in floats.chunks_exact_mut(whole).enumerate() {
            to[..dim].copy_from_slice(query(i));
            to[dim..].fill(0.0);
        }
    });
}

impl Buffers {
    /// Attention of the tokens in `q` into `heads`.
    pub(super) fn attend(&mut self, pass: &Pass, layer: usize, parts: &mut [Part]) {
        let g = pass.geometry(layer);
        let observer = pass.observer.filter(|o| o.wants(layer));
        if g.kept == Kept::KeysAndValues && observer.is_none() {
            return self.attend_parts(pass, layer, parts);
        }
        for part in parts.iter_mut().filter(|part| !part.rows.is_empty()) {
            if g.kept != Kept::KeysAndValues {
                if part.rows.len() == 1 && observer.is_none() {
                    self.attend_latent(pass, layer, part);
                    continue;
                }
                let n = part.rows.len();
                let visible =
                    |t: usize| part.attention[layer].visible(part.position + t, part.prompt);
                let positions = match observer {
                    // It sees the values of all.
                    Some(_) => [0..0, 0..part.position + n],
                    None => Runs::by((0..n).map(visible)).positions(),
                };
                self.rebuild(pass, layer, part.cache, &positions);
            }
            match observer {
                Some(observer) => self.observe(pass, layer, part, observer),
                None => self.attend_parts(pass, layer, std::slice::from_ref(part)),
            }
        }
    }

    /// The same over keys and values that are there.
    fn attend_parts(&mut self, pass: &Pass, layer: usize, parts: &[Part]) {
        match parts {
            [part] if part.rows.len() == 1 && part.visible(layer, 0).len() > SHORT => {
                self.attend_one(pass, layer, part);
            }
            _ => self.attend_blocks(pass, layer, parts),
        }
    }

    /// Attention of one token: over tasks of keys, then of heads, then of values.
    fn attend_one(&mut self, pass: &Pass, layer: usize, part: &Part) {
        let (attention, position) = (&part.attention[layer], part.position);
        let g = &attention.geometry;
        let (cache, layer) = part.keys_and_values(layer);
        let (n_head_kv, per_kv) = (g.n_head_kv(), g.per_kv());
        let visible = attention.visible(position, part.prompt);
        let runs = Runs::by(std::iter::once(visible.clone()));
        let width = runs.width();
        let copies = cache.key_copies();
        let Buffers { q, heads, scores, threads, .. } = self;
        let q = part.of(q, g.query_width());
        scores.resize(g.n_head * width, 0.0);

        let n_tasks = runs.n_parts(KEYS_PER_TASK);
        let out = Columns::new(&mut scores[..], width);
        pass.crew.each_with(threads, n_head_kv * n_tasks, |own, task| {
            let (head, part) = (task / n_tasks, runs.part(task % n_tasks, KEYS_PER_TASK));
            let start = g.queries(head * per_kv).start;
            let dim = g.kv[head].score_dim;
            fill_queries(&mut own.q, per_kv, (dim, cache.types().0.whole(dim)), copies, |i| {
                &q[start + i * dim..][..dim]
            });
            // SAFETY: tasks have keys of their own.
            unsafe {
                let out = out.skip(head * per_kv);
                Head { cache, layer, head }.score(&mut own.scratch, &own.q.view(), part, out);
            }
        });
        pass.crew.chunks(scores, width, |_, head, row| {
            runs.weigh(row, &visible, |scores| {
                attention.weigh((position, &visible), head, scores);
            });
        });
        let widest = g.kv.iter().map(|kv| kv.value_dim).max().unwrap_or(0);
        let n_tasks = widest.div_ceil(VALUES_PER_TASK);
        let out = Columns::new(&mut heads.floats[..], heads.width).skip(part.rows.start);
        pass.crew.each_with(threads, n_head_kv * n_tasks, |own, task| {
            let (head, start) = (task / n_tasks, task % n_tasks * VALUES_PER_TASK);
            let dim = g.kv[head].value_dim;
            if start >= dim {
                return;
            }
            let elements = start..dim.min(start + VALUES_PER_TASK);
            let weights = rows(per_kv, &scores[head * per_kv * width..], width);
            let buffers = (&mut own.scratch, &mut own.mix);
            // SAFETY: tasks have elements of their own.
            unsafe {
                let out = out.cut(g.outputs(head * per_kv).start, dim);
                Head { cache, layer, head }.mix_runs(buffers, &weights, &runs, elements, out);
            }
        });
    }

    /// Attention of several tokens: a task is a block of those of a sequence at one kv head.
    fn attend_blocks(&mut self, pass: &Pass, layer: usize, parts: &[Part]) {
        let g = pass.geometry(layer);
        let (n_head_kv, per_kv) = (g.n_head_kv(), g.per_kv());
        let q_width = g.query_width();
        let n_block = (QUERY_ROWS / per_kv).max(1);
        let Buffers { q, heads, threads, ends, .. } = self;
        let heads = Columns::new(&mut heads.floats[..], heads.width);
        let mut n_tasks = 0;
        ends.clear();
        ends.extend(parts.iter().map(|part| {
            n_tasks += n_head_kv * part.rows.len().div_ceil(n_block);
            n_tasks
        }));
        // A head after the other, whose keys and values stay near; its longest rows first, so that no
        // thread ends with one.
        pass.crew.each_with(threads, n_tasks, |own, task| {
            let at = ends.partition_point(|end| *end <= task);
            let (part, task) = (&parts[at], task - if at > 0 { ends[at - 1] } else { 0 });
            let attention = &part.attention[layer];
            let n = part.rows.len();
            let n_blocks = n.div_ceil(n_block);
            let (head, block) = (task / n_blocks, n_blocks - 1 - task % n_blocks);
            let tokens = block * n_block..n.min((block + 1) * n_block);
            let n_rows = tokens.len() * per_kv;
            let start = g.queries(head * per_kv).start;
            let (dim, value_dim) = (g.kv[head].score_dim, g.kv[head].value_dim);
            let (cache, layer) = part.keys_and_values(layer);
            let dims = (dim, cache.types().0.whole(dim));
            fill_queries(&mut own.q, n_rows, dims, cache.key_copies(), |r| {
                let (t, i) = (part.rows.start + tokens.start + r / per_kv, r % per_kv);
                &q[t * q_width + start + i * dim..][..dim]
            });
            let visible = |t: usize| attention.visible(part.position + t, part.prompt);
            let runs = Runs::by(tokens.clone().map(visible));
            let width = runs.width();
            let kv = Head { cache, layer, head };
            let ThreadBuffers { scratch, q, scores, mix, out, .. } = own;
            scores.resize(n_rows * width, 0.0);
            for run in runs.0 {
                // SAFETY: the output is this thread's own.
                unsafe { kv.score(scratch, &q.view(), run, Columns::new(scores, width)) };
            }
            for (r, row) in scores.chunks_exact_mut(width).enumerate() {
                let (t, h) = (tokens.start + r / per_kv, head * per_kv + r % per_kv);
                let visible = visible(t);
                runs.weigh(row, &visible, |scores| {
                    attention.weigh((part.position + t, &visible), h, scores);
                });
            }
            out.resize(n_rows * value_dim, 0.0);
            let weights = rows(n_rows, scores, width);
            // SAFETY: the output is this thread's own.
            unsafe {
                let out = Columns::new(out, value_dim);
                kv.mix_runs((scratch, mix), &weights, &runs, 0..value_dim, out);
            }
            for (i, t) in tokens.enumerate() {
                let (n, start) = (per_kv * value_dim, g.outputs(head * per_kv).start);
                // SAFETY: tasks have heads and tokens of their own.
                let to = unsafe { heads.part(part.rows.start + t, start, n) };
                to.copy_from_slice(&out[i * n..(i + 1) * n]);
            }
        });
    }
}
