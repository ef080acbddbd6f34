//! The cache of keys and values, in the layouts that the kernels multiply with.
//!
//! Keys of a head are the rows of a matrix that grows by a row per position; values are its
//! transpose, which grows by a column. So scores and the mixing of values are products of packed
//! panels, like those with weights. Rounded keys are rows of Q8_0 or Q4_0. Rounded values have a
//! scale for each position and 32 elements, which is multiplied into the position's weight
//! ([`KvCache::value_scales`]), so that what is left is a matrix of whole numbers.

use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::MmapMut;

use super::kernels::{Copies, LANES, LAYOUTS, Panels};
use super::threads::Crew;
use crate::bad_usage;
use crate::error::Result;
use crate::merge::Geometry;

/// Elements that are stored at once before more than one thread is worth its while.
const MIN_PARALLEL: usize = 8192;
/// Elements that share a scale.
pub(super) const GROUP: usize = 32;

/// The format of cached elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    /// Full precision.
    F32,
    /// Half precision.
    F16,
    /// Multiples of one scale per 32 elements, 8 bits each.
    Q8_0,
    /// The same, 4 bits each.
    Q4_0,
}

impl CacheType {
    /// All types.
    pub const ALL: [CacheType; 4] =
        [CacheType::F32, CacheType::F16, CacheType::Q8_0, CacheType::Q4_0];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            CacheType::F32 => "f32",
            CacheType::F16 => "f16",
            CacheType::Q8_0 => "q8_0",
            CacheType::Q4_0 => "q4_0",
        }
    }

    /// Whether elements are whole multiples of a scale.
    pub fn is_rounded(self) -> bool {
        matches!(self, CacheType::Q8_0 | CacheType::Q4_0)
    }

    fn layout(self, of_keys: bool) -> usize {
        let name = match self {
            CacheType::F32 => "F32",
            CacheType::F16 => "F16",
            CacheType::Q8_0 if of_keys => "Q8_0",
            CacheType::Q4_0 if of_keys => "Q4_0",
            CacheType::Q8_0 => "I8",
            CacheType::Q4_0 => "I4",
        };
        LAYOUTS.iter().position(|l| l.name == name).unwrap_or(0)
    }

    /// A scale, and 32 elements as multiples of it, as ggml rounds them.
    fn round(self, x: &[f32; GROUP]) -> (f16, [i8; GROUP]) {
        const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23
        let largest = x.iter().fold(0.0f32, |a, x| if x.abs() > a.abs() { *x } else { a });
        let (d, most) = match self {
            CacheType::Q4_0 => (largest / -8.0, 7.0),
            _ => (largest.abs() / 127.0, 127.0),
        };
        let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
        let q = x.map(|x| ((x * inverse).min(most) + ROUND - ROUND) as i8);
        (f16::from_f32(d), q)
    }

    /// Floats as they are stored, `N` bytes each.
    fn store<const N: usize>(x: &[f32], mut write: impl FnMut(usize, [u8; N])) {
        let mut halves = [f16::ZERO; LANES];
        for (c, x) in x.chunks(LANES).enumerate() {
            if N == 2 {
                halves[..x.len()].convert_from_f32_slice(x);
            }
            for (i, x) in x.iter().enumerate() {
                let mut bytes = [0; N];
                match N {
                    2 => bytes.copy_from_slice(&halves[i].to_le_bytes()),
                    _ => bytes.copy_from_slice(&x.to_le_bytes()),
                }
                write(c * LANES + i, bytes);
            }
        }
    }
}

/// Keys and values of every layer for up to `n_ctx` positions.
pub struct KvCache {
    n_ctx: usize,
    keys: CacheType,
    values: CacheType,
    layers: Vec<LayerCache>,
}

/// For each kv head, keys: panels of [`LANES`] positions; values: panels of [`LANES`] elements, then
/// their scales, `[value_dim / 32, n_ctx]`.
struct LayerCache {
    geometry: Geometry,
    keys: MmapMut,
    values: MmapMut,
}

impl KvCache {
    /// An empty cache for layers of these shapes, with these types of keys and values. Memory is
    /// only taken as positions fill.
    pub fn new(
        layers: impl Iterator<Item = Geometry>,
        n_ctx: usize,
        (keys, values): (CacheType, CacheType),
    ) -> Result<KvCache> {
        let memory = |bytes: Option<usize>| -> Result<MmapMut> {
            match bytes.filter(|n| *n <= isize::MAX as usize).map(|n| MmapMut::map_anon(n.max(1))) {
                Some(Ok(map)) => Ok(map),
                _ => bad_usage!("no memory for a context of {n_ctx} tokens; ask for a shorter one"),
            }
        };
        let layer = |geometry: Geometry| {
            let Geometry { n_head_kv, score_dim, value_dim, .. } = geometry;
            let widths = [("key", keys, score_dim), ("value", values, value_dim)];
            for (what, ty, dim) in widths {
                if ty.is_rounded() && !dim.is_multiple_of(GROUP) {
                    bad_usage!(
                        "--cache-type-{} {}: heads have {dim} elements per {what}, not a multiple of {GROUP}",
                        &what[..1],
                        ty.name()
                    );
                }
            }
            let places = n_ctx.checked_next_multiple_of(LANES);
            let panel = |ty: CacheType, of_keys, n: usize| {
                let layout = &LAYOUTS[ty.layout(of_keys)];
                (n / layout.block_len).checked_mul(layout.row_bytes * LANES)
            };
            let key_bytes = places
                .and_then(|n| panel(keys, true, score_dim)?.checked_mul(n / LANES * n_head_kv));
            let value_bytes = places.and_then(|n| {
                let scales = if values.is_rounded() { value_dim / GROUP * 2 } else { 0 };
                let panels = panel(values, false, n)?.checked_mul(value_dim.div_ceil(LANES))?;
                panels.checked_add(scales.checked_mul(n)?)?.checked_mul(n_head_kv)
            });
            Ok(LayerCache { geometry, keys: memory(key_bytes)?, values: memory(value_bytes)? })
        };
        Ok(KvCache { n_ctx, keys, values, layers: layers.map(layer).collect::<Result<_>>()? })
    }

    /// Positions that fit.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// The types of keys and values.
    pub fn types(&self) -> (CacheType, CacheType) {
        (self.keys, self.values)
    }

    /// The copies of queries that keys are multiplied with.
    pub(super) fn key_copies(&self) -> Copies {
        Copies::of(self.keys.layout(true))
    }

    /// Size in bytes.
    pub fn n_bytes(&self) -> usize {
        (0..self.layers.len()).map(|i| self.layer_bytes(i)).sum()
    }

    /// Size of one layer in bytes.
    pub fn layer_bytes(&self, layer: usize) -> usize {
        let LayerCache { keys, values, .. } = &self.layers[layer];
        keys.len() + values.len()
    }

    /// Positions for which there is room.
    fn places(&self) -> usize {
        self.n_ctx.next_multiple_of(LANES)
    }

    /// Bytes of a panel of values.
    fn value_stride(&self) -> usize {
        LAYOUTS[self.values.layout(false)].panel_bytes(self.places())
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
        let (key_type, value_type) = (self.keys, self.values);
        let (places, value_stride) = (self.places(), self.value_stride());
        let LayerCache { geometry: g, keys: key_cache, values: value_cache } =
            &mut self.layers[layer];
        let parallel = keys.len() + values.len() >= MIN_PARALLEL;
        let each_head = |map: &mut MmapMut, f: &(dyn Fn(usize, &mut [u8]) + Sync)| {
            let n_bytes = map.len() / g.n_head_kv;
            match parallel {
                true => crew.chunks(map, n_bytes, |_, i, m| f(i, m)),
                false => map.chunks_exact_mut(n_bytes).enumerate().for_each(|(i, m)| f(i, m)),
            }
        };
        let width = g.score_dim;
        let stride = LAYOUTS[key_type.layout(true)].panel_bytes(width);
        each_head(key_cache, &|head, cache| {
            for (t, row) in keys.chunks_exact(g.n_head_kv * width).enumerate() {
                let (panel, lane) = ((n_past + t) / LANES, (n_past + t) % LANES);
                let cache = &mut cache[panel * stride..(panel + 1) * stride];
                store_key(key_type, cache, lane, &row[head * width..(head + 1) * width]);
            }
        });
        let width = g.value_dim;
        each_head(value_cache, &|head, cache| {
            let (cache, scales) = cache.split_at_mut(width.div_ceil(LANES) * value_stride);
            for (t, row) in values.chunks_exact(g.n_head_kv * width).enumerate() {
                let row = &row[head * width..(head + 1) * width];
                let cache = (&mut *cache, &mut *scales);
                store_value(value_type, cache, (n_past + t, places), row);
            }
        });
    }

    /// Keys of one kv head at `n` positions from `start` on, a multiple of [`LANES`]: rows are
    /// positions.
    pub(super) fn keys(&self, layer: usize, head: usize, start: usize, n: usize) -> Panels<'_> {
        let LayerCache { geometry: g, keys, .. } = &self.layers[layer];
        let per_head = keys.len() / g.n_head_kv;
        let layout = self.keys.layout(true);
        let stride = LAYOUTS[layout].panel_bytes(g.score_dim);
        let bytes = &keys[head * per_head + start / LANES * stride..(head + 1) * per_head];
        Panels { layout, bytes, stride, n_in: g.score_dim, n_rows: n }
    }

    /// Values of one kv head: rows are `n_rows` elements from `row` on, columns at least the `n`
    /// positions from `start` on; `row` and `start` are multiples of [`LANES`].
    pub(super) fn values(
        &self,
        layer: usize,
        head: usize,
        (row, n_rows): (usize, usize),
        (start, n): (usize, usize),
    ) -> Panels<'_> {
        let LayerCache { geometry: g, values, .. } = &self.layers[layer];
        let per_head = values.len() / g.n_head_kv;
        let layout = self.values.layout(false);
        let stride = self.value_stride();
        let n_in = n.next_multiple_of(LAYOUTS[layout].block_len);
        let at = head * per_head + row / LANES * stride + LAYOUTS[layout].panel_bytes(start);
        let bytes = &values[at..(head + 1) * per_head];
        Panels { layout, bytes, stride, n_in, n_rows }
    }

    /// The same, but only of some positions, an even number of them, counted from `start`: copied to
    /// `to`.
    pub(super) fn values_at<'a>(
        &self,
        (layer, head): (usize, usize),
        (row, n_rows): (usize, usize),
        (start, positions): (usize, &[u32]),
        to: &'a mut Vec<u8>,
    ) -> Panels<'a> {
        let (layout, n_in) = (self.values.layout(false), positions.len());
        let block = &LAYOUTS[layout];
        let column = block.panel_bytes(block.block_len) / block.block_len;
        let stride = block.panel_bytes(n_in);
        to.resize(stride * n_rows.div_ceil(LANES), 0);
        let all = self.values(layer, head, (row, n_rows), (start, 0));
        for (to, from) in to.chunks_exact_mut(stride).zip(all.bytes.chunks(all.stride)) {
            for (to, at) in to.chunks_exact_mut(column).zip(positions) {
                let at = *at as usize * column;
                to.copy_from_slice(&from[at..at + column]);
            }
        }
        Panels { layout, bytes: to, stride, n_in, n_rows }
    }

    /// Scales of the 32 values from `row` on at the `n` positions from `start` on, as half-precision
    /// bytes; nothing for types that have none.
    pub(super) fn value_scales(
        &self,
        layer: usize,
        head: usize,
        row: usize,
        (start, n): (usize, usize),
    ) -> Option<&[u8]> {
        let LayerCache { geometry: g, values, .. } = &self.layers[layer];
        let per_head = values.len() / g.n_head_kv;
        let at = g.value_dim.div_ceil(LANES) * self.value_stride();
        let at = head * per_head + at + (row / GROUP * self.places() + start) * 2;
        self.values.is_rounded().then(|| &values[at..at + 2 * n])
    }
}

/// Writes a key into its lane of a panel.
fn store_key(ty: CacheType, panel: &mut [u8], lane: usize, key: &[f32]) {
    match ty {
        CacheType::F32 => CacheType::store::<4>(key, |d, bytes| {
            panel[(d * LANES + lane) * 4..][..4].copy_from_slice(&bytes);
        }),
        CacheType::F16 => CacheType::store::<2>(key, |d, bytes| {
            panel[(d * LANES + lane) * 2..][..2].copy_from_slice(&bytes);
        }),
        CacheType::Q8_0 | CacheType::Q4_0 => {
            let blocks = panel.chunks_exact_mut(LAYOUTS[ty.layout(true)].panel_bytes(GROUP));
            for (block, key) in blocks.zip(key.as_chunks::<GROUP>().0) {
                let (d, q) = ty.round(key);
                let (scales, words) = block.split_at_mut(2 * LANES);
                scales[2 * lane..][..2].copy_from_slice(&d.to_le_bytes());
                let byte = |i: usize| match ty {
                    CacheType::Q8_0 => q[i] as u8,
                    _ => (q[i] + 8) as u8 | ((q[i + GROUP / 2] + 8) as u8) << 4,
                };
                for (j, word) in words.chunks_exact_mut(4 * LANES).enumerate() {
                    let bytes = [0, 1, 2, 3].map(|i| byte(4 * j + i));
                    word[4 * lane..][..4].copy_from_slice(&bytes);
                }
            }
        }
    }
}

/// Writes a value into its column of the panels, of `places` columns, and its scales after them.
fn store_value(
    ty: CacheType,
    (panels, scales): (&mut [u8], &mut [u8]),
    (column, places): (usize, usize),
    value: &[f32],
) {
    let at = |d: usize| (d / LANES * places + column) * LANES + d % LANES;
    match ty {
        CacheType::F32 => CacheType::store::<4>(value, |d, bytes| {
            panels[at(d) * 4..][..4].copy_from_slice(&bytes);
        }),
        CacheType::F16 => CacheType::store::<2>(value, |d, bytes| {
            panels[at(d) * 2..][..2].copy_from_slice(&bytes);
        }),
        CacheType::Q8_0 | CacheType::Q4_0 => {
            for (b, value) in value.as_chunks::<GROUP>().0.iter().enumerate() {
                let (d, q) = ty.round(value);
                scales[(b * places + column) * 2..][..2].copy_from_slice(&d.to_le_bytes());
                for (p, q) in q.as_chunks::<LANES>().0.iter().enumerate() {
                    let at = at(b * GROUP + p * LANES);
                    match ty {
                        CacheType::Q8_0 => {
                            panels[at..at + 8].copy_from_slice(&q.map(|q| q as u8));
                        }
                        _ => panels[at / 2..at / 2 + 4].copy_from_slice(&nibbles(q)),
                    }
                }
            }
        }
    }
}

/// 8 numbers of 4 bits each: `i` and `i + 4` in a byte, moved up by 8.
fn nibbles(q: &[i8; LANES]) -> [u8; LANES / 2] {
    [0, 1, 2, 3].map(|i| (q[i] + 8) as u8 | ((q[i + 4] + 8) as u8) << 4)
}
