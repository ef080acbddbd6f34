//! Products of `f32`, added in the order of the elements.

use std::ops::Range;

use super::*;

/// Tokens that are multiplied together, of those that are left.
#[inline(always)]
fn tokens(left: usize) -> usize {
    match left {
        0..=4 => left,
        5 => 3,
        _ => 4,
    }
}

/// Vectors of rows that are multiplied together, of those that are left, with `n` tokens in all:
/// enough that the sums in flight keep the multipliers busy, few enough that they stay in registers.
#[inline(always)]
fn vectors(n: usize, left: usize, widest: usize) -> usize {
    let wanted = match n {
        1 => 8,
        2 | 3 => 4,
        _ => 2,
    };
    let mut n = wanted.min(widest);
    while n > left {
        n /= 2;
    }
    n
}

/// Elements of a row that are multiplied before those that follow, so that what several tokens read
/// stays in the first cache. Sums wait in the output meanwhile; their order stays the same.
const CHUNK: usize = 512;

/// The parts of a row of `n` elements, in order; a token alone has no use for them.
fn chunks(n_tokens: usize, n: usize) -> impl Iterator<Item = Range<usize>> {
    let len = if n_tokens == 1 { n } else { CHUNK };
    (0..n).step_by(len).map(move |start| start..n.min(start + len))
}

/// Calls a tile function for numbers of vectors and tokens. Returns the number of tokens.
macro_rules! call {
    ($tile:ident, $vectors:expr, $tokens:expr, $args:tt) => {
        match ($vectors, $tokens) {
            (8, 1) => $tile::<F, 8, 1> $args,
            (4, 1) => $tile::<F, 4, 1> $args,
            (4, 2) => $tile::<F, 4, 2> $args,
            (4, 3) => $tile::<F, 4, 3> $args,
            (2, 1) => $tile::<F, 2, 1> $args,
            (2, 2) => $tile::<F, 2, 2> $args,
            (2, 3) => $tile::<F, 2, 3> $args,
            (2, 4) => $tile::<F, 2, 4> $args,
            (1, 2) => $tile::<F, 1, 2> $args,
            (1, 3) => $tile::<F, 1, 3> $args,
            (1, 4) => $tile::<F, 1, 4> $args,
            _ => $tile::<F, 1, 1> $args,
        }
    };
}

/// 256 bits: 8 rows.
#[inline(always)]
pub(super) unsafe fn narrow<F: Floats>(
    w: &Panels,
    x: &Activations,
    _: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    unsafe {
        let n_panels = w.n_rows.div_ceil(LANES);
        for ks in chunks(x.n, w.n_in) {
            let mut panel = 0;
            while panel < n_panels {
                let n = vectors(x.n, n_panels - panel, 8);
                let mut t = 0;
                while t < x.n {
                    t += call!(tile, n, tokens(x.n - t), (w, x, &ks, out, start, panel, t));
                }
                panel += n;
            }
        }
    }
}

/// `P` panels times `T` tokens. Returns `T`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn tile<F: Floats, const P: usize, const T: usize>(
    w: &Panels,
    x: &Activations,
    ks: &Range<usize>,
    out: Columns<f32>,
    start: usize,
    panel: usize,
    t: usize,
) -> usize {
    unsafe {
        let from = w.bytes.as_ptr().add(panel * w.stride);
        let x_at = x.floats.as_ptr().add(t * x.stride);
        let mut acc = [[_mm256_setzero_ps(); P]; T];
        if ks.start > 0 {
            for (i, acc) in acc.iter_mut().enumerate() {
                for (p, acc) in acc.iter_mut().enumerate() {
                    let row = (panel + p) * LANES;
                    *acc = load(out, t + i, start + row, w.n_rows - row);
                }
            }
        }
        for block in ks.start / F::LEN..ks.end / F::LEN {
            for j in 0..F::LEN {
                let mut w_k = [_mm256_setzero_ps(); P];
                for p in 0..P {
                    w_k[p] = F::load(from.add(p * w.stride + block * F::BYTES), j);
                }
                for i in 0..T {
                    let x_k = &*x_at.add(i * x.stride + block * F::LEN + j);
                    let x_k = _mm256_broadcast_ss(x_k);
                    for p in 0..P {
                        acc[i][p] = F::add(acc[i][p], w_k[p], x_k);
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

/// 512 bits: pairs of panels.
#[inline(always)]
pub(super) unsafe fn wide<F: Floats>(
    w: &Panels,
    x: &Activations,
    scratch: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    unsafe {
        let n_panels = w.n_rows.div_ceil(LANES);
        for ks in chunks(x.n, w.n_in) {
            let mut panel = 0;
            while panel + 2 <= n_panels {
                let n = vectors(x.n, (n_panels - panel) / 2, 4);
                let mut t = 0;
                while t < x.n {
                    t += call!(wide_tile, n, tokens(x.n - t), (w, x, &ks, out, start, panel, t));
                }
                panel += 2 * n;
            }
        }
        let panel = n_panels / 2 * 2;
        if panel < n_panels {
            let bytes = &w.bytes[panel * w.stride..];
            let n_rows = w.n_rows - panel * LANES;
            let last = Panels { bytes, n_rows, ..*w };
            narrow::<F>(&last, x, scratch, out, start + panel * LANES);
        }
    }
}

/// The same with words of two rounded elements, which take the place of one float.
#[inline(always)]
pub(super) unsafe fn pairs<F: Floats>(
    w: &Panels,
    x: &Activations,
    scratch: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    unsafe {
        let floats = std::slice::from_raw_parts(x.pairs.as_ptr().cast(), x.pairs.len());
        let w = Panels { n_in: w.n_in / 2, ..*w };
        let x = Activations { floats, stride: x.stride / 2, ..*x };
        wide::<F>(&w, &x, scratch, out, start);
    }
}

/// `W` pairs of panels times `T` tokens. Returns `T`.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
unsafe fn wide_tile<F: Floats, const W: usize, const T: usize>(
    w: &Panels,
    x: &Activations,
    ks: &Range<usize>,
    out: Columns<f32>,
    start: usize,
    panel: usize,
    t: usize,
) -> usize {
    unsafe {
        let from = w.bytes.as_ptr().add(panel * w.stride);
        let x_at = x.floats.as_ptr().add(t * x.stride);
        let mut acc = [[_mm512_setzero_ps(); W]; T];
        if ks.start > 0 {
            for (i, acc) in acc.iter_mut().enumerate() {
                for (p, acc) in acc.iter_mut().enumerate() {
                    let row = (panel + 2 * p) * LANES;
                    let low = load(out, t + i, start + row, w.n_rows - row);
                    let row = row + LANES;
                    let high = load(out, t + i, start + row, w.n_rows - row);
                    let low = _mm512_castpd256_pd512(_mm256_castps_pd(low));
                    let both = _mm512_insertf64x4::<1>(low, _mm256_castps_pd(high));
                    *acc = _mm512_castpd_ps(both);
                }
            }
        }
        for block in ks.start / F::LEN..ks.end / F::LEN {
            for j in 0..F::LEN {
                let mut w_k = [_mm512_setzero_ps(); W];
                for p in 0..W {
                    let at = from.add(2 * p * w.stride + block * F::BYTES);
                    w_k[p] = F::load_two(at, at.add(w.stride), j);
                }
                for i in 0..T {
                    let x_k = _mm512_set1_ps(*x_at.add(i * x.stride + block * F::LEN + j));
                    for p in 0..W {
                        acc[i][p] = F::add_two(acc[i][p], w_k[p], x_k);
                    }
                }
            }
        }
        for (i, acc) in acc.iter().enumerate() {
            for (p, acc) in acc.iter().enumerate() {
                let row = (panel + 2 * p) * LANES;
                let high = _mm512_extractf64x4_pd::<1>(_mm512_castps_pd(*acc));
                store(out, t + i, start + row, w.n_rows - row, _mm512_castps512_ps256(*acc));
                let row = row + LANES;
                store(out, t + i, start + row, w.n_rows - row, _mm256_castpd_ps(high));
            }
        }
        T
    }
}
