//! Reports of comparisons: files that runs go on from, tables, JSON, CSV and HTML; and pages of heads.

mod charts;
mod heads;
mod html;
mod table;

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::bad_file;
use crate::bad_usage;
use crate::error::{Error, Result};
use crate::gguf::replace_file;
use crate::measure::compare::{Role, Settings, Variant, pareto_ranks};

pub use heads::write_heads;
pub use html::{MAX_TOKENS, Pattern, Patterns, patterns};

/// What was measured, as files hold it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// What all variants share.
    pub settings: Settings,
    /// Rows, in the order in which they were measured.
    pub variants: Vec<Variant>,
}

/// Settings that shards of one comparison share; the others tell where each ran.
const SHARED: [&str; 11] = [
    "exact",
    "model_hash",
    "text_hash",
    "n_ctx",
    "n_windows",
    "n_trials",
    "n_trial_ctx",
    "n_prompt",
    "n_gen",
    "type_k",
    "type_v",
];

/// The name of the first of these settings that differs, and both values.
fn difference(a: &Settings, b: &Settings, names: &[&str]) -> Option<String> {
    let (a, b) = (json!(a), json!(b));
    let differs = |name: &&&str| a[**name] != b[**name];
    names.iter().find(differs).map(|name| format!("{name} = {}, and {}", a[*name], b[*name]))
}

impl Document {
    /// Reads a file that [`Document::save`] wrote.
    pub fn load(path: &Path) -> Result<Document> {
        let bytes = std::fs::read(path).map_err(|e| Error::File(e.to_string()).at(path))?;
        let parsed = serde_json::from_slice(&bytes);
        parsed.map_err(|e| Error::File(format!("not a file of `compare`: {e}")).at(path))
    }

    /// Writes a file, replacing one of this name as a whole.
    pub fn save(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string(self);
        let text = text.map_err(|e| Error::Runtime(format!("cannot write JSON: {e}")))?;
        write(path, &text)
    }

    /// What an earlier run left in a file, if there is one, which must be of the same settings.
    pub fn resume(path: &Path, settings: &Settings) -> Result<Vec<Variant>> {
        if !path.exists() {
            return Ok(Vec::new());
        }
        let before = Document::load(path)?;
        let all = json!(settings);
        let names: Vec<&str> =
            all.as_object().iter().flat_map(|o| o.keys().map(String::as_str)).collect();
        if let Some(text) = difference(&before.settings, settings, &names) {
            return Err(Error::Usage(format!("holds another comparison: {text}")).at(path));
        }
        Ok(before.variants)
    }

    /// Puts shards of one comparison together.
    pub fn gather(paths: &[impl AsRef<Path>]) -> Result<Document> {
        let mut all: Option<Document> = None;
        for path in paths.iter().map(AsRef::as_ref) {
            let shard = Document::load(path)?;
            let Some(all) = &mut all else {
                all = Some(shard);
                continue;
            };
            if let Some(text) = difference(&all.settings, &shard.settings, &SHARED) {
                bad_file!("{}: of another comparison: {text}", path.display());
            }
            for variant in shard.variants {
                if !all.variants.iter().any(|v| v.name == variant.name) {
                    all.variants.push(variant);
                }
            }
        }
        match all {
            Some(all) if all.baseline().is_some() => Ok(all),
            Some(_) => bad_file!("no file has a baseline: none was run to its end"),
            None => bad_usage!("no file to gather"),
        }
    }

    /// The model as trained.
    pub fn baseline(&self) -> Option<&Variant> {
        self.variants.iter().find(|v| v.role == Role::Baseline)
    }

    /// Yardsticks, the cheapest first.
    pub fn yardsticks(&self) -> Vec<&Variant> {
        let mut found: Vec<&Variant> =
            self.variants.iter().filter(|v| v.role == Role::Yardstick).collect();
        found.sort_by(|a, b| kl(a).total_cmp(&kl(b)));
        found
    }

    /// All rows with their Pareto rank, in its order, then by divergence; yardsticks have no rank
    /// and come last.
    pub fn ranked(&self) -> Vec<(Option<usize>, &Variant)> {
        let (yardsticks, plans): (Vec<&Variant>, Vec<&Variant>) =
            self.variants.iter().partition(|v| v.role == Role::Yardstick);
        let points: Vec<_> = plans.iter().map(|v| (kl(v), v.gain())).collect();
        let ranks = pareto_ranks(&points).into_iter().map(Some);
        let yardsticks = yardsticks.into_iter().map(|v| (None, v));
        let mut rows: Vec<_> = ranks.zip(plans).chain(yardsticks).collect();
        let key = |row: &(Option<usize>, &Variant)| row.0.unwrap_or(usize::MAX);
        rows.sort_by(|a, b| key(a).cmp(&key(b)).then(kl(a.1).total_cmp(&kl(b.1))));
        rows
    }

    /// The divergence of a variant as a multiple of the nearest yardstick's, by ratio.
    pub fn in_yardsticks(&self, variant: &Variant) -> Option<(f64, &str)> {
        let own = kl(variant);
        let distance = |yardstick: &&Variant| (own / kl(yardstick)).ln().abs();
        let usable = |yardstick: &&Variant| kl(yardstick) > 0.0;
        let all = self.yardsticks();
        let nearest =
            all.into_iter().filter(usable).min_by(|a, b| distance(a).total_cmp(&distance(b)))?;
        let name = nearest.name.strip_prefix("as ").unwrap_or(&nearest.name);
        let told = own > 0.0 && own.is_finite() && variant.role == Role::Variant;
        told.then(|| (own / kl(nearest), name))
    }

    /// One object for each row, in the order of [`Document::ranked`], with the names that `eval` and
    /// `bench` give to what they say too.
    pub fn records(&self) -> Vec<Value> {
        let settings = json!(self.settings);
        let settings = settings.as_object().cloned().unwrap_or_default();
        let record = |(rank, variant): (Option<usize>, &Variant)| {
            let own = json!(variant);
            let mut record = Map::new();
            record.insert("pareto_rank".into(), json!(rank));
            record.extend(own.as_object().cloned().unwrap_or_default());
            let like = self.in_yardsticks(variant);
            record.insert("yardstick".into(), json!(like.map(|l| l.1)));
            record.insert("yardstick_ratio".into(), json!(like.map(|l| l.0)));
            record.extend(settings.clone());
            Value::Object(record)
        };
        self.ranked().into_iter().map(record).collect()
    }

    /// [`Document::records`] as comma-separated values, without what every head does.
    pub fn csv(&self) -> Result<String> {
        let records = self.records();
        let mut names: Vec<&str> = Vec::new();
        for (name, value) in records.iter().filter_map(Value::as_object).flatten() {
            if !value.is_array() && !names.contains(&name.as_str()) {
                names.push(name);
            }
        }
        let cell = |value: &Value| match value {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        let failed = |e: &dyn std::fmt::Display| Error::Runtime(format!("cannot write CSV: {e}"));
        let mut writer = csv::Writer::from_writer(Vec::new());
        writer.write_record(&names).map_err(|e| failed(&e))?;
        for record in &records {
            let cells = names.iter().map(|name| cell(&record[*name]));
            writer.write_record(cells).map_err(|e| failed(&e))?;
        }
        let bytes = writer.into_inner().map_err(|e| failed(&e))?;
        String::from_utf8(bytes).map_err(|e| failed(&e))
    }

    /// What the comparison says, in sentences.
    pub fn findings(&self) -> Vec<String> {
        let variants: Vec<&Variant> =
            self.variants.iter().filter(|v| v.role == Role::Variant).collect();
        let mut out = Vec::new();
        let n = variants.len();
        if let Some((smallest, first)) = self.yardsticks().first().map(|y| (kl(y), *y)) {
            let cheap = variants.iter().filter(|v| kl(v) < smallest).count();
            out.push(format!(
                "{cheap} of {n} variants change less than rounding the weights to {} would (KL {}).",
                first.name.trim_start_matches("as "),
                table::small(smallest)
            ));
        }
        if variants.iter().any(|v| v.get("decode_ratio").is_some()) {
            out.extend(self.findings_on_speed(&variants));
        }
        out
    }
}

impl Document {
    fn findings_on_speed(&self, variants: &[&Variant]) -> Vec<String> {
        let base = self.baseline().map_or("the model as trained", |v| &v.name);
        let faster: Vec<&&Variant> = variants.iter().filter(|v| v.gain() > 1.0).collect();
        let n_noise = variants.iter().filter(|v| v.is_noise("decode")).count();
        // All rounds of one that is as fast are faster with a probability of 2^-rounds.
        let by_chance = variants.len() as f64 * 0.5f64.powi(self.settings.n_rounds as i32);
        let cheapest = faster.iter().min_by(|a, b| kl(a).total_cmp(&kl(b)));
        let mut out = vec![format!(
            "{} of {} decoded faster than {base} in every round; if none were faster, chance would still make it {by_chance:.1}.",
            faster.len(),
            variants.len(),
        )];
        out.extend(cheapest.map(|best| {
            format!(
                "The cheapest of them is {}: {:.2} times the speed, KL {}.",
                best.name,
                best.get("decode_ratio").unwrap_or(f64::NAN),
                table::small(kl(best))
            )
        }));
        out.push(format!("For {n_noise}, no difference in decoding speed was measured."));
        out
    }
}

/// Mean divergence from the model as trained; infinite where there is no number.
fn kl(variant: &Variant) -> f64 {
    variant.get("kl_mean").map_or(f64::INFINITY, |x| x.max(0.0))
}

/// Refuses a file in a folder that is not there, before hours are spent on what goes into it.
pub fn check_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder.is_none_or(Path::is_dir) && !path.is_dir() {
        true => Ok(()),
        false => {
            Err(Error::Runtime("cannot write: no such folder, or a folder itself".into()).at(path))
        }
    }
}

/// Writes a report, replacing a file of this name as a whole.
fn write(path: &Path, text: &str) -> Result<()> {
    replace_file(path, |out| out(text.as_bytes()))
}
