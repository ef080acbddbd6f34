//! The K formats: 256 elements in sub-blocks whose scales are quantized themselves.
//! Q2_K, Q4_K, Q5_K: `x = d * scale * q - dmin * min`; Q3_K, Q6_K: `x = d * scale * (q - offset)`.

use super::{half, put_half};

const N: usize = 256;

/// 16 sub-blocks of 16. Bytes: 16 scales and minima (4 bits each), 64 quants, `d`, `dmin`.
pub(super) fn q2_k(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<84>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let (d, dmin) = (half(b, 80), half(b, 82));
        for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (scale, min) = (d * f32::from(b[sub] & 15), dmin * f32::from(b[sub] >> 4));
            // A half of 128 elements has 32 bytes; four sub-block pairs take two bits of each.
            let (from, shift) = (16 + sub / 8 * 32 + sub % 2 * 16, sub % 8 / 2 * 2);
            for (l, out) in out.iter_mut().enumerate() {
                *out = scale * f32::from(b[from + l] >> shift & 3) - min;
            }
        }
    }
}

/// 16 sub-blocks of 16. Bytes: 32 high bits, 64 quants, 12 scales (6 bits each), `d`.
pub(super) fn q3_k(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<110>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let (d, packed) = (half(b, 108), &b[96..108]);
        for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let low = packed[sub % 8] >> (sub / 8 * 4) & 15;
            let high = packed[8 + sub % 4] >> (sub / 4 * 2) & 3;
            let scale = d * f32::from((low | high << 4) as i8 - 32);
            let (from, shift) = (32 + sub / 8 * 32 + sub % 2 * 16, sub % 8 / 2 * 2);
            for (l, out) in out.iter_mut().enumerate() {
                let low = b[from + l] >> shift & 3;
                let high = b[sub % 2 * 16 + l] >> (sub / 2) & 1;
                *out = scale * f32::from((low | high << 2) as i8 - 4);
            }
        }
    }
}

/// Scale and minimum, 6 bits each, of one of 8 sub-blocks, from their 12 bytes.
fn scale_and_min(packed: &[u8], sub: usize) -> (f32, f32) {
    let (scale, min) = match sub {
        0..4 => (packed[sub] & 63, packed[sub + 4] & 63),
        _ => (
            packed[sub + 4] & 15 | packed[sub - 4] >> 6 << 4,
            packed[sub + 4] >> 4 | packed[sub] >> 6 << 4,
        ),
    };
    (scale.into(), min.into())
}

/// 8 sub-blocks of 32. Bytes: `d`, `dmin`, 12 scales and minima, 128 quants.
pub(super) fn q4_k(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<144>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let (d, dmin) = (half(b, 0), half(b, 2));
        for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (scale, min) = scale_and_min(&b[4..16], sub);
            let (scale, min) = (d * scale, dmin * min);
            let (from, shift) = (16 + sub / 2 * 32, sub % 2 * 4);
            for (l, out) in out.iter_mut().enumerate() {
                *out = scale * f32::from(b[from + l] >> shift & 15) - min;
            }
        }
    }
}

/// 8 sub-blocks of 32. Bytes: `d`, `dmin`, 12 scales and minima, 32 high bits, 128 quants.
pub(super) fn q5_k(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<176>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let (d, dmin) = (half(b, 0), half(b, 2));
        for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (scale, min) = scale_and_min(&b[4..16], sub);
            let (scale, min) = (d * scale, dmin * min);
            let (from, shift) = (48 + sub / 2 * 32, sub % 2 * 4);
            for (l, out) in out.iter_mut().enumerate() {
                let high = b[16 + l] >> sub & 1;
                *out = scale * f32::from(b[from + l] >> shift & 15 | high << 4) - min;
            }
        }
    }
}

/// 16 sub-blocks of 16. Bytes: 128 low bits, 64 high bits, 16 scales (8 bits), `d`.
pub(super) fn q6_k(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<210>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let d = half(b, 208);
        for (sub, out) in out.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let scale = d * f32::from(b[192 + sub] as i8);
            let (part, quarter, side) = (sub / 8, sub % 8 / 2, sub % 2 * 16);
            let low = part * 64 + quarter % 2 * 32 + side;
            let high = 128 + part * 32 + side;
            for (l, out) in out.iter_mut().enumerate() {
                let low = b[low + l] >> (quarter / 2 * 4) & 15;
                let high = b[high + l] >> (quarter * 2) & 3;
                *out = scale * f32::from((low | high << 4) as i8 - 32);
            }
        }
    }
}

// Rounding. A sub-block's scale is searched for among those near `largest / n`: each gives integers,
// for which the best scale is a matter of least squares (Kawrakow, llama.cpp #1684). The search and
// its weights are plainer than llama.cpp's, so blocks are not the same bits.

/// The scale with which integers from `-n` to `n - 1` come nearest to `x`, by squares weighted with
/// `x^2`.
fn symmetric_scale(x: &[f32], n: f32) -> f32 {
    let farthest = x.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    let (mut best, mut scale) = (0.0f32, 0.0);
    if farthest == 0.0 {
        return 0.0;
    }
    for step in -9..=9 {
        let inverse = -(n + 0.1 * step as f32) / farthest;
        let (mut xq, mut qq) = (0.0f32, 0.0f32);
        for x in x {
            let q = (x * inverse).round().clamp(-n, n - 1.0);
            xq += x * x * x * q;
            qq += x * x * q * q;
        }
        // What the best scale takes off the sum of squares.
        if qq > 0.0 && xq * xq > best * qq {
            (best, scale) = (xq * xq / qq, xq / qq);
        }
    }
    scale
}

/// The scale and the minimum, not below 0, with which `scale q - min` for integers from 0 to `n` comes
/// nearest to `x`.
fn affine_scale(x: &[f32], n: f32) -> (f32, f32) {
    let low = x.iter().fold(0.0f32, |m, x| m.min(*x));
    let high = x.iter().fold(low, |m, x| m.max(*x));
    let (mut best, mut found) = (f32::INFINITY, (0.0, -low));
    if high == low {
        return found;
    }
    for step in -10..=10 {
        let inverse = (n + 0.1 * step as f32) / (high - low);
        let q = |x: &f32| ((x - low) * inverse).round().clamp(0.0, n);
        let (mut s, mut sx, mut sq, mut sqq, mut sqx) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
        for x in x {
            let q = q(x);
            (s, sx, sq, sqq, sqx) = (s + 1.0, sx + x, sq + q, sqq + q * q, sqx + q * x);
        }
        let determinant = s * sqq - sq * sq;
        let line = ((s * sqx - sx * sq) / determinant, (sqq * sx - sq * sqx) / determinant);
        let (scale, offset) = match determinant > 0.0 && line.1 <= 0.0 {
            true => line,
            false => (if sqq > 0.0 { sqx / sqq } else { 0.0 }, 0.0),
        };
        let error: f32 = x.iter().map(|x| (scale * q(x) + offset - x).powi(2)).sum();
        if error < best {
            (best, found) = (error, (scale, -offset));
        }
    }
    found
}

/// `x / d`, rounded to a whole number in a range; 0 for a `d` of 0.
fn whole(x: f32, d: f32, low: f32, high: f32) -> f32 {
    if d == 0.0 { 0.0 } else { (x / d).round().clamp(low, high) }
}

/// As a file holds it.
fn as_half(x: f32) -> f32 {
    half::f16::from_f32(x).to_f32()
}

/// Scales and minima of sub-blocks, as whole numbers up to `top`, and their own scales.
fn affine_block(x: &[f32; N], len: usize, n: f32, top: f32) -> (f32, f32, Vec<(u8, u8)>) {
    let found: Vec<(f32, f32)> = x.chunks_exact(len).map(|x| affine_scale(x, n)).collect();
    let d = as_half(found.iter().fold(0.0f32, |m, f| m.max(f.0)) / top);
    let dmin = as_half(found.iter().fold(0.0f32, |m, f| m.max(f.1)) / top);
    let number = |(scale, min): &(f32, f32)| {
        (whole(*scale, d, 0.0, top) as u8, whole(*min, dmin, 0.0, top) as u8)
    };
    (d, dmin, found.iter().map(number).collect())
}

/// The integers of a sub-block.
fn affine_quants(x: &[f32], scale: f32, min: f32, n: f32) -> impl Iterator<Item = u8> {
    x.iter().map(move |x| whole(x + min, scale, 0.0, n) as u8)
}

pub(super) fn to_q2_k(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<84>().0) {
        b.fill(0);
        let (d, dmin, subs) = affine_block(x, 16, 3.0, 15.0);
        put_half(d, &mut b[80..82]);
        put_half(dmin, &mut b[82..84]);
        for (sub, (x, (scale, min))) in x.chunks_exact(16).zip(subs).enumerate() {
            b[sub] = scale | min << 4;
            let (to, shift) = (16 + sub / 8 * 32 + sub % 2 * 16, sub % 8 / 2 * 2);
            let quants = affine_quants(x, d * f32::from(scale), dmin * f32::from(min), 3.0);
            quants.enumerate().for_each(|(l, q)| b[to + l] |= q << shift);
        }
    }
}

pub(super) fn to_q3_k(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<110>().0) {
        b.fill(0);
        let scales: Vec<f32> = x.chunks_exact(16).map(|x| symmetric_scale(x, 4.0)).collect();
        let largest = scales.iter().fold(0.0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
        let d = as_half(largest / -32.0);
        put_half(d, &mut b[108..110]);
        for (sub, (x, scale)) in x.chunks_exact(16).zip(scales).enumerate() {
            let scale = whole(scale, d, -32.0, 31.0);
            let code = (scale + 32.0) as u8;
            b[96 + sub % 8] |= (code & 15) << (sub / 8 * 4);
            b[104 + sub % 4] |= (code >> 4) << (sub / 4 * 2);
            let (to, shift) = (32 + sub / 8 * 32 + sub % 2 * 16, sub % 8 / 2 * 2);
            for (l, x) in x.iter().enumerate() {
                let q = (whole(*x, d * scale, -4.0, 3.0) + 4.0) as u8;
                b[to + l] |= (q & 3) << shift;
                b[sub % 2 * 16 + l] |= (q >> 2) << (sub / 2);
            }
        }
    }
}

/// Packs 6-bit scales and minima as [`scale_and_min`] reads them.
fn put_scales(subs: &[(u8, u8)], packed: &mut [u8]) {
    for (sub, (scale, min)) in subs.iter().enumerate() {
        if sub < 4 {
            packed[sub] |= scale;
            packed[sub + 4] |= min;
        } else {
            packed[sub + 4] |= scale & 15 | min << 4;
            packed[sub - 4] |= scale >> 4 << 6;
            packed[sub] |= min >> 4 << 6;
        }
    }
}

pub(super) fn to_q4_k(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<144>().0) {
        b.fill(0);
        let (d, dmin, subs) = affine_block(x, 32, 15.0, 63.0);
        put_half(d, &mut b[..2]);
        put_half(dmin, &mut b[2..4]);
        put_scales(&subs, &mut b[4..16]);
        for (sub, (x, (scale, min))) in x.chunks_exact(32).zip(subs).enumerate() {
            let (to, shift) = (16 + sub / 2 * 32, sub % 2 * 4);
            let quants = affine_quants(x, d * f32::from(scale), dmin * f32::from(min), 15.0);
            quants.enumerate().for_each(|(l, q)| b[to + l] |= q << shift);
        }
    }
}

pub(super) fn to_q5_k(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<176>().0) {
        b.fill(0);
        let (d, dmin, subs) = affine_block(x, 32, 31.0, 63.0);
        put_half(d, &mut b[..2]);
        put_half(dmin, &mut b[2..4]);
        put_scales(&subs, &mut b[4..16]);
        for (sub, (x, (scale, min))) in x.chunks_exact(32).zip(subs).enumerate() {
            let (to, shift) = (48 + sub / 2 * 32, sub % 2 * 4);
            let quants = affine_quants(x, d * f32::from(scale), dmin * f32::from(min), 31.0);
            for (l, q) in quants.enumerate() {
                b[to + l] |= (q & 15) << shift;
                b[16 + l] |= (q >> 4) << sub;
            }
        }
    }
}

pub(super) fn to_q6_k(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<210>().0) {
        b.fill(0);
        let scales: Vec<f32> = x.chunks_exact(16).map(|x| symmetric_scale(x, 32.0)).collect();
        let largest = scales.iter().fold(0.0f32, |m, s| if s.abs() > m.abs() { *s } else { m });
        let d = as_half(largest / -128.0);
        put_half(d, &mut b[208..210]);
        for (sub, (x, scale)) in x.chunks_exact(16).zip(scales).enumerate() {
            let scale = whole(scale, d, -128.0, 127.0);
            b[192 + sub] = scale as i8 as u8;
            let (part, quarter, side) = (sub / 8, sub % 8 / 2, sub % 2 * 16);
            let low = part * 64 + quarter % 2 * 32 + side;
            let high = 128 + part * 32 + side;
            for (l, x) in x.iter().enumerate() {
                let q = (whole(*x, d * scale, -32.0, 31.0) + 32.0) as u8;
                b[low + l] |= (q & 15) << (quarter / 2 * 4);
                b[high + l] |= (q >> 4) << (quarter * 2);
            }
        }
    }
}
