//! Min-p: keeps tokens at least p times as likely as the likeliest (Nguyen et al. 2024, "Turning
//! Up the Heat: Min-p Sampling", section 3).

use super::{Candidates, Random, Sample, SamplerParams};

struct MinP(f32);

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    (params.min_p > 0.0).then(|| Box::new(MinP(params.min_p)) as _)
}

impl Sample for MinP {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        let Some(best) = candidates.best() else { return };
        let least = best.logit + libm::logf(self.0);
        candidates.retain(|c| c.logit >= least || c.id == best.id);
    }
}
