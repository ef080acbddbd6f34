//! `qkov inspect --heads` and `--dense`: what is inside the heads.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use serde_json::Value;

use super::memory;
use super::options::ModelArgs;
use super::terminal::{note, print, print_json, read_text};
use crate::bad_usage;
use crate::error::{Result, escaped};
use crate::gguf::replace_file;
use crate::measure::circuits::{
    self, Circuit, Described, Direction, Match, Plane, Product, Reading, Selection, dense_products,
    describe,
};
use crate::measure::export::{Array, npz, safetensors};
use crate::measure::report::{check_folder, write_heads};
use crate::model::Model;
use crate::plan::range;
use crate::session::{Options, Session};
use crate::token::Tokenizer;

/// Most tokens of a text whose patterns and messages are read.
const MAX_TEXT: usize = 64;
/// Singular values that are shown.
const SHOWN_VALUES: usize = 12;
/// Planes that are shown.
const SHOWN_PLANES: usize = 6;

#[derive(Args)]
pub(super) struct Heads {
    /// Shows what is inside the heads: what the products W_QK and W_OV of their weights are like
    #[arg(long, conflicts_with_all = ["tensors", "template"])]
    pub(super) heads: bool,
    /// Of --heads, these layers: *, a number, or two with - between them
    #[arg(long, value_name = "LAYERS", default_value = "*", requires = "heads")]
    layer: String,
    /// Of these layers, these heads; spectra and directions of one head are shown too
    #[arg(long, value_name = "HEADS", default_value = "*", requires = "heads")]
    head: String,
    /// Tokens that are shown for a direction
    #[arg(long, value_name = "N", default_value = "6", requires = "heads")]
    top: std::num::NonZeroU16,
    /// Directions of a product that are shown as tokens, those of its largest singular values
    #[arg(long, value_name = "N", default_value_t = 2, requires = "heads")]
    directions: u16,
    /// Writes a page with maps of all heads, their spectra and directions
    #[arg(long, value_name = "FILE", requires = "heads", conflicts_with_all = ["text", "file"])]
    html: Option<PathBuf>,
    /// Shows what the heads look for at every token of a text, and what they write for it
    #[arg(long, value_name = "TEXT", requires = "heads", conflicts_with = "file")]
    text: Option<String>,
    /// File with such a text
    #[arg(short, long, value_name = "FILE", requires = "heads")]
    file: Option<PathBuf>,
    /// Writes W_QK and W_OV of one head, LAYER.HEAD, multiplied out, to --out
    #[arg(long, value_name = "LAYER.HEAD", requires = "out", conflicts_with_all = ["json", "tensors", "template", "heads"])]
    pub(super) dense: Option<String>,
    /// File for --dense, .npz or .safetensors
    #[arg(short, long, value_name = "FILE", requires = "dense")]
    pub(super) out: Option<PathBuf>,
}

impl Heads {
    pub(super) fn show(&self, args: &ModelArgs, model: Model, as_json: bool) -> Result<()> {
        self.html.as_deref().map_or(Ok(()), check_folder)?;
        let layers = range("--layer", &self.layer, model.layers.len())?;
        let n_head = model.hparams.layers[layers.clone()].iter().map(|l| l.n_head).max();
        let heads = range("--head", &self.head, n_head.unwrap_or(1))?;
        let mut selection = Selection {
            layers,
            heads,
            n_directions: usize::from(self.directions),
            n_tokens: usize::from(self.top.get()),
        };
        if self.text.is_some() || self.file.is_some() {
            return self.read(model, &selection, as_json);
        }
        let is_one = selection.layers.len() == 1 && selection.heads.len() == 1;
        // Directions as tokens read the whole vocabulary.
        if !is_one && !as_json && self.html.is_none() {
            selection.n_directions = 0;
        }
        let found = describe(&model, &selection)?;
        if let Some(path) = &self.html {
            write_heads(path, (&args.name(), env!("QKOV_REVISION")), &model, &found)?;
            note(&format!("written: {}", path.display()));
        }
        if as_json {
            let all: Vec<Value> = found.iter().map(|head| head.json(&model.tokenizer)).collect();
            return print_json(&all);
        }
        print(table(&found).as_bytes())?;
        match &found[..] {
            [head] => print(details(&model.tokenizer, head).as_bytes()),
            _ => print(LEGEND.as_bytes()),
        }
    }

    /// Patterns and messages of a text.
    fn read(&self, model: Model, selection: &Selection, as_json: bool) -> Result<()> {
        let (name, text) = match &self.text {
            Some(text) => ("--text", text.clone()),
            None => ("--file", read_text(self.file.as_deref())?),
        };
        let tokens = model.tokenizer.encode(&text, true, false)?;
        if tokens.is_empty() || tokens.len() > MAX_TEXT {
            bad_usage!("{name}: {} tokens; allowed 1 to {MAX_TEXT}", tokens.len());
        }
        let options = Options { n_ctx: Some(tokens.len()), ..Options::default() };
        memory::check(&model, &options)?;
        let mut session = Session::new(Arc::new(model), &options)?;
        let readings = circuits::read_text(&mut session, selection, &tokens)?;
        let tokenizer = &session.model().tokenizer;
        if as_json {
            let all: Vec<Value> = readings.iter().map(|r| r.json(&tokens, tokenizer)).collect();
            return print_json(&all);
        }
        readings.iter().try_for_each(|r| print(as_text(tokenizer, r, &tokens).as_bytes()))
    }
}

const LEGEND: &str = "
norm: root of the sum of squares; rank: effective, the exponential of the entropy of the singular
values; 1/4, 1/2: share of the squares that a quarter or half of the width keeps; cond: condition of
W_K and W_V; copies: sum of the eigenvalues of OV over the sum of their sizes. Heads that share keys
and values share W_K and W_V. --layer and --head: spectrum and directions of one head as tokens.
";

/// A row for each head.
fn table(found: &[Described]) -> String {
    let columns = format!("{:>9} {:>5} {:>5} {:>5}", "norm", "rank", "1/4", "1/2");
    let mut text = format!("{:7} {:^27}   {:^27}\n", "", "QK, looks for", "OV, reads and writes");
    text += &format!(
        "{:>7} {columns}   {columns} {:>8} {:>8} {:>7}\n",
        "head", "cond K", "cond V", "copies"
    );
    for Described { circuit: c, .. } in found {
        let at = format!("{}.{}", c.layer, c.head);
        let side = |p: &Product| {
            let [_, quarter, half, _] = p.energies();
            let (norm, rank) = (short(p.norm()), p.effective_rank());
            format!("{norm:>9} {rank:5.1} {quarter:5.3} {half:5.3}")
        };
        text += &format!(
            "{at:>7} {}   {} {:>8} {:>8} {:7.2}\n",
            side(&c.qk),
            side(&c.ov),
            short(c.key_condition),
            short(c.value_condition),
            c.copying
        );
    }
    text
}

/// A number in at most eight characters.
fn short(x: f64) -> String {
    match x {
        x if x.is_infinite() => "none".into(),
        x if x >= 1e5 => format!("{x:.1e}"),
        x if x >= 100.0 => format!("{x:.0}"),
        x => format!("{x:.2}"),
    }
}

/// Spectra, planes and directions of a head.
fn details(tokenizer: &Tokenizer, head: &Described) -> String {
    let c = &head.circuit;
    let mut text = String::new();
    for (name, product) in [("QK", &c.qk), ("OV", &c.ov)] {
        let values = product.values.iter().take(SHOWN_VALUES).map(|s| short(*s));
        let more = if product.values.len() > SHOWN_VALUES { " .." } else { "" };
        let energies = product.energies().map(|e| format!("{e:.3}")).join(" ");
        text += &format!(
            "\n{name} singular values: {}{more}\n{name} energy at 1/8 1/4 1/2 3/4: {energies}\n",
            values.collect::<Vec<_>>().join(" ")
        );
    }
    text += &match c.layer_condition.is_finite() {
        true => format!("\nW_K of the whole layer: condition {}\n", short(c.layer_condition)),
        false => "\nW_K of the whole layer has more rows than columns\n".into(),
    };
    text += &planes(c);
    for (name, sides, product, directions) in [
        ("QK", ["queries such as", "look for keys such as"], &c.qk, &head.qk),
        ("OV", ["where it reads", "it writes"], &c.ov, &head.ov),
    ] {
        for (i, (direction, value)) in directions.iter().zip(&product.values).enumerate() {
            text += &format!("\n{name} direction {i}, singular value {}\n", short(*value));
            text += &poles(tokenizer, direction, sides);
        }
    }
    text
}

fn planes(c: &Circuit) -> String {
    if c.planes.is_empty() {
        return String::new();
    }
    let mut planes: Vec<(usize, &Plane)> = c.planes.iter().enumerate().collect();
    planes.sort_by(|a, b| b.1.energy.total_cmp(&a.1.energy));
    let mut text = format!(
        "\nrotary planes, the {} of {} that carry most\n  plane  wavelength  energy\n",
        planes.len().min(SHOWN_PLANES),
        planes.len()
    );
    for (i, plane) in planes.iter().take(SHOWN_PLANES) {
        let energy = 100.0 * plane.energy;
        text += &format!("  {i:>5}  {:>10}  {energy:4.1} %\n", short(plane.wavelength));
    }
    text
}

fn poles(tokenizer: &Tokenizer, direction: &Direction, [left, right]: [&str; 2]) -> String {
    let mut text = String::new();
    for (sign, pole) in ["+", "-"].iter().zip(direction) {
        for (name, found) in [(left, &pole.left), (right, &pole.right)] {
            text += &format!("  {sign} {name:21}  {}\n", pieces(tokenizer, found));
        }
    }
    text
}

fn piece(tokenizer: &Tokenizer, token: u32) -> String {
    format!("\"{}\"", escaped(&String::from_utf8_lossy(tokenizer.piece(token, true))))
}

fn pieces(tokenizer: &Tokenizer, found: &[Match]) -> String {
    found.iter().map(|m| piece(tokenizer, m.token)).collect::<Vec<_>>().join(" ")
}

/// A row for each token.
fn as_text(tokenizer: &Tokenizer, reading: &Reading, tokens: &[u32]) -> String {
    let rows: Vec<[String; 3]> = (tokens.iter().zip(&reading.patterns).zip(&reading.messages))
        .map(|((token, pattern), message)| {
            [piece(tokenizer, *token), pieces(tokenizer, pattern), pieces(tokenizer, message)]
        })
        .collect();
    let width = |i: usize, name: &str| {
        let all = rows.iter().map(|row| row[i].chars().count());
        all.max().unwrap_or(0).max(name.len())
    };
    let (own, looks) = (width(0, "token"), width(1, "looks for"));
    let mut text = format!("\nlayer {}, head {}\n", reading.layer, reading.head);
    text += &format!("  {:own$}  {:looks$}  writes\n", "token", "looks for");
    for [token, pattern, message] in &rows {
        text += &format!("  {token:own$}  {pattern:looks$}  {message}\n");
    }
    text
}

/// Writes the products of one head, and says what they would cost as a form.
pub(super) fn write_dense(model: &Model, head: &str, out: &Path) -> Result<()> {
    let write = match out.extension().and_then(|e| e.to_str()) {
        Some("npz") => npz,
        Some("safetensors") => safetensors,
        _ => bad_usage!("--out {}: allowed .npz, .safetensors", out.display()),
    };
    let number = |text: &str| text.parse::<usize>().ok();
    let pair = head.split_once('.').map(|(layer, head)| (number(layer), number(head)));
    let Some((Some(layer), Some(head))) = pair else {
        bad_usage!("--dense {head}: allowed LAYER.HEAD, such as 0.1");
    };
    let d = model.hparams.n_embd;
    let [qk, ov] = dense_products(model, layer, head)?;
    let array = |name: &str, data: Vec<f32>| Array {
        name: format!("blocks.{layer}.attn.{name}.{head}"),
        shape: vec![d, d],
        data,
    };
    let arrays = [array("W_QK", qk), array("W_OV", ov)];
    let bytes = write(&arrays)?;
    replace_file(out, |sink| sink(&bytes))?;
    arrays.iter().for_each(|array| note(&format!("{} {:?}", array.name, array.shape)));
    print(cost(model, (layer, head)).as_bytes())
}

/// What products that are multiplied out would cost as a form, beside their factors.
fn cost(model: &Model, (layer, head): (usize, usize)) -> String {
    let d = model.hparams.n_embd;
    let g = &model.attention[layer].geometry;
    let kv = &g.kv[head / g.per_kv()];
    // Every element is multiplied and added once for a token.
    let row = |name: &str, n: usize| {
        let (megabytes, flops) = (4e-6 * n as f64, 2e-6 * n as f64);
        format!("{name:14} {n:>11} {megabytes:>11.3} {flops:>17.3}\n")
    };
    let (wide, thin) = (2 * d * d, 2 * d * (kv.score_dim + kv.value_dim));
    format!(
        "{:14} {:>11} {:>11} {:>17}\n{}{}as a form: {:.1} times as much to read and compute for \
         every token, for the same result\n",
        "",
        "elements",
        "MB in f32",
        "Mflop for a token",
        row("W_QK and W_OV", wide),
        row("their factors", thin),
        wide as f64 / thin as f64
    )
}
