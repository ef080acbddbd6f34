//! Scores, weights, values and outputs of heads, kept to be looked at.

use std::ops::Range;
use std::sync::Mutex;

use crate::bad_usage;
use crate::cpu::{Observer, Seen};
use crate::error::Result;
use crate::session::Session;

/// What the heads of one layer did with a sequence of `n` tokens, all copies of the prompt.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Record {
    /// Layer, from 0.
    pub layer: usize,
    /// By query head.
    pub heads: Vec<HeadRecord>,
}

/// What one head did.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HeadRecord {
    /// Scaled scores; minus infinity for hidden keys. `[n, n]`
    pub scores: Vec<f32>,
    /// `[n, n]`
    pub weights: Vec<f32>,
    /// `[n, value_dim]`
    pub values: Vec<f32>,
    /// `[n, value_dim]`
    pub outputs: Vec<f32>,
}

struct Recorder {
    layers: Range<usize>,
    /// By layer among those wanted and head.
    heads: Vec<Vec<Mutex<HeadRecord>>>,
    n: usize,
}

impl Observer for Recorder {
    fn wants(&self, layer: usize) -> bool {
        self.layers.contains(&layer)
    }

    fn see(&self, seen: &Seen) {
        let head = &self.heads[seen.layer - self.layers.start][seen.head];
        let Ok(mut head) = head.lock() else { return };
        // Of a batch that is not the last, rows are shorter than the whole sequence.
        let mut widen = |to: fn(&mut HeadRecord) -> &mut Vec<f32>, from: &[f32], fill: f32| {
            for row in from.chunks_exact(seen.n_keys) {
                let to = to(&mut head);
                to.extend(row);
                to.resize(to.len() + self.n - row.len(), fill);
            }
        };
        widen(|h| &mut h.scores, seen.scores, f32::NEG_INFINITY);
        widen(|h| &mut h.weights, seen.weights, 0.0);
        head.values = seen.values.to_vec();
        head.outputs.extend(seen.outputs);
    }
}

/// Reads a sequence from the beginning as a prompt, and records the heads of some layers.
pub fn record(session: &mut Session, tokens: &[u32], layers: Range<usize>) -> Result<Vec<Record>> {
    let model = session.model().clone();
    let n_layer = model.layers.len();
    if layers.is_empty() || layers.end > n_layer {
        bad_usage!("layers {} to {}; the model has 0 to {}", layers.start, layers.end, n_layer - 1);
    }
    let heads = layers.clone().map(|i| {
        let n_head = model.attention[i].geometry.n_head;
        (0..n_head).map(|_| Mutex::default()).collect()
    });
    session.rewind(0);
    let n = session.n_positions(tokens, &[]);
    let recorder = Recorder { layers: layers.clone(), heads: heads.collect(), n };
    session.feed_prompt_observed(tokens, &recorder)?;
    let take = |head: Mutex<HeadRecord>| head.into_inner().unwrap_or_default();
    let records = layers
        .zip(recorder.heads)
        .map(|(layer, heads)| Record { layer, heads: heads.into_iter().map(take).collect() });
    Ok(records.collect())
}
