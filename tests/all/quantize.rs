//! Quantized files: every kind against ggml row by row, and mixes against llama.cpp's
//! (`tests/golden/mixes.txt`, which `mixes` of `benches/peer` prints).

use std::collections::HashMap;
use std::sync::Arc;

use fancy_regex::Regex;
use qkov::ggml::quantize::{Importance, KINDS, Plan, Settings, Step, kind_named, writable};
use qkov::gguf::{Bytes, Gguf};
use qkov::model::Model;
use qkov::quant::{Type, format_of};
use qkov::session::{Options, Session};
use qkov::token::Tokenizer;

use crate::cli::{code_and_text, error, ok};
use crate::families::files;
use crate::forms::distance;
use crate::tiny::Tiny;

fn settings<'a>(kind: &str) -> Settings<'a> {
    Settings {
        kind: kind_named(kind).unwrap(),
        output: None,
        embedding: None,
        chosen: &[],
        pure: false,
        again: false,
        importance: None,
    }
}

fn parse(tiny: &Tiny) -> Gguf {
    Gguf::parse(Bytes::from(tiny.bytes())).unwrap()
}

/// The tiny Llama with rows of whole blocks of any type, or of `n` elements, and maybe experts.
fn llama(n: u64, experts: bool) -> Tiny {
    let mut tiny = Tiny::llama()
        .set("llama.embedding_length", n as u32)
        .set("llama.feed_forward_length", n as u32)
        .set("llama.rope.dimension_count", n as u32 / 2)
        .tensor("token_embd.weight", &[n, 257])
        .tensor("output_norm.weight", &[n]);
    if experts {
        tiny = tiny.set("llama.expert_count", 3).set("llama.expert_used_count", 2);
    }
    for i in 0..2 {
        for (name, n_out) in
            [("attn_q", n), ("attn_k", n / 2), ("attn_v", n / 2), ("attn_output", n)]
        {
            tiny = tiny.tensor(&format!("blk.{i}.{name}.weight"), &[n, n_out]);
        }
        for name in ["attn_norm", "ffn_norm"] {
            tiny = tiny.tensor(&format!("blk.{i}.{name}.weight"), &[n]);
        }
        for name in ["ffn_gate", "ffn_up", "ffn_down"] {
            let at = format!("blk.{i}.{name}");
            tiny = match experts {
                false => tiny.tensor(&format!("{at}.weight"), &[n, n]),
                true => tiny
                    .without_tensor(&format!("{at}.weight"))
                    .tensor(&format!("{at}_exps.weight"), &[n, n, 3]),
            };
        }
        if experts {
            tiny = tiny.tensor(&format!("blk.{i}.ffn_gate_inp.weight"), &[n, 3]);
        }
    }
    // Smaller than those of other tests, as there are more of them.
    for tensor in tiny.tensors.iter_mut().filter(|t| t.dims.len() > 1) {
        for x in tensor.data.as_chunks_mut::<4>().0 {
            *x = (f32::from_le_bytes(*x) / 4.0).to_le_bytes();
        }
    }
    tiny
}

/// Numbers for all columns.
fn importance(gguf: &Gguf) -> Importance {
    let number = |i: u64| (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 40) as f32 / 1e7 + 1e-3;
    let columns = |dims: &[u64]| dims[0] * dims.get(2).copied().unwrap_or(1);
    let blocks = gguf.tensors().iter().filter(|t| t.name.starts_with("blk") && t.dims.len() > 1);
    blocks.map(|t| (t.name.clone(), (0..columns(&t.dims)).map(number).collect())).collect()
}

/// The written file.
fn written(plan: Plan) -> Gguf {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("out.gguf");
    plan.write(&path, &[], &|_| {}).unwrap();
    Gguf::parse(Bytes::from(std::fs::read(path).unwrap())).unwrap()
}

fn floats(gguf: &Gguf, name: &str) -> Vec<f32> {
    let tensor = gguf.tensor(name).unwrap();
    let mut floats = vec![0.0; tensor.n_elements() as usize];
    assert!(ggml::Type::from_id(tensor.ty.id).unwrap().dequantize(&gguf.data(tensor), &mut floats));
    floats
}

/// Rows as ggml rounds them, one after the other.
fn rounded(x: &[f32], dims: &[u64], ty: &Type, importance: Option<&Vec<f32>>) -> Vec<u8> {
    let quantizer = ggml::Type::from_id(ty.id).unwrap().quantizer().unwrap();
    let (n, n_rows) = (dims[0] as usize, dims[1] as usize);
    let row = |(i, row): (usize, &[f32])| {
        let at = i / n_rows * n;
        quantizer.quantize(row, n, importance.map(|all| &all[at..at + n])).unwrap()
    };
    x.chunks(n).enumerate().flat_map(row).collect()
}

#[test]
fn every_kind_is_rounded_row_by_row() {
    let all: Vec<&str> = KINDS.iter().map(|kind| kind.name).collect();
    // Matrices that are rounded in several pieces, too.
    for (gguf, kinds) in [
        (shaped("mha"), &all[..]),
        (shaped("4x"), &all),
        (parse(&llama(256, true)), &["Q4_0", "Q4_K_M", "F16"]),
    ] {
        let importance = importance(&gguf);
        for kind in kinds.iter().map(|name| kind_named(name).unwrap()) {
            let settings = Settings { importance: Some(&importance), ..settings(kind.name) };
            let plan = Plan::new(&gguf, &settings).unwrap();
            let n_bytes = plan.n_bytes();
            let new = written(plan);
            assert_eq!(new.u32("general.file_type").unwrap(), Some(kind.id));
            assert_eq!(new.u32("general.quantization_version").unwrap(), Some(2));
            assert_eq!(new.tensors().iter().map(|t| t.n_bytes() as u64).sum::<u64>(), n_bytes);
            for old in gguf.tensors() {
                let (name, x) = (&old.name, floats(&gguf, &old.name));
                let tensor = new.tensor(name).unwrap();
                let importance = importance.get(name);
                let wanted = match tensor.ty == old.ty {
                    true => gguf.data(old).to_vec(),
                    false => rounded(&x, &old.dims, tensor.ty, importance),
                };
                assert!(*new.data(tensor) == wanted[..], "{} {name}", kind.name);
                let stays = old.dims.len() == 1 || name.contains("gate_inp");
                assert!(!stays || tensor.ty == old.ty, "{} {name}", kind.name);
            }
        }
    }
}

#[test]
fn experts_have_importance_of_their_own() {
    let gguf = parse(&llama(256, true));
    let (name, mut all) = ("blk.1.ffn_up_exps.weight", importance(&gguf));
    let made = |all: &Importance| {
        let plan = Plan::new(&gguf, &Settings { importance: Some(all), ..settings("Q2_K") });
        let new = written(plan.unwrap());
        new.data(new.tensor(name).unwrap()).to_vec()
    };
    let before = made(&all);
    all.get_mut(name).unwrap()[256..512].reverse();
    let after = made(&all);
    let third = before.len() / 3;
    let same = |i: usize| before[i * third..(i + 1) * third] == after[i * third..(i + 1) * third];
    assert_eq!([0, 1, 2].map(same), [true, false, true]);
}

fn logits(gguf: Gguf) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| i * 6 % 256).collect();
    logits_of(gguf, &tokens)
}

fn logits_of(gguf: Gguf, tokens: &[u32]) -> Vec<f32> {
    let model = Arc::new(Model::from_gguf(gguf).unwrap());
    let options = Options { exact: true, ..Options::default() };
    let mut session = Session::new(model, &options).unwrap();
    session.feed_wanting(tokens, 0..tokens.len()).unwrap().to_vec()
}

#[test]
fn what_is_written_predicts_much_the_same() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/models/books-18m-q5_k.gguf");
    let gguf = Gguf::open(file.as_ref()).unwrap();
    let tokenizer = Tokenizer::from_gguf(&gguf).unwrap();
    let tokens = tokenizer.encode(&qkov::measure::SAMPLE[..800], true, false).unwrap();
    let wanted = logits_of(gguf.clone(), &tokens);
    let n_vocab = wanted.len() / tokens.len();
    let ln_p = |row: &[f32]| -> Vec<f64> {
        let sum: f64 = row.iter().map(|x| f64::from(*x).exp()).sum();
        row.iter().map(|x| f64::from(*x) - sum.ln()).collect()
    };
    let mut last = f64::INFINITY;
    for (kind, most) in
        [("Q2_K", 2.0), ("Q3_K_M", 0.4), ("Q4_K_S", 0.1), ("Q6_K", 0.01), ("F16", 1e-4)]
    {
        let settings = Settings { again: true, ..settings(kind) };
        let found = logits_of(written(Plan::new(&gguf, &settings).unwrap()), &tokens);
        let rows = wanted.chunks(n_vocab).zip(found.chunks(n_vocab));
        let kl = rows.map(|(wanted, found)| {
            let (p, q) = (ln_p(wanted), ln_p(found));
            p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>()
        });
        let kl = kl.sum::<f64>() / tokens.len() as f64;
        println!("{kind}: {kl:.2e}");
        assert!(kl < most && kl < last, "{kind}: {kl}, before {last}");
        last = kl;
    }
}

#[test]
fn what_is_written_opens() {
    let gguf = parse(&llama(256, false));
    let settings = settings("F32");
    assert_eq!(logits(written(Plan::new(&gguf, &settings).unwrap())), logits(gguf.clone()));
    let importance = importance(&gguf);
    for kind in KINDS {
        let settings = Settings { importance: Some(&importance), kind, ..settings };
        let new = written(Plan::new(&gguf, &settings).unwrap());
        assert!(new.tensors().iter().all(|t| format_of(t.ty.id).is_some()), "{}", kind.name);
        assert!(logits(new).iter().all(|x| x.is_finite()), "{}", kind.name);
    }
}

/// A model without numbers that matter.
struct Shape {
    name: &'static str,
    arch: &'static str,
    n_layer: u32,
    /// Query heads and kv heads.
    heads: [u32; 2],
    n_expert: u32,
    /// Embeddings are the output as well.
    is_tied: bool,
    /// Queries, keys and values are fused, and the FFN has no gate.
    is_fused: bool,
}

const LLAMA: Shape = Shape {
    name: "llama32",
    arch: "llama",
    n_layer: 32,
    heads: [32, 8],
    n_expert: 0,
    is_tied: false,
    is_fused: false,
};

const SHAPES: &[Shape] = &[
    LLAMA,
    Shape { name: "llama80", n_layer: 80, heads: [64, 8], ..LLAMA },
    Shape { name: "8x", n_expert: 8, ..LLAMA },
    Shape { name: "4x", n_layer: 16, heads: [8, 8], n_expert: 4, ..LLAMA },
    Shape { name: "mha", n_layer: 12, heads: [8, 8], is_tied: true, ..LLAMA },
    Shape { name: "qwen80", arch: "qwen2", n_layer: 80, heads: [8, 4], ..LLAMA },
    Shape {
        name: "40x",
        arch: "qwen3moe",
        n_layer: 24,
        heads: [32, 4],
        n_expert: 40,
        is_tied: true,
        ..LLAMA
    },
    Shape { name: "falcon", arch: "falcon", heads: [8, 1], is_fused: true, ..LLAMA },
    Shape { name: "gpt2", arch: "gpt2", heads: [8, 8], is_tied: true, is_fused: true, ..LLAMA },
];

fn shaped(name: &str) -> Gguf {
    let shape = SHAPES.iter().find(|shape| shape.name == name).unwrap();
    let Shape { arch, n_layer, heads: [n_head, n_kv], n_expert, is_tied, is_fused, .. } = *shape;
    let key = |name: &str| format!("{arch}.{name}");
    let mut tiny = Tiny::default()
        .set("general.architecture", arch)
        .set(&key("block_count"), n_layer)
        .set(&key("attention.head_count"), n_head)
        .set(&key("attention.head_count_kv"), n_kv)
        .tensor("token_embd.weight", &[256, 3])
        .tensor("output_norm.weight", &[256]);
    if n_expert > 0 {
        tiny = tiny.set(&key("expert_count"), n_expert);
    }
    if !is_tied {
        tiny = tiny.tensor("output.weight", &[256, 3]);
    }
    let attention = if is_fused { &["attn_qkv"][..] } else { &["attn_q", "attn_k", "attn_v"] };
    let ffn =
        if is_fused { &["ffn_up", "ffn_down"][..] } else { &["ffn_gate", "ffn_up", "ffn_down"] };
    for i in 0..n_layer {
        tiny = tiny.tensor(&format!("blk.{i}.attn_norm.weight"), &[256]);
        for name in attention.iter().chain(&["attn_output"]) {
            tiny = tiny.tensor(&format!("blk.{i}.{name}.weight"), &[256, 2]);
        }
        for name in ffn {
            tiny = match n_expert {
                0 => tiny.tensor(&format!("blk.{i}.{name}.weight"), &[256, 2]),
                n => tiny.tensor(&format!("blk.{i}.{name}_exps.weight"), &[256, 2, n.into()]),
            };
        }
        if n_expert > 0 {
            tiny = tiny.tensor(&format!("blk.{i}.ffn_gate_inp.weight"), &[256, n_expert.into()]);
        }
    }
    parse(&tiny)
}

/// FNV-1a of the numbers of all types (Fowler, Noll, Vo).
fn digest(steps: &[Step]) -> String {
    let mix = |h: u32, step: &Step| (h ^ step.new.id).wrapping_mul(16_777_619);
    format!("{:08x}", steps.iter().fold(2_166_136_261, mix))
}

#[test]
fn mixes_are_those_of_llama_cpp() {
    let golden = include_str!("../golden/mixes.txt");
    let mut files: HashMap<&str, (Gguf, Importance)> = HashMap::new();
    let mut n = 0;
    for line in golden.lines() {
        let words: Vec<&str> = line.split(' ').collect();
        let [name, given] = [words[0], words[1]];
        let (gguf, importance) = files.entry(name).or_insert_with(|| {
            let gguf = shaped(name);
            let importance = importance(&gguf);
            (gguf, importance)
        });
        for (kind, wanted) in words[2..].iter().map(|word| word.split_once(':').unwrap()) {
            let importance = (given == "importance").then_some(&*importance);
            let plan = Plan::new(gguf, &Settings { importance, ..settings(kind) }).unwrap();
            let found = match plan.check() {
                Ok(()) => digest(&plan.steps),
                Err(_) => "refused".into(),
            };
            assert_eq!(found, wanted, "{name} {given} {kind}");
            n += 1;
        }
    }
    assert_eq!(n, SHAPES.len() * 2 * KINDS.len());
}

#[test]
fn rows_that_are_no_whole_blocks_get_other_types() {
    let gguf = parse(&llama(96, false));
    for (kind, wanted) in [
        ("Q2_K", "Q4_0"),
        ("Q4_K_S", "Q5_0"),
        ("Q5_K_S", "Q5_1"),
        ("Q6_K", "Q8_0"),
        ("IQ4_XS", "IQ4_NL"),
        ("TQ2_0", "Q4_0"),
        ("Q4_0", "Q4_0"),
    ] {
        let plan = Plan::new(&gguf, &settings(kind)).unwrap();
        let step = plan.steps.iter().find(|s| s.tensor.name == "blk.0.attn_q.weight").unwrap();
        assert_eq!((step.new.name, step.wanted.name == wanted), (wanted, kind == "Q4_0"), "{kind}");
        written(plan);
    }
    let odd = parse(&llama(40, false));
    let plan = Plan::new(&odd, &settings("Q4_0")).unwrap();
    assert!(plan.steps.iter().all(|s| ["F32", "F16"].contains(&s.new.name)));
    let error = Plan::new(&gguf, &settings("Q1_0")).err().unwrap().to_string();
    assert!(error.contains("rows of 96 elements, not whole blocks of 128 (Q1_0)"), "{error}");
}

#[test]
fn types_that_are_asked_for_are_used() {
    let gguf = parse(&llama(256, false));
    let chosen = [
        (Regex::new("blk.0.ffn_").unwrap(), writable("q8_0").unwrap()),
        (Regex::new("ffn_(up|down)").unwrap(), writable("iq4_nl").unwrap()),
    ];
    let types = |settings: Settings| -> HashMap<String, &str> {
        let plan = Plan::new(&gguf, &settings).unwrap();
        plan.steps.iter().map(|s| (s.tensor.name.clone(), s.new.name)).collect()
    };
    let found = types(Settings { chosen: &chosen, ..settings("q4_k") });
    assert_eq!(found["blk.0.ffn_up.weight"], "Q8_0");
    assert_eq!(found["blk.1.ffn_up.weight"], "IQ4_NL");
    assert_eq!(found["blk.1.ffn_gate.weight"], "Q4_K");
    // Embeddings are the output as well.
    assert_eq!(found["token_embd.weight"], "Q6_K");
    let (f16, q4_0) = (writable("F16").unwrap(), writable("Q4_0").unwrap());
    let output = types(Settings { output: Some(f16), ..settings("Q4_K_M") });
    assert_eq!(output["token_embd.weight"], "F16");
    let both = Settings { output: Some(f16), embedding: Some(q4_0), ..settings("Q4_K_M") };
    assert_eq!(types(both)["token_embd.weight"], "Q4_0");
    let pure = types(Settings { pure: true, ..settings("Q3_K_L") });
    let matrices = gguf.tensors().iter().filter(|t| t.dims.len() > 1);
    matrices.for_each(|t| assert_eq!(pure[&t.name], "Q3_K", "{}", t.name));
}

#[test]
fn what_cannot_be_done_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let [model, out, q8, list] = ["m.gguf", "o.gguf", "q8.gguf", "i.dat"].map(path);
    llama(256, false).writer().write(model.as_ref()).unwrap();
    let run = |more: &[&str], code: i32| {
        let text = error(&[&["quantize", &model, &out], more].concat(), code);
        assert_eq!(text.lines().count(), 1, "{text}");
        text
    };
    let known = run(&["Q9"], 2);
    assert!(known.starts_with("error: type \"Q9\" is not known; known: Q1_0, IQ1_S,"), "{known}");
    let coarse = run(&["iq2_xxs"], 2);
    assert!(
        coarse.contains(
            "tensor \"blk.0.attn_k.weight\" as IQ2_XXS is of no use without an importance matrix"
        ),
        "{coarse}"
    );
    let embedding = run(&["Q4_0", "--token-embedding-type", "iq1_s"], 2);
    assert!(embedding.contains("\"token_embd.weight\" as IQ1_S is of no use"), "{embedding}");
    assert!(run(&["Q4_0", "--tensor-type", "ffn"], 2).contains("allowed PATTERN=TYPE"));
    assert!(run(&["Q4_0", "--tensor-type", "(=q8_0"], 2).contains("not a regular expression"));
    assert!(
        run(&["Q4_0", "--tensor-type", "a=q8_1"], 2)
            .contains("cannot be written; allowed F32, F16,")
    );
    // Two columns of a matrix that has more.
    let name = "blk.0.attn_q.weight";
    let numbers = |n: i32| n.to_le_bytes();
    let bytes = [
        &numbers(1)[..],
        &numbers(name.len() as i32),
        name.as_bytes(),
        &numbers(1),
        &numbers(2),
        &[0; 8],
    ];
    std::fs::write(&list, bytes.concat()).unwrap();
    let other = run(&["Q4_0", "--imatrix", &list], 2);
    assert!(
        other.contains("has 2 columns for tensor \"blk.0.attn_q.weight\", which has 256"),
        "{other}"
    );
    assert!(!std::path::Path::new(&out).exists());

    ok(&["quantize", &model, &q8, "q8_0", "-t", "1"], "");
    assert!(
        error(&["quantize", &model, &q8, "q8_0"], 2)
            .contains("the file exists; --force replaces it")
    );
    let again = error(&["quantize", &q8, &out, "q4_0"], 2);
    assert!(
        again.contains("is rounded to Q8_0 already; --allow-requantize rounds it again"),
        "{again}"
    );
    ok(&["quantize", &q8, &out, "q4_0", "--allow-requantize"], "");

    for (x, text) in
        [(f32::NAN, "has elements that are not finite"), (1e9, "has elements too large for it")]
    {
        let mut broken = llama(256, false);
        let tensor = broken.tensors.iter_mut().find(|t| t.name.contains("ffn_up")).unwrap();
        tensor.data[400..404].copy_from_slice(&x.to_le_bytes());
        broken.writer().write(model.as_ref()).unwrap();
        let (code, found) = code_and_text(&["quantize", &model, &out, "F16", "--force"]);
        assert!(code == 3 && found.contains(text), "{found}");
    }
    assert!(
        Gguf::open(out.as_ref()).unwrap().tensor("blk.0.ffn_up.weight").unwrap().ty.name == "Q4_0"
    );
}

#[test]
fn a_dry_run_says_what_would_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let [model, out] = ["m.gguf", "o.gguf"].map(path);
    llama(96, false).writer().write(model.as_ref()).unwrap();
    let args = ["quantize", &model, &out, "Q4_K_M"];
    let (code, text) = code_and_text(&[&args[..], &["--dry-run"]].concat());
    assert_eq!(code, 0);
    assert!(text.contains("rows of 96 elements are not whole blocks of 256 (Q4_K)"), "{text}");
    assert!(
        text.lines().any(|l| l.starts_with("blk.1.attn_q.weight") && l.contains("Q5_0")),
        "{text}"
    );
    assert!(!std::path::Path::new(&out).exists());
    let said = text.lines().find(|line| line.starts_with("weights ")).unwrap();
    assert_eq!(ok(&args, "").trim_end(), said);
    let (code, text) = code_and_text(&["quantize", &model, &out, "IQ1_S", "--dry-run"]);
    assert!(code == 0 && !text.contains("warning"), "rows of 96 elements get other types: {text}");
}

#[test]
fn rewritten_files_stay_what_they_are() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let [merged, out] = ["merged.gguf", "out.gguf"].map(path);
    ok(&["merge", "--form", "lowrank:qk=24,ov=24", "-o", &merged], "");
    ok(&["quantize", &merged, &out, "Q8_0", "--allow-requantize"], "");
    let [a, b] = [&merged, &out].map(|path| Gguf::open(path.as_ref()).unwrap());
    let own = |gguf: &Gguf| -> Vec<String> {
        let keys = gguf.metadata().filter(|(key, _)| key.starts_with("qkov."));
        keys.map(|(key, value)| format!("{key} {value:?}")).collect()
    };
    assert!(!own(&a).is_empty());
    assert_eq!(own(&a), own(&b));
    let far = distance(&logits(b), &logits(a));
    assert!(far < 0.02, "{far}");
}

#[test]
fn importance_from_the_command_goes_into_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let [model, text, matrix, out] = ["m.gguf", "text", "i.gguf", "o.gguf"].map(path);
    llama(256, true).writer().write(model.as_ref()).unwrap();
    std::fs::write(&text, "The fox went down to the river. ".repeat(20)).unwrap();
    ok(&["imatrix", "-m", &model, "-f", &text, "-o", &matrix, "-c", "64"], "");
    ok(&["quantize", &model, &out, "IQ2_XS", "--imatrix", &matrix], "");
    let gguf = Gguf::open(out.as_ref()).unwrap();
    assert_eq!(gguf.str("quantize.imatrix.file").unwrap(), Some(&matrix[..]));
    assert_eq!(gguf.str("quantize.imatrix.dataset").unwrap(), Some(&text[..]));
    assert_eq!(gguf.u32("quantize.imatrix.entries_count").unwrap(), Some(16));
    assert_eq!(gguf.u32("quantize.imatrix.chunks_count").unwrap(), Some(10));
}

#[test]
fn files_of_every_family_get_smaller() {
    for (file, gguf) in files() {
        let settings = Settings { again: true, ..settings("Q8_0") };
        let plan = Plan::new(&gguf, &settings).unwrap();
        let old: usize = gguf.tensors().iter().map(|t| t.n_bytes()).sum();
        assert!(plan.n_bytes() <= old as u64, "{file}");
        let wanted = Model::from_gguf(gguf.clone()).unwrap();
        let new = Model::from_gguf(written(plan)).unwrap();
        assert_eq!(new.layers.len(), wanted.layers.len(), "{file}");
    }
}
