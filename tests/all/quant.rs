//! Tensor formats against the PyPI package `gguf`: `tests/golden/quant.py`, `tests/golden/quantize.py`.

use qkov::quant::{FORMATS, Format, format_of, is_rare};
use qkov::simd;

static GOLDEN: &[u8] = include_bytes!("../golden/quant.bin");

/// Lengths that a vectorised loop gets wrong.
const TAILS: [usize; 18] = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 33, 63, 67, 127, 129, 193, 255, 600];

struct Record {
    format: &'static Format,
    bytes: Vec<u8>,
    values: Vec<f32>,
}

fn records() -> Vec<Record> {
    let mut rest = GOLDEN;
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        (head.to_vec(), tail.is_empty())
    };
    let mut out = Vec::new();
    loop {
        let (header, _) = take(16);
        let field = |i: usize| u32::from_le_bytes(header[4 * i..4 * i + 4].try_into().unwrap());
        let [id, len, n_bytes, n] = [0, 1, 2, 3].map(field);
        let format = format_of(id).unwrap_or_else(|| panic!("no format with number {id}"));
        assert_eq!(format.ty.block_len, len as usize, "{}", format.ty.name);
        assert_eq!(format.ty.block_bytes, n_bytes as usize, "{}", format.ty.name);
        let (bytes, _) = take((n * n_bytes) as usize);
        let (values, end) = take((n * len * 4) as usize);
        let values = values.chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        out.push(Record { format, bytes, values });
        if end {
            return out;
        }
    }
}

/// Every format with a decoder of its own, or the test fails: a new entry needs golden blocks.
fn each(mut check: impl FnMut(Record)) {
    let records = records();
    for format in FORMATS.iter().filter(|f| !is_rare(f.ty)) {
        let found = records.iter().filter(|r| r.format.ty.id == format.ty.id).count();
        assert_eq!(found, 1, "{} has no golden blocks", format.ty.name);
    }
    records.into_iter().for_each(&mut check);
}

#[test]
fn dequantizes_to_the_same_bits() {
    each(|Record { format, bytes, values }| {
        let mut out = vec![f32::NAN; values.len()];
        format.dequantize(&bytes, &mut out);
        for (i, (ours, theirs)) in out.iter().zip(&values).enumerate() {
            assert_eq!(
                ours.to_bits(),
                theirs.to_bits(),
                "{} element {i}: {ours} {theirs}",
                format.ty.name
            );
        }
    });
}

#[test]
fn reads_at_any_address() {
    each(|Record { format, bytes, values }| {
        for shift in 1..4 {
            let moved = [&vec![0xAA; shift][..], &bytes].concat();
            let mut out = vec![0.0; values.len()];
            format.dequantize(&moved[shift..], &mut out);
            assert!(out == values, "{} at {shift}", format.ty.name);
        }
    });
}

#[test]
fn dot_is_the_sum_of_products() {
    each(|Record { format, bytes, values }| {
        let x: Vec<f32> =
            (0..values.len()).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
        let block = format.ty.block_len;
        let lengths =
            TAILS.into_iter().filter(|n| n % block == 0).chain((1..=8).map(|n| n * block));
        for n in lengths {
            let row = &bytes[..format.row_bytes(n)];
            let (values, x) = (&values[..n], &x[..n]);
            let products = || values.iter().zip(x).map(|(v, x)| f64::from(*v) * f64::from(*x));
            let exact: f64 = products().sum();
            // Half a unit per product and per addition in a lane.
            let bound = products().map(f64::abs).sum::<f64>() * 1.2e-7 * (n as f64 / 16.0 + 6.0);
            // Subnormal numbers are whole multiples of the smallest.
            let bound = bound + n as f64 * 1.5e-45;
            let got = format.dot(row, x);
            assert!(
                (f64::from(got) - exact).abs() <= bound,
                "{} of {n}: {got} {exact}",
                format.ty.name
            );
            assert_eq!(got.to_bits(), simd::dot(values, x).to_bits(), "{} of {n}", format.ty.name);
        }
    });
}

#[test]
fn rounds_to_the_same_bits() {
    let mut rest: &[u8] = include_bytes!("../golden/quantize.bin");
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        head
    };
    let number = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
    let n = number(take(4)) as usize;
    let floats = take(4 * n).chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
    let floats: Vec<f32> = floats.collect();
    for format in FORMATS.iter().filter(|f| f.can_quantize() && f.ty.block_len == 32) {
        assert_eq!(number(take(4)), format.ty.id, "{} has no golden blocks", format.ty.name);
        let n_bytes = number(take(4)) as usize;
        let expected = take(n_bytes);
        let mut out = vec![0; format.row_bytes(n)];
        format.quantize(&floats, &mut out);
        assert!(out == expected, "{}", format.ty.name);
    }
    assert!(rest.is_empty());
}

/// Mean square of what is lost of `x`, relative to its own.
fn loss(format: &Format, x: &[f32]) -> f64 {
    let mut bytes = vec![0; format.row_bytes(x.len())];
    format.quantize(x, &mut bytes);
    let mut read = vec![0.0; x.len()];
    format.dequantize(&bytes, &mut read);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let lost: f64 = x.iter().zip(&read).map(|(x, y)| square(x - y)).sum();
    lost / x.iter().map(|x| square(*x)).sum::<f64>()
}

#[test]
fn rounding_loses_what_the_bits_allow() {
    // Sums of uniform numbers, as bell-shaped as weights are.
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let x: Vec<f32> =
        (0..64 * 256).map(|_| (0..8).map(|_| uniform()).sum::<f32>() * 0.02).collect();
    for format in FORMATS.iter().filter(|f| f.can_quantize() && f.ty.block_len > 1) {
        // Of a bell curve that many levels lose about `c 4^-bits`; scales take some of the bits.
        let bits = 8.0 * format.ty.block_bytes as f64 / format.ty.block_len as f64;
        let lost = loss(format, &x) * 4f64.powf(bits);
        assert!((0.5..8.0).contains(&lost), "{}: {lost}", format.ty.name);
        // What is read back is a fixed point, nearly.
        let mut bytes = vec![0; format.row_bytes(x.len())];
        format.quantize(&x, &mut bytes);
        let mut read = vec![0.0; x.len()];
        format.dequantize(&bytes, &mut read);
        let again = loss(format, &read);
        assert!(again < 0.1 * loss(format, &x), "{}: {again}", format.ty.name);
        assert_eq!(loss(format, &[&[0.0; 512][..], &x[..512]].concat()), loss(format, &x[..512]));
    }
}

/// Blocks of activations that are not finite, beside one that is; none may stop a build that checks for
/// overflow.
#[test]
fn what_is_not_finite_has_no_finite_scale() {
    for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for n_odd in [1, 32] {
            let mut x = [1.0; 64];
            x[..n_odd].fill(odd);
            let (mut quants, mut scales) = ([0; 64], [0.0; 2]);
            let (mut sums16, mut sums32) = ([0.0; 4], [0.0; 2]);
            simd::quantize(&x, 0, 1, &mut quants, &mut scales, &mut sums16, &mut sums32);
            assert!(!scales[0].is_finite(), "{odd}: {scales:?}");
            assert_eq!((quants[32], scales[1], sums32[1]), (127, 1.0 / 127.0, 32.0), "{odd}");
        }
    }
}
