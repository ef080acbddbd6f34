//! What the program says of the machine, and of a model on it.

use qkov::cpu::{Engine, Needs};
use qkov::engine::Threads;
use qkov::model::Model;
use serde_json::Value;

use crate::cli::{code_and_text, error, ok};
use crate::families::files;

fn doctor(args: &[&str]) -> Value {
    let text = ok(&[&["doctor", "--json"], args].concat(), "");
    serde_json::from_str(&text).unwrap()
}

fn check<'a>(report: &'a Value, topic: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["topic"] == topic).unwrap()
}

#[test]
fn the_doctor_knows_the_machine_and_the_model() {
    let report = doctor(&[]);
    let number = |value: &Value| value.as_f64().unwrap();
    let (machine, model) = (&report["machine"], &report["model"]);
    let [one, all] = [&machine["limits"][0], &machine["limits"][1]];
    assert_eq!((&one["n_threads"], &all["n_threads"]), (&1.into(), &machine["n_threads"]));
    for limits in [one, all] {
        assert!(number(&limits["limit_read_gb_s"]) > 0.1, "{limits}");
        assert!(number(&limits["limit_int8_gop_s"]) > 0.1, "{limits}");
    }
    assert!(number(&machine["memory_total"]) >= number(&machine["memory_available"]));
    assert!(number(&machine["memory_available"]) > 1e8, "{machine}");
    assert!(number(&machine["n_usable"]) <= number(&machine["n_logical"]), "{machine}");
    let levels = machine["simd_available"].as_array().unwrap();
    assert!(levels.contains(&machine["simd"]), "{machine}");
    assert_eq!(report["devices"][0]["engine"], "cpu");
    // Keys and values of two heads in each of six layers, 64 halves each.
    assert_eq!(model["cache_bytes_per_token"], 6.0 * 2.0 * 2.0 * 64.0 * 2.0);
    assert_eq!(model["n_ctx"], 1024);
    assert!(number(&model["n_ctx_memory"]) > 10_000.0, "{model}");
    assert_eq!(model["decoded"].as_array().unwrap().len(), 0);
    // Every weight but the embeddings is read, 5.6 bits for each and more.
    let weights = number(&model["weight_bytes_per_token"]);
    assert!(weights > 8e6 && weights < 16e6, "{model}");
    let [empty, full] = ["max_tokens_s", "max_tokens_s_full"].map(|key| number(&model[key]));
    let rate = number(&all["limit_read_gb_s"]) * 1e9 / weights;
    assert!((empty / rate - 1.0).abs() < 1e-9 && full < empty, "{model}");
    let products = number(&all["limit_int8_gop_s"]) * 1e9 / 2.0 / number(&model["n_products"]);
    assert!((number(&model["max_prompt_tokens_s"]) / products - 1.0).abs() < 1e-9, "{model}");
    for topic in ["processor", "memory", "engine", "model", "formats", "fits", "context"] {
        assert_eq!(check(&report, topic)["status"], "ok", "{report}");
    }
}

#[test]
fn the_doctor_says_what_would_help() {
    let many = doctor(&["-t", "1000"]);
    assert_eq!(check(&many, "threads")["status"], "warning");
    assert!(check(&many, "threads")["remedy"].as_str().unwrap().starts_with("-t "), "{many}");
    let odd = doctor(&["-t", "1", "--no-pin", "--exact", "-c", "2048"]);
    for (topic, remedy) in [
        ("threads", "leave out --no-pin"),
        ("formats", "leave out --exact"),
        ("context", "-c 1024"),
    ] {
        let check = check(&odd, topic);
        assert_eq!(check["status"], "warning", "{check}");
        assert!(check["remedy"].as_str().unwrap().starts_with(remedy), "{check}");
    }
    let huge = doctor(&["-t", "1", "-c", "1000000000"]);
    let remedy = check(&huge, "fits")["remedy"].as_str().unwrap();
    let most: u64 = remedy[3..].split(',').next().unwrap().parse().unwrap();
    assert_eq!(huge["model"]["n_ctx_memory"], most);
    let (code, text) = code_and_text(&["doctor", "-t", "1", "--simd", "scalar"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("warning  instructions   scalar, of scalar"), "{text}");
    assert!(text.contains(" warning"), "{text}");
    error(&["doctor", "-c", "0"], 2);
    let line = error(&["doctor", "-m", "./none.gguf"], 3);
    assert!(line.contains("No such file"), "{line}");
    // Rounded to fewer bits, a cache takes less.
    let rounded = doctor(&["-t", "1", "--ctk", "q8_0", "--ctv", "q8_0"]);
    let cached = |report: &Value| report["model"]["cache_bytes_per_token"].as_f64().unwrap();
    assert!(cached(&rounded) < 0.7 * cached(&odd), "{rounded}");
}

/// What is told of an engine is what it takes.
#[test]
fn needs_are_those_of_the_engine() {
    for (name, gguf) in files() {
        let model = Model::from_gguf(gguf).unwrap();
        for exact in [false, true] {
            let needs = Needs::of(&model, exact).unwrap();
            let n = Threads { one: 1, batch: 1 };
            let engine = Engine::new(&model, n, false, exact).unwrap();
            let both = (engine.weight_bytes(), engine.n_products());
            assert_eq!((needs.weight_bytes, needs.n_products), both, "{name}");
            assert!(needs.copied_bytes + needs.mapped_bytes >= needs.weight_bytes, "{name}");
            assert!(!exact || needs.n_integer == 0, "{name}");
        }
    }
}
