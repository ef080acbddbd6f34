//! What is done beside texts, a step at a time between theirs, so that none of them waits long.

use std::sync::Mutex;

use tokio::sync::mpsc::UnboundedSender;

use super::job::{Comparison, Job, Logprobs, Look, Map, Scored};
use crate::arch::Pooling;
use crate::bad_usage;
use crate::cpu::{Observer, Seen};
use crate::engine::Asked;
use crate::error::Result;
use crate::measure::divergence::Row;
use crate::measure::heads::RowStats;
use crate::session::pool::{Ask, Pool, Sequence, Step};

/// Tokens that a comparison takes in a step, with each variant.
const N_COMPARED: usize = 64;

/// Something that takes several steps.
pub(super) trait Task: Send {
    /// Takes a step. Whether it is over.
    fn step(&mut self, pool: &mut Pool) -> bool;
}

/// Begins a job that is not a text to write, or tells why it cannot be begun.
pub(super) fn new(job: Job, pool: &mut Pool) -> Option<Box<dyn Task>> {
    match job {
        Job::Generate(..) => None,
        Job::Embed { texts, ask, pooling, answer } => {
            let sequence = tell(&answer, empty(pool, &ask))?;
            Some(Box::new(Embeds { texts: texts.into_iter(), sequence, pooling, answer }))
        }
        Job::Compare(comparison, answer) => {
            let pair = tell(&answer, Pair::new(comparison, pool))?;
            Some(Box::new(Compares { pair, answer }))
        }
        Job::Look(look, answer) => {
            let sequence = tell(&answer, empty(pool, &look.ask))?;
            Some(Box::new(Looks { look, sequence, answer }))
        }
    }
}

/// A result, if it is one; the error goes to who asked, who may be gone.
fn tell<T, A>(answer: &UnboundedSender<Result<A>>, result: Result<T>) -> Option<T> {
    result.map_err(|e| answer.send(Err(e))).ok()
}

fn empty(pool: &mut Pool, ask: &Ask) -> Result<Sequence> {
    let variant = pool.variant(ask)?;
    pool.sequence(variant)
}

/// Texts to embed, one a step.
struct Embeds {
    texts: std::vec::IntoIter<Vec<u32>>,
    sequence: Sequence,
    pooling: Pooling,
    answer: UnboundedSender<Result<Vec<f32>>>,
}

impl Task for Embeds {
    fn step(&mut self, pool: &mut Pool) -> bool {
        let Some(tokens) = self.texts.next() else { return true };
        let embedding = pool.embed(&mut self.sequence, &tokens, self.pooling);
        let failed = embedding.is_err();
        let gone = self.answer.send(embedding).is_err();
        failed || gone || self.texts.len() == 0
    }
}

/// A text to score with two variants, some tokens a step.
struct Compares {
    pair: Pair,
    answer: UnboundedSender<Result<Scored>>,
}

struct Pair {
    comparison: Comparison,
    sequences: [Sequence; 2],
    /// Logits of both before the next token of the reply.
    before: [Vec<f32>; 2],
    n_done: usize,
}

impl Task for Compares {
    fn step(&mut self, pool: &mut Pool) -> bool {
        if self.answer.is_closed() {
            return true;
        }
        let step = self.pair.step(pool, &mut |scored| self.answer.send(Ok(scored)).is_ok());
        tell(&self.answer, step).unwrap_or(true)
    }
}

impl Pair {
    fn new(comparison: Comparison, pool: &mut Pool) -> Result<Pair> {
        let [a, b] = &comparison.asks;
        if comparison.reply.is_empty() {
            bad_usage!("the reply has no tokens; 1 or more are needed");
        }
        let mut sequences = [empty(pool, a)?, empty(pool, b)?];
        let Comparison { prompt, reply, .. } = &comparison;
        for sequence in &mut sequences {
            pool.begin(sequence, prompt, false)?;
            let n = sequence.n_todo() + reply.len();
            if n > pool.n_ctx() {
                bad_usage!("{n} tokens do not fit a context of {}", pool.n_ctx());
            }
        }
        Ok(Pair { comparison, sequences, before: Default::default(), n_done: 0 })
    }

    /// Reads more of both, and gives what it makes of the reply's tokens. Whether that was all.
    fn step(&mut self, pool: &mut Pool, give: &mut dyn FnMut(Scored) -> bool) -> Result<bool> {
        let Comparison { reply, n_top, .. } = &self.comparison;
        let all = self.before.iter().all(|logits| !logits.is_empty());
        let next = &reply[self.n_done..reply.len().min(self.n_done + N_COMPARED)];
        if all {
            self.sequences.iter_mut().for_each(|sequence| sequence.push(next));
        }
        let mut logits = Vec::new();
        // While the prompt is read, one may be done before the other.
        let reading = self.sequences.iter_mut().filter(|sequence| sequence.n_todo() > 0);
        let mut steps: Vec<Step> =
            reading.map(|sequence| Step { sequence, n: N_COMPARED, all }).collect();
        let rows = pool.forward(&mut steps, None, (Asked::Logits, &mut logits))?;
        if !all {
            let unread = self.before.iter_mut().filter(|before| before.is_empty());
            for (before, rows) in unread.zip(rows) {
                before.extend_from_slice(&logits[rows]);
            }
            return Ok(false);
        }
        let n_vocab = pool.model().hparams.n_vocab;
        let [a, b] = [&rows[0], &rows[1]].map(|rows| logits[rows.clone()].chunks_exact(n_vocab));
        let [first, second] = &self.before;
        let pairs = std::iter::once((&first[..], &second[..])).chain(a.zip(b));
        for ((a, b), id) in pairs.zip(next) {
            let kl = Row::new(a).kl(&Row::new(b)).max(0.0);
            let logprobs = [a, b].map(|row| Logprobs::of(row, *id, *n_top));
            if !give(Scored { id: *id, kl, logprobs }) {
                return Ok(true);
            }
        }
        for (before, rows) in self.before.iter_mut().zip(&rows) {
            before.clear();
            before.extend_from_slice(&logits[rows.end - n_vocab..rows.end]);
        }
        self.n_done += next.len();
        Ok(self.n_done == reply.len())
    }
}

/// A look at the heads of a layer.
struct Looks {
    look: Look,
    sequence: Sequence,
    answer: UnboundedSender<Result<Map>>,
}

impl Task for Looks {
    fn step(&mut self, pool: &mut Pool) -> bool {
        let map = self.map(pool);
        // Whoever asked may be gone.
        let _ = self.answer.send(map);
        true
    }
}

impl Looks {
    fn map(&mut self, pool: &mut Pool) -> Result<Map> {
        let Look { tokens, n_prompt, layer, head, .. } = &self.look;
        let n_layers = pool.model().layers.len();
        if *layer >= n_layers {
            bad_usage!("layer {layer}; the model has 0 to {}", n_layers - 1);
        }
        let n_heads = pool.model().hparams.layers[*layer].n_head;
        if *head >= n_heads {
            bad_usage!("head {head}; layer {layer} has 0 to {}", n_heads - 1);
        }
        let prompt = &tokens[..tokens.len().min(*n_prompt)];
        pool.begin(&mut self.sequence, prompt, false)?;
        let n = self.sequence.n_todo() + tokens.len() - prompt.len();
        if n > pool.n_ctx() {
            bad_usage!("{n} tokens do not fit a context of {}", pool.n_ctx());
        }
        let watch = Watch {
            layer: *layer,
            head: *head,
            weights: Mutex::new(vec![0.0; n * n]),
            n,
            heads: (0..n_heads).map(|_| Mutex::default()).collect(),
        };
        for rest in [&[][..], &tokens[prompt.len()..]] {
            self.sequence.push(rest);
            while self.sequence.n_todo() > 0 {
                let n = self.sequence.n_todo();
                let step = Step { sequence: &mut self.sequence, n, all: false };
                pool.forward(&mut [step], Some(&watch), (Asked::Logits, &mut Vec::new()))?;
            }
        }
        let weights = watch.weights.into_inner().unwrap_or_default();
        let heads = watch.heads.into_iter().map(|head| head.into_inner().unwrap_or_default());
        let mean = |sum: f64| (sum / n as f64) as f32;
        let (entropy, first) = heads.map(|[h, first]| (mean(h), mean(first))).unzip();
        Ok(Map { weights, entropy, first })
    }
}

/// Keeps the weights of a head, and sums of all heads of its layer: entropies, weights of the first token.
struct Watch {
    layer: usize,
    head: usize,
    n: usize,
    weights: Mutex<Vec<f32>>,
    heads: Vec<Mutex<[f64; 2]>>,
}

impl Observer for Watch {
    fn wants(&self, layer: usize) -> bool {
        layer == self.layer
    }

    fn see(&self, seen: &Seen) {
        let weights = || seen.weights.chunks_exact(seen.n_keys);
        if let Ok(mut sums) = self.heads[seen.head].lock() {
            for (scores, weights) in seen.scores.chunks_exact(seen.n_keys).zip(weights()) {
                let stats = RowStats::new(scores, weights);
                sums[0] += f64::from(stats.entropy);
                sums[1] += f64::from(stats.sink);
            }
        }
        if seen.head != self.head {
            return;
        }
        if let Ok(mut all) = self.weights.lock() {
            for (row, weights) in all.chunks_exact_mut(self.n).skip(seen.position).zip(weights()) {
                row[..weights.len()].copy_from_slice(weights);
            }
        }
    }
}
