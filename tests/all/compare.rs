//! `qkov compare`: the same numbers in one run, in shards and after an interruption; pages that need
//! nothing from outside.

use std::collections::HashSet;
use std::path::Path;

use qkov::measure::compare::{Role, Settings, Variant, pareto_ranks};
use qkov::measure::report::{Document, Pattern, Patterns};
use qkov::quant::FORMATS;
use serde_json::{Map, Value, json};

use crate::cli::{error, ok};
use crate::family;

const NORMS: [&str; 4] = ["softmax1", "top_k:k=4", "*=softmax;3=sigmoid", "softmax"];

/// A folder with a text in it.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        let text = "It was the best of times, it was the worst of times, said the old man of the sea. \
                    The fox went down to the river, and the river was cold and wide that winter. ";
        std::fs::write(dir.path().join("text"), text.repeat(16)).unwrap();
        Place(dir)
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().into()
    }

    /// Arguments of a quick run, of which `more` replaces some.
    fn args(&self, more: &[&str]) -> Vec<String> {
        let text = self.at("text");
        let model = family::path("softmax");
        let quick = [
            ["-m", model.to_str().unwrap()],
            ["--file", &text],
            ["-c", "128"],
            ["--windows", "2"],
            ["-n", "4"],
            ["--trials", "2"],
            ["--trial-ctx", "96"],
            ["--rounds", "2"],
        ];
        let kept =
            quick.iter().filter(|pair| !more.contains(&pair[0]) && !more.contains(&"--gather"));
        let args = ["compare"].iter().chain(kept.flatten()).chain(more);
        args.map(|arg| arg.to_string()).collect()
    }

    fn compare(&self, more: &[&str]) -> String {
        let args = self.args(more);
        ok(&args.iter().map(String::as_str).collect::<Vec<_>>(), "")
    }

    fn error(&self, more: &[&str], code: i32) -> String {
        let args = self.args(more);
        error(&args.iter().map(String::as_str).collect::<Vec<_>>(), code)
    }
}

fn norms() -> Vec<&'static str> {
    NORMS.iter().flat_map(|norm| ["--norm", norm]).collect()
}

fn rows(json: &str) -> Vec<Value> {
    serde_json::from_str::<Value>(json).unwrap().as_array().unwrap().clone()
}

fn names(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["name"].as_str().unwrap()).collect()
}

/// Rows by name, without what hangs on the machine's speed.
fn timeless(json: &str) -> Vec<Value> {
    let timed = |name: &str| {
        ["_ts", "_ms", "_ratio_min", "_ratio_max", "decode_ratio", "prefill_ratio", "pareto_rank"]
            .iter()
            .any(|end| name.ends_with(end))
    };
    let mut rows = rows(json);
    for row in &mut rows {
        row.as_object_mut().unwrap().retain(|name, _| !timed(name));
    }
    rows.sort_by_key(|row| row["name"].to_string());
    rows
}

#[test]
fn one_row_for_each_variant_in_one_run_or_in_shards() {
    let place = Place::new();
    let whole = place.compare(&[&norms()[..], &["--json"]].concat());
    let rows = rows(&whole);
    // Rows of 192 are no whole blocks of 256.
    let smaller =
        FORMATS.iter().filter(|f| f.can_quantize() && f.ty.block_len == 32 && f.ty.name != "Q8_0");
    let yardsticks = smaller.map(|f| format!("as {}", f.ty.name));
    let norms_once = NORMS.iter().map(|norm| norm.to_string());
    let wanted: HashSet<String> = yardsticks.chain(norms_once).collect();
    assert_eq!(wanted, names(&rows).iter().map(|name| name.to_string()).collect());
    assert_eq!(rows.len(), wanted.len());
    for row in &rows {
        for name in ["ppl", "ppl_err", "kl_mean", "kl_err", "same_top", "model_size"] {
            assert!(row[name].is_number(), "{name} in {row}");
        }
        assert!(row["n_ctx"] == 128 && row["model_type"] == "llama Q8_0" && row["form"] == "split");
        let timed = row["role"] != "yardstick";
        for name in ["decode_avg_ts", "decode_ratio", "prefill_ratio_max", "p50_ms", "ttft_ms"] {
            assert_eq!(row[name].is_number(), timed, "{name} in {row}");
        }
        for name in ["retrieval_p_gain", "cache_bytes_per_token", "pareto_rank"] {
            assert_eq!(row[name].is_number(), timed, "{name} in {row}");
        }
        assert_eq!(row["heads"].as_array().unwrap().len(), if timed { 24 } else { 0 });
    }
    let of = |name: &str| rows.iter().find(|row| row["name"] == name).unwrap();
    assert_eq!(
        (&of("softmax")["kl_mean"], &of("softmax")["role"]),
        (&json!(0.0), &json!("baseline"))
    );
    let kl = |name: &str| of(name)["kl_mean"].as_f64().unwrap();
    assert!(kl("softmax1") > 0.0 && kl("softmax1") < kl("top_k:k=4"));
    assert!(kl("as Q5_1") > 0.0 && kl("as Q5_1") < kl("as Q4_0"));
    assert!(of("top_k:k=4")["yardstick"].is_string());
    assert!(of("as Q4_0")["model_size"].as_f64() < of("softmax")["model_size"].as_f64());

    let parts = [place.at("1.json"), place.at("2.json")];
    for (i, part) in parts.iter().enumerate() {
        let shard = format!("{}/2", i + 1);
        place.compare(&[&norms()[..], &["--shard", &shard, "--out", part, "--json"]].concat());
    }
    let gathered = ok(&["compare", "--json", "--gather", &parts[0], &parts[1]], "");
    for (shard, whole) in timeless(&gathered).iter().zip(timeless(&whole)) {
        for (name, value) in whole.as_object().unwrap() {
            assert_eq!(&shard[name], value, "{name} of {}", whole["name"]);
        }
    }
    assert_eq!(timeless(&gathered).len(), rows.len());
}

#[test]
fn an_interrupted_run_goes_on() {
    let place = Place::new();
    let out = place.at("out.json");
    let run = |norms: &[&str]| {
        place.compare(&[norms, &["--out", &out, "--json", "--no-yardsticks"]].concat())
    };
    run(&["--norm", "softmax1"]);
    // What is there is taken as it is.
    let mut before = Document::load(Path::new(&out)).unwrap();
    before.variants[1].numbers["ppl"] = json!(12345.0);
    before.save(Path::new(&out)).unwrap();
    let after = rows(&run(&["--norm", "softmax1", "--norm", "sparsemax"]));
    assert_eq!(after.len(), 3);
    let of = |name: &str| after.iter().find(|row| row["name"] == name).unwrap();
    assert_eq!(of("softmax1")["ppl"], 12345.0);
    assert!(of("sparsemax")["kl_mean"].as_f64().unwrap() > 0.0);
    let line = place.error(&["--norm", "relu", "--out", &out, "-c", "96"], 2);
    assert!(line.contains("out.json: holds another comparison: text_hash = "), "{line}");
    let line = place.error(&["--norm", "relu", "--out", &out, "--exact"], 2);
    assert!(line.contains("exact = false, and true"), "{line}");
}

#[test]
fn masks_are_an_axis_of_the_grid() {
    let place = Place::new();
    let masks = ["--mask", "causal", "--mask", "window:n=8", "--mask", "repeat"];
    let norms = ["--norm", "softmax", "--norm", "relu"];
    let args = [&masks[..], &norms, &["--json", "--no-yardsticks", "--trials", "0"]].concat();
    let rows = rows(&place.compare(&args));
    let mut found = names(&rows);
    found.sort_unstable();
    let wanted = [
        "relu",
        "relu / repeat",
        "relu / window:n=8",
        "softmax",
        "softmax / repeat",
        "softmax / window:n=8",
    ];
    assert_eq!(found, wanted);
    for row in &rows {
        let (name, mask) = (row["name"].as_str().unwrap(), row["mask"].as_str().unwrap());
        assert_eq!(name.split_once(" / ").map_or("causal", |(_, mask)| mask), mask);
        assert_eq!(row["kl_mean"] == 0.0, name == "softmax", "{row}");
    }
}

#[test]
fn fitted_variants_are_rows_of_their_own() {
    let place = Place::new();
    let args = ["--norm", "sigmoid", "--calibrate", "--json", "--rounds", "0", "--trials", "0"];
    let rows = rows(&place.compare(&args[..]));
    let kl = |name: &str| {
        let row = rows.iter().find(|row| row["name"] == name).unwrap();
        row["kl_mean"].as_f64().unwrap()
    };
    assert!(kl("sigmoid fitted") < kl("sigmoid"), "{:?}", names(&rows));
    assert!(rows.iter().all(|row| row["decode_ratio"].is_null()));
}

#[test]
fn ranks_of_points_by_hand() {
    // The first two are on the front; the third is beaten by the first only, the fourth by both, and
    // of two equal points none beats the other.
    let points = [(0.0, 1.0), (0.5, 1.5), (0.1, 0.9), (0.7, 0.8), (0.5, 1.5), (f64::NAN, 0.1)];
    assert_eq!(pareto_ranks(&points), [1, 1, 2, 3, 1, 4]);
}

#[test]
fn csv_has_a_line_for_each_row() {
    let place = Place::new();
    let norm = "*=softmax;0.1-2=entmax:alpha=1.1,scale=1.2";
    let text = place.compare(&["--norm", norm, "--csv", "--no-yardsticks"]);
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let at = reader.headers().unwrap().iter().position(|name| name == "name").unwrap();
    let names: Vec<String> = reader.records().map(|row| row.unwrap()[at].to_string()).collect();
    assert!(names.len() == 2 && names.contains(&norm.to_string()), "{names:?}");
}

#[test]
fn bad_input_is_one_line() {
    let place = Place::new();
    let file = |name: &str, text: &str| {
        std::fs::write(place.at(name), text).unwrap();
        place.at(name)
    };
    let short = file("short", "Too short.");
    let torn = file("torn.json", "{\"settings\": {\"model_filename\": \"x\"");
    let missing = place.at("no/such/folder/page.html");
    for (args, code, expected) in [
        (&["--norm", "sofmax"][..], 2, "normalizer \"sofmax\" is not known"),
        (&[], 2, "nothing to compare"),
        (&["--norm", "relu", "--shard", "3/2"], 2, "shard 3/2; allowed I/N with I from 1 to N"),
        (&["--norm", "relu", "--file", &short], 2, "two windows of 128 are needed"),
        (&["--norm", "relu", "-n", "128"], 2, "--n-gen 128; allowed 1 to 127"),
        (&["--norm", "relu", "--out", &torn], 3, "torn.json: not a file of `compare`: EOF"),
        (&["--gather", &torn], 3, "torn.json: not a file of `compare`: EOF"),
        (&["--norm", "relu", "--out", &missing], 1, "page.html: cannot write"),
        (&["--norm", "relu", "--html", &missing], 1, "page.html: cannot write"),
        (
            &["--norm", "relu", "--calibrate", "--windows", "4"],
            2,
            "after what is scored, the text has",
        ),
    ] {
        let line = place.error(args, code);
        assert!(line.contains(expected), "{args:?}: {line}");
        assert!(line.starts_with("error: "), "{line}");
        assert_eq!(line.trim_end().lines().count(), 1, "{line}");
    }
}

fn document(name: &str, kl: f64, ratio: f64) -> Document {
    let settings: Settings = serde_json::from_value(json!({
        "model_filename": format!("{name}.gguf"), "model_type": "llama Q8_0", "model_hash": "1", "n_params": 1,
        "build_commit": "1", "n_threads": 2, "n_threads_batch": 2, "type_k": "f16", "type_v": "f16",
        "simd": "avx2", "exact": false, "text": name, "text_hash": "1", "n_ctx": 64, "n_windows": 2, "n_trials": 0, "n_trial_ctx": 96,
        "n_prompt": 60, "n_gen": 4, "n_rounds": 5,
    }))
    .unwrap();
    let variant = |name: &str, role: Role, kl: f64, ratio: f64| Variant {
        name: name.into(),
        role,
        norm: name.into(),
        form: "split".into(),
        mask: "causal".into(),
        heads: Vec::new(),
        mass_histogram: vec![1; 32],
        entropy_histogram: vec![2; 32],
        numbers: Map::from_iter([
            ("ppl".to_string(), json!(9.0)),
            ("kl_mean".to_string(), json!(kl)),
            ("decode_ratio".to_string(), json!(ratio)),
            ("decode_ratio_min".to_string(), json!(ratio - 0.02)),
            ("decode_ratio_max".to_string(), json!(ratio + 0.02)),
        ]),
    };
    let variants = vec![
        variant("softmax", Role::Baseline, 0.0, 1.0),
        variant(name, Role::Variant, kl, ratio),
        variant("as Q5_0", Role::Yardstick, 0.01, 1.0),
        variant("as Q4_0", Role::Yardstick, 0.04, 1.0),
    ];
    Document { settings, variants }
}

#[test]
fn files_of_different_models_are_not_gathered() {
    let place = Place::new();
    let (a, mut b) = (document("a", 0.1, 1.2), document("b", 0.1, 1.2));
    b.settings.model_hash = "2".into();
    let paths = [place.at("a.json"), place.at("b.json")];
    a.save(Path::new(&paths[0])).unwrap();
    b.save(Path::new(&paths[1])).unwrap();
    let line = error(&["compare", "--gather", &paths[0], &paths[1]], 3);
    assert!(
        line.contains("b.json: of another comparison: model_hash = \"1\", and \"2\""),
        "{line}"
    );
    assert_eq!(line.trim_end().lines().count(), 1, "{line}");
}

#[test]
fn divergence_in_yardsticks_and_noise() {
    let near = document("x", 0.03, 1.01);
    let (ratio, name) = near.in_yardsticks(&near.variants[1]).unwrap();
    assert!((ratio - 0.75).abs() < 1e-9 && name == "Q4_0");
    assert_eq!(near.in_yardsticks(&near.variants[0]), None);
    assert!(near.variants[1].is_noise("decode") && near.variants[1].gain() == 1.0);
    assert_eq!(
        near.ranked()[1].0,
        Some(2),
        "as fast as softmax, as far as was measured, and worse"
    );
    let fast = document("x", 0.03, 1.2);
    assert!(!fast.variants[1].is_noise("decode"));
    assert_eq!(fast.ranked()[1].0, Some(1));
    assert!(fast.table().contains("0.75x Q4_0"), "{}", fast.table());
}

#[test]
fn pages_stand_alone_and_escape() {
    let evil = "</script><script>alert(1)</script>&<b>\"'{{style}}\u{2028}";
    let document = document(evil, 0.03, 1.2);
    let plan = Pattern {
        name: evil.into(),
        square: false,
        scales: vec![vec![1.0]],
        weights: "fwA/fwAA".into(),
    };
    let patterns = Patterns { tokens: vec![evil.into(), "<script>".into()], plans: vec![plan] };
    let page = document.html(Some(&patterns)).unwrap();
    // Two scripts and one piece of data, as in the template.
    assert_eq!(page.matches("<script").count(), 2);
    assert_eq!(page.matches("</script").count(), 2);
    assert!(!page.contains("alert(1)</script>") && !page.contains("<b>"));
    let marked = page.replace("http://www.w3.org/2000/svg", "");
    for outside in ["http:", "https:", "src=", "href=", "@import", "url("] {
        assert!(!marked.contains(outside), "{outside}");
    }
    let start = page.find("id=\"data\">").unwrap() + "id=\"data\">".len();
    let end = start + page[start..].find("</script>").unwrap();
    let data: Value = serde_json::from_str(&page[start..end]).unwrap();
    assert_eq!(data["patterns"]["tokens"][0], evil);
    assert_eq!(data["variants"][1]["name"], evil);
}
