//! Errors of every operation, against the limits of ggml's `tests/test-backend-ops.cpp`.
//!
//! The measure is its own: the mean square of the difference over that of the exact numbers, which
//! are computed in `f64` here. Products may be a thousand times further off than others, since
//! activations are rounded for them.

use std::sync::{Arc, Mutex};

use qkov::arch::Pairing;
use qkov::cpu::kernels::{Activations, LANES, Packed, Scratch, layout_of, multiply, tile_of};
use qkov::cpu::threads::Columns;
use qkov::cpu::{Input, Observer, Seen, SeenHead, SeenInput, SeenRows};
use qkov::engine::{CacheType, Threads};
use qkov::gguf::Gguf;
use qkov::model::Model;
use qkov::quant::{FORMATS, Format, format_named};
use qkov::session::sampler::{Sampler, SamplerParams};
use qkov::session::{Options, Session};
use qkov::simd;

use crate::golden::{FOLDER, goldens};

/// For what the table of that file does not list.
const DEFAULT: f64 = 1e-7;
const PRODUCT: f64 = 5e-4;
const SOFT_MAX: f64 = 1e-6;
const MODEL: f64 = 2e-3;

fn nmse(found: &[f32], exact: &[f64]) -> f64 {
    assert_eq!(found.len(), exact.len());
    let square = |x: f64| x * x;
    let error: f64 = found.iter().zip(exact).map(|(a, b)| square(f64::from(*a) - b)).sum();
    error / exact.iter().map(|x| square(*x)).sum::<f64>()
}

#[track_caller]
#[allow(clippy::print_stdout)]
fn below(limit: f64, what: &str, found: &[f32], exact: &[f64]) {
    let error = nmse(found, exact);
    println!("{what:34} {error:9.2e} of {limit:.0e}");
    assert!(error < limit, "{what}: {error:e}");
}

fn random(n: usize, size: f32, seed: &mut u64) -> Vec<f32> {
    let format = format_named("F32").unwrap();
    let mut x = vec![0.0; n];
    format.dequantize(&format.random_row(n, seed), &mut x);
    let own = (simd::squares(&x, 0.0) / n as f32).sqrt();
    x.iter().map(|x| x * size / own).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Products of rows of `k` activations with rows of a layout, as the CPU engine computes them. `[n, rows]`
pub fn multiplied(layout: usize, k: usize, rows: &[Vec<u8>], x: &[f32]) -> Vec<f32> {
    let n = x.len() / k;
    let tile = tile_of(n);
    let all = n.next_multiple_of(tile) * k;
    let (mut quants, mut scales) = (vec![0; all], vec![0.0; all / 32]);
    let (mut sums16, mut sums32) = (vec![0.0; all / 16], vec![0.0; all / 32]);
    for (t, row) in x.chunks_exact(k).enumerate() {
        let at = t / tile * tile * k;
        let sums = (&mut sums16[at / 16..], &mut sums32[at / 32..]);
        let (q, s) = (&mut quants[at..], &mut scales[at / 32..]);
        simd::quantize(row, t % tile, tile, q, s, sums.0, sums.1);
    }
    let mut pairs = vec![0; n * k / 2];
    simd::round_pairs(x, &mut pairs);
    let view = Activations {
        n,
        stride: k,
        floats: x,
        tile,
        quants: &quants,
        scales: &scales,
        sums16: &sums16,
        sums32: &sums32,
        pairs: &pairs,
        low: &[],
    };
    let packed = Packed::new(layout, k, rows);
    let mut out = vec![f32::NAN; n * rows.len()];
    let columns = Columns::new(&mut out, rows.len());
    // SAFETY: nobody else knows `out`.
    #[allow(unsafe_code)]
    unsafe {
        multiply(&packed.panels(), &view, &mut Scratch::default(), columns, 0)
    };
    out
}

/// Products of `n` rows of activations with rows of a format.
fn products(format: &Format, layout: usize, k: usize, n: usize, seed: &mut u64) {
    let rows: Vec<Vec<u8>> = (0..3 * LANES).map(|_| format.random_row(k, seed)).collect();
    let x = random(n * k, 1.0, seed);
    let mut exact = Vec::new();
    for x in x.chunks_exact(k) {
        for row in &rows {
            let mut w = vec![0.0; k];
            format.dequantize(row, &mut w);
            exact.push(w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum());
        }
    }
    let out = multiplied(layout, k, &rows, &x);
    below(PRODUCT, &format!("{} x {n} rows of {k}", format.ty.name), &out, &exact);
}

#[test]
fn products_with_every_format() {
    let mut seed = 7;
    for format in FORMATS {
        let Some(layout) = layout_of(format) else { continue };
        for (k, n) in [(256, 1), (2048, 1), (2048, 5), (2048, 64)] {
            products(format, layout, k, n, &mut seed);
        }
    }
}

#[test]
fn functions_of_single_numbers() {
    let x = random(1 << 14, 3.0, &mut 3);
    let check = |what: &str, f: &dyn Fn(&mut [f32]), exact: &dyn Fn(f64) -> f64| {
        let mut found = x.clone();
        f(&mut found);
        let exact: Vec<f64> = x.iter().map(|x| exact(f64::from(*x))).collect();
        below(DEFAULT, what, &found, &exact);
    };
    check("silu", &|x| simd::silu(x), &|x| x / (1.0 + (-x).exp()));
    let half = std::f64::consts::FRAC_1_SQRT_2;
    check("gelu", &|x| simd::gelu(x), &|x| 0.5 * x * libm::erfc(-x * half));
    let inner = |x: f64| (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    check("gelu_tanh", &|x| simd::gelu_tanh(x), &|x| 0.5 * x * (1.0 + inner(x).tanh()));
    check("softcap", &|x| simd::softcap(x, 2.0), &|x| 2.0 * (x / 2.0).tanh());
    let mut halves = vec![0.0; 4];
    let bytes: Vec<u8> = [0.1f32, -7.0, 3e-6, 6e4]
        .iter()
        .flat_map(|x| half::f16::from_f32(*x).to_le_bytes())
        .collect();
    simd::halves(&mut halves, &bytes);
    let exact: Vec<f64> =
        bytes.chunks(2).map(|b| half::f16::from_le_bytes([b[0], b[1]]).to_f64()).collect();
    below(f64::MIN_POSITIVE, "f16 to f32", &halves, &exact);
}

#[test]
fn the_largest_logit_wins() {
    let params = SamplerParams { temperature: 0.0, ..SamplerParams::default() };
    let mut sampler = Sampler::new(params, 50_000).unwrap();
    let mut seed = 11;
    for _ in 0..20 {
        let logits = random(50_000, 4.0, &mut seed);
        let most = simd::max(&logits);
        // Of equal ones the first.
        let largest = logits.iter().position(|x| *x == most).unwrap();
        assert_eq!(sampler.sample(&logits) as usize, largest);
    }
}

#[test]
fn whole_models() {
    for golden in goldens() {
        for cache in [CacheType::F32, CacheType::F16] {
            let n_vocab = golden.model.hparams.n_vocab;
            let options = Options {
                n_ctx: Some(golden.tokens.len() + 8),
                n_threads: Threads { one: 2, batch: 2 },
                cache: (cache, cache),
                ..Options::default()
            };
            let mut session = Session::new(golden.model.clone(), &options).unwrap();
            let logits = golden.feed(&mut session, 32);
            let rows = golden.positions.iter().map(|p| &logits[p * n_vocab..(p + 1) * n_vocab]);
            let found: Vec<f32> = rows.flatten().copied().collect();
            let what = format!("{}, cache {}", golden.name, cache.name());
            below(MODEL, &what, &found, &wide(&golden.logits));
        }
    }
}

/// What is seen of the first layer's first head.
#[derive(Default)]
struct Sight {
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    scores: Vec<f32>,
    weights: Vec<f32>,
    outputs: Vec<f32>,
}

struct Watch(Mutex<Sight>);

fn all(rows: &SeenRows) -> Vec<f32> {
    rows.iter().flatten().copied().collect()
}

impl Observer for Watch {
    fn wants(&self, layer: usize) -> bool {
        layer == 0
    }
    fn see(&self, seen: &Seen) {
        if (seen.layer, seen.head) == (0, 0) {
            let mut sight = self.0.lock().unwrap();
            sight.scores = seen.scores.to_vec();
            sight.weights = seen.weights.to_vec();
            sight.outputs = seen.outputs.to_vec();
        }
    }
    fn wants_heads(&self, layer: usize) -> bool {
        layer == 0
    }
    fn see_head(&self, seen: &SeenHead) {
        if (seen.layer, seen.head) == (0, 0) {
            let mut sight = self.0.lock().unwrap();
            sight.q = all(&seen.queries);
            sight.k = all(&seen.keys);
            sight.v = all(&seen.values);
        }
    }
    fn wants_inputs(&self) -> bool {
        true
    }
    fn see_input(&self, seen: &SeenInput) {
        if (seen.layer, seen.input) == (0, Input::Attention) {
            self.0.lock().unwrap().normed = all(&seen.rows);
        }
    }
}

/// The rows of a tensor of floats.
fn rows(gguf: &Gguf, name: &str, which: &[usize]) -> Vec<f64> {
    let tensor = gguf.tensor(name).unwrap();
    let width = tensor.dims[0] as usize;
    let format = format_named(tensor.ty.name).unwrap();
    let mut x = vec![0.0; tensor.n_elements() as usize];
    format.dequantize(&gguf.data(tensor), &mut x);
    which.iter().flat_map(|row| wide(&x[row * width..(row + 1) * width])).collect()
}

#[test]
fn operations_of_a_layer() {
    for name in ["llama", "gpt2"] {
        let path = std::path::Path::new(FOLDER).join(format!("{name}.gguf"));
        let gguf = Gguf::open(&path).unwrap();
        for cache in [CacheType::F32, CacheType::F16, CacheType::Q8_0] {
            layer(name, &gguf, cache);
        }
    }
}

fn layer(name: &str, gguf: &Gguf, cache: CacheType) {
    let model = Arc::new(Model::from_gguf(gguf.clone()).unwrap());
    let hp = model.hparams.clone();
    let n = 48;
    let tokens: Vec<u32> = (0..n as u32).map(|i| i * 37 % hp.n_vocab as u32).collect();
    let options = Options { n_ctx: Some(n), cache: (cache, cache), ..Options::default() };
    let mut session = Session::new(model.clone(), &options).unwrap();
    let watch = Watch(Mutex::default());
    session.feed_observed(&tokens, n - 1..n, &watch).unwrap();
    let seen = watch.0.into_inner().unwrap();
    let case = |what: &str| format!("{what}, {name}, cache {}", cache.name());

    let which: Vec<usize> = tokens.iter().map(|t| *t as usize).collect();
    let mut x = rows(gguf, "token_embd.weight", &which);
    let weight = rows(gguf, "blk.0.attn_norm.weight", &[0]);
    let bias = match gguf.tensor("blk.0.attn_norm.bias") {
        Some(_) => {
            let positions: Vec<usize> = (0..n).collect();
            let own = rows(gguf, "position_embd.weight", &positions);
            x.iter_mut().zip(own).for_each(|(x, p)| *x += p);
            rows(gguf, "blk.0.attn_norm.bias", &[0])
        }
        None => vec![0.0; hp.n_embd],
    };
    for x in x.chunks_exact_mut(hp.n_embd) {
        let mean = if name == "gpt2" { x.iter().sum::<f64>() / x.len() as f64 } else { 0.0 };
        let variance = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let factor = 1.0 / (variance + f64::from(hp.norm.eps)).sqrt();
        for (i, x) in x.iter_mut().enumerate() {
            *x = (*x - mean) * factor * weight[i] + bias[i];
        }
    }
    below(DEFAULT, &case("norm"), &seen.normed, &x);

    let d = hp.key_dim;
    let rotated = |x: &[f32]| -> Vec<f64> {
        let mut x = wide(x);
        let Some(rope) = hp.ropes.first() else { return x };
        assert_eq!(rope.pairing, Pairing::Adjacent);
        let frequencies = rope.frequencies(None).0;
        for (position, head) in x.chunks_exact_mut(d).enumerate() {
            for (i, f) in frequencies.iter().enumerate() {
                let (sin, cos) = (position as f64 * f).sin_cos();
                let (a, b) = (head[2 * i], head[2 * i + 1]);
                (head[2 * i], head[2 * i + 1]) = (a * cos - b * sin, a * sin + b * cos);
            }
        }
        x
    };
    let (q, k, v) = (rotated(&seen.q), rotated(&seen.k), wide(&seen.v));
    let mut exact = [Vec::new(), Vec::new(), Vec::new()];
    let [scores, weights, outputs] = &mut exact;
    let mut found = [Vec::new(), Vec::new()];
    for t in 0..n {
        let q = &q[t * d..(t + 1) * d];
        let keys = k.chunks_exact(d).take(t + 1);
        let row: Vec<f64> = keys
            .map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (d as f64).sqrt())
            .collect();
        let softmax = |row: &[f64]| -> Vec<f64> {
            let sum: f64 = row.iter().map(|x| x.exp()).sum();
            row.iter().map(|x| x.exp() / sum).collect()
        };
        let own = &seen.scores[t * n..][..t + 1];
        weights.extend(softmax(&wide(own)));
        found[0].extend_from_slice(own);
        found[1].extend_from_slice(&seen.weights[t * n..][..t + 1]);
        for i in 0..hp.value_dim {
            let mixed =
                softmax(&row).iter().zip(v.chunks_exact(hp.value_dim)).map(|(w, v)| w * v[i]).sum();
            outputs.push(mixed);
        }
        scores.extend(row);
    }
    // Keys of the cache are as near as its type has them.
    let limit = if cache == CacheType::F32 { DEFAULT } else { PRODUCT };
    below(limit, &case("rotation and scores"), &found[0], scores);
    below(SOFT_MAX, &case("softmax"), &found[1], weights);
    below(PRODUCT, &case("attention"), &seen.outputs, outputs);
}
