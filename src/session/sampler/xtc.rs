//! XTC, "exclude top choices" (p-e-w 2024, text-generation-webui pull request 6335): sometimes
//! removes all tokens of at least a threshold but the least likely of them.

use super::{Candidates, Random, Sample, SamplerParams};

struct Xtc {
    probability: f32,
    threshold: f32,
}

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    // Above one half, there is never a second token to leave.
    let on = params.xtc_probability > 0.0 && params.xtc_threshold <= 0.5;
    let xtc = Xtc { probability: params.xtc_probability, threshold: params.xtc_threshold };
    on.then(|| Box::new(xtc) as _)
}

impl Sample for Xtc {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], random: &mut Random) {
        if random.uniform() >= f64::from(self.probability) {
            return;
        }
        candidates.softmax();
        let top = candidates.list().iter().filter(|c| c.p >= self.threshold);
        let last = top.min_by(|a, b| a.logit.total_cmp(&b.logit).then(b.id.cmp(&a.id))).copied();
        if let Some(last) = last {
            candidates.retain(|c| c.p < self.threshold || c.id == last.id);
        }
    }
}
