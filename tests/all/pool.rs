//! Sequences that go through the layers together, against each of them alone.

use std::sync::Arc;

use qkov::engine::{Asked, CacheType, Threads};
use qkov::mask::MASKS;
use qkov::merge::FORMS;
use qkov::model::Model;
use qkov::normalizer::NORMALIZERS;
use qkov::session::pool::{Ask, Pool, Sequence, Step};
use qkov::session::{Options, Session};

use crate::golden::FOLDER;
use crate::{families, family};

const N_CTX: usize = 64;
const N_REPLY: usize = 5;

fn options(cache: CacheType) -> Options {
    Options {
        n_ctx: Some(N_CTX),
        n_threads: Threads { one: 2, batch: 2 },
        pin: false,
        cache: (cache, cache),
        ..Options::default()
    }
}

fn open(name: &str) -> Model {
    Model::open(&std::path::Path::new(FOLDER).join(format!("{name}.gguf"))).unwrap()
}

/// Tokens that differ from seed to seed, but for the first.
fn tokens(seed: usize, n: usize) -> Vec<u32> {
    (0..n).map(|i| if i == 0 { 1 } else { ((i * 7 + seed * 13) % 50 + 2) as u32 }).collect()
}

/// Logits after a prompt and after every token of a reply, alone.
fn alone(session: &mut Session, prompt: &[u32], reply: &[u32]) -> Vec<Vec<f32>> {
    session.rewind(0);
    session.feed_prompt(prompt).unwrap();
    let mut all = vec![session.logits().to_vec()];
    for token in reply {
        session.feed(&[*token]).unwrap();
        all.push(session.logits().to_vec());
    }
    all
}

/// The same of several sequences, which begin one step after the other and read `n_chunk` tokens a step.
fn together(
    pool: &mut Pool,
    asks: &[Ask],
    texts: &[(Vec<u32>, Vec<u32>)],
    n_chunk: usize,
) -> Vec<Vec<Vec<f32>>> {
    let n_vocab = pool.model().hparams.n_vocab;
    let mut sequences: Vec<Sequence> = Vec::new();
    let mut all = vec![Vec::new(); texts.len()];
    for round in 0.. {
        if let Some((prompt, _)) = texts.get(round) {
            let variant = pool.variant(&asks[round % asks.len()]).unwrap();
            let mut sequence = pool.sequence(variant).unwrap();
            pool.begin(&mut sequence, prompt, false).unwrap();
            sequences.push(sequence);
        }
        let mut steps: Vec<_> = sequences
            .iter_mut()
            .enumerate()
            .filter(|(_, s)| s.n_todo() > 0)
            .map(|(i, sequence)| (i, Step { sequence, n: n_chunk, all: false }))
            .collect();
        if steps.is_empty() {
            return all;
        }
        let which: Vec<usize> = steps.iter().map(|(i, _)| *i).collect();
        let mut steps: Vec<Step> = steps.drain(..).map(|(_, step)| step).collect();
        let mut out = Vec::new();
        let rows = pool.forward(&mut steps, None, (Asked::Logits, &mut out)).unwrap();
        for (i, rows) in which.into_iter().zip(rows).filter(|(_, rows)| !rows.is_empty()) {
            assert_eq!(rows.len(), n_vocab);
            all[i].push(out[rows].to_vec());
            if let Some(token) = texts[i].1.get(all[i].len() - 1) {
                sequences[i].push(&[*token]);
            }
        }
    }
    all
}

fn check(name: &str, model: Model, cache: CacheType, asks: &[Ask], n_chunk: usize) {
    let texts: Vec<_> =
        (0..asks.len() + 2).map(|i| (tokens(i, 4 + 5 * i % 13), tokens(i + 40, N_REPLY))).collect();
    let mut pool = Pool::new(Arc::new(model), &options(cache)).unwrap();
    let found = together(&mut pool, asks, &texts, n_chunk);
    drop(pool);
    let mut session = Session::new(Arc::new(open(name)), &options(cache)).unwrap();
    for (i, (prompt, reply)) in texts.iter().enumerate() {
        let ask = &asks[i % asks.len()];
        let mut plan = session.model().trained.clone();
        ask.norm.iter().for_each(|text| plan.set_normalizers(text).unwrap());
        ask.form.iter().for_each(|text| plan.set_forms(text).unwrap());
        ask.mask.iter().for_each(|text| plan.set_masks(text).unwrap());
        session.set_plan(plan).unwrap();
        let expected = alone(&mut session, prompt, reply);
        assert!(found[i] == expected, "{name}, sequence {i}, {ask:?}, {n_chunk} tokens a step");
    }
}

/// Models that predict tokens.
fn predictors() -> Vec<String> {
    let names = families::files().into_iter().map(|(name, _)| name);
    names.filter(|name| open(name).output.is_some()).collect()
}

#[test]
fn what_comes_of_a_sequence_does_not_depend_on_the_others() {
    for name in predictors() {
        for cache in CacheType::ALL {
            check(&name, open(&name), cache, &[Ask::default()], 3);
        }
    }
}

#[test]
fn every_sequence_has_a_normalizer_and_a_mask_of_its_own() {
    let norms = NORMALIZERS.iter().map(|n| Ask { norm: Some(n.name.into()), ..Ask::default() });
    let masks = MASKS.iter().map(|m| Ask { mask: Some(m.name.into()), ..Ask::default() });
    let name = "llama";
    let mut pool = Pool::new(Arc::new(open(name)), &options(CacheType::F16)).unwrap();
    let asks: Vec<Ask> = norms.chain(masks).filter(|ask| pool.variant(ask).is_ok()).collect();
    assert!(asks.len() > 40, "{asks:?}");
    check(name, open(name), CacheType::F16, &asks, usize::MAX);
}

#[test]
fn every_sequence_has_a_form_of_its_own() {
    for name in predictors() {
        let mut pool = Pool::new(Arc::new(open(&name)), &options(CacheType::F32)).unwrap();
        let forms = FORMS.iter().map(|f| Ask { form: Some(f.name().into()), ..Ask::default() });
        let forms: Vec<Ask> = forms.filter(|ask| pool.variant(ask).is_ok()).collect();
        assert!(forms.iter().any(|ask| ask.form.as_deref() == Some("split")), "{name}");
        check(&name, open(&name), CacheType::F32, &forms, usize::MAX);
    }
}

#[test]
fn a_prefix_is_shared_between_sequences() {
    let ask = |mask: &str| Ask { mask: Some(mask.into()), ..Ask::default() };
    for (mask, n_kept) in [("causal", 17), ("prefix", 0)] {
        for cache in CacheType::ALL {
            let model = Arc::new(family::softmax());
            let mut pool = Pool::new(model, &options(cache)).unwrap();
            let variant = pool.variant(&ask(mask)).unwrap();
            let (first, mut second) = (tokens(1, 30), tokens(1, 30));
            second[17..].iter_mut().for_each(|token| *token += 1);
            let run = |pool: &mut Pool, sequence: &mut Sequence| {
                let mut out = Vec::new();
                while sequence.n_todo() > 0 {
                    let step = Step { sequence, n: 7, all: false };
                    pool.forward(&mut [step], None, (Asked::Logits, &mut out)).unwrap();
                }
                out
            };
            let mut from = pool.sequence(variant.clone()).unwrap();
            pool.begin(&mut from, &first, false).unwrap();
            run(&mut pool, &mut from);
            let mut anew = pool.sequence(variant.clone()).unwrap();
            assert_eq!(pool.begin(&mut anew, &second, false).unwrap(), 0);
            let expected = run(&mut pool, &mut anew);
            let mut to = pool.sequence(variant).unwrap();
            pool.share(&from, &mut to, &second).unwrap();
            assert_eq!(pool.begin(&mut to, &second, false).unwrap(), n_kept, "{mask}");
            assert!(run(&mut pool, &mut to) == expected, "{mask}, {cache:?}");
            assert_eq!(from.tokens(), first);
        }
    }
}

#[test]
fn what_cannot_be_read_is_refused() {
    let mut pool = Pool::new(Arc::new(family::softmax()), &options(CacheType::F16)).unwrap();
    let variant = pool.variant(&Ask::default()).unwrap();
    let mut sequence = pool.sequence(variant).unwrap();
    let mut error =
        |prompt: &[u32]| pool.begin(&mut sequence, prompt, false).unwrap_err().to_string();
    assert!(error(&[]).contains("no tokens"));
    assert!(error(&[1, 1 << 30]).contains("vocabulary"));
    assert!(error(&[1; N_CTX + 1]).contains("65 tokens do not fit a context of 64"));
    let norm = Ask { norm: Some("nonsense".into()), ..Ask::default() };
    assert!(pool.variant(&norm).err().unwrap().to_string().contains("nonsense"));
    let form = Ask { form: Some("lowrank:ratio=0.5".into()), ..Ask::default() };
    assert!(pool.variant(&form).err().unwrap().to_string().contains("rewritten"));
}
