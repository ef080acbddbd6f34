//! The cache of keys and values.

use half::f16;
use half::slice::HalfFloatSliceExt;

use crate::attention::Rows;
use crate::bad_usage;
use crate::error::Result;
use crate::merge::Geometry;

/// The format of cached elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheType {
    /// Half precision.
    F16,
    /// Full precision.
    F32,
}

/// Keys and values of every layer for up to `n_ctx` positions.
pub struct KvCache {
    n_ctx: usize,
    layers: Vec<[Store; 2]>,
}

/// `[n_head_kv, n_ctx, width]`
struct Store {
    width: usize,
    data: Data,
}

enum Data {
    F16(Vec<f16>),
    F32(Vec<f32>),
}

impl KvCache {
    /// An empty cache for layers of these shapes.
    pub fn new(
        layers: impl Iterator<Item = Geometry>,
        n_ctx: usize,
        ty: CacheType,
    ) -> Result<KvCache> {
        let store = |width: usize, n_head: usize| -> Result<Store> {
            let n = n_ctx.checked_mul(width * n_head);
            let data = match ty {
                CacheType::F16 => n.and_then(zeros).map(Data::F16),
                CacheType::F32 => n.and_then(zeros).map(Data::F32),
            };
            match data {
                Some(data) => Ok(Store { width, data }),
                None => {
                    bad_usage!("no memory for a context of {n_ctx} tokens; ask for a shorter one")
                }
            }
        };
        let pair =
            |g: Geometry| Ok([store(g.score_dim, g.n_head_kv)?, store(g.value_dim, g.n_head_kv)?]);
        Ok(KvCache { n_ctx, layers: layers.map(pair).collect::<Result<_>>()? })
    }

    /// Positions that fit.
    pub fn n_ctx(&self) -> usize {
        self.n_ctx
    }

    /// Size in bytes.
    pub fn n_bytes(&self) -> usize {
        let bytes = |s: &Store| match &s.data {
            Data::F16(v) => v.len() * 2,
            Data::F32(v) => v.len() * 4,
        };
        self.layers.iter().flatten().map(bytes).sum()
    }

    /// Stores the keys and values of `position`: all kv heads, one after the other.
    pub fn store(&mut self, layer: usize, position: usize, keys: &[f32], values: &[f32]) {
        for (store, rows) in self.layers[layer].iter_mut().zip([keys, values]) {
            for (head, row) in rows.chunks_exact(store.width).enumerate() {
                let start = (head * self.n_ctx + position) * store.width;
                let at = start..start + store.width;
                match &mut store.data {
                    Data::F16(data) => data[at].convert_from_f32_slice(row),
                    Data::F32(data) => data[at].copy_from_slice(row),
                }
            }
        }
    }

    /// Keys and values of one kv head.
    pub fn rows(&self, layer: usize, head: usize) -> (Rows<'_>, Rows<'_>) {
        let [keys, values] = &self.layers[layer];
        let rows = |store: &'_ Store| {
            let n = self.n_ctx * store.width;
            head * n..(head + 1) * n
        };
        (keys.rows(rows(keys)), values.rows(rows(values)))
    }
}

impl Store {
    fn rows(&self, at: std::ops::Range<usize>) -> Rows<'_> {
        match &self.data {
            Data::F16(data) => Rows::F16(&data[at]),
            Data::F32(data) => Rows::F32(&data[at]),
        }
    }
}

/// Zeros, or `None` when memory for them cannot be had. Pages stay untouched until written.
fn zeros<T: Clone + Default>(n: usize) -> Option<Vec<T>> {
    let mut data: Vec<T> = Vec::new();
    data.try_reserve_exact(n).ok()?;
    drop(data);
    Some(vec![T::default(); n])
}
