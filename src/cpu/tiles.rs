//! Cached rows as floats: panels unpacked, with the products that packed ones have no kernels for.
//!
//! A tile is panels one after the other, each a vector of [`LANES`] positions for every element. So
//! rows are mixed by adding vectors of a weight per position times vectors of an element per position,
//! and lanes are summed at the end.
#![allow(unsafe_code)]

use super::cache::GROUP;
use super::kernels::{LANES, Panels};
use crate::arch::Pairing;
use crate::engine::CacheType;
use crate::simd::{self, per_level};

/// A number for each position of a panel.
pub(super) type Lanes = [f32; LANES];

/// Panels that are unpacked together to be mixed: they and the sums stay in near caches.
pub(super) const TILE_PANELS: usize = 16;

/// Elements from `start` on of a panel of cached keys, as many as `out` has: whole blocks.
pub(super) fn unpack(ty: CacheType, panel: &[u8], start: usize, out: &mut [Lanes]) {
    let bytes = |n: usize| n / GROUP * LANES;
    match ty {
        CacheType::F32 => floats(&panel[start * 4 * LANES..], out),
        CacheType::F16 => simd::widen_halves(out.as_flattened_mut(), &panel[start * 2 * LANES..]),
        CacheType::Q8_0 => bytes_of_8(&panel[bytes(start) * (2 + GROUP)..], out),
        CacheType::Q4_0 => bytes_of_4(&panel[bytes(start) * (2 + GROUP / 2)..], out),
    }
}

per_level! {
    pub fn floats(panel: &[u8], out: &mut [Lanes]) {
        for (out, x) in out.as_flattened_mut().iter_mut().zip(panel.as_chunks::<4>().0) {
            *out = f32::from_le_bytes(*x);
        }
    }
}

/// Bits from `bit` on of a word of each row, `n` of them.
#[inline(always)]
fn bits(words: &[u8; 4 * LANES], bit: u32, n: u32) -> [u32; LANES] {
    let words = words.as_chunks::<4>().0;
    std::array::from_fn(|r| u32::from_le_bytes(words[r]) << (32 - bit - n))
}

per_level! {
    /// As the layout Q8_0 has them: scales, then words of 4 elements.
    pub fn bytes_of_8(panel: &[u8], out: &mut [Lanes]) {
        const BLOCK: usize = LANES * (2 + GROUP);
        for (block, out) in panel.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<GROUP>().0) {
            let (scales, words) = block.split_at(2 * LANES);
            let mut d = [0.0; LANES];
            simd::halves(&mut d, scales);
            for (words, out) in words.as_chunks().0.iter().zip(out.as_chunks_mut::<4>().0) {
                for (i, out) in out.iter_mut().enumerate() {
                    let q = bits(words, 8 * i as u32, 8);
                    *out = std::array::from_fn(|r| (q[r] as i32 >> 24) as f32 * d[r]);
                }
            }
        }
    }
}

per_level! {
    /// As the layout Q4_0 has them: scales, then words of 8 elements, high halves for the second 16.
    pub fn bytes_of_4(panel: &[u8], out: &mut [Lanes]) {
        const BLOCK: usize = LANES * (2 + GROUP / 2);
        for (block, out) in panel.as_chunks::<BLOCK>().0.iter().zip(out.as_chunks_mut::<GROUP>().0) {
            let (scales, words) = block.split_at(2 * LANES);
            let mut d = [0.0; LANES];
            simd::halves(&mut d, scales);
            for (j, words) in words.as_chunks().0.iter().enumerate() {
                for i in 0..8 {
                    let q = bits(words, 4 * i as u32, 4);
                    let at = 4 * j + i / 2 + i % 2 * (GROUP / 2);
                    out[at] = std::array::from_fn(|r| ((q[r] >> 28) as i32 - 8) as f32 * d[r]);
                }
            }
        }
    }
}

per_level! {
    /// Rotates the first elements of the rows of a panel. `angles`: for each plane cosines, then sines.
    pub fn rotate(panel: &mut [Lanes], angles: &[Lanes], pairing: Pairing) {
        let angles = angles.as_chunks::<2>().0;
        for (plane, [cos, sin]) in angles.iter().enumerate() {
            let [a, b] = pairing.pair(plane, angles.len());
            let (x, y) = (panel[a], panel[b]);
            panel[a] = std::array::from_fn(|r| x[r] * cos[r] - y[r] * sin[r]);
            panel[b] = std::array::from_fn(|r| x[r] * sin[r] + y[r] * cos[r]);
        }
    }
}

/// Adds products of `T` rows of weights with `I` elements from `element` on of all panels.
#[inline(always)]
fn mix_block<const T: usize, const I: usize>(
    (tile, n_elements, element): (&[Lanes], usize, usize),
    weights: [&[Lanes]; T],
    sums: &mut [Lanes],
) {
    let mut acc = [[[0.0f32; LANES]; I]; T];
    for t in 0..T {
        acc[t].copy_from_slice(&sums[t * n_elements + element..][..I]);
    }
    for (p, panel) in tile.chunks_exact(n_elements).enumerate() {
        let x: &[Lanes; I] = match panel[element..].first_chunk() {
            Some(x) => x,
            None => return,
        };
        for t in 0..T {
            let w = weights[t][p];
            for i in 0..I {
                for r in 0..LANES {
                    acc[t][i][r] += w[r] * x[i][r];
                }
            }
        }
    }
    for t in 0..T {
        sums[t * n_elements + element..][..I].copy_from_slice(&acc[t]);
    }
}

/// The same for all elements.
#[inline(always)]
fn mix_rows<const T: usize>(
    tile: &[Lanes],
    n_elements: usize,
    weights: [&[Lanes]; T],
    sums: &mut [Lanes],
) {
    let mut element = 0;
    while element + 2 <= n_elements {
        mix_block::<T, 2>((tile, n_elements, element), weights, sums);
        element += 2;
    }
    if element < n_elements {
        mix_block::<T, 1>((tile, n_elements, element), weights, sums);
    }
}

per_level! {
    /// `sums[t][i] += weights[t][p] tile[p][i]` over panels `p`, each position on its own. Rows of
    /// weights are `stride` apart.
    pub fn mix(tile: &[Lanes], n_elements: usize, weights: &[Lanes], stride: usize, sums: &mut [Lanes]) {
        let n_panels = tile.len() / n_elements;
        let row = |t: usize| &weights[t * stride..t * stride + n_panels];
        let n = sums.len() / n_elements;
        let mut t = 0;
        while t < n {
            let sums = &mut sums[t * n_elements..];
            match n - t {
                1 => mix_rows(tile, n_elements, [row(t)], sums),
                2 | 3 => mix_rows(tile, n_elements, [row(t), row(t + 1)], sums),
                _ => mix_rows(tile, n_elements, [0, 1, 2, 3].map(|i| row(t + i)), sums),
            }
            t += match n - t {
                1 => 1,
                2 | 3 => 2,
                _ => 4,
            };
        }
    }
}

/// The sum over positions, as a tree.
pub(super) fn total(x: &Lanes) -> f32 {
    let [a, b, c, d] = [0, 1, 2, 3].map(|i| x[i] + x[i + 4]);
    (a + c) + (b + d)
}

/// Panels of `n_in` elements that are floats already, `n_rows` rows of them.
pub(super) fn panels(tile: &[Lanes], n_in: usize, n_rows: usize) -> Panels<'_> {
    let n_bytes = size_of_val(tile);
    // SAFETY: floats are bytes, and as many.
    let bytes = unsafe { std::slice::from_raw_parts(tile.as_ptr().cast::<u8>(), n_bytes) };
    Panels { layout: CacheType::F32.layout(true), bytes, stride: n_in * 4 * LANES, n_in, n_rows }
}

#[cfg(test)]
mod tests {
    use super::super::KvCache;
    use super::super::threads::Team;
    use super::*;
    use crate::merge::{Geometry, KvHead};

    fn numbers(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 7919 % 2003) as f32 - 1000.0) / 1000.0).collect()
    }

    #[test]
    fn what_is_unpacked_is_what_was_stored() {
        let (dim, n) = (70, 19);
        let head = KvHead { score_dim: dim, value_dim: 0, planes: None };
        let geometry = Geometry::new(1, vec![head]);
        let rows = numbers(n * dim);
        for ty in CacheType::ALL {
            let layers = std::iter::once(geometry.clone());
            let mut cache = KvCache::new(layers, 32, (ty, ty)).unwrap();
            let team = Team::new(1, false).unwrap();
            team.enter(1, |crew| cache.store(Some(crew), (0, 0), &rows, &[]));
            let whole = ty.whole(dim);
            for (position, row) in rows.chunks(dim).enumerate() {
                // The second part begins with a whole block.
                for elements in [0..dim.min(64), 64..dim] {
                    let mut tile =
                        vec![[0.0; LANES]; (elements.start + 64).min(whole) - elements.start];
                    let panel = cache.keys(0, 0, position / LANES * LANES, LANES);
                    unpack(ty, panel.bytes, elements.start, &mut tile);
                    for (x, got) in row[elements].iter().zip(&tile) {
                        let step = match ty {
                            CacheType::F32 => 0.0,
                            CacheType::F16 => 1.0 / 4096.0,
                            CacheType::Q8_0 => 0.51 / 127.0,
                            // The largest number has no opposite.
                            CacheType::Q4_0 => 1.01 / 8.0,
                        };
                        let got = got[position % LANES];
                        assert!((x - got).abs() <= step, "{} {position}: {x} {got}", ty.name());
                    }
                }
            }
        }
    }

    #[test]
    fn panels_turn_as_heads_do() {
        for pairing in [Pairing::Adjacent, Pairing::Half] {
            let (rows, angles) = (numbers(10 * LANES), numbers(8 * LANES));
            let mut panel = rows.as_chunks::<LANES>().0.to_vec();
            let angles = angles.as_chunks::<LANES>().0;
            rotate(&mut panel, angles, pairing);
            for r in 0..LANES {
                for plane in 0..4 {
                    let [cos, sin] = [angles[2 * plane][r], angles[2 * plane + 1][r]];
                    let [a, b] = pairing.pair(plane, 4);
                    let (x, y) = (rows[a * LANES + r], rows[b * LANES + r]);
                    assert_eq!([panel[a][r], panel[b][r]], [x * cos - y * sin, x * sin + y * cos]);
                }
                // Past the planes.
                assert_eq!(panel[9][r], rows[9 * LANES + r]);
            }
        }
    }

    #[test]
    fn mixed_rows_are_sums_of_rows() {
        for (n, n_elements, n_panels) in
            [(1, 1, 1), (2, 3, 2), (3, 2, 16), (4, 5, 3), (7, 64, 16), (12, 33, 4)]
        {
            let tile = numbers(n_panels * n_elements * LANES);
            let stride = n_panels + 2;
            let weights = numbers(n * stride * LANES);
            let (tile, weights) = (tile.as_chunks::<LANES>().0, weights.as_chunks::<LANES>().0);
            let mut sums = vec![[1.0; LANES]; n * n_elements];
            mix(tile, n_elements, weights, stride, &mut sums);
            for (t, i) in (0..n).flat_map(|t| (0..n_elements).map(move |i| (t, i))) {
                for r in 0..LANES {
                    let products = (0..n_panels).map(|p| {
                        f64::from(weights[t * stride + p][r])
                            * f64::from(tile[p * n_elements + i][r])
                    });
                    let (got, expected) =
                        (sums[t * n_elements + i][r], 1.0 + products.sum::<f64>());
                    assert!(
                        (f64::from(got) - expected).abs() < 1e-5,
                        "{n} {t} {i} {r}: {got} {expected}"
                    );
                }
            }
        }
        assert_eq!(total(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]), 36.0);
    }
}
