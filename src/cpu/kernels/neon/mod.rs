//! aarch64: 8 rows of 4 bytes, or 8 rows of one `f32`, in two registers of 128 bits.
//!
//! Three levels differ in how 8-bit products are summed ([`Products`]): by widening multiplications
//! that every processor has, by dot products of 4 (`sdot`), or by products of 2 rows of 8 with 2 tokens
//! of 8 (`smmla`). `std` has no stable names for the last two instructions, so they are written as
//! assembly. Sums are exact until they are scaled, and that goes in one order at all three.
//!
//! # Safety
//!
//! Every unsafe function here asks for the same: a processor of the level that it is inlined into, and
//! pointers to as many elements as it reads. [`super::multiply`], the only way in, has checked both for
//! whole matrices, and offsets stay below the sizes that it checked. So blocks inside of these functions
//! say no more.
#![allow(clippy::undocumented_unsafe_blocks)]

mod formats;
mod products;

use std::arch::aarch64::*;

use self::formats::*;
use self::products::{Dotprod, I8mm, Neon, Products};

use super::super::threads::Columns;
use super::{Activations, LANES, LAYOUTS, Multiply, Panels, Scratch, TILE};
use crate::simd::Level;

/// The functions of a level of this architecture.
pub(super) fn table(level: Level) -> &'static [Multiply] {
    static NEON: [Multiply; LAYOUTS.len()] = functions::<Neon>();
    static DOTPROD: [Multiply; LAYOUTS.len()] = functions::<Dotprod>();
    static I8MM: [Multiply; LAYOUTS.len()] = functions::<I8mm>();
    match level {
        Level::I8mm => &I8MM,
        Level::Dotprod => &DOTPROD,
        _ => &NEON,
    }
}

const fn functions<L: Products>() -> [Multiply; LAYOUTS.len()] {
    [
        floats::<F32>,
        floats::<F16>,
        floats::<Bf16>,
        integers::<L, Q4_0>,
        integers::<L, Q4_1>,
        integers::<L, Q5_0>,
        integers::<L, Q5_1>,
        integers::<L, Q8_0>,
        integers::<L, Iq4Nl>,
        integers::<L, Mxfp4>,
        integers::<L, Q4K>,
        integers::<L, Q5K>,
        integers::<L, Q6K>,
        integers::<L, Iq4Xs>,
        floats::<I8>,
        floats::<I4>,
    ]
}

/// Nothing: there is no stable name for it.
#[inline(always)]
pub(super) fn prefetch(_: *const u8) {}

/// Vectors of a word of each row, from four words of every row.
#[inline(always)]
pub(super) fn transpose(rows: &[[u8; 16]; LANES], out: &mut [u8; 16 * LANES]) {
    for (half, rows) in rows.as_chunks::<4>().0.iter().enumerate() {
        // SAFETY: rows have as many bytes as are loaded, and `out` as many as are stored; NEON is part of
        // the architecture.
        unsafe {
            let [a, b, c, d] =
                rows.each_ref().map(|row| vreinterpretq_u32_u8(vld1q_u8(row.as_ptr())));
            let (ab, cd) = (vtrn1q_u32(a, b), vtrn1q_u32(c, d));
            let (ab_odd, cd_odd) = (vtrn2q_u32(a, b), vtrn2q_u32(c, d));
            let low = |x, y| vtrn1q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y));
            let high = |x, y| vtrn2q_u64(vreinterpretq_u64_u32(x), vreinterpretq_u64_u32(y));
            let words = [low(ab, cd), low(ab_odd, cd_odd), high(ab, cd), high(ab_odd, cd_odd)];
            let to = out.as_mut_ptr().add(16 * half);
            for (j, words) in words.into_iter().enumerate() {
                vst1q_u8(to.add(4 * LANES * j), vreinterpretq_u8_u64(words));
            }
        }
    }
}

/// Writes one panel's results of one token.
#[inline(always)]
unsafe fn store(out: Columns<f32>, t: usize, start: usize, n_rows: usize, acc: Lanes) {
    unsafe {
        if n_rows >= LANES {
            let to = out.part(t, start, LANES).as_mut_ptr();
            vst1q_f32(to, acc[0]);
            vst1q_f32(to.add(4), acc[1]);
        } else {
            let mut lanes = [0.0f32; LANES];
            vst1q_f32(lanes.as_mut_ptr(), acc[0]);
            vst1q_f32(lanes.as_mut_ptr().add(4), acc[1]);
            out.part(t, start, n_rows).copy_from_slice(&lanes[..n_rows]);
        }
    }
}

unsafe fn floats<F: Floats>(
    w: &Panels,
    x: &Activations,
    _: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    unsafe {
        let mut panel = 0;
        let n_panels = w.n_rows.div_ceil(LANES);
        while panel < n_panels {
            // Four panels keep enough sums in flight for one token, two for several.
            let n = match (n_panels - panel, x.n) {
                (4.., 1) => 4,
                (2.., _) => 2,
                _ => 1,
            };
            let mut t = 0;
            while t < x.n {
                t += match (n, x.n - t) {
                    (4, _) => float_tile::<F, 4, 1>(w, x, out, start, panel, t),
                    (2, 4..) => float_tile::<F, 2, 4>(w, x, out, start, panel, t),
                    (2, _) => float_tile::<F, 2, 1>(w, x, out, start, panel, t),
                    (_, 4..) => float_tile::<F, 1, 4>(w, x, out, start, panel, t),
                    _ => float_tile::<F, 1, 1>(w, x, out, start, panel, t),
                };
            }
            panel += n;
        }
    }
}

/// `P` panels times `T` tokens.
#[inline(always)]
unsafe fn float_tile<F: Floats, const P: usize, const T: usize>(
    w: &Panels,
    x: &Activations,
    out: Columns<f32>,
    start: usize,
    panel: usize,
    t: usize,
) -> usize {
    unsafe {
        let from = w.bytes.as_ptr().add(panel * w.stride);
        let x_at = x.floats.as_ptr().add(t * x.stride);
        let mut acc = [[zeros(); P]; T];
        for block in 0..w.n_in / F::LEN {
            for j in 0..F::LEN {
                let mut w_k = [zeros(); P];
                for (p, w_k) in w_k.iter_mut().enumerate() {
                    *w_k = F::load(from.add(p * w.stride + block * F::BYTES), j);
                }
                for (i, acc) in acc.iter_mut().enumerate() {
                    let x_k = *x_at.add(i * x.stride + block * F::LEN + j);
                    for (acc, w_k) in acc.iter_mut().zip(w_k) {
                        acc[0] = vfmaq_n_f32(acc[0], w_k[0], x_k);
                        acc[1] = vfmaq_n_f32(acc[1], w_k[1], x_k);
                    }
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (p, acc) in acc.iter().enumerate() {
                let row = (panel + p) * LANES;
                store(out, t + i, start + row, w.n_rows - row, *acc);
            }
        }
        T
    }
}

/// Adds one group of whole-number sums to the row sums.
#[inline(always)]
unsafe fn scaled<Q: Quants>(
    acc: Lanes,
    sum: [int32x4_t; 2],
    (d, m): (Lanes, Lanes),
    (scale, x_sum): (f32, f32),
) -> Lanes {
    unsafe {
        let mut to = zeros();
        for h in 0..2 {
            let d = vmulq_n_f32(d[h], scale);
            to[h] = vfmaq_f32(acc[h], vcvtq_f32_s32(sum[h]), d);
            if Q::MIN {
                to[h] = vfmaq_n_f32(to[h], m[h], x_sum);
            }
        }
        to
    }
}

unsafe fn integers<L: Products, Q: Quants>(
    w: &Panels,
    x: &Activations,
    scratch: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    unsafe {
        for panel in 0..w.n_rows.div_ceil(LANES) {
            let from = w.bytes.as_ptr().add(panel * w.stride);
            let (at, n_rows) = (start + panel * LANES, w.n_rows - panel * LANES);
            if x.n == 1 {
                store(out, 0, at, n_rows, one_token::<L, Q>(from, w.n_in, x));
                continue;
            }
            let unpacked = unpack::<L, Q>(from, w.n_in, scratch);
            for tile in 0..x.n.div_ceil(TILE) {
                let acc = L::tile::<Q>(unpacked, w.n_in, Tile::new::<Q>(x, w.n_in, tile));
                for (t, acc) in (tile * TILE..x.n).zip(acc) {
                    store(out, t, at, n_rows, acc);
                }
            }
        }
    }
}

/// One panel times one token.
#[inline(always)]
unsafe fn one_token<L: Products, Q: Quants>(
    panel: *const u8,
    n_in: usize,
    x: &Activations,
) -> Lanes {
    unsafe {
        let mut acc = zeros();
        for b in 0..n_in / Q::BLOCK {
            let block = panel.add(b * Q::ROW_BYTES * LANES);
            let head = Q::head(block);
            for i in 0..Q::BLOCK / 32 {
                let group = Q::group(block, head, i);
                let g = b * (Q::BLOCK / 32) + i;
                let scale = *x.scales.get_unchecked(g);
                for half in 0..32 / Q::GROUP {
                    let j = half * (Q::GROUP / 4);
                    let quants = x.quants.as_ptr().add(32 * g + 4 * j);
                    let sum = L::group::<Q, 1>(|at| group.q[j + at], quants)[0];
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

/// An unpacked panel: quants `[n_in / 4]`, scales and minima `[n_in / GROUP]`, for 8 rows each.
#[derive(Clone, Copy)]
struct Unpacked {
    q: *const Words,
    d: *const Lanes,
    m: *const Lanes,
}

#[inline(always)]
unsafe fn unpack<L: Products, Q: Quants>(
    panel: *const u8,
    n_in: usize,
    scratch: &mut Scratch,
) -> Unpacked {
    unsafe {
        let (n_q, n_d) = (n_in / 4, n_in / Q::GROUP);
        let q = scratch.bytes((n_q + 2 * n_d) * 32).cast::<Words>();
        let d = q.add(n_q).cast::<Lanes>();
        let m = d.add(n_d);
        for b in 0..n_in / Q::BLOCK {
            let block = panel.add(b * Q::ROW_BYTES * LANES);
            let head = Q::head(block);
            for i in 0..Q::BLOCK / 32 {
                let group = Q::group(block, head, i);
                let g = b * (Q::BLOCK / 32) + i;
                for j in (0..8).step_by(2) {
                    let pair = L::arranged([group.q[j], group.q[j + 1]]);
                    *q.add(8 * g + j) = pair[0];
                    *q.add(8 * g + j + 1) = pair[1];
                }
                for half in 0..32 / Q::GROUP {
                    *d.add(g * (32 / Q::GROUP) + half) = group.d[half];
                    *m.add(g * (32 / Q::GROUP) + half) = group.m[half];
                }
            }
        }
        Unpacked { q, d, m }
    }
}

/// Where the activations of a tile begin.
#[derive(Clone, Copy)]
struct Tile {
    quants: *const i8,
    scales: *const f32,
    /// Sums of each `GROUP`.
    sums: *const f32,
}

impl Tile {
    #[inline(always)]
    unsafe fn new<Q: Quants>(x: &Activations, n_in: usize, tile: usize) -> Tile {
        let sums = if Q::GROUP == 32 { x.sums32 } else { x.sums16 };
        let all = tile * TILE * n_in;
        unsafe {
            Tile {
                quants: x.quants.as_ptr().add(all),
                scales: x.scales.as_ptr().add(all / 32),
                sums: sums.as_ptr().add(all / Q::GROUP),
            }
        }
    }

    /// From token `i` on.
    #[inline(always)]
    unsafe fn from(self, i: usize) -> Tile {
        let Tile { quants, scales, sums } = self;
        unsafe { Tile { quants: quants.add(32 * i), scales: scales.add(i), sums: sums.add(i) } }
    }
}

/// An unpacked panel times `T` tokens of a tile, every row in a lane.
// Indices instead of iterators: sums stay in registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn rows<L: Products, Q: Quants, const T: usize>(
    w: Unpacked,
    n_in: usize,
    x: Tile,
) -> [Lanes; T] {
    unsafe {
        let Unpacked { mut q, mut d, mut m } = w;
        let Tile { mut quants, mut scales, mut sums } = x;
        let mut acc = [zeros(); T];
        for _ in 0..n_in / 32 {
            for half in 0..32 / Q::GROUP {
                let sum = L::group::<Q, T>(|j| *q.add(j), quants.add(half * Q::GROUP));
                q = q.add(Q::GROUP / 4);
                for i in 0..T {
                    let of_token = (*scales.add(i), *sums.add(i));
                    acc[i] = scaled::<Q>(acc[i], sum[i], (*d, *m), of_token);
                }
                (d, m, sums) = (d.add(1), m.add(1), sums.add(TILE));
            }
            (quants, scales) = (quants.add(32 * TILE), scales.add(TILE));
        }
        acc
    }
}

/// Sums in flight while products are counted.
const IN_FLIGHT: usize = 16;

pub(super) fn ops_per_round(level: Level) -> usize {
    let products = match level {
        Level::I8mm => I8mm::PRODUCTS,
        Level::Dotprod => Dotprod::PRODUCTS,
        _ => Neon::PRODUCTS,
    };
    IN_FLIGHT * products * 2
}

/// # Safety
/// The level is available.
pub(super) unsafe fn products_in_registers(level: Level, rounds: usize) {
    unsafe {
        match level {
            Level::I8mm => products_of::<I8mm>(rounds),
            Level::Dotprod => products_of::<Dotprod>(rounds),
            _ => products_of::<Neon>(rounds),
        }
    }
}

unsafe fn products_of<L: Products>(rounds: usize) {
    unsafe {
        let mut sums = [vdupq_n_s32(0); IN_FLIGHT];
        let [mut w, x] = [[1, 2, 3, 4], [3, 5, 7, 9]].map(|x| x.map(|x| same(vdupq_n_s8(x))));
        for _ in 0..rounds {
            for (w, sums) in w.iter_mut().zip(sums.as_chunks_mut::<4>().0) {
                *w = same(*w);
                for (sum, x) in sums.iter_mut().zip(x) {
                    *sum = L::product(*sum, *w, x);
                }
            }
        }
        std::hint::black_box(sums);
    }
}
