//! Mirostat 2: keeps tokens of at most mu bits of surprise, and moves mu so that the surprise of
//! what is drawn stays near tau (Basu et al. 2021, "Mirostat", algorithm 2).

use super::{Candidates, Random, Sample, SamplerParams};

struct Mirostat {
    tau: f32,
    eta: f32,
    mu: f32,
}

pub(super) fn make(params: &SamplerParams) -> Option<Box<dyn Sample>> {
    let (tau, eta) = (params.mirostat_tau, params.mirostat_eta);
    params.mirostat.then(|| Box::new(Mirostat { tau, eta, mu: 2.0 * tau }) as _)
}

impl Sample for Mirostat {
    fn apply(&mut self, candidates: &mut Candidates, _: &[u32], _: &mut Random) {
        candidates.softmax();
        let best = candidates.best().map(|c| c.id);
        candidates.retain(|c| -libm::log2f(c.p) <= self.mu || Some(c.id) == best);
    }

    fn drawn(&mut self, p: f32) {
        self.mu -= self.eta * (-libm::log2f(p) - self.tau);
    }

    fn forget(&mut self) {
        self.mu = 2.0 * self.tau;
    }
}
