//! Penalties on tokens among the last n: a positive logit is divided by, a negative multiplied
//! with `repeat` (Keskar et al. 2019, CTRL, section 4.1), then `count * frequency + presence` is
//! subtracted (OpenAI's definition).

use super::{Candidates, Random, Sample, SamplerParams};

struct Penalties {
    last_n: usize,
    repeat: f32,
    frequency: f32,
    presence: f32,
    /// The last tokens, sorted; kept for its memory.
    sorted: Vec<u32>,
}

/// How many past tokens count; 0 if there is no penalty.
pub(super) fn n_history(params: &SamplerParams) -> usize {
    let off = params.repeat_penalty == 1.0
        && params.frequency_penalty == 0.0
        && params.presence_penalty == 0.0;
    if off { 0 } else { params.repeat_last_n }
}

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    let penalties = Penalties {
        last_n: n_history(params),
        repeat: params.repeat_penalty,
        frequency: params.frequency_penalty,
        presence: params.presence_penalty,
        sorted: Vec::new(),
    };
    (penalties.last_n > 0).then(|| Box::new(penalties) as _)
}

impl Sample for Penalties {
    fn apply(&mut self, candidates: &mut Candidates, past: &[u32], _: &mut Random) {
        self.sorted.clear();
        self.sorted.extend_from_slice(&past[past.len().saturating_sub(self.last_n)..]);
        self.sorted.sort_unstable();
        for same in self.sorted.chunk_by(|a, b| a == b) {
            candidates.change(same[0], |logit| {
                let logit = if logit <= 0.0 { logit * self.repeat } else { logit / self.repeat };
                logit - (same.len() as f32 * self.frequency + self.presence)
            });
        }
    }
}
