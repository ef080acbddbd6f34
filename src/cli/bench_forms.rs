//! `qkov bench --forms`: what forms take, as predicted and as measured.

use std::sync::Arc;

use serde_json::{Value, json};

use super::bench::Bench;
use super::terminal::{print, progress};
use crate::bad_usage;
use crate::error::{Error, Result};
use crate::measure::choose::wherever;
use crate::measure::latency::percentile;
use crate::measure::timing::{N_PROBE, Parts, Timing, fastest, in_turns, shapes, total};
use crate::merge::{Choice, FORMS};
use crate::model::Model;
use crate::session::Session;

/// A form at a depth.
struct Row {
    form: String,
    n_prompt: usize,
    n_depth: usize,
    weights: usize,
    cache_bytes: f64,
    prompt: Pace,
    token: Pace,
}

/// Tokens per second of a form, what that is of the model as it is, and what it was to be of it.
#[derive(Clone, Copy)]
struct Pace {
    rate: f64,
    /// Of the fastest rounds.
    ratio: f64,
    /// Half of the rounds lie between.
    between: [f64; 2],
    predicted: f64,
}

impl Pace {
    /// From seconds of the model as it is and of the form, in rounds that follow each other.
    fn new([base, own]: [&[[f64; 2]]; 2], phase: usize, predicted: f64) -> Pace {
        let mut ratios: Vec<f64> = base.iter().zip(own).map(|(a, b)| a[phase] / b[phase]).collect();
        ratios.sort_by(f64::total_cmp);
        let [base, own] = [base, own].map(|rounds| fastest(rounds)[phase]);
        Pace {
            rate: 1.0 / own,
            ratio: base / own,
            between: [0.25, 0.75].map(|share| percentile(&ratios, share)),
            predicted,
        }
    }
}

/// A model in a form, or why it cannot be.
type Made = std::result::Result<Session, String>;

impl Bench {
    pub(super) fn forms(&self) -> Result<()> {
        let &[n_prompt] = &self.n_prompt[..] else {
            bad_usage!("--forms: one length of a prompt");
        };
        let n_prompt = n_prompt.max(1);
        let deepest = self.n_depth.iter().max().copied().unwrap_or(0);
        let n_ctx = deepest.max(N_PROBE) + n_prompt + 8;
        let mut base = self.session(Model::from_gguf(self.gguf()?)?, n_ctx)?;
        let forms = self.choices()?;
        let bar = progress(self.n_depth.len() * (1 + forms.len()), "times");
        let mut known = Vec::new();
        for n_depth in &self.n_depth {
            let timing = Timing::measure(&mut base, n_prompt, *n_depth)?;
            known.push((*n_depth, timing, Parts::of(&base, *n_depth)));
            bar.inc(1);
        }
        let (mut rows, mut refused) = (Vec::new(), String::new());
        for choice in &forms {
            let mut session = match self.made(choice, n_ctx)? {
                Ok(session) => session,
                Err(reason) => {
                    refused += &format!("{}: {reason}\n", choice.text());
                    continue;
                }
            };
            let cost = total(base.model(), shapes(session.model()));
            let probe = match choice.form().rewrites() {
                true => None,
                false => Some(Timing::measure(&mut session, n_prompt, N_PROBE)?),
            };
            for (n_depth, timing, parts) in &known {
                let predicted = probe.unwrap_or_else(|| timing.scaled(parts, cost));
                let pair = &mut [&mut base, &mut session];
                let n_rounds = usize::from(self.repetitions);
                let times = in_turns(pair, n_prompt, *n_depth, n_rounds)?;
                let rounds = [&times[0][..], &times[1][..]];
                let of = |seconds: &dyn Fn(&Timing) -> f64| seconds(timing) / seconds(&predicted);
                rows.push(Row {
                    form: session.model().plan.names()[1].clone(),
                    n_prompt,
                    n_depth: *n_depth,
                    weights: cost.weights,
                    cache_bytes: session.cache_bytes() as f64 / session.n_ctx() as f64,
                    prompt: Pace::new(rounds, 1, of(&|t| t.together(n_prompt, *n_depth))),
                    token: Pace::new(rounds, 0, of(&|t| t.alone(*n_depth))),
                });
                bar.inc(1);
            }
        }
        bar.finish_and_clear();
        let json = rows.iter().map(|row| self.json_row(row)).collect();
        self.report(json, || print((markdown(&rows) + &refused).as_bytes()))
    }

    /// Those that were asked for; without any, all that keep the file's matrices, and two of low rank.
    fn choices(&self) -> Result<Vec<Choice>> {
        if !self.run.form.is_empty() {
            return self.run.form.iter().map(|text| Choice::parse(text)).collect();
        }
        let exact = FORMS.iter().filter(|f| !f.rewrites() && f.name() != "split");
        let all = exact.map(|f| Choice::of(*f)).chain([
            Choice::parse("lowrank:ratio=0.75,data=no")?,
            Choice::parse("lowrank:ratio=0.5,data=no")?,
        ]);
        Ok(all.collect())
    }

    fn session(&self, mut model: Model, n_ctx: usize) -> Result<Session> {
        self.run.norm.iter().try_for_each(|text| model.set_normalizers(text))?;
        let n_ctx = model.hparams.within_positions(n_ctx);
        self.run.quiet_session(Arc::new(model), n_ctx)
    }

    /// A model in a form, in every layer that can have it.
    fn made(&self, choice: &Choice, n_ctx: usize) -> Result<Made> {
        let mut model = Model::from_gguf(self.gguf()?)?;
        self.run.norm.iter().try_for_each(|text| model.set_normalizers(text))?;
        let plan = match wherever(&model, &model.plan, choice) {
            Ok(plan) => plan,
            Err(reason) => return Ok(Err(reason)),
        };
        let (model, layers) = self.run.new_layers(model, plan)?;
        let model = Model::from_gguf(model.rewritten(&layers, None)?)?;
        match self.session(model, n_ctx) {
            Ok(session) => Ok(Ok(session)),
            // What only shows in the weights.
            Err(Error::Usage(reason)) => Ok(Err(reason)),
            Err(e) => Err(e),
        }
    }

    fn json_row(&self, row: &Row) -> Value {
        let pace = |p: Pace| {
            let Pace { rate, ratio, between, predicted } = p;
            json!({"ts": rate, "ratio": ratio, "ratio_quartiles": between, "predicted_ratio": predicted})
        };
        let [prompt, token] = [row.prompt, row.token].map(pace);
        json!({
            "build_commit": env!("QKOV_REVISION"), "model_filename": self.name(), "form": row.form,
            "n_prompt": row.n_prompt, "n_depth": row.n_depth, "attn_weights": row.weights,
            "cache_bytes_per_token": row.cache_bytes, "prefill": prompt, "decode": token,
        })
    }
}

fn markdown(rows: &[Row]) -> String {
    let mut text = String::from(
        "| form | depth | cache B/token | prompt t/s | of split | predicted | token t/s | of split | predicted |\n\
         | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n",
    );
    for row in rows {
        let side = |p: Pace| {
            let [low, high] = p.between;
            format!("{:.1} | {:.2} ({low:.2} to {high:.2}) | {:.2}", p.rate, p.ratio, p.predicted)
        };
        let (prompt, token) = (side(row.prompt), side(row.token));
        text += &format!(
            "| {} | {} | {:.0} | {prompt} | {token} |\n",
            row.form, row.n_depth, row.cache_bytes
        );
    }
    text
}
