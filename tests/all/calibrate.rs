//! Fitting swapped normalizers, and the plan files that carry what was fitted.

use std::process::Command;
use std::sync::Arc;

use qkov::gguf::{Bytes, Gguf, Value};
use qkov::measure::SAMPLE;
use qkov::measure::calibrate::{Settings, apply, calibrate};
use qkov::measure::heads::observe;
use qkov::measure::quality::Windows;
use qkov::model::Model;
use qkov::plan::PlanFile;
use qkov::session::{Options, Session};

use crate::family;
use crate::tiny::Tiny;

const SETTINGS: Settings = Settings { rows: 64, means: true, n_threads: 2 };

fn session(model: Model) -> Session {
    let options = Options { n_ctx: Some(128), ..Options::default() };
    Session::new(Arc::new(model), &options).unwrap()
}

fn windows(model: &Model) -> Windows {
    let tokens = model.tokenizer.encode(SAMPLE, true, false).unwrap();
    Windows::new(tokens[..1024].to_vec(), 128).unwrap()
}

/// Mean over heads of the error of their outputs.
fn error(session: &mut Session, windows: &Windows) -> f64 {
    let stats = observe(session, windows, usize::MAX, &mut |_| {}).unwrap();
    stats.iter().map(|h| h.output_err).sum::<f64>() / stats.len() as f64
}

#[test]
fn what_is_equal_but_for_its_parameters_is_found() {
    // By another name and with another scale, softmax can be had back exactly.
    for wanted in ["temperature:tau=2", "softmax1", "softermax", "softpick", "sigmoid:renorm=l1"] {
        let mut model = family::softmax();
        model.set_normalizers(wanted).unwrap();
        let (wanted_plan, windows) = (model.plan.clone(), windows(&model));
        let sequences: Vec<_> = windows.inputs(&model.tokenizer).collect();
        let mut session = session(model);
        let fits = calibrate(
            &mut session,
            &sequences,
            &wanted_plan,
            (SETTINGS, true),
            &[],
            &mut |_, _| Ok(()),
        );
        for fit in fits.unwrap() {
            assert!(
                fit.err < 0.05 && fit.err <= fit.raw_err + 1e-3,
                "{wanted} {} {}",
                fit.raw_err,
                fit.err
            );
        }
        // As the engine computes it, over all rows.
        let error = error(&mut session, &windows);
        assert!(error < 0.06, "{wanted}: {error}");
    }
}

#[test]
fn a_plan_file_says_all_and_fits_one_model() {
    let mut model = family::softmax();
    model.set_normalizers("*=softmax;1-2=sigmoid;3.1=relu2:sinks=2").unwrap();
    model.set_masks("3=window:n=20").unwrap();
    let (wanted, windows) = (model.plan.clone(), windows(&model));
    let sequences: Vec<_> = windows.inputs(&model.tokenizer).collect();
    let (trained, hash) = (model.trained.clone(), model.gguf.hash());
    let mut first = session(model);
    let mut n_layers = 0;
    let mut done = |_: &[_], _: &_| {
        n_layers += 1;
        Ok(())
    };
    let fits =
        calibrate(&mut first, &sequences, &wanted, (SETTINGS, true), &[], &mut done).unwrap();
    assert_eq!((n_layers, fits.len()), (4, 13));
    let mut plan = trained.with_masks_of(&wanted);
    apply(&mut plan, &fits);
    first.set_plan(plan.clone()).unwrap();
    let text = PlanFile::of(&plan, &trained, &hash).text().unwrap();
    let mut model = family::softmax();
    model.apply(&PlanFile::parse(&text).unwrap()).unwrap();
    assert_eq!(model.plan.names()[0], "softmax+sigmoid+relu2 (14 settings)");
    let mut second = session(model);
    let logits = |s: &mut Session| s.feed_wanting(&sequences[0], 100..127).unwrap().to_vec();
    first.rewind(0);
    let (before, after) = (logits(&mut first), logits(&mut second));
    let far = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far < 0.05, "{far}");
    // Normalizers chosen over it take the means with them.
    let mut model = family::softmax();
    model.apply(&PlanFile::parse(&text).unwrap()).unwrap();
    model.set_normalizers("softmax").unwrap();
    assert!(model.plan.layers.iter().flat_map(|l| &l.means).all(Option::is_none));
    // What was fitted in earlier layers can be handed in again.
    let known: Vec<_> = fits.iter().filter(|f| f.layer < 2).cloned().collect();
    let again =
        calibrate(&mut second, &sequences, &wanted, (SETTINGS, true), &known, &mut |_, _| Ok(()));
    let texts = |fits: &[qkov::measure::calibrate::Fitted]| -> Vec<String> {
        fits.iter().map(|f| format!("{}.{} {}", f.layer, f.head, f.choice.text())).collect()
    };
    assert_eq!(texts(&fits), texts(&again.unwrap()));
}

#[test]
fn plans_that_do_not_fit_are_refused() {
    let refused = |text: &str| -> String {
        let result = PlanFile::parse(text).and_then(|file| family::softmax().apply(&file));
        result.unwrap_err().to_string()
    };
    let hash = family::softmax().gguf.hash();
    for (text, why) in [
        ("format = 1\nmodel = \"00\"\nnorm = []\n", "fitted to a model with hash 00"),
        ("format = 2\nnorm = []\n", "plan of format 2; this program reads 1"),
        ("format = 1\nnorm = [\"9=softmax\"]\n", "layer \"9\"; allowed *, numbers 0 to 3"),
        ("format = 1\nnorm = [\"0.7=softmax\"]\n", "head \"7\""),
        ("format = 1\nnorm = [\"x\"]\n", "normalizer \"x\" is not known"),
        ("format = 1\nnorm = []\nmeans = { \"8.0\" = [1.0] }\n", "head \"8.0\""),
        ("format = 1\nnorm = []\nmeans = { \"0.6\" = [1.0] }\n", "head \"0.6\""),
        ("format = 1\nnorm = []\nmeans = { \"0.0\" = [1.0] }\n", "has 1 numbers; allowed 32"),
        ("format = 1\nnorm = []\nmask = [\"0=repeat\"]\n", "for all layers or none"),
        ("format = 1\nnorm = [\n", "line 2"),
        ("format = 1\nnorm = []\nnorms = []\n", "unknown field"),
        ("norm = []\n", "missing field `format`"),
    ] {
        let error = refused(text);
        assert!(error.contains(why), "{text}: {error}");
    }
    let any = PlanFile::parse("format = 1\nnorm = [\"*=sigmoid\"]\n").unwrap();
    family::softmax().apply(&any).unwrap();
    let own = PlanFile::parse(&format!("format = 1\nmodel = \"{hash}\"\nnorm = []\n")).unwrap();
    family::softmax().apply(&own).unwrap();
}

#[test]
fn a_file_says_what_it_was_trained_with() {
    let open = |tiny: &Tiny| Model::from_gguf(Gguf::parse(Bytes::from(tiny.bytes())).unwrap());
    let logits = |model: Model| {
        let mut session = Session::new(Arc::new(model), &Options::default()).unwrap();
        session.feed_wanting(&[5, 6, 7, 8], 0..4).unwrap().to_vec()
    };
    let plain = Tiny::llama();
    let with = |norm: &str| {
        let mut model = open(&plain).unwrap();
        model.set_normalizers(norm).unwrap();
        logits(model)
    };
    let named = plain.clone().set("qkov.attention.normalizer", "*=softmax;1=entmax:alpha=1.5");
    assert!(logits(open(&named).unwrap()) == with("1=entmax:alpha=1.5"));
    assert_eq!(open(&named).unwrap().trained.names()[0], "softmax+entmax:alpha=1.5");
    let mut masked = open(&plain).unwrap();
    masked.set_masks("1=window:n=2").unwrap();
    let named = plain.clone().set("qkov.attention.mask", "1=window:n=2");
    assert!(logits(open(&named).unwrap()) == logits(masked));
    assert_eq!(open(&named).unwrap().trained.names()[2], "causal+window:n=2");
    let n_head = open(&plain).unwrap().hparams.layers[0].n_head;
    let sinks: Vec<f32> = (0..n_head).map(|h| h as f32 - 0.5).collect();
    let data = sinks.iter().flat_map(|s| s.to_le_bytes()).collect();
    let with_sinks = plain.clone().tensor_of("blk.1.attn_sinks.weight", 0, &[n_head as u64], data);
    let heads: Vec<_> =
        sinks.iter().enumerate().map(|(h, s)| format!("1.{h}=sink:s={s}")).collect();
    let model = open(&with_sinks).unwrap();
    assert!(model.warnings.is_empty(), "{:?}", model.warnings);
    assert!(logits(model) == with(&heads.join(";")));
    for (key, text) in
        [("qkov.attention.normalizer", "9=softmax"), ("qkov.attention.mask", "9=causal")]
    {
        let bad = plain.clone().set(key, text);
        let error = open(&bad).err().unwrap().to_string();
        assert!(error.contains(key) && error.contains("\"9\""), "{error}");
        let bad = plain.clone().set(key, Value::U32(1));
        assert!(open(&bad).err().unwrap().to_string().contains("expected"));
    }
}

#[test]
fn the_command_writes_a_plan_that_others_read() {
    let dir = tempfile::tempdir().unwrap();
    let plan = dir.path().join("plan.toml");
    let run = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_qkov")).args(args).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
    };
    let path = plan.to_str().unwrap();
    let small = ["--tokens", "512", "--rows", "32", "-c", "128"];
    let args = [&["calibrate", "--norm", "0-1=sigmoid", "-o", path], &small[..]].concat();
    let (code, table, error) = run(&args);
    assert_eq!(code, 0, "{error}");
    assert!(table.lines().count() >= 3, "{table}");
    let (code, text, _) = run(&["generate", "-p", "The", "-n", "3", "--plan", path]);
    assert!(code == 0 && !text.is_empty());
    let (code, _, error) = run(&["calibrate", "-o", path]);
    assert!(code == 2 && error.contains("nothing to fit"), "{error}");
    std::fs::write(&plan, "format = 1\nmodel = \"0\"\nnorm = []\n").unwrap();
    let (code, _, error) = run(&["generate", "-p", "The", "-n", "3", "--plan", path]);
    assert!(code == 2 && error.contains("plan.toml") && error.contains("hash 0"), "{error}");
}
