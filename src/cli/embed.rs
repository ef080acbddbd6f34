//! `qkov embed`: texts as vectors.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use super::Run;
use super::options::RunArgs;
use super::terminal::{note, print, progress, read_text};
use crate::arch::Pooling;
use crate::bad_usage;
use crate::error::{Result, escaped};
use crate::session::Session;
use crate::session::embed::{cosine, normalize};

#[derive(Args)]
pub(super) struct Embed {
    #[command(flatten)]
    run: RunArgs,
    /// The texts [default: the lines of stdin]
    #[arg(value_name = "TEXT", conflicts_with = "file")]
    texts: Vec<String>,
    /// Reads texts from a file, one a line
    #[arg(short, long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// What a text's vector is made of: `mean`, the mean of what the layers make of its tokens;
    /// `cls`, what they make of the first; `last`, of the last; `none`, a vector for each token
    /// [default: what the file says, else `mean` where all tokens see each other, `last` elsewhere]
    #[arg(long, value_name = "POOLING")]
    pooling: Option<Pooling>,
    /// Leaves vectors as long as they are, instead of dividing them by their length
    #[arg(long)]
    no_normalize: bool,
    /// Prints cosines of all pairs of texts instead of vectors
    #[arg(short, long)]
    similarity: bool,
    /// Prints a list of vectors as JSON, in the form of OpenAI's; with --similarity, cosines too
    #[arg(long)]
    json: bool,
    /// Reads the names of special tokens in the texts as these tokens
    #[arg(long)]
    parse_special: bool,
    /// Tells times on stderr at the end
    #[arg(short, long)]
    verbose: bool,
}

impl ValueEnum for Pooling {
    fn value_variants<'a>() -> &'a [Pooling] {
        &[Pooling::None, Pooling::Mean, Pooling::Cls, Pooling::Last]
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// A text's vector, or those of its tokens.
struct Embedded {
    n_tokens: usize,
    rows: Vec<Vec<f32>>,
}

/// Characters of a text that a table shows.
const SHOWN_CHARS: usize = 40;

impl Run for Embed {
    const NAME: &'static str = "embed";
    const ABOUT: &'static str = "Turn texts into vectors, or tell how near they are to each other";

    fn run(mut self) -> Result<()> {
        if self.texts.is_empty() {
            let lines = read_text(self.file.as_deref())?;
            self.texts = lines.lines().map(String::from).collect();
        }
        if self.texts.is_empty() {
            bad_usage!("there are no texts; as arguments, or one a line in --file or stdin");
        }
        let model = self.run.open_any()?;
        let pooling = self.pooling.unwrap_or(model.hparams.pooling());
        if pooling == Pooling::None && self.similarity {
            bad_usage!(
                "--similarity: pooling none gives a vector for each token; --pooling mean, cls or last"
            );
        }
        let mut session = self.run.session(model.clone(), self.run.ctx)?;
        let texts = self.tokens(&session)?;
        let bar = progress(texts.len(), "texts");
        let mut all = Vec::new();
        let mut time = Duration::ZERO;
        for (i, tokens) in texts.iter().enumerate() {
            let start = Instant::now();
            let states = session.embed(tokens, pooling)?;
            time += start.elapsed();
            let rows = states.chunks_exact(model.hparams.n_embd).map(<[f32]>::to_vec);
            let mut embedded = Embedded { n_tokens: tokens.len(), rows: rows.collect() };
            if !self.no_normalize {
                embedded.rows.iter_mut().for_each(|row| normalize(row));
            }
            bar.inc(1);
            match self.json || self.similarity {
                true => all.push(embedded),
                false => print(embedded.lines(i > 0 && pooling == Pooling::None).as_bytes())?,
            }
        }
        bar.finish_and_clear();
        if self.verbose {
            session.notes().iter().for_each(|text| note(text));
            let (n, seconds) = (texts.iter().map(Vec::len).sum::<usize>(), time.as_secs_f64());
            note(&format!(
                "{} texts, {n} tokens in {:.0} ms, {:.1} per second",
                texts.len(),
                1e3 * seconds,
                n as f64 / seconds
            ));
        }
        match (self.json, self.similarity) {
            (true, _) => print(format!("{}\n", self.report(&all, pooling)).as_bytes()),
            (_, true) => print(self.table(&all).as_bytes()),
            _ => Ok(()),
        }
    }
}

impl Embedded {
    /// A line for each vector, after an empty one if `apart`.
    fn lines(&self, apart: bool) -> String {
        let mut text = String::from(if apart { "\n" } else { "" });
        for row in &self.rows {
            let numbers: Vec<String> = row.iter().map(f32::to_string).collect();
            text += &numbers.join(" ");
            text.push('\n');
        }
        text
    }
}

impl Embed {
    /// The tokens of every text; refuses texts that have no vectors before any is made.
    fn tokens(&self, session: &Session) -> Result<Vec<Vec<u32>>> {
        let tokenizer = &session.model().tokenizer;
        let encode = |(i, text): (usize, &String)| {
            let tokens = tokenizer.encode(text, true, self.parse_special);
            let checked = tokens.and_then(|tokens| session.check_text(&tokens).map(|()| tokens));
            match checked {
                Ok(tokens) => Ok(tokens),
                Err(e) => bad_usage!("text {}, \"{}\": {e}", i + 1, shown(text)),
            }
        };
        self.texts.iter().enumerate().map(encode).collect()
    }

    fn report(&self, all: &[Embedded], pooling: Pooling) -> Value {
        let data = all.iter().enumerate().map(|(i, one)| {
            let rows = one.rows.iter().map(|row| row.iter().copied().map(number).collect());
            let mut rows: Vec<Value> = rows.collect();
            let embedding = match (pooling, &mut rows[..]) {
                (Pooling::None, _) | (_, []) => Value::Array(rows),
                (_, [row, ..]) => row.take(),
            };
            json!({"object": "embedding", "index": i, "embedding": embedding, "tokens": one.n_tokens})
        });
        let n_tokens: usize = all.iter().map(|one| one.n_tokens).sum();
        let mut report = json!({
            "object": "list",
            "model": self.run.model.name(),
            "pooling": pooling.name(),
            "data": data.collect::<Vec<_>>(),
            "usage": {"prompt_tokens": n_tokens, "total_tokens": n_tokens},
        });
        if self.similarity {
            report["similarity"] = json!(cosines(all));
        }
        report
    }

    /// Cosines of all pairs, and beside each row its text.
    fn table(&self, all: &[Embedded]) -> String {
        let width = all.len().to_string().len();
        let numbers = (1..=all.len()).map(|i| format!(" {i:>6}"));
        let mut table = format!("{:width$}{}\n", "", numbers.collect::<String>());
        for ((i, row), text) in cosines(all).iter().enumerate().zip(&self.texts) {
            let row: String = row.iter().map(|x| format!(" {x:6.3}")).collect();
            table += &format!("{:>width$}{row}  {}\n", i + 1, shown(text));
        }
        table
    }
}

/// Cosines of all pairs of vectors. `[n, n]`
fn cosines(all: &[Embedded]) -> Vec<Vec<f64>> {
    let rows = || all.iter().flat_map(|one| one.rows.first());
    rows().map(|a| rows().map(|b| cosine(a, b)).collect()).collect()
}

/// Through the shortest decimal, so that 0.1 does not become 0.10000000149011612.
fn number(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

/// The beginning of a text, on one line.
fn shown(text: &str) -> String {
    let short: String = text.chars().take(SHOWN_CHARS).collect();
    let more = if short.len() < text.len() { "..." } else { "" };
    format!("{}{more}", escaped(&short))
}
