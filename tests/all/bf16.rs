//! Models with matrices in BF16.

use std::sync::Arc;

use qkov::engine::{CacheType, Threads};
use qkov::gguf::Gguf;
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::tiny::Tiny;

const F32: u32 = 0;
const BF16: u32 = 30;

/// A Llama with `n_ff` elements between its products, whose matrices hold numbers of BF16.
fn llama(n_ff: u64, ty: u32) -> Arc<Model> {
    let mut tiny = Tiny::llama().set("llama.feed_forward_length", n_ff as u32);
    for i in 0..2 {
        for (name, dims) in [("gate", [8, n_ff]), ("up", [8, n_ff]), ("down", [n_ff, 8])] {
            tiny = tiny.tensor(&format!("blk.{i}.ffn_{name}.weight"), &dims);
        }
    }
    for t in tiny.tensors.clone().iter().filter(|t| t.dims.len() == 2) {
        let halves = t.data.as_chunks::<4>().0.iter().map(|x| [x[2], x[3]]);
        let data = match ty {
            BF16 => halves.flatten().collect(),
            _ => halves.flat_map(|[a, b]| [0, 0, a, b]).collect(),
        };
        tiny = tiny.tensor_of(&t.name, ty, &t.dims, data);
    }
    Arc::new(Model::from_gguf(Gguf::parse(tiny.bytes().into()).unwrap()).unwrap())
}

/// Logits of a few tokens that are read `n` at a time.
fn logits(model: &Arc<Model>, n: usize, exact: bool) -> Vec<f32> {
    let n_threads = Threads { one: 1, batch: 1 };
    let cache = (CacheType::F32, CacheType::F32);
    let options = Options { n_threads, cache, exact, ..Options::default() };
    let mut session = Session::new(model.clone(), &options).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| i * 37 % 256).collect();
    let read = |tokens: &[u32]| session.feed_wanting(tokens, 0..tokens.len()).unwrap().to_vec();
    tokens.chunks(n).flat_map(read).collect()
}

/// Pairs of elements, and rows that end with half of one.
#[test]
fn even_and_odd_rows_are_multiplied_as_they_are() {
    for n_ff in [15, 16] {
        let [floats, halves] = [F32, BF16].map(|ty| llama(n_ff, ty));
        let [plain, exact, rounded] =
            [(&floats, true), (&halves, true), (&halves, false)].map(|(m, e)| logits(m, 40, e));
        let error = |x: &[f32]| plain.iter().zip(x).fold(0.0f32, |e, (a, b)| e.max((a - b).abs()));
        assert!(plain.iter().all(|x| x.is_finite()));
        assert!(error(&exact) < 1e-5, "{n_ff}: {}", error(&exact));
        assert!(error(&rounded) < 0.05, "{n_ff}: {}", error(&rounded));
        assert_eq!(rounded, logits(&halves, 1, false), "{n_ff}");
    }
}
