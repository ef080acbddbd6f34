//! Top-n-sigma: keeps logits of at least `max - n * sigma`, sigma the standard deviation of all
//! logits (Tang et al. 2024, "Top-nσ: Not All Logits Are You Need", section 3).

use super::{Candidates, Random, Sample, SamplerParams};

struct TopNSigma(f32);

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    (params.top_n_sigma > 0.0).then(|| Box::new(TopNSigma(params.top_n_sigma)) as _)
}

impl Sample for TopNSigma {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        let Some(best) = candidates.best().filter(|c| c.logit > f32::NEG_INFINITY) else { return };
        let logits = || candidates.list().iter().map(|c| f64::from(c.logit));
        let logits = || logits().filter(|l| *l > f64::NEG_INFINITY);
        let n = logits().count() as f64;
        let mean = logits().sum::<f64>() / n;
        let variance = logits().map(|l| (l - mean) * (l - mean)).sum::<f64>() / n;
        let least = f64::from(best.logit) - f64::from(self.0) * variance.sqrt();
        candidates.retain(|c| f64::from(c.logit) >= least);
    }
}
