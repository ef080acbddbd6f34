//! Attention over cached rows that keys and values are made of: keys before rotation, or a layer's
//! input.
//!
//! One token never makes them. Its queries are multiplied with what makes keys, or keys are rotated in
//! passing; rows are mixed instead of values, and what makes values is multiplied with the sum:
//! `sum_n p_n (W r_n + b) = W sum_n p_n r_n + b sum_n p_n`. For several tokens that would cost more than
//! making keys and values of all rows once, which is what happens then.
#![allow(unsafe_code)]

use std::ops::Range;

use super::KvCache;
use super::attend::{Head, fill_queries};
use super::cache::GROUP;
use super::forward::{Buffers, Pass, ThreadBuffers};
use super::kernels::{LANES, multiply};
use super::products::products;
use super::rows::Rows;
use super::runs::{Run, Runs};
use super::spans::Part;
use super::threads::Columns;
use super::tiles::{self, Lanes, TILE_PANELS};
use crate::merge::Kept;
use crate::simd;

/// Cached rows that one task scores.
const ROWS_PER_TASK: usize = 32;
/// Elements of all rows that one task mixes: whole blocks.
const MIX_ELEMENTS: usize = 2 * GROUP;
/// Rows that keys and values are made of at once.
const REBUILT_ROWS: usize = 256;

/// What attention over rows needs between operations.
#[derive(Default)]
pub(super) struct LatentBuffers {
    /// What latents of the batch are made of or with, and latents with rotated elements after them,
    /// where the model has latents. `[n, rank + n_rotated]`
    pub(super) rows: Rows,
    pub(super) made: Vec<f32>,
    /// Latents that keys and values are made of, and keys without what they share. `[n, rank]`, `[n, ..]`
    pub(super) latents: Rows,
    pub(super) parts: Vec<f32>,
    /// Queries multiplied with what makes keys. `[n_head, rank + n_rotated]`
    queries: Rows,
    /// What biases of keys add to all scores of a head. `[n_head]`
    shifts: Vec<f32>,
    /// Panels of scores of which any has a weight.
    live: Vec<u32>,
    /// Rows mixed with the weights of every head. `[n_head, width]`
    mixed: Vec<f32>,
    /// Keys and values made of cached rows. `[n, ..]`
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// What one thread needs to itself.
#[derive(Default)]
pub(super) struct Tiles {
    tile: Vec<Lanes>,
    sums: Vec<Lanes>,
    weights: Vec<Lanes>,
    row: Vec<f32>,
}

/// One layer's cached rows.
#[derive(Clone, Copy)]
struct Stored<'a> {
    cache: &'a KvCache,
    layer: usize,
}

impl Stored<'_> {
    /// Unpacks elements of a panel of a stored head.
    fn unpack(self, head: usize, panel: usize, start: usize, out: &mut [Lanes]) {
        let panel = self.cache.keys(self.layer, head, panel * LANES, LANES);
        tiles::unpack(self.cache.types().0, panel.bytes, start, out);
    }

    /// Elements of a stored head, and with those that fill its last block.
    fn dims(self, head: usize) -> (usize, usize) {
        let dim = self.cache.stored(self.layer).kv[head].score_dim;
        (dim, self.cache.types().0.whole(dim))
    }

    /// Scores of queries at one kv head with the keys of a run that are rotated in passing.
    ///
    /// # Safety
    /// Nobody else uses those parts of `out` meanwhile.
    unsafe fn score_rotated(
        self,
        pass: &Pass,
        own: &mut ThreadBuffers,
        (head, n_planes): (usize, usize),
        run: Run,
        out: Columns<f32>,
    ) {
        let (dim, whole) = self.dims(head);
        let ThreadBuffers { scratch, q, tiles, .. } = own;
        let n_panels = run.n.div_ceil(LANES);
        tiles.tile.resize(n_panels * whole, [0.0; LANES]);
        for (i, panel) in tiles.tile.chunks_exact_mut(whole).enumerate() {
            let at = run.start / LANES + i;
            self.unpack(head, at, 0, panel);
            if let Some(rotation) = pass.rotation(self.layer) {
                tiles::rotate(panel, self.cache.angles(at, n_planes), rotation.pairing());
            }
        }
        let stride = 4 * LANES * whole;
        let keys = super::kernels::Panels { stride, ..tiles::panels(&tiles.tile, dim, run.n) };
        // SAFETY: the caller's promise.
        unsafe { multiply(&keys, &q.view(), scratch, out, run.column) };
    }

    /// Mixes elements of all rows with the weights in `scores`, in the columns of live panels, into
    /// `own.sums`.
    fn mix(
        self,
        own: &mut Tiles,
        (head, elements): (usize, Range<usize>),
        (scores, width): (&[Lanes], usize),
        (runs, live): (&Runs, &[u32]),
    ) {
        let n_elements = elements.len();
        let n_head = scores.len() / width;
        own.sums.clear();
        own.sums.resize(n_head * n_elements, [0.0; LANES]);
        for live in live.chunks(TILE_PANELS) {
            own.tile.resize(live.len() * n_elements, [0.0; LANES]);
            for (column, out) in live.iter().zip(own.tile.chunks_exact_mut(n_elements)) {
                let panel = runs.panel(*column as usize);
                self.unpack(head, panel, elements.start, out);
            }
            let first = live[0] as usize;
            let in_a_row = live[live.len() - 1] as usize - first + 1 == live.len();
            let (weights, stride) = match in_a_row {
                true => (&scores[first..], width),
                false => {
                    own.weights.clear();
                    for row in scores.chunks_exact(width) {
                        own.weights.extend(live.iter().map(|column| row[*column as usize]));
                    }
                    (&own.weights[..], live.len())
                }
            };
            tiles::mix(&own.tile, n_elements, weights, stride, &mut own.sums);
        }
    }
}

impl Buffers {
    /// Attention of one token in a layer whose cache has rows.
    pub(super) fn attend_latent(&mut self, pass: &Pass, layer: usize, part: &Part) {
        let attention = &part.attention[layer];
        let (cache, position) = (&*part.cache, part.position);
        let visible = part.visible(layer, 0);
        let runs = Runs::by(std::iter::once(visible.clone()));
        let stored = Stored { cache, layer };
        let width = runs.width();
        self.scores.resize(attention.geometry.n_head * width, 0.0);
        match attention.geometry.kept {
            Kept::Latent { rank, n_rotated } => {
                self.score_absorbed(pass, part, (stored, rank, n_rotated), &runs);
            }
            _ => self.score_keys(pass, part, stored, &runs),
        }
        let shifts = &self.latent.shifts;
        pass.crew.chunks(&mut self.scores, width, |_, head, row| {
            runs.weigh(row, &visible, |scores| {
                if let Some(shift) = shifts.get(head).filter(|shift| **shift != 0.0) {
                    simd::shift(scores, *shift);
                }
                attention.weigh((position, &visible), head, scores);
            });
        });
        self.mix_latent(pass, stored, &runs);
        self.make_outputs(pass, part, layer, width);
    }

    /// Scores with keys that are what is cached, but for rotation.
    fn score_keys(&mut self, pass: &Pass, part: &Part, stored: Stored, runs: &Runs) {
        let Stored { cache, layer } = stored;
        let g = &part.attention[layer].geometry;
        let Kept::Keys { n_planes } = g.kept else { return };
        let per_kv = g.per_kv();
        let Buffers { q, scores, threads, latent, .. } = self;
        let q = part.of(q, g.query_width());
        latent.shifts.clear();
        let n_tasks = runs.n_parts(ROWS_PER_TASK);
        let out = Columns::new(&mut scores[..], runs.width());
        pass.crew.each_with(threads, g.n_head_kv() * n_tasks, |own, task| {
            // Tasks that follow each other have the same angles.
            let (head, part) = (task % g.n_head_kv(), task / g.n_head_kv());
            let part = runs.part(part, ROWS_PER_TASK);
            let start = g.queries(head * per_kv).start;
            let (dim, whole) = stored.dims(head);
            let query = |i: usize| &q[start + i * dim..][..dim];
            let out = out.skip(head * per_kv);
            // SAFETY: tasks have heads and keys of their own.
            unsafe {
                if n_planes > 0 {
                    fill_queries(&mut own.q, per_kv, (dim, dim), Default::default(), query);
                    stored.score_rotated(pass, own, (head, n_planes), part, out);
                } else {
                    fill_queries(&mut own.q, per_kv, (dim, whole), cache.key_copies(), query);
                    Head { cache, layer, head }.score(&mut own.scratch, &own.q.view(), part, out);
                }
            }
        });
    }

    /// Scores with keys that are products of what is cached: queries are multiplied instead, with the
    /// rows of the matrix in the file.
    fn score_absorbed(
        &mut self,
        pass: &Pass,
        part: &Part,
        (stored, rank, n_rotated): (Stored, usize, usize),
        runs: &Runs,
    ) {
        let g = &part.attention[stored.layer].geometry;
        let Buffers { q, scores, threads, latent, .. } = self;
        let q = part.of(q, g.query_width());
        let LatentBuffers { queries, shifts, .. } = latent;
        let keys = &pass.model.layers[stored.layer].attn_k;
        let (_, whole) = stored.dims(0);
        queries.resize(g.n_head, whole);
        queries.floats.fill(0.0);
        shifts.resize(g.n_head, 0.0);
        let absorbed = Columns::new(&mut queries.floats, whole);
        let constants = Columns::new(shifts, 1);
        pass.crew.each_with(threads, g.n_head_kv(), |own, kv| {
            let row = &mut own.tiles.row;
            row.resize(rank, 0.0);
            let heads = kv * g.per_kv()..(kv + 1) * g.per_kv();
            let n_made = g.kv[kv].score_dim - n_rotated;
            for i in 0..n_made {
                keys.weight.dequantize_row(kv * n_made + i, row);
                for head in heads.clone() {
                    // SAFETY: tasks have heads of their own.
                    let out = unsafe { absorbed.part(head, 0, rank) };
                    simd::add_scaled(out, q[g.queries(head)][n_rotated + i], row);
                }
            }
            for head in heads {
                // SAFETY: as above.
                let rotated = unsafe { absorbed.part(head, rank, n_rotated) };
                rotated.copy_from_slice(&q[g.queries(head)][..n_rotated]);
                let bias = keys.bias.as_ref().map(|bias| &bias[g.keys(kv)]);
                let constant = bias.map_or(0.0, |bias| simd::dot(&q[g.queries(head)], bias));
                // SAFETY: as above.
                unsafe { constants.part(head, 0, 1) }.fill(constant);
            }
        });
        queries.finish(pass.crew, stored.cache.key_copies(), |_, _| {});
        let Stored { cache, layer } = stored;
        let out = Columns::new(&mut scores[..], runs.width());
        pass.crew.each_with(threads, runs.n_parts(ROWS_PER_TASK), |own, task| {
            let part = runs.part(task, ROWS_PER_TASK);
            // SAFETY: tasks have rows of their own.
            unsafe {
                Head { cache, layer, head: 0 }.score(&mut own.scratch, &queries.view(), part, out);
            }
        });
    }

    /// Mixes cached rows with the weights of all heads.
    fn mix_latent(&mut self, pass: &Pass, stored: Stored, runs: &Runs) {
        let heads = stored.cache.stored(stored.layer);
        let kept = pass.geometry(stored.layer).kept;
        let Buffers { scores, threads, latent, .. } = self;
        let LatentBuffers { mixed, live, .. } = latent;
        let (scores, width) = (scores.as_chunks::<LANES>().0, runs.width() / LANES);
        // Rotated elements after a latent are no part of values.
        let mixed_of = |dim: usize| if let Kept::Latent { rank, .. } = kept { rank } else { dim };
        let (n_head, row) = (scores.len() / width, mixed_of(heads.key_width()));
        // Without the sign, so that -0 is nothing.
        let is_live = |scores: &Lanes| scores.iter().fold(0, |any, x| any | x.to_bits() << 1) != 0;
        let any = |panel: &u32| (0..n_head).any(|h| is_live(&scores[h * width + *panel as usize]));
        live.clear();
        live.extend((0..width as u32).filter(any));
        mixed.resize(n_head * row, 0.0);
        let out = Columns::new(mixed, row);
        let widest = heads.kv.iter().map(|kv| mixed_of(kv.score_dim)).max().unwrap_or(0);
        let n_parts = widest.div_ceil(MIX_ELEMENTS);
        pass.crew.each_with(threads, heads.n_head_kv() * n_parts, |own, task| {
            let (head, start) = (task / n_parts, task % n_parts * MIX_ELEMENTS);
            let (dim, whole) = stored.dims(head);
            let dim = mixed_of(dim);
            if start >= dim {
                return;
            }
            let elements = start..whole.min(start + MIX_ELEMENTS);
            let n = elements.len();
            stored.mix(&mut own.tiles, (head, elements), (scores, width), (runs, live));
            for (h, sums) in own.tiles.sums.chunks_exact(n).enumerate() {
                let n = n.min(dim - start);
                // SAFETY: tasks have elements of their own.
                let out = unsafe { out.part(h, heads.keys(head).start + start, n) };
                out.iter_mut().zip(sums).for_each(|(out, sum)| *out = tiles::total(sum));
            }
        });
    }

    /// Outputs of the heads from mixed rows.
    fn make_outputs(&mut self, pass: &Pass, part: &Part, layer: usize, width: usize) {
        let g = &part.attention[layer].geometry;
        let w = &pass.matrices.layers[layer].attn_v;
        let Buffers { scores, heads, threads, latent, .. } = self;
        let (mixed, scores) = (&latent.mixed, &scores[..]);
        let heads = Columns::new(&mut heads.floats[..], heads.width);
        pass.crew.each_with(threads, g.n_head_kv(), |own, kv| {
            let first = kv * g.per_kv();
            let row = |i: usize| &mixed[(first + i) * w.n_in..][..w.n_in];
            fill_queries(&mut own.q, g.per_kv(), (w.n_in, w.n_in), w.copies, row);
            let values = g.values(kv);
            // Products begin with whole panels.
            let start = values.start / LANES * LANES;
            let (skip, n) = (values.start - start, values.end - start);
            own.out.resize(g.per_kv() * n, 0.0);
            let out = Columns::new(&mut own.out, n);
            // SAFETY: the output is this thread's own.
            unsafe { w.multiply((start, n), &own.q.view(), &mut own.scratch, out, 0) };
            for (i, made) in own.out.chunks_exact(n).enumerate() {
                let head = first + i;
                // SAFETY: tasks have heads of their own.
                let out =
                    unsafe { heads.part(part.rows.start, g.outputs(head).start, values.len()) };
                out.copy_from_slice(&made[skip..]);
                if let Some(bias) = &w.bias {
                    // It has been added once, and weights may sum to anything.
                    let mass = simd::sum(&scores[head * width..(head + 1) * width]);
                    simd::add_scaled(out, mass - 1.0, &bias[values.clone()]);
                }
            }
        });
    }

    /// Makes keys and values of the cached rows at these positions, into the cache that other layers
    /// share with this one.
    pub(super) fn rebuild(
        &mut self,
        pass: &Pass,
        layer: usize,
        cache: &mut KvCache,
        runs: &[Range<usize>],
    ) {
        let Some((mut rebuilt, at)) = cache.take_rebuilt(layer) else { return };
        for run in runs {
            for start in run.clone().step_by(REBUILT_ROWS) {
                let n = REBUILT_ROWS.min(run.end - start);
                self.make_keys_and_values(pass, Stored { cache, layer }, (start, n));
                let LatentBuffers { keys, values, .. } = &self.latent;
                rebuilt.store(Some(pass.crew), (at, start), keys, values);
            }
        }
        cache.put_rebuilt(rebuilt);
    }

    /// The same for `n` positions from `start` on, a multiple of [`LANES`], into buffers.
    fn make_keys_and_values(&mut self, pass: &Pass, stored: Stored, (start, n): (usize, usize)) {
        let g = pass.geometry(stored.layer);
        let w = &pass.matrices.layers[stored.layer];
        let heads = stored.cache.stored(stored.layer);
        let width = heads.key_width();
        let latent = &mut self.latent;
        let mut rows = std::mem::take(&mut latent.rows);
        let (mut keys, mut values) =
            (std::mem::take(&mut latent.keys), std::mem::take(&mut latent.values));
        rows.resize(n, width);
        keys.resize(n * g.key_width(), 0.0);
        let out = Columns::new(&mut rows.floats, width);
        let to_keys = Columns::new(&mut keys, g.key_width());
        pass.crew.each_with(&mut self.threads, n.div_ceil(LANES), |own, i| {
            let rows = i * LANES..n.min((i + 1) * LANES);
            for head in 0..heads.n_head_kv() {
                let ((dim, whole), at) = (stored.dims(head), heads.keys(head));
                own.tiles.tile.resize(whole, [0.0; LANES]);
                let panel = start / LANES + i;
                stored.unpack(head, panel, 0, &mut own.tiles.tile);
                // SAFETY: tasks have rows of their own.
                unsafe { spread(&own.tiles.tile[..dim], rows.clone(), at.start, out) };
                let Kept::Keys { n_planes } = g.kept else { continue };
                if let Some(rotation) = pass.rotation(stored.layer).filter(|_| n_planes > 0) {
                    let angles = stored.cache.angles(panel, n_planes);
                    tiles::rotate(&mut own.tiles.tile, angles, rotation.pairing());
                }
                // SAFETY: as above.
                unsafe { spread(&own.tiles.tile[..dim], rows.clone(), at.start, to_keys) };
            }
        });
        match g.kept {
            Kept::Latent { rank, .. } => {
                let row = |t: usize| &rows.floats[t * width..][..width];
                self.keys_and_values(pass, (w, g, rank), n, row, (&mut keys, &mut values));
            }
            _ => {
                values.resize(n * g.value_width(), 0.0);
                rows.finish(pass.crew, w.attn_v.copies, |_, _| {});
                let outs = [(&w.attn_v, Columns::new(&mut values, w.attn_v.n_out))];
                products(pass.crew, &outs, &rows.view(), &mut self.threads);
            }
        }
        let latent = &mut self.latent;
        (latent.rows, latent.keys, latent.values) = (rows, keys, values);
    }
}

/// Writes a panel's lanes to rows, from an element on.
///
/// # Safety
/// Nobody else uses those parts of `out` meanwhile.
unsafe fn spread(tile: &[Lanes], rows: Range<usize>, start: usize, out: Columns<f32>) {
    for (lane, row) in rows.enumerate() {
        // SAFETY: the caller's promise.
        let out = unsafe { out.part(row, start, tile.len()) };
        out.iter_mut().zip(tile).for_each(|(out, x)| *out = x[lane]);
    }
}
