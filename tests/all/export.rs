//! What heads do, as other programs and `eval --heads` read it.

use std::io::Read;
use std::process::Command;

use safetensors::SafeTensors;

fn run(args: &[&str]) -> (i32, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_qkov")).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

#[test]
fn arrays_have_the_names_and_axes_of_transformer_lens() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let (npz, tensors) = (path("a.npz"), path("a.safetensors"));
    for out in [&npz, &tensors] {
        let (code, _, error) =
            run(&["patterns", "-p", "The old fox slept.", "--layers", "1-2", "-o", out]);
        assert_eq!(code, 0, "{error}");
    }
    let mut npz = zip::ZipArchive::new(std::fs::File::open(&npz).unwrap()).unwrap();
    let bytes = std::fs::read(&tensors).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!((npz.len(), tensors.len()), (8, 8));
    let mut array = |name: &str| {
        let mut file = Vec::new();
        npz.by_name(&format!("{name}.npy")).unwrap().read_to_end(&mut file).unwrap();
        assert_eq!(&file[..8], b"\x93NUMPY\x01\x00");
        let start = 10 + usize::from(u16::from_le_bytes([file[8], file[9]]));
        let header = std::str::from_utf8(&file[10..start]).unwrap();
        assert!(start % 64 == 0 && header.ends_with('\n'), "{header:?}");
        let shape = header.strip_prefix("{'descr': '<f4', 'fortran_order': False, 'shape': (");
        let shape = shape.unwrap().trim_end().strip_suffix(", )}").unwrap();
        let shape: Vec<usize> = shape.split(", ").map(|n| n.parse().unwrap()).collect();
        let floats = file[start..].chunks_exact(4);
        let data: Vec<f32> = floats.map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(data.len(), shape.iter().product::<usize>());
        let tensor = tensors.tensor(name).unwrap();
        assert_eq!(tensor.shape(), shape, "{name}");
        let same = tensor.data().chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        assert!(same.map(f32::to_bits).eq(data.iter().map(|x| x.to_bits())), "{name}");
        (shape, data)
    };
    for layer in [1, 2] {
        let (scores_shape, scores) = array(&format!("blocks.{layer}.attn.hook_attn_scores"));
        let (shape, weights) = array(&format!("blocks.{layer}.attn.hook_pattern"));
        let (values_shape, values) = array(&format!("blocks.{layer}.attn.hook_v"));
        let (outputs_shape, outputs) = array(&format!("blocks.{layer}.attn.hook_z"));
        let n = shape[2];
        assert!(n > 4);
        assert_eq!(scores_shape, shape);
        assert_eq!((shape[0], shape[1], shape[3]), (1, 8, n));
        assert_eq!((values_shape, outputs_shape), (vec![1, n, 2, 64], vec![1, n, 8, 64]));
        for (head, query) in (0..8).flat_map(|h| (0..n).map(move |q| (h, q))) {
            let at = (head * n + query) * n;
            let is_seen = |key: usize| scores[at + key] > f32::NEG_INFINITY;
            assert!((0..n).all(|key| is_seen(key) == (key <= query)));
            for i in 0..64 {
                let value = |key: usize| weights[at + key] * values[(key * 2 + head / 4) * 64 + i];
                let mixed: f32 = (0..n).map(value).sum();
                assert!((mixed - outputs[(query * 8 + head) * 64 + i]).abs() < 1e-4);
            }
        }
    }
    for (args, code, why) in [
        (["--layers", "9", "-o", "x.npz"], 2, "layer \"9\"; allowed *, numbers 0 to 5"),
        (["--layers", "0", "-o", "x.csv"], 2, "--out x.csv: allowed .npz, .safetensors"),
        (["--layers", "0", "-o", "/nowhere/x.npz"], 1, "/nowhere/x.npz"),
    ] {
        let (found, _, error) = run(&[&["patterns", "-p", "The"], &args[..]].concat());
        assert!(error.contains(why), "{error}");
        assert_eq!(found, code, "{error}");
    }
}

#[test]
fn heads_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text");
    std::fs::write(&text, "The fox went down to the river. ".repeat(60)).unwrap();
    let text = text.to_str().unwrap();
    let norm = "*=softmax;2.1=hardmax;3=sigmoid";
    let args = ["eval", "-f", text, "-c", "64", "--norm", norm, "--heads"];
    let (code, json, error) = run(&[&args[..], &["--json"]].concat());
    assert_eq!(code, 0, "{error}");
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    let heads = report["heads"].as_array().unwrap();
    assert_eq!(heads.len(), 48);
    for head in heads {
        let x = |name: &str| head[name].as_f64().unwrap();
        let place = (head["layer"].as_u64().unwrap(), head["head"].as_u64().unwrap());
        assert!(x("mass_p5") <= x("mass_p50") && x("mass_p50") <= x("mass_p95"));
        assert!(x("log_sum_p5") < x("log_sum_p95") && x("support_share") <= 1.0);
        match place {
            (2, 1) => {
                assert!(x("entropy") < 0.01 && x("effective_keys") < 1.01 && x("output_err") > 0.0);
            }
            (3, _) => assert!(x("mass_std") > 0.1 && x("output_err") > 0.1),
            _ => {
                assert!((x("mass") - 1.0).abs() < 1e-5 && x("output_err") == 0.0);
                assert!(x("entropy") > 0.01 && (x("support_share") - 1.0).abs() < 0.5);
            }
        }
    }
    let (_, table, _) = run(&args);
    let lines: Vec<&str> = table.lines().collect();
    assert!(lines.iter().any(|l| l.trim_start().starts_with("2.1 ")), "{table}");
    assert!(lines.iter().all(|l| l.chars().count() <= 100), "{table}");
}
