//! The program as its user sees it: output, messages and exit codes.

use std::io::Write;
use std::process::{Command, Output, Stdio};

use crate::shared;

fn qkov(args: &[&str], stdin: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_qkov"))
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that ends without reading closes the pipe.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

pub fn ok(args: &[&str], stdin: &str) -> String {
    let output = qkov(args, stdin);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// The exit code of a run, and everything that it prints.
pub fn code_and_text(args: &[&str]) -> (i32, String) {
    let output = qkov(args, "");
    let text = [output.stdout, output.stderr].concat();
    (output.status.code().unwrap(), String::from_utf8(text).unwrap())
}

/// The one line on stderr of a run that fails with `code`.
pub fn error(args: &[&str], code: i32) -> String {
    let output = qkov(args, "");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{args:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{args:?}");
    stderr
}

#[test]
fn chat_replies_with_the_model_that_ships() {
    let args = ["chat", "--seed", "1", "-n", "40"];
    let reply = ok(&args, "Write a passage about the rain.\n");
    assert!(reply.split_whitespace().count() > 10, "{reply}");
    assert_eq!(reply, ok(&args, "Write a passage about the rain.\n"), "same seed, same text");
    assert_eq!(
        reply,
        ok(&["chat", "--seed", "1", "-n", "40", "-p", "Write a passage about the rain."], "")
    );
}

#[test]
fn chat_commands() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("talk.json");
    let file = file.to_str().unwrap();
    let script = format!(
        "/help\n/system Be brief.\nHello\n/save {file}\n/clear\n/load {file}\n/regen\n/stats\n/nonsense\n/exit\n"
    );
    let output = qkov(&["chat", "-n", "8", "--seed", "3"], &script);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success());
    for text in [
        "/regen",
        "3 messages saved",
        "3 messages loaded",
        "tokens of context in use",
        "/nonsense is no command",
    ] {
        assert!(stderr.contains(text), "{text:?} is not in {stderr}");
    }
    let saved: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(saved["messages"][1]["content"], "Hello");
    assert!(output.stdout.iter().filter(|b| **b == b'\n').count() >= 2, "two replies");
}

#[test]
fn a_long_chat_leaves_its_oldest_turns() {
    let script = "Write a passage about the rain.\n".repeat(6);
    let output = qkov(&["chat", "-c", "160", "-n", "60", "--seed", "5"], &script);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("context full: the oldest"), "{stderr}");
    let long = qkov(&["chat", "-c", "64"], &format!("{}\n", "word ".repeat(100)));
    assert!(String::from_utf8(long.stderr).unwrap().contains("the context holds 64"));
}

#[test]
fn generate_prints_prompt_and_continuation_only() {
    let args = ["generate", "-p", "The old man", "-n", "20", "--temp", "0"];
    let output = qkov(&args, "");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("The old man") && text.len() > 30, "{text}");
    assert!(output.stderr.is_empty());
    assert_eq!(text, ok(&["generate", "-n", "20", "--temp", "0"], "The old man"), "from stdin");
    assert_eq!(text, ok(&[&args[..], &["-t", "1"]].concat(), ""), "whatever the threads");
}

#[test]
fn tokenize_and_template() {
    let ids = ok(&["tokenize", "--ids", "-p", "Hello there"], "");
    let ids: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
    let json: serde_json::Value =
        serde_json::from_str(&ok(&["tokenize", "--json", "-p", "Hello there"], "")).unwrap();
    assert_eq!(json.as_array().unwrap().len(), ids.len());
    let text: String =
        json.as_array().unwrap().iter().map(|t| t["text"].as_str().unwrap()).collect();
    assert_eq!(text, "Hello there");
    let messages = r#"[{"role": "user", "content": "Hi"}]"#;
    let rendered = ok(&["template", "--add-generation-prompt"], messages);
    assert_eq!(rendered, "<|end|><|user|>Hi<|end|><|assistant|>");
}

#[test]
fn inspect_lists_everything() {
    let json: serde_json::Value = serde_json::from_str(&ok(&["inspect", "--json"], "")).unwrap();
    assert_eq!(json["metadata"]["general.architecture"], "llama");
    assert_eq!(json["layers"].as_array().unwrap().len(), 6);
    assert_eq!(json["layers"][0]["n_head_kv"], 2);
    assert!(json["tensors"].as_array().unwrap().iter().any(|t| t["name"] == "token_embd.weight"));
    let text = ok(&["inspect", "--tensors"], "");
    assert!(text.contains("blk.5.ffn_down.weight") && text.contains("score_dim 64"), "{text}");
}

#[test]
fn usage_errors_exit_with_2() {
    error(&["chat", "--no-such-option"], 2);
    error(&["generate", "-p", "x", "--temp", "hot"], 2);
    for args in [
        &["generate", "-p", "x", "--top-p", "7"][..],
        &["generate", "-p", "x", "-c", "0"],
        &["generate", "-p", "x y z", "-c", "1"],
    ] {
        let line = error(args, 2);
        assert!(line.starts_with("error: ") && line.trim_end().lines().count() == 1, "{line}");
    }
}

#[test]
fn file_errors_exit_with_3() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str, content: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_string()
    };
    let cases = [
        (dir.path().join("none.gguf").to_str().unwrap().to_string(), "No such file"),
        (dir.path().to_str().unwrap().to_string(), "is a directory"),
        (path("empty.gguf", b""), "file is empty"),
        (path("zip.gguf", b"PK\x03\x04aaaaaaaaaaaaaaaaaaaaaaaa"), "zip archive"),
        (path("short.gguf", b"GGUF\x03\0\0\0"), "truncated header"),
        (path("one.gguf", b"GGUF\x01\0\0\0aaaaaaaaaaaaaaaaaaa"), "version 1 is too old"),
    ];
    for (path, text) in cases {
        for command in ["chat", "generate", "inspect", "tokenize", "eval"] {
            let mut args = vec![command, "-m", &path];
            match command {
                "generate" | "tokenize" => args.extend(["-p", "x"]),
                "eval" => args.extend(["-f", "/dev/null"]),
                _ => {}
            }
            let line = error(&args, 3);
            assert!(
                line.contains(text) && line.trim_end().lines().count() == 1,
                "{args:?}: {line}"
            );
            assert!(line.contains(path.rsplit('/').next().unwrap()), "{line}");
        }
    }
}

#[test]
fn normalizers_are_swapped_by_layer_and_head() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    let text = "It was the best of times, it was the worst of times, said the old man. ".repeat(20);
    std::fs::write(&path, text).unwrap();
    let eval = |norm: &str| -> serde_json::Value {
        let args = ["eval", "-f", path.to_str().unwrap(), "-c", "128", "--json", "--norm", norm];
        serde_json::from_str(&ok(&args, "")).unwrap()
    };
    let ppl = |value: &serde_json::Value| value["ppl"].as_f64().unwrap();
    let softmax = eval("softmax");
    assert_eq!(softmax["ppl"], eval("relu;*=softmax")["ppl"]);
    assert_eq!(softmax["ppl"], eval("top_k:k=128")["ppl"]);
    let part = eval("1=sigmoid");
    assert_eq!(part["norm"], "softmax+sigmoid");
    assert_eq!(eval("1.0-3=sigmoid; 1.4-7=sigmoid")["ppl"], part["ppl"]);
    let all = eval("sigmoid");
    assert!(ppl(&softmax) != ppl(&part) && 2.0 * ppl(&part) < ppl(&all), "{softmax} {part} {all}");

    for (norm, expected) in [
        ("sofmax", "normalizer \"sofmax\" is not known; known: softmax, "),
        ("6=softmax", "layer \"6\"; allowed *, numbers 0 to 5, or two of them as 0-5"),
        ("2-1=softmax", "layer \"2-1\""),
        ("0.8=softmax", "head \"8\"; allowed *, numbers 0 to 7"),
    ] {
        let line = error(&["generate", "-p", "x", "--norm", norm], 2);
        assert!(line.contains(expected) && line.trim_end().lines().count() == 1, "{line}");
    }
    let list = ok(&["norms"], "");
    assert!(
        list.contains("entmax\n") && list.contains("alpha (default 1.25, 1.001 to 2)"),
        "{list}"
    );
    let json: serde_json::Value = serde_json::from_str(&ok(&["norms", "--json"], "")).unwrap();
    assert_eq!(json.as_array().unwrap().len(), qkov::normalizer::NORMALIZERS.len());
}

#[test]
fn masks_are_chosen_by_layer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    let text = "It was the best of times, it was the worst of times, said the old man. ".repeat(20);
    std::fs::write(&path, text).unwrap();
    let eval = |mask: &str| -> serde_json::Value {
        let args = ["eval", "-f", path.to_str().unwrap(), "-c", "128", "--json", "--mask", mask];
        serde_json::from_str(&ok(&args, "")).unwrap()
    };
    let ppl = |value: &serde_json::Value| value["ppl"].as_f64().unwrap();
    let causal = ppl(&eval("causal"));
    assert_eq!(causal, ppl(&eval("prefix;window;*=causal")));
    assert_eq!(causal, ppl(&eval("window:n=128")));
    let part = eval("0-1=window:n=8;5=sinks-window:n=16");
    assert_eq!(part["mask"], "window:n=8+causal+sinks-window:n=16");
    assert!(ppl(&part) != causal && ppl(&eval("window:n=1")) > 2.0 * causal, "{causal} {part}");
    // The text is always the same, so a first half that is read again, or ahead, shows.
    assert!(ppl(&eval("repeat")) != causal && ppl(&eval("prefix")) != causal);

    let generate = |mask: &str| {
        let args = ["generate", "-p", "The old man", "-n", "12", "--temp", "0", "--mask", mask];
        ok(&args, "")
    };
    assert_eq!(generate("causal"), generate("sink-prefix:sinks=100"));
    assert!(generate("repeat").starts_with("The old man") && generate("blocks:n=2").len() > 11);
    let chat = ["chat", "-n", "20", "--seed", "2", "--mask", "prefix"];
    let script = "Write a passage about the rain.\n/regen\nAnd now?\n";
    let replies = ok(&chat, script);
    assert_eq!(replies, ok(&chat, script), "same seed, same text");
    let bench = ok(&["bench", "-p", "24", "-n", "4", "-r", "1", "--json", "--mask", "repeat"], "");
    let rows: serde_json::Value = serde_json::from_str(&bench).unwrap();
    assert_eq!((&rows[0]["mask"], &rows[0]["n_prompt"]), (&"repeat".into(), &24.into()));

    for (mask, expected) in [
        ("windw", "mask \"windw\" is not known; known: causal; prefix; "),
        ("window:n=0", "mask window: n = 0; allowed whole numbers 1 to "),
        ("3.1=window", "mask window: heads \"1\"; all heads of a layer have one mask"),
        ("3=repeat", "mask repeat is how a prompt is read, for all layers or none; layer 0 has"),
    ] {
        let line = error(&["generate", "-p", "x", "--mask", mask], 2);
        assert!(line.contains(expected) && line.trim_end().lines().count() == 1, "{line}");
    }
    let list = ok(&["masks"], "");
    assert!(list.contains("sinks-window\n") && list.contains("n (default 256, whole"), "{list}");
    let json: serde_json::Value = serde_json::from_str(&ok(&["masks", "--json"], "")).unwrap();
    assert_eq!(json.as_array().unwrap().len(), qkov::mask::MASKS.len());
}

#[test]
fn a_saved_base_is_this_model() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let text = "It was the best of times, it was the worst of times, said the old man. ".repeat(30);
    std::fs::write(at("text"), text).unwrap();
    let eval = |args: &[&str]| -> serde_json::Value {
        let text = at("text");
        let args = [&["eval", "-f", &text, "-c", "128", "--json"], args].concat();
        serde_json::from_str(&ok(&args, "")).unwrap()
    };
    let number = |value: &serde_json::Value| value.as_f64().unwrap();
    let base = at("base.kld");
    let saved = eval(&["--exact", "--save-base", &base]);
    let same = eval(&["--exact", "--base", &base]);
    assert_eq!(saved["ppl"], same["ppl"]);
    assert!(number(&same["kl_mean"]).abs() < 1e-5 && number(&same["same_top"]) > 0.99, "{same}");
    // Activations rounded to 8 bits.
    let rounded = eval(&["--base", &base]);
    assert!(number(&rounded["kl_mean"]) < 5e-3 && number(&rounded["same_top"]) > 0.95, "{rounded}");
}

#[test]
fn a_change_is_judged_against_the_model_as_trained() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("text");
    let text = "It was the best of times, it was the worst of times, said the old man. ".repeat(20);
    std::fs::write(&path, text).unwrap();
    let args = ["eval", "-f", path.to_str().unwrap(), "-c", "128"];
    let eval = |more: &[&str]| -> serde_json::Value {
        serde_json::from_str(&ok(&[&args[..], &["--json"], more].concat(), "")).unwrap()
    };
    let (trained, changed) = (eval(&[]), eval(&["--norm", "1=sigmoid"]));
    assert!(trained["base"].is_null() && trained["kl_mean"].is_null(), "{trained}");
    let judged = eval(&["--norm", "1=sigmoid", "--retrieval", "--against"]);
    assert_eq!((&judged["base"], &judged["norm"]), (&"softmax".into(), &"softmax+sigmoid".into()));
    assert_eq!((&judged["ppl"], &judged["base_ppl"]), (&changed["ppl"], &trained["ppl"]));
    assert!(judged["kl_mean"].as_f64().unwrap() > 0.001, "{judged}");
    for name in ["retrieval_p_gain", "base_retrieval_ln_p_gain_err", "base_retrieval_d90_top1"] {
        assert!(judged[name].is_number(), "{name} of {judged}");
    }
    // Nothing is rounded on the way.
    let same = eval(&["--norm", "1=sigmoid", "--against", "1=sigmoid"]);
    for (name, expected) in [("kl_mean", 0.0), ("kl_max", 0.0), ("dp_rms", 0.0), ("same_top", 1.0)]
    {
        assert_eq!(same[name], expected, "{name}");
    }
    let table = ok(&[&args[..], &["--norm", "sigmoid", "--retrieval", "--against"]].concat(), "");
    assert!(table.contains("KL divergence") && table.contains("a passage of 32"), "{table}");
    let widest = table.lines().map(|line| line.chars().count()).max().unwrap();
    assert!(widest <= 80, "{widest} columns:\n{table}");
    error(&[&args[..], &["--against", "--base", "x"]].concat(), 2);
    let line = error(&[&args[..], &["--against", "sofmax"]].concat(), 2);
    assert!(line.contains("normalizer \"sofmax\" is not known"), "{line}");
    let line = error(&[&args[..], &["--retrieval", "random"]].concat(), 2);
    assert!(line.contains("different tokens; a needle has 32"), "{line}");
    let line = error(&["eval", "-f", args[2], "-c", "64", "--retrieval"], 2);
    assert!(line.contains("a context of 64 tokens for retrieval; allowed 96 or more"), "{line}");
}

/// What `llama-perplexity --kl-divergence` prints for stories260K in windows of 256, against a base
/// that `qkov eval --norm entmax15 --exact --save-base` wrote.
const PRINTED: &[(&str, f64)] = &[
    ("ppl", 6.213181),
    ("ppl_err", 0.156681),
    ("base_ppl", 7.495547),
    ("base_ppl_err", 0.192935),
    ("ln_ppl_correlation", 0.9333),
    ("ln_ppl_ratio", -0.187636),
    ("ln_ppl_ratio_err", 0.009321),
    ("ppl_ratio", 0.828916),
    ("ppl_ratio_err", 0.007727),
    ("ppl_diff", -1.282366),
    ("ppl_diff_err", 0.073131),
    ("kl_mean", 0.200584),
    ("kl_err", 0.003555),
    ("kl_max", 5.623430),
    ("kl_p99_9", 3.382223),
    ("kl_p99", 1.390694),
    ("kl_p95", 0.710965),
    ("kl_p90", 0.484911),
    ("kl_p50", 0.104287),
    ("kl_p10", 0.006059),
    ("kl_p5", 0.001690),
    ("kl_p1", 0.000144),
    ("kl_p0_1", 0.000010),
    ("kl_min", 0.000003),
    ("dp_mean", 0.01997),
    ("dp_err", 0.00152),
    ("dp_max", 0.93727),
    ("dp_p99_9", 0.77382),
    ("dp_p99", 0.51503),
    ("dp_p95", 0.25741),
    ("dp_p90", 0.15826),
    ("dp_p75", 0.04349),
    ("dp_p50", 0.00303),
    ("dp_p25", -0.01409),
    ("dp_p10", -0.09519),
    ("dp_p5", -0.17248),
    ("dp_p1", -0.34451),
    ("dp_p0_1", -0.56703),
    ("dp_min", -0.74063),
    ("dp_rms", 0.13421),
    ("dp_rms_err", 0.00236),
    ("same_top", 0.76299),
    ("same_top_err", 0.00487),
];

#[test]
fn divergence_is_what_llama_cpp_prints() {
    let Some(shared) = shared() else { return };
    let at = |name: &str| shared.join(name).to_str().unwrap().to_string();
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("base").to_str().unwrap().to_string();
    let (model, corpus) = (at("models/stories260K-f32.gguf"), at("corpus/tinystories-sample.txt"));
    let args = ["eval", "-m", &model, "-f", &corpus, "-c", "256", "--exact", "--json"];
    ok(&[&args[..], &["--norm", "entmax15", "--save-base", &base]].concat(), "");
    let ours = ok(&[&args[..], &["--base", &base]].concat(), "");
    let ours: serde_json::Value = serde_json::from_str(&ours).unwrap();
    for (name, printed) in PRINTED {
        let x = ours[name].as_f64().unwrap();
        // The base is made anew, and how sums are rounded in it changes with every kernel.
        assert!((x - printed).abs() < 3e-3 * printed.abs().max(0.05), "{name}: {x}, not {printed}");
    }
}

#[test]
fn reference_text_and_perplexity() {
    let Some(shared) = shared() else { return };
    let at = |name: &str| shared.join(name).to_str().unwrap().to_string();
    let model = at("models/stories260K-f32.gguf");
    let text =
        ok(&["generate", "-m", &model, "-p", "Once upon a time", "-n", "120", "--temp", "0"], "");
    let reference = std::fs::read_to_string(at("reference/stories260K-greedy.txt")).unwrap();
    let (text, reference) = (text.trim(), reference.trim());
    assert!(text.len() > 250 && reference.starts_with(text), "{text}\n{reference}");

    let eval = |args: &[&str]| -> serde_json::Value {
        let corpus = at("corpus/tinystories-sample.txt");
        let args = [&["eval", "-m", &model, "-f", &corpus, "--json"], args].concat();
        serde_json::from_str(&ok(&args, "")).unwrap()
    };
    let near = |value: &serde_json::Value, expected: f64| {
        assert!((value.as_f64().unwrap() - expected).abs() < 0.002, "{value} is not {expected}");
    };
    let plain = eval(&["-c", "512"]);
    near(&plain["ppl"], 7.0285);
    near(&plain["ppl_err"], 0.1793);
    let base = at("reference/stories260K-c256.kld");
    let against = eval(&["-c", "256", "--base", &base]);
    near(&against["ppl"], 6.2132);
    assert!(against["kl_mean"].as_f64().unwrap() < 5e-5, "{against}");
    assert!(against["same_top"].as_f64().unwrap() > 0.999, "{against}");
}
