//! IQ4_NL and IQ4_XS: 4-bit indices into a table that is finer near zero.

use super::half;

/// The levels (ggml, `kvalues_iq4nl`).
const LEVELS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn block(scale: f32, quants: &[u8], out: &mut [f32; 32]) {
    for (j, q) in quants.iter().enumerate().take(16) {
        out[j] = scale * f32::from(LEVELS[usize::from(q & 15)]);
        out[j + 16] = scale * f32::from(LEVELS[usize::from(q >> 4)]);
    }
}

/// 32 elements with one scale.
pub(super) fn iq4_nl(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<18>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        block(half(b, 0), &b[2..], out);
    }
}

/// 256 elements in 8 sub-blocks. Bytes: `d`, 2 bits and then 4 bits of each scale, 128 quants.
pub(super) fn iq4_xs(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<136>().0.iter().zip(out.as_chunks_mut::<256>().0) {
        let d = half(b, 0);
        let high = u16::from_le_bytes([b[2], b[3]]);
        for (sub, out) in out.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let low = b[4 + sub / 2] >> (sub % 2 * 4) & 15;
            let scale = low | ((high >> (2 * sub) & 3) as u8) << 4;
            block(d * f32::from(scale as i8 - 32), &b[8 + sub * 16..], out);
        }
    }
}
