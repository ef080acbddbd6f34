//! AVX2, FMA and F16C: 8 rows of 4 bytes, or 8 rows of one `f32`, in a register.
//!
//! 8-bit products are summed in pairs by `maddubs`, which takes unsigned quants; as many of its
//! results are added as 16 bits hold (`RUN`) before they are widened. Signed quants are made
//! unsigned by moving their sign to the activation. Functions without `target_feature` are inlined
//! into those that have it.

mod formats;

use std::arch::x86_64::*;

use self::formats::*;

use super::super::threads::Columns;
use super::{Activations, LANES, Multiply, Panels, Scratch};

pub(super) static TABLE: [Multiply; 14] = [
    floats::<F32>,
    floats::<F16>,
    floats::<Bf16>,
    integers::<Q4_0>,
    integers::<Q4_1>,
    integers::<Q5_0>,
    integers::<Q5_1>,
    integers::<Q8_0>,
    integers::<Iq4Nl>,
    integers::<Mxfp4>,
    integers::<Q4K>,
    integers::<Q5K>,
    integers::<Q6K>,
    integers::<Iq4Xs>,
];

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

#[target_feature(enable = "avx2,fma,f16c")]
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
        let mut acc = [[_mm256_setzero_ps(); P]; T];
        for k in 0..w.n_in {
            let mut w_k = [_mm256_setzero_ps(); P];
            for (p, w_k) in w_k.iter_mut().enumerate() {
                *w_k = F::load(from.add(p * w.stride + k * F::BYTES));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let x_k = _mm256_broadcast_ss(&*x_at.add(i * x.stride + k));
                for (acc, w_k) in acc.iter_mut().zip(w_k) {
                    *acc = _mm256_fmadd_ps(w_k, x_k, *acc);
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

#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn integers<Q: Quants>(
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
                store(out, 0, at, n_rows, one_token::<Q>(from, w.n_in, x));
                continue;
            }
            let unpacked = unpack::<Q>(from, w.n_in, scratch);
            let mut t = 0;
            while t < x.n {
                t += match x.n - t {
                    4.. => tokens::<Q, 4>(unpacked, w.n_in, x, t, out, at, n_rows),
                    2.. => tokens::<Q, 2>(unpacked, w.n_in, x, t, out, at, n_rows),
                    _ => tokens::<Q, 1>(unpacked, w.n_in, x, t, out, at, n_rows),
                };
            }
        }
    }
}

/// One panel times one token.
#[inline(always)]
unsafe fn one_token<Q: Quants>(panel: *const u8, n_in: usize, x: &Activations) -> __m256 {
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let mut acc = _mm256_setzero_ps();
        for b in 0..n_in / Q::BLOCK {
            let block = panel.add(b * Q::ROW_BYTES * LANES);
            let head = Q::head(block);
            for i in 0..Q::BLOCK / 32 {
                let group = Q::group(block, head, i);
                let g = b * (Q::BLOCK / 32) + i;
                let quants = x.quants.as_ptr().add(32 * g);
                let scale = *x.scales.get_unchecked(g);
                for half in 0..32 / Q::GROUP {
                    let mut sum = _mm256_setzero_si256();
                    for j in (0..Q::GROUP / 4).step_by(Q::RUN) {
                        let mut run = _mm256_setzero_si256();
                        for j in j..j + Q::RUN {
                            let j = half * (Q::GROUP / 4) + j;
                            run = pairs::<Q>(run, group.q[j], four(quants.add(4 * j)));
                        }
                        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(run, ones));
                    }
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

/// An unpacked panel: quants `[n_in / 4]`, scales and minima `[n_in / GROUP]`, one vector each.
#[derive(Clone, Copy)]
struct Unpacked {
    q: *const __m256i,
    d: *const __m256,
    m: *const __m256,
}

#[inline(always)]
unsafe fn unpack<Q: Quants>(panel: *const u8, n_in: usize, scratch: &mut Scratch) -> Unpacked {
    unsafe {
        let (n_q, n_d) = (n_in / 4, n_in / Q::GROUP);
        let q = scratch.bytes((n_q + 2 * n_d) * 32).cast::<__m256i>();
        let d = q.add(n_q).cast::<__m256>();
        let m = d.add(n_d);
        for b in 0..n_in / Q::BLOCK {
            let block = panel.add(b * Q::ROW_BYTES * LANES);
            let head = Q::head(block);
            for i in 0..Q::BLOCK / 32 {
                let group = Q::group(block, head, i);
                let g = b * (Q::BLOCK / 32) + i;
                for j in 0..8 {
                    *q.add(8 * g + j) = group.q[j];
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

/// One unpacked panel times `T` tokens.
#[inline(always)]
unsafe fn tokens<Q: Quants, const T: usize>(
    w: Unpacked,
    n_in: usize,
    x: &Activations,
    t: usize,
    out: Columns<f32>,
    at: usize,
    n_rows: usize,
) -> usize {
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let quants = x.quants.as_ptr().add(t * x.stride);
        let scales = x.scales.as_ptr().add(t * x.stride / 32);
        let sums = match Q::GROUP {
            32 => x.sums32.as_ptr(),
            _ => x.sums16.as_ptr(),
        }
        .add(t * x.stride / Q::GROUP);
        let mut acc = [_mm256_setzero_ps(); T];
        for g in 0..n_in / Q::GROUP {
            let mut sum = [_mm256_setzero_si256(); T];
            for j in (0..Q::GROUP / 4).step_by(Q::RUN) {
                let mut run = [_mm256_setzero_si256(); T];
                for j in j..j + Q::RUN {
                    let j = g * (Q::GROUP / 4) + j;
                    let q = *w.q.add(j);
                    for (i, run) in run.iter_mut().enumerate() {
                        *run = pairs::<Q>(*run, q, four(quants.add(i * x.stride + 4 * j)));
                    }
                }
                for (sum, run) in sum.iter_mut().zip(run) {
                    *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(run, ones));
                }
            }
            let (d, m) = (*w.d.add(g), *w.m.add(g));
            for i in 0..T {
                let scale = *scales.add(i * x.stride / 32 + g * Q::GROUP / 32);
                let x_sum = *sums.add(i * x.stride / Q::GROUP + g);
                acc[i] = scaled::<Q>(acc[i], sum[i], (d, m), (scale, x_sum));
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            store(out, t + i, at, n_rows, *acc);
        }
        T
    }
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
