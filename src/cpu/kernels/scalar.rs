//! Every layout in plain Rust: what runs where no other table fits.

use half::{bf16, f16};

use super::super::threads::Columns;
use super::{Activations, LANES, LAYOUTS, Multiply, Panels, Scratch};
use crate::simd::Level;

/// The functions, the same whatever the level.
pub(super) fn table(_: Level) -> &'static [Multiply] {
    &TABLE
}

/// Nothing.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn prefetch(_: *const u8) {}

/// Vectors of a word of each row, from four words of every row.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub(super) fn transpose(rows: &[[u8; 16]; LANES], out: &mut [u8; 16 * LANES]) {
    for (i, out) in out.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *out = rows[i % LANES].as_chunks::<4>().0[i / LANES];
    }
}

static TABLE: [Multiply; LAYOUTS.len()] = [
    floats,
    floats,
    floats,
    integers::<32>,
    integers::<32>,
    integers::<32>,
    integers::<32>,
    integers::<32>,
    integers::<32>,
    integers::<32>,
    integers::<32>,
    integers::<32>,
    integers::<16>,
    integers::<32>,
    floats,
    floats,
];

/// One vector: a number for each row.
type Lanes = [f32; LANES];

unsafe fn floats(w: &Panels, x: &Activations, _: &mut Scratch, out: Columns<f32>, start: usize) {
    let layout = &LAYOUTS[w.layout];
    let n_bytes = layout.panel_bytes(layout.block_len) / layout.block_len;
    let mut panel = vec![[0.0f32; LANES]; w.n_in];
    for p in 0..w.n_rows.div_ceil(LANES) {
        let bytes = &w.bytes[p * w.stride..];
        for (k, to) in panel.iter_mut().enumerate() {
            let b = &bytes[k * n_bytes..];
            let pair = &bytes[(k - k % 2) * n_bytes + k % 2 * 2..];
            *to = each(|r| match layout.name {
                "F32" => f32::from_le_bytes([b[4 * r], b[4 * r + 1], b[4 * r + 2], b[4 * r + 3]]),
                "F16" => f16::from_le_bytes([b[2 * r], b[2 * r + 1]]).to_f32(),
                "BF16" => bf16::from_le_bytes([pair[4 * r], pair[4 * r + 1]]).to_f32(),
                "I8" => f32::from(b[r] as i8),
                _ => f32::from((b[r % 4] >> (r / 4 * 4) & 15) as i8 - 8),
            });
        }
        for t in 0..x.n {
            let x = &x.floats[t * x.stride..];
            let mut acc = [0.0; LANES];
            for (w, x) in panel.iter().zip(x) {
                acc.iter_mut().zip(w).for_each(|(acc, w)| *acc += w * x);
            }
            // SAFETY: the caller has these parts for itself.
            unsafe { store(out, t, start, w, p, &acc) };
        }
    }
}

unsafe fn store(out: Columns<f32>, t: usize, start: usize, w: &Panels, p: usize, acc: &Lanes) {
    let n = LANES.min(w.n_rows - p * LANES);
    // SAFETY: the caller has these parts for itself.
    unsafe { out.part(t, start + p * LANES, n) }.copy_from_slice(&acc[..n]);
}

/// 32 elements of every row; `w = d * q + m`, with `d` and `m` for each half.
struct Group {
    q: [[i32; LANES]; 32],
    d: [Lanes; 2],
    m: [Lanes; 2],
}

unsafe fn integers<const GROUP: usize>(
    w: &Panels,
    x: &Activations,
    _: &mut Scratch,
    out: Columns<f32>,
    start: usize,
) {
    let layout = &LAYOUTS[w.layout];
    for p in 0..w.n_rows.div_ceil(LANES) {
        let blocks = w.bytes[p * w.stride..].chunks_exact(layout.row_bytes * LANES);
        let blocks = blocks.take(w.n_in / layout.block_len);
        let groups: Vec<Group> = blocks
            .flat_map(|b| (0..layout.block_len / 32).map(move |i| group(layout.name, b, i)))
            .collect();
        for t in 0..x.n {
            let (tile, lane) = (t / x.tile * groups.len(), t % x.tile);
            let sums = if GROUP == 32 { x.sums32 } else { x.sums16 };
            let mut acc = [0.0; LANES];
            for (g, group) in groups.iter().enumerate() {
                let at = (tile + g) * x.tile + lane;
                let quants = &x.quants[32 * at..];
                for half in 0..32 / GROUP {
                    let mut sum = [0i32; LANES];
                    let part = half * GROUP..(half + 1) * GROUP;
                    for (x, q) in quants[part.clone()].iter().zip(&group.q[part]) {
                        sum.iter_mut().zip(q).for_each(|(sum, q)| *sum += q * i32::from(*x));
                    }
                    let x_sum = sums[((tile + g) * (32 / GROUP) + half) * x.tile + lane];
                    for r in 0..LANES {
                        acc[r] += sum[r] as f32 * (group.d[half][r] * x.scales[at]);
                        acc[r] += group.m[half][r] * x_sum;
                    }
                }
            }
            // SAFETY: the caller has these parts for itself.
            unsafe { store(out, t, start, w, p, &acc) };
        }
    }
}

fn halves(bytes: &[u8]) -> Lanes {
    std::array::from_fn(|r| f16::from_le_bytes([bytes[2 * r], bytes[2 * r + 1]]).to_f32())
}

fn each(f: impl Fn(usize) -> f32) -> Lanes {
    std::array::from_fn(f)
}

/// Element `k` of row `r` in vectors of nibbles.
fn nibble(bytes: &[u8], k: usize, r: usize) -> i32 {
    let j = k / 4;
    i32::from(bytes[j % 4 * 4 * LANES + 4 * r + k % 4] >> (j / 4 * 4) & 15)
}

/// The fifth bit of element `k` of row `r`, in place.
fn fifth_bit(bytes: &[u8], k: usize, r: usize) -> i32 {
    i32::from(bytes[4 * r + k % 4] >> (k / 4) & 1) << 4
}

fn group(name: &str, block: &[u8], i: usize) -> Group {
    const IQ4: [i32; 16] =
        [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
    const E2M1: [i32; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
    let zeros = [0.0; LANES];
    let quants = |f: &dyn Fn(usize, usize) -> i32| -> [[i32; LANES]; 32] {
        std::array::from_fn(|k| std::array::from_fn(|r| f(k, r)))
    };
    let both = |q, d, m| Group { q, d: [d, d], m: [m, m] };
    match name {
        "Q4_0" => {
            let d = halves(block);
            let q = quants(&|k, r| nibble(&block[16..], k, r));
            both(q, d, d.map(|d| -8.0 * d))
        }
        "Q4_1" => {
            both(quants(&|k, r| nibble(&block[32..], k, r)), halves(block), halves(&block[16..]))
        }
        "Q5_0" => {
            let d = halves(block);
            let q = |k, r| nibble(&block[16..], k, r) | fifth_bit(&block[144..], k, r);
            both(quants(&q), d, d.map(|d| -16.0 * d))
        }
        "Q5_1" => {
            let q = |k, r| nibble(&block[32..], k, r) | fifth_bit(&block[160..], k, r);
            both(quants(&q), halves(block), halves(&block[16..]))
        }
        "Q8_0" => {
            let q = |k: usize, r: usize| block[16 + k / 4 * 4 * LANES + 4 * r + k % 4] as i8;
            both(quants(&|k, r| i32::from(q(k, r))), halves(block), zeros)
        }
        "IQ4_NL" => {
            let q = quants(&|k, r| IQ4[nibble(&block[16..], k, r) as usize]);
            both(q, halves(block), zeros)
        }
        "MXFP4" => {
            let q = quants(&|k, r| E2M1[nibble(&block[8..], k, r) as usize]);
            // 2^(e - 128), as half of the published scale because the levels are doubled.
            let scale = |e: u8| match e {
                0 | 1 => f32::from_bits(0x0020_0000 << e),
                _ => f32::from_bits(u32::from(e - 1) << 23),
            };
            both(q, each(|r| scale(block[r])), zeros)
        }
        "Q4_K" | "Q5_K" => {
            let five = name == "Q5_K";
            let at = &block[32 + i * if five { 176 } else { 144 }..];
            let (d, m) = (halves(block), halves(&block[16..]));
            let high = |k: usize, r: usize| match five {
                true => fifth_bit(&at[144..], k, r),
                false => 0,
            };
            both(
                quants(&|k, r| nibble(&at[16..], k, r) | high(k, r)),
                each(|r| d[r] * f32::from(at[r])),
                each(|r| -m[r] * f32::from(at[8 + r])),
            )
        }
        "Q6_K" => {
            let at = &block[16 + 208 * i..];
            let high = |k: usize, r: usize| {
                let j = k / 4;
                i32::from(at[144 + j / 4 * 4 * LANES + 4 * r + k % 4] >> (2 * (j % 4)) & 3) << 4
            };
            let q = quants(&|k, r| nibble(&at[16..], k, r) | high(k, r));
            let d = halves(block);
            let d = [0, 8].map(|s| each(|r| d[r] * f32::from(at[s + r] as i8)));
            Group { q, d, m: d.map(|d| d.map(|d| -32.0 * d)) }
        }
        _ => {
            let at = &block[16 + 136 * i..];
            let q = quants(&|k, r| IQ4[nibble(&at[8..], k, r) as usize]);
            let d = halves(block);
            both(q, each(|r| d[r] * f32::from(at[r] as i8)), zeros)
        }
    }
}

/// Operations of one round of [`products_in_registers`]: 16 products.
pub(super) fn ops_per_round(_: Level) -> usize {
    16 * 2
}

/// Multiplies and adds without touching memory. Safe; other levels' are not.
pub(super) unsafe fn products_in_registers(_: Level, rounds: usize) {
    let mut sums = [0i32; 16];
    let (mut q, x) = ([3i8; 16], std::hint::black_box([1i8; 16]));
    for _ in 0..rounds {
        q = std::hint::black_box(q);
        for (sum, (q, x)) in sums.iter_mut().zip(q.iter().zip(&x)) {
            *sum = sum.wrapping_add(i32::from(*q) * i32::from(*x));
        }
    }
    std::hint::black_box(sums);
}
