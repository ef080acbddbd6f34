//! Every mask: its keys and its logits against plain definitions, and what must not change bits.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use qkov::attention::Attention;
use qkov::cpu::{Observer, Seen};
use qkov::engine::{CacheType, Threads};
use qkov::gguf::{Bytes, Gguf};
use qkov::mask::{Choice, Kind, MASKS, Visible};
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::family;
use crate::tiny::{N_VOCAB, Tiny};

/// Whether a query sees a key, by definition; `p` are the mask's parameters.
fn sees(name: &str, p: &[usize], query: usize, key: usize, prompt: &Range<usize>) -> bool {
    let both = prompt.contains(&query) && prompt.contains(&key);
    let causal = key <= query;
    match name {
        "causal" | "repeat" => causal,
        "prefix" => causal || both,
        "sink-prefix" => causal || both && query >= p[0],
        "window" => causal && query - key < p[0],
        "sinks-window" => causal && (key < p[0] || query - key < p[1]),
        "blocks" => causal || both && (query - prompt.start) / p[0] == (key - prompt.start) / p[0],
        "blind" => query.is_multiple_of(3) && causal,
        name => panic!("{name} has no definition here"),
    }
}

/// A mask of the registry with values for its parameters.
fn with(kind: &Kind, values: &[usize]) -> String {
    let pairs = kind.params.iter().zip(values).map(|(p, v)| format!("{}={v}", p.name));
    format!("{}:{}", kind.name, pairs.collect::<Vec<_>>().join(","))
}

#[test]
fn keys_are_those_of_the_definitions() {
    let prompts = [0..0, 0..1, 0..20, 5..30, 17..18];
    for kind in MASKS {
        assert!(!kind.what.is_empty() && !kind.paper.is_empty(), "{}", kind.name);
        for values in [[1, 1], [1, 3], [3, 1], [8, 7], [40, 100]] {
            let text = with(kind, &values);
            let mask = Choice::parse(&text).unwrap();
            assert_eq!(Choice::parse(&mask.text()).unwrap().text(), mask.text());
            let cases = prompts.iter().flat_map(|p| [None, Some(1), Some(5)].map(|w| (p, w)));
            // Miri takes a thousand times as long for each.
            let queries = || (0..40).step_by(if cfg!(miri) { 13 } else { 1 });
            for ((prompt, window), query) in cases.flat_map(|c| queries().map(move |q| (c, q))) {
                let visible = mask.visible(query, prompt, window);
                let expected = |key: usize| {
                    let near = window.is_none_or(|n: usize| query.abs_diff(key) < n);
                    near && sees(kind.name, &values, query, key, prompt)
                };
                let n = (0..50).filter(|key| expected(*key)).count();
                assert!(
                    visible.contains(query) && visible.len() == n,
                    "{text} {query} {visible:?}"
                );
                for key in 0..50 {
                    let here = visible.contains(key);
                    assert_eq!(here, expected(key), "{text} {query} {key} {prompt:?} {window:?}");
                }
            }
        }
    }
}

/// The forward pass of [`Tiny::llama`] in `f64`, for every token.
fn plain(tiny: &Tiny, tokens: &[u32], sees: &dyn Fn(usize, usize, usize) -> bool) -> Vec<Vec<f64>> {
    let floats = |data: &[u8]| -> Vec<f64> {
        data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b).into()).collect()
    };
    let tensors: HashMap<&str, Vec<f64>> =
        tiny.tensors.iter().map(|t| (&t.name[..], floats(&t.data))).collect();
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let product = |name: &str, x: &[f64]| -> Vec<f64> {
        tensors[name].chunks(x.len()).map(|row| dot(row, x)).collect()
    };
    let norm = |name: &str, x: &[f64]| -> Vec<f64> {
        let scale = 1.0 / (dot(x, x) / x.len() as f64 + f64::from(1e-5f32)).sqrt();
        x.iter().zip(&tensors[name]).map(|(x, w)| x * scale * w).collect()
    };
    let rotate = |position: usize, mut x: Vec<f64>| {
        for head in x.chunks_mut(4) {
            for i in 0..2 {
                let angle = position as f64 * 10_000f64.powf(-(i as f64) / 2.0);
                let (a, b) = (head[2 * i], head[2 * i + 1]);
                head[2 * i] = a * angle.cos() - b * angle.sin();
                head[2 * i + 1] = a * angle.sin() + b * angle.cos();
            }
        }
        x
    };
    let add = |x: &mut Vec<f64>, y: Vec<f64>| x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    let embd = tensors["token_embd.weight"].chunks(8);
    let rows: Vec<Vec<f64>> = embd.map(<[f64]>::to_vec).collect();
    let mut xs: Vec<Vec<f64>> = tokens.iter().map(|t| rows[*t as usize].clone()).collect();
    for layer in 0..2 {
        let name = |part: &str| format!("blk.{layer}.{part}.weight");
        let each = |part: &str| -> Vec<Vec<f64>> {
            xs.iter().map(|x| product(&name(part), &norm(&name("attn_norm"), x))).collect()
        };
        let rotated = |rows: Vec<Vec<f64>>| -> Vec<Vec<f64>> {
            rows.into_iter().enumerate().map(|(p, x)| rotate(p, x)).collect()
        };
        let (q, k, v) = (rotated(each("attn_q")), rotated(each("attn_k")), each("attn_v"));
        for (query, x) in xs.iter_mut().enumerate() {
            let mut heads = vec![0.0; 8];
            for (q, out) in q[query].chunks(4).zip(heads.chunks_mut(4)) {
                let keys: Vec<usize> = (0..k.len()).filter(|k| sees(layer, query, *k)).collect();
                let weights = keys.iter().map(|key| (dot(q, &k[*key]) / 2.0).exp());
                let sum: f64 = weights.clone().sum();
                for (key, weight) in keys.iter().zip(weights) {
                    out.iter_mut().zip(&v[*key]).for_each(|(out, v)| *out += weight / sum * v);
                }
            }
            add(x, product(&name("attn_output"), &heads));
            let normed = norm(&name("ffn_norm"), x);
            let (gate, up) =
                (product(&name("ffn_gate"), &normed), product(&name("ffn_up"), &normed));
            let inner: Vec<f64> =
                gate.iter().zip(up).map(|(g, up)| g / (1.0 + (-g).exp()) * up).collect();
            add(x, product(&name("ffn_down"), &inner));
        }
    }
    xs.iter().map(|x| product("token_embd.weight", &norm("output_norm.weight", x))).collect()
}

fn tiny_model() -> Model {
    Model::from_gguf(Gguf::parse(Bytes::from(Tiny::llama().bytes())).unwrap()).unwrap()
}

fn rebind(model: &mut Model) {
    let layers = model.plan.layers.iter().enumerate();
    let bind = |(i, layer): (usize, &qkov::plan::LayerPlan)| {
        Attention::new(&model.hparams, i, layer.clone())
    };
    model.attention = layers.map(bind).collect();
}

fn session(model: &Arc<Model>, n_threads: usize, cache: CacheType, exact: bool) -> Session {
    let n_threads = Threads { one: n_threads, batch: n_threads };
    let cache = (cache, cache);
    let options = Options { n_ctx: Some(1024), n_threads, cache, exact, ..Options::default() };
    Session::new(model.clone(), &options).unwrap()
}

/// Tokens before a prompt, of a prompt, and after it.
const PARTS: [usize; 3] = [5, 340, 12];

/// Whether, in a layer, a query sees a key, given a prompt.
type Sees<'a> = &'a dyn Fn(usize, usize, usize, &Range<usize>) -> bool;

/// Largest difference between logits of the engine and the plain definition, after the prompt and
/// after each token that follows it, and between that definition and the causal one.
fn errors(model: Model, sees: Sees) -> [f64; 2] {
    let model = Arc::new(model);
    let n: usize = PARTS.iter().sum();
    let tokens: Vec<u32> = (0..n).map(|i| (i * i * 31 % 255) as u32).collect();
    let (before, rest) = tokens.split_at(PARTS[0]);
    let (prompt, after) = rest.split_at(PARTS[1]);
    let mut session = session(&model, 2, CacheType::F32, true);
    session.feed(before).unwrap();
    session.feed_prompt(prompt).unwrap();
    let mut logits = session.logits().to_vec();
    let range = before.len()..session.tokens().len();
    for token in after {
        session.feed(&[*token]).unwrap();
        logits.extend_from_slice(session.logits());
    }
    let read = session.tokens();
    let expected = plain(&Tiny::llama(), read, &|l, q, k| sees(l, q, k, &range));
    let causal = plain(&Tiny::llama(), read, &|_, q, k| k <= q);
    let mut worst = [0.0f64; 2];
    for (i, logits) in logits.chunks(N_VOCAB).enumerate() {
        let at = range.end - 1 + i;
        for ((x, y), z) in logits.iter().zip(&expected[at]).zip(&causal[at]) {
            assert!(x.is_finite());
            worst[0] = worst[0].max((f64::from(*x) - y).abs());
            worst[1] = worst[1].max((y - z).abs());
        }
    }
    worst
}

#[test]
fn logits_are_those_of_the_definitions() {
    for kind in MASKS {
        // Few keys; more than one task of a single token.
        for values in [[3, 9], [270, 20], [6, 270]] {
            let text = with(kind, &values);
            let seen = |q, k, prompt: &_| sees(kind.name, &values, q, k, prompt);
            let mut model = tiny_model();
            model.set_masks(&text).unwrap();
            let [error, change] = errors(model, &|_, q, k, prompt| seen(q, k, prompt));
            println!("{text}: error {error:.1e}, change from causal {change:.1e}");
            assert!(error < 1e-6, "{text}: {error:e}");
            let is_causal = ["causal", "repeat"].contains(&kind.name);
            assert!(is_causal == (change == 0.0), "{text}: {change:e}");
            assert!(is_causal || change > 1e-5, "{text}: {change:e}");
            if kind.copies > 1 {
                continue;
            }
            // In one layer, which was trained with a window.
            let mut model = tiny_model();
            model.hparams.layers[1].window = Some(150);
            model.set_masks(&format!("*=causal;1={text}")).unwrap();
            let [error, _] = errors(model, &|layer, q, k, prompt| match layer {
                0 => k <= q,
                _ => q.abs_diff(k) < 150 && seen(q, k, prompt),
            });
            assert!(error < 1e-6, "{text} in one layer: {error:e}");
        }
    }
}

static BLIND: Kind = Kind {
    name: "blind",
    what: "nothing but for every third query",
    paper: "",
    params: &[],
    copies: 1,
    visible: |_, position, _| {
        Visible::one(0..if position.is_multiple_of(3) { position + 1 } else { 0 })
    },
};

/// All but the first queries see nothing, so that whole blocks see nothing.
static NIGHT: Kind = Kind {
    visible: |_, position, _| Visible::one(0..if position < 20 { position + 1 } else { 0 }),
    ..BLIND
};

#[test]
fn without_keys_attention_is_zero() {
    let blinded = |mut model: Model, kind: &'static Kind| {
        model.plan.layers.iter_mut().for_each(|layer| layer.mask = Choice::of(kind));
        rebind(&mut model);
        model
    };
    let [error, _] =
        errors(blinded(tiny_model(), &BLIND), &|_, q, k, p| sees("blind", &[], q, k, p));
    assert!(error < 1e-6, "{error:e}");
    let [error, _] = errors(blinded(tiny_model(), &NIGHT), &|_, q, k, _| q < 20 && k <= q);
    assert!(error < 1e-6, "{error:e}");
    for kind in [&BLIND, &NIGHT] {
        let (model, tokens) = trained();
        let model = Arc::new(blinded(model, kind));
        for cache in CacheType::ALL {
            let run = |n| {
                let mut session = session(&model, 2, cache, false);
                let pieces = tokens[..90].chunks(n);
                pieces.flat_map(|t| bits(session.feed_wanting(t, 0..t.len()).unwrap())).collect()
            };
            let whole: Vec<u32> = run(90);
            assert!(whole.iter().all(|x| f32::from_bits(*x).is_finite()), "{cache:?}");
            assert!(whole == run(1), "{cache:?}");
        }
    }
}

/// A trained model, and tokens.
fn trained() -> (Model, Vec<u32>) {
    let model = family::softmax();
    let text = "The fox went down to the river, and the river was cold and wide. ".repeat(25);
    let tokens = model.tokenizer.encode(&text, false, false).unwrap();
    (model, tokens[..340].to_vec())
}

/// The trained model with these masks.
fn masked(masks: &str) -> Arc<Model> {
    let mut model = trained().0;
    model.set_masks(masks).unwrap();
    Arc::new(model)
}

fn bits(logits: &[f32]) -> Vec<u32> {
    logits.iter().map(|x| x.to_bits()).collect()
}

/// Logits after a prompt, and after each of the tokens that follow it, fed `n` at a time.
fn run(session: &mut Session, prompt: &[u32], after: &[u32], n: usize) -> Vec<u32> {
    session.feed_prompt(prompt).unwrap();
    let mut out = bits(session.logits());
    for tokens in after.chunks(n) {
        out.extend(bits(session.feed_wanting(tokens, 0..tokens.len()).unwrap()));
    }
    out
}

/// Each mask with parameters that matter in 340 tokens: few keys, and, for tokens alone, many.
fn each_mask(check: impl Fn(&'static Kind, &str)) {
    for kind in MASKS {
        check(kind, &with(kind, &[7, 30]));
        if !kind.params.is_empty() {
            check(kind, &with(kind, &[270, 270]));
        }
    }
}

/// Looks at every second layer, for weights of hidden keys.
struct EverySecond<'a>(&'a Model);

impl Observer for EverySecond<'_> {
    fn wants(&self, layer: usize) -> bool {
        layer % 2 == 1
    }

    fn see(&self, seen: &Seen) {
        let rows = seen.scores.chunks(seen.n_keys).zip(seen.weights.chunks(seen.n_keys));
        for (t, (scores, weights)) in rows.enumerate() {
            // Those after the prompt; what it sees itself is compared elsewhere.
            let position = seen.position + t;
            let visible = self.0.attention[seen.layer].visible(position, &(0..0));
            for key in (0..seen.n_keys).filter(|_| seen.position > 0) {
                let hidden = scores[key] == f32::NEG_INFINITY;
                assert_eq!(hidden, !visible.contains(key));
                assert!(weights[key] == 0.0 || !hidden);
            }
        }
    }
}

#[test]
fn pieces_and_threads_give_the_same_bits() {
    let tokens = trained().1;
    let (prompt, after) = tokens.split_at(330);
    each_mask(|_, text| {
        let model = masked(text);
        for cache in [CacheType::F16, CacheType::Q8_0] {
            let new = |n_threads| session(&model, n_threads, cache, false);
            let whole = run(&mut new(1), prompt, after, 100);
            assert!(whole == run(&mut new(2), prompt, after, 1), "{text} {cache:?}");
            let mut steps = new(2);
            assert!(steps.become_tokens(prompt, &after[..4], &mut |_| true).unwrap());
            let n = steps.logits().len();
            assert!(bits(steps.logits()) == whole[4 * n..5 * n], "{text} {cache:?} in steps");
            let mut observed = new(2);
            observed.feed_prompt_observed(prompt, &EverySecond(&model)).unwrap();
            assert!(bits(observed.logits()) == whole[..n], "{text} {cache:?} observed");
            let last = observed.feed_observed(after, 9..10, &EverySecond(&model)).unwrap();
            assert!(bits(last) == whole[10 * n..], "{text} {cache:?} observed alone");
        }
    });
}

#[test]
fn limits_are_other_masks() {
    let tokens = trained().1;
    let bits_of = |masks: &str, prompt: usize| {
        let (prompt, after) = tokens.split_at(prompt);
        run(&mut session(&masked(masks), 2, CacheType::F16, false), prompt, after, 7)
    };
    for (a, b, prompt) in [
        ("prefix", "causal", 1),
        ("blocks:n=1", "causal", 300),
        ("blocks:n=300", "prefix", 300),
        ("sink-prefix:sinks=300", "causal", 300),
        ("sink-prefix:sinks=0", "prefix", 300),
        ("window:n=340", "causal", 300),
        ("sinks-window:sinks=40,n=300", "causal", 300),
        ("sinks-window:sinks=0,n=50", "window:n=50", 300),
        ("prefix;0-2=window;*=causal", "causal", 300),
        ("0-1=window:n=9;2-3=window:n=9", "window:n=9", 300),
    ] {
        assert!(bits_of(a, prompt) == bits_of(b, prompt), "{a} is not {b}");
    }
    // A prompt twice is another prompt; the token that begins texts is not repeated.
    let bos = [trained().0.tokenizer.bos().unwrap()];
    let (once, after) = tokens.split_at(100);
    for bos in [&bos[..], &[]] {
        let mut causal = session(&masked("causal"), 2, CacheType::F16, false);
        let mut repeat = session(&masked("repeat"), 2, CacheType::F16, false);
        let twice = run(&mut causal, &[bos, once, once].concat(), after, 7);
        assert!(twice == run(&mut repeat, &[bos, once].concat(), after, 7));
        assert_eq!(repeat.tokens(), causal.tokens());
    }
}

#[test]
fn timelines_that_change_are_read_as_if_new() {
    let tokens = trained().1;
    let (prompt, reply, more) = (&tokens[..270], &tokens[270..280], &tokens[280..]);
    each_mask(|kind, text| {
        let model = masked(text);
        let new = || session(&model, 2, CacheType::F16, false);
        let mut fresh = new();
        run(&mut fresh, prompt, reply, 1);
        let second = run(&mut fresh, more, &[], 1);
        let expect = |session: &Session, expected: &[u32], what: &str| {
            assert!(bits(session.logits()) == expected, "{text}: {what}");
        };
        let mut session = new();
        let go = |session: &mut Session, prompt: &[u32], reply: &[u32]| {
            let n = session.n_positions(prompt, reply);
            assert!(session.become_tokens(prompt, reply, &mut |_| true).unwrap());
            assert_eq!(session.tokens().len(), n, "{text}");
        };
        run(&mut session, prompt, reply, 1);
        go(&mut session, &tokens, &[]);
        expect(&session, &second, "a second prompt");
        go(&mut session, &tokens, &[]);
        expect(&session, &second, "the same again");
        // Another end of the second prompt.
        let short = &tokens[..tokens.len() - 9];
        go(&mut session, short, &[]);
        let mut fresh = new();
        run(&mut fresh, prompt, reply, 1);
        expect(&session, &run(&mut fresh, &more[..more.len() - 9], &[], 1), "a shorter prompt");
        // A prompt that ends in the middle of the first one, and a reply.
        go(&mut session, &prompt[..200], reply);
        let fresh = run(&mut new(), &prompt[..200], reply, 10);
        expect(&session, &fresh[fresh.len() - session.logits().len()..], "a cut prompt");

        // Cut, a prompt is gone if its tokens saw each other.
        let (start, end) = (session.tokens().len(), prompt.len());
        session.feed_prompt(prompt).unwrap();
        session.rewind(start + end / 2);
        let is_whole = ["prefix", "sink-prefix", "blocks", "repeat"].contains(&kind.name);
        let kept = if is_whole { start } else { start + end / 2 };
        assert_eq!(session.tokens().len(), kept, "{text}");

        // Stopped after a step, then read after all.
        let mut stopped = new();
        stopped.become_tokens(&tokens, &[], &mut |_| false).unwrap();
        go(&mut stopped, &tokens, &[]);
        expect(&stopped, &run(&mut new(), &tokens, &[], 1), "a stopped prompt");
    });
}

#[test]
fn wrong_masks_are_refused() {
    for (text, expected) in [
        ("cuasal", "mask \"cuasal\" is not known; known: causal; prefix; sink-prefix: sinks (def"),
        ("causal:n=3", "mask causal has no parameter \"n\"; it has none"),
        (
            "window:w=3",
            "mask window has no parameter \"w\"; it has n (default 256, whole numbers 1 t",
        ),
        ("window:n=0", "mask window: n = 0; allowed whole numbers 1 to 1000000000"),
        ("window:n=2.5", "n = 2.5; allowed whole numbers 1 to 1000000000"),
        ("window:n=-1", "n = -1; allowed whole numbers"),
        ("sinks-window:n=NaN", "n = NaN; allowed whole numbers"),
        ("blocks:n", "mask blocks: \"n\" is not key=value"),
        ("6=window", "layer \"6\"; allowed *, numbers 0 to 3"),
        ("0.1=window:n=3", "mask window:n=3: heads \"1\"; all heads of a layer have one mask"),
        ("0.*=window", "mask window: heads \"*\""),
        (
            "0-2=repeat",
            "mask repeat is how a prompt is read, for all layers or none; layer 3 has causal",
        ),
        (
            "repeat;3=window:n=9",
            "mask repeat is how a prompt is read, for all layers or none; layer 3 has window:n=9",
        ),
    ] {
        let mut model = trained().0;
        let Err(error) = model.set_masks(text) else { panic!("{text}: accepted") };
        let error = error.to_string();
        assert!(error.contains(expected), "{text}: {error}");
        assert_eq!(model.plan.names()[2], "causal", "{text} left a trace");
    }
    let mut model = trained().0;
    model.set_masks("0=window:n=64;2=blocks:n=64;3=repeat;3=sinks-window:n=9").unwrap();
    assert_eq!(model.plan.names()[2], "window:n=64+causal+blocks+sinks-window:n=9");
    let mut session = session(&masked("repeat"), 1, CacheType::F16, false);
    let error = session.feed_prompt(&vec![5; 600]).unwrap_err().to_string();
    assert_eq!(error, "1200 tokens do not fit a context of 1024");
}
