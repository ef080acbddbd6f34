//! `qkov merge`: write a model with its attention in another form.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::Run;
use super::options::RunArgs;
use super::terminal::{note, print, print_json, progress};
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::{self, Gguf, HALVES, Writer};
use crate::measure::sweep::{Point, Sweep};
use crate::merge::KvHead;
use crate::model::{MASK_KEY, NORMALIZER_KEY, NewLayer};
use crate::plan::PlanFile;
use crate::quant::{self, FORMATS, Format};

#[derive(Args)]
pub(super) struct Merge {
    #[command(flatten)]
    run: RunArgs,
    /// GGUF file to write
    #[arg(short, long, value_name = "FILE", required_unless_present = "sweep")]
    out: Option<PathBuf>,
    /// Format of the new matrices [default: of as many bits as the old ones, or of more where rounding
    /// would cost more than the form]
    #[arg(long = "type", value_name = "TYPE")]
    ty: Option<String>,
    /// Writes a plain file, which other programs load too; needs heads that are all alike, such as
    /// lowrank:qk=R,ov=R,shared=yes
    #[arg(long)]
    stock: bool,
    /// Replaces a file of that name
    #[arg(long)]
    force: bool,
    /// Writes nothing, but measures the form at several ranks: what is lost, size and speed
    #[arg(long, conflicts_with_all = ["out", "stock", "ty"])]
    sweep: bool,
    /// Prints the sweep as JSON
    #[arg(long, requires = "sweep")]
    json: bool,
}

impl Run for Merge {
    const NAME: &'static str = "merge";
    const ABOUT: &'static str =
        "Write a model with its attention in another form, or measure forms";

    fn run(self) -> Result<()> {
        if self.sweep {
            return self.sweep();
        }
        let Some(out) = &self.out else { bad_usage!("--out: the name of a file to write") };
        if out.exists() && !self.force {
            bad_usage!("--out {}: the file exists; --force replaces it", out.display());
        }
        let round = self.ty.as_deref().map(format_of).transpose()?;
        let model = self.run.model.open()?;
        model.warnings.iter().for_each(|w| note(&format!("warning: {w}")));
        let plan = self.run.form_plan(&model)?;
        let changes = PlanFile::of(&self.run.masked(plan.clone())?, &model.trained, "");
        let changes =
            [(NORMALIZER_KEY, changes.norm.join(";")), (MASK_KEY, changes.mask.join(";"))];
        if self.stock && changes.iter().any(|(_, text)| !text.is_empty()) {
            bad_usage!("--norm, --mask: a plain file has those that it was trained with");
        }
        if plan.names()[1] == model.trained.names()[1] {
            bad_usage!("nothing to rewrite: --form says what the file has already");
        }
        let (model, layers) = self.run.new_layers(model, plan)?;
        let table = table(&layers);
        let gguf = match self.stock {
            true => model.stock(layers, round)?,
            false => model.rewritten(&layers, round)?,
        };
        let apart = gguf.adapters.iter().map(|(adapter, _)| adapter.tensors().len() / HALVES.len());
        if let n @ 1.. = apart.sum::<usize>() {
            bad_usage!(
                "--lora: it changes {n} tensors that the form does not write anew, and a file has no place \
                 for that; allowed for those of attention in layers that are rewritten"
            );
        }
        let mut writer = Writer::new();
        writer.copy_metadata(&gguf)?;
        for (key, text) in changes.iter().filter(|(_, text)| !text.is_empty()) {
            // Over what the file says already.
            let text = gguf.str(key)?.map_or(text.clone(), |old| format!("{old};{text}"));
            writer.remove(key);
            writer.set(key, gguf::Value::String(text.as_bytes()))?;
        }
        gguf.tensors().iter().try_for_each(|tensor| writer.copy_tensor(&gguf, tensor))?;
        writer.write(out)?;
        print(table.as_bytes())?;
        print(sizes(&model.gguf, &gguf).as_bytes())?;
        note(&format!("written: {}", out.display()));
        Ok(())
    }
}

impl Merge {
    fn sweep(&self) -> Result<()> {
        let model = self.run.model.open_predictor()?;
        let form = match &self.run.form[..] {
            [] => "lowrank",
            [form] => form,
            _ => bad_usage!("--sweep: one --form"),
        };
        let sweep = Sweep::new(&model, form, self.run.form_windows(&model)?)?;
        let n_ctx = sweep.n_ctx();
        let open = |gguf| self.run.trained_session(gguf, n_ctx);
        let bar = progress(sweep.len(), "ranks");
        let points = sweep.run(&|| open(self.run.model.gguf()?), &open, &mut || bar.inc(1))?;
        bar.finish_and_clear();
        match self.json {
            true => print_json(&points.iter().map(as_json).collect::<Vec<_>>()),
            false => print(points_table(&points).as_bytes()),
        }
    }
}

fn format_of(name: &str) -> Result<&'static Format> {
    match quant::format_named(name).filter(|f| f.can_quantize()) {
        Some(format) => Ok(format),
        None => {
            let known: Vec<_> =
                FORMATS.iter().filter(|f| f.can_quantize()).map(|f| f.ty.name).collect();
            bad_usage!("--type {name}: cannot be written; allowed {}", known.join(", "))
        }
    }
}

/// Widths of heads, and what is lost, by layer.
fn table(layers: &[NewLayer]) -> String {
    let mut text = "layer  form      query, key  value  error of scores  of outputs\n".to_string();
    for (i, layer) in layers.iter().enumerate() {
        let name = layer.form.form().name();
        let Some(new) = &layer.rewritten else {
            text += &format!("{i:5}  {name}\n");
            continue;
        };
        let all = |of: fn(&KvHead) -> usize| {
            let all: Vec<usize> = new.geometry.kv.iter().map(of).collect();
            let (low, high) = (all.iter().min().copied(), all.iter().max().copied());
            let (low, high) = (low.unwrap_or(0), high.unwrap_or(0));
            if low == high { low.to_string() } else { format!("{low}-{high}") }
        };
        let most = |errors: &[f64]| errors.iter().copied().fold(0.0, f64::max);
        text += &format!(
            "{i:5}  {name:8}  {:>10}  {:>5}  {:15.4}  {:10.4}\n",
            all(|h| h.score_dim),
            all(|h| h.value_dim),
            most(&new.score_errors),
            most(&new.output_errors)
        );
    }
    text
}

/// What the file and a token in the cache take.
fn sizes(old: &Gguf, new: &Gguf) -> String {
    let bytes =
        |gguf: &Gguf| gguf.tensors().iter().map(|t| t.n_bytes()).sum::<usize>() as f64 / 1e6;
    format!("weights {:.2} MB, before {:.2} MB\n", bytes(new), bytes(old))
}

fn points_table(points: &[Point]) -> String {
    let mut text =
        "form                      KL, nats      perplexity  weights MB  cache B/token  prefill  decode\n"
            .to_string();
    for p in points {
        text += &format!(
            "{:24}  {:12.6}  {:10.3}  {:10.2}  {:13.0}  {:6.2}x  {:5.2}x\n",
            p.form,
            p.kl,
            p.ppl,
            p.weight_bytes / 1e6,
            p.cache_bytes,
            p.prefill,
            p.decode
        );
    }
    text
}

fn as_json(p: &Point) -> Value {
    json!({
        "form": p.form, "kl_mean": p.kl, "ppl": p.ppl, "model_size": p.weight_bytes,
        "cache_bytes_per_token": p.cache_bytes, "prefill_ratio": p.prefill, "decode_ratio": p.decode,
    })
}
