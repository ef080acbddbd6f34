//! Means that are taken out of what is cached.

use std::sync::Arc;

use qkov::arch::Pooling;
use qkov::engine::CacheType;
use qkov::gguf::Gguf;
use qkov::measure::forms;
use qkov::measure::grams::gather;
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::cli::code_and_text as qkov;
use crate::family;
use crate::lowrank::{changed, distance, golden, session, tokens};

const FORMS: [&str; 2] = ["center", "center:data=no"];

fn formed(gguf: &Gguf, form: &str) -> Gguf {
    let model = Model::from_gguf(gguf.clone()).unwrap();
    let mut plan = model.plan.clone();
    plan.set_forms(form).unwrap();
    let text = tokens(model.hparams.n_vocab, 64);
    let grams = gather(&mut session(gguf.clone(), 64), &[text], &mut |_| {}).unwrap();
    forms::rewritten(&model, &plan, &grams, None).unwrap()
}

/// All logits of some tokens, or the states of an encoder.
fn logits(mut session: Session) -> Vec<f32> {
    let tokens = tokens(session.model().hparams.n_vocab, 40);
    if session.model().output.is_none() {
        return session.embed(&tokens, Pooling::None).unwrap();
    }
    let mut out = session.feed_wanting(&tokens[..30], 0..30).unwrap().to_vec();
    for token in &tokens[30..] {
        out.extend_from_slice(session.feed_wanting(&[*token], 0..1).unwrap());
    }
    out
}

#[test]
fn no_matrix_changes_and_no_logit() {
    let mut refused = Vec::new();
    for (name, gguf) in
        crate::families::files().into_iter().chain([("ours".into(), family::gguf("softmax"))])
    {
        let whole = logits(session(gguf.clone(), 64));
        for form in FORMS {
            let model = Model::from_gguf(gguf.clone()).unwrap();
            let mut plan = model.plan.clone();
            plan.set_forms(form).unwrap();
            if let Err(reason) = forms::check(&model, &plan) {
                refused.push((name.clone(), reason.to_string()));
                continue;
            }
            let own = formed(&gguf, form);
            for tensor in gguf.tensors().iter().filter(|t| t.name.ends_with(".weight")) {
                let new = own.tensors().iter().find(|t| t.name == tensor.name).unwrap();
                assert_eq!(own.data(new)[..], gguf.data(tensor)[..], "{}", tensor.name);
            }
            let model = Model::from_gguf(own.clone()).unwrap();
            assert!(model.warnings.is_empty(), "{:?}", model.warnings);
            let bias = model.layers.last().unwrap().attn_v.bias.clone();
            if form == "center:data=no" {
                // Nothing, or nothing left.
                assert!(bias.iter().flatten().all(|x| *x == 0.0), "{name}");
            } else {
                assert!(bias.unwrap().iter().any(|x| *x != 0.0), "{name}");
            }
            let far = distance(&whole, &logits(session(own, 64)));
            assert!(far < 1e-4, "{name} {form}: {far}");
        }
    }
    let names: Vec<_> = refused.iter().step_by(2).map(|(name, _)| &name[..]).collect();
    assert_eq!(names, ["deepseek2", "deepseek3", "gemma2", "gpt-oss", "mpt"], "{refused:?}");
}

#[test]
fn the_text_stays_the_same() {
    let write = |gguf: Gguf| -> Vec<u32> {
        let mut session = session(gguf, 256);
        session.feed(&[3]).unwrap();
        let mut out = Vec::new();
        for _ in 0..200 {
            let logits = session.logits().iter().enumerate();
            let best = logits.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0 as u32;
            out.push(best);
            session.feed(&[best]).unwrap();
        }
        out
    };
    let whole = write(family::gguf("softmax"));
    FORMS.iter().for_each(|form| {
        assert_eq!(write(formed(&family::gguf("softmax"), form)), whole, "{form}")
    });
}

#[test]
fn rounded_caches_lose_less() {
    // Keys and values whose means are far larger than what differs.
    let gguf = changed(&golden("gpt2"), |name, data, _| {
        if name.ends_with("attn_qkv.bias") {
            let n = data.len() / 3;
            for (i, x) in data[n..].iter_mut().enumerate() {
                *x += 4.0 + (i % 5) as f32;
            }
        }
    });
    let whole = logits(session(gguf.clone(), 64));
    let rounded = |gguf: Gguf| {
        let cache = (CacheType::Q4_0, CacheType::Q4_0);
        let options = Options { n_ctx: Some(64), cache, exact: true, ..Options::default() };
        let model = Arc::new(Model::from_gguf(gguf).unwrap());
        distance(&whole, &logits(Session::new(model, &options).unwrap()))
    };
    let plain = rounded(gguf.clone());
    for form in FORMS {
        let centered = rounded(formed(&gguf, form));
        println!("{form}: {centered}, {plain} as trained");
        assert!(centered < 0.5 * plain, "{form}: {centered} {plain}");
    }
}

#[test]
fn centered_files_open_again() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("centered.gguf");
    let file = file.to_str().unwrap();
    let (code, text) = qkov(&["merge", "-o", file, "--form", "center"]);
    assert_eq!(code, 0, "{text}");
    let prompt = ["generate", "-p", "The old house", "-n", "8", "--temp", "0"];
    let plain = qkov(&prompt);
    assert_eq!(qkov(&[&prompt[..], &["-m", file]].concat()), plain);
    let (code, text) = qkov(&[&prompt[..], &["-m", file, "--norm", "sigmoid"]].concat());
    assert!(code == 2 && text.contains("means can only be taken out"), "{text}");
}

#[test]
fn plans_say_which_form_they_were_fitted_with() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let plan = at("plan.toml");
    let form = "lowrank:ratio=0.75,data=no";
    let fit =
        ["calibrate", "--norm", "softpick", "--form", form, "--tokens", "1024", "--out", &plan];
    let (code, text) = qkov(&[&fit[..], &["--rows", "200"]].concat());
    assert_eq!(code, 0, "{text}");
    let written = std::fs::read_to_string(&plan).unwrap();
    assert!(written.contains(&format!("0={form}")), "{written}");
    let ppl = |args: &[&str]| {
        let common = ["eval", "-f", "README.md", "-c", "128", "--json"];
        let (code, out) = qkov(&[&common, args].concat());
        assert_eq!(code, 0, "{out}");
        let json: serde_json::Value = serde_json::from_str(&out).unwrap();
        (json["ppl"].as_f64().unwrap(), json["form"].to_string())
    };
    let (own, name) = ppl(&["--plan", &plan]);
    assert!(name.contains("lowrank"), "{name}");
    assert_eq!(own, ppl(&["--plan", &plan, "--form", form]).0);
    assert_ne!(own, ppl(&["--norm", "softpick"]).0);
}

#[test]
fn budgets_count_in_comparisons() {
    let args = ["compare", "-f", "README.md", "--form", "lowrank:kl=0.05", "--no-yardsticks"];
    let (code, text) = qkov(&[&args[..], &["-c", "128", "--rounds", "0", "--json"]].concat());
    assert_eq!(code, 0, "{text}");
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    let variants = json.as_array().unwrap();
    let own = variants.iter().find(|v| v["role"] == "variant").unwrap();
    let kl = own["kl_mean"].as_f64().unwrap();
    assert!(kl > 0.0 && kl <= 0.05, "{kl}");
    assert!(own["form"].as_str().unwrap().starts_with("lowrank:ratio="), "{own}");
}
