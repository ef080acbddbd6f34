//! Low rank, from a file to its logits.

use std::sync::Arc;

use qkov::arch::Pooling;
use qkov::engine::{CacheType, Threads};
use qkov::gguf::{Bytes, Data, Gguf, Writer};
use qkov::measure::forms;
use qkov::measure::grams::gather;
use qkov::measure::quality::{Base, Windows, evaluate};
use qkov::model::Model;
use qkov::quant;
use qkov::session::{Options, Session};

use crate::cli::code_and_text as qkov;
use crate::family;

pub fn golden(name: &str) -> Gguf {
    let path = format!("{}/tests/golden/{name}.gguf", env!("CARGO_MANIFEST_DIR"));
    Gguf::open(path.as_ref()).unwrap()
}

pub fn session(gguf: Gguf, n_ctx: usize) -> Session {
    let n_threads = Threads { one: 2, batch: 2 };
    let cache = (CacheType::F32, CacheType::F32);
    let n_ctx = Some(n_ctx);
    let options = Options { n_threads, n_ctx, cache, exact: true, ..Options::default() };
    Session::new(Arc::new(Model::from_gguf(gguf).unwrap()), &options).unwrap()
}

pub fn tokens(n_vocab: usize, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i + 3 * i) % n_vocab as u32).collect()
}

/// A file whose layers have the forms of `plan`.
pub fn formed(gguf: &Gguf, form: &str) -> Result<Gguf, qkov::error::Error> {
    let model = Model::from_gguf(gguf.clone()).unwrap();
    let mut plan = model.plan.clone();
    plan.set_forms(form)?;
    forms::check(&model, &plan)?;
    let tokens = tokens(model.hparams.n_vocab, 60);
    let mut session = session(gguf.clone(), 60);
    let grams = gather(&mut session, &[tokens], &mut |_| {})?;
    forms::rewritten(&model, &plan, &grams, quant::format_named("F32"))
}

/// All logits of some tokens, most read together, some one by one; or the states of an encoder.
fn logits(gguf: Gguf) -> Vec<f32> {
    let mut session = session(gguf, 48);
    let tokens = tokens(session.model().hparams.n_vocab, 48);
    if session.model().output.is_none() {
        return session.embed(&tokens, Pooling::None).unwrap();
    }
    let mut out = session.feed_wanting(&tokens[..30], 0..30).unwrap().to_vec();
    for token in &tokens[30..] {
        out.extend_from_slice(session.feed_wanting(&[*token], 0..1).unwrap());
    }
    out
}

pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    let size = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    a.iter().zip(b).fold(0.0f32, |m, (x, y)| m.max((x - y).abs())) / size
}

/// The file with some of its numbers changed: `change` gets a tensor's name, rows and row length.
pub fn changed(gguf: &Gguf, change: impl Fn(&str, &mut [f32], usize)) -> Gguf {
    let mut writer = Writer::new();
    writer.copy_metadata(gguf).unwrap();
    for tensor in gguf.tensors() {
        let format = quant::format_of(tensor.ty.id).unwrap();
        let mut floats = vec![0.0; tensor.n_elements() as usize];
        format.dequantize(&gguf.data(tensor), &mut floats);
        change(&tensor.name, &mut floats, tensor.dims[0] as usize);
        let mut bytes = vec![0; floats.len() * 4];
        let f32s = quant::format_named("F32").unwrap();
        f32s.quantize(&floats, &mut bytes);
        writer.tensor(&tensor.name, f32s.ty, &tensor.dims, Data::View(Bytes::from(bytes))).unwrap();
    }
    Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap()
}

/// Makes rows (or elements of a vector) of every head depend on the first `rank` of the head's.
fn deficient(data: &mut [f32], n: usize, dim: usize, rank: usize) {
    for head in data.chunks_exact_mut(n * dim) {
        let (first, rest) = head.split_at_mut(n * rank);
        for (i, row) in rest.chunks_exact_mut(n).enumerate() {
            for (e, x) in row.iter_mut().enumerate() {
                *x = 0.7 * first[i % rank * n + e] - 0.4 * first[(i + 1) % rank * n + e];
            }
        }
    }
}

#[test]
fn what_carries_nothing_can_go() {
    for name in ["llama", "qwen2", "gpt2", "llama-yarn", "llama-freqs"] {
        let file = golden(name);
        let model = Model::from_gguf(file.clone()).unwrap();
        let hp = &model.hparams;
        let (dim, e) = (hp.key_dim, hp.n_embd);
        let layer = &hp.layers[0];
        let fused = hp.fused_qkv;
        let keys = layer.n_head_kv * dim;
        // Values of rank 4 in each head; without a rotation, keys of rank 3; with one, nothing in one
        // of its planes.
        let gguf = changed(&file, |tensor, data, n| {
            let is = |part: &str| tensor.contains(&format!(".{part}."));
            let n = if n == e { n } else { 1 };
            if is("attn_qkv") {
                let (q, rest) = data.split_at_mut(layer.n_head * dim * n);
                let (k, v) = rest.split_at_mut(keys * n);
                assert!(!q.is_empty());
                deficient(k, n, dim, 3);
                deficient(v, n, dim, 4);
            } else if is("attn_v") {
                deficient(data, n, dim, 4);
            } else if is("attn_k") {
                let pairing = hp.ropes[0].pairing;
                for head in data.chunks_exact_mut(n * dim) {
                    for i in pairing.pair(2, dim / 2) {
                        head[i * n..(i + 1) * n].fill(0.0);
                    }
                }
            }
        });
        let whole = logits(gguf.clone());
        // Keys of rank 3 with their biases, which are mixed alike.
        let qk = if fused { 4 } else { dim - 2 };
        for form in [
            "lowrank:ov=4".into(),
            format!("lowrank:qk={qk}"),
            format!("lowrank:qk={qk},ov=4"),
            format!("1=lowrank:qk={qk},ov=4,data=no"),
            "lowrank:energy=0.9999999".into(),
        ] {
            let distance = distance(&whole, &logits(formed(&gguf, &form).unwrap()));
            assert!(distance < 1e-4, "{name}, {form}: {distance}");
        }
        let center = formed(&gguf, &format!("lowrank:qk={qk},ov=4,center=yes")).unwrap();
        let distance = distance(&whole, &logits(center));
        assert!(distance < 1e-4, "{name}, centered: {distance}");
    }
}

/// Those whose heads are normed as a whole but rotated in part, or not in every layer.
const REFUSED: [&str; 5] = ["exaone4", "stablelm-parallel", "deepseek2", "deepseek3", "mpt"];

#[test]
fn every_family_loses_nothing_without_what_carries_nothing() {
    for (name, file) in crate::families::files() {
        let model = Model::from_gguf(file.clone()).unwrap();
        let hp = &model.hparams;
        let (dim, e) = (hp.key_dim, hp.n_embd);
        let gguf = changed(&file, |tensor, data, n| {
            let Some(layer) = tensor.strip_prefix("blk.").and_then(|t| t.split('.').next()) else {
                return;
            };
            let layer: usize = layer.parse().unwrap();
            let at = &hp.layers[layer];
            let is = |part: &str| tensor.contains(&format!(".{part}."));
            let n = if tensor.ends_with("weight") && n == e { n } else { 1 };
            let keys = |data: &mut [f32], n: usize| match hp.rope(layer) {
                Some(rope) => {
                    for head in data.chunks_exact_mut(n * dim) {
                        for i in rope.pairing.pair(0, rope.dim / 2) {
                            head[i * n..(i + 1) * n].fill(0.0);
                        }
                    }
                }
                None => deficient(data, n, dim, dim / 2),
            };
            if is("attn_qkv") {
                let (_, rest) = data.split_at_mut(at.n_head * dim * n);
                let (k, v) = rest.split_at_mut(at.n_head_kv * dim * n);
                keys(k, n);
                deficient(v, n, dim, dim / 2);
            } else if is("attn_v") {
                deficient(data, n, dim, dim / 2);
            } else if is("attn_k_norm") || is("attn_k") && hp.qk_norm.is_none() {
                keys(data, if is("attn_k") { n } else { 1 });
            }
        });
        let form = format!("lowrank:qk={},ov={}", dim - 2, dim / 2);
        match formed(&gguf, &form) {
            Err(error) => {
                let text = error.to_string();
                let is_known = ["normed", "latent", "bounds"].iter().any(|w| text.contains(w));
                assert!(REFUSED.contains(&name.as_str()) && is_known, "{name}: {text}");
            }
            Ok(merged) => {
                assert!(!REFUSED.contains(&name.as_str()), "{name}");
                let distance = distance(&logits(gguf), &logits(merged));
                assert!(distance < 1e-4, "{name}: {distance}");
            }
        }
    }
}

#[test]
fn data_helps() {
    let gguf = family::gguf("softmax");
    let model = Model::from_gguf(gguf.clone()).unwrap();
    let all = model.tokenizer.encode(qkov::measure::SAMPLE, true, false).unwrap();
    let (fit, judge) = (all[..1024].to_vec(), all[1024..2048].to_vec());
    let windows = Windows::new(judge, 256).unwrap();
    let mut trained = session(gguf, 256);
    let fit: Vec<Vec<u32>> = fit.chunks(256).map(Into::into).collect();
    let grams = gather(&mut trained, &fit, &mut |_| {}).unwrap();
    let mut base = Base::in_memory(&mut trained, &windows, 1 << 30, &mut |_| {}).unwrap().unwrap();
    let mut sums = [0.0; 2];
    for layer in 0..model.layers.len() {
        let kl = ["yes", "no"].map(|data| {
            let mut plan = model.plan.clone();
            plan.set_forms(&format!("{layer}=lowrank:ratio=0.5,data={data}")).unwrap();
            let gguf = forms::rewritten(&model, &plan, &grams, None).unwrap();
            let mut own = session(gguf, 256);
            let quality = evaluate(&mut own, &windows, Some(&mut base), None, &mut |_| {}).unwrap();
            quality.divergence.unwrap().kl.mean.value
        });
        println!("layer {layer}: KL {:.5} with data, {:.5} without", kl[0], kl[1]);
        sums = [sums[0] + kl[0], sums[1] + kl[1]];
    }
    // What heads put out comes nearer in each layer, the model's predictions in most.
    assert!(sums[0] < 0.85 * sums[1], "{sums:?}");
}

#[test]
fn files_are_what_is_made_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let text = at("text.txt");
    std::fs::write(&text, &qkov::measure::SAMPLE[..9000]).unwrap();
    let ppl = |args: &[&str]| {
        let (code, out) = qkov(&[&["eval", "-f", &text, "-c", "256", "--json"], args].concat());
        assert_eq!(code, 0, "{out}");
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        json["ppl"].as_f64().unwrap()
    };
    let form = "lowrank:ratio=0.6";
    let (file, plain) = (at("merged.gguf"), at("plain.gguf"));
    let (code, out) = qkov(&["merge", "-o", &file, "--form", form]);
    assert_eq!(code, 0, "{out}");
    assert_eq!(ppl(&["-m", &file]), ppl(&["--form", form]));
    let (code, out) = qkov(&["merge", "-o", &file, "--form", form]);
    assert!(code == 2 && out.contains("--force"), "{out}");
    let swapped = at("swapped.gguf");
    let args = ["--form", form, "--norm", "0-1=softmax1", "--mask", "2=window:n=50"];
    let (code, out) = qkov(&[&["merge", "-o", &swapped], &args[..]].concat());
    assert_eq!(code, 0, "{out}");
    assert_eq!(ppl(&["-m", &swapped]), ppl(&args));
    let gguf = Gguf::open(swapped.as_ref()).unwrap();
    // What was there before, and what is new.
    for (key, text) in [("normalizer", "softmax;"), ("mask", "causal;2=window:n=50")] {
        let found = gguf.str(&format!("qkov.attention.{key}")).unwrap().unwrap();
        assert!(found.starts_with(text), "{key}: {found}");
    }
    let (code, out) = qkov(&["merge", "-m", &file, "-o", &plain, "--form", "lowrank:ratio=0.5"]);
    assert!(code == 2 && out.contains("rewritten already"), "{out}");
    let form = "lowrank:qk=48,ov=48,shared=yes";
    let (code, out) = qkov(&["merge", "-o", &plain, "--form", form, "--stock"]);
    assert_eq!(code, 0, "{out}");
    let gguf = Gguf::open(plain.as_ref()).unwrap();
    assert!(gguf.metadata().all(|(key, _)| !key.starts_with("qkov.")));
    assert_eq!(gguf.u32("llama.rope.dimension_count").unwrap(), Some(48));
    let (stock, own) = (ppl(&["-m", &plain]), ppl(&["--form", form]));
    assert!((stock / own - 1.0).abs() < 2e-3, "{stock} {own}");
}

#[test]
fn what_cannot_be_is_refused() {
    let out = "/nowhere/x.gguf";
    let gpt2 = format!("{}/tests/golden/gpt2.gguf", env!("CARGO_MANIFEST_DIR"));
    let cases: &[(&[&str], &str)] = &[
        (
            &["generate", "-p", "x", "--form", "lowrank:ratio=0"],
            "ratio = 0; allowed more than 0, at most 1",
        ),
        (
            &["generate", "-p", "x", "--form", "lowrank:ratio=1.5"],
            "ratio = 1.5; allowed more than 0, at most 1",
        ),
        (&["generate", "-p", "x", "--form", "lowrank:qk=65"], "qk = 65; heads of layer 0 have 64"),
        (
            &["generate", "-p", "x", "--form", "nope"],
            "form \"nope\" is not known; known: split, center, lowrank",
        ),
        (&["generate", "-p", "x", "--form", "0.1=lowrank"], "all heads of a layer have one form"),
        (&["generate", "-p", "x", "--form", "7=lowrank"], "layer \"7\"; allowed"),
        (
            &["generate", "-p", "x", "--form", "lowrank:ratio=0.5,center=yes", "--norm", "sigmoid"],
            "means can only be taken out",
        ),
        (
            &["generate", "-p", "x", "--form", "lowrank:ratio=0.5", "--form-tokens", "20"],
            "the text has 20 tokens; two windows of 512",
        ),
        (&["merge", "-o", out], "nothing to rewrite"),
        (
            &["merge", "-o", out, "--form", "lowrank:ratio=0.5", "--type", "Q9"],
            "--type Q9: cannot be written",
        ),
        (&["merge", "-o", out, "--form", "lowrank:ratio=0.5", "--stock"], "shared=yes"),
        (
            &[
                "merge",
                "-o",
                out,
                "--form",
                "lowrank:qk=4,ov=4",
                "--stock",
                "-m",
                &gpt2,
                "--form-tokens",
                "300",
            ],
            "--stock: a plain file of the architecture gpt2",
        ),
        (
            &["merge", "-o", out, "--form", "lowrank:ratio=0.5", "--mask", "prefix", "--stock"],
            "--norm, --mask: a plain file has those",
        ),
        (&["merge", "--sweep", "--form", "split"], "the form split has no ranks"),
    ];
    for (args, message) in cases {
        let (code, text) = qkov(args);
        assert_eq!(code, 2, "{args:?}: {text}");
        assert!(text.contains(message), "{args:?}: {text}");
    }
}

#[test]
fn grams_are_kept_in_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (grams, merged, plan) = (at("own.grams"), at("merged.gguf"), at("plan.toml"));
    let merge = |args: &[&str]| {
        let all = ["merge", "-o", &merged, "--force"];
        let (code, out) = qkov(&[&all[..], args].concat());
        (code, out, std::fs::read(&merged).unwrap_or_default())
    };
    let form = ["--form", "lowrank:ratio=0.5"];
    let kept = [&form[..], &["--form-grams", &grams]].concat();
    let (code, out, plain) = merge(&form);
    assert_eq!(code, 0, "{out}");
    assert!(merge(&kept).2 == plain, "written");
    assert!(merge(&kept).2 == plain, "read");

    // What is in the file is what is used.
    let written = Gguf::open(grams.as_ref()).unwrap();
    let same = |t: &qkov::gguf::Tensor| written.data(t).to_vec();
    let write = |change: &dyn Fn(&str, &mut Vec<u8>) -> bool| {
        let mut writer = Writer::new();
        writer.copy_metadata(&written).unwrap();
        for tensor in written.tensors() {
            let (mut data, mut dims) = (same(tensor), tensor.dims.clone());
            if change(&tensor.name, &mut data) {
                dims = vec![data.len() as u64 / 8];
            }
            writer.tensor(&tensor.name, tensor.ty, &dims, Data::View(Bytes::from(data))).unwrap();
        }
        writer.write(grams.as_ref()).unwrap();
    };
    write(&|name, data| {
        if name == "blk.1.keys.0" {
            data.as_chunks_mut::<8>().0.iter_mut().for_each(|x| *x = (-1.0f64).to_le_bytes());
        }
        false
    });
    assert!(merge(&kept).2 != plain);
    write(&|name, data| {
        data.truncate(if name == "blk.1.keys.0" { 80 } else { data.len() });
        name == "blk.1.keys.0"
    });
    let (code, out, _) = merge(&kept);
    assert!(code == 3 && out.contains("\"blk.1.keys.0\" has 10 elements"), "{out}");
    write(&|name, data| {
        if name == "blk.0.key_means.0" {
            data[..8].copy_from_slice(&f64::NAN.to_le_bytes());
        }
        false
    });
    let (code, out, _) = merge(&kept);
    assert!(code == 3 && out.contains("not finite"), "{out}");

    // Those of another text are written over, other files are not.
    let (code, out, other) = merge(&[&kept[..], &["--form-text", "README.md"]].concat());
    assert!(code == 0 && other != plain, "{out}");
    assert!(merge(&kept).2 == plain);
    let model = format!("{}/tests/golden/llama.gguf", env!("CARGO_MANIFEST_DIR"));
    let (code, out, _) = merge(&[&form[..], &["--form-grams", &model]].concat());
    assert!(code == 3 && out.contains("not a file of Grams"), "{out}");

    // Beside a plan.
    let text = format!("format = 1\nnorm = []\nform = [\"{}\"]\n", form[1]);
    std::fs::write(&plan, text).unwrap();
    assert!(merge(&["--plan", &plan]).2 == plain);
    let beside = at("plan.toml.grams");
    assert!(std::fs::read(&beside).unwrap() == std::fs::read(&grams).unwrap());
}
