//! `qkov inspect`: what is in a file.

use std::collections::BTreeSet;

use clap::Args;
use serde_json::{Map, Value as Json, json};

use super::circuits::{Heads, write_dense};
use super::options::ModelArgs;
use super::terminal::{note, print, print_json};
use super::{Run, devices};
use crate::arch::Hparams;
use crate::attention::Attention;
use crate::error::{Result, escaped};
use crate::gguf::{self, Gguf, HALVES, Value};
use crate::model::{Model, is_adapter};
use crate::plan::Plan;

#[derive(Args)]
pub(super) struct Inspect {
    #[command(flatten)]
    model: ModelArgs,
    /// Prints everything as JSON, long arrays too
    #[arg(long)]
    json: bool,
    /// Lists the tensors
    #[arg(long, conflicts_with = "json")]
    tensors: bool,
    /// Prints the chat template and nothing else
    #[arg(long, conflicts_with_all = ["json", "tensors"])]
    template: bool,
    /// Lists what can compute here, and nothing of a file
    #[arg(long, conflicts_with_all = ["tensors", "template", "model", "lora", "heads"])]
    devices: bool,
    #[command(flatten)]
    heads: Heads,
}

/// Elements of an array that the text shows.
const SHOWN: usize = 6;
/// Characters of a string that the text shows.
const SHOWN_CHARS: usize = 80;

impl Run for Inspect {
    const NAME: &'static str = "inspect";
    const ABOUT: &'static str = "Show metadata, tensors, attention geometry and template of a file";

    fn run(self) -> Result<()> {
        if self.devices {
            return devices::show(self.json);
        }
        let gguf = self.model.gguf()?;
        gguf.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        if self.template {
            let template = gguf.str("tokenizer.chat_template").map_err(|e| self.model.at(e))?;
            return print(template.unwrap_or_default().as_bytes());
        }
        if let (Some(head), Some(out)) = (&self.heads.dense, &self.heads.out) {
            return write_dense(&self.open(gguf)?, head, out);
        }
        if self.heads.heads {
            return self.heads.show(&self.model, self.open(gguf)?, self.json);
        }
        match self.json {
            true => print_json(&self.as_json(&gguf)),
            false => print(self.as_text(&gguf).as_bytes()),
        }
    }
}

impl Inspect {
    fn open(&self, gguf: Gguf) -> Result<Model> {
        Model::from_gguf(gguf).map_err(|e| self.model.at(e))
    }

    fn as_json(&self, gguf: &Gguf) -> Json {
        let metadata: Map<String, Json> =
            gguf.metadata().map(|(key, value)| (key.to_string(), to_json(value))).collect();
        let tensors: Vec<Json> = gguf
            .tensors()
            .iter()
            .map(|t| {
                let (part, range) = t.place();
                json!({"name": t.name, "type": t.ty.name, "shape": t.dims, "bytes": t.n_bytes(),
                       "part": part, "offset": range.start})
            })
            .collect();
        let adapters = adapters(gguf);
        let (layers, problem) = match layers(gguf) {
            _ if adapters.is_some() => (None, None),
            Ok(layers) => (Some(layers), None),
            Err(error) => (None, Some(error.to_string())),
        };
        json!({
            "model_filename": self.model.name(),
            "version": gguf.version,
            "n_params": n_params(gguf),
            "metadata": metadata,
            "layers": layers,
            "adapter": adapters,
            "unsupported": problem,
            "tensors": tensors,
        })
    }

    fn as_text(&self, gguf: &Gguf) -> String {
        let bytes: usize = gguf.tensors().iter().map(|t| t.n_bytes()).sum();
        let mut text = format!(
            "{}: GGUF version {}, {} tensors, {:.2} M parameters, {:.2} MB\n\nmetadata\n",
            escaped(&self.model.name()),
            gguf.version,
            gguf.tensors().len(),
            n_params(gguf) as f64 / 1e6,
            bytes as f64 / 1e6,
        );
        for (key, value) in gguf.metadata() {
            text += &format!("  {} = {}\n", escaped(key), shown(value));
        }
        match (adapters(gguf), layers(gguf)) {
            (Some(adapters), _) => text += &format!("\nadapter\n  {}\n", row(&adapters)),
            (None, Ok(layers)) => {
                text += "\nattention\n";
                layers.iter().for_each(|layer| text += &format!("  {}\n", row(layer)));
            }
            (None, Err(error)) => text += &format!("\nattention\n  {error}\n"),
        }
        match self.tensors {
            true => {
                text += "\ntensors\n";
                for t in gguf.tensors() {
                    let shape = format!("{:?}", t.dims);
                    text += &format!("  {:40} {:8} {shape}\n", escaped(&t.name), t.ty.name);
                }
            }
            false => text += "\n--tensors lists the tensors, --template prints the chat template\n",
        }
        text
    }
}

fn n_params(gguf: &Gguf) -> u64 {
    gguf.tensors().iter().map(|t| t.n_elements()).sum()
}

/// Adapters of a file that has them and no model: how many, and their ranks.
fn adapters(gguf: &Gguf) -> Option<Map<String, Json>> {
    if !is_adapter(gguf).is_ok_and(|is| is) {
        return None;
    }
    let second = |t: &&gguf::Tensor| t.name.ends_with(HALVES[1]);
    let second: Vec<_> = gguf.tensors().iter().filter(second).collect();
    let ranks: BTreeSet<u64> = second.iter().filter_map(|t| t.dims.first().copied()).collect();
    json!({"n_matrices": second.len(), "ranks": ranks}).as_object().cloned()
}

/// Attention of every layer as the model was trained.
fn layers(gguf: &Gguf) -> Result<Vec<Map<String, Json>>> {
    let n_vocab = gguf.array("tokenizer.ggml.tokens")?.map_or(0, |tokens| tokens.len);
    let hparams = Hparams::read(gguf, n_vocab)?;
    let plan = Plan::trained(&hparams)?;
    let layers = plan.layers.into_iter().enumerate().map(|(i, plan)| {
        let (form, mask) = (plan.form.text(), plan.mask.text());
        let g = Attention::new(&hparams, i, plan).geometry;
        let value = json!({
            "layer": i,
            "n_head": g.n_head,
            "n_head_kv": g.n_head_kv(),
            "score_dim": alike(g.kv.iter().map(|kv| kv.score_dim)),
            "value_dim": alike(g.kv.iter().map(|kv| kv.value_dim)),
            "rope_dim": hparams.rope(i).map(|r| r.dim),
            "window": hparams.layers[i].window,
            "cached_per_token": g.cached(),
            "form": form,
            "mask": mask,
        });
        value.as_object().cloned().unwrap_or_default()
    });
    Ok(layers.collect())
}

/// A number that all heads have, or that of each.
fn alike(numbers: impl Iterator<Item = usize>) -> Json {
    let all: Vec<usize> = numbers.collect();
    if all.iter().all(|n| *n == all[0]) { all[0].into() } else { all.into() }
}

fn row(layer: &Map<String, Json>) -> String {
    let fields: Vec<String> = layer
        .iter()
        .map(|(k, v)| format!("{k} {}", v.as_str().map_or(v.to_string(), Into::into)))
        .collect();
    fields.join(", ").replace("null", "none")
}

fn shown(value: Value) -> String {
    match value {
        Value::String(bytes) => {
            let text = String::from_utf8_lossy(bytes);
            let short: String = text.chars().take(SHOWN_CHARS).collect();
            let more = if short.len() < text.len() { "..." } else { "" };
            format!("\"{}\"{more}", escaped(&short))
        }
        Value::Array(array) => {
            let mut items: Vec<String> = array.iter().take(SHOWN).map(shown).collect();
            if array.len > SHOWN {
                items.push("...".into());
            }
            format!("{}[{}] [{}]", array.element.name(), array.len, items.join(", "))
        }
        other => to_json(other).to_string(),
    }
}

fn to_json(value: Value) -> Json {
    let array = |array: gguf::Array| Json::Array(array.iter().map(to_json).collect());
    match value {
        Value::U8(v) => v.into(),
        Value::I8(v) => v.into(),
        Value::U16(v) => v.into(),
        Value::I16(v) => v.into(),
        Value::U32(v) => v.into(),
        Value::I32(v) => v.into(),
        Value::U64(v) => v.into(),
        Value::I64(v) => v.into(),
        // Through the shortest decimal, so that 1e-5 does not become 9.999999747378752e-6.
        Value::F32(v) => v.to_string().parse::<f64>().map_or(Json::Null, Json::from),
        Value::F64(v) => v.into(),
        Value::Bool(v) => v.into(),
        Value::String(bytes) => String::from_utf8_lossy(bytes).into(),
        Value::Array(values) => array(values),
    }
}
