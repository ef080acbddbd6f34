//! Random rows, for tests and timings, which need no meaning.

use half::{bf16, f16};

use super::{Format, Scales};

/// Random bytes (xorshift64*, arXiv 1402.6246), 8 at a time. `state` is not 0.
fn bytes(n: usize, state: &mut u64) -> Vec<u8> {
    let mut bytes = vec![0u8; n.next_multiple_of(8)];
    for chunk in bytes.as_chunks_mut::<8>().0 {
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        *chunk = state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes();
    }
    bytes.truncate(n);
    bytes
}

/// A scale, half to one and a half times `size`.
fn half(size: f32, random: u8) -> f16 {
    f16::from_f32(size * (0.5 + f32::from(random) / 256.0))
}

fn put(block: &mut [u8], places: &[usize], scale: f16) {
    places.iter().for_each(|at| block[*at..at + 2].copy_from_slice(&scale.to_le_bytes()));
}

impl Format {
    /// A row of `n` random elements, of the size of `1 / sqrt(n)`. `state`, which is not 0, goes on.
    pub fn random_row(&self, n: usize, state: &mut u64) -> Vec<u8> {
        let size = 1.0 / (n as f32).sqrt();
        let mut row = bytes(self.row_bytes(n), state);
        let blocks = row.chunks_exact_mut(self.ty.block_bytes);
        match self.scales {
            Scales::None => blocks.for_each(|element| {
                let x = (f32::from(element[0]) / 127.5 - 1.0) * size;
                match self.ty.name {
                    "F16" => element.copy_from_slice(&f16::from_f32(x).to_le_bytes()),
                    "BF16" => element.copy_from_slice(&bf16::from_f32(x).to_le_bytes()),
                    _ => element.copy_from_slice(&x.to_le_bytes()),
                }
            }),
            // Quants reach 2^3 to 2^7, scales of sub-blocks 2^6: near enough.
            Scales::Halves(places) => {
                blocks.for_each(|block| put(block, places, half(size / 256.0, block[0])));
            }
            Scales::Units(places) => {
                blocks.for_each(|block| put(block, places, half(size, block[0])));
            }
            Scales::Digits(places) => blocks.for_each(|block| {
                let bits = half(size / 16.0, block[0]).to_bits();
                for (i, at) in places.into_iter().enumerate() {
                    block[at] = block[at] & 15 | ((bits >> (4 * i) & 15) as u8) << 4;
                }
            }),
            Scales::Exponent => blocks.for_each(|block| {
                block[0] = (125.0 + size.log2()) as u8 + block[0] % 4;
            }),
            Scales::Bytes(n) => blocks.for_each(|block| {
                let exponent = (5.0 + size.log2()).max(0.0) as u8;
                block[..n].iter_mut().for_each(|scale| *scale = exponent << 3 | *scale & 7);
            }),
        }
        row
    }
}
