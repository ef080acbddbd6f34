//! The engine ggml against the engine cpu: every architecture, normalizer, mask and form.

use std::path::Path;
use std::sync::Arc;

use qkov::arch::Pooling;
use qkov::engine::{CacheType, Devices, Kind, Threads};
use qkov::gguf::{Bytes, Data, Gguf, Writer};
use qkov::mask::MASKS;
use qkov::merge::FORMS;
use qkov::model::{Model, adapted};
use qkov::normalizer::NORMALIZERS;
use qkov::quant::{format_named, format_of};
use qkov::session::{Options, Session};

use crate::cli::ok;
use crate::embed::encoders;
use crate::golden::{FOLDER, goldens};
use crate::lora::adapter_for;
use crate::lowrank::formed;

/// The device to test, where that is not the processor; see CONTRIBUTING.
fn device() -> Option<String> {
    std::env::var("QKOV_TEST_DEVICE").ok()
}

/// What engines may differ by in 32-bit floats. Others than the processor attend in half precision.
fn limit() -> f64 {
    if device().is_some() { 2e-4 } else { 1e-5 }
}

/// A session of an engine; `exact`: nothing is rounded that need not be.
fn session(engine: Kind, model: &Arc<Model>, n_ctx: usize, exact: bool) -> Session {
    let cache = if exact { CacheType::F32 } else { CacheType::F16 };
    let options = Options {
        n_ctx: Some(n_ctx),
        // ggml's threads wait for each other without sleep, which takes long beside other tests.
        n_threads: Threads { one: 1, batch: 1 },
        cache: (cache, cache),
        exact,
        engine,
        devices: Devices { names: device().into_iter().collect(), ..Devices::default() },
        ..Options::default()
    };
    Session::new(model.clone(), &options).unwrap()
}

fn open(name: &str) -> Model {
    Model::open(&Path::new(FOLDER).join(format!("{name}.gguf"))).unwrap()
}

/// KL divergence of rows of logits, the largest.
fn divergence(a: &[f32], b: &[f32], n_vocab: usize) -> f64 {
    assert_eq!(a.len(), b.len());
    assert!(!a.is_empty());
    let log_softmax = |x: &[f32]| -> Vec<f64> {
        let max = f64::from(x.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x)));
        let sum: f64 = x.iter().map(|x| (f64::from(*x) - max).exp()).sum();
        x.iter().map(|x| f64::from(*x) - max - sum.ln()).collect()
    };
    let mut worst = 0.0;
    for (a, b) in a.chunks(n_vocab).zip(b.chunks(n_vocab)) {
        let (a, b) = (log_softmax(a), log_softmax(b));
        let kl: f64 = a.iter().zip(&b).map(|(a, b)| a.exp() * (a - b)).sum();
        // Unlike `max`, this keeps a NaN.
        worst = if worst >= kl { worst } else { kl };
    }
    worst
}

/// The model with all numbers as 32-bit floats.
fn in_floats(model: &Model) -> Model {
    let mut writer = Writer::new();
    writer.copy_metadata(&model.gguf).unwrap();
    for tensor in model.gguf.tensors() {
        let data = model.gguf.data(tensor);
        let mut floats = vec![0.0; tensor.n_elements() as usize];
        format_of(tensor.ty.id).unwrap().dequantize(&data, &mut floats);
        let bytes: Vec<u8> = floats.iter().flat_map(|x| x.to_le_bytes()).collect();
        let ty = format_named("F32").unwrap().ty;
        writer.tensor(&tensor.name, ty, &tensor.dims, Data::View(Bytes::from(bytes))).unwrap();
    }
    let gguf = Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap();
    let mut floats = Model::from_gguf(gguf).unwrap();
    floats.set_plan(model.plan.clone());
    floats
}

/// Divergence between engines.
fn between(model: &Arc<Model>, tokens: &[u32], exact: bool) -> f64 {
    distance(model, tokens, [(Kind::Cpu, exact), (Kind::Ggml, exact)])
}

/// Divergence between engines that are exact, or not, over tokens that are read as a prompt, in part,
/// and then one by one.
fn distance(model: &Arc<Model>, tokens: &[u32], [a, b]: [(Kind, bool); 2]) -> f64 {
    let of = |(engine, exact)| {
        // Some masks read a prompt twice.
        let n_ctx = model.hparams.within_positions(3 * tokens.len() / 2);
        let mut session = session(engine, model, n_ctx, exact);
        let (prompt, rest) = tokens.split_at(tokens.len() / 2);
        session.feed_prompt(prompt).unwrap();
        let mut logits = session.logits().to_vec();
        let (part, single) = rest.split_at(rest.len() / 2);
        logits.extend(session.feed_wanting(part, 0..part.len()).unwrap());
        for token in single {
            session.feed(&[*token]).unwrap();
            logits.extend(session.logits());
        }
        // What was rewound is not seen.
        session.rewind(prompt.len() + 1);
        session.feed(&[single[0]]).unwrap();
        logits.extend(session.logits());
        logits
    };
    divergence(&of(a), &of(b), model.hparams.n_vocab)
}

#[test]
fn every_architecture_computes_the_same() {
    let mut failed = Vec::new();
    let all = goldens();
    for golden in &all {
        let floats = Arc::new(in_floats(&golden.model));
        let as_floats = between(&floats, &golden.tokens, true);
        let as_it_is = between(&golden.model, &golden.tokens, false);
        // What rounding activations does to a model as small as this.
        let noise = [(Kind::Cpu, true), (Kind::Cpu, false)];
        let noise = distance(&golden.model, &golden.tokens, noise);
        eprintln!(
            "{}: {as_floats:.1e} in floats; as it is {as_it_is:.1e}, of {noise:.1e} by rounding",
            golden.name
        );
        // Not `>`, which NaN would pass.
        if !(as_floats <= limit() && as_it_is <= f64::max(1e-3, 2.0 * noise)) {
            failed.push(&golden.name);
        }
    }
    assert!(all.len() > 20 && failed.is_empty(), "{failed:?}");
}

#[test]
fn every_encoder_makes_the_same_states() {
    for encoder in encoders() {
        let of = |engine| {
            let mut session = session(engine, &encoder.model, encoder.tokens.len(), true);
            session.embed(&encoder.tokens, Pooling::None).unwrap()
        };
        let (a, b) = (of(Kind::Cpu), of(Kind::Ggml));
        let size = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        let error = a.iter().zip(&b).fold(0.0f32, |m, (a, b)| m.max((a - b).abs()));
        assert!(a.len() == b.len() && error < 2e-3 * size, "{}: {error} of {size}", encoder.name);
    }
}

#[test]
fn every_normalizer_computes_the_same() {
    let tokens = &goldens()[0].tokens.clone();
    let mut failed = Vec::new();
    for kind in NORMALIZERS {
        for text in [kind.name.to_string(), format!("{}:scale=0.9,gain=1.1,sinks=2", kind.name)] {
            let mut model = open("llama");
            model.set_normalizers(&text).unwrap();
            let kl = between(&Arc::new(in_floats(&model)), tokens, true);
            if kl.is_nan() || kl > limit() {
                failed.push(format!("{text}: {kl}"));
            }
        }
    }
    assert!(failed.is_empty(), "{failed:?}");
}

#[test]
fn heads_may_have_normalizers_of_their_own() {
    let tokens = &goldens()[0].tokens.clone();
    for text in ["*.0=sink:s=1.5", "0.1=entmax;1.*=temperature:tau=2", "*.0=softmax1;*.1=softmax"] {
        let mut model = open("llama");
        model.set_normalizers(text).unwrap();
        let kl = between(&Arc::new(in_floats(&model)), tokens, true);
        assert!(kl < limit(), "{text}: {kl}");
    }
}

#[test]
fn every_mask_computes_the_same() {
    let tokens = &goldens()[0].tokens.clone();
    for mask in MASKS {
        for normalizer in ["softmax", "relu"] {
            let mut model = open("llama");
            model.set_masks(mask.name).unwrap();
            model.set_normalizers(normalizer).unwrap();
            let kl = between(&Arc::new(in_floats(&model)), tokens, true);
            assert!(kl < limit(), "{} with {normalizer}: {kl}", mask.name);
        }
    }
}

#[test]
fn every_form_computes_the_same() {
    let mut n = 0;
    for golden in goldens() {
        for form in FORMS {
            for normalizer in ["softmax", "sigmoid"] {
                let mut model = open(&golden.name);
                let mut plan = model.plan.clone();
                plan.set_forms(form.name()).unwrap();
                plan.set_normalizers(normalizer).unwrap();
                let rewrites = plan.layers.iter().any(|l| l.form.form().rewrites());
                if form.name() == "split" || rewrites || model.check_forms(&plan).is_err() {
                    continue;
                }
                model.set_plan(plan);
                let kl = between(&Arc::new(in_floats(&model)), &golden.tokens, true);
                assert!(kl < limit(), "{} of {}: {kl}", form.name(), golden.name);
                n += 1;
            }
        }
    }
    assert!(n >= 4, "{n} forms");
}

/// Heads of many widths, with planes of their own; those of norms too.
#[test]
fn rewritten_heads_compute_the_same() {
    let mut n = 0;
    for golden in goldens() {
        for form in ["lowrank:ratio=0.6", "center"] {
            let Ok(gguf) = formed(&golden.model.gguf, form) else { continue };
            let model = Model::from_gguf(gguf).unwrap();
            let kl = between(&Arc::new(in_floats(&model)), &golden.tokens, true);
            assert!(kl < limit(), "{form} of {}: {kl}", golden.name);
            n += 1;
        }
    }
    assert!(n > 20, "{n} models");
}

#[test]
fn adapters_compute_the_same() {
    for golden in goldens().iter().filter(|g| g.model.hparams.experts.is_none()) {
        let floats = in_floats(&golden.model).gguf;
        let adapter = adapter_for(&floats, 4, |_| true);
        let model = Model::from_gguf(adapted(floats, adapter, 0.7).unwrap()).unwrap();
        let kl = between(&Arc::new(model), &golden.tokens, true);
        assert!(kl < limit(), "{}: {kl}", golden.name);
    }
}

#[test]
fn the_model_that_ships_predicts_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (text, base) = (at("text"), at("base"));
    std::fs::write(&text, &qkov::measure::SAMPLE[..4000]).unwrap();
    // Both round activations to 8 bits, each in its own blocks; swapped in, entmax makes more of it.
    for (norm, most) in [("softmax", 1e-2), ("entmax15", 5e-2)] {
        let args = ["eval", "-f", &text, "-c", "256", "-t", "1", "--norm", norm, "--json"];
        ok(&[&args[..], &["--engine", "cpu", "--save-base", &base]].concat(), "");
        let json = ok(&[&args[..], &["--engine", "ggml", "--base", &base]].concat(), "");
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let kl = json["kl_mean"].as_f64().unwrap();
        println!("{norm}: KL {kl:.1e}");
        assert!(kl < most, "{norm}: {kl}");
    }
}
