//! MXFP4: 32 elements of 4 bits, E2M1, with a power of two as their scale, E8M0
//! (OCP Microscaling Formats 1.0).

/// Twice the values of E2M1, so that they are whole.
const LEVELS: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Half of `2^(e - 127)`; subnormal for the two smallest.
fn half_scale(e: u8) -> f32 {
    match e {
        0 | 1 => f32::from_bits(0x0020_0000 << e),
        _ => f32::from_bits(u32::from(e - 1) << 23),
    }
}

pub(super) fn mxfp4(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<17>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        let d = half_scale(b[0]);
        for j in 0..16 {
            out[j] = d * f32::from(LEVELS[usize::from(b[1 + j] & 15)]);
            out[j + 16] = d * f32::from(LEVELS[usize::from(b[1 + j] >> 4)]);
        }
    }
}
