//! `qkov quantize`: write a model with its matrices in smaller types.

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::Args;
use fancy_regex::Regex;

use super::Run;
use super::terminal::{note, print, progress};
use crate::bad_usage;
use crate::error::{Error, Result};
use crate::ggml::quantize::{Importance, KINDS, Kind, Plan, Settings, Step, kind_named, writable};
use crate::gguf::{Gguf, Value};
use crate::measure::importance::Gathered;
use crate::quant::Type;

#[derive(Args)]
pub(super) struct Quantize {
    /// GGUF file of the model, with matrices in floats; of a split one, any part
    #[arg(value_name = "IN")]
    from: PathBuf,
    /// GGUF file to write
    #[arg(value_name = "OUT")]
    to: PathBuf,
    /// Kind of the new file, with llama.cpp's name and its mix of types, such as Q4_K_M; an unknown one
    /// lists them all
    #[arg(value_name = "TYPE")]
    kind: String,
    /// What columns matter, from `imatrix` or llama-imatrix
    #[arg(long, value_name = "FILE")]
    imatrix: Option<PathBuf>,
    /// Type of the output matrix, and of embeddings that serve as one
    #[arg(long, value_name = "TYPE")]
    output_tensor_type: Option<String>,
    /// Type of embeddings of tokens
    #[arg(long, value_name = "TYPE")]
    token_embedding_type: Option<String>,
    /// Type of tensors in whose names a regular expression is found, such as 'ffn_down=q6_k'; given
    /// again, the first that is found counts
    #[arg(long, value_name = "PATTERN=TYPE")]
    tensor_type: Vec<String>,
    /// All matrices get the same type
    #[arg(long)]
    pure: bool,
    /// Rounds matrices again that are rounded already, which costs more than rounding once
    #[arg(long)]
    allow_requantize: bool,
    /// Writes nothing; prints the type and the size of every tensor
    #[arg(long)]
    dry_run: bool,
    /// Replaces a file of that name
    #[arg(long)]
    force: bool,
    /// Threads [default: one per core]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
}

impl Run for Quantize {
    const NAME: &'static str = "quantize";
    const ABOUT: &'static str = "Write a model with its matrices in smaller types";

    fn run(self) -> Result<()> {
        let kind = kind_of(&self.kind)?;
        if self.to.exists() && !self.force && !self.dry_run {
            bad_usage!("{}: the file exists; --force replaces it", self.to.display());
        }
        if let Some(n) = self.threads {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n.into());
            pool.build_global().map_err(|e| Error::Runtime(format!("no threads: {e}")))?;
        }
        let gathered = self.imatrix.as_deref().map(Gathered::open).transpose()?;
        let importance: Option<Importance> = gathered.as_ref().map(|g| g.means().collect());
        let chosen = self.tensor_type.iter().map(|text| chosen(text));
        let chosen = chosen.collect::<Result<Vec<_>>>()?;
        let ty = |name: &Option<String>| name.as_deref().map(writable).transpose();
        let settings = Settings {
            kind,
            output: ty(&self.output_tensor_type)?,
            embedding: ty(&self.token_embedding_type)?,
            chosen: &chosen,
            pure: self.pure,
            again: self.allow_requantize,
            importance: importance.as_ref(),
        };
        let gguf = Gguf::open(&self.from)?;
        let plan = Plan::new(&gguf, &settings).map_err(|e| e.at(&self.from))?;
        ragged(&plan.steps).iter().for_each(|line| note(line));
        if importance.is_some() {
            let unknown: Vec<&str> = plan.unknown().collect();
            if let [first, ..] = unknown[..] {
                let n = unknown.len();
                note(&format!("the importance matrix lacks {n} of the tensors, such as {first}"));
            }
        }
        let sizes = sizes(&gguf, &plan);
        if self.dry_run {
            print(table(&plan.steps).as_bytes())?;
            print(sizes.as_bytes())?;
            if let Err(e) = plan.check() {
                note(&format!("warning: {e}"));
            }
            return Ok(());
        }
        let total: usize = gguf.tensors().iter().map(|t| t.n_bytes()).sum();
        let bar = progress(total, "bytes");
        let file = self.imatrix.as_ref().map(|path| path.to_string_lossy());
        let mut keys = Vec::new();
        if let (Some(file), Some(gathered)) = (&file, &gathered) {
            keys.push(("quantize.imatrix.file", Value::from(&file[..])));
            let dataset = gathered.datasets.first().map(|d| Value::from(&d[..]));
            keys.extend(dataset.map(|d| ("quantize.imatrix.dataset", d)));
            let n = u32::try_from(gathered.entries.len()).unwrap_or(u32::MAX);
            keys.push(("quantize.imatrix.entries_count", n.into()));
            let n_chunks = Some(gathered.n_chunks).filter(|n| *n > 0);
            keys.extend(n_chunks.map(|n| ("quantize.imatrix.chunks_count", n.into())));
        }
        plan.write(&self.to, &keys, &|n| bar.inc(n as u64))?;
        bar.finish_and_clear();
        print(sizes.as_bytes())?;
        note(&format!("written: {}", self.to.display()));
        Ok(())
    }
}

fn kind_of(name: &str) -> Result<&'static Kind> {
    match kind_named(name) {
        Some(kind) => Ok(kind),
        None => {
            let all: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
            bad_usage!("type \"{name}\" is not known; known: {}", all.join(", "))
        }
    }
}

/// A pattern of names and a type, from `PATTERN=TYPE`.
fn chosen(text: &str) -> Result<(Regex, &'static Type)> {
    let Some((pattern, ty)) = text.rsplit_once('=') else {
        bad_usage!("--tensor-type {text}: allowed PATTERN=TYPE");
    };
    match Regex::new(pattern) {
        Ok(regex) => Ok((regex, writable(ty)?)),
        Err(e) => bad_usage!("--tensor-type {text}: not a regular expression: {e}"),
    }
}

/// A line for tensors whose rows are not whole blocks, for each type that they would have had.
fn ragged(steps: &[Step]) -> Vec<String> {
    let mut all: BTreeMap<_, usize> = BTreeMap::new();
    for step in steps.iter().filter(|step| step.new != step.wanted) {
        let key = (step.tensor.dims[0], step.wanted.name, step.wanted.block_len, step.new.name);
        *all.entry(key).or_default() += 1;
    }
    let line = |((n, wanted, block, new), count): (&(u64, &str, usize, &str), &usize)| {
        let are = if *count == 1 { "tensor is" } else { "tensors are" };
        format!(
            "{count} {are} {new}: rows of {n} elements are not whole blocks of {block} ({wanted})"
        )
    };
    all.iter().map(line).collect()
}

fn table(steps: &[Step]) -> String {
    let width = steps.iter().map(|step| step.tensor.name.len()).max().unwrap_or(0);
    let mut text = format!("{:width$}  {:20}  from     to         bytes\n", "tensor", "shape");
    for step in steps {
        let (tensor, n) = (step.tensor, step.n_bytes());
        let shape = format!("{:?}", tensor.dims);
        let new = if step.changes() { step.new.name } else { "" };
        text +=
            &format!("{:width$}  {shape:20}  {:7}  {new:7} {n:>8}\n", tensor.name, tensor.ty.name);
    }
    text
}

/// What the tensors take, before and after.
fn sizes(gguf: &Gguf, plan: &Plan) -> String {
    let n: u64 = gguf.tensors().iter().map(|t| t.n_elements()).sum();
    let old: u64 = gguf.tensors().iter().map(|t| t.n_bytes() as u64).sum();
    let cell = |bytes: u64| {
        let (mb, bits) = (bytes as f64 / 1e6, bytes as f64 * 8.0 / n.max(1) as f64);
        format!("{mb:.2} MB ({bits:.2} bits per weight)")
    };
    format!("weights {}, before {}\n", cell(plan.n_bytes()), cell(old))
}
