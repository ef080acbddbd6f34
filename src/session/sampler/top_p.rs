//! Top-p, nucleus sampling: keeps the likeliest until their probabilities reach p (Holtzman et
//! al. 2020, "The Curious Case of Neural Text Degeneration", section 3.1).

use super::{Candidates, Random, Sample, SamplerParams};

struct TopP(f32);

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    (params.top_p < 1.0).then(|| Box::new(TopP(params.top_p)) as _)
}

impl Sample for TopP {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        candidates.softmax();
        let mut sum = 0f64;
        candidates.keep_until(|c| {
            sum += f64::from(c.p);
            // In the precision that p has, so that 0.4 and 0.3 reach 0.7.
            sum as f32 >= self.0
        });
    }
}
