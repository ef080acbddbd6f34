//! Elementary functions on vectors of `f32`, each with the same bits on every level.

use super::{Function, per_level};

pub(super) const LANES: usize = 16;

/// The sum of lanes as a tree.
#[inline(always)]
pub(super) fn tree(mut lanes: [f32; LANES]) -> f32 {
    let mut n = LANES;
    while n > 1 {
        n /= 2;
        for i in 0..n {
            lanes[i] += lanes[i + n];
        }
    }
    lanes[0]
}

/// The sum of `f(x)`, in lanes.
#[inline(always)]
pub(super) fn sum_of(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (whole, rest) = x.as_chunks::<LANES>();
    for x in whole {
        for (lane, x) in lanes.iter_mut().zip(x) {
            *lane += f(*x);
        }
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane += f(*x);
    }
    tree(lanes)
}

/// `e^x` to about 1 unit in the last place: `2^n e^r` with `|r| <= ln 2 / 2`, by the polynomial of
/// Cephes' `expf`. 0 below -87.3; NaN stays NaN.
#[inline(always)]
pub fn exp1(x: f32) -> f32 {
    const LOG2_E: f32 = std::f32::consts::LOG2_E;
    // ln 2 in two parts, so that n * ln 2 is exact enough.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to a whole number.
    let clamped = if x > 88.3 { 88.3 } else { x };
    let n = clamped * LOG2_E + ROUND;
    let whole = n - ROUND;
    let r = clamped - whole * LN2_HIGH - whole * LN2_LOW;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let p = p * r * r + r + 1.0;
    // The low bits of `n` are the exponent; only those below 2^7 are ever used.
    let power = f32::from_bits((n.to_bits() << 23).wrapping_add(0x3F80_0000));
    let y = p * power;
    if x < -87.3 { 0.0 } else { y }
}

per_level! {
    /// The largest element; NaN is skipped, and of nothing it is -inf.
    pub fn max(x: &[f32]) -> f32 {
        let mut lanes = [f32::NEG_INFINITY; LANES];
        let (whole, rest) = x.as_chunks::<LANES>();
        for x in whole {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *lane = if *x > *lane { *x } else { *lane };
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *lane = if *x > *lane { *x } else { *lane };
        }
        lanes.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

per_level! {
    /// `x = e^(x - max)`; returns the sum.
    pub fn exp_minus(x: &mut [f32], max: f32) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = x.as_chunks_mut::<LANES>();
        for x in whole {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *x = exp1(*x - max);
                *lane += *x;
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *x = exp1(*x - max);
            *lane += *x;
        }
        tree(lanes)
    }
}

per_level! {
    /// The dot product of two vectors of one length.
    pub fn dot(a: &[f32], b: &[f32]) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (a, a_rest) = a.as_chunks::<LANES>();
        let (b, b_rest) = b.as_chunks::<LANES>();
        for (a, b) in a.iter().zip(b) {
            for i in 0..LANES {
                lanes[i] += a[i] * b[i];
            }
        }
        for (lane, (a, b)) in lanes.iter_mut().zip(a_rest.iter().zip(b_rest)) {
            *lane += a * b;
        }
        tree(lanes)
    }
}

per_level! {
    /// `x *= factor`.
    pub fn scale(x: &mut [f32], factor: f32) {
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

per_level! {
    /// `x += shift`.
    pub fn shift(x: &mut [f32], shift: f32) {
        x.iter_mut().for_each(|x| *x += shift);
    }
}

per_level! {
    /// `a += b`.
    pub fn add(a: &mut [f32], b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
    }
}

per_level! {
    /// `a += factor * b`.
    pub fn add_scaled(a: &mut [f32], factor: f32, b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += factor * b);
    }
}

per_level! {
    /// `a += sum_i factors[i] * rows[i * stride..]`, in the order of the rows.
    pub fn add_rows(a: &mut [f32], factors: &[f32], rows: &[f32], stride: usize) {
        for (factor, row) in factors.iter().zip(rows.chunks(stride)) {
            a.iter_mut().zip(row).for_each(|(a, b)| *a += factor * b);
        }
    }
}

per_level! {
    /// The sum.
    pub fn sum(x: &[f32]) -> f32 {
        sum_of(x, |x| x)
    }
}

per_level! {
    /// The sum of `(x - shift)^2`.
    pub fn squares(x: &[f32], shift: f32) -> f32 {
        sum_of(x, |x| (x - shift) * (x - shift))
    }
}

per_level! {
    /// `x = (x - shift) * factor * w`.
    pub fn shift_scale(x: &mut [f32], shift: f32, factor: f32, w: &[f32]) {
        x.iter_mut().zip(w).for_each(|(x, w)| *x = (*x - shift) * factor * w);
    }
}

per_level! {
    /// `x = x * sigmoid(x)`.
    pub fn silu(x: &mut [f32]) {
        x.iter_mut().for_each(|x| *x /= 1.0 + exp1(-*x));
    }
}

per_level! {
    /// `a *= b`.
    pub fn multiply(a: &mut [f32], b: &[f32]) {
        a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
    }
}

/// A finite half-precision number as a float.
#[inline(always)]
fn half1(bytes: [u8; 2]) -> f32 {
    // Moved to where a float has its exponent, and freed of the difference of the biases.
    const BIASES: f32 = f32::from_bits((127 + 127 - 15) << 23);
    let bits = u32::from(u16::from_le_bytes(bytes));
    let size = f32::from_bits((bits & 0x7FFF) << 13) * BIASES;
    f32::from_bits(size.to_bits() | (bits & 0x8000) << 16)
}

/// As many finite half-precision numbers as floats, inlined.
#[inline(always)]
pub fn halves(out: &mut [f32], bytes: &[u8]) {
    out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(out, b)| *out = half1(*b));
}

per_level! {
    /// Finite half-precision numbers, as bytes, as floats.
    pub fn widen_halves(out: &mut [f32], bytes: &[u8]) {
        halves(out, bytes);
    }
}

per_level! {
    /// `out = a * b`, where `b` are finite half-precision numbers as bytes.
    pub fn multiply_halves(out: &mut [f32], a: &[f32], b: &[u8]) {
        let b = b.as_chunks::<2>().0;
        out.iter_mut().zip(a).zip(b).for_each(|((out, a), b)| *out = a * half1(*b));
    }
}

/// `ln x` for normal `x > 0`, by the polynomial of Cephes' `logf`.
#[inline(always)]
pub(super) fn ln1(x: f32) -> f32 {
    const SQRT_HALF: f32 = std::f32::consts::FRAC_1_SQRT_2;
    let bits = x.to_bits();
    // x = m 2^e with m in [1/2, 1), then in [sqrt(1/2), sqrt 2).
    let e = (bits >> 23) as i32 - 126;
    let m = f32::from_bits(bits & 0x007F_FFFF | 0x3F00_0000);
    let low = m < SQRT_HALF;
    let e = (if low { e - 1 } else { e }) as f32;
    let m = (if low { m + m } else { m }) - 1.0;
    // Written out: as a loop it would keep the loop around it from becoming one over vectors.
    let p = 7.037_683_6e-2 * m - 1.151_461e-1;
    let p = (p * m + 1.167_699_9e-1) * m - 1.242_014_1e-1;
    let p = (p * m + 1.424_932_3e-1) * m - 1.666_805_8e-1;
    let p = (p * m + 2.000_071_5e-1) * m - 2.499_999_4e-1;
    let p = p * m + 3.333_333e-1;
    let square = m * m;
    // ln 2 in two parts, as in `exp1`.
    let y = p * m * square + e * -2.121_944_4e-4 - 0.5 * square;
    m + y + e * 0.693_359_4
}

/// `ln(1 + e^x)`
#[inline(always)]
fn softplus1(x: f32) -> f32 {
    let e = exp1(if x > 0.0 { -x } else { x });
    // ln(1 + e) = 2 artanh(e / (2 + e)) by its series (Abramowitz and Stegun 4.6.33), which needs no
    // more than this up to e = 1.
    let s = e / (2.0 + e);
    let z = s * s;
    let p = (1.0 / 13.0 * z + 1.0 / 11.0) * z + 1.0 / 9.0;
    let p = ((p * z + 1.0 / 7.0) * z + 1.0 / 5.0) * z + 1.0 / 3.0;
    let log = 2.0 * s + 2.0 * s * z * p;
    (if x > 0.0 { x } else { 0.0 }) + log
}

// Not by `map` or `for_each`: functions this large are not inlined into them, and so stay without the
// instructions of the level.

per_level! {
    /// `x = ln(1 + e^(factor x))`
    pub fn softplus(x: &mut [f32], factor: f32) {
        for x in x {
            *x = softplus1(factor * *x);
        }
    }
}

per_level! {
    /// `x = f(x)`
    pub fn map<F: Function>(x: &mut [f32], f: F) {
        x.iter_mut().for_each(|x| *x = f(*x));
    }
}

per_level! {
    /// `x = f(x)`; returns the sum.
    pub fn map_sum<F: Function>(x: &mut [f32], f: F) -> f32 {
        let mut lanes = [0.0f32; LANES];
        let (whole, rest) = x.as_chunks_mut::<LANES>();
        for x in whole {
            for (lane, x) in lanes.iter_mut().zip(x) {
                *x = f(*x);
                *lane += *x;
            }
        }
        for (lane, x) in lanes.iter_mut().zip(rest) {
            *x = f(*x);
            *lane += *x;
        }
        tree(lanes)
    }
}

per_level! {
    /// The sum of `e^(x - max)`.
    pub fn sum_of_exp(x: &[f32], max: f32) -> f32 {
        sum_of(x, |x| exp1(x - max))
    }
}

per_level! {
    /// The sum of `|x|`.
    pub fn sum_of_sizes(x: &[f32]) -> f32 {
        sum_of(x, f32::abs)
    }
}

per_level! {
    /// The sum of those at least `least`.
    pub fn sum_from(x: &[f32], least: f32) -> f32 {
        sum_of(x, |x| if x >= least { x } else { 0.0 })
    }
}

per_level! {
    /// Whether none is infinite or NaN.
    pub fn are_finite(x: &[f32]) -> bool {
        // Every bit of the exponent is set in those that are not.
        const EXPONENT: u32 = 0x7F80_0000;
        x.iter().fold(true, |all, x| all & (x.to_bits() & EXPONENT != EXPONENT))
    }
}

per_level! {
    /// `x = (x - ln(-ln u)) factor`, for `0 < u < 1`.
    pub fn add_gumbel(x: &mut [f32], u: &[f32], factor: f32) {
        for (x, u) in x.iter_mut().zip(u) {
            *x = (*x - ln1(-ln1(*u))) * factor;
        }
    }
}

per_level! {
    /// All words xored; a way to read memory and do little else.
    pub fn xor(bytes: &[u8]) -> u64 {
        let mut lanes = [0u64; 16];
        for words in bytes.as_chunks::<128>().0 {
            for (lane, word) in lanes.iter_mut().zip(words.as_chunks::<8>().0) {
                *lane ^= u64::from_le_bytes(*word);
            }
        }
        lanes.iter().fold(0, |a, b| a ^ b)
    }
}

/// `tanh x = 1 - 2 / (e^(2 x) + 1)`, and the first terms of its series near 0.
#[inline(always)]
fn tanh1(x: f32) -> f32 {
    let square = x * x;
    let small = x * (1.0 - square * (1.0 / 3.0 - square * (2.0 / 15.0)));
    let large = 1.0 - 2.0 / (exp1(2.0 * x) + 1.0);
    if square < 0.01 { small } else { large }
}

per_level! {
    /// GELU in its tanh approximation (arXiv 1606.08415).
    pub fn gelu_tanh(x: &mut [f32]) {
        const SQRT_2_OVER_PI: f32 = 0.797_884_6;
        x.iter_mut().for_each(|x| {
            let inner = SQRT_2_OVER_PI * (*x + 0.044_715 * *x * *x * *x);
            *x = 0.5 * *x * (1.0 + tanh1(inner));
        });
    }
}

/// `x P(X <= x)` for `X` of the normal distribution, with erfc by Abramowitz and Stegun 7.1.26.
#[inline(always)]
fn gelu1(x: f32) -> f32 {
    let z = x.abs() * std::f32::consts::FRAC_1_SQRT_2;
    let t = 1.0 / (1.0 + 0.327_591_1 * z);
    let p = ((1.061_405_4 * t - 1.453_152) * t + 1.421_413_7) * t - 0.284_496_73;
    let tail = 0.5 * x * ((p * t + 0.254_829_6) * t * exp1(-z * z));
    if x > 0.0 { x - tail } else { tail }
}

per_level! {
    /// GELU (arXiv 1606.08415), to about `1e-7 |x|`.
    pub fn gelu(x: &mut [f32]) {
        for x in x {
            *x = gelu1(*x);
        }
    }
}

per_level! {
    /// `x = cap * tanh(x / cap)`.
    pub fn softcap(x: &mut [f32], cap: f32) {
        x.iter_mut().for_each(|x| *x = cap * tanh1(*x / cap));
    }
}

/// The same; but held in memory for a moment, or the compiler does not see that it makes a vector.
#[inline(always)]
fn stored<T>(x: T) -> T {
    std::hint::black_box(x)
}

per_level! {
    /// Quantizes one row to 8 bits in blocks of 32: `x = scale * q`, `|q| <= 127`; `sums16` and
    /// `sums32` get the sums of `scale * q` over 16 and 32 elements. The row is whole blocks, and
    /// its blocks, scales and sums take every `tile`-th place from `lane` on.
    pub fn quantize(
        x: &[f32],
        lane: usize,
        tile: usize,
        q: &mut [i8],
        scales: &mut [f32],
        sums16: &mut [f32],
        sums32: &mut [f32]
    ) {
        const ROUND: f32 = 12_582_912.0;
        let q = q.as_chunks_mut::<32>().0;
        for (g, x) in x.as_chunks::<32>().0.iter().enumerate() {
            let at = g * tile + lane;
            // Sizes compare like their bits, and whole numbers may be compared in any order.
            let mut sizes = [0u32; 8];
            for x in x.as_chunks::<8>().0 {
                for i in 0..8 {
                    sizes[i] = sizes[i].max(x[i].to_bits() & 0x7FFF_FFFF);
                }
            }
            let max = f32::from_bits(stored(sizes).into_iter().fold(0, u32::max));
            let scale = max / 127.0;
            let inverse = if max > 0.0 { 127.0 / max } else { 0.0 };
            let mut whole = [0i32; 32];
            for i in 0..32 {
                // The sum's low bits are the rounded number.
                whole[i] = (x[i] * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            }
            let q = &mut q[at];
            for i in 0..32 {
                q[i] = whole[i] as i8;
            }
            // Beside a scale that is not finite, or next to nothing, these may be any numbers.
            let mut sums = [[0i32; 8]; 2];
            for i in 0..8 {
                sums[0][i] = whole[i].wrapping_add(whole[8 + i]);
                sums[1][i] = whole[16 + i].wrapping_add(whole[24 + i]);
            }
            let halves = stored(sums).map(|half| half.into_iter().fold(0, i32::wrapping_add));
            scales[at] = scale;
            sums16[2 * g * tile + lane] = scale * halves[0] as f32;
            sums16[(2 * g + 1) * tile + lane] = scale * halves[1] as f32;
            sums32[at] = scale * halves[0].wrapping_add(halves[1]) as f32;
        }
    }
}

/// The bits of a number whose upper half is the nearest BF16, of two the even one.
#[inline(always)]
fn bf16_bits(x: f32) -> u32 {
    let bits = x.to_bits();
    match x.is_nan() {
        // Stays one without its lower half.
        true => bits | 0x0040_0000,
        false => bits.wrapping_add(0x7FFF + (bits >> 16 & 1)),
    }
}

per_level! {
    /// Rounds a row of pairs to BF16; the first of a pair goes to the lower half of a word.
    pub fn round_pairs(x: &[f32], to: &mut [u32]) {
        for (x, to) in x.as_chunks::<2>().0.iter().zip(to) {
            *to = bf16_bits(x[0]) >> 16 | bf16_bits(x[1]) & 0xFFFF_0000;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gelu_is_accurate() {
        let mut worst = 0.0f64;
        for i in -120_000..120_000 {
            let x = i as f32 * 1e-4;
            let wide = f64::from(x);
            let exact = 0.5 * wide * libm::erfc(-wide * std::f64::consts::FRAC_1_SQRT_2);
            let mut row = [x; LANES + 1];
            gelu(&mut row);
            assert!(row.iter().all(|y| y.to_bits() == row[0].to_bits()));
            worst = worst.max((f64::from(row[0]) - exact).abs() / wide.abs().max(1.0));
        }
        assert!(worst < 2e-7, "{worst}");
    }

    #[test]
    fn exp_is_accurate() {
        let mut worst = 0.0f64;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(exp1(x)) / exact - 1.0).abs());
        }
        assert!(worst < 1.5e-7, "{worst}");
        assert_eq!(exp1(0.0), 1.0);
        assert_eq!(exp1(f32::NEG_INFINITY), 0.0);
        assert!(exp1(f32::NAN).is_nan());
        assert!(exp1(1e9).is_finite());
    }

    /// Every upper half, with lower halves below, at and above the middle of two BF16.
    #[test]
    fn pairs_are_rounded_to_even() {
        for high in 0..=u32::from(u16::MAX) {
            let x =
                [0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF].map(|low| f32::from_bits(high << 16 | low));
            let mut pairs = [0; 3];
            round_pairs(&x, &mut pairs);
            for (pair, x) in pairs.iter().zip(x.as_chunks::<2>().0) {
                let nearest = x.map(|x| u32::from(half::bf16::from_f32(x).to_bits()));
                assert_eq!(*pair, nearest[0] | nearest[1] << 16, "{x:?}");
            }
        }
    }

    #[test]
    fn logarithms_are_accurate() {
        for i in 1..200_000 {
            let x = (i as f32 * 1e-3 - 100.0).exp2();
            let exact = f64::from(x).ln();
            let error = (f64::from(ln1(x)) - exact).abs();
            assert!(error <= 1.2e-7 * exact.abs().max(1.0), "{x}: {} {exact}", ln1(x));
        }
        for i in -200_000..200_000 {
            let x = i as f32 * 1e-4 * 4.0;
            let exact = f64::from(x).exp().ln_1p();
            let error = (f64::from(softplus1(x)) / exact - 1.0).abs();
            assert!(error < 5e-7, "{x}: {} {exact}", softplus1(x));
        }
    }

    #[test]
    fn tanh_is_accurate() {
        for i in -200_000..200_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).tanh();
            assert!((f64::from(tanh1(x)) - exact).abs() < 4e-7, "{x}: {} {exact}", tanh1(x));
        }
    }

    #[test]
    fn halves_are_exact() {
        for bits in (0..=u16::MAX).filter(|b| half::f16::from_bits(*b).is_finite()) {
            let mut out = [0.0];
            multiply_halves(&mut out, &[3.0], &bits.to_le_bytes());
            assert_eq!(out[0], 3.0 * half::f16::from_bits(bits).to_f32());
        }
    }

    #[test]
    fn quantizes_to_the_nearest() {
        let x: Vec<f32> =
            (0..96).map(|i| ((i * 37 % 101) as f32 - 50.0) * (i / 32) as f32).collect();
        let (mut q, mut scales) = (vec![0i8; 96], vec![0.0; 3]);
        let (mut s16, mut s32) = (vec![0.0; 6], vec![0.0; 3]);
        quantize(&x, 0, 1, &mut q, &mut scales, &mut s16, &mut s32);
        for (i, x) in x.iter().enumerate() {
            assert!((x - scales[i / 32] * f32::from(q[i])).abs() <= 0.5001 * scales[i / 32]);
        }
        assert_eq!(scales[0], 0.0);
        let sum =
            |r: std::ops::Range<usize>| q[r].iter().map(|q| i32::from(*q)).sum::<i32>() as f32;
        assert_eq!(s16[3], scales[1] * sum(48..64));
        assert_eq!(s32[2], scales[2] * sum(64..96));
    }
}
