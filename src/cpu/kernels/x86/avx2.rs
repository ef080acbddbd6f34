//! AVX2: 8-bit products are summed in pairs by `maddubs`, which takes unsigned quants; as many of
//! its results are added as 16 bits hold (`RUN`) before they are widened. Signed quants are made
//! unsigned by moving their sign to the activation.

use super::*;

pub(super) struct Avx2;

impl Isa for Avx2 {
    const PANELS: usize = 2;
    type Ready<Q: Quants> = Q;

    #[inline(always)]
    unsafe fn sum<Q: Quants>(q: &[__m256i; 8], half: usize, x: *const i8) -> __m256i {
        unsafe {
            let mut sum = _mm256_setzero_si256();
            for j in (0..Q::GROUP / 4).step_by(Q::RUN) {
                let mut run = _mm256_setzero_si256();
                for j in j..j + Q::RUN {
                    run = pairs::<Q>(run, q[half * (Q::GROUP / 4) + j], four(x.add(4 * j)));
                }
                sum = _mm256_add_epi32(sum, _mm256_madd_epi16(run, _mm256_set1_epi16(1)));
            }
            sum
        }
    }

    // With other loops than these, sums are kept in memory instead of registers.
    #[allow(clippy::needless_range_loop)]
    #[inline(always)]
    unsafe fn one_tile<Q: Quants, const P: usize>(
        w: Unpacked,
        n_in: usize,
        x: &Tile,
    ) -> [[__m256; TILE]; P] {
        unsafe {
            let ones = _mm256_set1_epi16(1);
            let Unpacked { mut q, mut d, mut m } = w;
            let Tile { mut quants, mut scales, mut sums } = *x;
            let mut acc = [[_mm256_setzero_ps(); TILE]; P];
            for _ in 0..n_in / 32 {
                for half in 0..32 / Q::GROUP {
                    let mut sum = [[_mm256_setzero_si256(); TILE]; P];
                    for j in (0..Q::GROUP / 4).step_by(Q::RUN) {
                        let mut run = [[_mm256_setzero_si256(); TILE]; P];
                        for j in j..j + Q::RUN {
                            let mut w_j = [_mm256_setzero_si256(); P];
                            for p in 0..P {
                                w_j[p] = *q.add(j * P + p);
                            }
                            for i in 0..TILE {
                                let x = four(quants.add(32 * i + half * Q::GROUP + 4 * j));
                                for p in 0..P {
                                    run[p][i] = in_order(pairs::<Q>(run[p][i], w_j[p], x));
                                }
                            }
                        }
                        for p in 0..P {
                            for i in 0..TILE {
                                let wide = _mm256_madd_epi16(run[p][i], ones);
                                sum[p][i] = _mm256_add_epi32(sum[p][i], wide);
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

/// Adds pair sums of one vector of quants and 4 activations.
#[inline(always)]
unsafe fn pairs<Q: Quants>(run: __m256i, q: __m256i, x: __m256i) -> __m256i {
    unsafe {
        match Q::SIGNED {
            // A sign that x takes over; |q| = 128 stays right as an unsigned number.
            true => _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(x, q)),
            false => _mm256_add_epi16(run, _mm256_maddubs_epi16(q, x)),
        }
    }
}

/// Does nothing, but keeps the compiler from moving additions about, which costs it more registers
/// than there are.
#[inline]
#[target_feature(enable = "avx2")]
fn in_order(mut sum: __m256i) -> __m256i {
    // SAFETY: there is no instruction.
    unsafe {
        std::arch::asm!(
            "/* {0} */",
            inout(ymm_reg) sum,
            options(pure, nomem, nostack, preserves_flags)
        );
    }
    sum
}

/// 9 sums of 32 products each.
pub(super) const OPS_PER_ROUND: usize = 9 * 32 * 2;

/// Products of unsigned 4-bit and signed 8-bit numbers, whose pair sums are added in 16 bits.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn products_in_registers(rounds: usize) {
    let mut sums = [[_mm256_setzero_si256(); 3]; 3];
    let (mut q, x) = ([_mm256_set1_epi8(3); 3], [1, 2, 4].map(|x| _mm256_set1_epi8(x)));
    for _ in 0..rounds {
        for (q, sums) in q.iter_mut().zip(&mut sums) {
            // SAFETY: does nothing; but the compiler cannot know, and computes every product anew.
            unsafe { std::arch::asm!("/* {0} */", inout(ymm_reg) * q, options(nomem, nostack)) };
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(*q, x));
            }
        }
    }
    std::hint::black_box(sums);
}
