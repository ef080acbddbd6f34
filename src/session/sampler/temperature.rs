//! Temperature: divides logits by T; 0 keeps the likeliest only. With a range, T follows the
//! entropy of the candidates, from T - range when one is certain to T + range when all are equal.

use super::typical::entropy;
use super::{Candidates, Random, Sample, SamplerParams};

struct Temperature {
    t: f32,
    range: f32,
    exponent: f32,
}

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    let temperature = Temperature {
        t: params.temperature,
        range: params.dynatemp_range,
        exponent: params.dynatemp_exponent,
    };
    (temperature.t != 1.0 || temperature.range > 0.0).then(|| Box::new(temperature) as _)
}

impl Sample for Temperature {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        let t = if self.range > 0.0 { self.dynamic(candidates) } else { self.t };
        let Some(best) = candidates.best() else { return };
        if t <= 0.0 {
            candidates.retain(|c| c.id == best.id);
        } else if (best.logit / t).is_finite() {
            candidates.change_all(|logit| logit / t);
        } else {
            // A temperature near 0 must not make infinities.
            candidates.change_all(
                |logit| {
                    if logit == best.logit { 0.0 } else { (logit - best.logit) / t }
                },
            );
        }
    }
}

impl Temperature {
    fn dynamic(&self, candidates: &mut Candidates) -> f32 {
        if candidates.len() <= 1 {
            return self.t.max(f32::MIN_POSITIVE);
        }
        candidates.softmax();
        let least = (self.t - self.range).max(0.0);
        let share = entropy(candidates) / libm::log(candidates.len() as f64);
        let grown = libm::pow(share.clamp(0.0, 1.0), self.exponent.into()) as f32;
        least + (self.t + self.range - least) * grown
    }
}
