//! How 8 rows are read from a panel: one entry for each layout.

use std::arch::x86_64::*;
use std::mem::transmute;

/// 32 bytes of two panels.
#[inline(always)]
unsafe fn two_halves(a: *const u8, b: *const u8) -> __m256i {
    unsafe { _mm256_loadu2_m128i(b.cast(), a.cast()) }
}

/// How 8 rows of floats are read and multiplied.
pub(super) trait Floats {
    /// Elements of a row that lie side by side, and bytes of that many of 8 rows.
    const LEN: usize = 1;
    const BYTES: usize;
    /// Element `i < LEN` of each row.
    unsafe fn load(at: *const u8, i: usize) -> __m256;
    /// Of two panels.
    unsafe fn load_two(a: *const u8, b: *const u8, i: usize) -> __m512;

    #[inline(always)]
    unsafe fn add(sum: __m256, w: __m256, x: __m256) -> __m256 {
        unsafe { _mm256_fmadd_ps(w, x, sum) }
    }
    #[inline(always)]
    unsafe fn add_two(sum: __m512, w: __m512, x: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(w, x, sum) }
    }
}

pub(super) struct F32;
pub(super) struct F16;
pub(super) struct Bf16;
pub(super) struct Bf16Pairs;
pub(super) struct I8;
pub(super) struct I4;

impl Floats for F32 {
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> __m256 {
        unsafe { _mm256_loadu_ps(at.cast()) }
    }
    #[inline(always)]
    unsafe fn load_two(a: *const u8, b: *const u8, _: usize) -> __m512 {
        unsafe {
            let low = _mm512_castpd256_pd512(_mm256_loadu_pd(a.cast()));
            _mm512_castpd_ps(_mm512_insertf64x4::<1>(low, _mm256_loadu_pd(b.cast())))
        }
    }
}

impl Floats for F16 {
    const BYTES: usize = 16;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
    }
    #[inline(always)]
    unsafe fn load_two(a: *const u8, b: *const u8, _: usize) -> __m512 {
        unsafe { _mm512_cvtph_ps(two_halves(a, b)) }
    }
}

impl Floats for Bf16 {
    const LEN: usize = 2;
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn load(at: *const u8, i: usize) -> __m256 {
        unsafe {
            let pairs = _mm256_loadu_si256(at.cast());
            _mm256_castsi256_ps(match i {
                0 => _mm256_slli_epi32::<16>(pairs),
                _ => _mm256_and_si256(pairs, _mm256_set1_epi32(!0xFFFF)),
            })
        }
    }
    #[inline(always)]
    unsafe fn load_two(a: *const u8, b: *const u8, i: usize) -> __m512 {
        unsafe {
            let pairs = _mm512_castps_si512(F32::load_two(a, b, 0));
            _mm512_castsi512_ps(match i {
                0 => _mm512_slli_epi32::<16>(pairs),
                _ => _mm512_and_si512(pairs, _mm512_set1_epi32(!0xFFFF)),
            })
        }
    }
}

// Pairs stay together. `vdpbf16ps` adds the product of the second elements, then that of the first
// (Intel's manual): sums are rounded to the nearest, subnormal numbers are 0.
impl Floats for Bf16Pairs {
    const BYTES: usize = 32;
    #[inline(always)]
    unsafe fn load(at: *const u8, i: usize) -> __m256 {
        unsafe { F32::load(at, i) }
    }
    #[inline(always)]
    unsafe fn load_two(a: *const u8, b: *const u8, i: usize) -> __m512 {
        unsafe { F32::load_two(a, b, i) }
    }
    #[inline(always)]
    unsafe fn add(sum: __m256, w: __m256, x: __m256) -> __m256 {
        unsafe {
            let [w, x]: [__m256bh; 2] = transmute([w, x]);
            _mm256_dpbf16_ps(sum, w, x)
        }
    }
    #[inline(always)]
    unsafe fn add_two(sum: __m512, w: __m512, x: __m512) -> __m512 {
        unsafe {
            let [w, x]: [__m512bh; 2] = transmute([w, x]);
            _mm512_dpbf16_ps(sum, w, x)
        }
    }
}

impl Floats for I8 {
    const BYTES: usize = 8;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> __m256 {
        unsafe { signed_bytes(at) }
    }
    #[inline(always)]
    unsafe fn load_two(a: *const u8, b: *const u8, _: usize) -> __m512 {
        unsafe {
            let both = _mm_unpacklo_epi64(_mm_loadl_epi64(a.cast()), _mm_loadl_epi64(b.cast()));
            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(both))
        }
    }
}

impl Floats for I4 {
    const BYTES: usize = 4;
    #[inline(always)]
    unsafe fn load(at: *const u8, _: usize) -> __m256 {
        unsafe {
            let all = _mm256_set1_epi32(at.cast::<i32>().read_unaligned());
            let places = _mm256_setr_epi32(0, 8, 16, 24, 4, 12, 20, 28);
            let four = _mm256_and_si256(_mm256_srlv_epi32(all, places), _mm256_set1_epi32(15));
            _mm256_cvtepi32_ps(_mm256_sub_epi32(four, _mm256_set1_epi32(8)))
        }
    }
    #[inline(always)]
    unsafe fn load_two(a: *const u8, b: *const u8, _: usize) -> __m512 {
        unsafe {
            let low = _mm512_castpd256_pd512(_mm256_castps_pd(Self::load(a, 0)));
            _mm512_castpd_ps(_mm512_insertf64x4::<1>(low, _mm256_castps_pd(Self::load(b, 0))))
        }
    }
}

/// 32 elements of 8 rows: their quants, and scale and minimum of each `GROUP` of them.
pub(super) struct Group {
    pub(super) q: [__m256i; 8],
    pub(super) d: [__m256; 2],
    pub(super) m: [__m256; 2],
}

/// How a block of 8 rows is read. `w = d * q + m`.
pub(super) trait Quants {
    /// Elements of a block, and bytes of it per row.
    const BLOCK: usize;
    const ROW_BYTES: usize;
    /// Elements that share a scale: 32 or 16.
    const GROUP: usize = 32;
    /// Whether quants have a sign.
    const SIGNED: bool = false;
    /// Vectors of pair sums that fit 16 bits: `RUN * 2 * 127 * max q < 2^15`.
    const RUN: usize;
    /// Whether there are minima.
    const MIN: bool = true;
    /// Scales that all groups of a block share.
    type Head: Copy;
    unsafe fn head(block: *const u8) -> Self::Head;
    unsafe fn group(block: *const u8, head: Self::Head, i: usize) -> Group;
}

#[inline(always)]
unsafe fn load(at: *const u8) -> __m256i {
    unsafe { _mm256_loadu_si256(at.cast()) }
}

#[inline(always)]
unsafe fn halves(at: *const u8) -> __m256 {
    unsafe { _mm256_cvtph_ps(_mm_loadu_si128(at.cast())) }
}

#[inline(always)]
unsafe fn unsigned_bytes(at: *const u8) -> __m256 {
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast()))) }
}

#[inline(always)]
unsafe fn signed_bytes(at: *const u8) -> __m256 {
    unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(at.cast()))) }
}

/// The 4-bit halves of 4 vectors.
#[inline(always)]
unsafe fn nibbles(at: *const u8) -> [__m256i; 8] {
    unsafe {
        let low = _mm256_set1_epi8(15);
        let mut q = [_mm256_setzero_si256(); 8];
        for j in 0..4 {
            let both = load(at.add(32 * j));
            q[j] = _mm256_and_si256(both, low);
            q[j + 4] = _mm256_and_si256(_mm256_srli_epi16::<4>(both), low);
        }
        q
    }
}

/// Looks the 4-bit halves up in a table.
#[inline(always)]
unsafe fn looked_up(at: *const u8, table: [i8; 16]) -> [__m256i; 8] {
    unsafe {
        let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
        let mut q = nibbles(at);
        for q in &mut q {
            *q = _mm256_shuffle_epi8(table, *q);
        }
        q
    }
}

/// Bits of bytes moved up by `n`, or down by `-n`; bits of neighbours come along.
#[inline(always)]
unsafe fn shifted(x: __m256i, n: i32) -> __m256i {
    unsafe {
        match n {
            4 => _mm256_slli_epi16::<4>(x),
            3 => _mm256_slli_epi16::<3>(x),
            2 => _mm256_slli_epi16::<2>(x),
            1 => _mm256_slli_epi16::<1>(x),
            -1 => _mm256_srli_epi16::<1>(x),
            -2 => _mm256_srli_epi16::<2>(x),
            -3 => _mm256_srli_epi16::<3>(x),
            _ => x,
        }
    }
}

#[inline(always)]
unsafe fn one_scale(q: [__m256i; 8], d: __m256, m: __m256) -> Group {
    Group { q, d: [d, d], m: [m, m] }
}

pub(super) struct Q4_0;
impl Quants for Q4_0 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 18;
    const RUN: usize = 8;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let d = halves(block);
            one_scale(nibbles(block.add(16)), d, _mm256_mul_ps(d, _mm256_set1_ps(-8.0)))
        }
    }
}

pub(super) struct Q4_1;
impl Quants for Q4_1 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 20;
    const RUN: usize = 8;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe { one_scale(nibbles(block.add(32)), halves(block), halves(block.add(16))) }
    }
}

/// Adds a vector of fifth bits to nibbles.
#[inline(always)]
unsafe fn with_fifth_bits(mut q: [__m256i; 8], high: *const u8) -> [__m256i; 8] {
    unsafe {
        let high = load(high);
        for (j, q) in q.iter_mut().enumerate() {
            let bit = _mm256_and_si256(shifted(high, 4 - j as i32), _mm256_set1_epi8(16));
            *q = _mm256_or_si256(*q, bit);
        }
        q
    }
}

pub(super) struct Q5_0;
impl Quants for Q5_0 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 22;
    const RUN: usize = 4;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let d = halves(block);
            let q = with_fifth_bits(nibbles(block.add(16)), block.add(144));
            one_scale(q, d, _mm256_mul_ps(d, _mm256_set1_ps(-16.0)))
        }
    }
}

pub(super) struct Q5_1;
impl Quants for Q5_1 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 24;
    const RUN: usize = 4;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let q = with_fifth_bits(nibbles(block.add(32)), block.add(160));
            one_scale(q, halves(block), halves(block.add(16)))
        }
    }
}

pub(super) struct Q8_0;
impl Quants for Q8_0 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 34;
    const SIGNED: bool = true;
    const RUN: usize = 1;
    const MIN: bool = false;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let mut q = [_mm256_setzero_si256(); 8];
            for (j, q) in q.iter_mut().enumerate() {
                *q = load(block.add(16 + 32 * j));
            }
            one_scale(q, halves(block), _mm256_setzero_ps())
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
    const SIGNED: bool = true;
    const RUN: usize = 1;
    const MIN: bool = false;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        unsafe {
            let q = looked_up(block.add(16), IQ4_LEVELS);
            one_scale(q, halves(block), _mm256_setzero_ps())
        }
    }
}

pub(super) struct Mxfp4;
impl Quants for Mxfp4 {
    const BLOCK: usize = 32;
    const ROW_BYTES: usize = 17;
    const RUN: usize = 4;
    type Head = ();
    #[inline(always)]
    unsafe fn head(_: *const u8) {}
    #[inline(always)]
    unsafe fn group(block: *const u8, (): (), _: usize) -> Group {
        // Twice E2M1, plus 12.
        const LEVELS: [i8; 16] = [12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0];
        unsafe {
            // 2^(e - 128), subnormal for e < 2.
            let e = _mm256_cvtepu8_epi32(_mm_loadl_epi64(block.cast()));
            let normal = _mm256_slli_epi32::<23>(_mm256_sub_epi32(e, _mm256_set1_epi32(1)));
            let small = _mm256_sllv_epi32(_mm256_set1_epi32(0x0020_0000), e);
            let is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(2), e);
            let d = _mm256_castsi256_ps(_mm256_blendv_epi8(normal, small, is_small));
            let q = looked_up(block.add(8), LEVELS);
            one_scale(q, d, _mm256_mul_ps(d, _mm256_set1_ps(-12.0)))
        }
    }
}

/// `d` and `-dmin`.
#[inline(always)]
unsafe fn scale_and_min(block: *const u8) -> (__m256, __m256) {
    unsafe { (halves(block), _mm256_mul_ps(halves(block.add(16)), _mm256_set1_ps(-1.0))) }
}

pub(super) struct Q4K;
impl Quants for Q4K {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 148;
    const RUN: usize = 8;
    type Head = (__m256, __m256);
    #[inline(always)]
    unsafe fn head(block: *const u8) -> Self::Head {
        unsafe { scale_and_min(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, (d, m): Self::Head, i: usize) -> Group {
        unsafe {
            let at = block.add(32 + 144 * i);
            let d = _mm256_mul_ps(d, unsigned_bytes(at));
            let m = _mm256_mul_ps(m, unsigned_bytes(at.add(8)));
            one_scale(nibbles(at.add(16)), d, m)
        }
    }
}

pub(super) struct Q5K;
impl Quants for Q5K {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 180;
    const RUN: usize = 4;
    type Head = (__m256, __m256);
    #[inline(always)]
    unsafe fn head(block: *const u8) -> Self::Head {
        unsafe { scale_and_min(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, (d, m): Self::Head, i: usize) -> Group {
        unsafe {
            let at = block.add(32 + 176 * i);
            let d = _mm256_mul_ps(d, unsigned_bytes(at));
            let m = _mm256_mul_ps(m, unsigned_bytes(at.add(8)));
            let q = with_fifth_bits(nibbles(at.add(16)), at.add(144));
            one_scale(q, d, m)
        }
    }
}

pub(super) struct Q6K;
impl Quants for Q6K {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 210;
    const GROUP: usize = 16;
    const RUN: usize = 2;
    type Head = __m256;
    #[inline(always)]
    unsafe fn head(block: *const u8) -> __m256 {
        unsafe { halves(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, d: __m256, i: usize) -> Group {
        unsafe {
            let at = block.add(16 + 208 * i);
            let mut q = nibbles(at.add(16));
            for (j, q) in q.iter_mut().enumerate() {
                let high = load(at.add(144 + j / 4 * 32));
                let bits = shifted(high, 4 - 2 * (j % 4) as i32);
                *q = _mm256_or_si256(*q, _mm256_and_si256(bits, _mm256_set1_epi8(48)));
            }
            let d = [_mm256_mul_ps(d, signed_bytes(at)), _mm256_mul_ps(d, signed_bytes(at.add(8)))];
            let offset = _mm256_set1_ps(-32.0);
            Group { q, d, m: [_mm256_mul_ps(d[0], offset), _mm256_mul_ps(d[1], offset)] }
        }
    }
}

pub(super) struct Iq4Xs;
impl Quants for Iq4Xs {
    const BLOCK: usize = 256;
    const ROW_BYTES: usize = 138;
    const SIGNED: bool = true;
    const RUN: usize = 1;
    const MIN: bool = false;
    type Head = __m256;
    #[inline(always)]
    unsafe fn head(block: *const u8) -> __m256 {
        unsafe { halves(block) }
    }
    #[inline(always)]
    unsafe fn group(block: *const u8, d: __m256, i: usize) -> Group {
        unsafe {
            let at = block.add(16 + 136 * i);
            let q = looked_up(at.add(8), IQ4_LEVELS);
            one_scale(q, _mm256_mul_ps(d, signed_bytes(at)), _mm256_setzero_ps())
        }
    }
}
