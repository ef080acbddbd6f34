//! Fitting swapped normalizers to an already trained model, without gradients.
//!
//! A head keeps its queries, keys and values. What is fitted is how scores are mapped before the new
//! normalizer sees them, `t x + b + c ln n`, a factor on its weights, and a vector added to the
//! head's output, so that outputs come as near as they can, in the sense of least squares, to those
//! of the normalizer that the model was trained with, on the same scores and values. Offsets start
//! from the line that fits the log of the sum of exponentials over `ln n`: with `-ln sum exp` as
//! its bias, a sigmoid is `p / (1 + p)` of softmax's weight `p`. Layers are fitted in order, each on
//! the inputs that the swapped layers before it give. The objective is that of LoLCATs (arXiv
//! 2410.10254), for some numbers per head instead of a feature map.

use std::sync::{Arc, Mutex};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bad_usage;
use crate::cpu::{Observer, Seen};
use crate::error::{Error, Result};
use crate::measure::heads::line;
use crate::model::Model;
use crate::normalizer::{Choice, Row};
use crate::plan::Plan;
use crate::session::Session;
use crate::simd;

/// What became of one head.
#[derive(Clone, Serialize, Deserialize)]
pub struct Fitted {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// The normalizer with the values that fit best.
    pub choice: Choice,
    /// What is to be added to the head's output. `[value_dim]`
    pub mean: Option<Vec<f32>>,
    /// Distance of the outputs to those wanted, relative to the latter, before the fit.
    pub raw_err: f64,
    /// The same after it.
    pub err: f64,
    /// Mean square of the outputs wanted, per token.
    pub size: f64,
}

/// How heads are fitted.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Rows of scores for each head.
    pub rows: usize,
    /// Whether a mean is added to outputs.
    pub means: bool,
    /// Threads that fit.
    pub n_threads: usize,
}

/// Rows of scores of one head in one sequence.
struct Sample {
    rows: Vec<SampleRow>,
    /// `[n_keys, dim]`
    values: Vec<f32>,
}

struct SampleRow {
    position: usize,
    /// Of visible keys.
    scores: Vec<f32>,
    /// Which those are.
    keys: Vec<u32>,
}

/// Keeps some rows of the heads that are to be fitted.
struct Sampler {
    /// By layer and head; `None` where nothing is to be fitted.
    heads: Vec<Vec<Option<Mutex<Vec<Sample>>>>>,
    /// Every how many-th row is kept.
    step: usize,
}

impl Sampler {
    fn new(wanted: &Plan, trained: &Plan, step: usize) -> Sampler {
        let layers = wanted.layers.iter().zip(&trained.layers).map(|(wanted, trained)| {
            let heads = wanted.normalizers.iter().zip(&trained.normalizers);
            heads.map(|(w, t)| (w.text() != t.text()).then(Mutex::default)).collect()
        });
        Sampler { heads: layers.collect(), step }
    }

    /// What was kept of a head.
    fn take(&self, layer: usize, head: usize) -> Option<Vec<Sample>> {
        Some(std::mem::take(&mut *self.heads[layer][head].as_ref()?.lock().ok()?))
    }
}

impl Observer for Sampler {
    fn wants(&self, layer: usize) -> bool {
        self.heads[layer].iter().any(Option::is_some)
    }

    fn see(&self, seen: &Seen) {
        let Some(samples) = &self.heads[seen.layer][seen.head] else { return };
        let Ok(mut samples) = samples.lock() else { return };
        // Other positions in each sequence.
        let first = samples.len() * 7 % self.step;
        let rows = seen.scores.chunks_exact(seen.n_keys).enumerate();
        let rows = rows.skip(first).step_by(self.step).map(|(t, all)| {
            let visible = || all.iter().zip(0..).filter(|(x, _)| **x > f32::NEG_INFINITY);
            SampleRow {
                position: seen.position + t,
                scores: visible().map(|(x, _)| *x).collect(),
                keys: visible().map(|(_, key)| key).collect(),
            }
        });
        samples.push(Sample { rows: rows.collect(), values: seen.values.to_vec() });
    }
}

/// The fit of one head.
struct Problem<'a> {
    samples: &'a [Sample],
    layer: usize,
    head: usize,
    n_ctx_train: usize,
    dim: usize,
    /// Outputs wanted. `[rows, dim]`
    wanted: Vec<f32>,
    means: bool,
}

/// How well something fits.
struct Outcome {
    /// Sum of squares that remains.
    error: f64,
    gain: f64,
    /// `[dim]`
    mean: Vec<f64>,
}

impl Problem<'_> {
    /// Outputs of the head with a normalizer. `[rows, dim]`
    fn outputs(&self, choice: &Choice) -> Vec<f32> {
        let n_rows: usize = self.samples.iter().map(|s| s.rows.len()).sum();
        let mut out = vec![0.0; n_rows * self.dim];
        let mut weights = Vec::new();
        let rows = self.samples.iter().flat_map(|s| s.rows.iter().map(move |row| (s, row)));
        for (out, (sample, row)) in out.chunks_exact_mut(self.dim).zip(rows) {
            weights.clone_from(&row.scores);
            let Problem { layer, head, n_ctx_train, .. } = *self;
            choice.row(&mut weights, Row { position: row.position, layer, head, n_ctx_train });
            for (w, key) in weights.iter().zip(&row.keys).filter(|(w, _)| **w != 0.0) {
                let value = &sample.values[*key as usize * self.dim..][..self.dim];
                simd::add_scaled(out, *w, value);
            }
        }
        out
    }

    /// Sum of squares of outputs wanted.
    fn size(&self) -> f64 {
        self.wanted.iter().map(|x| f64::from(*x).powi(2)).sum()
    }

    /// The error of a normalizer as it is.
    fn error(&self, choice: &Choice) -> f64 {
        let pairs = self.outputs(choice);
        let pairs = pairs.iter().zip(&self.wanted);
        pairs.map(|(x, y)| f64::from(x - y).powi(2)).sum()
    }

    /// The least error of a normalizer with a gain and a mean: a regression.
    fn regress(&self, choice: &Choice) -> Outcome {
        let mut outputs = self.outputs(choice);
        let mut wanted = self.wanted.clone();
        if choice.value("sinks").is_some_and(|n| n > 0.0)
            && let Ok(choice) = choice.with_values(&[("gain", 0.0)])
        {
            // What sinks give has no gain.
            let fixed = self.outputs(&choice);
            for (i, fixed) in fixed.iter().enumerate() {
                outputs[i] -= fixed;
                wanted[i] -= fixed;
            }
        }
        let n = (wanted.len() / self.dim) as f64;
        let mean_of = |x: &[f32]| -> Vec<f64> {
            let mut mean = vec![0.0; self.dim];
            for row in x.chunks_exact(self.dim).filter(|_| self.means) {
                for (m, x) in mean.iter_mut().zip(row) {
                    *m += f64::from(*x) / n;
                }
            }
            mean
        };
        let (mean_x, mean_y) = (mean_of(&outputs), mean_of(&wanted));
        let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
        for (x, y) in outputs.chunks_exact(self.dim).zip(wanted.chunks_exact(self.dim)) {
            for i in 0..self.dim {
                let (x, y) = (f64::from(x[i]) - mean_x[i], f64::from(y[i]) - mean_y[i]);
                xx += x * x;
                xy += x * y;
                yy += y * y;
            }
        }
        let gain = if xx > 0.0 { xy / xx } else { 0.0 };
        let mean = mean_y.iter().zip(&mean_x).map(|(y, x)| y - gain * x).collect();
        let error = yy - gain * xy;
        Outcome {
            error: if error.is_finite() { error.max(0.0) } else { f64::INFINITY },
            gain,
            mean,
        }
    }
}

/// Rounds what is searched shorter than it matters, so that files are short.
fn short(x: f64) -> f32 {
    format!("{x:.3e}").parse().unwrap_or(0.0)
}

/// Where a search stands: scores become `(t + d ln n) x - t s(n) + m + c ln n`, where `s(n)` is the
/// line of the log of the sum of exponentials, so that `t` alone does not move the weights.
#[derive(Clone, Copy)]
struct Place {
    t: f64,
    d: f64,
    m: f64,
    c: f64,
}

/// First steps of a search: of `ln t`, `d`, `m` and `c`; they are halved down to a small part of that.
const STEPS: [f64; 4] = [0.5, 0.1, 2.0, 0.5];
const SMALLEST_STEP: f64 = 1.0 / 32.0;
/// Most tries for one head.
const MAX_TRIES: usize = 200;

/// A search by coordinates.
struct Search<'a> {
    problem: &'a Problem<'a>,
    start: &'a Choice,
    /// Intercept and slope of `s(n)`.
    line: (f64, f64),
    best: Place,
    error: f64,
    n_tries: usize,
}

impl Search<'_> {
    fn choice(&self, Place { t, d, m, c }: Place) -> Result<Choice> {
        let (intercept, slope) = self.line;
        let values = [
            ("scale", short(t)),
            ("scale_n", short(d)),
            ("offset", short(m - t * intercept)),
            ("offset_n", short(c - t * slope)),
        ];
        self.start.with_values(&values[..self.n_coordinates()])
    }

    /// An offset changes nothing of what no constant changes.
    fn n_coordinates(&self) -> usize {
        if self.start.kind().shift_invariant { 2 } else { 4 }
    }

    /// Goes there if it is better.
    fn try_at(&mut self, at: Place) -> Result<bool> {
        self.n_tries += 1;
        let error = self.problem.regress(&self.choice(at)?).error;
        let better = error < self.error;
        if better {
            (self.best, self.error) = (at, error);
        }
        Ok(better)
    }

    /// Steps along one coordinate after the other, with smaller and smaller steps.
    fn descend(&mut self) -> Result<()> {
        let mut size = 1.0;
        while size >= SMALLEST_STEP && self.n_tries < MAX_TRIES {
            let mut moved = false;
            for (i, step) in STEPS.iter().enumerate().take(self.n_coordinates()) {
                for step in [step * size, -step * size] {
                    let Place { t, d, m, c } = self.best;
                    let at = match i {
                        0 => Place { t: t * step.exp(), ..self.best },
                        1 => Place { d: d + step, ..self.best },
                        2 => Place { m: m + step, ..self.best },
                        _ => Place { c: c + step, ..self.best },
                    };
                    if self.try_at(at)? {
                        moved = true;
                        break;
                    }
                }
            }
            if !moved {
                size /= 2.0;
            }
        }
        Ok(())
    }
}

impl Problem<'_> {
    /// Fits a normalizer whose parameters are those of `start` but for the common ones searched.
    fn fit(&self, start: &Choice) -> Result<Fitted> {
        let value = |name: &str| f64::from(start.value(name).unwrap_or(0.0));
        let rows = self.samples.iter().flat_map(|s| &s.rows);
        let line = line(rows.map(|row| {
            let max = simd::max(&row.scores);
            let log_sum = f64::from(max) + f64::from(simd::sum_of_exp(&row.scores, max)).ln();
            ((row.scores.len() as f64).ln(), log_sum)
        }));
        let t = value("scale");
        let (m, c) = (value("offset") + t * line.0, value("offset_n") + t * line.1);
        let first = Place { t, d: value("scale_n"), m, c };
        let mut search =
            Search { problem: self, start, line, best: first, error: f64::INFINITY, n_tries: 0 };
        search.try_at(first)?;
        let middles: &[f64] =
            if start.kind().shift_invariant { &[0.0] } else { &[0.0, 1.0, 2.0, 4.0, 8.0] };
        for m in middles {
            for t in [t, t * 0.5, t * 2.0] {
                search.try_at(Place { t, m: *m, c: 0.0, ..first })?;
            }
        }
        search.descend()?;
        let size = self.size();
        let choice = search.choice(search.best)?;
        let outcome = self.regress(&choice);
        let relative = |error: f64| if size > 0.0 { (error / size).sqrt() } else { 0.0 };
        // A head whose outputs say nothing about those wanted is left to its mean.
        let choice = choice.with_values(&[("gain", short(outcome.gain))])?;
        let mean = self.means.then(|| outcome.mean.iter().map(|x| short(*x)).collect());
        Ok(Fitted {
            layer: self.layer,
            head: self.head,
            choice,
            mean,
            raw_err: relative(self.error(start)),
            err: relative(outcome.error),
            size: size / (self.wanted.len() / self.dim) as f64,
        })
    }
}

/// Fits the normalizers of `wanted` that are not those the session's model was trained with, on
/// sequences of tokens, under the masks of `wanted`. `swap`: each layer is swapped before the next one is fitted, and the session is
/// left with the fitted plan; otherwise every layer is fitted on the inputs that it was trained with.
/// `done` gets what was fitted in a layer, and the plan so far; layers for which `known` has fits
/// already take these.
pub fn calibrate(
    session: &mut Session,
    sequences: &[Vec<u32>],
    wanted: &Plan,
    (settings, swap): (Settings, bool),
    known: &[Fitted],
    done: &mut dyn FnMut(&[Fitted], &Plan) -> Result<()>,
) -> Result<Vec<Fitted>> {
    let trained = session.model().trained.clone();
    let n_tokens: usize = sequences.iter().map(Vec::len).sum();
    if n_tokens == 0 {
        bad_usage!("calibration needs at least one token");
    }
    let sampler = Sampler::new(wanted, &trained, n_tokens.div_ceil(settings.rows.max(1)));
    let pool = rayon::ThreadPoolBuilder::new().num_threads(settings.n_threads).build();
    let pool = pool.map_err(|e| Error::Runtime(format!("cannot start threads: {e}")))?;
    session.set_plan(trained.with_masks_of(wanted))?;
    let mut fits = Vec::new();
    session.layer_by_layer(sequences, &sampler, &mut |model, layer| {
        let here: Vec<Fitted> = match known.iter().any(|f| f.layer == layer) {
            true => known.iter().filter(|f| f.layer == layer).cloned().collect(),
            false => pool.install(|| fit_layer(model, &sampler, wanted, layer, settings.means))?,
        };
        let mut plan = model.plan.clone();
        if swap {
            apply(&mut plan, &here);
            model.set_plan(plan.clone());
        }
        done(&here, &plan)?;
        fits.extend(here);
        Ok(true)
    })?;
    Ok(fits)
}

/// Puts fits into a plan.
pub fn apply(plan: &mut Plan, fits: &[Fitted]) {
    for fit in fits {
        plan.layers[fit.layer].normalizers[fit.head] = fit.choice.clone();
        plan.layers[fit.layer].means[fit.head] = fit.mean.as_deref().map(Arc::from);
    }
}

fn fit_layer(
    model: &Model,
    sampler: &Sampler,
    wanted: &Plan,
    layer: usize,
    means: bool,
) -> Result<Vec<Fitted>> {
    let fit = |(head, trained): (usize, &Choice)| {
        let samples = sampler.take(layer, head)?;
        let mut problem = Problem {
            samples: &samples,
            layer,
            head,
            n_ctx_train: model.hparams.n_ctx_train,
            dim: model.attention[layer].geometry.outputs(head).len(),
            wanted: Vec::new(),
            means,
        };
        problem.wanted = problem.outputs(trained);
        Some(problem.fit(&wanted.layers[layer].normalizers[head]))
    };
    model.trained.layers[layer].normalizers.par_iter().enumerate().filter_map(fit).collect()
}
