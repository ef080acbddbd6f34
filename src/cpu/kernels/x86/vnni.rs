//! AVX-VNNI and AVX-512 VNNI: `vpdpbusd` adds four products of unsigned quants and signed
//! activations to each 32-bit sum. Signed quants are moved up by 128, and a minimum takes that back.

use std::marker::PhantomData;

use super::*;

/// A format whose quants are unsigned.
pub(super) struct Unsigned<Q>(PhantomData<Q>);

impl<Q: Quants> Quants for Unsigned<Q> {
    const BLOCK: usize = Q::BLOCK;
    const ROW_BYTES: usize = Q::ROW_BYTES;
    const GROUP: usize = Q::GROUP;
    const RUN: usize = Q::RUN;
    const MIN: bool = Q::MIN || Q::SIGNED;
    type Head = Q::Head;

    #[inline(always)]
    unsafe fn head(block: *const u8) -> Q::Head {
        unsafe { Q::head(block) }
    }

    #[inline(always)]
    unsafe fn group(block: *const u8, head: Q::Head, i: usize) -> Group {
        unsafe {
            let Group { mut q, d, mut m } = Q::group(block, head, i);
            if Q::SIGNED {
                for q in &mut q {
                    *q = _mm256_xor_si256(*q, _mm256_set1_epi8(-128));
                }
                m = d.map(|d| _mm256_mul_ps(d, _mm256_set1_ps(-128.0)));
            }
            Group { q, d, m }
        }
    }
}

/// `vpdpbusd` on 256 bits, in the encoding of a level.
trait Dot {
    unsafe fn dot(sum: __m256i, q: __m256i, x: __m256i) -> __m256i;

    #[inline(always)]
    unsafe fn sum<Q: Quants>(q: &[__m256i; 8], half: usize, x: *const i8) -> __m256i {
        unsafe {
            // Two, because each waits for the one before it.
            let mut sums = [_mm256_setzero_si256(); 2];
            for j in 0..Q::GROUP / 4 {
                let q = q[half * (Q::GROUP / 4) + j];
                sums[j % 2] = Self::dot(sums[j % 2], q, four(x.add(4 * j)));
            }
            _mm256_add_epi32(sums[0], sums[1])
        }
    }

    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn one_tile<Q: Quants, const P: usize>(
        w: Unpacked,
        n_in: usize,
        x: &Tile,
    ) -> [[__m256; TILE]; P] {
        unsafe {
            let Unpacked { mut q, mut d, mut m } = w;
            let Tile { mut quants, mut scales, mut sums } = *x;
            let mut acc = [[_mm256_setzero_ps(); TILE]; P];
            for _ in 0..n_in / 32 {
                for half in 0..32 / Q::GROUP {
                    let mut sum = [[_mm256_setzero_si256(); TILE]; P];
                    for j in 0..Q::GROUP / 4 {
                        for i in 0..TILE {
                            let x = four(quants.add(32 * i + half * Q::GROUP + 4 * j));
                            for p in 0..P {
                                sum[p][i] = Self::dot(sum[p][i], *q.add(j * P + p), x);
                            }
                        }
                    }
                    q = q.add(Q::GROUP / 4 * P);
                    for p in 0..P {
                        let (d, m) = (*d.add(p), *m.add(p));
                        for i in 0..TILE {
                            let (scale, x_sum) = (*scales.add(i), *sums.add(i));
                            acc[p][i] = scaled::<Q>(acc[p][i], sum[p][i], (d, m), (scale, x_sum));
                        }
                    }
                    (d, m, sums) = (d.add(P), m.add(P), sums.add(TILE));
                }
                (quants, scales) = (quants.add(32 * TILE), scales.add(TILE));
            }
            acc
        }
    }
}

pub(super) struct AvxVnni;

impl Dot for AvxVnni {
    #[inline(always)]
    unsafe fn dot(sum: __m256i, q: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_dpbusd_avx_epi32(sum, q, x) }
    }
}

impl Isa for AvxVnni {
    const PANELS: usize = 2;
    type Ready<Q: Quants> = Unsigned<Q>;

    #[inline(always)]
    unsafe fn sum<Q: Quants>(q: &[__m256i; 8], half: usize, x: *const i8) -> __m256i {
        unsafe { <Self as Dot>::sum::<Q>(q, half, x) }
    }

    #[inline(always)]
    unsafe fn one_tile<Q: Quants, const P: usize>(
        w: Unpacked,
        n_in: usize,
        x: &Tile,
    ) -> [[__m256; TILE]; P] {
        unsafe { <Self as Dot>::one_tile::<Q, P>(w, n_in, x) }
    }
}

pub(super) struct Avx512;

impl Dot for Avx512 {
    #[inline(always)]
    unsafe fn dot(sum: __m256i, q: __m256i, x: __m256i) -> __m256i {
        unsafe { _mm256_dpbusd_epi32(sum, q, x) }
    }
}

impl Isa for Avx512 {
    const PANELS: usize = 4;
    type Ready<Q: Quants> = Unsigned<Q>;

    // One token waits for memory; 256 bits are wide enough.
    #[inline(always)]
    unsafe fn sum<Q: Quants>(q: &[__m256i; 8], half: usize, x: *const i8) -> __m256i {
        unsafe { <Self as Dot>::sum::<Q>(q, half, x) }
    }

    #[inline(always)]
    unsafe fn one_tile<Q: Quants, const P: usize>(
        w: Unpacked,
        n_in: usize,
        x: &Tile,
    ) -> [[__m256; TILE]; P] {
        unsafe {
            let mut acc = [[_mm256_setzero_ps(); TILE]; P];
            match P {
                4 => split(&mut acc, wide_tile::<Q, 2>(w, n_in, x)),
                2 => split(&mut acc, wide_tile::<Q, 1>(w, n_in, x)),
                _ => acc = <Self as Dot>::one_tile::<Q, P>(w, n_in, x),
            }
            acc
        }
    }
}

/// Vectors of two panels, one by one.
#[inline(always)]
unsafe fn split<const W: usize>(to: &mut [[__m256; TILE]], from: [[__m512; TILE]; W]) {
    unsafe {
        for (to, from) in to.as_chunks_mut::<2>().0.iter_mut().zip(from) {
            for (i, both) in from.into_iter().enumerate() {
                to[0][i] = _mm512_castps512_ps256(both);
                let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(both));
                to[1][i] = _mm256_castpd_ps(high);
            }
        }
    }
}

/// `W` pairs of panels times the tokens of one tile: 512 bits hold a pair.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn wide_tile<Q: Quants, const W: usize>(
    w: Unpacked,
    n_in: usize,
    x: &Tile,
) -> [[__m512; TILE]; W] {
    unsafe {
        let mut q = w.q.cast::<__m512i>();
        let (mut d, mut m) = (w.d.cast::<__m512>(), w.m.cast::<__m512>());
        let Tile { mut quants, mut scales, mut sums } = *x;
        let mut acc = [[_mm512_setzero_ps(); TILE]; W];
        for _ in 0..n_in / 32 {
            for half in 0..32 / Q::GROUP {
                let mut sum = [[_mm512_setzero_si512(); TILE]; W];
                for j in 0..Q::GROUP / 4 {
                    for i in 0..TILE {
                        let x = quants.add(32 * i + half * Q::GROUP + 4 * j);
                        let x = _mm512_set1_epi32(x.cast::<i32>().read_unaligned());
                        for p in 0..W {
                            sum[p][i] = _mm512_dpbusd_epi32(sum[p][i], *q.add(j * W + p), x);
                        }
                    }
                }
                q = q.add(Q::GROUP / 4 * W);
                for p in 0..W {
                    let (d, m) = (*d.add(p), *m.add(p));
                    for i in 0..TILE {
                        let d = _mm512_mul_ps(d, _mm512_set1_ps(*scales.add(i)));
                        acc[p][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[p][i]), d, acc[p][i]);
                        if Q::MIN {
                            let x_sum = _mm512_set1_ps(*sums.add(i));
                            acc[p][i] = _mm512_fmadd_ps(m, x_sum, acc[p][i]);
                        }
                    }
                }
                (d, m, sums) = (d.add(W), m.add(W), sums.add(TILE));
            }
            (quants, scales) = (quants.add(32 * TILE), scales.add(TILE));
        }
        acc
    }
}

/// 12 sums of 32 or 64 products each.
pub(super) const OPS_PER_ROUND_256: usize = 12 * 32 * 2;
pub(super) const OPS_PER_ROUND_512: usize = 12 * 64 * 2;

#[target_feature(enable = "avx2,avxvnni")]
pub(super) unsafe fn products_in_registers_256(rounds: usize) {
    let mut sums = [_mm256_setzero_si256(); 12];
    let (q, x) = (_mm256_set1_epi8(3), _mm256_set1_epi8(1));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm256_dpbusd_avx_epi32(*sum, q, x);
            // SAFETY: does nothing; but the compiler cannot know, and computes every product.
            unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) * sum, options(nomem, nostack)) };
        }
    }
    std::hint::black_box(sums);
}

#[target_feature(enable = "avx512f,avx512vnni")]
pub(super) unsafe fn products_in_registers_512(rounds: usize) {
    let mut sums = [_mm512_setzero_si512(); 12];
    let (q, x) = (_mm512_set1_epi8(3), _mm512_set1_epi8(1));
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = _mm512_dpbusd_epi32(*sum, q, x);
            // SAFETY: as above.
            unsafe { std::arch::asm!("/* {0} */", inout(zmm_reg) * sum, options(nomem, nostack)) };
        }
    }
    std::hint::black_box(sums);
}
