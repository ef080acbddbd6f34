//! Plan files against a tiny model: what is no plan, and what fits no such model.

use qkov::gguf::{Bytes, Gguf};
use qkov::model::Model;
use qkov::plan::PlanFile;

use crate::tiny::Tiny;

/// The names of what a tiny model is used with after a plan, or why not.
fn planned(text: &str) -> Result<[String; 3], String> {
    let gguf = Gguf::parse(Bytes::from(Tiny::llama().bytes())).unwrap();
    let model = Model::from_gguf(gguf).unwrap();
    let file = PlanFile::parse(text).map_err(|e| e.to_string())?;
    let plan = model.planned(&model.plan, &file).map_err(|e| e.to_string())?;
    Ok(plan.names())
}

#[test]
fn plans_are_read() {
    let text = "format = 1\nnorm = [\"1.0=sparsemax\", \"0=temperature:tau=2\"]\n\
                mask = [\"1=window:n=3\"]\n[means]\n\"1.1\" = [0, 1, 2e-3, -4]\n";
    let [norms, _, masks] = planned(text).unwrap();
    assert!(norms.contains("sparsemax") && norms.contains("temperature:tau=2"), "{norms}");
    assert!(masks.contains("window:n=3"), "{masks}");
    let text = planned("format = 1\nnorm = []\n").unwrap();
    assert_eq!(text[0], "softmax");
}

#[test]
fn what_is_no_plan_is_refused() {
    let of = |rest: &str| format!("format = 1\nnorm = []\n{rest}");
    for (text, part) in [
        ("", "not a plan: line 1: missing field `format`"),
        ("format = 2\nnorm = []", "plan of format 2; this program reads 1"),
        ("format = -1\nnorm = []", "not a plan: line 1"),
        ("format = 1\nnorm = 3", "not a plan: line 2"),
        (&of("more = 1"), "unknown field `more`"),
        (&of("model = \"abc\""), "the plan was fitted to a model with hash abc; this one has"),
        (
            &of("form = [\"1=slim\"]"),
            "the plan is for layer 1 in the form slim; the model has it as",
        ),
        (&of("mask = [\"9=window\"]"), "layer \"9\"; allowed *, numbers 0 to 1"),
        (&of("[means]\n\"0.8\" = [1]"), "a mean for head \"0.8\", which the model does not have"),
        (&of("[means]\n\"8.0\" = [1]"), "a mean for head \"8.0\""),
        (&of("[means]\n\"a\" = [1]"), "a mean for head \"a\""),
        (&of("[means]\n\"0.1\" = [1]"), "mean for head 0.1 has 1 numbers; allowed 4 finite ones"),
        (&of("[means]\n\"0.1\" = [1, 2, 3, nan]"), "allowed 4 finite ones"),
        (&format!("format = 1\nnorm = {}", "[".repeat(5000)), "not a plan: line"),
        ("\u{0}", "not a plan: line 1"),
    ] {
        let error = planned(text).unwrap_err();
        assert!(error.contains(part) && !error.contains('\n'), "{text}: {error}");
    }
}
