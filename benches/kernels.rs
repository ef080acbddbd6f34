//! Every kernel: products of each layout with one token and with many, normalizers, functions.
//! Bytes per second are those of the weights, elements per second are products.
#![allow(missing_docs, unsafe_code, clippy::unwrap_used)]

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use qkov::cpu::kernels::{Activations, LANES, LAYOUTS, Packed, Scratch, multiply, tile_of};
use qkov::cpu::threads::Columns;
use qkov::normalizer::{Choice, NORMALIZERS, Row};
use qkov::quant::format_named;
use qkov::simd;

/// A matrix larger than the second cache.
const N_IN: usize = 2048;
const N_OUT: usize = 1024;

fn floats(n: usize) -> Vec<f32> {
    let format = format_named("F32").unwrap();
    let mut x = vec![0.0; n];
    format.dequantize(&format.random_row(n, &mut 7), &mut x);
    x
}

fn products(c: &mut Criterion) {
    for (name, n) in [("one token", 1), ("128 tokens", 128)] {
        let mut group = c.benchmark_group(name);
        group.sample_size(20);
        for (index, layout) in LAYOUTS.iter().enumerate() {
            // Layouts of cached values are timed with attention.
            let Some(format) = format_named(layout.name) else { continue };
            let rows: Vec<_> = (0..N_OUT).map(|_| format.random_row(N_IN, &mut 5)).collect();
            let packed = Packed::new(index, N_IN, &rows);
            let x = floats(n * N_IN);
            let (mut quants, mut scales) = (vec![0; n * N_IN], vec![0.0; n * N_IN / 32]);
            let (mut sums16, mut sums32) = (vec![0.0; n * N_IN / 16], vec![0.0; n * N_IN / 32]);
            for (t, row) in x.chunks(N_IN).enumerate() {
                let (tile, lane) = (tile_of(n), t % tile_of(n));
                let at = t / tile * tile * N_IN;
                let (q, s) = (&mut quants[at..], &mut scales[at / 32..]);
                let (s16, s32) = (&mut sums16[at / 16..], &mut sums32[at / 32..]);
                simd::quantize(row, lane, tile, q, s, s16, s32);
            }
            let mut pairs = vec![0; n * N_IN / 2];
            simd::round_pairs(&x, &mut pairs);
            let x = Activations {
                n,
                stride: N_IN,
                floats: &x,
                tile: tile_of(n),
                quants: &quants,
                scales: &scales,
                sums16: &sums16,
                sums32: &sums32,
                pairs: &pairs,
                low: &[],
            };
            let mut out = vec![0.0; n * N_OUT];
            let mut scratch = Scratch::default();
            group.throughput(match n {
                1 => Throughput::Bytes((format.row_bytes(N_IN) * N_OUT) as u64),
                _ => Throughput::Elements((n * N_IN * N_OUT) as u64),
            });
            group.bench_function(BenchmarkId::from_parameter(layout.name), |b| {
                b.iter(|| {
                    let out = Columns::new(&mut out, N_OUT);
                    // SAFETY: nobody else knows `out`.
                    unsafe { multiply(&packed.panels(), &x, &mut scratch, out, 0) };
                });
            });
        }
    }
}

/// Rows of a file becoming panels: when a model is opened, and when an expert is read.
fn packing(c: &mut Criterion) {
    let mut group = c.benchmark_group("packing");
    group.sample_size(20);
    for layout in LAYOUTS {
        let Some(format) = format_named(layout.name) else { continue };
        let rows: Vec<_> = (0..N_OUT).map(|_| format.random_row(N_IN, &mut 5)).collect();
        let mut panel = vec![0; layout.panel_bytes(N_IN)];
        group.throughput(Throughput::Bytes((format.row_bytes(N_IN) * N_OUT) as u64));
        group.bench_function(BenchmarkId::from_parameter(layout.name), |b| {
            b.iter(|| {
                for rows in rows.chunks(LANES) {
                    layout.pack_panel(rows.iter().map(|r| &r[..]), black_box(&mut panel));
                }
            });
        });
    }
}

fn normalizers(c: &mut Criterion) {
    let mut group = c.benchmark_group("normalizer, row of 4096");
    let scores: Vec<f32> = floats(4096).iter().map(|x| 100.0 * x).collect();
    group.throughput(Throughput::Elements(scores.len() as u64));
    for kind in NORMALIZERS {
        let choice = Choice::of(kind);
        let at = Row { position: 4095, n_ctx_train: 4096, ..Row::default() };
        group.bench_function(kind.name, |b| {
            let mut row = scores.clone();
            b.iter(|| {
                row.copy_from_slice(&scores);
                choice.row(black_box(&mut row), at);
            });
        });
    }
}

fn functions(c: &mut Criterion) {
    let mut group = c.benchmark_group("function, 4096 elements");
    let x = floats(4096);
    group.throughput(Throughput::Elements(x.len() as u64));
    type Function = (&'static str, fn(&mut [f32]));
    let functions: [Function; 4] = [
        ("exp", |x| {
            black_box(simd::exp_minus(x, 1.0));
        }),
        ("silu", simd::silu),
        ("gelu", simd::gelu_tanh),
        ("squares", |x| {
            black_box(simd::squares(x, 0.0));
        }),
    ];
    for (name, function) in functions {
        group.bench_function(name, |b| {
            let mut row = x.clone();
            b.iter(|| {
                row.copy_from_slice(&x);
                function(black_box(&mut row));
            });
        });
    }
}

criterion_group!(benches, products, packing, normalizers, functions);
criterion_main!(benches);
