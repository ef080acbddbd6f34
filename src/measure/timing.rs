//! What forms take on this machine: timed where a model can have them as it is, predicted from another
//! form's times where matrices have yet to be made.
//!
//! A token alone takes `base + slope * n` with `n` tokens in the cache, and so does each of a prompt with
//! the mean number of tokens that it sees. Bases go with what is read of the weights, or multiplied with
//! them, and slopes with what is multiplied for each token that is seen, but for what normalizers take.

use std::time::Instant;

use crate::error::Result;
use crate::merge::{Cost, Geometry};
use crate::model::{Model, Weight};
use crate::session::Session;

/// Cached tokens with which forms are timed whose times with more are predicted.
pub const N_PROBE: usize = 256;
/// Rounds, of which the fastest counts.
const N_ROUNDS: usize = 3;
/// Tokens of a round that are read one by one.
const N_ALONE: usize = 6;
/// Most scores that normalizers are timed with.
const MAX_SCORES: usize = 2048;

/// Seconds by the number of tokens seen.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Line {
    base: f64,
    slope: f64,
}

impl Line {
    /// Through two points, of which the second may be the first.
    fn through([(x, y), (far, y_far)]: [(f64, f64); 2]) -> Line {
        // Noise can make less of more.
        let slope = if far > x { ((y_far - y) / (far - x)).max(0.0) } else { 0.0 };
        Line { base: y_far - slope * far, slope }
    }

    fn at(self, n: f64) -> f64 {
        self.base + self.slope * n
    }

    /// With other shares: `part` of the base is `base` times what it was, and what is not `fixed` of
    /// the slope is `slope` times.
    fn scaled(self, part: f64, base: f64, fixed: f64, slope: f64) -> Line {
        let fixed = fixed.min(self.slope);
        Line {
            base: self.base * (1.0 + part * (base - 1.0)),
            slope: fixed + (self.slope - fixed) * slope,
        }
    }

    /// This line, and a share of what lies between two others.
    fn moved(self, share: f64, from: Line, to: Line) -> Line {
        Line {
            base: self.base + share * (to.base - from.base),
            slope: self.slope + share * (to.slope - from.slope),
        }
    }
}

/// Times of a model in one form.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timing {
    /// Of a token alone, by the number of tokens in the cache.
    alone: Line,
    /// Of each token of a prompt, by the mean number that they see.
    together: Line,
}

/// What a session's times are made of.
#[derive(Debug, Clone, Copy)]
pub struct Parts {
    /// Attention of all layers.
    cost: Cost,
    /// Its share of the bytes of weights that a token reads, and of the products with them.
    byte_share: f64,
    product_share: f64,
    /// What normalizers take for each token that is seen.
    normalizing: f64,
}

/// Seconds of a token alone, the fastest of several, and of each of `n_prompt` together, after `depth`
/// others.
fn round_at(session: &mut Session, n_prompt: usize, depth: usize) -> Result<[f64; 2]> {
    let prompt = vec![0; n_prompt];
    session.pretend(depth)?;
    let time = |session: &mut Session, tokens: &[u32]| -> Result<f64> {
        let start = Instant::now();
        session.feed(tokens)?;
        Ok(start.elapsed().as_secs_f64() / tokens.len() as f64)
    };
    let together = time(session, &prompt)?;
    session.rewind(depth);
    let mut alone = f64::INFINITY;
    for _ in 0..N_ALONE.min(session.n_ctx() - depth) {
        alone = alone.min(time(session, &prompt[..1])?);
    }
    Ok([alone, together])
}

/// Times of several sessions in turns, each with `n_depth` tokens cached before: in every round, seconds of
/// a token alone and of each of `n_prompt` together. They forget all tokens.
pub fn in_turns(
    sessions: &mut [&mut Session],
    n_prompt: usize,
    n_depth: usize,
    n_rounds: usize,
) -> Result<Vec<Vec<[f64; 2]>>> {
    let mut times = vec![Vec::new(); sessions.len()];
    for round in 0..n_rounds {
        for i in 0..sessions.len() {
            // What follows what changes from round to round.
            let i = if round % 2 == 0 { i } else { sessions.len() - 1 - i };
            times[i].push(round_at(sessions[i], n_prompt, n_depth)?);
        }
    }
    Ok(times)
}

/// The fastest of all rounds, as what else runs only ever adds time.
pub fn fastest(rounds: &[[f64; 2]]) -> [f64; 2] {
    rounds.iter().fold([f64::INFINITY; 2], |best, t| [best[0].min(t[0]), best[1].min(t[1])])
}

/// What all layers of these shapes cost together.
pub fn total<'a>(model: &Model, layers: impl Iterator<Item = &'a Geometry>) -> Cost {
    layers.map(|g| g.cost(&model.hparams)).sum()
}

/// The shapes of a model's layers as they are.
pub fn shapes(model: &Model) -> impl Iterator<Item = &Geometry> {
    model.attention.iter().map(|a| &a.geometry)
}

impl Timing {
    /// Times a session, with a cache that is empty and then `n_depth` tokens long, or as near to that as
    /// it has room for beside `n_prompt` tokens that are read together; it forgets all tokens.
    pub fn measure(session: &mut Session, n_prompt: usize, n_depth: usize) -> Result<Timing> {
        let room = session.n_ctx();
        let n_prompt = n_prompt.clamp(1, room.max(1));
        let deep = n_depth.min(room.saturating_sub(n_prompt.max(N_ALONE)));
        let mut at = |depth: usize| -> Result<[f64; 2]> {
            Ok(fastest(&in_turns(&mut [&mut *session], n_prompt, depth, N_ROUNDS)?[0]))
        };
        let (empty, full) = (at(0)?, at(deep)?);
        let line =
            |i: usize, seen: f64| Line::through([(seen, empty[i]), (deep as f64 + seen, full[i])]);
        Ok(Timing { alone: line(0, 0.0), together: line(1, n_prompt as f64 / 2.0) })
    }

    /// Of the same model with attention that costs `new`, whose keys and values are cached as they are
    /// with `parts`.
    pub fn scaled(&self, parts: &Parts, new: Cost) -> Timing {
        let old = parts.cost;
        let ratio = |of: fn(&Cost) -> usize| of(&new) as f64 / of(&old).max(1) as f64;
        let fixed = parts.normalizing;
        Timing {
            alone: self.alone.scaled(
                parts.byte_share,
                ratio(|c| c.weights),
                fixed,
                ratio(|c| c.attended),
            ),
            together: self.together.scaled(
                parts.product_share,
                ratio(|c| c.products),
                fixed,
                ratio(|c| c.attended_together),
            ),
        }
    }

    /// These times, and a share of what lies between two others.
    pub fn moved(&self, share: f64, (from, to): (&Timing, &Timing)) -> Timing {
        Timing {
            alone: self.alone.moved(share, from.alone, to.alone),
            together: self.together.moved(share, from.together, to.together),
        }
    }

    /// Seconds of a token alone, with `n` in the cache.
    pub fn alone(&self, n: usize) -> f64 {
        self.alone.at(n as f64)
    }

    /// Seconds of each of `n_prompt` tokens that are read together, with `n` in the cache before them.
    pub fn together(&self, n_prompt: usize, n: usize) -> f64 {
        self.together.at(n as f64 + n_prompt as f64 / 2.0)
    }
}

impl Parts {
    /// Of a session, whose normalizers are timed with rows of `n` scores.
    pub fn of(session: &Session, n: usize) -> Parts {
        let model = session.model();
        let layers = || model.layers.iter();
        let attention = layers()
            .flat_map(|l| [&l.attn_q, &l.attn_k, &l.attn_v, &l.attn_output].map(|l| &l.weight));
        let bytes = |w: &Weight| w.format.row_bytes(w.n_in) * w.n_out;
        let n_bytes: usize = attention.map(bytes).sum();
        let all = session.bytes_per_token(0);
        let cost = total(model, shapes(model));
        Parts {
            cost,
            byte_share: n_bytes as f64 / all,
            product_share: cost.products as f64 / session.n_products() as f64,
            normalizing: normalizing(session, n.clamp(1, MAX_SCORES)),
        }
    }
}

/// Seconds that the normalizers of all heads take for a score, in rows of `n`, by all threads together.
fn normalizing(session: &Session, n: usize) -> f64 {
    let model = session.model();
    // Enough to be neither alike nor far apart.
    let scores: Vec<f32> = (0..n).map(|i| (i * 7919 % 2003) as f32 / 500.0 - 2.0).collect();
    let mut row = scores.clone();
    let mut once = || {
        let start = Instant::now();
        for attention in &model.attention {
            let seen = attention.visible(n - 1, &(0..0));
            let n_seen = seen.len();
            for head in 0..attention.geometry.n_head {
                row.copy_from_slice(&scores);
                attention.weigh((n - 1, &seen), head, &mut row[..n_seen]);
            }
        }
        start.elapsed().as_secs_f64()
    };
    let best = (0..N_ROUNDS).map(|_| once()).fold(f64::INFINITY, f64::min);
    best / (n * session.n_threads().one) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_through_points() {
        let line = Line::through([(10.0, 3.0), (110.0, 5.0)]);
        assert!((line.at(10.0) - 3.0).abs() < 1e-12 && (line.at(210.0) - 7.0).abs() < 1e-12);
        assert_eq!(Line::through([(0.0, 3.0), (0.0, 4.0)]), Line { base: 4.0, slope: 0.0 });
        // Never less for more tokens.
        assert_eq!(Line::through([(0.0, 3.0), (9.0, 2.0)]), Line { base: 2.0, slope: 0.0 });
    }

    #[test]
    fn half_of_attention_takes_half_of_its_share() {
        let cost = Cost { weights: 8, products: 8, attended: 4, attended_together: 4 };
        let half = Cost { weights: 4, products: 4, attended: 2, attended_together: 2 };
        let parts = Parts { cost, byte_share: 0.25, product_share: 0.5, normalizing: 0.2 };
        let line = Line { base: 8.0, slope: 1.0 };
        let timing = Timing { alone: line, together: line };
        assert_eq!(timing.scaled(&parts, cost), timing);
        let scaled = timing.scaled(&parts, half);
        assert!((scaled.alone(10) - (7.0 + 6.0)).abs() < 1e-12);
        assert!((scaled.together(10, 5) - (6.0 + 6.0)).abs() < 1e-12);
        // What normalizers take is no more than there is.
        let most = Parts { normalizing: 5.0, ..parts };
        assert!((timing.scaled(&most, half).alone(10) - (7.0 + 10.0)).abs() < 1e-12);
    }
}
