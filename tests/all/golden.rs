//! Models against Hugging Face `transformers`: `tests/golden/arch.py` and `families.py` describe the
//! files, and `normalizers.py` those of a model whose softmax is replaced.

use std::path::Path;
use std::sync::Arc;

use qkov::arch::ARCHS;
use qkov::engine::{CacheType, Threads};
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::embed::encoders;

pub struct Golden {
    pub name: String,
    pub model: Arc<Model>,
    pub tokens: Vec<u32>,
    /// Indices into `tokens`.
    pub positions: Vec<usize>,
    /// After each of the positions. `[positions, n_vocab]`
    pub logits: Vec<f32>,
    /// What follows the tokens greedily.
    follow: Vec<u32>,
}

pub const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

pub fn goldens() -> Vec<Golden> {
    let model = |name: &str| Model::open(&Path::new(FOLDER).join(format!("{name}.gguf"))).unwrap();
    ["arch.bin", "families.bin", "experts.bin"]
        .into_iter()
        .flat_map(|file| records(file, model))
        .collect()
}

/// The first model, with each of some normalizers.
fn swapped() -> Vec<Golden> {
    records("normalizers.bin", |name| {
        let mut model = Model::open(&Path::new(FOLDER).join("llama.gguf")).unwrap();
        model.set_normalizers(name).unwrap();
        model
    })
}

pub fn records(file: &str, model: impl Fn(&str) -> Model) -> Vec<Golden> {
    let file = std::fs::read(Path::new(FOLDER).join(file)).unwrap();
    let mut rest = &file[..];
    let mut take = |n: usize| {
        let (head, tail) = rest.split_at(n);
        rest = tail;
        (head, tail.is_empty())
    };
    let u32s = |bytes: &[u8]| -> Vec<u32> {
        bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
    };
    let mut out = Vec::new();
    loop {
        let sizes = u32s(take(20).0);
        let &[n_name, n_tokens, n_positions, n_vocab, n_follow] = &sizes[..] else {
            unreachable!()
        };
        let name = String::from_utf8(take(n_name as usize).0.to_vec()).unwrap();
        let mut numbers = |n: u32| u32s(take(4 * n as usize).0);
        let tokens = numbers(n_tokens);
        let positions = numbers(n_positions).into_iter().map(|p| p as usize).collect();
        let logits = numbers(n_positions * n_vocab).into_iter().map(f32::from_bits).collect();
        let (follow, end) = take(4 * n_follow as usize);
        let follow = u32s(follow);
        let model = Arc::new(model(&name));
        assert_eq!(model.hparams.n_vocab, n_vocab as usize, "{name}");
        out.push(Golden { name, model, tokens, positions, logits, follow });
        if end {
            return out;
        }
    }
}

impl Golden {
    fn session(&self, cache: CacheType, n_threads: usize) -> Session {
        self.open(cache, n_threads, false)
    }

    /// One whose activations are never rounded.
    pub fn exact(&self, cache: CacheType) -> Session {
        self.open(cache, 2, true)
    }

    fn open(&self, cache: CacheType, n_threads: usize, exact: bool) -> Session {
        let options = Options {
            // Divisors of frequencies may depend on it.
            n_ctx: Some(self.tokens.len() + self.follow.len()),
            n_threads: Threads { one: n_threads, batch: n_threads },
            cache: (cache, cache),
            exact,
            ..Options::default()
        };
        Session::new(self.model.clone(), &options).unwrap()
    }

    /// Feeds the tokens from the session's end on, `n` at a time, and returns all their logits.
    pub fn feed(&self, session: &mut Session, n: usize) -> Vec<f32> {
        let mut logits = Vec::new();
        for tokens in self.tokens[session.tokens().len()..].chunks(n) {
            logits.extend_from_slice(session.feed_wanting(tokens, 0..tokens.len()).unwrap());
        }
        logits
    }

    /// KL divergence from the golden logits and their largest error, the worst of all positions.
    pub fn distance(&self, logits: &[f32]) -> [f64; 2] {
        let n_vocab = self.model.hparams.n_vocab;
        let mut worst = [0.0f64; 2];
        for (golden, position) in self.logits.chunks(n_vocab).zip(&self.positions) {
            let ours = &logits[position * n_vocab..(position + 1) * n_vocab];
            let (p, q) = (log_softmax(golden), log_softmax(ours));
            let kl = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
            let errors = golden.iter().zip(ours).map(|(a, b)| f64::from((a - b).abs()));
            // Unlike `max`, this keeps a NaN.
            let max = |a: f64, b: f64| if a >= b { a } else { b };
            worst = [max(worst[0], kl), errors.fold(worst[1], max)];
        }
        worst
    }
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = f64::from(logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x)));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - max).exp()).sum();
    logits.iter().map(|x| f64::from(*x) - max - sum.ln()).collect()
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn every_architecture_has_a_golden_model() {
    let (goldens, encoders) = (goldens(), encoders());
    for arch in ARCHS {
        let models = goldens.iter().map(|g| &g.model).chain(encoders.iter().map(|e| &e.model));
        let found = models.into_iter().any(|model| model.hparams.arch == arch.name);
        assert!(found, "{} has no golden model", arch.name);
    }
    let models = goldens.iter().map(|g| (&g.name, &g.model));
    for (name, model) in models.chain(encoders.iter().map(|e| (&e.name, &e.model))) {
        assert!(model.warnings.is_empty(), "{name}: {:?}", model.warnings);
    }
}

#[test]
fn logits_are_those_of_transformers() {
    for g in goldens() {
        for (cache, bounds) in [(CacheType::F32, [1e-9, 1e-4]), (CacheType::F16, [1e-4, 5e-2])] {
            let [kl, error] = g.distance(&g.feed(&mut g.exact(cache), 512));
            println!("{} {cache:?}: KL {kl:.1e}, largest error {error:.1e}", g.name);
            assert!(kl < bounds[0] && error < bounds[1], "{} {cache:?}: {kl:e} {error:e}", g.name);
            // Rounded to 8 bits, activations lose about what a weight in Q8_0 has lost.
            let [kl, _] = g.distance(&g.feed(&mut g.session(cache, 2), 512));
            assert!(kl < 1e-2, "{} {cache:?}, rounded: {kl:e}", g.name);
        }
    }
}

#[test]
fn logits_with_other_normalizers_are_those_of_their_definitions() {
    for g in swapped() {
        let [kl, error] = g.distance(&g.feed(&mut g.exact(CacheType::F32), 512));
        println!("{}: KL {kl:.1e}, largest error {error:.1e}", g.name);
        assert!(kl < 1e-9 && error < 1e-4, "{}: {kl:e} {error:e}", g.name);
        // Alone, tokens read only the values that have a weight.
        let whole = bits(&g.feed(&mut g.session(CacheType::F16, 2), 512));
        assert!(whole == bits(&g.feed(&mut g.session(CacheType::F16, 2), 1)), "{}", g.name);
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    for g in goldens() {
        let mut session = g.exact(CacheType::F32);
        session.feed(&g.tokens).unwrap();
        for (i, golden) in g.follow.iter().enumerate() {
            let best = session.logits().iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
            let best = best.unwrap().0 as u32;
            assert_eq!(best, *golden, "{} token {i}", g.name);
            session.feed(&[best]).unwrap();
        }
    }
}

#[test]
fn any_pieces_and_threads_give_the_same_bits() {
    for g in goldens() {
        for cache in [CacheType::F32, CacheType::F16] {
            let whole = bits(&g.feed(&mut g.session(cache, 1), 512));
            for (n, n_threads) in [(512, 2), (1, 1), (1, 2), (7, 2)] {
                let pieces = bits(&g.feed(&mut g.session(cache, n_threads), n));
                assert!(pieces == whole, "{} {cache:?} by {n} on {n_threads} threads", g.name);
            }
        }
    }
}

#[test]
fn a_rewound_session_gives_the_same_bits() {
    for g in goldens() {
        let n_vocab = g.model.hparams.n_vocab;
        for cache in [CacheType::F32, CacheType::F16] {
            let mut session = g.session(cache, 1);
            // What was read before must leave no trace.
            let other: Vec<u32> = g.tokens.iter().rev().copied().collect();
            session.feed(&other).unwrap();
            session.rewind(0);
            let whole = bits(&g.feed(&mut session, 512));
            let fresh = bits(&g.feed(&mut g.session(cache, 1), 512));
            assert!(whole == fresh, "{} {cache:?} rewound to 0", g.name);
            for (kept, n) in [(g.tokens.len() / 3, 512), (g.tokens.len() - 5, 1)] {
                session.rewind(kept);
                let again = bits(&g.feed(&mut session, n));
                assert!(again == whole[kept * n_vocab..], "{} {cache:?} rewound to {kept}", g.name);
            }
        }
    }
}
