//! Locally typical sampling: keeps the tokens whose surprise is nearest to the entropy, until
//! their probabilities exceed p (Meister et al. 2022, "Locally Typical Sampling", section 4).

use super::candidates::{Candidate, sort_until};
use super::{Candidates, Random, Sample, SamplerParams};

struct Typical {
    p: f32,
    /// Candidates with their distance from the entropy; kept for its memory.
    scored: Vec<(f32, Candidate)>,
}

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    (params.typical_p < 1.0)
        .then(|| Box::new(Typical { p: params.typical_p, scored: Vec::new() }) as _)
}

impl Sample for Typical {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        candidates.softmax();
        let entropy = entropy(candidates) as f32;
        let score = |c: &Candidate| (-libm::logf(c.p) - entropy).abs();
        self.scored.clear();
        self.scored.extend(candidates.list().iter().map(|c| (score(c), *c)));
        let mut sum = 0f64;
        let kept = sort_until(
            &mut self.scored,
            |(a, x), (b, y)| a.total_cmp(b).then(x.id.cmp(&y.id)),
            |(_, c)| {
                sum += f64::from(c.p);
                sum as f32 > self.p
            },
        );
        candidates.replace(self.scored[..kept].iter().map(|(_, c)| *c));
    }
}

/// `-sum(p * ln(p))`, in nats, of probabilities that are up to date.
pub(super) fn entropy(candidates: &Candidates) -> f64 {
    let p = candidates.list().iter().map(|c| f64::from(c.p));
    -p.filter(|p| *p > 0.0).map(|p| p * libm::log(p)).sum::<f64>()
}
