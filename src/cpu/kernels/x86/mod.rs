//! x86-64: 8 rows of 4 bytes, or 8 rows of one `f32`, in a 256-bit register; two panels in one of
//! 512 bits.
//!
//! Formats, unpacking and the order of work are common to all levels; how products are summed is
//! what an [`Isa`] says. Functions without `target_feature` are inlined into those that have it.
//!
//! # Safety
//!
//! Every unsafe function here asks for the same: a processor of the level that it is inlined into, and
//! pointers to as many elements as it reads. [`super::multiply`], the only way in, has checked both for
//! whole matrices, and offsets stay below the sizes that it checked. So blocks inside of these functions
//! say no more.
#![allow(clippy::undocumented_unsafe_blocks)]

mod avx2;
mod floats;
mod formats;
mod vnni;

use std::arch::x86_64::*;

use self::avx2::Avx2;
use self::formats::*;
use self::vnni::{Avx512, AvxVnni};

use super::super::threads::Columns;
use super::{Activations, LANES, LAYOUTS, Multiply, Panels, Scratch, TILE};
use crate::simd::Level;

/// The functions of a level, in the order of the layouts.
macro_rules! table {
    ($floats:ident, $bf16:expr, $integers:ident) => {
        [
            $floats::<F32>,
            $floats::<F16>,
            $bf16,
            $integers::<Q4_0>,
            $integers::<Q4_1>,
            $integers::<Q5_0>,
            $integers::<Q5_1>,
            $integers::<Q8_0>,
            $integers::<Iq4Nl>,
            $integers::<Mxfp4>,
            $integers::<Q4K>,
            $integers::<Q5K>,
            $integers::<Q6K>,
            $integers::<Iq4Xs>,
            $floats::<I8>,
            $floats::<I4>,
        ]
    };
}

static AVX2: [Multiply; LAYOUTS.len()] = table!(floats_avx2, floats_avx2::<Bf16>, integers_avx2);
static AVX_VNNI: [Multiply; LAYOUTS.len()] =
    table!(floats_avx2, floats_avx2::<Bf16>, integers_avx_vnni);
static AVX512: [Multiply; LAYOUTS.len()] =
    table!(floats_avx512, floats_avx512::<Bf16>, integers_avx512);
static AVX512_BF16: [Multiply; LAYOUTS.len()] =
    table!(floats_avx512, pairs_avx512bf16::<Bf16Pairs>, integers_avx512);

/// The functions of a level of this architecture.
pub(super) fn table(level: Level) -> &'static [Multiply] {
    match level {
        Level::Avx512Bf16 => &AVX512_BF16,
        Level::Avx512 => &AVX512,
        Level::AvxVnni => &AVX_VNNI,
        _ => &AVX2,
    }
}

/// Vectors of a word of each row, from four words of every row. Every processor has what it needs.
#[inline(always)]
pub(super) fn transpose(rows: &[[u8; 16]; LANES], out: &mut [u8; 16 * LANES]) {
    for (half, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
        // SAFETY: rows have as many bytes as are loaded, and `out` as many as are stored; SSE2 is part of
        // the architecture.
        unsafe {
            let [a, b, c, d] = rows.each_ref().map(|row| _mm_loadu_si128(row.as_ptr().cast()));
            let (ab, cd) = (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d));
            let words = [
                _mm_unpacklo_epi64(ab, cd),
                _mm_unpackhi_epi64(ab, cd),
                _mm_unpacklo_epi64(ab_high, cd_high),
                _mm_unpackhi_epi64(ab_high, cd_high),
            ];
            let to = out.as_mut_ptr().add(16 * half);
            for (j, words) in words.into_iter().enumerate() {
                _mm_storeu_si128(to.add(4 * LANES * j).cast(), words);
            }
        }
    }
}

/// Defines the entry to an inlined function for a level.
macro_rules! entry {
    ($name:ident<$bound:ident>, $features:literal, $inlined:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<F: $bound>(
            w: &Panels,
            x: &Activations,
            scratch: &mut Scratch,
            out: Columns<f32>,
            start: usize,
        ) {
            unsafe { $inlined(w, x, scratch, out, start) }
        }
    };
}

entry!(floats_avx2<Floats>, "avx2,fma,f16c", floats::narrow::<F>);
entry!(floats_avx512<Floats>, "avx2,fma,f16c,avx512f", floats::wide::<F>);
entry!(pairs_avx512bf16<Floats>, "avx2,fma,f16c,avx512f,avx512vl,avx512bf16", floats::pairs::<F>);
entry!(integers_avx2<Quants>, "avx2,fma,f16c", integers::<Avx2, F>);
entry!(integers_avx_vnni<Quants>, "avx2,fma,f16c,avxvnni", integers::<AvxVnni, F>);
entry!(integers_avx512<Quants>, "avx2,fma,f16c,avx512f,avx512vl,avx512vnni", integers::<Avx512, F>);

/// How a level sums products of integers.
trait Isa {
    /// Panels that are worked on together.
    const PANELS: usize;
    /// What becomes of a format before its quants are multiplied.
    type Ready<Q: Quants>: Quants;

    /// Products of the `GROUP` quants of 8 rows from `GROUP * half` on with `x`, summed.
    unsafe fn sum<Q: Quants>(q: &[__m256i; 8], half: usize, x: *const i8) -> __m256i;

    /// `P` panels times the tokens of one tile.
    unsafe fn one_tile<Q: Quants, const P: usize>(
        w: Unpacked,
        n_in: usize,
        x: &Tile,
    ) -> [[__m256; TILE]; P];
}

/// Writes one panel's results of one token.
#[inline(always)]
unsafe fn store(out: Columns<f32>, t: usize, start: usize, n_rows: usize, acc: __m256) {
    unsafe {
        if n_rows >= LANES {
            _mm256_storeu_ps(out.part(t, start, LANES).as_mut_ptr(), acc);
        } else {
            let mut lanes = [0.0f32; LANES];
            _mm256_storeu_ps(lanes.as_mut_ptr(), acc);
            out.part(t, start, n_rows).copy_from_slice(&lanes[..n_rows]);
        }
    }
}

/// Reads what [`store`] wrote; what is beyond `n_rows` is 0.
#[inline(always)]
unsafe fn load(out: Columns<f32>, t: usize, start: usize, n_rows: usize) -> __m256 {
    unsafe {
        if n_rows >= LANES {
            return _mm256_loadu_ps(out.part(t, start, LANES).as_ptr());
        }
        let mut lanes = [0.0f32; LANES];
        lanes[..n_rows].copy_from_slice(out.part(t, start, n_rows));
        _mm256_loadu_ps(lanes.as_ptr())
    }
}

#[inline(always)]
unsafe fn four(x: *const i8) -> __m256i {
    unsafe { _mm256_set1_epi32(x.cast::<i32>().read_unaligned()) }
}

/// Adds one group of whole-number sums to the row sums.
#[inline(always)]
unsafe fn scaled<Q: Quants>(
    acc: __m256,
    sum: __m256i,
    (d, m): (__m256, __m256),
    (scale, x_sum): (f32, f32),
) -> __m256 {
    unsafe {
        let d = _mm256_mul_ps(d, _mm256_set1_ps(scale));
        let acc = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum), d, acc);
        match Q::MIN {
            true => _mm256_fmadd_ps(m, _mm256_set1_ps(x_sum), acc),
            false => acc,
        }
    }
}

#[inline(always)]
unsafe fn integers<I: Isa, F: Quants>(
    w: &Panels,
    x: &Activations,
    scratch: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    unsafe {
        let n_panels = w.n_rows.div_ceil(LANES);
        let from = |panel: usize| w.bytes.as_ptr().add(panel * w.stride);
        if x.n == 1 {
            for panel in 0..n_panels {
                let acc = one_token::<I, I::Ready<F>>(from(panel), w.n_in, x);
                store(out, 0, start + panel * LANES, w.n_rows - panel * LANES, acc);
            }
            return;
        }
        let mut panel = 0;
        while panel < n_panels {
            let at = (start + panel * LANES, w.n_rows - panel * LANES);
            let n = (n_panels - panel).min(I::PANELS);
            let some = |i: usize| from(panel + i);
            panel += match n {
                4.. if I::PANELS >= 4 => {
                    let panels = [some(0), some(1), some(2), some(3)];
                    tiles::<I, I::Ready<F>, 4>(panels, w.n_in, x, scratch, out, at)
                }
                2.. => tiles::<I, I::Ready<F>, 2>([some(0), some(1)], w.n_in, x, scratch, out, at),
                _ => tiles::<I, I::Ready<F>, 1>([some(0)], w.n_in, x, scratch, out, at),
            };
        }
    }
}

/// Asks for what lies at an address, if anything does, before it is needed.
#[inline(always)]
pub(super) fn prefetch(at: *const u8) {
    // SAFETY: nothing is read that the program could see.
    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) };
}

/// Asks for the part of a block's successors that follows its 32 elements `i`.
#[inline(always)]
fn prefetch_after<Q: Quants>(block: *const u8, i: usize) {
    const AHEAD: usize = 4096;
    let n = Q::ROW_BYTES * LANES / (Q::BLOCK / 32);
    for line in (0..n).step_by(64) {
        prefetch(block.wrapping_add(AHEAD + i * n + line));
    }
}

/// One panel times one token.
#[inline(always)]
unsafe fn one_token<I: Isa, Q: Quants>(panel: *const u8, n_in: usize, x: &Activations) -> __m256 {
    unsafe {
        let mut acc = _mm256_setzero_ps();
        for b in 0..n_in / Q::BLOCK {
            let block = panel.add(b * Q::ROW_BYTES * LANES);
            let head = Q::head(block);
            for i in 0..Q::BLOCK / 32 {
                prefetch_after::<Q>(block, i);
                let group = Q::group(block, head, i);
                let g = b * (Q::BLOCK / 32) + i;
                let quants = x.quants.as_ptr().add(32 * g);
                let scale = *x.scales.get_unchecked(g);
                for half in 0..32 / Q::GROUP {
                    let sum = I::sum::<Q>(&group.q, half, quants.add(half * Q::GROUP));
                    let x_sum = match Q::GROUP {
                        32 => *x.sums32.get_unchecked(g),
                        _ => *x.sums16.get_unchecked(2 * g + half),
                    };
                    acc = scaled::<Q>(acc, sum, (group.d[half], group.m[half]), (scale, x_sum));
                }
            }
        }
        acc
    }
}

/// `P` unpacked panels, side by side: quants `[n_in / 4, P]`, scales and minima
/// `[n_in / GROUP, P]`, one vector each.
#[derive(Clone, Copy)]
struct Unpacked {
    q: *const __m256i,
    d: *const __m256,
    m: *const __m256,
}

#[inline(always)]
unsafe fn unpack<Q: Quants, const P: usize>(
    panels: [*const u8; P],
    n_in: usize,
    scratch: &mut Scratch,
) -> Unpacked {
    unsafe {
        let (n_q, n_d) = (n_in / 4 * P, n_in / Q::GROUP * P);
        let q = scratch.bytes((n_q + 2 * n_d) * 32).cast::<__m256i>();
        let d = q.add(n_q).cast::<__m256>();
        let m = d.add(n_d);
        for (p, panel) in panels.into_iter().enumerate() {
            for b in 0..n_in / Q::BLOCK {
                let block = panel.add(b * Q::ROW_BYTES * LANES);
                let head = Q::head(block);
                for i in 0..Q::BLOCK / 32 {
                    let group = Q::group(block, head, i);
                    let g = b * (Q::BLOCK / 32) + i;
                    for j in 0..8 {
                        *q.add((8 * g + j) * P + p) = group.q[j];
                    }
                    for half in 0..32 / Q::GROUP {
                        let at = (g * (32 / Q::GROUP) + half) * P + p;
                        *d.add(at) = group.d[half];
                        *m.add(at) = group.m[half];
                    }
                }
            }
        }
        Unpacked { q, d, m }
    }
}

/// The activations of one tile: per 32 elements the quants and scales, per `GROUP` the sums, of
/// [`TILE`] tokens side by side.
struct Tile {
    quants: *const i8,
    scales: *const f32,
    sums: *const f32,
}

/// `P` panels times all tokens, a tile of them at a time. Returns `P`.
#[inline(always)]
unsafe fn tiles<I: Isa, Q: Quants, const P: usize>(
    panels: [*const u8; P],
    n_in: usize,
    x: &Activations,
    scratch: &mut Scratch,
    out: Columns<f32>,
    (at, n_rows): (usize, usize),
) -> usize {
    unsafe {
        let w = unpack::<Q, P>(panels, n_in, scratch);
        for tile in 0..x.n.div_ceil(TILE) {
            let sums = if Q::GROUP == 32 { x.sums32 } else { x.sums16 };
            let x_tile = Tile {
                quants: x.quants.as_ptr().add(tile * TILE * n_in),
                scales: x.scales.as_ptr().add(tile * TILE * n_in / 32),
                sums: sums.as_ptr().add(tile * TILE * n_in / Q::GROUP),
            };
            let acc = I::one_tile::<Q, P>(w, n_in, &x_tile);
            for i in 0..TILE.min(x.n - tile * TILE) {
                for (p, acc) in acc.iter().enumerate() {
                    store(out, tile * TILE + i, at + p * LANES, n_rows - p * LANES, acc[i]);
                }
            }
        }
        P
    }
}

/// Operations of one round of [`products_in_registers`].
pub(super) fn ops_per_round(level: Level) -> usize {
    match level {
        Level::Avx512 | Level::Avx512Bf16 => vnni::OPS_PER_ROUND_512,
        Level::AvxVnni => vnni::OPS_PER_ROUND_256,
        _ => avx2::OPS_PER_ROUND,
    }
}

/// Multiplies and adds without touching memory. The level must be available.
pub(super) unsafe fn products_in_registers(level: Level, rounds: usize) {
    unsafe {
        match level {
            Level::Avx512 | Level::Avx512Bf16 => vnni::products_in_registers_512(rounds),
            Level::AvxVnni => vnni::products_in_registers_256(rounds),
            _ => avx2::products_in_registers(rounds),
        }
    }
}
