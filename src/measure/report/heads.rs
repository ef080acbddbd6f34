//! What is inside the heads as one HTML file that needs no network.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::html::{definitions, embedded, escaped, fill, items};
use super::write;
use crate::error::Result;
use crate::measure::circuits::{Circuit, Described, Product};
use crate::model::Model;

static PAGE: &str = include_str!("heads.html");
static SCRIPT: &str = include_str!("heads.js");

/// Copying, or taking away, that is worth a sentence.
const MUCH: f64 = 0.5;

/// Writes a page about heads of a model: its name, the program's revision, and what is known of the heads.
pub fn write_heads(
    path: &Path,
    (name, revision): (&str, &str),
    model: &Model,
    found: &[Described],
) -> Result<()> {
    let hp = &model.hparams;
    let facts = [
        ("Model", format!("{name} ({})", model.kind())),
        ("Parameters", format!("{:.1} M", model.n_params() as f64 / 1e6)),
        ("Heads", format!("{} of {} layers", found.len(), hp.layers.len())),
        ("Width", format!("{} of the model, {} of queries and keys", hp.n_embd, hp.key_dim)),
        ("Revision", revision.into()),
    ];
    let circuits: Vec<&Circuit> = found.iter().map(|head| &head.circuit).collect();
    let heads = found.iter().map(|head| rounded(head.json(&model.tokenizer)));
    let data = json!({"heads": heads.collect::<Vec<_>>()});
    let page = fill(PAGE, |part| {
        Ok(match part {
            "script" => SCRIPT.into(),
            "title" => escaped(name),
            "facts" => definitions(&facts),
            "findings" => items(&findings(&circuits)),
            "data" => embedded(&data)?,
            _ => String::new(),
        })
    })?;
    write(path, &page)
}

/// Numbers with the digits that a page shows.
fn rounded(value: Value) -> Value {
    match value {
        Value::Number(n) if n.is_f64() => {
            let short = n.as_f64().and_then(|x| format!("{x:.3e}").parse::<f64>().ok());
            json!(short)
        }
        Value::Array(all) => all.into_iter().map(rounded).collect(),
        Value::Object(all) => {
            Value::Object(all.into_iter().map(|(k, v)| (k, rounded(v))).collect::<Map<_, _>>())
        }
        other => other,
    }
}

/// Smallest, middle and largest.
fn spread(numbers: impl Iterator<Item = f64>) -> [f64; 3] {
    let mut all: Vec<f64> = numbers.collect();
    all.sort_by(f64::total_cmp);
    let at = |i: usize| all.get(i).copied().unwrap_or(0.0);
    [at(0), at(all.len() / 2), at(all.len().saturating_sub(1))]
}

/// What can be said in sentences.
fn findings(circuits: &[&Circuit]) -> Vec<String> {
    let ranks = |name: &str, of: fn(&Circuit) -> &Product| {
        let width = spread(circuits.iter().map(|c| of(c).values.len() as f64))[2];
        let [low, middle, high] = spread(circuits.iter().map(|c| of(c).effective_rank()));
        let [least, _, most] = spread(circuits.iter().map(|c| 100.0 * of(c).energies()[1]));
        format!(
            "{name} has an effective rank of {low:.1} to {high:.1}, in the middle {middle:.1}, of \
             {width:.0}; a quarter of the width keeps {least:.0} to {most:.0} % of its squares."
        )
    };
    let mut out = vec![ranks("QK", |c| &c.qk), ranks("OV", |c| &c.ov)];
    let count = |test: &dyn Fn(f64) -> bool| circuits.iter().filter(|c| test(c.copying)).count();
    out.push(format!(
        "{} of {} heads copy what they read (a score above {MUCH}), {} take it away (below -{MUCH}).",
        count(&|x| x > MUCH),
        circuits.len(),
        count(&|x| x < -MUCH)
    ));
    let slow = |c: &Circuit| -> f64 {
        c.planes[c.planes.len() * 3 / 4..].iter().map(|plane| 100.0 * plane.energy).sum()
    };
    if circuits.iter().any(|c| !c.planes.is_empty()) {
        let rotating = circuits.iter().filter(|c| !c.planes.is_empty());
        let [low, middle, high] = spread(rotating.map(|c| slow(c)));
        out.push(format!(
            "The slowest quarter of the rotary planes carries {low:.0} to {high:.0} % of the energy of \
             scores, in the middle {middle:.0} %."
        ));
    }
    out
}
