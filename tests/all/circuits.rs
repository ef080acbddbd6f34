//! What is inside heads, against products that are multiplied out.

use faer::Mat;
use qkov::measure::circuits::{circuits, dense_products};
use qkov::model::Model;

use crate::cli::code_and_text as qkov;

#[test]
fn thin_factors_say_what_products_say() {
    for name in ["llama", "qwen2", "gpt2"] {
        let path = format!("{}/tests/golden/{name}.gguf", env!("CARGO_MANIFEST_DIR"));
        let model = Model::open(path.as_ref()).unwrap();
        let hp = &model.hparams;
        let (d, dim) = (hp.n_embd, hp.key_dim);
        let per_kv = hp.layers[0].n_head / hp.layers[0].n_head_kv;
        for circuit in circuits(&model, 0..model.layers.len()).unwrap() {
            let (layer, head) = (circuit.layer, circuit.head);
            let w = model.weights(layer);
            let gain = &model.layers[layer].attn_norm.weight;
            let row =
                |w: &qkov::merge::Dense, i: usize, e: usize| f64::from(w.data[i * w.n_in + e]);
            let kv = head / per_kv;
            let at = |e: usize| f64::from(gain[e]);
            let qk = |i: usize, j: usize| {
                let sum: f64 = (0..dim)
                    .map(|c| row(&w.q, head * dim + c, i) * row(&w.k, kv * dim + c, j))
                    .sum();
                sum * at(i) * at(j)
            };
            let ov = |i: usize, j: usize| {
                let sum: f64 = (0..dim)
                    .map(|c| row(&w.v, kv * dim + c, i) * row(&w.o, j, head * dim + c))
                    .sum();
                sum * at(i)
            };
            let wide = [Mat::from_fn(d, d, qk), Mat::from_fn(d, d, ov)];
            let written = dense_products(&model, layer, head).unwrap();
            for ((wide, product), written) in
                wide.iter().zip([&circuit.qk, &circuit.ov]).zip(&written)
            {
                let values = wide.singular_values().unwrap();
                for (ours, theirs) in product.values.iter().zip(&values) {
                    assert!((ours - theirs).abs() < 1e-9 * values[0], "{name}: {ours} {theirs}");
                }
                assert!(values[dim] < 1e-9 * values[0]);
                for (i, x) in written.iter().enumerate() {
                    assert!((f64::from(*x) - wide[(i / d, i % d)]).abs() < 1e-6 * values[0]);
                }
            }
            let eigen = wide[1].eigenvalues().unwrap();
            let (sum, sizes) =
                eigen.iter().fold((0.0, 0.0), |(s, n), z| (s + z.re, n + z.re.hypot(z.im)));
            assert!((circuit.copying - sum / sizes).abs() < 1e-6, "{name}");
            let shares: f64 = circuit.planes.iter().map(|(_, share)| share).sum();
            assert!(circuit.planes.is_empty() || (shares - 1.0).abs() < 1e-9);
        }
    }
}

#[test]
fn heads_are_shown() {
    let (code, text) = qkov(&["inspect", "--heads"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("\n       0.0") && text.contains("\n       5.3"), "{text}");
    let (_, text) = qkov(&["inspect", "--heads", "--layer", "2", "--head", "1"]);
    for part in ["planes by energy", "look for keys", "writes", "QK singular values"] {
        assert!(text.contains(part), "{text}");
    }
    let (_, text) = qkov(&["inspect", "--heads", "--layer", "1", "--json", "--top", "3"]);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(json.as_array().unwrap().len(), 4);
    assert_eq!(json[3]["qk"]["singular_values"].as_array().unwrap().len(), 64);
    assert_eq!(json[0]["directions"][1]["write"].as_array().unwrap().len(), 3);
    let (_, text) =
        qkov(&["inspect", "--heads", "--layer", "1", "--head", "0", "--text", "the old house"]);
    assert!(text.contains("token | looks for | writes") && text.contains("\" house\""), "{text}");
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("x.npz").to_str().unwrap().to_string();
    let (code, text) = qkov(&["inspect", "--dense", "3.1", "--out", &out]);
    assert!(code == 0 && text.contains("131072 elements") && text.contains("2.0 times"), "{text}");
    for (args, message) in [
        (&["inspect", "--heads", "--layer", "6"][..], "layer \"6\"; allowed"),
        (&["inspect", "--dense", "0", "--out", &out], "head \"\"; allowed"),
        (&["inspect", "--dense", "0.1", "--out", "x.txt"], "allowed .npz, .safetensors"),
        (&["inspect", "--heads", "--text", ""], "--text: 0 tokens; allowed 1 to 64"),
    ] {
        let (code, text) = qkov(args);
        assert!(code == 2 && text.contains(message), "{args:?}: {text}");
    }
}
