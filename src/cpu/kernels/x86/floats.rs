//! Products of `f32`, added in the order of the elements.

use super::*;

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
                    (4, _) => tile::<F, 4, 1>(w, x, out, start, panel, t),
                    (2, 4..) => tile::<F, 2, 4>(w, x, out, start, panel, t),
                    (2, _) => tile::<F, 2, 1>(w, x, out, start, panel, t),
                    (_, 4..) => tile::<F, 1, 4>(w, x, out, start, panel, t),
                    _ => tile::<F, 1, 1>(w, x, out, start, panel, t),
                };
            }
            panel += n;
        }
    }
}

/// `P` panels times `T` tokens. Returns `T`.
#[inline(always)]
unsafe fn tile<F: Floats, const P: usize, const T: usize>(
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
        let mut panel = 0;
        while panel + 2 <= n_panels {
            let n = if panel + 4 <= n_panels { 4 } else { 2 };
            let mut t = 0;
            while t < x.n {
                t += match (n, x.n - t) {
                    (4, 4..) => wide_tile::<F, 2, 4>(w, x, out, start, panel, t),
                    (4, _) => wide_tile::<F, 2, 1>(w, x, out, start, panel, t),
                    (_, 4..) => wide_tile::<F, 1, 4>(w, x, out, start, panel, t),
                    _ => wide_tile::<F, 1, 1>(w, x, out, start, panel, t),
                };
            }
            panel += n;
        }
        if panel < n_panels {
            let bytes = &w.bytes[panel * w.stride..];
            let n_rows = w.n_rows - panel * LANES;
            let last = Panels { bytes, n_rows, ..*w };
            narrow::<F>(&last, x, scratch, out, start + panel * LANES);
        }
    }
}

/// `W` pairs of panels times `T` tokens. Returns `T`.
#[inline(always)]
unsafe fn wide_tile<F: Floats, const W: usize, const T: usize>(
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
        let mut acc = [[_mm512_setzero_ps(); W]; T];
        for k in 0..w.n_in {
            let mut w_k = [_mm512_setzero_ps(); W];
            for (p, w_k) in w_k.iter_mut().enumerate() {
                let at = from.add(2 * p * w.stride + k * F::BYTES);
                *w_k = F::load_two(at, at.add(w.stride));
            }
            for (i, acc) in acc.iter_mut().enumerate() {
                let x_k = _mm512_set1_ps(*x_at.add(i * x.stride + k));
                for (acc, w_k) in acc.iter_mut().zip(w_k) {
                    *acc = _mm512_fmadd_ps(w_k, x_k, *acc);
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
