//! `qkov bench`: how fast a model reads and writes, and what share of the machine that is.

use std::sync::Arc;
use std::time::Instant;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::Run;
use super::memory;
use super::options::RunArgs;
use super::terminal::{note, print, print_json, progress};
use crate::bad_usage;
use crate::cpu::Limits;
use crate::engine::{Kind, Threads};
use crate::error::Result;
use crate::gguf::{Bytes, Gguf};
use crate::measure::latency::{Latency, Test, mean_and_deviation, measure, median, percentile};
use crate::measure::shape;
use crate::model::Model;
use crate::session::Session;

#[derive(Args)]
pub(super) struct Bench {
    #[command(flatten)]
    pub(super) run: RunArgs,
    /// Times a synthetic model of this published shape instead of a file
    #[arg(long, value_name = "NAME", conflicts_with = "model", value_parser = clap::builder::PossibleValuesParser::new(shape::SHAPES.iter().map(|s| s.name)))]
    shape: Option<String>,
    /// Formats of the synthetic model, as llama-quantize names them
    #[arg(long = "type", value_name = "TYPE", default_value = "Q4_K_M")]
    mixture: String,
    /// Tokens of the prompt; several tests with commas, 0 for none
    #[arg(short = 'p', long, value_name = "N", value_delimiter = ',', default_value = "512")]
    pub(super) n_prompt: Vec<usize>,
    /// Tokens to generate; several tests with commas, 0 for none
    #[arg(short = 'n', long, value_name = "N", value_delimiter = ',', default_value = "128")]
    n_gen: Vec<usize>,
    /// Also tests that read a prompt and generate: --pg 512,128
    #[arg(long = "pg", value_name = "P,N", value_parser = prompt_and_gen)]
    both: Vec<(usize, usize)>,
    /// Tokens in the cache before each test; several with commas
    #[arg(short = 'd', long, value_name = "N", value_delimiter = ',', default_value = "0")]
    pub(super) n_depth: Vec<usize>,
    /// Repetitions of each test, after a warm-up
    #[arg(short, long, value_name = "N", default_value = "5", value_parser = clap::value_parser!(u16).range(1..))]
    pub(super) repetitions: u16,
    /// Times forms of attention instead, beside what is predicted of them: those of --form, or without
    /// it all that keep the file's matrices, and lowrank. Their caches are full of zeros
    #[arg(long, conflicts_with_all = ["both", "cold", "mask", "plan", "n_gen"])]
    forms: bool,
    /// Also times a start from disk: has the system forget the file first (Linux)
    #[arg(long, conflicts_with = "shape")]
    cold: bool,
    /// Form of the output
    #[arg(short, long, value_name = "FORM", default_value = "md")]
    output: Form,
    /// The same as --output json
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Form {
    Md,
    Json,
    Csv,
}

fn prompt_and_gen(text: &str) -> std::result::Result<(usize, usize), String> {
    let both = text.split_once(',').and_then(|(p, n)| Some((p.parse().ok()?, n.parse().ok()?)));
    both.ok_or_else(|| "two numbers with a comma between them".into())
}

impl Run for Bench {
    const NAME: &'static str = "bench";
    const ABOUT: &'static str = "Time prompts and generation, against the limits of the machine";

    fn run(self) -> Result<()> {
        if self.forms {
            return self.forms();
        }
        let tests = self.tests()?;
        let counts = self.run.threads();
        let most = |of: fn(&Threads) -> usize| counts.iter().map(of).max().unwrap_or(1);
        let n_threads = Threads { one: most(|t| t.one), batch: most(|t| t.batch) };
        // From nothing to the logits of one token.
        let start = |engine: Kind| -> Result<(Session, f64)> {
            let start = Instant::now();
            let model = self.open()?;
            let n_ctx = tests.iter().map(|test| test.n_ctx(model.plan.n_copies())).max();
            let mut session = self.run.session_of(engine, model, n_ctx, n_threads)?;
            session.feed(&[0])?;
            Ok((session, start.elapsed().as_secs_f64()))
        };
        let cold = match self.cold {
            true => {
                self.run.model.evict()?;
                Some(start(self.run.engine[0])?.1)
            }
            false => None,
        };
        let mut sessions = Vec::new();
        for engine in &self.run.engine {
            let (session, warm) = start(*engine)?;
            sessions.push(Started { engine: *engine, session, cold, warm });
        }
        let n_reps = usize::from(self.repetitions);
        let n_runs = counts.len() * tests.len() * sessions.len();
        let bar = progress(n_runs * (n_reps + 1), "repetitions");
        let mut runs = Vec::new();
        for n_threads in counts {
            let limits = Limits::measure(n_threads.most(), self.run.pin())?;
            sessions.iter_mut().for_each(|s| s.session.set_threads(n_threads));
            // Engines in turn, so that what else the machine does meets all of them.
            for test in &tests {
                for (by, started) in sessions.iter_mut().enumerate() {
                    let session = &mut started.session;
                    let latency = measure(session, *test, n_reps, &mut || bar.inc(1))?;
                    runs.push(Measured { by, n_threads, limits, latency });
                }
            }
        }
        bar.finish_and_clear();
        let rows = runs.iter().map(|r| self.row(&sessions[r.by], r)).collect();
        self.report(rows, || self.table(&sessions, &runs))
    }
}

/// One row of the report.
struct Measured {
    /// Which session.
    by: usize,
    n_threads: Threads,
    limits: Limits,
    latency: Latency,
}

/// A session, and seconds from nothing to the logits of its first token.
struct Started {
    engine: Kind,
    session: Session,
    /// The file not in memory; only if asked for.
    cold: Option<f64>,
    /// The file in the page cache.
    warm: f64,
}

impl Bench {
    /// Prints rows as asked for; `table` prints them for people.
    pub(super) fn report(
        &self,
        rows: Vec<Value>,
        table: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        match self.output {
            _ if self.json => print_json(&rows),
            Form::Json => print_json(&rows),
            Form::Csv => print(csv(&rows).as_bytes()),
            Form::Md => table(),
        }
    }

    fn tests(&self) -> Result<Vec<Test>> {
        let prompts = self.n_prompt.iter().filter(|n| **n > 0).map(|n| (*n, 0));
        let gens = self.n_gen.iter().filter(|n| **n > 0).map(|n| (0, *n));
        let pairs: Vec<_> = prompts.chain(gens).chain(self.both.iter().copied()).collect();
        if pairs.is_empty() {
            bad_usage!("nothing to measure: -p, -n and --pg are all 0");
        }
        let at = |n_depth: &usize| {
            let n_depth = *n_depth;
            pairs.clone().into_iter().map(move |(n_prompt, n_gen)| Test {
                n_prompt,
                n_gen,
                n_depth,
            })
        };
        Ok(self.n_depth.iter().flat_map(at).collect())
    }

    fn open(&self) -> Result<Arc<Model>> {
        match self.shape {
            None => self.run.open(),
            Some(_) => self.run.planned(self.run.formed(Model::from_gguf(self.gguf()?)?)?),
        }
    }

    /// The file, or what stands for it.
    pub(super) fn gguf(&self) -> Result<Gguf> {
        match &self.shape {
            Some(name) => {
                let file = shape::file(shape::find(name)?, &self.mixture)?;
                memory::check_made(file.n_bytes()?)?;
                self.run.model.adapted(Gguf::parse(Bytes::from(file.to_bytes()?))?)
            }
            None => self.run.model.gguf(),
        }
    }

    pub(super) fn name(&self) -> String {
        let synthetic = self.shape.as_ref().map(|s| format!("{s} {} (synthetic)", self.mixture));
        synthetic.map_or_else(|| self.run.model.name(), |name| self.run.model.with_adapters(name))
    }

    fn row(&self, by: &Started, run: &Measured) -> Value {
        let Measured { n_threads, limits, latency: r, .. } = run;
        let session = &by.session;
        let (type_k, type_v) = session.cache_types();
        let model = session.model();
        let [norm, form, mask] = model.plan.names();
        let rates = r.rates();
        let (avg, stddev) = mean_and_deviation(&rates);
        let some = |list: &[f64], x: f64| (!list.is_empty()).then_some(x);
        json!({
            "build_commit": env!("QKOV_REVISION"),
            "model_filename": self.name(),
            "model_type": model.kind(),
            "model_size": model.n_bytes(),
            "n_params": model.n_params(),
            "engine": by.engine.name(),
            "n_threads": n_threads.one,
            "n_threads_batch": n_threads.batch,
            "type_k": type_k.name(),
            "type_v": type_v.name(),
            "simd": crate::simd::level().name(),
            "norm": norm,
            "form": form,
            "mask": mask,
            "n_prompt": r.test.n_prompt,
            "n_gen": r.test.n_gen,
            "n_depth": r.test.n_depth,
            "avg_ts": avg,
            "stddev_ts": stddev,
            "median_ts": median(&rates),
            "samples_ts": rates,
            "ttft_ms": some(&r.first, 1e3 * median(&r.first)),
            "ttft_cold_ms": by.cold.map(|s| 1e3 * s),
            "ttft_start_ms": 1e3 * by.warm,
            "p50_ms": some(&r.steps, 1e3 * percentile(&r.steps, 0.5)),
            "p99_ms": some(&r.steps, 1e3 * percentile(&r.steps, 0.99)),
            "bytes_per_token": r.bytes_per_token,
            "read_gb_s": r.read_rate().map(|x| x / 1e9),
            "peak_share": r.share(limits),
            "limit_read_gb_s": limits.read_bytes / 1e9,
            "limit_int8_gop_s": limits.int8_ops / 1e9,
            "peak_rss_mb": peak_rss().map(|b| b / 1e6),
        })
    }

    fn table(&self, sessions: &[Started], runs: &[Measured]) -> Result<()> {
        let mut text = String::from(
            "| model | size | params | engine | threads | test | t/s | ttft ms | p50 ms | p99 ms | GB/s | of limit |\n\
             | --- | ---: | ---: | --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |\n",
        );
        let number =
            |x: Option<f64>, digits: usize| x.map_or("".into(), |x| format!("{x:.digits$}"));
        for Measured { by, n_threads, limits, latency: r } in runs {
            let model = sessions[*by].session.model();
            let (avg, stddev) = mean_and_deviation(&r.rates());
            let some = |list: &[f64], x: f64| (!list.is_empty()).then_some(1e3 * x);
            text += &format!(
                "| {} | {:.2} MB | {:.2} M | {} | {} | {} | {avg:.2} ± {stddev:.2} | {} | {} | {} | {} | {} |\n",
                model.kind(),
                model.n_bytes() as f64 / 1e6,
                model.n_params() as f64 / 1e6,
                sessions[*by].engine.name(),
                match (r.test.n_prompt, r.test.n_gen) {
                    (0, _) => n_threads.one.to_string(),
                    (_, 0) => n_threads.batch.to_string(),
                    _ if n_threads.one == n_threads.batch => n_threads.one.to_string(),
                    _ => format!("{}+{}", n_threads.batch, n_threads.one),
                },
                r.test.name(),
                number(some(&r.first, median(&r.first)), 1),
                number(some(&r.steps, percentile(&r.steps, 0.5)), 2),
                number(some(&r.steps, percentile(&r.steps, 0.99)), 2),
                number(r.read_rate().map(|x| x / 1e9), 1),
                number(r.share(limits).map(|x| 100.0 * x), 1)
                    + if r.share(limits).is_some() { " %" } else { "" },
            );
        }
        print(text.as_bytes())?;
        let rss =
            peak_rss().map_or(String::new(), |b| format!("; {:.0} MB resident at most", b / 1e6));
        for by in sessions {
            let cold = by.cold.map_or(String::new(), |s| {
                format!(", {:.0} ms with the file not in memory", 1e3 * s)
            });
            note(&format!(
                "{}, engine {}: {:.0} ms from start to the first token{cold}{rss}",
                self.name(),
                by.engine.name(),
                1e3 * by.warm
            ));
        }
        let mut told = Vec::new();
        for Measured { n_threads, limits, .. } in runs {
            let n = n_threads.most();
            if !told.contains(&n) {
                told.push(n);
                note(&format!(
                    "limits of {n} threads ({}): {:.1} GB/s read, {:.0} GOP/s int8",
                    crate::simd::level().name(),
                    limits.read_bytes / 1e9,
                    limits.int8_ops / 1e9,
                ));
            }
        }
        Ok(())
    }
}

/// Most memory that the process has had, in bytes, where the system tells.
fn peak_rss() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? * 1024.0)
}

/// One line per row; lists are in one field, separated by spaces.
fn csv(rows: &[Value]) -> String {
    let field = |value: &Value| match value {
        Value::Null => String::new(),
        Value::String(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        Value::Array(list) => list.iter().map(Value::to_string).collect::<Vec<_>>().join(" "),
        other => other.to_string(),
    };
    let mut text = String::new();
    for (i, row) in rows.iter().filter_map(Value::as_object).enumerate() {
        if i == 0 {
            text += &(row.keys().cloned().collect::<Vec<_>>().join(",") + "\n");
        }
        text += &(row.values().map(field).collect::<Vec<_>>().join(",") + "\n");
    }
    text
}
