//! What is inside heads, against products that are multiplied out and sums over all tokens.

use std::sync::Arc;

use faer::Mat;
use qkov::arch::NormKind;
use qkov::measure::circuits::{
    Described, Match, Selection, circuits, dense_products, describe, read_text,
};
use qkov::model::{Model, NormWeight, Weight};
use qkov::session::{Options, Session};

const NAMES: [&str; 3] = ["llama", "qwen2", "gpt2"];

fn golden(name: &str) -> Model {
    let path = format!("{}/tests/golden/{name}.gguf", env!("CARGO_MANIFEST_DIR"));
    Model::open(path.as_ref()).unwrap()
}

fn all(model: &Model) -> Selection {
    let heads = 0..model.hparams.layers[0].n_head;
    Selection { layers: 0..model.layers.len(), heads, n_directions: 2, n_tokens: 5 }
}

/// What a norm leaves of a direction.
fn centered(model: &Model, x: Vec<f64>) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let mean = if model.hparams.norm.kind == NormKind::Layer { mean } else { 0.0 };
    x.into_iter().map(|x| x - mean).collect()
}

/// `W_QK` and `W_OV` of a head, element by element, from the definition.
fn wide(model: &Model, layer: usize, head: usize) -> [Mat<f64>; 2] {
    let hp = &model.hparams;
    let (d, dim) = (hp.n_embd, hp.key_dim);
    let kv = head / (hp.layers[layer].n_head / hp.layers[layer].n_head_kv);
    let w = model.weights(layer);
    let gain = &model.layers[layer].attn_norm.as_ref().unwrap().weight;
    let norms = model.layers[layer].qk_norm.as_ref();
    let after = |c: usize| {
        let gain = |norm: &NormWeight, head: usize| f64::from(norm.weight[head * dim + c]);
        norms.map_or(1.0, |n| gain(&n.0, head) * gain(&n.1, kv))
    };
    let row = |w: &qkov::merge::Dense, i: usize, e: usize| f64::from(w.data[i * w.n_in + e]);
    let read = |w: &qkov::merge::Dense, i: usize, e: usize| row(w, i, e) * f64::from(gain[e]);
    let qk = |i: usize, j: usize| -> f64 {
        let part = |c| after(c) * read(&w.q, head * dim + c, i) * read(&w.k, kv * dim + c, j);
        (0..dim).map(part).sum()
    };
    let ov = |i: usize, j: usize| -> f64 {
        (0..dim).map(|c| read(&w.v, kv * dim + c, i) * row(&w.o, j, head * dim + c)).sum()
    };
    // Inputs, by row for both and by column for keys, have no mean where the norm takes it away.
    let column = |m: &Mat<f64>, j: usize| centered(model, (0..d).map(|i| m[(i, j)]).collect());
    let no_mean = |m: Mat<f64>| {
        let columns: Vec<Vec<f64>> = (0..d).map(|j| column(&m, j)).collect();
        Mat::from_fn(d, d, |i, j| columns[j][i])
    };
    let qk = no_mean(Mat::from_fn(d, d, qk));
    [no_mean(qk.transpose().to_owned()).transpose().to_owned(), no_mean(Mat::from_fn(d, d, ov))]
}

fn assert_products(model: &Model, name: &str) {
    let dim = model.hparams.key_dim;
    for circuit in circuits(model, &all(model)).unwrap() {
        let (layer, head) = (circuit.layer, circuit.head);
        let wide = wide(model, layer, head);
        let written = dense_products(model, layer, head).unwrap();
        for ((wide, product), written) in wide.iter().zip([&circuit.qk, &circuit.ov]).zip(&written)
        {
            let values = wide.singular_values().unwrap();
            assert_eq!(product.values.len(), dim);
            for (ours, theirs) in product.values.iter().zip(&values) {
                assert!((ours - theirs).abs() < 1e-9 * values[0], "{name}: {ours} {theirs}");
            }
            assert!(values[dim] < 1e-9 * values[0]);
            assert!((product.norm() - wide.norm_l2()).abs() < 1e-9 * values[0]);
            for (i, x) in written.iter().enumerate() {
                let d = wide.ncols();
                assert!((f64::from(*x) - wide[(i / d, i % d)]).abs() < 1e-6 * values[0]);
            }
            // Singular vectors: the product takes one side to the other.
            let (u, v) = (product.left.col(1), product.right.col(1));
            assert!((wide * v - u * faer::Scale(product.values[1])).norm_max() < 1e-9 * values[0]);
        }
        let eigen = wide[1].eigenvalues().unwrap();
        let (sum, sizes) =
            eigen.iter().fold((0.0, 0.0), |(s, n), z| (s + z.re, n + z.re.hypot(z.im)));
        assert!((circuit.copying - sum / sizes).abs() < 1e-6, "{name}");
    }
}

use crate::cli::code_and_text as qkov;

#[test]
fn thin_factors_say_what_products_say() {
    // And with norms of heads, one gain for all of them or one for each.
    for name in NAMES.into_iter().chain(["qwen3", "gemma3", "stablelm-parallel"]) {
        assert_products(&golden(name), name);
    }
}

#[test]
fn planes_share_the_energy() {
    let model = golden("llama");
    let hp = &model.hparams;
    let rope = &hp.ropes[0];
    for circuit in circuits(&model, &all(&model)).unwrap() {
        let w = model.weights(circuit.layer);
        let kv = circuit.head / (hp.layers[0].n_head / hp.layers[0].n_head_kv);
        let gain = &model.layers[circuit.layer].attn_norm.as_ref().unwrap().weight;
        let size = |w: &qkov::merge::Dense, i: usize| -> f64 {
            let row = w.data[i * w.n_in..][..w.n_in].iter().zip(gain);
            row.map(|(w, g)| (f64::from(*w) * f64::from(*g)).powi(2)).sum()
        };
        let energy = |plane: usize| {
            let pair = rope.pairing.pair(plane, rope.dim / 2);
            let of =
                |w, head: usize| pair.map(|i| size(w, head * hp.key_dim + i)).iter().sum::<f64>();
            of(&w.q, circuit.head) * of(&w.k, kv)
        };
        let total: f64 = (0..rope.dim / 2).map(energy).sum();
        assert_eq!(circuit.planes.len(), rope.dim / 2);
        for (i, plane) in circuit.planes.iter().enumerate() {
            assert!((plane.energy - energy(i) / total).abs() < 1e-12);
            let angle = f64::from(rope.base).powf(-2.0 * i as f64 / rope.dim as f64);
            assert!((plane.wavelength * angle / std::f64::consts::TAU - 1.0).abs() < 1e-9);
        }
    }
    assert!(circuits(&golden("gpt2"), &all(&golden("gpt2"))).unwrap()[0].planes.is_empty());
}

#[test]
fn conditions_are_those_of_the_file() {
    for name in NAMES {
        let model = golden(name);
        let g = &model.attention[0].geometry;
        for circuit in circuits(&model, &all(&model)).unwrap() {
            let w = model.weights(circuit.layer);
            let ratio = |w: &qkov::merge::Dense, rows: std::ops::Range<usize>| {
                let m = Mat::from_fn(rows.len(), w.n_in, |i, e| {
                    f64::from(w.data[(rows.start + i) * w.n_in + e])
                });
                let values = m.singular_values().unwrap();
                values[0] / values.last().unwrap()
            };
            let kv = circuit.head / g.per_kv();
            let n = w.k.data.len() / w.k.n_in;
            for (ours, theirs) in [
                (circuit.key_condition, ratio(&w.k, g.keys(kv))),
                (circuit.value_condition, ratio(&w.v, g.values(kv))),
                (circuit.layer_condition, ratio(&w.k, 0..n)),
            ] {
                let is_wide = n > w.k.n_in && ours.is_infinite();
                assert!(is_wide || (ours / theirs - 1.0).abs() < 1e-6, "{name}: {ours} {theirs}");
            }
        }
    }
}

fn row(w: &Weight, token: usize) -> Vec<f64> {
    let mut row = vec![0.0f32; w.n_in];
    w.format.dequantize(w.row(token), &mut row);
    row.into_iter().map(f64::from).collect()
}

/// Products of a direction with every token's embedding, of unit length, or its row of the output.
fn scores(model: &Model, direction: &[f64], is_output: bool) -> Vec<f64> {
    let direction = centered(model, direction.to_vec());
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let score = |token: usize| match is_output {
        false => {
            let row = centered(model, row(&model.token_embd, token));
            dot(&row, &direction) / dot(&row, &row).sqrt()
        }
        true => {
            let gain = model.output_norm.as_ref().unwrap().weight.iter().map(|g| f64::from(*g));
            let output = model.output.as_ref().unwrap();
            let row: Vec<f64> = row(output, token).iter().zip(gain).map(|(w, g)| w * g).collect();
            dot(&row, &direction)
        }
    };
    (0..model.hparams.n_vocab).map(score).collect()
}

/// Whether these are the tokens with the largest scores.
fn assert_best(found: &[Match], scores: &[f64], what: &str) {
    assert_eq!(found.len(), 5);
    let mut sorted = scores.to_vec();
    sorted.sort_by(|a, b| b.total_cmp(a));
    let size = scores.iter().fold(0.0f64, |m, s| m.max(s.abs()));
    for (m, best) in found.iter().zip(sorted) {
        let score = scores[m.token as usize];
        assert!((m.score - score).abs() < 1e-5 * size, "{what}: {m:?} {score}");
        assert!((score - best).abs() < 1e-5 * size, "{what}: {m:?} {best}");
    }
}

#[test]
fn directions_are_told_as_the_tokens_that_fit_best() {
    for name in NAMES {
        let model = golden(name);
        for Described { circuit, qk, ov } in describe(&model, &all(&model)).unwrap() {
            for (directions, product, is_output) in
                [(qk, &circuit.qk, false), (ov, &circuit.ov, true)]
            {
                assert_eq!(directions.len(), 2);
                for (d, poles) in directions.iter().enumerate() {
                    let side = |m: &Mat<f64>, sign: f64| -> Vec<f64> {
                        m.col(d).iter().map(|x| sign * x).collect()
                    };
                    let of = |sign: f64| {
                        let left = scores(&model, &side(&product.left, sign), false);
                        (left, scores(&model, &side(&product.right, sign), is_output))
                    };
                    // Both sides have the same sign, and what fits better comes first.
                    let most = |s: &[f64]| s.iter().copied().fold(f64::MIN, f64::max);
                    let fit = |(left, right): &(Vec<f64>, Vec<f64>)| {
                        most(left) + if is_output { 0.0 } else { most(right) }
                    };
                    let (mut first, mut second) = (of(1.0), of(-1.0));
                    if fit(&second) > fit(&first) {
                        std::mem::swap(&mut first, &mut second);
                    }
                    for (pole, (left, right)) in poles.iter().zip([first, second]) {
                        assert_best(&pole.left, &left, name);
                        assert_best(&pole.right, &right, name);
                    }
                }
            }
        }
    }
}

#[test]
fn patterns_are_scores_and_messages_are_outputs() {
    for name in NAMES {
        let model = Arc::new(golden(name));
        let (tokens, selection) = ([3u32, 1, 4, 1, 5], all(&model));
        let options = Options { exact: true, n_ctx: Some(8), ..Options::default() };
        let mut session = Session::new(model.clone(), &options).unwrap();
        let readings = read_text(&mut session, &selection, &tokens).unwrap();
        assert_eq!(readings.len(), model.layers.len() * model.hparams.layers[0].n_head);
        // What a first layer reads is known: the token's embedding and, where there is one, the position's.
        for reading in readings.iter().filter(|r| r.layer == 0) {
            let (w, hp) = (model.weights(0), &model.hparams);
            let norm = model.layers[0].attn_norm.as_ref().unwrap();
            let normed = |token: usize, position: usize| -> Vec<f64> {
                let mut x = row(&model.token_embd, token);
                x.iter_mut().for_each(|x| *x *= f64::from(hp.embedding_scale));
                if let Some(w) = &model.position_embd {
                    x.iter_mut().zip(row(w, position)).for_each(|(x, p)| *x += p);
                }
                let x = centered(&model, x);
                let square = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
                x.iter().map(|x| x / (square + f64::from(hp.norm.eps)).sqrt()).collect()
            };
            let read =
                |x: &[f64], w: &qkov::merge::Dense, head: usize, with_bias: bool| -> Vec<f64> {
                    let after = |e: usize| {
                        let bias = norm.bias.as_ref().map_or(0.0, |b| f64::from(b[e]));
                        x[e] * f64::from(norm.weight[e]) + if with_bias { bias } else { 0.0 }
                    };
                    let row = |i: usize| {
                        let sum: f64 =
                            (0..w.n_in).map(|e| after(e) * f64::from(w.data[i * w.n_in + e])).sum();
                        sum + w.bias.as_ref().filter(|_| with_bias).map_or(0.0, |b| f64::from(b[i]))
                    };
                    (head * hp.key_dim..(head + 1) * hp.key_dim).map(row).collect()
                };
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let kv = reading.head / (hp.layers[0].n_head / hp.layers[0].n_head_kv);
            for (position, token) in tokens.iter().enumerate() {
                let x = normed(*token as usize, position);
                let q = read(&x, &w.q, reading.head, true);
                // A key of unit length, but for the root of the width.
                let key = |token: usize| {
                    let e = centered(&model, row(&model.token_embd, token));
                    let size = (dot(&e, &e) / e.len() as f64).sqrt();
                    let unit: Vec<f64> = e.iter().map(|e| e / size).collect();
                    f64::from(hp.attn_scale) * dot(&q, &read(&unit, &w.k, kv, false))
                };
                let all: Vec<f64> = (0..hp.n_vocab).map(key).collect();
                let what = format!("{name}, head {}, token {position}", reading.head);
                assert_close(&reading.patterns[position], &all, &what);
                let v = read(&x, &w.v, kv, true);
                let at = |e: usize| &w.o.data[e * w.o.n_in + reading.head * hp.key_dim..];
                let written = |e: usize| v.iter().zip(at(e)).map(|(v, o)| v * f64::from(*o)).sum();
                let message: Vec<f64> = (0..hp.n_embd).map(written).collect();
                assert_close(&reading.messages[position], &scores(&model, &message, true), &what);
            }
        }
    }
}

/// [`assert_best`], but for what an engine in `f32` rounds.
fn assert_close(found: &[Match], scores: &[f64], what: &str) {
    let size = scores.iter().fold(0.0f64, |m, s| m.max(s.abs()));
    let best = scores.iter().copied().fold(f64::MIN, f64::max);
    assert!((scores[found[0].token as usize] - best).abs() < 1e-3 * size, "{what}: {found:?}");
    for m in found {
        let score = scores[m.token as usize];
        assert!((m.score - score).abs() < 1e-3 * size, "{what}: {m:?} {score}");
    }
}

fn json(args: &[&str]) -> Vec<serde_json::Value> {
    let (code, text) = qkov(args);
    assert_eq!(code, 0, "{text}");
    serde_json::from_str(&text).unwrap()
}

#[test]
fn heads_are_shown() {
    let (code, text) = qkov(&["inspect", "--heads"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("\n    0.0 ") && text.contains("\n    5.3 "), "{text}");
    assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
    let (_, text) =
        qkov(&["inspect", "--heads", "--layer", "2", "--head", "1", "--directions", "3"]);
    for part in [
        "rotary planes",
        "look for keys such as",
        "it writes",
        "QK singular values",
        "OV direction 2",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let heads = json(&["inspect", "--heads", "--layer", "1", "--json", "--top", "3"]);
    assert_eq!(heads.len(), 8);
    let head = &heads[3];
    assert_eq!((head["layer"].as_u64(), head["head"].as_u64()), (Some(1), Some(3)));
    assert_eq!(head["qk"]["singular_values"].as_array().unwrap().len(), 64);
    assert_eq!(head["planes"].as_array().unwrap().len(), 32);
    assert_eq!(head["qk"]["directions"][1][0]["key"].as_array().unwrap().len(), 3);
    assert_eq!(head["ov"]["directions"][0][1]["write"].as_array().unwrap().len(), 3);
    for name in ["key_condition", "value_condition", "layer_key_condition", "copying"] {
        assert!(head[name].is_number(), "{name}: {head}");
    }
    for name in ["norm", "effective_rank"] {
        assert!(head["ov"][name].as_f64().unwrap() > 0.0, "{name}");
    }
    assert_eq!(head["ov"]["energy_at"].as_array().unwrap().len(), 4);
}

#[test]
fn texts_are_read() {
    let one = ["inspect", "--heads", "--layer", "1", "--head", "0"];
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("x.txt");
    std::fs::write(&file, "the old house").unwrap();
    let (_, text) = qkov(&[&one[..], &["--text", "the old house"]].concat());
    assert!(text.contains("looks for") && text.contains("\" house\""), "{text}");
    let (_, same) = qkov(&[&one[..], &["--file", file.to_str().unwrap()]].concat());
    assert_eq!(text, same);
    let readings = json(&[&one[..], &["--text", "the old house", "--json", "--top", "2"]].concat());
    let tokens = readings[0]["tokens"].as_array().unwrap();
    assert_eq!(tokens.last().unwrap()["token"], " house");
    assert_eq!(tokens[1]["looks_for"].as_array().unwrap().len(), 2);
    assert!(tokens[1]["writes"][0]["score"].is_number());
}

#[test]
fn pages_of_heads_need_no_network() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("heads.html");
    let (code, text) = qkov(&["inspect", "--heads", "--html", path.to_str().unwrap()]);
    assert!(code == 0 && text.contains("written: "), "{text}");
    let page = std::fs::read_to_string(&path).unwrap();
    assert!(!page.contains("{{") && !page.contains(" src=") && !page.contains(" href="));
    let (_, rest) = page.split_once("id=\"data\">").unwrap();
    let data: serde_json::Value =
        serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap();
    let heads = data["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 48);
    assert_eq!(heads[47]["ov"]["directions"].as_array().unwrap().len(), 2);
    assert!(page.contains("of 48 heads copy what they read"));
}

#[test]
fn products_are_written_with_what_they_cost() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["x.npz", "x.safetensors"] {
        let out = folder.path().join(name);
        let (code, text) = qkov(&["inspect", "--dense", "3.1", "--out", out.to_str().unwrap()]);
        assert!(code == 0 && text.contains("blocks.3.attn.W_QK.1 [512, 512]"), "{text}");
        assert!(text.contains("524288") && text.contains("4.0 times as much"), "{text}");
        assert!(std::fs::metadata(&out).unwrap().len() > 4 * 524288);
    }
}

#[test]
fn wrong_selections_are_told_in_one_line() {
    for (args, message) in [
        (&["--heads", "--layer", "6"][..], "--layer \"6\"; allowed *, numbers 0 to 5"),
        (&["--heads", "--head", "8"], "--head \"8\"; allowed *, numbers 0 to 7"),
        (&["--heads", "--top", "0"], "--top"),
        (&["--heads", "--text", &"a ".repeat(70)], "--text: 72 tokens; allowed 1 to 64"),
        (&["--dense", "0", "--out", "x.npz"], "--dense 0: allowed LAYER.HEAD, such as 0.1"),
        (&["--dense", "6.0", "--out", "x.npz"], "layer 6; allowed 0 to 5"),
        (&["--dense", "0.8", "--out", "x.npz"], "head 8; allowed 0 to 7"),
        (&["--dense", "0.1", "--out", "x.txt"], "--out x.txt: allowed .npz, .safetensors"),
        (&["--dense", "0.1"], "--out"),
        (&["--layer", "1"], "--heads"),
    ] {
        let (code, text) = qkov(&[&["inspect"], args].concat());
        assert!(code == 2 && text.contains(message), "{args:?}: {text}");
        let by_clap = text.contains("try '--help'");
        assert!(by_clap || text.trim_end().lines().count() == 1, "{text}");
    }
}
