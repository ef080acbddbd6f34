//! The table on a terminal.

use super::Document;
use crate::measure::compare::{Role, Variant};

/// Characters of a name.
const NAME: usize = 24;

/// A divergence, with three digits that count.
pub(super) fn small(x: f64) -> String {
    match x {
        x if !x.is_finite() => "none".into(),
        0.0 => "0".into(),
        x if x < 1e-3 => format!("{x:.1e}"),
        x => {
            let digits = (2.0 - x.log10().floor()).clamp(0.0, 5.0) as usize;
            format!("{x:.digits$}")
        }
    }
}

/// A number with its error, which has two digits that count.
fn estimate(x: f64, err: f64) -> String {
    match x {
        0.0 => "0".into(),
        x if x > 0.0 && x < 1e-3 => format!("{x:.1e} ± {err:.0e}"),
        x if x >= 1e5 => format!("{x:.1e} ± {err:.0e}"),
        x => {
            let digits = (1.0 - err.log10().floor()).clamp(0.0, 5.0);
            let digits = if err > 0.0 { digits as usize } else { 0 };
            format!("{x:.digits$} ± {err:.digits$}")
        }
    }
}

/// The first characters of a text, filled up to a width.
fn cut(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width - 1).chain(['…']).collect(),
        false => format!("{text:<width$}"),
    }
}

impl Document {
    /// All rows for a terminal, at most 124 columns wide, of which 10 are for caches that differ.
    pub fn table(&self) -> String {
        let s = &self.settings;
        let mut out = format!(
            "{} ({}), {} windows of {} tokens of {}\n",
            s.model_filename, s.model_type, s.n_windows, s.n_ctx, s.text
        );
        if s.n_rounds > 0 {
            out += &format!(
                "speed: {} tokens together, {} one by one, {} rounds in turns with the model as trained, {} threads, {}\n",
                s.n_prompt, s.n_gen, s.n_rounds, s.n_threads, s.simd
            );
        }
        if let Some(n) = self.cache_bytes() {
            out += &format!("cache: {n} bytes per token for all\n");
        }
        out += &format!(
            "\n{:>4} {:NAME$} {:>13} {:>17} {:>10} {:>6} {:>6} {:>7} {:>7} {:11}\n",
            "rank",
            "variant",
            "ppl",
            "KL, nats",
            "like",
            "top %",
            "recall",
            "prefill",
            "decode",
            "(range)"
        );
        if self.cache_bytes().is_none() {
            out = format!("{} {:>9}\n", out.trim_end_matches('\n'), "B/token");
        }
        for (rank, variant) in self.ranked() {
            let rank = rank.map_or(String::new(), |rank| rank.to_string());
            out += &format!("{rank:>4} {}\n", self.cells(variant).trim_end());
        }
        out += "\n";
        self.findings().iter().for_each(|line| out += &format!("{line}\n"));
        out + &self.legend()
    }

    fn cells(&self, v: &Variant) -> String {
        let pair = |name: &str, err: &str| {
            v.get(name).zip(v.get(err)).map_or("none".into(), |(x, err)| estimate(x, err))
        };
        let like = match self.in_yardsticks(v) {
            Some((ratio, name)) if ratio < 0.01 => format!("<.01 {name}"),
            Some((ratio, name)) if ratio >= 10.0 => format!("{ratio:.0}x {name}"),
            Some((ratio, name)) => format!("{ratio:.2}x {name}"),
            None => String::new(),
        };
        let ratio = |what: &str| {
            let Some(ratio) = v.get(&format!("{what}_ratio")) else { return String::new() };
            let sign = if v.is_noise(what) { "= " } else { "" };
            format!("{sign}{ratio:.2}")
        };
        let end = |end: &str| v.get(&format!("decode_ratio_{end}"));
        let range = end("min").zip(end("max"));
        let range = range.map_or(String::new(), |(low, high)| format!("({low:.2} {high:.2})"));
        let cache = match self.cache_bytes() {
            Some(_) => None,
            None => v.get("cache_bytes_per_token").map(|n| format!("{n:>10}")),
        };
        format!(
            "{} {:>13} {:>17} {:>10} {:>6} {:>6} {:>7} {:>7} {range:11}{}",
            cut(&v.name, NAME),
            pair("ppl", "ppl_err"),
            pair("kl_mean", "kl_err"),
            like,
            v.get("same_top").map_or(String::new(), |x| format!("{:.1}", 100.0 * x)),
            v.get("retrieval_p_gain").map_or(String::new(), |x| format!("{:.1}", 100.0 * x)),
            ratio("prefill"),
            ratio("decode"),
            cache.unwrap_or_default(),
        )
    }

    /// Bytes that a token takes in the cache, if they are the same for all.
    fn cache_bytes(&self) -> Option<f64> {
        let mut found = self.variants.iter().filter_map(|v| v.get("cache_bytes_per_token"));
        let first = found.next()?;
        found.all(|n| n == first).then_some(first)
    }

    fn legend(&self) -> String {
        let mut out = String::from(
            "rank: 1 for variants that no other beats in KL without losing in decoding speed, 2 for the next.\n",
        );
        if self.variants.iter().any(|v| v.role == Role::Yardstick) {
            out += "like: KL as a multiple of that of the weights rounded to a smaller format.\n";
        }
        if self.settings.n_trials > 0 {
            out += "recall: points that hiding a passage in a text adds to the probability of its tokens when it comes again.\n";
        }
        if self.settings.n_rounds > 0 {
            out += "prefill, decode: speed over the model's as trained; =: the range over rounds holds 1, so no difference.\n";
        }
        out
    }
}
