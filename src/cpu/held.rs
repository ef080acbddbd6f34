//! What a cache holds of the first positions: to copy it to another, or to keep it.

use std::ops::Range;

use super::KvCache;
use super::cache::{GROUP, LayerCache};
use super::kernels::{LANES, LAYOUTS};
use super::tiles::Lanes;
use crate::error::Result;
use crate::gguf::Bytes;
use crate::merge::Geometry;
use crate::{bad_file, bad_usage};

impl KvCache {
    /// Bytes of a layer's keys and of its values that hold the first `n` positions.
    fn held(&self, layer: usize, n: usize) -> [Vec<Range<usize>>; 2] {
        let LayerCache { geometry, key_starts, value_starts, .. } = &self.layers[layer];
        let layout = &LAYOUTS[self.keys.layout(true)];
        let keys = geometry.kv.iter().zip(key_starts).map(|(head, start)| {
            let stride = layout.panel_bytes(self.keys.whole(head.score_dim));
            *start..start + n.div_ceil(LANES) * stride
        });
        let layout = &LAYOUTS[self.values.layout(false)];
        let n_bytes = layout.panel_bytes(n.next_multiple_of(layout.block_len));
        let mut values = Vec::new();
        for (head, start) in geometry.kv.iter().zip(value_starts) {
            let dim = self.values.whole(head.value_dim);
            let n_panels = dim.div_ceil(LANES);
            let panels = (0..n_panels).map(|i| start + i * self.value_stride());
            values.extend(panels.map(|at| at..at + n_bytes));
            if self.values.is_rounded() {
                let scales = start + n_panels * self.value_stride();
                let rows = (0..dim / GROUP).map(|i| scales + i * self.places() * 2);
                values.extend(rows.map(|at| at..at + 2 * n));
            }
        }
        [keys.collect(), values]
    }

    /// Numbers among the cosines and sines that are of the first `n` positions.
    fn held_angles(&self, n: usize) -> usize {
        self.angles.len() / (self.places() / LANES).max(1) * n.div_ceil(LANES)
    }

    /// Takes the first `n` positions of another cache for the same layers.
    ///
    /// # Errors
    ///
    /// The other has another shape.
    pub fn take(&mut self, other: &KvCache, n: usize) -> Result<()> {
        let shape = |cache: &KvCache| -> Vec<Geometry> {
            cache.layers.iter().map(|layer| layer.geometry.clone()).collect()
        };
        let is_same = self.n_ctx == other.n_ctx && self.types() == other.types();
        if !is_same || n > self.n_ctx || shape(self) != shape(other) {
            bad_usage!("a cache of another shape cannot be taken");
        }
        for layer in 0..self.layers.len() {
            let [keys, values] = self.held(layer, n);
            let (to, from) = (&mut self.layers[layer], &other.layers[layer]);
            for at in keys {
                to.keys[at.clone()].copy_from_slice(&from.keys[at]);
            }
            for at in values {
                to.values[at.clone()].copy_from_slice(&from.values[at]);
            }
        }
        self.fault = other.fault;
        let n = self.held_angles(n);
        self.angles[..n].copy_from_slice(&other.angles[..n]);
        Ok(())
    }

    /// The bytes that hold the first `n` positions, a part for each of [`KvCache::saved_names`].
    pub(crate) fn saved(&self, n: usize) -> Vec<(String, Vec<u8>)> {
        let mut all = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            let [keys, values] = self.held(i, n);
            let of = |map: &[u8], at: Vec<Range<usize>>| -> Vec<u8> {
                at.into_iter().flat_map(|at| map[at].iter().copied()).collect()
            };
            all.extend([of(&layer.keys, keys), of(&layer.values, values)]);
        }
        let angles = self.angles[..self.held_angles(n)].iter().flatten();
        all.push(angles.flat_map(|x| x.to_le_bytes()).collect());
        let all = all.into_iter().filter(|bytes| !bytes.is_empty());
        self.saved_names(n).into_iter().zip(all).collect()
    }

    /// Names of the parts that are not empty.
    pub(crate) fn saved_names(&self, n: usize) -> Vec<String> {
        let mut names = Vec::new();
        for layer in 0..self.layers.len() {
            for (part, held) in ["keys", "values"].iter().zip(self.held(layer, n)) {
                if held.iter().any(|at| !at.is_empty()) {
                    names.push(format!("blk.{layer}.{part}"));
                }
            }
        }
        if self.held_angles(n) > 0 {
            names.push("angles".into());
        }
        names
    }

    /// Takes such parts, in the order of their names.
    ///
    /// # Errors
    ///
    /// Parts of another size; then what is cached is of no use.
    pub(crate) fn restore(&mut self, n: usize, parts: &[Bytes]) -> Result<()> {
        let mut parts = parts.iter();
        let mut take = |map: &mut [u8], at: Vec<Range<usize>>| {
            let n_bytes: usize = at.iter().map(Range::len).sum();
            let bytes =
                if n_bytes == 0 { Some(&[][..]) } else { parts.next().map(|part| &part[..]) };
            let Some(mut bytes) = bytes.filter(|bytes| bytes.len() == n_bytes) else {
                bad_file!("damaged: a part of the cache has another size");
            };
            for at in at {
                let (own, rest) = bytes.split_at(at.len());
                map[at].copy_from_slice(own);
                bytes = rest;
            }
            Ok(())
        };
        for i in 0..self.layers.len() {
            let [keys, values] = self.held(i, n);
            take(&mut self.layers[i].keys, keys)?;
            take(&mut self.layers[i].values, values)?;
        }
        let n_angles = self.held_angles(n);
        let mut bytes = vec![0; n_angles * size_of::<Lanes>()];
        let all = 0..bytes.len();
        take(&mut bytes, vec![all])?;
        let angles = self.angles[..n_angles].iter_mut().flatten();
        for (x, bytes) in angles.zip(bytes.as_chunks::<4>().0) {
            *x = f32::from_le_bytes(*bytes);
        }
        Ok(())
    }
}
