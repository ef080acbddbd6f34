//! Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 elements with one scale `d`, in the `_1` formats also with a
//! minimum `m`: `x = d * (q - offset)` or `x = d * q + m`. Elements `j` and `j + 16` share a byte.

use super::half;

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
