//! Adapters: against files with what they add in their matrices, and against Hugging Face `peft`
//! (`tests/golden/lora.py`).

use std::path::Path;
use std::sync::Arc;

use qkov::arch::Pooling;
use qkov::engine::{CacheType, Threads};
use qkov::gguf::{Bytes, Data, Gguf, Tensor, Value, ValueType, Writer};
use qkov::measure::forms;
use qkov::model::{Model, adapted};
use qkov::quant::{format_named, format_of};
use qkov::session::{Options, Session};

use crate::cli::{error, ok};
use crate::families::files;
use crate::forms::distance;
use crate::golden::records;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
const ALPHA: f32 = 5.0;
const SCALE: f32 = 0.7;

/// Small numbers, others for each name.
fn numbers(name: &str, n: usize) -> Vec<f32> {
    let seed: u32 = name.bytes().fold(7, |h, b| h.wrapping_mul(31).wrapping_add(b.into()));
    let number = |i: u32| seed.wrapping_add(i).wrapping_mul(2_654_435_761) >> 16;
    (0..n as u32).map(|i| (number(i) as f32 / 65_536.0 - 0.5) * 0.3).collect()
}

fn bytes(numbers: &[f32]) -> Data<'static> {
    Data::View(Bytes::from(numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>()))
}

fn parse(writer: Writer) -> Gguf {
    Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap()
}

/// A file of adapters in the making.
fn adapter(arch: &str) -> Writer<'static> {
    let mut writer = Writer::new();
    for (key, value) in
        [("general.type", "adapter"), ("general.architecture", arch), ("adapter.type", "lora")]
    {
        writer.set(key, Value::String(value.as_bytes())).unwrap();
    }
    writer
}

fn add(writer: &mut Writer, name: &str, dims: &[u64]) {
    let n = dims.iter().product::<u64>() as usize;
    writer.tensor(name, format_named("F32").unwrap().ty, dims, bytes(&numbers(name, n))).unwrap();
}

/// What has an adapter: matrices that something is multiplied with, and embeddings if they are not.
fn has_adapter(gguf: &Gguf, tensor: &Tensor) -> bool {
    let is_tied = gguf.tensor("output.weight").is_none();
    let is_left_out = ["norm", ".bias"].iter().any(|part| tensor.name.contains(part));
    tensor.dims.len() > 1 && !is_left_out && (tensor.name != "token_embd.weight" || !is_tied)
}

/// An adapter of every matrix for which `wanted`.
pub fn adapter_for(gguf: &Gguf, rank: u64, wanted: impl Fn(&Tensor) -> bool) -> Gguf {
    let arch = gguf.str("general.architecture").unwrap().unwrap();
    let mut writer = adapter(arch);
    writer.set("adapter.lora.alpha", ALPHA).unwrap();
    for t in gguf.tensors().iter().filter(|t| has_adapter(gguf, t) && wanted(t)) {
        let dims = match &t.dims[..] {
            [n_in, n_out] if t.name == "token_embd.weight" => {
                [vec![rank, *n_out], vec![rank, *n_in]]
            }
            [n_in, n_out, rest @ ..] => {
                [[*n_in, rank], [rank, *n_out]].map(|dims| [&dims[..], rest].concat())
            }
            _ => unreachable!(),
        };
        add(&mut writer, &format!("{}.lora_a", t.name), &dims[0]);
        add(&mut writer, &format!("{}.lora_b", t.name), &dims[1]);
    }
    parse(writer)
}

fn floats(gguf: &Gguf, name: &str) -> Option<Vec<f32>> {
    let tensor = gguf.tensor(name)?;
    let mut out = vec![0.0; tensor.n_elements() as usize];
    format_of(tensor.ty.id).unwrap().dequantize(&gguf.data(tensor), &mut out);
    Some(out)
}

/// The file with what adapters add in its matrices, in F32.
fn merged(gguf: &Gguf, adapters: &[(Gguf, f32)]) -> Gguf {
    let mut writer = Writer::new();
    writer.copy_metadata(gguf).unwrap();
    for t in gguf.tensors().iter().filter(|t| has_adapter(gguf, t)) {
        let mut w = floats(gguf, &t.name).unwrap();
        let [n_in, n_out] = [t.dims[0] as usize, t.dims[1] as usize];
        for (adapter, scale) in adapters {
            let Some(a) = floats(adapter, &format!("{}.lora_a", t.name)) else { continue };
            let b = floats(adapter, &format!("{}.lora_b", t.name)).unwrap();
            let is_looked_up = t.name == "token_embd.weight";
            let rank = if is_looked_up { a.len() / n_out } else { b.len() * n_in / w.len() };
            let factor = f64::from(scale * ALPHA) / rank as f64;
            for (r, row) in w.chunks_exact_mut(n_in).enumerate() {
                for (i, x) in row.iter_mut().enumerate() {
                    let pair = |j: usize| match is_looked_up {
                        true => (a[r * rank + j], b[i * rank + j]),
                        false => (a[(r / n_out * rank + j) * n_in + i], b[r * rank + j]),
                    };
                    let pairs = (0..rank).map(pair);
                    let sum: f64 = pairs.map(|(a, b)| f64::from(a) * f64::from(b)).sum();
                    *x = (f64::from(*x) + factor * sum) as f32;
                }
            }
        }
        writer.tensor(&t.name, format_named("F32").unwrap().ty, &t.dims, bytes(&w)).unwrap();
    }
    gguf.overlaid(parse(writer))
}

fn session(gguf: &Gguf, n_threads: usize) -> Session {
    let n_threads = Threads { one: n_threads, batch: n_threads };
    let cache = (CacheType::F32, CacheType::F32);
    let options = Options { n_threads, cache, exact: true, ..Options::default() };
    Session::new(Arc::new(Model::from_gguf(gguf.clone()).unwrap()), &options).unwrap()
}

/// Logits of all tokens, fed `n` at a time; or the states of an encoder, which reads them together.
fn logits(session: &mut Session, n: usize) -> Vec<f32> {
    session.rewind(0);
    let n_vocab = session.model().hparams.n_vocab as u32;
    let tokens: Vec<u32> = (0..21).map(|i| (i * i * 7 + i * 3) % n_vocab).collect();
    if session.model().output.is_none() {
        return session.embed(&tokens, Pooling::None).unwrap();
    }
    let mut out = Vec::new();
    for part in tokens.chunks(n) {
        out.extend_from_slice(session.feed_wanting(part, 0..part.len()).unwrap());
    }
    out
}

#[test]
fn adapters_add_to_every_matrix_of_every_family() {
    for (name, gguf) in files() {
        let beside = adapter_for(&gguf, 3, |_| true);
        assert!(beside.tensors().len() >= 8, "{name}");
        let with = adapted(gguf.clone(), beside.clone(), SCALE).unwrap();
        let ours = logits(&mut session(&with, 2), 21);
        let theirs = logits(&mut session(&merged(&gguf, &[(beside, SCALE)]), 2), 21);
        let plain = logits(&mut session(&gguf, 2), 21);
        let (error, effect) = (distance(&theirs, &ours), distance(&theirs, &plain));
        println!("{name}: error {error:.1e}, effect {effect:.2}");
        assert!(error < 1e-5 && effect > 0.05, "{name}: {error:e}, {effect}");
    }
}

#[test]
fn each_matrix_has_its_own_adapter() {
    for (name, gguf) in files() {
        let plain = logits(&mut session(&gguf, 2), 21);
        let first = gguf.tensors().iter().filter(|t| !t.name.starts_with("blk."));
        let first = first.chain(gguf.tensors().iter().filter(|t| t.name.starts_with("blk.0.")));
        for t in first.filter(|t| has_adapter(&gguf, t)) {
            let beside = adapter_for(&gguf, 2, |other| other.name == t.name);
            let with = adapted(gguf.clone(), beside.clone(), SCALE).unwrap();
            let ours = logits(&mut session(&with, 2), 21);
            let theirs = logits(&mut session(&merged(&gguf, &[(beside, SCALE)]), 2), 21);
            let (error, effect) = (distance(&theirs, &ours), distance(&theirs, &plain));
            let case = format!("{name} {}", t.name);
            assert!(error < 1e-5 && effect > 1e-5, "{case}: {error:e}, {effect:e}");
        }
    }
}

#[test]
fn pieces_and_threads_do_not_change_bits() {
    for (name, gguf) in files() {
        let beside = adapter_for(&gguf, 11, |_| true);
        let with = adapted(gguf.clone(), beside, SCALE).unwrap();
        let whole = logits(&mut session(&with, 1), 21);
        for (n, n_threads) in [(21, 2), (1, 1), (1, 2), (4, 2)] {
            let pieces = logits(&mut session(&with, n_threads), n);
            let is_same = whole.iter().zip(&pieces).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(is_same, "{name} by {n} on {n_threads} threads");
        }
    }
}

#[test]
fn adapters_add_up() {
    let (_, gguf) = files().into_iter().find(|(name, _)| name == "llama").unwrap();
    let ends = |end: &'static str| move |t: &Tensor| !t.name.contains(end);
    let all =
        [(adapter_for(&gguf, 2, ends("ffn")), 0.5), (adapter_for(&gguf, 9, ends("attn_q")), -0.4)];
    let with = all.iter().try_fold(gguf.clone(), |g, (a, s)| adapted(g, a.clone(), *s)).unwrap();
    let ours = logits(&mut session(&with, 2), 21);
    let error = distance(&logits(&mut session(&merged(&gguf, &all), 2), 21), &ours);
    assert!(error < 1e-5, "{error:e}");
    // A plan for one of them is none for the other.
    assert_ne!(with.hash(), gguf.hash());
    assert_ne!(with.hash(), adapted(gguf, all[0].0.clone(), 0.5).unwrap().hash());
}

/// What forms make of attention is made of matrices with what is added to them.
#[test]
fn forms_are_made_with_adapters() {
    let forms = ["lowrank:qk=6,ov=6,data=no", "center", "slim:cond=1e6", "absorb", "mla"];
    let mut n = 0;
    for (name, gguf) in files() {
        let beside = adapter_for(&gguf, 3, |_| true);
        let with = adapted(gguf.clone(), beside.clone(), SCALE).unwrap();
        let model = Model::from_gguf(with).unwrap();
        let alike = Model::from_gguf(merged(&gguf, &[(beside, SCALE)])).unwrap();
        for form in forms {
            let formed = |model: &Model| {
                let mut plan = model.plan.clone();
                plan.set_forms(form).ok()?;
                forms::check(model, &plan).ok()?;
                let gguf = forms::rewritten(model, &plan, &[], format_named("F32")).ok()?;
                // What makes values of keys may not be known well enough.
                Model::from_gguf(gguf.clone()).ok()?;
                Some(gguf)
            };
            let (Some(ours), Some(theirs)) = (formed(&model), formed(&alike)) else { continue };
            for n in [21, 1] {
                let [ours, theirs] = [&ours, &theirs].map(|g| logits(&mut session(g, 2), n));
                let error = distance(&theirs, &ours);
                println!("{name} {form} by {n}: {error:.1e}");
                assert!(error < 1e-4, "{name} {form} by {n}: {error:e}");
            }
            n += 1;
        }
    }
    assert!(n > 20, "{n}");
}

#[test]
fn logits_are_those_of_peft() {
    let folder = Path::new(FOLDER);
    let with = |name: &str| {
        let file = format!("{name}.gguf");
        let model = Gguf::open(&folder.join(&file)).unwrap();
        let beside = Gguf::open(&folder.join("lora").join(&file)).unwrap();
        Model::from_gguf(adapted(model, beside, 1.0).unwrap()).unwrap()
    };
    for g in records("lora/lora.bin", with) {
        let [kl, error] = g.distance(&g.feed(&mut g.exact(CacheType::F32), 512));
        println!("{}: KL {kl:.1e}, largest error {error:.1e}", g.name);
        assert!(kl < 1e-9 && error < 1e-4, "{}: {kl:e} {error:e}", g.name);
    }
}

fn refuses(case: &str, gguf: &Gguf, adapter: Gguf, scale: f32, parts: &[&str]) {
    let Err(error) = adapted(gguf.clone(), adapter, scale) else { panic!("{case} is accepted") };
    let text = error.to_string();
    assert_eq!(error.exit_code(), 3, "{case}: {text}");
    assert!(parts.iter().all(|part| text.contains(part)), "{case}: {text}");
    assert!(!text.contains('\n'), "{case}: {text}");
}

#[test]
fn what_is_no_adapter_for_the_model_is_told() {
    let all = files();
    let find = |wanted: &str| all.iter().find(|(name, _)| name == wanted).unwrap().1.clone();
    let (gguf, tied) = (find("llama"), find("qwen2"));
    let sound = adapter_for(&gguf, 3, |_| true);
    assert!(adapted(gguf.clone(), sound.clone(), SCALE).is_ok());
    refuses("a model", &gguf, gguf.clone(), 1.0, &["\"general.type\"", "expected \"adapter\""]);
    refuses("another family", &tied, sound.clone(), 1.0, &["is \"llama\"", "expected \"qwen2\""]);
    let Err(error) = Model::from_gguf(sound.clone()) else { panic!("an adapter is a model") };
    assert!(error.to_string().contains("--lora"), "{error}");
    refuses("no tensors", &gguf, parse(adapter("llama")), 1.0, &["without tensors"]);
    let with_key = |key: &str, value: Option<Value>| {
        let mut writer = Writer::new();
        writer.copy_metadata(&sound).unwrap();
        writer.remove(key);
        if let Some(value) = value {
            writer.set(key, value).unwrap();
        }
        sound.tensors().iter().for_each(|t| writer.copy_tensor(&sound, t).unwrap());
        parse(writer)
    };
    let alpha = "adapter.lora.alpha";
    for value in [f32::NAN, f32::INFINITY] {
        refuses("alpha", &gguf, with_key(alpha, Some(Value::F32(value))), 1.0, &[alpha, "finite"]);
    }
    let large = with_key(alpha, Some(Value::F32(1e30)));
    refuses("a large factor", &gguf, large, 1e30, &[alpha, "scale of 1000000"]);
    refuses("alpha", &gguf, with_key(alpha, Some(Value::Bool(true))), 1.0, &[alpha, "float"]);
    let other = with_key("adapter.type", Some(Value::String(b"ia3")));
    refuses("another kind", &gguf, other, 1.0, &["adapter.type", "\"ia3\"", "\"lora\""]);
    refuses("no kind", &gguf, with_key("adapter.type", None), 1.0, &["no key \"adapter.type\""]);
    assert!(adapted(gguf.clone(), with_key(alpha, None), 1.0).is_ok(), "alpha may be missing");
    let mut tokens = adapter("llama");
    let key = "adapter.alora.invocation_tokens";
    tokens.set_array(key, ValueType::U32, [Value::U32(1)]).unwrap();
    refuses("after tokens", &gguf, parse(tokens), 1.0, &[key, "not supported"]);
}

#[test]
fn adapters_that_fit_nowhere_are_told() {
    let all = files();
    let find = |wanted: &str| all.iter().find(|(name, _)| name == wanted).unwrap().1.clone();
    let (gguf, tied) = (find("llama"), find("qwen2"));
    let (q, a, b) =
        ("blk.0.attn_q.weight", "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b");
    let of = |arch: &str, tensors: &[(&str, &[u64])]| {
        let mut writer = adapter(arch);
        tensors.iter().for_each(|(name, dims)| add(&mut writer, name, dims));
        parse(writer)
    };
    let n = 32;
    assert!(adapted(gguf.clone(), of("llama", &[(a, &[n, 2]), (b, &[2, n])]), 1.0).is_ok());
    for (case, tensors, parts) in [
        ("half", &[(a, &[n, 2][..])][..], &[a, "lacks its other half", b][..]),
        ("other half", &[(b, &[2, n])], &[b, "lacks its other half", a]),
        ("whole", &[(q, &[n, n])], &[q, "no part of an adapter", ".lora_a"]),
        (
            "unknown",
            &[("blk.9.attn_q.weight.lora_a", &[n, 2]), ("blk.9.attn_q.weight.lora_b", &[2, n])],
            &["blk.9.attn_q.weight.lora_a", "the model has no tensor"],
        ),
        ("narrow", &[(a, &[n - 1, 2]), (b, &[2, n])], &[a, "has shape [31, 2]", "[32, 2, 1]"]),
        ("short", &[(a, &[n, 2]), (b, &[2, n + 1])], &[b, "has shape [2, 33]", "[2, 32, 1]"]),
        ("two ranks", &[(a, &[n, 2]), (b, &[3, n])], &[b, "has shape [3, 32]"]),
        ("turned", &[(a, &[2, n]), (b, &[n, 2])], &[a, "has shape [2, 32]"]),
        ("no rank", &[(a, &[n, 0]), (b, &[0, n])], &[a, "rank of 1 or more"]),
        ("many", &[(a, &[n, 2, 4]), (b, &[2, n, 4])], &[a, "has shape [32, 2, 4]"]),
    ] {
        refuses(case, &gguf, of("llama", tensors), 1.0, parts);
    }
    let embedding: [(&str, &[u64]); 2] =
        [("token_embd.weight.lora_a", &[2, 263]), ("token_embd.weight.lora_b", &[2, 64])];
    refuses("tied", &tied, of("qwen2", &embedding), 1.0, &["the output too", "output.weight"]);
}

#[test]
fn the_program_takes_adapters() {
    let model = &format!("{FOLDER}/llama.gguf");
    let beside = &format!("{FOLDER}/lora/llama.gguf");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let colons = &path("a:0.5.gguf:2");
    std::fs::copy(beside, colons).unwrap();
    let text_file = path("text");
    let text = |loras: &[&str]| {
        let loras = loras.iter().flat_map(|lora| ["--lora", lora]);
        let args = ["eval", "-m", model, "-c", "16", "--json", "-f", &text_file];
        let args: Vec<&str> = args.into_iter().chain(loras).collect();
        let json: serde_json::Value = serde_json::from_str(&ok(&args, "")).unwrap();
        json["ppl"].as_f64().unwrap()
    };
    std::fs::write(&text_file, "in the thin air, the hen and the man ran there".repeat(3)).unwrap();
    let (plain, with) = (text(&[]), text(&[beside]));
    assert!((plain - with).abs() > 1e-3 * plain, "{plain} {with}");
    assert_eq!(text(&[&format!("{beside}:1")]), with);
    assert_eq!(text(&[colons]), with);
    assert_eq!(text(&[&format!("{colons}:0")]), plain);
    let halves = [&format!("{beside}:0.75"), &format!("{colons}:0.25")];
    assert!((text(&halves.map(|s| &s[..])) - with).abs() < 1e-3 * with);
    let shown = ok(&["inspect", "-m", beside], "");
    assert!(shown.contains("adapter\n  n_matrices 16, ranks [3]"), "{shown}");
    let run =
        |lora: &str, code| error(&["eval", "-m", model, "-f", &text_file, "--lora", lora], code);
    for (lora, code, said) in [
        (&format!("{beside}:nan"), 2, "finite number"),
        (&format!("{beside}:1e99"), 2, "finite number"),
        (&format!("{beside}:x"), 2, "scale \"x\""),
        (&path("none.gguf"), 3, "none.gguf"),
        (model, 3, "general.type"),
    ] {
        let text = run(lora, code);
        assert!(text.contains(said) && text.lines().count() == 1, "{lora}: {text}");
    }
    let text = error(&["eval", "-m", beside, "-f", &text_file], 3);
    assert!(text.contains("this is an adapter"), "{text}");
    let args =
        ["merge", "-m", model, "--lora", beside, "--form", "center", "-o", &path("out.gguf")];
    let text = error(&args, 2);
    assert!(text.contains("--lora: it changes"), "{text}");
}
