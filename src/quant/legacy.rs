//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 elements with one scale `d`, in the `_1` formats also with a
//! minimum `m`: `x = d * (q - offset)` or `x = d * q + m`. Elements `j` and `j + 16` share a byte.

use super::{half, put_half};

const N: usize = 32;

pub(super) fn q4_0(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let d = half(b, 0);
        for j in 0..16 {
            out[j] = f32::from((b[2 + j] & 15) as i8 - 8) * d;
            out[j + 16] = f32::from((b[2 + j] >> 4) as i8 - 8) * d;
        }
    }
}

pub(super) fn q4_1(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<20>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let (d, m) = (half(b, 0), half(b, 2));
        for j in 0..16 {
            out[j] = f32::from(b[4 + j] & 15) * d + m;
            out[j + 16] = f32::from(b[4 + j] >> 4) * d + m;
        }
    }
}

/// The fifth bits of elements `j` and `j + 16`, in place.
fn fifth_bits(high: u32, j: usize) -> (u8, u8) {
    (((high >> j) & 1) as u8 * 16, ((high >> (j + 16)) & 1) as u8 * 16)
}

pub(super) fn q5_0(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<22>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let d = half(b, 0);
        let high = u32::from_le_bytes([b[2], b[3], b[4], b[5]]);
        for j in 0..16 {
            let (h0, h1) = fifth_bits(high, j);
            out[j] = f32::from((b[6 + j] & 15 | h0) as i8 - 16) * d;
            out[j + 16] = f32::from((b[6 + j] >> 4 | h1) as i8 - 16) * d;
        }
    }
}

pub(super) fn q5_1(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<24>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let (d, m) = (half(b, 0), half(b, 2));
        let high = u32::from_le_bytes([b[4], b[5], b[6], b[7]]);
        for j in 0..16 {
            let (h0, h1) = fifth_bits(high, j);
            out[j] = f32::from(b[8 + j] & 15 | h0) * d + m;
            out[j + 16] = f32::from(b[8 + j] >> 4 | h1) * d + m;
        }
    }
}

pub(super) fn q8_0(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<34>().0.iter().zip(out.as_chunks_mut::<N>().0) {
        let d = half(b, 0);
        for j in 0..N {
            out[j] = f32::from(b[2 + j] as i8) * d;
        }
    }
}

/// The scale for integers from `-n` on, and them plus `n`: the element farthest from 0 becomes `-n`.
fn symmetric(x: &[f32; N], n: f32) -> (f32, [u8; N]) {
    let farthest = x.iter().fold(0.0f32, |m, x| if x.abs() > m.abs() { *x } else { m });
    let d = farthest / -n;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, x.map(|x| (x * inverse + n + 0.5).min(2.0 * n - 1.0) as u8))
}

/// The scale and the minimum for integers from 0 to `n`, and them.
fn affine(x: &[f32; N], n: f32) -> (f32, f32, [u8; N]) {
    let min = x.iter().fold(f32::INFINITY, |m, x| m.min(*x));
    let max = x.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
    let d = (max - min) / n;
    let inverse = if d != 0.0 { 1.0 / d } else { 0.0 };
    (d, min, x.map(|x| ((x - min) * inverse + 0.5).min(n) as u8))
}

/// Packs the low four bits of elements `j` and `j + 16` into a byte.
fn put_low(q: &[u8; N], out: &mut [u8]) {
    for (j, out) in out.iter_mut().enumerate() {
        *out = q[j] & 15 | q[j + 16] << 4;
    }
}

fn put_high(q: &[u8; N], out: &mut [u8]) {
    let high = q.iter().enumerate().fold(0u32, |high, (j, q)| high | u32::from(q >> 4) << j);
    out.copy_from_slice(&high.to_le_bytes());
}

pub(super) fn to_q4_0(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<18>().0) {
        let (d, q) = symmetric(x, 8.0);
        put_half(d, &mut b[..2]);
        put_low(&q, &mut b[2..]);
    }
}

pub(super) fn to_q4_1(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<20>().0) {
        let (d, m, q) = affine(x, 15.0);
        put_half(d, &mut b[..2]);
        put_half(m, &mut b[2..4]);
        put_low(&q, &mut b[4..]);
    }
}

pub(super) fn to_q5_0(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<22>().0) {
        let (d, q) = symmetric(x, 16.0);
        put_half(d, &mut b[..2]);
        put_high(&q, &mut b[2..6]);
        put_low(&q, &mut b[6..]);
    }
}

pub(super) fn to_q5_1(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<24>().0) {
        let (d, m, q) = affine(x, 31.0);
        put_half(d, &mut b[..2]);
        put_half(m, &mut b[2..4]);
        put_high(&q, &mut b[4..8]);
        put_low(&q, &mut b[8..]);
    }
}

pub(super) fn to_q8_0(x: &[f32], out: &mut [u8]) {
    for (x, b) in x.as_chunks::<N>().0.iter().zip(out.as_chunks_mut::<34>().0) {
        let d = x.iter().fold(0.0f32, |m, x| m.max(x.abs())) / 127.0;
        let inverse = if d > 0.0 { 1.0 / d } else { 0.0 };
        put_half(d, &mut b[..2]);
        for (x, q) in x.iter().zip(&mut b[2..]) {
            *q = (x * inverse).round() as i8 as u8;
        }
    }
}
