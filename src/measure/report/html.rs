//! The report as one HTML file that needs no network.

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Serialize;
use serde_json::{Value, json};
use std::path::Path;

use super::{Document, charts, write};
use crate::error::{Error, Result};
use crate::measure::compare::Role;
use crate::measure::record::{Record, record};
use crate::plan::Plan;
use crate::session::Session;

static PAGE: &str = include_str!("report.html");
static STYLE: &str = include_str!("report.css");
/// What scripts of all pages share.
static SHARED: &str = include_str!("page.js");
static SCRIPT: &str = include_str!("report.js");

static YARDSTICK_CAPTION: &str = "<figcaption>The same weights, all matrices rounded to each format, \
    judged in the same way: a measure for the numbers above.</figcaption>";

/// Tokens of the text that patterns are shown for.
pub const MAX_TOKENS: usize = 96;
/// Bytes of patterns in one report.
const MAX_BYTES: usize = 3 << 20;

/// Attention weights for a text, under several plans.
#[derive(Debug, Clone, Serialize)]
pub struct Patterns {
    /// The text's tokens.
    pub tokens: Vec<String>,
    /// By plan.
    pub plans: Vec<Pattern>,
}

/// The weights of all heads under one plan.
#[derive(Debug, Clone, Serialize)]
pub struct Pattern {
    /// The name of the plan's row.
    pub name: String,
    /// Whether rows hold later keys as well; if not, a row ends with the query itself.
    pub square: bool,
    /// Largest size of a weight, by layer and head.
    pub scales: Vec<Vec<f32>>,
    /// By layer, head and query: shares of the scale in 127ths, as signed bytes in base64.
    pub weights: String,
}

/// Reads a text under these plans, with their names; those that come first are kept if not all fit.
pub fn patterns(
    session: &mut Session,
    tokens: &[u32],
    plans: &[(String, Plan)],
) -> Result<Patterns> {
    let tokens = &tokens[..tokens.len().min(MAX_TOKENS).min(session.n_ctx())];
    let n_layer = session.model().layers.len();
    let mut out = Vec::new();
    let mut n_bytes = 0;
    for (name, plan) in plans {
        session.set_plan(plan.clone())?;
        let records = record(session, tokens, 0..n_layer)?;
        let (pattern, bytes) = pattern(name, &records, tokens.len());
        n_bytes += bytes;
        if n_bytes > MAX_BYTES {
            break;
        }
        out.push(pattern);
    }
    let tokenizer = &session.model().tokenizer;
    let text = |id: &u32| String::from_utf8_lossy(tokenizer.piece(*id, true)).into_owned();
    Ok(Patterns { tokens: tokens.iter().map(text).collect(), plans: out })
}

fn pattern(name: &str, records: &[Record], n: usize) -> (Pattern, usize) {
    let heads = || records.iter().flat_map(|record| &record.heads);
    let is_later = |(i, w): (usize, &f32)| i % n > i / n && *w != 0.0;
    let square = heads().any(|head| head.weights.iter().enumerate().any(is_later));
    let (mut scales, mut bytes) = (Vec::new(), Vec::new());
    for record in records {
        let mut of_layer = Vec::new();
        for head in &record.heads {
            let scale = head.weights.iter().fold(0.0f32, |m, w| m.max(w.abs()));
            let inverse = if scale > 0.0 { 127.0 / scale } else { 0.0 };
            for (q, row) in head.weights.chunks_exact(n).enumerate() {
                let seen = if square { n } else { q + 1 };
                bytes.extend(row[..seen].iter().map(|w| (w * inverse).round() as i8 as u8));
            }
            of_layer.push(scale);
        }
        scales.push(of_layer);
    }
    let weights = BASE64_STANDARD.encode(&bytes);
    (Pattern { name: name.into(), square, scales, weights }, bytes.len())
}

/// Text for HTML.
pub(super) fn escaped(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            c => out.push(c),
        }
    }
    out
}

/// JSON that can stand in a script element: nothing in it ends the element.
pub(super) fn embedded(value: &Value) -> Result<String> {
    let text = serde_json::to_string(value);
    let text = text.map_err(|e| Error::Runtime(format!("cannot write JSON: {e}")))?;
    Ok(text.replace('<', "\\u003c").replace('\u{2028}', "\\u2028").replace('\u{2029}', "\\u2029"))
}

/// A page with its parts, `{{name}}`, in place; style and the shared script are the same in all.
pub(super) fn fill(page: &str, part: impl Fn(&str) -> Result<String>) -> Result<String> {
    // One pass, so that nothing is replaced within what was put in.
    let mut out = String::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once("{{") {
        let Some((name, after)) = after.split_once("}}") else { break };
        out += before;
        match name {
            "style" => out += STYLE,
            "shared" => out += SHARED,
            name => out += &part(name)?,
        }
        rest = after;
    }
    Ok(out + rest)
}

/// Names and what is said of them, as a list of definitions.
pub(super) fn definitions(facts: &[(&str, String)]) -> String {
    facts.iter().map(|(name, fact)| format!("<dt>{name}</dt><dd>{}</dd>", escaped(fact))).collect()
}

/// Sentences as items.
pub(super) fn items(sentences: &[String]) -> String {
    sentences.iter().map(|s| format!("<li>{}</li>", escaped(s))).collect()
}

impl Document {
    /// Writes the report, with patterns if there are some.
    pub fn write_html(&self, path: &Path, patterns: Option<&Patterns>) -> Result<()> {
        write(path, &self.html(patterns)?)
    }

    /// The report.
    pub fn html(&self, patterns: Option<&Patterns>) -> Result<String> {
        let s = &self.settings;
        let facts = [
            ("Model", format!("{} ({})", s.model_filename, s.model_type)),
            ("Parameters", format!("{:.1} M", s.n_params as f64 / 1e6)),
            ("Text", format!("{}: {} windows of {} tokens", s.text, s.n_windows, s.n_ctx)),
            (
                "Speed",
                match s.n_rounds {
                    0 => "not measured".into(),
                    n => format!(
                        "{} tokens together, {} one by one, {n} rounds, in turns with the model as trained",
                        s.n_prompt, s.n_gen
                    ),
                },
            ),
            ("Machine", format!("{} threads, {}", s.n_threads, s.simd)),
            ("Cache", format!("{} keys, {} values", s.type_k, s.type_v)),
            ("Revision", s.build_commit.clone()),
        ];
        let bars = charts::yardsticks(self, 480)?.map(|svg| svg + YARDSTICK_CAPTION);
        let data = json!({
            "variants": self.records(),
            "patterns": patterns,
            "histograms": self.histograms()?,
        });
        fill(PAGE, |name| {
            Ok(match name {
                "script" => SCRIPT.into(),
                "title" => escaped(&s.model_filename),
                "facts" => definitions(&facts),
                "findings" => items(&self.findings()),
                "scatter-wide" => charts::scatter(self, (900, 520))?,
                "scatter-narrow" => charts::scatter(self, (400, 460))?,
                "yardsticks" => bars.clone().unwrap_or("<p>Nothing was rounded.</p>".into()),
                "data" => embedded(&data)?,
                _ => String::new(),
            })
        })
    }

    fn histograms(&self) -> Result<Value> {
        let variants = self.variants.iter().filter(|v| v.role != Role::Yardstick);
        let drawn =
            variants.map(|v| Ok((v.name.clone(), json!(charts::histograms(self, v, (420, 420))?))));
        Ok(Value::Object(drawn.collect::<Result<_>>()?))
    }
}
