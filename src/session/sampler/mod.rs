//! Choosing the next token: a chain of samplers narrows and reweighs the candidates, then one is
//! drawn. The maths and the default order are llama.cpp's.
//!
//! The same seed gives the same tokens on every machine: exponentials and logarithms come from
//! `libm` instead of the system, sums have one order, and of equal logits the lowest id is first.

mod bias;
mod candidates;
mod dry;
mod min_p;
mod mirostat;
mod params;
mod penalties;
mod random;
mod temperature;
mod top_k;
mod top_n_sigma;
mod top_p;
mod typical;
mod xtc;

pub use candidates::{Candidate, Candidates};
pub use dry::breakers;
pub use params::SamplerParams;
pub use random::{Random, random_seed};

use crate::error::Result;

/// One step of the chain.
pub trait Sample: Send {
    /// Narrows or reweighs the candidates. `past`: the tokens so far, oldest first.
    fn apply(&mut self, candidates: &mut Candidates, past: &[u32], random: &mut Random);

    /// Tells the probability of the token that was drawn, among the candidates that were left.
    fn drawn(&mut self, _p: f32) {}

    /// Forgets what was learnt of the text so far.
    fn forget(&mut self) {}
}

/// A sampler by name.
pub struct Entry {
    /// The name on the command line.
    pub name: &'static str,
    /// Whether mirostat takes its place.
    truncates: bool,
    /// The sampler with these parameters, or `None` if they turn it off.
    pub make: fn(&SamplerParams) -> Option<Box<dyn Sample>>,
}

const fn entry(
    name: &'static str,
    truncates: bool,
    make: fn(&SamplerParams) -> Option<Box<dyn Sample>>,
) -> Entry {
    Entry { name, truncates, make }
}

/// Every sampler whose place can be chosen, in the default order. Logit bias always comes first.
pub static SAMPLERS: &[Entry] = &[
    entry("penalties", false, penalties::make),
    entry("dry", false, dry::make),
    entry("top_n_sigma", true, top_n_sigma::make),
    entry("top_k", true, top_k::make),
    entry("typical", true, typical::make),
    entry("top_p", true, top_p::make),
    entry("min_p", true, min_p::make),
    entry("xtc", true, xtc::make),
    entry("temperature", false, temperature::make),
];

/// Chooses tokens, one after the other.
pub struct Sampler {
    chain: Vec<Box<dyn Sample>>,
    candidates: Candidates,
    random: Random,
    /// At least the last `n_history` tokens.
    past: Vec<u32>,
    n_history: usize,
}

impl Sampler {
    /// A sampler without history. Refuses parameters out of range.
    pub fn new(params: SamplerParams, n_vocab: usize) -> Result<Sampler> {
        params.check(n_vocab)?;
        let named = params.samplers.iter();
        let named = named.filter_map(|name| SAMPLERS.iter().find(|s| s.name == name));
        let mut chain = Vec::from_iter(bias::make(&params));
        if params.mirostat {
            // Mirostat sets its own cut, after the temperature.
            chain.extend(named.filter(|s| !s.truncates).filter_map(|s| (s.make)(&params)));
            chain.extend(mirostat::make(&params));
        } else {
            chain.extend(named.filter_map(|s| (s.make)(&params)));
        }
        Ok(Sampler {
            chain,
            candidates: Candidates::default(),
            random: Random::new(params.seed),
            past: Vec::new(),
            n_history: params.n_history(),
        })
    }

    /// Chooses a token; it is not part of the history before [`Sampler::accept`]. `[n_vocab]`
    ///
    /// A logit that is NaN or minus infinity is never chosen, and plus infinity counts as the
    /// largest finite number. If nothing is left to choose from, the lowest id is chosen.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        self.candidates.fill(logits);
        let past = &self.past[self.past.len().saturating_sub(self.n_history)..];
        for sampler in &mut self.chain {
            sampler.apply(&mut self.candidates, past, &mut self.random);
        }
        match self.candidates.draw(&mut self.random) {
            Some(drawn) => {
                self.chain.iter_mut().for_each(|s| s.drawn(drawn.p));
                drawn.id
            }
            None => 0,
        }
    }

    /// Adds a token to the history.
    pub fn accept(&mut self, token: u32) {
        if self.n_history == 0 {
            return;
        }
        // Twice the room, so that the history moves rarely.
        if self.past.len() >= self.n_history.saturating_mul(2) {
            self.past.drain(..self.past.len() - self.n_history);
        }
        self.past.push(token);
    }

    /// Forgets the history; the random numbers go on.
    pub fn forget(&mut self) {
        self.past.clear();
        self.chain.iter_mut().for_each(|s| s.forget());
    }
}
