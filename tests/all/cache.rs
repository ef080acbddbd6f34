//! The cache of keys and values in every type.

use std::sync::Arc;

use qkov::engine::{CacheType, Threads};
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::family;

/// A trained model, and tokens enough that the last ones, alone, attend in several tasks.
fn trained() -> (Arc<Model>, Vec<u32>) {
    let model = family::softmax();
    let text = "The fox went down to the river, and the river was cold and wide. ".repeat(20);
    let tokens = model.tokenizer.encode(&text, true, false).unwrap();
    (Arc::new(model), tokens[..300].to_vec())
}

/// Logits of every token, fed `n` at a time.
fn logits(
    (model, tokens): &(Arc<Model>, Vec<u32>),
    (cache, exact): ((CacheType, CacheType), bool),
    n: usize,
) -> Vec<f32> {
    let n_threads = Threads { one: 2, batch: 1 };
    let options = Options { n_threads, cache, exact, ..Options::default() };
    let mut session = Session::new(model.clone(), &options).unwrap();
    let mut out = Vec::new();
    for tokens in tokens.chunks(n) {
        out.extend_from_slice(session.feed_wanting(tokens, 0..tokens.len()).unwrap());
    }
    out
}

fn types() -> impl Iterator<Item = (CacheType, CacheType)> {
    CacheType::ALL.into_iter().flat_map(|k| CacheType::ALL.map(|v| (k, v)))
}

#[test]
fn every_type_loses_as_little_as_its_bits_allow() {
    let model = trained();
    let full = logits(&model, ((CacheType::F32, CacheType::F32), true), 512);
    let n_vocab = model.0.hparams.n_vocab;
    let log_softmax = |row: &[f32]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        row.iter().map(|x| f64::from(*x) - sum.ln()).collect()
    };
    for (k, v) in types() {
        let rounded = logits(&model, ((k, v), true), 512);
        let rows = full.chunks(n_vocab).zip(rounded.chunks(n_vocab));
        let kl: f64 = rows
            .map(|(p, q)| (log_softmax(p), log_softmax(q)))
            .map(|(p, q)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>())
            .sum();
        let kl = kl / (full.len() / n_vocab) as f64;
        println!("keys {}, values {}: KL {kl:.1e}", k.name(), v.name());
        let most = |ty| match ty {
            CacheType::F32 => 1e-12,
            CacheType::F16 => 1e-7,
            CacheType::Q8_0 => 1e-4,
            CacheType::Q4_0 => 3e-2,
        };
        assert!(kl <= most(k) + most(v), "{} {}: {kl:e}", k.name(), v.name());
    }
}

#[test]
fn any_pieces_give_the_same_bits() {
    let bits = |x: Vec<f32>| -> Vec<u32> { x.into_iter().map(f32::to_bits).collect() };
    // With few weights, tokens that are fed alone read only the values that have one.
    for norm in ["softmax", "top_k:k=8"] {
        let (mut model, tokens) = trained();
        Arc::get_mut(&mut model).unwrap().set_normalizers(norm).unwrap();
        let model = (model, tokens);
        for cache in types() {
            let whole = bits(logits(&model, (cache, false), 512));
            for n in [1, 23] {
                assert!(bits(logits(&model, (cache, false), n)) == whole, "{cache:?} by {n}");
            }
        }
    }
}

#[test]
fn heads_of_any_size_fit_every_type() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llama.gguf");
    let model = Arc::new(Model::open(path.as_ref()).unwrap());
    assert_eq!(model.hparams.key_dim, 8);
    let tokens: Vec<u32> = (0..40).map(|i| i * 7 % model.hparams.n_vocab as u32).collect();
    let model = (model, tokens);
    let full = logits(&model, ((CacheType::F32, CacheType::F32), true), 40);
    let size = full.iter().fold(0.0f32, |a, x| a.max(x.abs()));
    for cache in types() {
        let rounded = logits(&model, (cache, true), 1);
        let error = full.iter().zip(&rounded).fold(0.0f32, |a, (x, y)| a.max((x - y).abs()));
        let most = if [cache.0, cache.1].contains(&CacheType::Q4_0) { 0.5 } else { 0.05 };
        assert!(error < most * size, "{cache:?}: {error} of {size}");
    }
}
