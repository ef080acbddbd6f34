//! How sums of 8-bit products are made at each level.

use std::arch::aarch64::*;
use std::arch::asm;

use super::formats::{Lanes, Quants, Words, both, same, zeros};
use super::{TILE, Tile, Unpacked, rows};

/// How a level multiplies 8-bit integers.
pub(super) trait Products {
    /// Sums over `GROUP` elements, of 8 rows with each of `T` tokens, whose quants lie 32 bytes apart.
    /// `w` gives vector `j` of the group.
    unsafe fn group<Q: Quants, const T: usize>(
        w: impl Fn(usize) -> Words,
        x: *const i8,
    ) -> [[int32x4_t; 2]; T];

    /// Two vectors of 4 elements each, as `tile` wants them.
    unsafe fn arranged(q: [Words; 2]) -> [Words; 2] {
        q
    }

    /// An unpacked panel times the tokens of a tile.
    unsafe fn tile<Q: Quants>(w: Unpacked, n_in: usize, x: Tile) -> [Lanes; TILE];

    /// Products of one `product`.
    const PRODUCTS: usize;

    /// The instruction that does most of the work.
    unsafe fn product(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t;
}

/// What every aarch64 processor has: products of 16 bits, summed as often as 16 bits hold.
pub(super) struct Neon;

/// `sdot`: dot products of 4.
pub(super) struct Dotprod;

/// `smmla`: products of 2 x 8 with 8 x 2, and `sdot`.
pub(super) struct I8mm;

/// 16 elements of each of `T` tokens.
#[inline(always)]
unsafe fn load<const T: usize>(x: *const i8) -> [int8x16_t; T] {
    unsafe {
        let mut to = [vdupq_n_s8(0); T];
        for (i, to) in to.iter_mut().enumerate() {
            *to = vld1q_s8(x.add(32 * i));
        }
        to
    }
}

/// Adds dot products of every 4 bytes of `w` with word `LANE` of `x`.
#[inline(always)]
unsafe fn sdot<const LANE: u8>(mut sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {0:v}.4s, {1:v}.16b, {2:v}.4b[{3}]",
            inout(vreg) sum, in(vreg) w, in(vreg) x, const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// Adds dot products of both 8 bytes of `x` with both 8 bytes of `w`: the sums of the first of `x`
/// first.
#[inline(always)]
unsafe fn smmla(mut sum: int32x4_t, x: int8x16_t, w: int8x16_t) -> int32x4_t {
    unsafe {
        asm!(
            ".arch_extension i8mm",
            "smmla {0:v}.4s, {1:v}.16b, {2:v}.16b",
            inout(vreg) sum, in(vreg) x, in(vreg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

impl Dotprod {
    #[inline(always)]
    unsafe fn word<const LANE: u8, const T: usize>(
        sum: &mut [[int32x4_t; 2]; T],
        w: Words,
        x: &[int8x16_t; T],
    ) {
        for i in 0..T {
            sum[i] = unsafe {
                [sdot::<LANE>(sum[i][0], w[0], x[i]), sdot::<LANE>(sum[i][1], w[1], x[i])]
            };
        }
    }
}

impl Products for Dotprod {
    #[inline(always)]
    unsafe fn group<Q: Quants, const T: usize>(
        w: impl Fn(usize) -> Words,
        x: *const i8,
    ) -> [[int32x4_t; 2]; T] {
        unsafe {
            let mut sum = [[vdupq_n_s32(0); 2]; T];
            for j in (0..Q::GROUP / 4).step_by(4) {
                let x = load::<T>(x.add(4 * j));
                Self::word::<0, T>(&mut sum, w(j), &x);
                Self::word::<1, T>(&mut sum, w(j + 1), &x);
                Self::word::<2, T>(&mut sum, w(j + 2), &x);
                Self::word::<3, T>(&mut sum, w(j + 3), &x);
            }
            sum
        }
    }

    #[inline(always)]
    unsafe fn tile<Q: Quants>(w: Unpacked, n_in: usize, x: Tile) -> [Lanes; TILE] {
        unsafe { rows::<Self, Q, TILE>(w, n_in, x) }
    }

    const PRODUCTS: usize = 16;

    #[inline(always)]
    unsafe fn product(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        unsafe { sdot::<0>(sum, w, x) }
    }
}

impl Products for I8mm {
    #[inline(always)]
    unsafe fn group<Q: Quants, const T: usize>(
        w: impl Fn(usize) -> Words,
        x: *const i8,
    ) -> [[int32x4_t; 2]; T] {
        unsafe { Dotprod::group::<Q, T>(w, x) }
    }

    /// 8 elements of rows 0 and 1, 2 and 3; of rows 4 and 5, 6 and 7.
    #[inline(always)]
    unsafe fn arranged([a, b]: [Words; 2]) -> [Words; 2] {
        unsafe { [four_rows(a[0], b[0]), four_rows(a[1], b[1])] }
    }

    // Indices instead of iterators: sums stay in registers.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn tile<Q: Quants>(w: Unpacked, n_in: usize, x: Tile) -> [Lanes; TILE] {
        unsafe {
            let Unpacked { mut q, d, m } = w;
            let (mut d, mut m) = (d.cast::<f64>(), m.cast::<f64>());
            let Tile { mut quants, mut scales, mut sums } = x;
            // By rows and by tokens, two and two: both rows of a token, both of the other.
            let mut acc = [[vdupq_n_f32(0.0); 2]; 4];
            for _ in 0..n_in / 32 {
                let scale = doubled(vld1q_f32(scales));
                for half in 0..32 / Q::GROUP {
                    let mut sum = [[vdupq_n_s32(0); 2]; 4];
                    for at in (0..Q::GROUP).step_by(16) {
                        for x in pairs(load::<TILE>(quants.add(half * Q::GROUP + at))) {
                            for r in 0..4 {
                                let w = (*q.add(r / 2))[r % 2];
                                for t in 0..2 {
                                    sum[r][t] = smmla(sum[r][t], x[t], w);
                                }
                            }
                            q = q.add(2);
                        }
                    }
                    let x_sum = doubled(vld1q_f32(sums));
                    for r in 0..4 {
                        let d = vreinterpretq_f32_f64(vld1q_dup_f64(d.add(r)));
                        let m = vreinterpretq_f32_f64(vld1q_dup_f64(m.add(r)));
                        for t in 0..2 {
                            let d = vmulq_f32(d, scale[t]);
                            acc[r][t] = vfmaq_f32(acc[r][t], vcvtq_f32_s32(sum[r][t]), d);
                            if Q::MIN {
                                acc[r][t] = vfmaq_f32(acc[r][t], m, x_sum[t]);
                            }
                        }
                    }
                    (d, m, sums) = (d.add(4), m.add(4), sums.add(TILE));
                }
                (quants, scales) = (quants.add(32 * TILE), scales.add(TILE));
            }
            let mut out = [zeros(); TILE];
            for t in 0..2 {
                for h in 0..2 {
                    let rows =
                        both([2 * h, 2 * h + 1], |r: usize| vreinterpretq_f64_f32(acc[r][t]));
                    out[2 * t][h] = vreinterpretq_f32_f64(vzip1q_f64(rows[0], rows[1]));
                    out[2 * t + 1][h] = vreinterpretq_f32_f64(vzip2q_f64(rows[0], rows[1]));
                }
            }
            out
        }
    }

    const PRODUCTS: usize = 32;

    #[inline(always)]
    unsafe fn product(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        unsafe { smmla(sum, x, w) }
    }
}

/// Every number twice.
#[inline(always)]
unsafe fn doubled(x: float32x4_t) -> [float32x4_t; 2] {
    unsafe { [vzip1q_f32(x, x), vzip2q_f32(x, x)] }
}

/// 16 elements of 4 tokens: the first 8 of two tokens and of the other two, then the last 8.
#[inline(always)]
unsafe fn pairs(x: [int8x16_t; TILE]) -> [[int8x16_t; 2]; 2] {
    unsafe {
        let [first, second] = [two_tokens(x[0], x[1]), two_tokens(x[2], x[3])];
        [[first[0], second[0]], [first[1], second[1]]]
    }
}

/// The first and the last 8 bytes of both.
#[inline(always)]
unsafe fn two_tokens(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    unsafe {
        let [a, b] = both([a, b], |x| vreinterpretq_s64_s8(same(x)));
        both([vzip1q_s64(a, b), vzip2q_s64(a, b)], |x| vreinterpretq_s8_s64(x))
    }
}

/// 4 bytes of 4 rows, and the next 4 of each, to 8 of each row.
#[inline(always)]
unsafe fn four_rows(a: int8x16_t, b: int8x16_t) -> [int8x16_t; 2] {
    unsafe {
        let (a, b) = (vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b));
        both([vzip1q_s32(a, b), vzip2q_s32(a, b)], |x| same(vreinterpretq_s8_s32(x)))
    }
}

/// Sums of one token in 16 bits: rows 0 and 1, 2 and 3, and so on, 4 elements of a row apart.
type Short = [int16x8_t; 4];

impl Neon {
    /// Adds products with word `LANE` of `x`.
    #[inline(always)]
    unsafe fn word<const LANE: i32, const T: usize>(
        run: &mut [Short; T],
        w: Words,
        x: &[int8x16_t; T],
    ) {
        unsafe {
            for i in 0..T {
                let x = vdupq_laneq_s32::<LANE>(vreinterpretq_s32_s8(x[i]));
                let x = vreinterpretq_s8_s32(x);
                for h in 0..2 {
                    let low = &mut run[i][2 * h];
                    *low = vmlal_s8(*low, vget_low_s8(w[h]), vget_low_s8(x));
                    let high = &mut run[i][2 * h + 1];
                    *high = vmlal_high_s8(*high, w[h], x);
                }
            }
        }
    }

    /// Moves sums of 16 bits to pair sums of 32.
    #[inline(always)]
    unsafe fn widen<const T: usize>(sum: &mut [[int32x4_t; 4]; T], run: &mut [Short; T]) {
        unsafe {
            for i in 0..T {
                for r in 0..4 {
                    sum[i][r] = vpadalq_s16(sum[i][r], run[i][r]);
                    run[i][r] = vdupq_n_s16(0);
                }
            }
        }
    }
}

impl Products for Neon {
    #[inline(always)]
    unsafe fn group<Q: Quants, const T: usize>(
        w: impl Fn(usize) -> Words,
        x: *const i8,
    ) -> [[int32x4_t; 2]; T] {
        unsafe {
            // Vectors whose products, one of each in a sum, 16 bits hold.
            let n_fit = const { i16::MAX as usize / (127 * Q::MAX) };
            let mut run = [[vdupq_n_s16(0); 4]; T];
            let mut sum = [[vdupq_n_s32(0); 4]; T];
            for j in (0..Q::GROUP / 4).step_by(4) {
                let x = load::<T>(x.add(4 * j));
                Self::word::<0, T>(&mut run, w(j), &x);
                Self::word::<1, T>(&mut run, w(j + 1), &x);
                if n_fit < 4 {
                    Self::widen(&mut sum, &mut run);
                }
                Self::word::<2, T>(&mut run, w(j + 2), &x);
                Self::word::<3, T>(&mut run, w(j + 3), &x);
                if n_fit < 8 || j + 4 == Q::GROUP / 4 {
                    Self::widen(&mut sum, &mut run);
                }
            }
            let mut rows = [[vdupq_n_s32(0); 2]; T];
            for i in 0..T {
                rows[i][0] = vpaddq_s32(sum[i][0], sum[i][1]);
                rows[i][1] = vpaddq_s32(sum[i][2], sum[i][3]);
            }
            rows
        }
    }

    /// Two tokens and two: sums of four are more than there are registers for.
    #[inline(always)]
    unsafe fn tile<Q: Quants>(w: Unpacked, n_in: usize, x: Tile) -> [Lanes; TILE] {
        unsafe {
            let [a, b] = rows::<Self, Q, 2>(w, n_in, x);
            let [c, d] = rows::<Self, Q, 2>(w, n_in, x.from(2));
            [a, b, c, d]
        }
    }

    const PRODUCTS: usize = 8;

    #[inline(always)]
    unsafe fn product(sum: int32x4_t, w: int8x16_t, x: int8x16_t) -> int32x4_t {
        unsafe {
            let sum = vreinterpretq_s16_s32(sum);
            vreinterpretq_s32_s16(vmlal_s8(sum, vget_low_s8(w), vget_low_s8(x)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::formats::{Iq4Nl, Mxfp4, Q4_0, Q5_0, Q6K, Q8_0};
    use super::*;

    fn largest_products<Q: Quants>() {
        let x = [127i8; 32];
        let max = Q::MAX as i32;
        for w in [max.min(127), -max] {
            // SAFETY: every processor has this level.
            let sum: [i32; 8] = unsafe {
                let words = [vdupq_n_s8(w as i8); 2];
                let [sum] = Neon::group::<Q, 1>(|_| words, x.as_ptr());
                std::mem::transmute(sum)
            };
            assert_eq!(sum, [w * 127 * Q::GROUP as i32; 8]);
        }
    }

    #[test]
    fn sums_of_the_largest_products_fit() {
        largest_products::<Q4_0>();
        largest_products::<Q5_0>();
        largest_products::<Q6K>();
        largest_products::<Q8_0>();
        largest_products::<Iq4Nl>();
        largest_products::<Mxfp4>();
    }
}
