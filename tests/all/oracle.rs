//! Tensor formats against ggml, all of its types.

use std::sync::Arc;

use ggml::Type;
use qkov::cpu::kernels::layout_of;
use qkov::engine::{CacheType, Threads};
use qkov::gguf::Gguf;
use qkov::model::Model;
use qkov::quant::{FORMATS, Format, format_of, is_rare, type_of};
use qkov::session::{Options, Session};

use crate::nmse;
use crate::tiny::Tiny;

/// Elements of a row: many blocks of any type.
const N: usize = 32 * 128;

/// What ggml's `tests/test-quantize-fns.cpp` takes: `0.1 + 2 cos(i + offset)`.
fn wave(offset: f32) -> Vec<f32> {
    (0..N).map(|i| 0.1 + 2.0 * (i as f32 + offset).cos()).collect()
}

fn theirs(format: &Format) -> Type {
    Type::from_id(format.ty.id).unwrap()
}

/// What ggml makes of numbers, where it can.
fn rounded(format: &Format, x: &[f32]) -> Option<Vec<u8>> {
    let importance = vec![1.0; x.len()];
    theirs(format).quantizer()?.quantize(x, x.len(), Some(&importance))
}

#[test]
fn the_same_types() {
    for id in 0..200 {
        let (ours, theirs) = (type_of(id), Type::from_id(id));
        assert_eq!(ours.is_some(), theirs.is_some(), "type {id}");
        let (Some(ours), Some(theirs)) = (ours, theirs) else { continue };
        assert_eq!(ours.name, theirs.name().to_uppercase());
        assert_eq!(ours.block_len, theirs.block(), "{}", ours.name);
        assert_eq!(ours.block_bytes, theirs.block_bytes(), "{}", ours.name);
        assert_eq!(format_of(id).is_some(), theirs.is_readable(), "{}", ours.name);
    }
    assert_eq!(FORMATS.iter().filter(|f| is_rare(f.ty)).count(), 12);
}

#[test]
fn blocks_are_read_to_the_same_bits() {
    let mut state = 3;
    for format in FORMATS {
        let random = (0..20).map(|_| format.random_row(N, &mut state));
        for row in random.chain(rounded(format, &wave(0.0))) {
            let (mut ours, mut wanted) = (vec![0.0f32; N], vec![0.0f32; N]);
            format.dequantize(&row, &mut ours);
            assert!(theirs(format).dequantize(&row, &mut wanted));
            let differs = ours.iter().zip(&wanted).position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(differs, None, "{}", format.ty.name);
        }
    }
}

/// Random rows, which timings are made with, have the size that they should.
#[test]
fn random_rows_are_as_large_as_weights() {
    let mut state = 4;
    for format in FORMATS {
        let mut x = vec![0.0; N];
        format.dequantize(&format.random_row(N, &mut state), &mut x);
        let size = x.iter().map(|x| x * x).sum::<f32>().sqrt();
        println!("{:8} {size:.3}", format.ty.name);
        assert!((0.01..10.0).contains(&size), "{}: {size}", format.ty.name);
    }
}

/// The largest error of a dot product for each element of a row: those of ggml's
/// `tests/test-quantize-fns.cpp`, `MAX_DOT_PRODUCT_ERROR` and its like, for the wave above. That test
/// leaves out types that nothing rounds to without the importance of columns; here they are taken for
/// ternary.
fn allowed(format: &Format) -> f32 {
    match format.ty.name {
        _ if theirs(format).quantizer().unwrap().needs_importance() => 0.15,
        "IQ1_M" | "TQ1_0" | "TQ2_0" | "Q2_0" => 0.15,
        "Q2_K" | "IQ2_S" | "IQ3_XXS" | "IQ3_S" => 0.04,
        "Q1_0" => 0.4,
        "NVFP4" => 0.03,
        _ => 0.02,
    }
}

/// The product of a row with `x`, as the CPU engine computes it.
fn multiplied(format: &Format, row: &[u8], x: &[f32]) -> f32 {
    let Some(layout) = layout_of(format) else { return format.dot(row, x) };
    nmse::multiplied(layout, N, &[row.to_vec()], x)[0]
}

/// Ours rounds activations to 8 bits in blocks of 32, if at all; ggml's in blocks of 32 or 256.
#[test]
fn products_are_as_near_as_those_of_ggml() {
    let (w, x) = (wave(0.0), wave(1.0));
    let exact: f64 = w.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
    let mut failed = false;
    for format in FORMATS {
        let name = format.ty.name;
        let row = rounded(format, &w).unwrap();
        let theirs = theirs(format).dot(&row, &x).unwrap();
        let plain = format.dot(&row, &x);
        let ours = multiplied(format, &row, &x);
        let error = |y: f32, exact: f64| ((f64::from(y) - exact).abs() / N as f64) as f32;
        let [a, b, c] = [plain, ours, theirs].map(|y| error(y, exact));
        let allowed = allowed(format);
        println!("{name:8} plain {a:.6}, engine {b:.6}, ggml {c:.6}; allowed {allowed}");
        failed |= ![a, b, c].iter().all(|e| *e < allowed);
        // Beside the definition, only activations are rounded.
        let [b, c] = [ours, theirs].map(|y| error(y, f64::from(plain)));
        let apart = error(ours, f64::from(theirs));
        println!("         from plain: engine {b:.6}, ggml {c:.6}; from each other {apart:.6}");
        assert!([b, c, apart].iter().all(|e| *e < 5e-4), "{name}: {b} {c} {apart}");
    }
    assert!(!failed);
}

/// Mean square of what a format loses of numbers, relative to their own.
fn loss(format: &Format, blocks: &[u8], x: &[f32]) -> f64 {
    let mut read = vec![0.0; x.len()];
    format.dequantize(blocks, &mut read);
    let square = |x: f32| f64::from(x) * f64::from(x);
    let lost: f64 = x.iter().zip(&read).map(|(x, y)| square(x - y)).sum();
    lost / x.iter().map(|x| square(*x)).sum::<f64>()
}

/// Numbers as bell-shaped as weights are.
fn bell(n: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut uniform = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    (0..n).map(|_| (0..8).map(|_| uniform()).sum::<f32>() * 0.02).collect()
}

/// Where there is nothing to choose, the same bits; else hardly more is lost.
#[test]
fn rounds_as_well_as_ggml() {
    let x = bell(64 * 256);
    for format in FORMATS.iter().filter(|f| f.can_quantize()) {
        let name = format.ty.name;
        let mut ours = vec![0; format.row_bytes(x.len())];
        format.quantize(&x, &mut ours);
        let theirs = theirs(format).quantizer().unwrap().quantize(&x, x.len(), None).unwrap();
        let differ = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        let [a, b] = [&ours, &theirs].map(|blocks| loss(format, blocks, &x));
        println!("{name:5} {differ} of {} bytes differ; lost: {a:.3e}, ggml {b:.3e}", ours.len());
        match format.ty.block_len {
            256 => assert!(a < 1.1 * b, "{name}: {a} {b}"),
            _ => assert_eq!(differ, 0, "{name}"),
        }
    }
}

fn model(ty: u32, matrices: &[(String, Vec<u8>)]) -> Arc<Model> {
    let mut tiny = Tiny::llama().set("llama.feed_forward_length", 256);
    for i in 0..2 {
        for name in ["gate", "up"] {
            tiny = tiny.tensor(&format!("blk.{i}.ffn_{name}.weight"), &[8, 256]);
        }
    }
    for (name, data) in matrices {
        tiny = tiny.tensor_of(name, ty, &[256, 8], data.clone());
    }
    Arc::new(Model::from_gguf(Gguf::parse(tiny.bytes().into()).unwrap()).unwrap())
}

fn logits(model: Arc<Model>) -> Vec<f32> {
    let cache = (CacheType::F32, CacheType::F32);
    let n_threads = Threads { one: 1, batch: 2 };
    let options = Options { n_threads, cache, exact: true, ..Options::default() };
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 256).collect();
    let mut session = Session::new(model, &options).unwrap();
    session.feed_wanting(&tokens, 0..40).unwrap().to_vec()
}

/// A model with matrices in a format computes what one with the same numbers as floats does.
#[test]
fn models_run_in_every_format() {
    for format in FORMATS {
        let names = (0..2).map(|i| format!("blk.{i}.ffn_down.weight"));
        let mut rows = bell(2 * 8 * 256).into_iter().map(|x| 30.0 * x).collect::<Vec<f32>>();
        let (mut blocks, mut floats) = (Vec::new(), Vec::new());
        for (name, rows) in names.zip(rows.chunks_mut(8 * 256)) {
            let data = rounded(format, rows).unwrap();
            format.dequantize(&data, rows);
            floats.push((name.clone(), rows.iter().flat_map(|x| x.to_le_bytes()).collect()));
            blocks.push((name, data));
        }
        let [a, b] = [model(format.ty.id, &blocks), model(0, &floats)].map(logits);
        let size = b.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let error = a.iter().zip(&b).fold(0.0f32, |e, (a, b)| e.max((a - b).abs()));
        assert!(size > 0.1 && error < 1e-5 * size, "{}: {error} of {size}", format.ty.name);
    }
}
