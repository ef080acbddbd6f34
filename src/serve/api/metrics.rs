//! `GET /metrics`: counters and times for Prometheus, in its text format (version 0.0.4).

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::http::StatusCode;

use super::App;

/// Upper bounds of times, in seconds.
const BOUNDS: [f64; 12] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];

/// What is counted of requests.
#[derive(Default)]
pub(super) struct Metrics {
    /// From the beginning of a prompt to the first token.
    pub(super) first_token: Histogram,
    /// From each token to the next.
    pub(super) between_tokens: Histogram,
    texts: AtomicU64,
    /// Answers by the first digit of their status.
    answers: [AtomicU64; 6],
}

/// How often times were up to each bound.
#[derive(Default)]
pub(super) struct Histogram {
    counts: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Histogram {
    pub(super) fn add(&self, time: Duration) {
        let seconds = time.as_secs_f64();
        let at = BOUNDS.iter().position(|bound| seconds <= *bound).unwrap_or(BOUNDS.len());
        self.counts[at].fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(time.as_nanos() as u64, Ordering::Relaxed);
    }

    fn write(&self, name: &str, help: &str, out: &mut String) {
        head(name, help, "histogram", out);
        let mut n = 0;
        let bounds = BOUNDS.iter().map(f64::to_string).chain(["+Inf".into()]);
        for (count, bound) in self.counts.iter().zip(bounds) {
            n += count.load(Ordering::Relaxed);
            let _ = writeln!(out, "qkov_{name}_bucket{{le=\"{bound}\"}} {n}");
        }
        let sum = self.nanoseconds.load(Ordering::Relaxed) as f64 / 1e9;
        let _ = writeln!(out, "qkov_{name}_sum {sum}\nqkov_{name}_count {n}");
    }
}

/// Writing to a string never fails.
fn head(name: &str, help: &str, kind: &str, out: &mut String) {
    let _ = writeln!(out, "# HELP qkov_{name} {help}\n# TYPE qkov_{name} {kind}");
}

impl Metrics {
    /// Counts a text that is over.
    pub(super) fn ended(&self) {
        self.texts.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts an answer.
    pub(super) fn answered(&self, status: StatusCode) {
        if let Some(count) = self.answers.get(usize::from(status.as_u16() / 100)) {
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Everything that is counted.
pub(super) fn text(app: &App) -> String {
    let status = app.handle.status();
    let sums = &status.counters;
    let n_busy = status.slots.iter().filter(|slot| slot.is_busy).count();
    let load = |x: &AtomicU64| x.load(Ordering::Relaxed) as f64;
    let mut out = String::new();
    for (name, help, value) in [
        ("jobs_total", "Jobs that the model began.", sums.n_jobs as f64),
        ("texts_total", "Texts that were written to their end.", load(&app.metrics.texts)),
        ("prompt_tokens_total", "Tokens of prompts that were read.", sums.n_prompt_tokens as f64),
        (
            "cached_tokens_total",
            "Tokens of prompts that had been read before.",
            sums.n_cached_tokens as f64,
        ),
        ("predicted_tokens_total", "Tokens that were written.", sums.n_predicted_tokens as f64),
        ("prompt_seconds_total", "Time of steps that read prompts.", sums.prompt_seconds),
        ("predicted_seconds_total", "Time of steps that only wrote.", sums.predicted_seconds),
        ("steps_total", "Steps of the model.", sums.n_steps as f64),
        ("busy_slots_total", "Busy slots, summed over the steps.", sums.n_busy_slots as f64),
        ("failures_total", "Steps that failed.", sums.n_failures as f64),
    ] {
        head(name, help, "counter", &mut out);
        let _ = writeln!(out, "qkov_{name} {value}");
    }
    for (name, help, value) in [
        ("slots", "Texts that are written at once at most.", status.slots.len() as f64),
        ("slots_busy", "Texts that are being written.", n_busy as f64),
        ("queued", "Jobs that wait.", status.n_queued as f64),
        ("cache_bytes", "Memory that cached positions take.", status.cache_bytes as f64),
        ("tokens_per_second", "Tokens written over the last second.", status.tokens_per_second),
    ] {
        head(name, help, "gauge", &mut out);
        let _ = writeln!(out, "qkov_{name} {value}");
    }
    let name = "http_answers_total";
    head(name, "Answers by the first digit of their status.", "counter", &mut out);
    for (digit, count) in app.metrics.answers.iter().enumerate().skip(2) {
        let _ = writeln!(out, "qkov_{name}{{status=\"{digit}xx\"}} {}", load(count));
    }
    let Metrics { first_token, between_tokens, .. } = &app.metrics;
    let name = "first_token_seconds";
    first_token.write(name, "From the beginning of a prompt to the first token.", &mut out);
    let name = "between_tokens_seconds";
    between_tokens.write(name, "From each token to the next.", &mut out);
    out
}
