//! `qkov models`: what `-m` finds by name.

use clap::Args;
use serde_json::{Value, json};

use super::Run;
use super::stores::{Entry, Stock};
use super::terminal::{note, print, print_json};
use crate::error::{Result, escaped, excerpt};
use crate::gguf::Gguf;
use crate::model::{is_adapter, kind};

#[derive(Args)]
pub(super) struct Models {
    /// Prints the list as JSON
    #[arg(long)]
    json: bool,
}

impl Run for Models {
    const NAME: &'static str = "models";
    const ABOUT: &'static str = "List the models on this machine that -m finds by name";

    fn run(self) -> Result<()> {
        let stock = Stock::take();
        let rows: Vec<Value> = stock.entries.iter().map(row).collect();
        if self.json {
            return print_json(&rows);
        }
        let text = |row: &Value, key: &str| escaped(row[key].as_str().unwrap_or_default());
        let size = |row: &Value| format!("{:.1} MB", row["n_bytes"].as_f64().unwrap_or(0.0) / 1e6);
        let title = ["name", "size", "kind", "store"].map(String::from);
        let cells = rows.iter().map(|row| {
            let kind = if row["kind"].is_null() { "unreadable".into() } else { text(row, "kind") };
            [text(row, "name"), size(row), kind, text(row, "store")]
        });
        let cells: Vec<[String; 4]> = [title].into_iter().chain(cells).collect();
        let width = |i: usize| cells.iter().map(|c| c[i].chars().count()).max().unwrap_or(0);
        let widths: [usize; 3] = std::array::from_fn(width);
        let line = |[name, size, kind, store]: &[String; 4]| {
            let [a, b, c] = widths;
            format!("{name:a$}  {size:>b$}  {kind:c$}  {store}\n")
        };
        if !rows.is_empty() {
            print(cells.iter().map(line).collect::<String>().as_bytes())?;
        }
        let folders = if stock.folders.is_empty() { &stock.missing } else { &stock.folders };
        let folders: Vec<String> = folders.iter().map(|f| escaped(&f.to_string_lossy())).collect();
        note(&match (rows.len(), stock.folders.is_empty()) {
            (0, true) => format!("no models: there is none of {}", folders.join(", ")),
            (n, _) => format!("{n} models in {}", folders.join(", ")),
        });
        Ok(())
    }
}

/// What is known of a model.
fn row(entry: &Entry) -> Value {
    let (kind, problem) = match read(entry) {
        Ok(kind) => (Some(kind), None),
        Err(error) => (None, Some(error.to_string())),
    };
    json!({
        "name": entry.name,
        "n_bytes": entry.n_bytes,
        "kind": kind,
        "store": entry.store,
        "repo": entry.repo,
        "path": entry.path.to_string_lossy(),
        "problem": problem,
    })
}

/// Architecture and format.
fn read(entry: &Entry) -> Result<String> {
    let gguf = Gguf::open(&entry.path)?;
    if is_adapter(&gguf)? {
        return Ok("adapter".into());
    }
    let arch = excerpt(gguf.str("general.architecture")?.unwrap_or("unknown"));
    match gguf.tensors() {
        [] => Ok(format!("{arch}, no weights")),
        _ => Ok(kind(&gguf, &arch)),
    }
}
