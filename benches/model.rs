//! Whole steps of a model of the shape of SmolLM2-135M: a prompt, and one token at two depths, where
//! at the larger one attention takes most of the time.
#![allow(missing_docs, clippy::unwrap_used)]

use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use qkov::measure::shape;
use qkov::model::Model;
use qkov::session::{Options, Session};

fn steps(c: &mut Criterion) {
    for mixture in ["Q4_0", "Q8_0", "Q4_K_M"] {
        let gguf = shape::synthetic(shape::find("smollm2-135m").unwrap(), mixture).unwrap();
        let model = Arc::new(Model::from_gguf(gguf).unwrap());
        let options = Options { n_ctx: Some(4608), ..Options::default() };
        let mut session = Session::new(model, &options).unwrap();
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

criterion_group!(benches, steps);
criterion_main!(benches);
