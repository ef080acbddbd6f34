//! The cache of keys and values, in the layouts that the kernels multiply with.
//!
//! Keys of a head are the rows of a matrix that grows by a row per position; values are its
//! transpose, which grows by a column. So scores and the mixing of values are products of packed
//! panels, like those with weights.

use half::slice::HalfFloatSliceExt;

use memmap2::MmapMut;

use super::kernels::{LANES, LAYOUTS, Panels};
use super::threads::Crew;
use crate::bad_usage;
use crate::error::Result;
use crate::merge::Geometry;

/// Elements that are stored at once before more than one thread is worth its while.
const MIN_PARALLEL: usize = 8192;

/// The format of cached elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    /// Half precision.
    F16,
    /// Full precision.
    F32,
}

impl CacheType {
    fn name(self) -> &'static str {
        match self {
            CacheType::F16 => "F16",
            CacheType::F32 => "F32",
        }
    }

    fn layout(self) -> usize {
        LAYOUTS.iter().position(|l| l.name == self.name()).unwrap_or(0)
    }

    fn bytes(self) -> usize {
        LAYOUTS[self.layout()].row_bytes
    }
}

/// Keys and values of every layer for up to `n_ctx` positions.
pub struct KvCache {
    n_ctx: usize,
    ty: CacheType,
    layers: Vec<LayerCache>,
}

/// Keys: `[n_head_kv, n_ctx / LANES, width, LANES]`; values: `[n_head_kv, width / LANES, n_ctx, LANES]`.
struct LayerCache {
    geometry: Geometry,
    keys: MmapMut,
    values: MmapMut,
}

impl KvCache {
    /// An empty cache for layers of these shapes. Memory is only taken as positions fill.
    pub fn new(
        layers: impl Iterator<Item = Geometry>,
        n_ctx: usize,
        ty: CacheType,
    ) -> Result<KvCache> {
        let memory = |n_head: usize, width: usize| -> Result<MmapMut> {
            let width = width.next_multiple_of(LANES);
            let elements = n_ctx.checked_next_multiple_of(LANES).and_then(|n| n.checked_mul(width));
            let bytes = elements.and_then(|n| n.checked_mul(n_head * ty.bytes()));
            match bytes.filter(|n| *n <= isize::MAX as usize).map(|n| MmapMut::map_anon(n.max(1))) {
                Some(Ok(map)) => Ok(map),
                _ => bad_usage!("no memory for a context of {n_ctx} tokens; ask for a shorter one"),
            }
        };
        let layer = |geometry: Geometry| {
            Ok(LayerCache {
                geometry,
                keys: memory(geometry.n_head_kv, geometry.score_dim)?,
                values: memory(geometry.n_head_kv, geometry.value_dim)?,
            })
        };
        Ok(KvCache { n_ctx, ty, layers: layers.map(layer).collect::<Result<_>>()? })
    }

    /// Positions that fit.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Size in bytes.
    pub fn n_bytes(&self) -> usize {
        self.layers.iter().map(|l| l.keys.len() + l.values.len()).sum()
    }

    /// Stores keys and values of the positions from `n_past` on. `keys: [n, n_head_kv * score_dim]`,
    /// `values: [n, n_head_kv * value_dim]`
    pub(super) fn store(
        &mut self,
        crew: &Crew,
        layer: usize,
        n_past: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let ty = self.ty;
        let LayerCache { geometry: g, keys: key_cache, values: value_cache } =
            &mut self.layers[layer];
        let per_head = |map: &MmapMut| map.len() / g.n_head_kv;
        let n_bytes = per_head(key_cache);
        let write = |bytes: &mut [u8], x: &[f32]| match ty {
            CacheType::F16 => {
                let mut halves = [half::f16::ZERO; LANES];
                halves[..x.len()].convert_from_f32_slice(x);
                for (out, h) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(&halves[..x.len()]) {
                    *out = h.to_le_bytes();
                }
            }
            CacheType::F32 => {
                for (out, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(x) {
                    *out = x.to_le_bytes();
                }
            }
        };
        let size = ty.bytes();
        let (width, stride) = (g.score_dim, g.n_head_kv * g.score_dim);
        let each_head =
            |map: &mut MmapMut, n_bytes, f: &(dyn Fn(usize, &mut [u8]) + Sync)| match keys.len()
                + values.len()
                < MIN_PARALLEL
            {
                true => map.chunks_exact_mut(n_bytes).enumerate().for_each(|(i, m)| f(i, m)),
                false => crew.chunks(map, n_bytes, |_, i, m| f(i, m)),
            };
        each_head(key_cache, n_bytes, &|head, cache| {
            for (t, row) in keys.chunks_exact(stride).enumerate() {
                let (panel, lane) = ((n_past + t) / LANES, (n_past + t) % LANES);
                let row = &row[head * width..(head + 1) * width];
                for (d, x) in row.iter().enumerate() {
                    let at = ((panel * width + d) * LANES + lane) * size;
                    write(&mut cache[at..at + size], std::slice::from_ref(x));
                }
            }
        });
        let n_ctx = self.n_ctx.next_multiple_of(LANES);
        let n_bytes = per_head(value_cache);
        let (width, stride) = (g.value_dim, g.n_head_kv * g.value_dim);
        each_head(value_cache, n_bytes, &|head, cache| {
            for (t, row) in values.chunks_exact(stride).enumerate() {
                let row = &row[head * width..(head + 1) * width];
                for (panel, x) in row.chunks(LANES).enumerate() {
                    let at = (panel * n_ctx + n_past + t) * LANES * size;
                    write(&mut cache[at..at + x.len() * size], x);
                }
            }
        });
    }

    /// Keys of one kv head at `n` positions from `start` on, a multiple of [`LANES`]: rows are
    /// positions.
    pub(super) fn keys(&self, layer: usize, head: usize, start: usize, n: usize) -> Panels<'_> {
        let LayerCache { geometry: g, keys, .. } = &self.layers[layer];
        let per_head = keys.len() / g.n_head_kv;
        let stride = g.score_dim * LANES * self.ty.bytes();
        let bytes = &keys[head * per_head + start / LANES * stride..(head + 1) * per_head];
        Panels { layout: self.ty.layout(), bytes, stride, n_in: g.score_dim, n_rows: n }
    }

    /// Values of one kv head: rows are `n_rows` elements from `row` on, a multiple of [`LANES`],
    /// columns the `n` positions from `start` on.
    pub(super) fn values(
        &self,
        layer: usize,
        head: usize,
        (row, n_rows): (usize, usize),
        (start, n): (usize, usize),
    ) -> Panels<'_> {
        let LayerCache { geometry: g, values, .. } = &self.layers[layer];
        let per_head = values.len() / g.n_head_kv;
        let column = LANES * self.ty.bytes();
        let stride = self.n_ctx.next_multiple_of(LANES) * column;
        let at = head * per_head + row / LANES * stride + start * column;
        let bytes = &values[at..(head + 1) * per_head];
        Panels { layout: self.ty.layout(), bytes, stride, n_in: n, n_rows }
    }
}
