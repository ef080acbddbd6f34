//! F32, F16 and BF16: one number per element.

pub(super) fn f32(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<4>().0.iter().zip(out) {
        *out = f32::from_le_bytes(*b);
    }
}

pub(super) fn f16(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *out = half::f16::from_le_bytes(*b).to_f32();
    }
}

pub(super) fn bf16(bytes: &[u8], out: &mut [f32]) {
    for (b, out) in bytes.as_chunks::<2>().0.iter().zip(out) {
        *out = half::bf16::from_le_bytes(*b).to_f32();
    }
}

pub(super) fn to_f32(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.iter().zip(out.as_chunks_mut::<4>().0) {
        *out = x.to_le_bytes();
    }
}

pub(super) fn to_f16(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.iter().zip(out.as_chunks_mut::<2>().0) {
        *out = half::f16::from_f32(*x).to_le_bytes();
    }
}

pub(super) fn to_bf16(x: &[f32], out: &mut [u8]) {
    for (x, out) in x.iter().zip(out.as_chunks_mut::<2>().0) {
        *out = half::bf16::from_f32(*x).to_le_bytes();
    }
}
