//! Embeddings of texts: encoders against Hugging Face `transformers`, as `tests/golden/encoders.py`
//! describes the files, and decoders against their own logits.

use std::path::Path;
use std::sync::Arc;

use qkov::arch::Pooling;
use qkov::engine::{CacheType, Threads};
use qkov::gguf;
use qkov::measure::record::record;
use qkov::model::Model;
use qkov::normalizer::NORMALIZERS;
use qkov::session::{Options, Session, embed};
use serde_json::Value;

use crate::cli::{code_and_text, error, ok};
use crate::families::with_key;
use crate::golden::{FOLDER, goldens};

pub struct Encoder {
    pub name: String,
    pub model: Arc<Model>,
    text: String,
    pub tokens: Vec<u32>,
    /// Of all tokens. `[tokens, n_embd]`
    states: Vec<f32>,
    mean: Vec<f32>,
}

fn path(name: &str) -> String {
    format!("{FOLDER}/{name}.gguf")
}

fn open(name: &str) -> Model {
    Model::open(Path::new(&path(name))).unwrap()
}

/// Every encoder with every text.
pub fn encoders() -> Vec<Encoder> {
    let file = std::fs::read(format!("{FOLDER}/encoders.bin")).unwrap();
    let mut rest = &file[..];
    let mut out = Vec::new();
    while !rest.is_empty() {
        let mut take = |n: usize| {
            let (head, tail) = rest.split_at(n);
            rest = tail;
            head.to_vec()
        };
        let numbers = |bytes: Vec<u8>| -> Vec<u32> {
            bytes.chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect()
        };
        let floats = |bytes| numbers(bytes).into_iter().map(f32::from_bits).collect();
        let sizes: Vec<usize> = numbers(take(16)).into_iter().map(|n| n as usize).collect();
        let [name, text] = [0, 1].map(|i| String::from_utf8(take(sizes[i])).unwrap());
        out.push(Encoder {
            model: Arc::new(open(&name)),
            name,
            text,
            tokens: numbers(take(4 * sizes[2])),
            states: floats(take(4 * sizes[2] * sizes[3])),
            mean: floats(take(4 * sizes[3])),
        });
    }
    out
}

fn session(model: Arc<Model>, cache: CacheType, n_threads: usize, exact: bool) -> Session {
    let n_threads = Threads { one: n_threads, batch: n_threads };
    let options = Options { n_threads, cache: (cache, cache), exact, ..Options::default() };
    Session::new(model, &options).unwrap()
}

fn exact(model: Model) -> Session {
    session(Arc::new(model), CacheType::F32, 2, true)
}

/// The largest difference.
fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    // Unlike `max`, this keeps a NaN.
    let max = |m: f32, x: f32| if m >= x { m } else { x };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, max)
}

#[test]
fn embeddings_are_those_of_transformers() {
    for e in encoders() {
        let case = format!("{} \"{}\"", e.name, e.text);
        assert_eq!(e.model.tokenizer.encode(&e.text, true, false).unwrap(), e.tokens, "{case}");
        let n = e.model.hparams.n_embd;
        let poolings = [
            (Pooling::None, &e.states[..]),
            (Pooling::Mean, &e.mean),
            (Pooling::Cls, &e.states[..n]),
            (Pooling::Last, &e.states[e.states.len() - n..]),
        ];
        for (cache, is_exact, bound) in [
            (CacheType::F32, true, 5e-6),
            (CacheType::F16, true, 5e-3),
            (CacheType::F16, false, 5e-3),
            (CacheType::Q8_0, false, 0.1),
        ] {
            let mut session = session(e.model.clone(), cache, 2, is_exact);
            for (pooling, golden) in poolings {
                let far = distance(&session.embed(&e.tokens, pooling).unwrap(), golden);
                println!("{case} {} {}: {far:.1e}", cache.name(), pooling.name());
                assert!(far < bound, "{case} {} {}: {far:e}", cache.name(), pooling.name());
                assert!(session.tokens().is_empty());
            }
        }
    }
}

#[test]
fn files_say_how_texts_are_pooled_and_read() {
    for (name, pooling) in [("bert", Pooling::Mean), ("nomic-bert", Pooling::Cls)] {
        let model = open(name);
        assert_eq!((model.hparams.pooling(), model.hparams.causal), (pooling, false), "{name}");
        assert_eq!(model.plan.names()[2], "prefix", "{name}");
    }
    let hparams = open("llama").hparams;
    assert_eq!((hparams.pooling, hparams.pooling()), (None, Pooling::Last));
}

/// A decoder whose file says that tokens see those that follow is read as one with the mask `prefix`.
#[test]
fn decoders_may_look_both_ways() {
    let tokens: Vec<u32> = (20..40).collect();
    let gguf = &open("llama").gguf;
    let key = |name: &str, value| with_key(gguf, &format!("llama.{name}"), Some(value)).unwrap();
    let model = key("attention.causal", gguf::Value::Bool(false));
    assert_eq!((model.hparams.pooling(), &model.plan.names()[2][..]), (Pooling::Mean, "prefix"));
    let text = model.hparams.must_predict().unwrap_err().to_string();
    assert!(text.contains("attention.causal = false") && text.contains("llama"), "{text}");
    let mut prefix = open("llama");
    prefix.set_masks("prefix").unwrap();
    let [mut ours, mut theirs] = [model, prefix].map(exact);
    let states = ours.embed(&tokens, Pooling::None).unwrap();
    assert_eq!(states, theirs.embed(&tokens, Pooling::None).unwrap());
    assert!(distance(&states, &exact(open("llama")).embed(&tokens, Pooling::None).unwrap()) > 0.1);
    // Tokens that are fed together are a prompt then.
    ours.feed(&tokens).unwrap();
    theirs.feed_prompt(&tokens).unwrap();
    assert_eq!(ours.logits(), theirs.logits());
    let rank = key("pooling_type", gguf::Value::U32(4));
    assert_eq!(rank.hparams.pooling(), Pooling::Rank);
    assert_eq!(key("pooling_type", gguf::Value::U32(1)).hparams.pooling(), Pooling::Mean);
}

#[test]
fn any_threads_and_texts_before_give_the_same_bits() {
    for e in encoders() {
        let one =
            session(e.model.clone(), CacheType::F16, 1, false).embed(&e.tokens, Pooling::None);
        let mut two = session(e.model.clone(), CacheType::F16, 2, false);
        let other: Vec<u32> = e.tokens.iter().rev().chain(&e.tokens).copied().collect();
        two.embed(&other, Pooling::Mean).unwrap();
        assert_eq!(one.unwrap(), two.embed(&e.tokens, Pooling::None).unwrap(), "{}", e.name);
    }
}

/// A decoder's states are what its output makes logits of.
#[test]
fn states_of_decoders_make_their_logits() {
    for g in goldens() {
        let (hp, output) = (&g.model.hparams, g.model.output.as_ref().unwrap());
        let mut session = g.exact(CacheType::F32);
        let states = session.embed(&g.tokens, Pooling::None).unwrap();
        let rows: Vec<&[f32]> = states.chunks(hp.n_embd).collect();
        let last = session.embed(&g.tokens, Pooling::Last).unwrap();
        assert_eq!(last, *rows.last().unwrap(), "{}", g.name);
        let mut weights = vec![0.0f32; hp.n_embd];
        for (golden, position) in g.logits.chunks(hp.n_vocab).zip(&g.positions) {
            for (token, golden) in golden.iter().enumerate() {
                output.format.dequantize(output.row(token), &mut weights);
                let products = weights.iter().zip(rows[*position]).map(|(w, x)| w * x);
                let logit = products.sum::<f32>() * hp.logit_scale;
                let logit = hp.final_softcap.map_or(logit, |cap| cap * (logit / cap).tanh());
                assert!((logit - golden).abs() < 1e-3, "{}: {logit}, not {golden}", g.name);
            }
        }
    }
}

/// With the mask `repeat`, a text is read twice, and its second copy pooled.
#[test]
fn repeated_texts_are_pooled_over_the_last_copy() {
    let tokens: Vec<u32> = (20..32).collect();
    let mut model = open("llama");
    let twice = exact(open("llama")).embed(&tokens.repeat(2), Pooling::None).unwrap();
    model.set_masks("repeat").unwrap();
    let mut session = exact(model);
    let n = session.model().hparams.n_embd;
    let second = &twice[tokens.len() * n..];
    assert_eq!(session.embed(&tokens, Pooling::None).unwrap(), second);
    assert_eq!(session.embed(&tokens, Pooling::Cls).unwrap(), second[..n]);
    assert_eq!(session.embed(&tokens, Pooling::Last).unwrap(), second[second.len() - n..]);
}

#[test]
fn masks_and_normalizers_change_an_encoder() {
    let e = &encoders()[1];
    let embed = |norm: &str, mask: &str| {
        let mut model = open("bert");
        model.set_normalizers(norm).unwrap();
        model.set_masks(mask).unwrap();
        exact(model).embed(&e.tokens, Pooling::None).unwrap()
    };
    let n = e.model.hparams.n_embd;
    let causal = embed("softmax", "causal");
    assert!(distance(&causal, &e.states) > 0.1);
    // What a token sees under a causal mask does not depend on those that follow.
    let mut model = open("bert");
    model.set_masks("causal").unwrap();
    let first = exact(model).embed(&e.tokens[..7], Pooling::None).unwrap();
    assert!(distance(&first, &causal[..7 * n]) < 1e-5);
    for kind in NORMALIZERS {
        let states = embed(kind.name, "prefix");
        assert!(states.iter().all(|x| x.is_finite()), "{}", kind.name);
    }
    assert!(distance(&embed("sparsemax", "prefix"), &e.states) > 0.01);
    assert!(distance(&embed("top_k:k=64", "prefix"), &e.states) < 1e-5);
}

#[test]
fn forms_that_rewrite_an_encoder_are_exact_where_they_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let e = &encoders()[1];
    for form in ["center", "center:data=no", "lowrank:data=no", "lowrank:ratio=0.9"] {
        let out = dir.path().join("out.gguf");
        let args = ["merge", "-m", &path("bert"), "--form", form, "--force", "--type", "F32", "-o"];
        ok(&[&args[..], &[out.to_str().unwrap()]].concat(), "");
        let model = Model::open(&out).unwrap();
        assert!(model.plan.names()[1].starts_with(form.split(':').next().unwrap()));
        let far = distance(&exact(model).embed(&e.tokens, Pooling::None).unwrap(), &e.states);
        let bound = if form == "lowrank:ratio=0.9" { 1.0 } else { 1e-4 };
        assert!(far < bound, "{form}: {far}");
    }
}

#[test]
fn sessions_give_no_logits_that_a_model_does_not_have() {
    for e in encoders() {
        let mut session = exact(open(&e.name));
        for result in [session.feed(&e.tokens), session.feed_prompt(&e.tokens)] {
            let text = result.unwrap_err().to_string();
            assert!(text.contains(&e.name) && text.contains("no output matrix"), "{text}");
        }
        assert!(session.tokens().is_empty() && session.logits().is_empty());
        // Who only looks may read.
        assert!(session.feed_wanting(&e.tokens, 0..0).unwrap().is_empty());
        session.rewind(1);
        assert!(session.tokens().is_empty(), "tokens that have seen each other go together");
        for (tokens, pooling, expected) in [
            (&[][..], Pooling::Mean, "the text has no tokens"),
            (&[1, 200], Pooling::Mean, "token 200; the vocabulary has 82"),
            (&[1; 300], Pooling::Mean, "300 tokens do not fit a context of "),
            (&[1], Pooling::Rank, "pooling rank"),
        ] {
            let text = session.embed(tokens, pooling).unwrap_err().to_string();
            assert!(text.contains(expected) && !text.contains('\n'), "{text}");
        }
    }
}

#[test]
fn patterns_of_an_encoder_look_both_ways() {
    let e = &encoders()[0];
    let (n, mut session) = (e.tokens.len(), exact(open(&e.name)));
    let records = record(&mut session, &e.tokens, 0..2).unwrap();
    for head in records.iter().flat_map(|r| &r.heads) {
        assert!(head.weights.iter().all(|w| *w > 0.0));
        assert!(head.weights.chunks(n).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-5));
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.npz");
    ok(&["patterns", "-m", &path("bert"), "-p", "the rain", "-o", out.to_str().unwrap()], "");
    assert!(out.exists());
}

#[test]
fn lengths_and_cosines() {
    let mut x = [3.0, 0.0, -4.0];
    embed::normalize(&mut x);
    assert_eq!(x, [0.6, 0.0, -0.8]);
    let mut zero = [0.0; 3];
    embed::normalize(&mut zero);
    assert_eq!(zero, [0.0; 3]);
    assert_eq!(embed::cosine(&x, &[0.0, 5.0, 0.0]), 0.0);
    assert!((embed::cosine(&x, &[6.0, 0.0, -8.0]) - 1.0).abs() < 1e-7);
    assert_eq!(embed::cosine(&x, &zero), 0.0);
}

fn rows(text: &str) -> Vec<Vec<f32>> {
    let row = |line: &str| line.split(' ').map(|x| x.parse().unwrap()).collect();
    text.lines().filter(|line| !line.is_empty()).map(row).collect()
}

#[test]
fn embed_prints_vectors() {
    let bert = path("bert");
    let run = |args: &[&str], stdin: &str| {
        ok(
            &[
                &[
                    "embed",
                    "-m",
                    &bert,
                    "--exact",
                    "--cache-type-k",
                    "f32",
                    "--cache-type-v",
                    "f32",
                ],
                args,
            ]
            .concat(),
            stdin,
        )
    };
    let encoders = encoders();
    let texts: Vec<&str> = encoders.iter().take(3).map(|e| e.text.as_str()).collect();
    let raw = run(&[&["--no-normalize"], &texts[..]].concat(), "");
    for (row, e) in rows(&raw).iter().zip(&encoders) {
        assert!(distance(row, &e.mean) < 5e-6, "{}", e.text);
    }
    let all = run(&texts, "");
    for (row, mut raw) in rows(&all).into_iter().zip(rows(&raw)) {
        embed::normalize(&mut raw);
        assert_eq!(row, raw);
    }
    // Lines are texts, empty ones too.
    let lines = texts.join("\n") + "\n";
    assert_eq!(all, run(&[], &lines));
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("texts");
    std::fs::write(&file, lines.replace('\n', "\r\n")).unwrap();
    assert_eq!(all, run(&["-f", file.to_str().unwrap()], ""));
    let tokens = run(&["--pooling", "none", "--no-normalize", texts[0], texts[2]], "");
    assert_eq!(tokens.matches("\n\n").count(), 1, "{tokens}");
    assert_eq!(rows(&tokens).len(), encoders[0].tokens.len() + encoders[2].tokens.len());
    assert!(distance(&rows(&tokens)[0], &encoders[0].states[..36]) < 5e-6);
    let cls = run(&["--pooling", "cls", "--no-normalize", texts[0]], "");
    assert_eq!(rows(&cls)[0], rows(&tokens)[0]);
    assert_ne!(run(&["--norm", "sparsemax", texts[1]], ""), run(&[texts[1]], ""));
    let special = |args: &[&str]| {
        let json: Value = serde_json::from_str(&run(args, "")).unwrap();
        json["data"][0]["tokens"].clone()
    };
    assert_eq!(special(&["--json", "--parse-special", "[MASK]"]), 3);
    assert_eq!(special(&["--json", "[MASK]"]), 8);
}

#[test]
fn embed_prints_json_and_cosines() {
    let bert = path("bert");
    let args = ["embed", "-m", &bert, "the rain", "hello", "the rain"];
    let json: Value =
        serde_json::from_str(&ok(&[&args[..], &["--json", "-s"]].concat(), "")).unwrap();
    assert_eq!((&json["object"], &json["pooling"]), (&"list".into(), &"mean".into()));
    let data = json["data"].as_array().unwrap();
    let plain = rows(&ok(&args, ""));
    for (i, one) in data.iter().enumerate() {
        assert_eq!((&one["index"], &one["object"]), (&i.into(), &"embedding".into()));
        let numbers =
            one["embedding"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32);
        assert_eq!(numbers.collect::<Vec<_>>(), plain[i]);
    }
    assert_eq!(data[1]["tokens"], 3);
    assert_eq!(json["usage"]["prompt_tokens"], 11);
    let cosine = |i: usize, j: usize| json["similarity"][i][j].as_f64().unwrap();
    assert!((cosine(0, 2) - 1.0).abs() < 1e-6 && (cosine(1, 1) - 1.0).abs() < 1e-6);
    assert!(cosine(0, 1) < 0.99 && cosine(0, 1) == cosine(1, 0));
    let none = ok(&["embed", "-m", &bert, "--json", "--pooling", "none", "hello"], "");
    let none: Value = serde_json::from_str(&none).unwrap();
    assert_eq!(none["data"][0]["embedding"].as_array().unwrap().len(), 3);
    let table = ok(&[&args[..], &["--similarity"]].concat(), "");
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines[0].split_whitespace().collect::<Vec<_>>(), ["1", "2", "3"]);
    assert!(lines[3].starts_with("3  1.000") && lines[3].ends_with("1.000  the rain"), "{table}");
}

#[test]
fn decoders_embed_too() {
    let rows_of = |args: &[&str]| rows(&ok(&[&["embed"], args].concat(), ""));
    let found = rows_of(&["The old man", "The old men", "lanterns"]);
    assert_eq!((found.len(), found[0].len()), (3, 512));
    let last = rows_of(&["--pooling", "last", "The old man"]);
    assert_eq!(last[0], found[0]);
    assert_ne!(rows_of(&["--pooling", "mean", "The old man"])[0], found[0]);
    assert_ne!(rows_of(&["--mask", "prefix", "--pooling", "mean", "The old man"]), last);
}

#[test]
fn what_an_encoder_cannot_do_is_refused() {
    let bert = path("bert");
    for args in [
        &["generate", "-p", "x"][..],
        &["chat", "-p", "x"],
        &["merge", "--sweep"],
        &["eval", "-f", "/dev/null"],
        &["bench", "-p", "8", "-n", "4"],
        &["compare", "--all-norms"],
        &["calibrate", "--norm", "sparsemax", "-o", "/dev/null"],
    ] {
        let line = error(&[args, &["-m", &bert]].concat(), 2);
        let parts = ["bert.gguf: ", "no output matrix", "qkov embed"];
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
        assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    }
    let long = "a ".repeat(63);
    for (args, expected) in [
        (&["--form", "auto", "x"][..], "no output matrix"),
        (
            &["x", &long],
            "text 2, \"a a a a a a a a a a a a a a a a a a a a ...\": 65 tokens do not fit a context of 64",
        ),
        (&["-c", "65", "x"], "context = 65; this model has positions for 64 tokens"),
        (&["--similarity", "--pooling", "none", "x"], "--similarity: pooling none"),
        (&["--pooling", "max", "x"], "possible values: none, mean, cls, last"),
        (&["-f", "/dev/null"], "there are no texts"),
    ] {
        let line = error(&[&["embed", "-m", &bert], args].concat(), 2);
        assert!(line.contains(expected), "{line}");
    }
    let line = error(&["embed", "-m", &path("llama"), ""], 2);
    assert!(line.contains("text 1, \"\": the text has no tokens"), "{line}");
    let (code, text) = code_and_text(&["inspect", "-m", &bert, "--heads"]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = code_and_text(&["embed", "-m", &bert, "-v", "-s", "hello"]);
    assert!(code == 0 && text.contains("1 texts, 3 tokens in "), "{text}");
    let text = ok(&["inspect", "-m", &bert], "");
    assert!(text.contains("rope_dim none") && text.contains("mask prefix"), "{text}");
    let json = ok(&["inspect", "-m", &bert, "--heads", "--json", "--layer", "0"], "");
    assert!(serde_json::from_str::<Value>(&json).unwrap().is_array());
}
