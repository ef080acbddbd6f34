//! Damaged weights: numbers that are not finite end in an error that names where they began.

use std::sync::Arc;

use qkov::arch::Pooling;
use qkov::engine::{Asked, CacheType, Threads};
use qkov::error::{Error, Result};
use qkov::gguf::{Bytes, Data, Gguf, Tensor, Writer};
use qkov::model::Model;
use qkov::normalizer::NORMALIZERS;
use qkov::session::pool::{Pool, Step};
use qkov::session::{Options, Session};

use crate::families::files;
use crate::tiny::Tiny;

const TOKENS: [u32; 5] = [5, 3, 7, 4, 6];

fn options() -> Options {
    Options {
        n_threads: Threads { one: 1, batch: 1 },
        pin: false,
        n_ctx: Some(16),
        cache: (CacheType::F32, CacheType::F32),
        ..Options::default()
    }
}

/// The file with this number, as a tensor's type has it, everywhere in the tensor.
fn filled(gguf: &Gguf, tensor: &Tensor, number: f32) -> Gguf {
    // The upper half of an F16 that is one, and what follows a scale in a block.
    let half = if number.is_nan() { 0x7E } else { 0x7C };
    let block = match tensor.ty.name {
        "F32" => number.to_le_bytes().to_vec(),
        "F16" => vec![0, half],
        "Q8_0" => [&[0, half], &[1; 32][..]].concat(),
        name => panic!("{name}"),
    };
    let data = block.repeat(tensor.n_bytes() / block.len());
    let mut writer = Writer::new();
    writer.copy_metadata(gguf).unwrap();
    for other in gguf.tensors() {
        let data = match other.name == tensor.name {
            true => Bytes::from(data.clone()),
            false => gguf.data(other),
        };
        writer.tensor(&other.name, other.ty, &other.dims, Data::View(data)).unwrap();
    }
    Gguf::parse(Bytes::from(writer.to_bytes().unwrap())).unwrap()
}

/// What comes of a few tokens: logits, or an embedding where the model has none.
fn run(gguf: Gguf) -> Result<()> {
    let model = Arc::new(Model::from_gguf(gguf)?);
    let predicts = model.output.is_some() && model.hparams.causal;
    let mut session = Session::new(model, &options())?;
    if !predicts {
        return session.embed(&TOKENS, Pooling::Mean).map(drop);
    }
    session.feed(&TOKENS[..3])?;
    session.feed(&TOKENS[3..4])?;
    session.finite_logits().map(drop)
}

#[test]
fn every_tensor_of_every_family() {
    let (mut n_named, mut n_refused, mut silent) = (0, 0, Vec::new());
    for (name, gguf) in files() {
        run(gguf.clone()).unwrap_or_else(|e| panic!("{name}: {e}"));
        for tensor in gguf.tensors() {
            for number in [f32::NAN, f32::INFINITY] {
                let case = format!("{name}: {} = {number}", tensor.name);
                let is_clamped = ["gate_exps", "up_exps"].iter().any(|n| tensor.name.contains(n));
                if name == "gpt-oss" && is_clamped && number.is_infinite() {
                    continue;
                }
                let Err(error) = run(filled(&gguf, tensor, number)) else {
                    silent.push(case);
                    continue;
                };
                let Error::Runtime(text) = error else {
                    // What is in no sum is looked at when a model is read.
                    let name = &tensor.name;
                    assert!(
                        ["rope_", "exp_probs_b", "attn_sinks"].iter().any(|n| name.contains(n)),
                        "{case}"
                    );
                    n_refused += 1;
                    continue;
                };
                let layer = tensor.name.strip_prefix("blk.").and_then(|n| n.split('.').next());
                let place = match (layer, tensor.name.as_str()) {
                    (Some(layer), _) => format!("layer {layer} "),
                    (_, n) if n.starts_with("output") => "the output ".to_string(),
                    _ => "the token embedding ".to_string(),
                };
                if !text.starts_with(&place) {
                    silent.push(format!("{case}: {text}"));
                }
                n_named += 1;
            }
        }
    }
    assert!(silent.is_empty(), "{silent:#?}");
    println!("{n_named} damaged tensors were named, {n_refused} refused before");
    assert!(n_named > 500);
}

#[test]
fn every_normalizer_lets_them_through() {
    let gguf = Gguf::parse(Bytes::from(Tiny::llama().bytes())).unwrap();
    let tensor = gguf.tensor("blk.1.attn_q.weight").unwrap();
    let damaged = filled(&gguf, tensor, f32::NAN);
    for entry in NORMALIZERS {
        let mut model = Model::from_gguf(damaged.clone()).unwrap();
        let mut plan = model.plan.clone();
        plan.set_normalizers(entry.name).unwrap();
        model.set_plan(plan);
        let mut session = Session::new(Arc::new(model), &options()).unwrap();
        for tokens in [&TOKENS[..4], &TOKENS[4..]] {
            session.feed(tokens).unwrap();
            let error = session.finite_logits().expect_err(entry.name).to_string();
            assert!(error.starts_with("layer 1 makes"), "{}: {error}", entry.name);
        }
    }
}

#[test]
fn only_the_text_with_the_damage_fails() {
    let gguf = Gguf::parse(Bytes::from(Tiny::llama().bytes())).unwrap();
    let tensor = gguf.tensor("token_embd.weight").unwrap();
    let mut data = gguf.data(tensor).to_vec();
    // A row of the embedding, which is no longer a row of the output.
    let row = tensor.n_bytes() / tensor.dims[1] as usize;
    data[9 * row..10 * row].fill(0xFF);
    let tiny = Tiny::llama();
    let dims = tensor.dims.clone();
    let tiny = tiny.tensor_of("output.weight", 0, &dims, gguf.data(tensor).to_vec());
    let tiny = tiny.tensor_of("token_embd.weight", 0, &dims, data);
    let gguf = Gguf::parse(Bytes::from(tiny.bytes())).unwrap();
    let model = Arc::new(Model::from_gguf(gguf).unwrap());

    let mut session = Session::new(model.clone(), &options()).unwrap();
    session.feed(&[1, 2, 9]).unwrap();
    let text = session.finite_logits().unwrap_err().to_string();
    assert!(text.starts_with("the token embedding makes numbers that are not finite, token 2:"));
    // What comes later sees it, and the place stays.
    session.feed(&[3]).unwrap();
    assert_eq!(session.finite_logits().unwrap_err().to_string(), text);
    // Nothing of it is left where others follow.
    session.become_tokens(&[1, 2, 3], &[], &mut |_| true).unwrap();
    let sound = session.finite_logits().unwrap().to_vec();
    let mut fresh = Session::new(model.clone(), &options()).unwrap();
    fresh.feed(&[1, 2, 3]).unwrap();
    assert!(fresh.logits() == sound);

    let mut pool = Pool::new(model, &options()).unwrap();
    let mut both = [[1, 2, 9, 3], [7, 1, 2, 3]].map(|tokens| {
        let mut sequence = pool.sequence(pool.first().clone()).unwrap();
        pool.begin(&mut sequence, &tokens[..], false).unwrap();
        sequence
    });
    let [bad, good] = &mut both;
    let mut logits = Vec::new();
    let steps =
        &mut [Step { sequence: bad, n: 4, all: false }, Step { sequence: good, n: 4, all: false }];
    let asked = (Asked::Logits, &mut logits);
    let rows = pool.forward(steps, None, asked).unwrap();
    let result = both[0].check_finite(&logits[rows[0].clone()]);
    assert_eq!(result.unwrap_err().to_string(), text);
    both[1].check_finite(&logits[rows[1].clone()]).unwrap();
    both[0].forget();
    pool.begin(&mut both[0], &[1, 2, 3], false).unwrap();
    logits.clear();
    let step = Step { sequence: &mut both[0], n: 3, all: false };
    pool.forward(&mut [step], None, (Asked::Logits, &mut logits)).unwrap();
    both[0].check_finite(&logits).unwrap();
    assert!(logits == sound);
}

#[test]
fn generation_stops() {
    let gguf = Gguf::parse(Bytes::from(Tiny::llama().bytes())).unwrap();
    let tensor = gguf.tensor("blk.1.ffn_down.weight").unwrap();
    let mut writer = Writer::new();
    writer.copy_metadata(&gguf).unwrap();
    let damaged = filled(&gguf, tensor, f32::INFINITY);
    for tensor in damaged.tensors() {
        let data = Data::View(damaged.data(tensor));
        writer.tensor(&tensor.name, tensor.ty, &tensor.dims, data).unwrap();
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), writer.to_bytes().unwrap()).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_qkov"))
        .args(["generate", "-p", "ab", "-n", "8", "-m"])
        .arg(file.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let line = String::from_utf8(output.stderr).unwrap();
    assert!(line.contains("error: layer 1 makes numbers that are not finite, token "), "{line}");
}
