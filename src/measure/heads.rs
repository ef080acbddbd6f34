//! What every head does: statistics of its scores, weights and outputs.
//!
//! Definitions: entropy and support of a row are those of `|w| / sum |w|`, so that weights which do not
//! sum to 1 can be compared; the sum itself, the row's mass, is reported apart.

use std::sync::{Arc, Mutex};

use crate::bad_usage;
use crate::cpu::{Observer, Seen};
use crate::error::Result;
use crate::measure::quality::Windows;
use crate::model::Model;
use crate::normalizer::{Choice, Row};
use crate::session::Session;

/// What one head does, over all rows that were seen.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadStats {
    /// Layer, from 0.
    pub layer: usize,
    /// Query head, from 0.
    pub head: usize,
    /// Its normalizer.
    pub norm: String,
    /// Rows of weights, one for each token read.
    pub rows: Vec<RowStats>,
    /// Distance of its outputs to what the normalizer that the model was trained with makes of the
    /// same scores and values, relative to the length of the latter:
    /// `sqrt(sum |o - o'|^2 / sum |o'|^2)`.
    pub output_err: f64,
}

/// What was seen of one row of weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowStats {
    /// Keys that the mask shows.
    pub n: u32,
    /// Sum of the weights.
    pub mass: f32,
    /// Weight of the sequence's first token.
    pub sink: f32,
    /// In nats.
    pub entropy: f32,
    /// Weights that are not zero.
    pub support: u32,
    /// `1 / sum p^2`: keys over which an even row of the same sharpness would spread.
    pub effective: f32,
    /// `ln sum exp` of the scores.
    pub log_sum: f32,
}

impl RowStats {
    /// Statistics of the scores and weights of all keys, hidden ones among them. The same lengths.
    pub fn new(scores: &[f32], weights: &[f32]) -> RowStats {
        let (mut n, mut mass, mut size, mut support) = (0, 0.0f64, 0.0f64, 0);
        let max = scores.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x));
        let mut sum_exp = 0.0f64;
        for (x, w) in scores.iter().zip(weights).filter(|(x, _)| **x > f32::NEG_INFINITY) {
            n += 1;
            mass += f64::from(*w);
            size += f64::from(w.abs());
            support += u32::from(*w != 0.0);
            sum_exp += f64::from(x - max).exp();
        }
        let (mut entropy, mut squares) = (0.0f64, 0.0f64);
        for w in weights.iter().filter(|w| **w != 0.0) {
            let p = f64::from(w.abs()) / size;
            entropy -= p * p.ln();
            squares += p * p;
        }
        RowStats {
            n,
            mass: mass as f32,
            sink: weights.first().copied().unwrap_or(0.0),
            entropy: entropy as f32,
            support,
            effective: if squares > 0.0 { (1.0 / squares) as f32 } else { 0.0 },
            log_sum: (f64::from(max) + sum_exp.ln()) as f32,
        }
    }
}

impl RowStats {
    /// Share of the visible keys that have a weight.
    pub fn support_share(&self) -> f32 {
        self.support as f32 / self.n.max(1) as f32
    }
}

impl HeadStats {
    /// Mean over all rows of something about them.
    pub fn mean(&self, of: impl Fn(&RowStats) -> f32) -> f64 {
        self.rows.iter().map(|r| f64::from(of(r))).sum::<f64>() / self.rows.len() as f64
    }

    /// `(intercept, slope)` of the line that fits `log_sum` over `ln n` best.
    pub fn log_sum_over_n(&self) -> (f64, f64) {
        line(self.rows.iter().map(|r| (f64::from(r.n).ln(), f64::from(r.log_sum))))
    }
}

/// `(intercept, slope)` of the line that fits points best, in the sense of least squares.
pub(super) fn line(points: impl Iterator<Item = (f64, f64)> + Clone) -> (f64, f64) {
    let n = points.clone().count() as f64;
    let (x, y) = points.clone().fold((0.0, 0.0), |m, p| (m.0 + p.0 / n, m.1 + p.1 / n));
    let (xx, xy) =
        points.fold((0.0, 0.0), |m, p| (m.0 + (p.0 - x) * (p.0 - x), m.1 + (p.0 - x) * (p.1 - y)));
    let slope = if xx > 0.0 { xy / xx } else { 0.0 };
    (y - slope * x, slope)
}

/// Collects [`HeadStats`].
struct Collector {
    /// By layer and head: the normalizer trained with where it is not the one in use, and what is
    /// known so far.
    heads: Vec<Vec<Mutex<Collected>>>,
    n_ctx_train: usize,
}

struct Collected {
    trained: Option<Choice>,
    /// What is added to outputs.
    mean: Option<Arc<[f32]>>,
    rows: Vec<RowStats>,
    error: f64,
    size: f64,
}

impl Collector {
    fn new(model: &Model) -> Collector {
        let layers = model.plan.layers.iter().zip(&model.trained.layers);
        let heads = layers.map(|(layer, trained)| {
            let heads = layer.normalizers.iter().zip(&trained.normalizers).zip(&layer.means);
            let head = heads.map(|((used, trained), mean)| {
                let trained = (used.text() != trained.text()).then(|| trained.clone());
                let mean = mean.clone();
                Mutex::new(Collected { trained, mean, rows: Vec::new(), error: 0.0, size: 0.0 })
            });
            head.collect()
        });
        Collector { heads: heads.collect(), n_ctx_train: model.hparams.n_ctx_train }
    }
}

impl Observer for Collector {
    fn wants(&self, _layer: usize) -> bool {
        true
    }

    fn see(&self, seen: &Seen) {
        let Ok(mut head) = self.heads[seen.layer][seen.head].lock() else { return };
        let rows =
            seen.scores.chunks_exact(seen.n_keys).zip(seen.weights.chunks_exact(seen.n_keys));
        head.rows.extend(rows.clone().map(|(scores, weights)| RowStats::new(scores, weights)));
        let Some(trained) = head.trained.clone() else { return };
        let dim = seen.values.len() / seen.n_keys;
        let mean = head.mean.clone().unwrap_or_else(|| vec![0.0; dim].into());
        let (mut row, mut wanted) = (Vec::new(), vec![0.0f32; dim]);
        for (t, (scores, output)) in
            seen.scores.chunks_exact(seen.n_keys).zip(seen.outputs.chunks_exact(dim)).enumerate()
        {
            let is_visible = |x: &&f32| **x > f32::NEG_INFINITY;
            row.clear();
            row.extend(scores.iter().filter(is_visible));
            let (position, layer) = (seen.position + t, seen.layer);
            let at = Row { position, layer, head: seen.head, n_ctx_train: self.n_ctx_train };
            trained.row(&mut row, at);
            wanted.fill(0.0);
            let values = scores.iter().zip(seen.values.chunks_exact(dim));
            let visible = values.filter(|(x, _)| is_visible(x));
            for (w, (_, value)) in row.iter().zip(visible) {
                crate::simd::add_scaled(&mut wanted, *w, value);
            }
            for ((o, wanted), mean) in output.iter().zip(&wanted).zip(mean.iter()) {
                head.error += f64::from(o + mean - wanted).powi(2);
                head.size += f64::from(*wanted).powi(2);
            }
        }
    }
}

/// Reads the first `n` windows (or all), and tells what every head did, by layer and head. `progress`
/// is called after every window with its number.
pub fn observe(
    session: &mut Session,
    windows: &Windows,
    n: usize,
    progress: &mut dyn FnMut(usize),
) -> Result<Vec<HeadStats>> {
    let model = session.model().clone();
    let collector = Collector::new(&model);
    for (i, window) in windows.inputs(&model.tokenizer).take(n).enumerate() {
        session.rewind(0);
        let (prompt, rest) = window.split_at(windows.n_prompt());
        session.feed_prompt_observed(prompt, &collector)?;
        session.feed_observed(rest, 0..0, &collector)?;
        progress(i + 1);
    }
    let mut stats = Vec::new();
    for (layer, heads) in collector.heads.into_iter().enumerate() {
        for (head, collected) in heads.into_iter().enumerate() {
            let Ok(Collected { rows, error, size, .. }) = collected.into_inner() else {
                bad_usage!("head {layer}.{head} was not observed to the end");
            };
            let norm = model.plan.layers[layer].normalizers[head].text();
            let output_err = if size > 0.0 { (error / size).sqrt() } else { 0.0 };
            stats.push(HeadStats { layer, head, norm, rows, output_err });
        }
    }
    Ok(stats)
}
