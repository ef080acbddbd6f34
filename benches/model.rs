//! Whole steps of a model of the shape of SmolLM2-135M, and attention: one layer with that model's
//! heads and little else, at a depth of 4096, for every type of cache and every normalizer.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qkov::engine::CacheType;
use qkov::measure::shape::{self, Shape};
use qkov::model::Model;
use qkov::normalizer;
use qkov::session::{Options, Session};

fn session(shape: &Shape, mixture: &str, cache: (CacheType, CacheType)) -> Session {
    let gguf = shape::synthetic(shape, mixture).unwrap();
    let model = Arc::new(Model::from_gguf(gguf).unwrap());
    let options = Options { n_ctx: Some(4608), cache, ..Options::default() };
    Session::new(model, &options).unwrap()
}

/// One layer with the heads of SmolLM2-135M.
fn one_layer() -> Shape {
    Shape { n_layer: 1, n_ff: 32, n_vocab: 64, ..*shape::find("smollm2-135m").unwrap() }
}

/// Of one token, with every normalizer.
fn normalizers(c: &mut Criterion) {
    let tokens: Vec<u32> = (0..4097).map(|i| i * 31 % 64).collect();
    let mut session = session(&one_layer(), "Q8_0", (CacheType::F16, CacheType::F16));
    let trained = session.model().trained.clone();
    let mut group = c.benchmark_group("attention of 1 at 4096 with");
    group.sample_size(10);
    for kind in normalizer::kinds() {
        let mut plan = trained.clone();
        plan.set_normalizers(kind.name).unwrap();
        session.set_plan(plan).unwrap();
        session.feed(&tokens[..4096]).unwrap();
        group.bench_function(kind.name, |b| {
            b.iter(|| {
                session.rewind(4096);
                session.feed(&tokens[4096..]).unwrap();
            });
        });
    }
}

fn attention(c: &mut Criterion) {
    let shape = one_layer();
    let tokens: Vec<u32> = (0..4224).map(|i| i * 31 % 64).collect();
    let (depth, prompt) = tokens.split_at(4096);
    for n in [1, prompt.len()] {
        let mut group = c.benchmark_group(format!("attention of {n} at 4096"));
        group.sample_size(10);
        // Keys that are scored, and as many values that are mixed.
        let pairs: usize = (0..n).map(|t| depth.len() + t + 1).sum();
        group.throughput(Throughput::Elements(pairs as u64 * shape.n_head));
        for cache in CacheType::ALL {
            let mut session = session(&shape, "Q8_0", (cache, cache));
            session.feed(depth).unwrap();
            group.bench_function(cache.name(), |b| {
                b.iter(|| {
                    session.rewind(depth.len());
                    // All of them, or the only layer would be spared most.
                    session.feed_wanting(&prompt[..n], 0..n).unwrap();
                });
            });
        }
    }
}

fn steps(c: &mut Criterion) {
    for mixture in ["Q4_0", "Q8_0", "Q4_K_M"] {
        let shape = shape::find("smollm2-135m").unwrap();
        let mut session = session(shape, mixture, (CacheType::F16, CacheType::F16));
        let tokens: Vec<u32> = (0..4096).map(|i| i * 31 % 40_000).collect();
        let mut group = c.benchmark_group(mixture);
        group.sample_size(10);
        group.throughput(Throughput::Elements(128));
        group.bench_function("prompt of 128", |b| {
            b.iter(|| {
                session.rewind(0);
                session.feed(&tokens[..128]).unwrap();
            });
        });
        for depth in [128, 4096] {
            session.rewind(0);
            session.feed(&tokens[..depth]).unwrap();
            group.throughput(Throughput::Elements(1));
            group.bench_function(format!("token at {depth}"), |b| {
                b.iter(|| {
                    session.rewind(depth);
                    session.feed(&tokens[..1]).unwrap();
                });
            });
        }
    }
}

/// A layer of OLMoE: what a token takes goes with the experts that it goes through, not with those that
/// there are.
fn experts(c: &mut Criterion) {
    let tokens: Vec<u32> = (0..128).map(|i| i * 31 % 64).collect();
    for n in [1, tokens.len()] {
        let mut group = c.benchmark_group(format!("{n} through experts"));
        group.sample_size(20);
        group.throughput(Throughput::Elements(n as u64));
        for experts in [(8, 8), (64, 8), (64, 4), (64, 2), (64, 1)] {
            let olmoe = *shape::find("olmoe-1b-7b").unwrap();
            let shape = Shape { n_layer: 1, n_vocab: 64, experts: Some(experts), ..olmoe };
            let mut session = session(&shape, "Q4_0", (CacheType::F16, CacheType::F16));
            let mut at = 0;
            group.bench_function(format!("{} of {}", experts.1, experts.0), |b| {
                b.iter(|| {
                    // Other tokens, and so other experts, every time.
                    at = (at + n) % tokens.len();
                    session.rewind(0);
                    session.feed_wanting(&tokens[at..][..n], 0..n).unwrap();
                });
            });
        }
    }
}

criterion_group!(benches, attention, normalizers, steps, experts);
criterion_main!(benches);
