//! The cache of keys and values, or of what they are made of, in the layouts that the kernels multiply
//! with.
//!
//! Keys of a head are the rows of a matrix that grows by a row per position; values are its
//! transpose, which grows by a column. So scores and the mixing of values are products of packed
//! panels, like those with weights. Rounded keys are rows of Q8_0 or Q4_0. Rounded values have a
//! scale for each position and 32 elements, which is multiplied into the position's weight
//! ([`KvCache::value_scales`]), so that what is left is a matrix of whole numbers.

#![allow(unsafe_code)]

use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::MmapMut;

use super::finite::Fault;
use super::kernels::{Copies, LANES, LAYOUTS, Panels};
use super::threads::{Columns, Crew};
use super::tiles::Lanes;
use crate::bad_usage;
use crate::engine::CacheType;
use crate::error::Result;
use crate::merge::{Geometry, Kept, KvHead};

/// Elements that are stored at once before more than one thread is worth its while.
const MIN_PARALLEL: usize = 8192;
/// Elements that share a scale.
pub(super) const GROUP: usize = 32;

impl CacheType {
    /// Elements of a head of this width as they are stored: whole blocks.
    pub(super) fn whole(self, dim: usize) -> usize {
        if self.is_rounded() { dim.next_multiple_of(GROUP) } else { dim }
    }

    pub(super) fn layout(self, of_keys: bool) -> usize {
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

/// Keys and values of every layer for up to `n_ctx` positions, or what they are made of.
pub struct KvCache {
    pub(super) n_ctx: usize,
    pub(super) keys: CacheType,
    pub(super) values: CacheType,
    pub(super) layers: Vec<LayerCache>,
    /// Keys and values of one layer after the other, made again where rows are cached and several
    /// tokens attend: one layer for each shape.
    rebuilt: Option<Box<KvCache>>,
    /// Cosines and sines of every position, where keys are rotated when they are read: panels of
    /// [`LANES`] positions, each two vectors for every plane.
    pub(super) angles: Vec<Lanes>,
    /// Where numbers came up that are not finite, and so are not what is cached from there on.
    pub(super) fault: Option<Fault>,
}

/// For each head of [`Geometry::stored`], keys: panels of [`LANES`] positions; values: panels of [`LANES`] elements, then
/// their scales, `[value_dim / 32, n_ctx]`. Heads of a width that is not one of whole blocks have
/// zeros after their elements.
pub(super) struct LayerCache {
    /// Its heads are those that are stored.
    pub(super) geometry: Geometry,
    /// The layer of the rebuilt keys and values.
    rebuilt: Option<usize>,
    pub(super) keys: MmapMut,
    pub(super) values: MmapMut,
    /// Where the heads begin in either, and where the last ends.
    pub(super) key_starts: Vec<usize>,
    pub(super) value_starts: Vec<usize>,
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
        let places = n_ctx.checked_next_multiple_of(LANES);
        let key_bytes = |dim: usize| {
            let layout = &LAYOUTS[keys.layout(true)];
            layout.panel_bytes(keys.whole(dim)).checked_mul(places? / LANES)
        };
        let value_bytes = |dim: usize| {
            let layout = &LAYOUTS[values.layout(false)];
            let dim = values.whole(dim);
            let panel = (places? / layout.block_len).checked_mul(layout.row_bytes * LANES)?;
            let scales = if values.is_rounded() { dim / GROUP * 2 } else { 0 };
            panel.checked_mul(dim.div_ceil(LANES))?.checked_add(scales.checked_mul(places?)?)
        };
        // Where heads of these sizes begin; nothing if they are too large.
        let starts = |geometry: &Geometry, size: &dyn Fn(&KvHead) -> Option<usize>| {
            geometry.kv.iter().try_fold(vec![0usize], |mut starts, head| {
                starts.push(starts.last()?.checked_add(size(head)?)?);
                Some(starts)
            })
        };
        let shapes = Shapes::of(layers);
        let layer = |(geometry, rebuilt): (Geometry, Option<usize>)| {
            let key_starts = starts(&geometry, &|head| key_bytes(head.score_dim));
            let value_starts = starts(&geometry, &|head| value_bytes(head.value_dim));
            let end = |starts: &Option<Vec<usize>>| starts.as_ref()?.last().copied();
            Ok(LayerCache {
                keys: memory(end(&key_starts))?,
                values: memory(end(&value_starts))?,
                key_starts: key_starts.unwrap_or_default(),
                value_starts: value_starts.unwrap_or_default(),
                geometry,
                rebuilt,
            })
        };
        let rebuilt = match shapes.rebuilt.is_empty() {
            true => None,
            false => {
                let layers = shapes.rebuilt.into_iter();
                Some(Box::new(KvCache::new(layers, n_ctx, rebuilt_types(keys))?))
            }
        };
        let n_angles = places.and_then(|n| (n / LANES * 2).checked_mul(shapes.n_planes));
        let n_bytes = n_angles.and_then(|n| n.checked_mul(size_of::<Lanes>()));
        // As memory, so that too much of it is an error.
        memory(n_bytes)?;
        let angles = vec![[0.0; LANES]; n_angles.unwrap_or(0)];
        let layers = shapes.stored.into_iter().map(layer).collect::<Result<_>>()?;
        Ok(KvCache { n_ctx, keys, values, layers, rebuilt, angles, fault: None })
    }

    /// Positions that fit.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// The types of keys and values.
    pub fn types(&self) -> (CacheType, CacheType) {
        (self.keys, self.values)
    }

    /// Writes zeros to all of its memory, which is then taken.
    pub(crate) fn clear(&mut self) {
        for layer in &mut self.layers {
            layer.keys.fill(0);
            layer.values.fill(0);
        }
        self.angles.fill([0.0; LANES]);
        self.fault = None;
        self.rebuilt.iter_mut().for_each(|cache| cache.clear());
    }

    /// The copies of queries that keys are multiplied with.
    pub(super) fn key_copies(&self) -> Copies {
        Copies::of(self.keys.layout(true))
    }

    /// Size in bytes.
    pub fn n_bytes(&self) -> usize {
        let layers: usize = (0..self.layers.len()).map(|i| self.layer_bytes(i)).sum();
        let rebuilt = self.rebuilt.as_ref().map_or(0, |cache| cache.n_bytes());
        layers + rebuilt + size_of_val(&self.angles[..])
    }

    /// Size of one layer in bytes.
    pub fn layer_bytes(&self, layer: usize) -> usize {
        let LayerCache { key_starts, value_starts, .. } = &self.layers[layer];
        [key_starts, value_starts].iter().filter_map(|starts| starts.last()).sum()
    }

    /// Where numbers came up that are not finite, before position `n`.
    pub fn fault(&self, n: usize) -> Option<Fault> {
        self.fault.filter(|fault| fault.start < n)
    }

    /// Forgets a fault from position `n` on, where other tokens follow. Products run over whole panels,
    /// with zeros for those that no token sees yet; so zeros are written there.
    pub(crate) fn heal(&mut self, n: usize) {
        if let Some(fault) = self.fault.take_if(|fault| fault.start >= n) {
            self.wipe(n, fault.end);
        }
    }

    fn wipe(&mut self, start: usize, end: usize) {
        for i in 0..self.layers.len() {
            let heads = self.stored(i);
            let [keys, values] = [vec![0.0; heads.key_width()], vec![0.0; heads.value_width()]];
            for position in start..end {
                self.store(None, (i, position), &keys, &values);
            }
        }
        self.rebuilt.iter_mut().for_each(|cache| cache.wipe(start, end));
    }

    /// The cache of rebuilt keys and values, and the layer of it that a layer has.
    pub(super) fn rebuilt(&self, layer: usize) -> Option<(&KvCache, usize)> {
        Some((self.rebuilt.as_deref()?, self.layers[layer].rebuilt?))
    }

    /// The same, out of this cache, until it is put back.
    pub(super) fn take_rebuilt(&mut self, layer: usize) -> Option<(Box<KvCache>, usize)> {
        let at = self.layers[layer].rebuilt?;
        Some((self.rebuilt.take()?, at))
    }

    /// Puts it back.
    pub(super) fn put_rebuilt(&mut self, rebuilt: Box<KvCache>) {
        self.rebuilt = Some(rebuilt);
    }

    /// The shape of what a layer stores: [`Geometry::stored`].
    pub(super) fn stored(&self, layer: usize) -> &Geometry {
        &self.layers[layer].geometry
    }

    /// Takes the cosines and sines of positions from `n_past` on, each `[n_planes]`.
    pub(super) fn turn(&mut self, n_past: usize, angles: &[Vec<[f32; 2]>]) {
        for (position, angles) in (n_past..).zip(angles) {
            let panel = position / LANES * 2 * angles.len();
            for (plane, both) in angles.iter().enumerate() {
                for (i, x) in both.iter().enumerate() {
                    self.angles[panel + 2 * plane + i][position % LANES] = *x;
                }
            }
        }
    }

    /// The cosines and sines of a panel, for `n_planes` planes: for each of them two vectors.
    pub(super) fn angles(&self, panel: usize, n_planes: usize) -> &[Lanes] {
        &self.angles[panel * 2 * n_planes..(panel + 1) * 2 * n_planes]
    }

    /// Positions for which there is room.
    pub(super) fn places(&self) -> usize {
        self.n_ctx.next_multiple_of(LANES)
    }

    /// Bytes of a panel of values.
    pub(super) fn value_stride(&self) -> usize {
        LAYOUTS[self.values.layout(false)].panel_bytes(self.places())
    }

    /// Stores keys and values of a layer at the positions from `n_past` on, with the help of others if
    /// there is a crew. `keys: [n, sum of score_dim]`, `values: [n, sum of value_dim]`
    pub(super) fn store(
        &mut self,
        crew: Option<&Crew>,
        (layer, n_past): (usize, usize),
        keys: &[f32],
        values: &[f32],
    ) {
        let (key_type, value_type) = (self.keys, self.values);
        let (places, value_stride) = (self.places(), self.value_stride());
        let LayerCache {
            geometry,
            keys: key_cache,
            values: value_cache,
            key_starts,
            value_starts,
            ..
        } = &mut self.layers[layer];
        let crew = crew.filter(|_| keys.len() + values.len() >= MIN_PARALLEL);
        let each_head =
            |map: &mut MmapMut, starts: &[usize], f: &(dyn Fn(usize, &mut [u8]) + Sync)| {
                let n_bytes = map.len();
                let map = Columns::new(&mut map[..], n_bytes);
                // SAFETY: heads have bytes of their own.
                let part = |i: usize| unsafe { map.part(0, starts[i], starts[i + 1] - starts[i]) };
                match crew {
                    Some(crew) => crew.each(starts.len() - 1, |_, i| f(i, part(i))),
                    None => (0..starts.len() - 1).for_each(|i| f(i, part(i))),
                }
            };
        each_head(key_cache, key_starts, &|head, cache| {
            let at = geometry.keys(head);
            let stride = LAYOUTS[key_type.layout(true)].panel_bytes(key_type.whole(at.len()));
            let mut whole = Whole::new(at.len(), key_type);
            for (t, row) in keys.chunks_exact(geometry.key_width()).enumerate() {
                let (panel, lane) = ((n_past + t) / LANES, (n_past + t) % LANES);
                let cache = &mut cache[panel * stride..(panel + 1) * stride];
                store_key(key_type, cache, lane, whole.of(&row[at.clone()]));
            }
        });
        if geometry.value_width() == 0 {
            return;
        }
        each_head(value_cache, value_starts, &|head, cache| {
            let at = geometry.values(head);
            let mut whole = Whole::new(at.len(), value_type);
            let n_panels = value_type.whole(at.len()).div_ceil(LANES);
            let (cache, scales) = cache.split_at_mut(n_panels * value_stride);
            for (t, row) in values.chunks_exact(geometry.value_width()).enumerate() {
                let cache = (&mut *cache, &mut *scales);
                let value = whole.of(&row[at.clone()]);
                store_value(value_type, cache, (n_past + t, places), value);
            }
        });
    }

    /// Keys of one kv head at `n` positions from `start` on, a multiple of [`LANES`]: rows are
    /// positions.
    pub(super) fn keys(&self, layer: usize, head: usize, start: usize, n: usize) -> Panels<'_> {
        let LayerCache { geometry, keys, key_starts, .. } = &self.layers[layer];
        let layout = self.keys.layout(true);
        let n_in = self.keys.whole(geometry.kv[head].score_dim);
        let stride = LAYOUTS[layout].panel_bytes(n_in);
        let bytes = &keys[key_starts[head] + start / LANES * stride..key_starts[head + 1]];
        Panels { layout, bytes, stride, n_in, n_rows: n }
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
        let LayerCache { values, value_starts, .. } = &self.layers[layer];
        let layout = self.values.layout(false);
        let stride = self.value_stride();
        let n_in = n.next_multiple_of(LAYOUTS[layout].block_len);
        let at = value_starts[head] + row / LANES * stride + LAYOUTS[layout].panel_bytes(start);
        let bytes = &values[at..value_starts[head + 1]];
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
        let LayerCache { geometry, values, value_starts, .. } = &self.layers[layer];
        let dim = self.values.whole(geometry.kv[head].value_dim);
        let at = value_starts[head] + dim.div_ceil(LANES) * self.value_stride();
        let at = at + (row / GROUP * self.places() + start) * 2;
        self.values.is_rounded().then(|| &values[at..at + 2 * n])
    }
}

/// Types of keys and values that are made again: they are of one layer, so they need not be small.
fn rebuilt_types(cached: CacheType) -> (CacheType, CacheType) {
    match cached {
        CacheType::F32 => (CacheType::F32, CacheType::F32),
        _ => (CacheType::F16, CacheType::F16),
    }
}

/// What a cache for some layers has to hold.
struct Shapes {
    /// What each layer stores, and which of the shapes that are made again it has.
    stored: Vec<(Geometry, Option<usize>)>,
    /// Shapes of keys and values that are made again.
    rebuilt: Vec<Geometry>,
    /// Most planes that are rotated when they are read.
    n_planes: usize,
}

impl Shapes {
    fn of(layers: impl Iterator<Item = Geometry>) -> Shapes {
        let mut shapes = Shapes { stored: Vec::new(), rebuilt: Vec::new(), n_planes: 0 };
        for geometry in layers {
            if let Kept::Keys { n_planes } = geometry.kept {
                shapes.n_planes = shapes.n_planes.max(n_planes);
            }
            let shape = Geometry::new(geometry.n_head, geometry.kv.clone());
            let all = &mut shapes.rebuilt;
            let rebuilt = (geometry.kept != Kept::KeysAndValues).then(|| {
                all.iter().position(|s| *s == shape).unwrap_or_else(|| {
                    all.push(shape);
                    all.len() - 1
                })
            });
            shapes.stored.push((Geometry { kv: geometry.stored(), ..geometry }, rebuilt));
        }
        shapes
    }
}

/// Makes rows of one width rows of whole blocks.
struct Whole(Vec<f32>);

impl Whole {
    fn new(dim: usize, ty: CacheType) -> Whole {
        let n = ty.whole(dim);
        Whole(if n > dim { vec![0.0; n] } else { Vec::new() })
    }

    fn of<'a>(&'a mut self, row: &'a [f32]) -> &'a [f32] {
        if self.0.is_empty() {
            return row;
        }
        self.0[..row.len()].copy_from_slice(row);
        &self.0
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
