//! Forms whose cache holds other things than keys and values, against the model as trained.

use std::path::Path;
use std::sync::Arc;

use qkov::arch::Pooling;
use qkov::cpu::{Observer, Seen, SeenHead};
use qkov::engine::{CacheType, Threads};
use qkov::gguf::{Bytes, Gguf};
use qkov::mask::MASKS;
use qkov::merge::{FORMS, Kept};
use qkov::model::Model;
use qkov::normalizer::NORMALIZERS;
use qkov::session::{Options, Session};

use crate::tiny::Tiny;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

/// A Llama without grouped heads whose keys have inverses, rotated in pairs.
fn square_llama() -> Vec<u8> {
    let mut tiny = Tiny::llama().set("llama.attention.head_count_kv", 2);
    for layer in 0..2 {
        tiny = tiny.tensor(&format!("blk.{layer}.attn_v.weight"), &[8, 8]);
        let name = format!("blk.{layer}.attn_k.weight");
        tiny = tiny.tensor(&name, &[8, 8]);
        let keys = tiny.tensors.iter_mut().find(|t| t.name == name).unwrap();
        // Far from singular.
        for i in 0..8 {
            keys.data[36 * i..36 * i + 4].copy_from_slice(&(1.5 + i as f32 / 8.0).to_le_bytes());
        }
    }
    tiny.bytes()
}

fn open(name: &str) -> Model {
    match name {
        "square" => Model::from_gguf(Gguf::parse(Bytes::from(square_llama())).unwrap()).unwrap(),
        name => Model::open(&Path::new(FOLDER).join(format!("{name}.gguf"))).unwrap(),
    }
}

/// A model in a form, if it applies.
fn formed(name: &str, form: &str) -> Option<Model> {
    let mut model = open(name);
    let mut plan = model.plan.clone();
    plan.set_forms(form).unwrap();
    if plan.layers.iter().any(|l| l.form.form().rewrites()) || model.check_forms(&plan).is_err() {
        return None;
    }
    model.set_plan(plan);
    Some(model)
}

/// Every golden model, and one that slim is made for.
fn models() -> Vec<String> {
    let names = crate::families::files().into_iter().map(|(name, _)| name);
    names.chain(["square".to_string()]).collect()
}

/// Every form that keeps something else, with every model that can have it; any condition goes.
fn cases() -> Vec<(String, String)> {
    let forms = FORMS.iter().map(|form| match form.name() {
        "slim" => "slim:cond=1e6".to_string(),
        name => name.to_string(),
    });
    let models = models();
    let pairs = forms.flat_map(|form| models.iter().map(move |m| (m.clone(), form.clone())));
    let keeps_rows = |m: &Model| m.attention[0].geometry.kept != Kept::KeysAndValues;
    let cases: Vec<_> =
        pairs.filter(|(m, f)| formed(m, f).as_ref().is_some_and(keeps_rows)).collect();
    let of = |form: &str| -> Vec<&str> {
        cases.iter().filter(|(_, own)| own == form).map(|c| &c.0[..]).collect()
    };
    assert_eq!(of("absorb"), ["bert", "bloom", "gpt2"]);
    assert_eq!(of("mla"), ["deepseek2", "deepseek3"]);
    for model in ["gpt2", "square", "bloom", "gptneox", "phi3-short", "bert"] {
        assert!(of("slim:cond=1e6").contains(&model), "{model}");
    }
    cases
}

fn session(model: Model, cache: CacheType) -> Session {
    let n_threads = Threads { one: 2, batch: 2 };
    let options = Options { n_threads, cache: (cache, cache), exact: true, ..Options::default() };
    Session::new(Arc::new(model), &options).unwrap()
}

fn tokens(model: &Model, n: usize) -> Vec<u32> {
    (0..n as u32).map(|i| (i * i * 7 + i * 3) % model.hparams.n_vocab as u32).collect()
}

/// Logits of a prompt, of tokens one by one, of a batch, and of some again after a step back; states of
/// an encoder.
fn trace(session: &mut Session, tokens: &[u32], n_prompt: usize) -> Vec<f32> {
    if session.model().output.is_none() {
        // Few enough to be read twice.
        return session.embed(&tokens[..tokens.len() / 2], Pooling::None).unwrap();
    }
    session.rewind(0);
    session.feed_prompt(&tokens[..n_prompt]).unwrap();
    let mut out = session.logits().to_vec();
    let half = n_prompt.midpoint(tokens.len());
    for token in &tokens[n_prompt..half] {
        out.extend_from_slice(session.feed_wanting(&[*token], 0..1).unwrap());
    }
    let rest = &tokens[half..];
    out.extend_from_slice(session.feed_wanting(rest, 0..rest.len()).unwrap());
    session.rewind(session.tokens().len() - 3);
    for token in &tokens[tokens.len() - 3..] {
        out.extend_from_slice(session.feed_wanting(&[*token], 0..1).unwrap());
    }
    out
}

/// The largest difference, relative to the largest number.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let size = a.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    // Unlike `max`, this keeps a NaN.
    let max = |m: f32, x: f32| if m >= x { m } else { x };
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, max) / size
}

#[test]
fn forms_compute_what_split_does() {
    for (name, form) in cases() {
        for norm in NORMALIZERS.iter().map(|n| n.name) {
            let [split, other] = [open(&name), formed(&name, &form).unwrap()].map(|mut model| {
                model.set_normalizers(norm).unwrap();
                let tokens = tokens(&model, 40);
                trace(&mut session(model, CacheType::F32), &tokens, 12)
            });
            let far = distance(&split, &other);
            assert!(far < 1e-4, "{name}, {form}, {norm}: {far:e}");
        }
        for mask in MASKS {
            for norm in ["softmax", "top_k:k=3", "sigmoid"] {
                let [split, other] =
                    [open(&name), formed(&name, &form).unwrap()].map(|mut model| {
                        // Small enough that something is hidden.
                        let small = mask.params.iter().map(|p| format!("{}=5", p.name));
                        let text = format!("{}:{}", mask.name, small.collect::<Vec<_>>().join(","));
                        model.set_masks(&text).unwrap();
                        model.set_normalizers(norm).unwrap();
                        let tokens = tokens(&model, 40);
                        trace(&mut session(model, CacheType::F32), &tokens, 12)
                    });
                let far = distance(&split, &other);
                assert!(far < 1e-4, "{name}, {form}, {}, {norm}: {far:e}", mask.name);
            }
        }
    }
}

#[test]
fn forms_write_the_same_text() {
    for (name, form) in cases() {
        if !open(&name).hparams.output {
            continue;
        }
        let [split, other] = [open(&name), formed(&name, &form).unwrap()].map(|model| {
            let n = model.hparams.within_positions(200 + 8);
            let start = tokens(&model, 8);
            let cache = (CacheType::F32, CacheType::F32);
            let options = Options { n_ctx: Some(n), cache, exact: true, ..Options::default() };
            let mut session = Session::new(Arc::new(model), &options).unwrap();
            session.feed(&start).unwrap();
            for _ in start.len()..n {
                let logits = session.logits().iter().enumerate();
                let best = logits.max_by(|a, b| a.1.total_cmp(b.1)).unwrap().0;
                session.feed(&[best as u32]).unwrap();
            }
            session.tokens().to_vec()
        });
        assert_eq!(split, other, "{name} {form}");
    }
}

#[test]
fn the_cache_is_as_large_as_the_form_says() {
    for (name, form) in cases() {
        let model = formed(&name, &form).unwrap();
        let g = model.attention[0].geometry.clone();
        let n_layer = model.layers.len();
        // Values come in whole panels.
        let values = g.kv.iter().map(|kv| kv.value_dim.next_multiple_of(8));
        let split = g.key_width() + values.sum::<usize>();
        let (cached, planes) = match g.kept {
            Kept::Keys { n_planes } => (model.hparams.n_embd, n_planes),
            Kept::Latent { rank, n_rotated } => (rank + n_rotated, 0),
            Kept::KeysAndValues => unreachable!(),
        };
        let of_input = form != "mla";
        assert!(!of_input || cached == model.hparams.n_embd);
        assert_eq!(g.cached(), cached, "{name} {form}");
        for (ty, bits) in [(CacheType::F32, 32), (CacheType::F16, 16)] {
            let options = Options { n_ctx: Some(64), cache: (ty, ty), ..Options::default() };
            let session = Session::new(Arc::new(formed(&name, &form).unwrap()), &options).unwrap();
            // One layer of keys and values serves all when several tokens are read.
            let elements = n_layer * g.cached() + split;
            let bytes = 64 * (elements * bits / 8 + 2 * planes * 4);
            assert_eq!(session.cache_bytes(), bytes, "{name} {form} {}", ty.name());
            let trained = Session::new(Arc::new(open(&name)), &options).unwrap();
            assert_eq!(trained.cache_bytes(), 64 * n_layer * split * bits / 8);
        }
    }
}

#[test]
fn every_cache_type_loses_about_what_it_does_in_split() {
    for (name, form) in cases() {
        let tokens = tokens(&open(&name), 40);
        let full = trace(&mut session(open(&name), CacheType::F32), &tokens, 12);
        for ty in CacheType::ALL {
            let split = distance(&full, &trace(&mut session(open(&name), ty), &tokens, 12));
            let model = formed(&name, &form).unwrap();
            let other = distance(&full, &trace(&mut session(model, ty), &tokens, 12));
            println!("{name} {form} {}: {split:.1e}, {other:.1e}", ty.name());
            assert!(other < 1e-4 + 12.0 * split, "{name} {form} {}", ty.name());
        }
    }
}

/// Counts what it sees and keeps the size of all of it.
#[derive(Default)]
struct Sum(std::sync::Mutex<Vec<(usize, usize, Vec<f32>)>>);

impl Observer for Sum {
    fn wants(&self, _: usize) -> bool {
        true
    }

    fn see(&self, seen: &Seen) {
        let all = [seen.weights, seen.values, seen.outputs].concat();
        self.0.lock().unwrap().push((seen.layer, seen.head, all));
    }

    fn wants_heads(&self, _: usize) -> bool {
        true
    }

    fn see_head(&self, seen: &SeenHead) {
        let rows = [seen.queries, seen.keys, seen.values, seen.outputs];
        let all = rows.iter().flat_map(|rows| rows.iter().flatten().copied()).collect();
        self.0.lock().unwrap().push((seen.layer, seen.head + 100, all));
    }
}

#[test]
fn observers_see_the_same() {
    for (name, form) in cases() {
        let [split, other] = [open(&name), formed(&name, &form).unwrap()].map(|model| {
            let tokens = tokens(&model, 20);
            let mut session = session(model, CacheType::F32);
            let sum = Sum::default();
            session.feed_wanting(&tokens[..10], 0..0).unwrap();
            for part in [&tokens[10..11], &tokens[11..]] {
                session.feed_observed(part, 0..0, &sum).unwrap();
            }
            let mut all = sum.0.into_inner().unwrap();
            // Batches of a head come in their order.
            all.sort_by_key(|(layer, head, _)| (*layer, *head));
            all
        });
        assert_eq!(split.len(), other.len());
        for (a, b) in split.iter().zip(&other) {
            let far = distance(&a.2, &b.2);
            assert!(
                (a.0, a.1) == (b.0, b.1) && far < 1e-4,
                "{name} {form} {:?}: {far:e}",
                (a.0, a.1)
            );
        }
    }
}

#[test]
fn a_session_takes_plans_with_other_forms() {
    let tokens = tokens(&open("gpt2"), 30);
    let mut session = session(open("gpt2"), CacheType::F16);
    let (trained, n_bytes) = (session.model().plan.clone(), session.cache_bytes());
    let before = trace(&mut session, &tokens, 9);
    for form in ["absorb", "slim:cond=1e6", "0=absorb;1=slim:cond=1e6"] {
        let mut plan = trained.clone();
        plan.set_forms(form).unwrap();
        session.set_plan(plan).unwrap();
        assert!(session.cache_bytes() < n_bytes, "{form}");
        let far = distance(&before, &trace(&mut session, &tokens, 9));
        assert!(far > 0.0 && far < 0.01, "{form}: {far}");
    }
    let mut plan = trained.clone();
    plan.set_forms("slim:cond=1").unwrap();
    let text = session.set_plan(plan).unwrap_err().to_string();
    assert!(text.contains("condition number") && text.contains("layer 0"), "{text}");
    assert_eq!(session.model().plan.layers[1].form.text(), "slim:cond=1000000");
    let mut plan = trained.clone();
    plan.set_forms("lowrank").unwrap();
    assert!(session.set_plan(plan).is_err());
    session.set_plan(trained).unwrap();
    assert_eq!(session.cache_bytes(), n_bytes);
    assert_eq!(before, trace(&mut session, &tokens, 9));
}

/// In these families only some layers rotate.
#[test]
fn layers_that_do_not_rotate_can_be_absorbed() {
    for name in ["smollm3", "cohere2"] {
        let [split, other] = [open(name), formed(name, "3=absorb").unwrap()].map(|model| {
            let tokens = tokens(&model, 40);
            trace(&mut session(model, CacheType::F32), &tokens, 12)
        });
        let far = distance(&split, &other);
        assert!(far < 1e-4, "{name}: {far:e}");
        assert!(formed(name, "2=absorb").is_none());
    }
}

#[test]
fn forms_that_do_not_apply_say_why() {
    for (name, form, reason) in [
        ("square", "absorb", "rotated"),
        ("llama", "absorb", "rotated"),
        ("llama", "slim", "W_K has no inverse"),
        ("qwen2", "slim", "W_K has no inverse"),
        ("gemma3", "absorb", "rotated"),
        ("exaone4", "3=absorb", "normed"),
        ("olmo3", "slim", "several rotations"),
    ] {
        let mut model = open(name);
        let mut plan = model.plan.clone();
        plan.set_forms(form).unwrap();
        let text = model.check_forms(&plan).unwrap_err().to_string();
        let layer = if form.starts_with('3') { "layer 3" } else { "layer 0" };
        assert!(text.contains(reason) && text.contains(layer), "{text}");
        model.set_plan(plan);
    }
    let file = Tiny::llama().set("qkov.attention.form", "slim").bytes();
    let text = Model::from_gguf(Gguf::parse(Bytes::from(file)).unwrap()).err().unwrap().to_string();
    assert!(text.contains("qkov.attention.form") && text.contains("no inverse"), "{text}");
}
