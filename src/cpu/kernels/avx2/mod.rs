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
use super::{Activations, LANES, Multiply, Panels, Scratch, TILE};

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
        let n_panels = w.n_rows.div_ceil(LANES);
        let from = |panel: usize| w.bytes.as_ptr().add(panel * w.stride);
        if x.n == 1 {
            for panel in 0..n_panels {
                let acc = one_token::<Q>(from(panel), w.n_in, x);
                store(out, 0, start + panel * LANES, w.n_rows - panel * LANES, acc);
            }
            return;
        }
        let mut panel = 0;
        while panel < n_panels {
            let at = (start + panel * LANES, w.n_rows - panel * LANES);
            panel += match n_panels - panel {
                2.. => tiles::<Q, 2>([from(panel), from(panel + 1)], w.n_in, x, scratch, out, at),
                _ => tiles::<Q, 1>([from(panel)], w.n_in, x, scratch, out, at),
            };
        }
    }
}

/// Bytes that are asked of memory before they are needed.
const AHEAD: usize = 4096;

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
                for line in (0..Q::ROW_BYTES * LANES / (Q::BLOCK / 32)).step_by(64) {
                    let at = block
                        .wrapping_add(AHEAD + i * (Q::ROW_BYTES * LANES / (Q::BLOCK / 32)) + line);
                    _mm_prefetch::<_MM_HINT_T0>(at.cast());
                }
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

/// `P` panels times all tokens, a tile of them at a time. Returns `P`.
#[inline(always)]
unsafe fn tiles<Q: Quants, const P: usize>(
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
            let acc = one_tile::<Q, P>(w, n_in, x, tile);
            for i in 0..TILE.min(x.n - tile * TILE) {
                for (p, acc) in acc.iter().enumerate() {
                    store(out, tile * TILE + i, at + p * LANES, n_rows - p * LANES, acc[i]);
                }
            }
        }
        P
    }
}

/// `P` panels times the tokens of one tile.
// With other loops than these, sums are kept in memory instead of registers.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn one_tile<Q: Quants, const P: usize>(
    w: Unpacked,
    n_in: usize,
    x: &Activations,
    tile: usize,
) -> [[__m256; TILE]; P] {
    unsafe {
        let ones = _mm256_set1_epi16(1);
        let mut quants = x.quants.as_ptr().add(tile * TILE * n_in);
        let mut scales = x.scales.as_ptr().add(tile * TILE * n_in / 32);
        let mut sums = match Q::GROUP {
            32 => x.sums32.as_ptr(),
            _ => x.sums16.as_ptr(),
        }
        .add(tile * TILE * n_in / Q::GROUP);
        let (mut q, mut d, mut m) = (w.q, w.d, w.m);
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
