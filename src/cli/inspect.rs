//! `qkov inspect`: what is in a file.

use clap::Args;
use serde_json::{Map, Value as Json, json};

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Run;
use super::circuits::{self, MAX_TEXT, Selection, patterns_and_messages, select};
use super::options::ModelArgs;
use super::terminal::{note, print, print_json};
use crate::arch::Hparams;
use crate::attention::Attention;
use crate::bad_usage;
use crate::error::{Result, escaped};
use crate::gguf::{self, Gguf, Value, replace_file};
use crate::measure::circuits::dense_products;
use crate::measure::export::{Array, npz, safetensors};
use crate::model::Model;
use crate::plan::{Plan, range};
use crate::session::{Options, Session};

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
    /// Shows what is inside the heads: what the products W_QK and W_OV of their weights are like
    #[arg(long, conflicts_with_all = ["tensors", "template"])]
    heads: bool,
    /// Of --heads, these layers: *, a number, or two with - between them
    #[arg(long, value_name = "LAYERS", default_value = "*", requires = "heads")]
    layer: String,
    /// Of these layers, these heads; with one layer or head, spectra and directions are shown too
    #[arg(long, value_name = "HEADS", default_value = "*", requires = "heads")]
    head: String,
    /// Tokens that are shown for a direction
    #[arg(long, value_name = "N", default_value_t = 6, requires = "heads")]
    top: usize,
    /// Shows what these heads look for at every token of a text, and what they write
    #[arg(long, value_name = "TEXT", requires = "heads", conflicts_with = "json")]
    text: Option<String>,
    /// Writes W_QK and W_OV of one head, LAYER.HEAD, as they are multiplied out, to --out
    #[arg(long, value_name = "LAYER.HEAD", requires = "out", conflicts_with_all = ["json", "tensors", "template", "heads"])]
    dense: Option<String>,
    /// File for --dense, .npz or .safetensors
    #[arg(short, long, value_name = "FILE", requires = "dense")]
    out: Option<PathBuf>,
}

/// Elements of an array that the text shows.
const SHOWN: usize = 6;
/// Characters of a string that the text shows.
const SHOWN_CHARS: usize = 80;

impl Run for Inspect {
    const NAME: &'static str = "inspect";
    const ABOUT: &'static str = "Show metadata, tensors, attention geometry and template of a file";

    fn run(self) -> Result<()> {
        let gguf = self.model.gguf()?;
        gguf.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        if self.template {
            let template = gguf.str("tokenizer.chat_template").map_err(|e| self.model.at(e))?;
            return print(template.unwrap_or_default().as_bytes());
        }
        if let (Some(head), Some(out)) = (&self.dense, &self.out) {
            return dense(&Model::from_gguf(gguf).map_err(|e| self.model.at(e))?, head, out);
        }
        if self.heads {
            return self.show_heads(Model::from_gguf(gguf).map_err(|e| self.model.at(e))?);
        }
        match self.json {
            true => print_json(&self.as_json(&gguf)),
            false => print(self.as_text(&gguf).as_bytes()),
        }
    }
}

impl Inspect {
    fn show_heads(&self, model: Model) -> Result<()> {
        let layers = range("layer", &self.layer, model.layers.len())?;
        let n_head = model.hparams.layers[layers.clone()].iter().map(|l| l.n_head).min();
        let heads = range("head", &self.head, n_head.unwrap_or(1))?;
        let details = layers.len() == 1 || heads.len() == 1 || self.json;
        let selection = Selection { layers, heads, n_tokens: self.top, details };
        if let Some(text) = &self.text {
            let tokens = model.tokenizer.encode(text, true, false)?;
            if tokens.is_empty() || tokens.len() > MAX_TEXT {
                bad_usage!("--text: {} tokens; allowed 1 to {MAX_TEXT}", tokens.len());
            }
            let options = Options { n_ctx: Some(tokens.len()), ..Options::default() };
            let mut session = Session::new(Arc::new(model), &options)?;
            let text = patterns_and_messages(&mut session, &selection, &tokens)?;
            return print(text.as_bytes());
        }
        let shown = select(&model, &selection)?;
        if self.json {
            return print_json(&circuits::as_json(&model, &shown));
        }
        print(circuits::table(&shown).as_bytes())?;
        match selection.details {
            true => print(circuits::details(&model, &shown).as_bytes()),
            false => print(b"\n--layer and --head show spectra and directions of some\n"),
        }
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
        let (layers, problem) = match layers(gguf) {
            Ok(layers) => (Some(layers), None),
            Err(error) => (None, Some(error.to_string())),
        };
        json!({
            "model_filename": self.model.name(),
            "version": gguf.version,
            "n_params": n_params(gguf),
            "metadata": metadata,
            "layers": layers,
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
        text += "\nattention\n";
        match layers(gguf) {
            Ok(layers) => layers.iter().for_each(|layer| text += &format!("  {}\n", row(layer))),
            Err(error) => text += &format!("  {error}\n"),
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
            "rope_dim": hparams.rope.as_ref().filter(|_| hparams.layers[i].rotates).map(|r| r.dim),
            "window": hparams.layers[i].window,
            "cached_per_token": g.cached(),
            "form": form,
            "mask": mask,
        });
        value.as_object().cloned().unwrap_or_default()
    });
    Ok(layers.collect())
}

/// Writes the products of one head, and says what they would cost as a form.
fn dense(model: &Model, head: &str, out: &Path) -> Result<()> {
    let write = match out.extension().and_then(|e| e.to_str()) {
        Some("npz") => npz,
        Some("safetensors") => safetensors,
        _ => bad_usage!("--out {}: allowed .npz, .safetensors", out.display()),
    };
    let (layer, head) = head.split_once('.').unwrap_or((head, ""));
    let layer = range("layer", layer, model.layers.len())?;
    let head = range("head", head, model.hparams.layers[layer.start].n_head)?;
    if layer.len() > 1 || head.len() > 1 {
        bad_usage!("--dense: one head, such as 0.1");
    }
    let d = model.hparams.n_embd;
    let [qk, ov] = dense_products(model, layer.start, head.start)?;
    let array = |name: &str, data: Vec<f32>| Array {
        name: format!("blocks.{}.attn.{name}.{}", layer.start, head.start),
        shape: vec![d, d],
        data,
    };
    let bytes = write(&[array("W_QK", qk), array("W_OV", ov)])?;
    replace_file(out, |sink| sink(&bytes))?;
    let g = &model.attention[layer.start].geometry;
    let at = &g.kv[head.start / g.per_kv()];
    let thin = 2 * d * (at.score_dim + at.value_dim);
    let text = format!(
        "W_QK and W_OV: {} elements; their factors: {thin}. As a form they would read {:.1} times as \
         much for every token, for the same result.\n",
        2 * d * d,
        (2 * d * d) as f64 / thin as f64
    );
    print(text.as_bytes())?;
    note(&format!("written: {}", out.display()));
    Ok(())
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
