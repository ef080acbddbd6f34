//! What forms cost, and the choice between them.

use std::sync::Arc;

use qkov::error::Error;
use qkov::measure::choose::{Auto, refuse, wherever};
use qkov::measure::forms::rewritten;
use qkov::measure::timing::{Timing, shapes, total};
use qkov::merge::Choice;
use qkov::model::Model;
use qkov::session::{Options, Session};

use crate::cli::code_and_text as qkov;

fn golden(name: &str) -> Model {
    let path = format!("{}/tests/golden/{name}.gguf", env!("CARGO_MANIFEST_DIR"));
    Model::open(path.as_ref()).unwrap()
}

fn session(model: Model) -> Session {
    Session::new(Arc::new(model), &Options { n_ctx: Some(64), ..Options::default() }).unwrap()
}

#[test]
fn costs_are_numbers_of_elements() {
    for name in ["llama", "qwen2", "gpt2"] {
        for form in ["split", "lowrank:ratio=0.5,data=no", "lowrank:energy=0.9,data=no", "absorb"] {
            let model = golden(name);
            let Ok(plan) = wherever(&model, &model.plan, &Choice::parse(form).unwrap()) else {
                assert!(form == "absorb" && name != "gpt2");
                continue;
            };
            let model = Model::from_gguf(rewritten(&model, &plan, &[], None).unwrap()).unwrap();
            let cost = total(&model, shapes(&model));
            // Rows of W_O may have zeros after the last head's.
            let elements = model.layers.iter().zip(shapes(&model)).map(|(l, g)| {
                let read =
                    [&l.attn_q, &l.attn_k, &l.attn_v].map(|l| l.weight.n_in * l.weight.n_out);
                read.iter().sum::<usize>() + g.output_width() * l.attn_output.weight.n_out
            });
            assert_eq!(cost.weights, elements.sum::<usize>(), "{name} {form}");
        }
    }
}

#[test]
fn forms_of_the_same_matrices_are_timed() {
    let mut session = session(golden("gpt2"));
    let before = session.model().plan.names();
    let auto = Auto::parse("auto:depth=16,prompt=8,gen=4").unwrap().unwrap();
    assert_eq!(auto.n_ctx(session.model()), 28);
    let (parts, mut found) = auto.time(&mut session).unwrap();
    assert_eq!(session.model().plan.names(), before);
    let forms: Vec<&str> = found.iter().map(|c| &c.form[..]).collect();
    assert_eq!(forms, ["split", "slim", "absorb", "mla"]);
    assert!(found[3].timing.as_ref().is_err_and(|reason| reason.contains("latent")));
    // Of what can be had without a text, nothing is lost.
    assert!(found.iter().all(|c| c.loss.is_none()));
    let split = found[0].timing.clone().unwrap();
    assert!(split.alone(16) > 0.0 && split.together(8, 16) > 0.0);
    assert!(found[2].timing.is_ok());
    assert!(found[2].cache_bytes < found[0].cache_bytes);
    let cost = total(session.model(), shapes(session.model()));
    // Another one is chosen if it is surely faster.
    let weights = cost.weights * 99 / 100;
    found[1].timing = Ok(split.scaled(&parts, qkov::merge::Cost { weights, ..cost }));
    found[2].timing = Ok(split);
    assert_eq!(auto.best(&found).unwrap().form, "split");
    let half = qkov::merge::Cost {
        weights: cost.weights / 2,
        products: cost.products / 2,
        attended: cost.attended / 2,
        ..cost
    };
    found[2].timing = Ok(split.scaled(&parts, half));
    assert_eq!(auto.best(&found).unwrap().form, "absorb");
    assert!(auto.table(&found).ends_with("chosen: absorb"));
}

#[test]
fn layers_get_the_form_that_saves_most_there() {
    let mut session = session(golden("smollm3"));
    let auto = Auto::parse("auto:depth=16,prompt=8,gen=4").unwrap().unwrap();
    let (parts, mut found) = auto.time(&mut session).unwrap();
    let cost = total(session.model(), shapes(session.model()));
    let split = found[0].timing.clone().unwrap();
    let faster = |percent: usize| {
        let part = |n: usize| n * percent / 100;
        let cost = qkov::merge::Cost {
            weights: part(cost.weights),
            products: part(cost.products),
            attended: part(cost.attended),
            attended_together: part(cost.attended_together),
        };
        Ok(split.scaled(&parts, cost))
    };
    let absorb = found.iter().position(|c| c.form.contains("absorb")).unwrap();
    let layers = found[absorb].plan.other_forms(&found[0].plan);
    let n_layer = session.model().layers.len();
    assert!(!layers.is_empty() && layers.len() < n_layer);
    // As a form of every layer.
    let mut all = found[absorb].clone();
    all.plan.set_forms("lowrank:ratio=0.5").unwrap();
    all.loss = Some("cut".into());
    all.timing = faster(80);
    found.push(all);
    found[absorb].timing = faster(99);
    assert!(auto.mixed(&found).is_none(), "less, as it is for few layers");
    found[absorb].timing = faster(50);
    let mixed = auto.mixed(&found).unwrap();
    for (i, layer) in mixed.plan.layers.iter().enumerate() {
        assert_eq!(layer.form.text() == "absorb", layers.contains(&i), "{i}");
    }
    assert_eq!(mixed.loss.as_deref(), Some("cut"));
    let times = found.iter().map(|c| c.timing.as_ref().map_or(f64::MAX, |t| t.alone(16)));
    assert!(mixed.timing.unwrap().alone(16) < times.fold(f64::MAX, f64::min));
}

#[test]
fn more_tokens_take_more() {
    let timing = Timing::measure(&mut session(golden("llama")), 8, 40).unwrap();
    assert!(timing.alone(40) >= timing.alone(0) && timing.together(8, 40) >= timing.together(8, 0));
}

#[test]
fn what_auto_may_not_be_is_refused() {
    assert_eq!(Auto::parse("split").unwrap(), None);
    for text in ["auto:kl=-1", "auto:depth=0.5", "auto:gen", "auto:budget=1"] {
        assert!(
            matches!(Auto::parse(text), Err(Error::Usage(e)) if e.contains("form auto")),
            "{text}"
        );
    }
    assert!(refuse(&["split".into()]).is_ok());
    assert!(refuse(&["auto".into()]).is_err());
}

#[test]
fn auto_on_the_command_line() {
    let prompt = ["generate", "-p", "The old house", "-n", "8", "--temp", "0"];
    let (code, plain) = qkov(&prompt);
    assert_eq!(code, 0);
    let (code, chosen) = qkov(&[&prompt[..], &["--form", "auto:depth=64,prompt=16"]].concat());
    assert_eq!(code, 0);
    assert!(chosen.starts_with(&plain) && chosen.contains("chosen: split"), "{chosen}");
    for args in [
        &["merge", "--form", "auto", "-o", "none.gguf"][..],
        &["compare", "--form", "auto"],
        &["generate", "-p", "x", "--form", "auto", "--form", "split"],
    ] {
        let (code, text) = qkov(args);
        assert!(code == 2 && text.contains("only where a model is run"), "{text}");
    }
}

#[test]
fn forms_are_timed_beside_their_predictions() {
    let (code, text) = qkov(&["bench", "--forms", "-p", "8", "-d", "0,16", "--json"]);
    assert_eq!(code, 0, "{text}");
    let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    assert_eq!(rows.len(), 4);
    for row in rows {
        for phase in ["prefill", "decode"] {
            for key in ["ts", "ratio", "predicted_ratio"] {
                assert!(row[phase][key].as_f64().unwrap() > 0.0);
            }
        }
    }
    let (code, text) = qkov(&["bench", "--forms", "-p", "8", "--form", "slim"]);
    assert!(code == 0 && text.contains("slim: keys have 2 heads"), "{text}");
}
