//! Top-k: keeps the k likeliest (Fan et al. 2018, "Hierarchical Neural Story Generation").

use super::{Candidates, Random, Sample, SamplerParams};

struct TopK(usize);

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    (params.top_k > 0).then(|| Box::new(TopK(params.top_k)) as _)
}

impl Sample for TopK {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        candidates.keep_best(self.0);
    }
}
