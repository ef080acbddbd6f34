//! How 8 rows are read from a panel: one entry for each layout.

use std::arch::aarch64::*;
use std::arch::asm;

/// 8 rows of one `f32`: rows 0 to 3, rows 4 to 7.
pub(super) type Lanes = [float32x4_t; 2];

/// 8 rows of 4 quants.
pub(super) type Words = [int8x16_t; 2];

/// `f` of both registers; `map` of arrays is not always inlined.
#[inline(always)]
pub(super) fn both<A: Copy, B>(x: [A; 2], f: impl Fn(A) -> B) -> [B; 2] {
    [f(x[0]), f(x[1])]
}

/// Does nothing, but the compiler cannot know what comes out: it neither computes ahead nor merges
/// `zip1` and `zip2` with loads and stores to the slower `ld4` and `st2`.
#[inline(always)]
pub(super) fn same(mut x: int8x16_t) -> int8x16_t {
    // SAFETY: there is no instruction.
    unsafe {
        asm!("/* {0:v} */", inout(vreg) x, options(pure, nomem, nostack, preserves_flags));
    }
    x
}

/// How 8 rows of floats are read.
pub(super) trait Floats {
    /// Elements of a row that lie side by side, and bytes of that many of 8 rows.
    const LEN: usize = 1;
    const BYTES: usize;
    /// Element `i < LEN` of each row.
    unsafe fn load(at: *const u8, i: usize) -> Lanes;
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct I8;
pub(super) struct I4;

impl Floats for F32 {
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> Lanes {
        unsafe { both([0, 4], |i| vld1q_f32(at.cast::<f32>().add(i))) }
    }
}

impl Floats for F16 {
    const BYTES: usize = 16;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> Lanes {
        unsafe { halves(at) }
    }
}

impl Floats for Bf16 {
    const LEN: usize = 2;
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn load(at: *const u8, i: usize) -> Lanes {
        unsafe {
            both([0, 4], |row| {
                let pairs = vld1q_u32(at.cast::<u32>().add(row));
                vreinterpretq_f32_u32(match i {
                    0 => vshlq_n_u32::<16>(pairs),
                    _ => vandq_u32(pairs, vdupq_n_u32(!0xFFFF)),
                })
            })
        }
    }
}

impl Floats for I8 {
    const BYTES: usize = 8;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> Lanes {
        unsafe {
            let x = vmovl_s8(vld1_s8(at.cast()));
            let wide = [vmovl_s16(vget_low_s16(x)), vmovl_high_s16(x)];
            both(wide, |x| vcvtq_f32_s32(x))
        }
    }
}

impl Floats for I4 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> Lanes {
        unsafe {
            let all = vdupq_n_u32(at.cast::<u32>().read_unaligned());
            both([0, -4], |high| {
                let places = [high, high - 8, high - 16, high - 24];
                let moved = vshlq_u32(all, vld1q_s32(places.as_ptr()));
                let four = vreinterpretq_s32_u32(vandq_u32(moved, vdupq_n_u32(15)));
                vcvtq_f32_s32(vsubq_s32(four, vdupq_n_s32(8)))
            })
        }
    }
}

/// 32 elements of 8 rows: their quants, and scale and minimum of each `GROUP` of them.
pub(super) struct Group {
    pub(super) q: [Words; 8],
    pub(super) d: [Lanes; 2],
    pub(super) m: [Lanes; 2],
}

/// How a block of 8 rows is read. `w = d * q + m`.
pub(super) trait Quants {
    /// Elements of a block, and bytes of it per row.
    const BLOCK: usize;
    const ROW_BYTES: usize;
    /// Elements that share a scale: 32 or 16.
    const GROUP: usize = 32;
    /// The largest magnitude of a quant.
    const MAX: usize;
    /// Whether there are minima.
    const MIN: bool = true;
    /// Scales that all groups of a block share.
    type Head: Copy;
    unsafe fn head(block: *const u8) -> Self::Head;
    unsafe fn group(block: *const u8, head: Self::Head, i: usize) -> Group;
}

#[inline(always)]
pub(super) fn zeros() -> Lanes {
    // SAFETY: every processor has it.
    unsafe { [vdupq_n_f32(0.0); 2] }
}

#[inline(always)]
unsafe fn load(at: *const u8) -> Words {
    unsafe { both([0, 16], |i| vld1q_s8(at.cast::<i8>().add(i))) }
}

#[inline(always)]
unsafe fn halves(at: *const u8) -> Lanes {
    unsafe {
        let x = vreinterpretq_f16_u8(vld1q_u8(at));
        [vcvt_f32_f16(vget_low_f16(x)), vcvt_high_f32_f16(x)]
    }
}

/// 8 unsigned bytes, widened.
#[inline(always)]
unsafe fn wide(at: *const u8) -> [uint32x4_t; 2] {
    unsafe {
        let x = vmovl_u8(vld1_u8(at));
        [vmovl_u16(vget_low_u16(x)), vmovl_high_u16(x)]
    }
}

#[inline(always)]
unsafe fn unsigned_bytes(at: *const u8) -> Lanes {
    unsafe { both(wide(at), |x| vcvtq_f32_u32(x)) }
}

#[inline(always)]
unsafe fn signed_bytes(at: *const u8) -> Lanes {
    unsafe {
        let x = vmovl_s8(vld1_s8(at.cast()));
        both([vmovl_s16(vget_low_s16(x)), vmovl_high_s16(x)], |x| vcvtq_f32_s32(x))
    }
}

#[inline(always)]
unsafe fn times(a: Lanes, b: Lanes) -> Lanes {
    unsafe { [vmulq_f32(a[0], b[0]), vmulq_f32(a[1], b[1])] }
}

#[inline(always)]
unsafe fn scaled(a: Lanes, factor: f32) -> Lanes {
    unsafe { both(a, |a| vmulq_n_f32(a, factor)) }
}

/// The 4-bit halves of 4 vectors.
#[inline(always)]
unsafe fn nibbles(at: *const u8) -> [Words; 8] {
    unsafe {
        let mut q = [[vdupq_n_s8(0); 2]; 8];
        for j in 0..4 {
            let x = load(at.add(32 * j));
            q[j] = both(x, |x| vandq_s8(x, vdupq_n_s8(15)));
            q[j + 4] = both(x, |x| shifted(x, -4));
        }
        q
    }
}

/// Looks the 4-bit halves up in a table.
#[inline(always)]
unsafe fn looked_up(at: *const u8, table: [i8; 16]) -> [Words; 8] {
    unsafe {
        let table = vld1q_s8(table.as_ptr());
        let mut q = nibbles(at);
        for q in &mut q {
            *q = both(*q, |q| vqtbl1q_s8(table, vreinterpretq_u8_s8(q)));
        }
        q
    }
}

/// Bytes moved up by `n` bits, or down by `-n`; zeros come in.
#[inline(always)]
unsafe fn shifted(x: int8x16_t, n: i32) -> int8x16_t {
    unsafe {
        let x = vreinterpretq_u8_s8(x);
        vreinterpretq_s8_u8(match n {
            4 => vshlq_n_u8::<4>(x),
            3 => vshlq_n_u8::<3>(x),
            2 => vshlq_n_u8::<2>(x),
            1 => vshlq_n_u8::<1>(x),
            -1 => vshrq_n_u8::<1>(x),
            -2 => vshrq_n_u8::<2>(x),
            -3 => vshrq_n_u8::<3>(x),
            -4 => vshrq_n_u8::<4>(x),
            _ => x,
        })
    }
}

/// Adds bits above the fourth: those of `mask`, after `high` was shifted by `n`.
#[inline(always)]
unsafe fn with_bits(q: Words, high: Words, n: i32, mask: i8) -> Words {
    unsafe {
        let with = |q, high| vorrq_s8(q, vandq_s8(shifted(high, n), vdupq_n_s8(mask)));
        [with(q[0], high[0]), with(q[1], high[1])]
    }
}

#[inline(always)]
unsafe fn one_scale(q: [Words; 8], d: Lanes, m: Lanes) -> Group {
    Group { q, d: [d, d], m: [m, m] }
}

pub(super) struct Q4_0;
impl Quants for Q4_0 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 18;
    const MAX: usize = 15;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let d = halves(block);
            one_scale(nibbles(block.add(16)), d, scaled(d, -8.0))
        }
    }
}

pub(super) struct Q4_1;
impl Quants for Q4_1 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 20;
    const MAX: usize = 15;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe { one_scale(nibbles(block.add(32)), halves(block), halves(block.add(16))) }
    }
}

/// Nibbles, and a vector of fifth bits elsewhere.
#[inline(always)]
unsafe fn five_bits(low: *const u8, high: *const u8) -> [Words; 8] {
    unsafe {
        let (mut q, high) = (nibbles(low), load(high));
        for (j, q) in q.iter_mut().enumerate() {
            *q = with_bits(*q, high, 4 - j as i32, 16);
        }
        q
    }
}

pub(super) struct Q5_0;
impl Quants for Q5_0 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 22;
    const MAX: usize = 31;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let d = halves(block);
            one_scale(five_bits(block.add(16), block.add(144)), d, scaled(d, -16.0))
        }
    }
}

pub(super) struct Q5_1;
impl Quants for Q5_1 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 24;
    const MAX: usize = 31;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let q = five_bits(block.add(32), block.add(160));
            one_scale(q, halves(block), halves(block.add(16)))
        }
    }
}

pub(super) struct Q8_0;
impl Quants for Q8_0 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 34;
    const MAX: usize = 128;
    const MIN: bool = false;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let mut q = [[vdupq_n_s8(0); 2]; 8];
            for (j, q) in q.iter_mut().enumerate() {
                *q = load(block.add(16 + 32 * j));
            }
            one_scale(q, halves(block), zeros())
        }
    }
}

/// ggml's `kvalues_iq4nl`.
const IQ4_LEVELS: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

pub(super) struct Iq4Nl;
impl Quants for Iq4Nl {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 18;
    const MAX: usize = 127;
    const MIN: bool = false;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe { one_scale(looked_up(block.add(16), IQ4_LEVELS), halves(block), zeros()) }
    }
}

pub(super) struct Mxfp4;
impl Quants for Mxfp4 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 17;
    const MAX: usize = 12;
    const MIN: bool = false;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        // Twice E2M1.
        const LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
        unsafe {
            // 2^(e - 128), subnormal for e < 2.
            let d = both(wide(block), |e| {
                let normal = vshlq_n_u32::<23>(vsubq_u32(e, vdupq_n_u32(1)));
                let small = vshlq_u32(vdupq_n_u32(0x0020_0000), vreinterpretq_s32_u32(e));
                let is_small = vcltq_u32(e, vdupq_n_u32(2));
                vreinterpretq_f32_u32(vbslq_u32(is_small, small, normal))
            });
            one_scale(looked_up(block.add(8), LEVELS), d, zeros())
        }
    }
}

/// `d` and `-dmin`.
#[inline(always)]
unsafe fn scale_and_min(block: *const u8) -> (Lanes, Lanes) {
    unsafe { (halves(block), both(halves(block.add(16)), |m| vnegq_f32(m))) }
}

pub(super) struct Q4K;
impl Quants for Q4K {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 148;
    const MAX: usize = 15;
    type Head = (Lanes, Lanes);
    #[inline(always)]
    unsafe fn head(block: *const u8) -> Self::Head {
        unsafe { scale_and_min(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, (d, m): Self::Head, i: usize) -> Group {
        unsafe {
            let at = block.add(32 + 144 * i);
            let (d, m) = (times(d, unsigned_bytes(at)), times(m, unsigned_bytes(at.add(8))));
            one_scale(nibbles(at.add(16)), d, m)
        }
    }
}

pub(super) struct Q5K;
impl Quants for Q5K {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 180;
    const MAX: usize = 31;
    type Head = (Lanes, Lanes);
    #[inline(always)]
    unsafe fn head(block: *const u8) -> Self::Head {
        unsafe { scale_and_min(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, (d, m): Self::Head, i: usize) -> Group {
        unsafe {
            let at = block.add(32 + 176 * i);
            let (d, m) = (times(d, unsigned_bytes(at)), times(m, unsigned_bytes(at.add(8))));
            one_scale(five_bits(at.add(16), at.add(144)), d, m)
        }
    }
}

pub(super) struct Q6K;
impl Quants for Q6K {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 210;
    const GROUP: usize = 16;
    const MAX: usize = 63;
    type Head = Lanes;
    #[inline(always)]
    unsafe fn head(block: *const u8) -> Lanes {
        unsafe { halves(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, d: Lanes, i: usize) -> Group {
        unsafe {
            let at = block.add(16 + 208 * i);
            let mut q = nibbles(at.add(16));
            for (j, q) in q.iter_mut().enumerate() {
                let high = load(at.add(144 + j / 4 * 32));
                *q = with_bits(*q, high, 4 - 2 * (j % 4) as i32, 48);
            }
            let d = [times(d, signed_bytes(at)), times(d, signed_bytes(at.add(8)))];
            Group { q, d, m: [scaled(d[0], -32.0), scaled(d[1], -32.0)] }
        }
    }
}

pub(super) struct Iq4Xs;
impl Quants for Iq4Xs {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 138;
    const MAX: usize = 127;
    const MIN: bool = false;
    type Head = Lanes;
    #[inline(always)]
    unsafe fn head(block: *const u8) -> Lanes {
        unsafe { halves(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, d: Lanes, i: usize) -> Group {
        unsafe {
            let at = block.add(16 + 136 * i);
            let q = looked_up(at.add(8), IQ4_LEVELS);
            one_scale(q, times(d, signed_bytes(at)), zeros())
        }
    }
}
