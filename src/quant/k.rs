//! The K formats: 256 elements in sub-blocks whose scales are quantized themselves.
//! Q2_K, Q4_K, Q5_K: `x = d * scale * q - dmin * min`; Q3_K, Q6_K: `x = d * scale * (q - offset)`.

use super::half;

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
