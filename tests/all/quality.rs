//! Perplexity, divergence and retrieval against plain computations, and against models whose
//! answers are known.

use std::path::Path;
use std::sync::Arc;

use qkov::gguf::{Bytes, Gguf, replace_file};
use qkov::measure::quality::{
    Base, Divergence, Estimate, POINTS, Quality, Row, Tally, Windows, evaluate,
};
use qkov::measure::retrieval::{DEPTHS, Needle, Probe, Retrieval, retrieve};
use qkov::model::Model;
use qkov::session::sampler::Random;
use qkov::session::{Options, Session};

use crate::tiny::{N_VOCAB, Tiny};

/// As `llama-perplexity` has it, from sums.
fn mean_and_error(x: &[f64]) -> Estimate {
    let n = x.len() as f64;
    let [sum, squares] = [1, 2].map(|power| x.iter().map(|x| x.powi(power)).sum::<f64>());
    let value = sum / n;
    Estimate { value, err: ((squares / n - value * value) / (n - 1.0)).sqrt() }
}

fn near(name: &str, a: f64, b: f64) {
    assert!((a - b).abs() < 1e-9 * (1.0 + b.abs()), "{name}: {a} is not {b}");
}

fn both_near(name: &str, a: Estimate, b: Estimate) {
    near(name, a.value, b.value);
    near(&format!("error of {name}"), a.err, b.err);
}

#[test]
fn divergence_is_its_definition() {
    let (n, n_vocab) = (317, 50);
    let mut random = Random::new(7);
    let mut logits = |size: f64| -> Vec<f32> {
        (0..n_vocab).map(|_| (size * (random.uniform() - 0.5)) as f32).collect()
    };
    let mut tally = Tally::default();
    let [mut nll, mut base_nll, mut kl, mut dp] = [const { Vec::new() }; 4];
    let mut n_same = 0.0;
    let largest = |x: &[f64]| (0..x.len()).max_by(|a, b| x[*a].total_cmp(&x[*b]));
    for i in 0..n {
        let target = i * 31 % n_vocab;
        // Some tokens of the base are below the floor of -16.
        let base = logits(40.0);
        let model: Vec<f32> = base.iter().zip(logits(3.0)).map(|(b, noise)| b + noise).collect();
        tally.add(Row::new(&model), Row::new(&base), target as u32);
        let ln = |x: &[f32]| -> Vec<f64> {
            let sum: f64 = x.iter().map(|x| f64::from(*x).exp()).sum();
            x.iter().map(|x| f64::from(*x) - sum.ln()).collect()
        };
        let (q, b) = (ln(&model), ln(&base));
        nll.push(-q[target]);
        base_nll.push(-b[target]);
        let terms = b.iter().zip(&q).filter(|(b, _)| **b > -16.0);
        kl.push(terms.map(|(b, q)| b.exp() * (b - q)).sum::<f64>());
        dp.push(q[target].exp() - b[target].exp());
        n_same += f64::from(u8::from(largest(&q) == largest(&b)));
    }
    let d = tally.finish();
    let (mean, base_mean) = (mean_and_error(&nll), mean_and_error(&base_nll));
    let products: f64 = nll.iter().zip(&base_nll).map(|(a, b)| a * b).sum();
    let n = f64::from(n as u16);
    let covariance = (products / n - mean.value * base_mean.value) / (n - 1.0);
    let difference_err = |a: f64, b: f64, shared: f64| (a * a + b * b - 2.0 * shared).sqrt();
    let [ppl, base_ppl] = [mean, base_mean].map(|m| m.value.exp());
    both_near("base_ppl", d.base_ppl, Estimate { value: base_ppl, err: base_ppl * base_mean.err });
    let err = difference_err(mean.err, base_mean.err, covariance);
    let ln_ratio = Estimate { value: mean.value - base_mean.value, err };
    both_near("ln_ppl_ratio", d.ln_ppl_ratio, ln_ratio);
    let ratio = ppl / base_ppl;
    both_near("ppl_ratio", d.ppl_ratio, Estimate { value: ratio, err: ratio * err });
    let shared = ppl * base_ppl * covariance;
    let err = difference_err(ppl * mean.err, base_ppl * base_mean.err, shared);
    both_near("ppl_diff", d.ppl_diff, Estimate { value: ppl - base_ppl, err });
    near("correlation", d.ln_ppl_correlation, covariance / (mean.err * base_mean.err));
    both_near("kl", d.kl.mean, mean_and_error(&kl));
    both_near("dp", d.dp.mean, mean_and_error(&dp));
    let squares = mean_and_error(&dp.iter().map(|d| d * d).collect::<Vec<_>>());
    let rms = squares.value.sqrt();
    both_near("dp_rms", d.dp_rms, Estimate { value: rms, err: 0.5 / rms * squares.err });
    let same = n_same / n;
    assert!(same > 0.3 && same < 0.99, "{same} shows nothing");
    let err = (same * (1.0 - same) / (n - 1.0)).sqrt();
    both_near("same_top", d.same_top, Estimate { value: same, err });
    let fields = d.fields();
    let field = |name: &str| fields.iter().find(|(n, _)| n == name).unwrap().1;
    for (name, mut values) in [("kl", kl), ("dp", dp)] {
        values.sort_by(f64::total_cmp);
        for (end, share) in POINTS {
            let (i, rest) = ((share * (n - 1.0)) as usize, share * (n - 1.0) % 1.0);
            let above = values[(i + 1).min(values.len() - 1)];
            let expected = (1.0 - rest) * values[i] + rest * above;
            near(&format!("{name}_{end}"), field(&format!("{name}_{end}")), expected);
        }
    }
}

/// The golden Llama with some normalizers, and a context of 64.
fn session(norm: &str) -> Session {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/llama.gguf");
    let mut model = Model::open(Path::new(path)).unwrap();
    model.set_normalizers(norm).unwrap();
    Session::new(Arc::new(model), &Options { n_ctx: Some(64), ..Options::default() }).unwrap()
}

fn windows(n_vocab: usize) -> Windows {
    let mut random = Random::new(3);
    Windows::new((0..5 * 64).map(|_| random.below(n_vocab) as u32).collect(), 64).unwrap()
}

fn judge(norm: &str, windows: &Windows, base: &mut Base) -> (Quality, Divergence) {
    let quality = evaluate(&mut session(norm), windows, Some(base), None, &mut |_| ()).unwrap();
    let divergence = quality.divergence.clone().unwrap();
    (quality, divergence)
}

#[test]
fn a_model_is_no_different_from_itself() {
    let mut base = session("softmax");
    let windows = windows(base.model().hparams.n_vocab);
    let alone = evaluate(&mut base, &windows, None, None, &mut |_| ()).unwrap();
    let kept = Base::in_memory(&mut base, &windows, 1 << 30, &mut |_| ()).unwrap().unwrap();
    for mut base in [kept, Base::live(base, windows.clone())] {
        let (quality, d) = judge("softmax", &windows, &mut base);
        assert_eq!(quality.ppl, alone.ppl);
        assert_eq!(d.base_ppl, alone.ppl);
        let zero = Estimate { value: 0.0, err: 0.0 };
        for x in [d.kl.mean, d.dp.mean, d.dp_rms, d.ppl_diff, d.ln_ppl_ratio] {
            assert_eq!(x, zero);
        }
        for (_, share) in POINTS {
            assert_eq!((d.kl.at(share), d.dp.at(share)), (0.0, 0.0));
        }
        assert_eq!((d.ppl_ratio.value, d.same_top.value), (1.0, 1.0));
        near("correlation", d.ln_ppl_correlation, 1.0);
    }
}

#[test]
fn every_kind_of_base_says_the_same() {
    let mut softmax = session("softmax");
    let n_vocab = softmax.model().hparams.n_vocab;
    let windows = windows(n_vocab);
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    replace_file(&path, |out| {
        evaluate(&mut softmax, &windows, None, Some(out), &mut |_| ()).map(|_| ())
    })
    .unwrap();
    // 5 windows of 31 rows.
    let needed = 5 * 31 * (4 * n_vocab + 8);
    assert!(Base::in_memory(&mut softmax, &windows, needed - 1, &mut |_| ()).unwrap().is_none());
    let mut seen = 0;
    let kept = Base::in_memory(&mut softmax, &windows, needed, &mut |n| seen = n).unwrap();
    let (mut kept, mut live) = (kept.unwrap(), Base::live(softmax, windows.clone()));
    assert_eq!((seen, kept.session().is_none(), live.session().is_some()), (5, true, true));
    let live = judge("sigmoid", &windows, &mut live);
    assert!(live.1.kl.mean.value > 1e-4, "{live:?}");
    assert_eq!(judge("sigmoid", &windows, &mut kept), live);
    let mut file = Base::open(&path, n_vocab).unwrap();
    let (_, stored) = judge("sigmoid", &windows, &mut file);
    for ((name, a), (_, b)) in stored.fields().iter().zip(live.1.fields()) {
        assert!((a - b).abs() < 1e-3 * (1.0 + b.abs()), "{name}: {a} is not {b}");
    }
    // Not these windows, and not this vocabulary.
    let refused = |windows: &Windows, base: &mut Base, text: &str| {
        let error = evaluate(&mut session("softmax"), windows, Some(base), None, &mut |_| ());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    };
    let other = Windows::new(vec![1; 5 * 64], 64).unwrap();
    refused(&other, &mut file, "another text");
    let shorter = Windows::new(windows.tokens().to_vec(), 32).unwrap();
    refused(&shorter, &mut file, "windows of 32, but the base has 64");
    let tiny = Model::from_gguf(Gguf::parse(Bytes::from(Tiny::llama().bytes())).unwrap()).unwrap();
    let tiny = Session::new(Arc::new(tiny), &Options::default()).unwrap();
    refused(&windows, &mut Base::live(tiny, windows.clone()), "vocabulary of 257");
}

/// Width of a code.
const CODE: usize = 64;

/// A GPT-2 whose weights are an induction circuit (Olsson et al. 2022, arXiv 2209.11895). The
/// residual stream holds the codes of: this token, its position, the token before it (written by
/// layer 0, which looks one position back), the prediction (written by layer 1, which looks for
/// this token among those before others, and takes the others).
fn induction(norm: &str) -> Session {
    let n_embd = 4 * CODE;
    let mut random = Random::new(1);
    let codes: Vec<Vec<f32>> = (0..N_VOCAB)
        .map(|_| {
            let mut code = [[1.0; CODE / 2], [-1.0; CODE / 2]].concat();
            (1..CODE).rev().for_each(|i| code.swap(i, random.below(i + 1)));
            code
        })
        .collect();
    let floats = |x: Vec<f32>| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    // Rows of `n_in`, all 0 but for `entries`: row, column, value.
    let matrix = |n_in: usize, n_out: usize, entries: &[(usize, usize, f32)]| {
        let mut x = vec![0.0; n_in * n_out];
        entries.iter().for_each(|(row, column, value)| x[row * n_in + column] = *value);
        floats(x)
    };
    let coded = |slot: usize, factor: f32| {
        let entries = codes.iter().enumerate().flat_map(|(t, code)| {
            code.iter().enumerate().map(move |(i, x)| (t, slot * CODE + i, factor * x))
        });
        matrix(n_embd, N_VOCAB, &entries.collect::<Vec<_>>())
    };
    let positions: Vec<_> = (0..CODE).map(|i| (i, CODE + i, 8.0)).collect();
    let dims = |a: usize, b: usize| [a as u64, b as u64];
    let mut tiny = Tiny::gpt2()
        .set("gpt2.embedding_length", n_embd as u32)
        .set("gpt2.attention.head_count", 4)
        .tensor_of("token_embd.weight", 0, &dims(n_embd, N_VOCAB), coded(0, 1.0))
        .tensor_of("output.weight", 0, &dims(n_embd, N_VOCAB), coded(3, 1.0))
        .tensor_of(
            "position_embd.weight",
            0,
            &dims(n_embd, CODE),
            matrix(n_embd, CODE, &positions),
        );
    // Of head 0: where queries, keys and values come from, and where its output goes.
    let circuits = [([CODE + 1, CODE, 0], 2), ([0, 2 * CODE, 0], 3)];
    for (i, (sources, target)) in circuits.into_iter().enumerate() {
        let mut qkv = Vec::new();
        for (part, source) in sources.into_iter().enumerate() {
            let factor = if part == 0 { 3.0 } else { 1.0 };
            let of_slot = |d: usize| (part * n_embd + d, source + d, factor);
            // The last position is before none.
            qkv.extend((0..CODE - usize::from(source == CODE + 1)).map(of_slot));
        }
        let out: Vec<_> = (0..CODE).map(|d| (target * CODE + d, d, 1.0)).collect();
        for (name, n_in, n_out, entries) in [
            ("attn_qkv", n_embd, 3 * n_embd, &qkv),
            ("attn_output", n_embd, n_embd, &out),
            ("ffn_up", n_embd, 16, &Vec::new()),
            ("ffn_down", 16, n_embd, &Vec::new()),
        ] {
            let name = format!("blk.{i}.{name}");
            let data = matrix(n_in, n_out, entries);
            tiny = tiny
                .tensor_of(&format!("{name}.weight"), 0, &dims(n_in, n_out), data)
                .tensor_of(&format!("{name}.bias"), 0, &[n_out as u64], floats(vec![0.0; n_out]));
        }
    }
    for norm in
        ["output_norm", "blk.0.attn_norm", "blk.0.ffn_norm", "blk.1.attn_norm", "blk.1.ffn_norm"]
    {
        let of = |x: f32| floats(vec![x; n_embd]);
        tiny = tiny.tensor_of(&format!("{norm}.weight"), 0, &[n_embd as u64], of(1.0)).tensor_of(
            &format!("{norm}.bias"),
            0,
            &[n_embd as u64],
            of(0.0),
        );
    }
    let mut model = Model::from_gguf(Gguf::parse(Bytes::from(tiny.bytes())).unwrap()).unwrap();
    model.set_normalizers(norm).unwrap();
    Session::new(Arc::new(model), &Options::default()).unwrap()
}

fn find(session: &mut Session, needle: Needle, seed: u64) -> Retrieval {
    // No token twice, so that there is one way to go on.
    let tokens: Vec<u32> = (0..200).map(|i| i * 7 % 256).collect();
    let probe = Probe { needle, n_ctx: 64, n_needle: 12, n_cue: 4, n_trials: 10, seed };
    retrieve(session, &tokens, probe, &mut |_| ()).unwrap()
}

#[test]
fn retrieval_tells_a_model_that_copies_from_one_that_cannot() {
    for needle in [Needle::Passage, Needle::Random] {
        let mut session = induction("softmax");
        let found = find(&mut session, needle, 1);
        // Random tokens can be in the text a second time, with something else after them.
        let least = if needle == Needle::Passage { 0.99 } else { 0.8 };
        assert_eq!(found.depths.len(), DEPTHS.len());
        for depth in found.depths.iter().chain([&found.all]) {
            assert!(
                depth.top1.value > least && depth.ln_p_gain.value > 3.0,
                "{needle:?}: {found:?}"
            );
            assert!(depth.p_gain.value > least - 0.2, "{needle:?}: {found:?}");
        }
        assert!(found.chance.value < 0.2, "{needle:?}: {found:?}");
        // Whatever was read before.
        assert_eq!(find(&mut session, needle, 1), found);
        assert_ne!(find(&mut session, needle, 2), found);
        // Either half of the circuit blinded.
        for norm in ["0=softmax:scale=0", "1=softmax:scale=0"] {
            let blind = find(&mut induction(norm), needle, 1);
            assert!(blind.all.top1.value < 0.2, "{needle:?} {norm}: {blind:?}");
            assert!(blind.all.p_gain.value < 0.1, "{needle:?} {norm}: {blind:?}");
        }
    }
}

#[test]
fn probes_that_cannot_be_are_refused() {
    let mut session = induction("softmax");
    let good =
        Probe { needle: Needle::Random, n_ctx: 64, n_needle: 12, n_cue: 4, n_trials: 2, seed: 0 };
    for (probe, n, text) in [
        (Probe { n_trials: 1, ..good }, 200, "1 needles of 12 tokens"),
        (Probe { n_cue: 12, ..good }, 200, "12 repeated; allowed 2 or more needles, and 1 to 11"),
        (Probe { n_cue: 0, ..good }, 200, "0 repeated"),
        (Probe { n_ctx: 35, ..good }, 200, "a context of 35 tokens for retrieval; allowed 36"),
        (good, 75, "a text of 75 tokens; allowed 76 or more"),
    ] {
        let tokens: Vec<u32> = (0..n).collect();
        let error = retrieve(&mut session, &tokens, probe, &mut |_| ()).unwrap_err().to_string();
        assert!(error.contains(text), "{error}");
    }
    let error = retrieve(&mut session, &[5; 200], good, &mut |_| ()).unwrap_err().to_string();
    assert!(error.contains("1 different tokens; a needle has 12"), "{error}");
}
