//! Logit bias: a number added to the logits of some tokens; minus infinity bans them.

use super::{Candidates, Random, Sample, SamplerParams};

struct Bias(Vec<(u32, f32)>);

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    (!params.logit_bias.is_empty()).then(|| Box::new(Bias(params.logit_bias.clone())) as _)
}

impl Sample for Bias {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        self.0.iter().for_each(|(id, bias)| candidates.change(*id, |logit| logit + bias));
        if self.0.iter().any(|(_, bias)| *bias == f32::NEG_INFINITY) {
            candidates.retain(|c| c.logit > f32::NEG_INFINITY);
        }
    }
}
