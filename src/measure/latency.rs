//! How long a model takes: prompts, generation, and what share of the machine's limits is reached.

use std::time::Instant;

use crate::bad_usage;
use crate::cpu::Limits;
use crate::error::Result;
use crate::plan::Plan;
use crate::session::Session;

/// One thing to time, as llama-bench has them: `n_prompt` tokens read together, then `n_gen` tokens
/// one by one, after `n_depth` tokens that are not timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Test {
    /// Tokens read together.
    pub n_prompt: usize,
    /// Tokens read one by one.
    pub n_gen: usize,
    /// Tokens in the cache before.
    pub n_depth: usize,
}

/// What was measured. Times are in seconds.
#[derive(Debug, Clone)]
pub struct Latency {
    /// The test.
    pub test: Test,
    /// Of each repetition.
    pub totals: Vec<f64>,
    /// From a prompt to the logits after it, of each repetition; empty without a prompt.
    pub first: Vec<f64>,
    /// Of every token that was read alone, in all repetitions, sorted.
    pub steps: Vec<f64>,
    /// Bytes that one token reads: weights, and keys and values in the middle of the test.
    pub bytes_per_token: f64,
    /// Products of weights that one token needs, as operations.
    pub ops_per_token: f64,
}

impl Test {
    /// The name in tables: `pp512`, `tg128`, `pp512+tg128`, with `@ d4096` at a depth.
    pub fn name(&self) -> String {
        let parts = [("pp", self.n_prompt), ("tg", self.n_gen)];
        let parts: Vec<String> =
            parts.iter().filter(|p| p.1 > 0).map(|(name, n)| format!("{name}{n}")).collect();
        let depth = if self.n_depth > 0 { format!(" @ d{}", self.n_depth) } else { String::new() };
        parts.join("+") + &depth
    }

    /// Tokens that need to fit when a prompt is read `n_copies` times.
    pub fn n_ctx(&self, n_copies: usize) -> usize {
        self.n_depth + n_copies * self.n_prompt + self.n_gen
    }
}

impl Latency {
    /// Tokens per second of each repetition.
    pub fn rates(&self) -> Vec<f64> {
        let n = (self.test.n_prompt + self.test.n_gen) as f64;
        self.totals.iter().map(|t| n / t).collect()
    }

    /// Bytes per second that were read, at the median; only of tests that generate.
    pub fn read_rate(&self) -> Option<f64> {
        let alone = self.test.n_prompt == 0;
        alone.then(|| self.bytes_per_token * median(&self.rates()))
    }

    /// Share of the limit that such a test has: of memory for generation, of arithmetic for prompts;
    /// none for mixed tests.
    pub fn share(&self, limits: &Limits) -> Option<f64> {
        match (self.test.n_prompt, self.test.n_gen) {
            (0, _) => Some(self.read_rate()? / limits.read_bytes),
            (_, 0) => Some(self.ops_per_token * median(&self.rates()) / limits.int8_ops),
            _ => None,
        }
    }
}

/// The middle of a list; the mean of the two middle ones of an even number.
pub fn median(x: &[f64]) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f64::total_cmp);
    let at = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
    (at(sorted.len().saturating_sub(1) / 2) + at(sorted.len() / 2)) / 2.0
}

/// Mean and standard deviation.
pub fn mean_and_deviation(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / (n - 1.0).max(1.0);
    (mean, variance.sqrt())
}

/// The element below which `share` of a sorted list lies.
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    let at = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(at.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

/// Runs a test `n_reps` times after a warm-up. `progress` is called after each.
pub fn measure(
    session: &mut Session,
    test: Test,
    n_reps: usize,
    progress: &mut dyn FnMut(),
) -> Result<Latency> {
    if test.n_prompt + test.n_gen == 0 {
        bad_usage!("nothing to measure: a test needs a prompt or tokens to generate");
    }
    let n_copies = session.model().plan.n_copies();
    let n_ctx = test.n_ctx(n_copies);
    if n_ctx > session.n_ctx() {
        bad_usage!("{} needs {n_ctx} tokens; the context holds {}", test.name(), session.n_ctx());
    }
    let n_vocab = session.model().hparams.n_vocab as u64;
    let mut state = 1u64;
    let mut token = || {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 33) % n_vocab) as u32
    };
    let mut tokens = |n: usize| -> Vec<u32> { (0..n).map(|_| token()).collect() };
    session.rewind(0);
    session.feed(&tokens(test.n_depth))?;
    let mut latency = Latency {
        test,
        totals: Vec::new(),
        first: Vec::new(),
        steps: Vec::new(),
        bytes_per_token: session.bytes_per_token(n_ctx - test.n_gen.div_ceil(2)),
        ops_per_token: 2.0 * session.n_products() as f64,
    };
    for rep in 0..=n_reps {
        session.rewind(test.n_depth);
        let (prompt, gen_tokens) = (tokens(test.n_prompt), tokens(test.n_gen));
        let start = Instant::now();
        session.feed_prompt(&prompt)?;
        let first = start.elapsed().as_secs_f64();
        let mut steps = Vec::with_capacity(test.n_gen);
        // The first round warms up, and is over once it has run everything once.
        let n_gen = if rep == 0 { test.n_gen.min(2) } else { test.n_gen };
        for token in gen_tokens.iter().take(n_gen) {
            let start = Instant::now();
            session.feed(std::slice::from_ref(token))?;
            steps.push(start.elapsed().as_secs_f64());
        }
        if rep > 0 {
            latency.totals.push(start.elapsed().as_secs_f64());
            latency.first.extend((test.n_prompt > 0).then_some(first));
            latency.steps.extend(steps);
        }
        progress();
    }
    latency.steps.sort_by(f64::total_cmp);
    Ok(latency)
}

/// Times of one turn of a [`Duel`], in seconds.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// From a prompt to the logits after it.
    pub first: f64,
    /// Of each token that was read alone.
    pub steps: Vec<f64>,
}

/// Two plans of one model timed in turns, so that what else the machine does falls on both.
#[derive(Debug, Clone, PartialEq)]
pub struct Duel {
    /// The base's turns and the other's, by round.
    pub turns: Vec<[Turn; 2]>,
    n_prompt: usize,
}

/// Speeds of all rounds.
#[derive(Debug, Clone, PartialEq)]
pub struct Pace {
    /// Tokens per second of the other plan.
    pub rates: Vec<f64>,
    /// The same, over the base's in the same round.
    pub ratios: Vec<f64>,
}

/// Reads `prompt` together, then `rest` one by one.
fn turn(session: &mut Session, prompt: &[u32], rest: &[u32]) -> Result<Turn> {
    session.rewind(0);
    let start = Instant::now();
    session.feed_prompt(prompt)?;
    let first = start.elapsed().as_secs_f64();
    let mut steps = Vec::with_capacity(rest.len());
    for token in rest {
        let start = Instant::now();
        session.feed(std::slice::from_ref(token))?;
        steps.push(start.elapsed().as_secs_f64());
    }
    Ok(Turn { first, steps })
}

/// Times two plans in turns, of which the first changes from round to round: of the model of one
/// session, or each of its own session's. The second is warmed up; the first should have been.
pub fn duel(
    (session, mut own): (&mut Session, Option<&mut Session>),
    plans: [&Plan; 2],
    (prompt, rest): (&[u32], &[u32]),
    n_rounds: usize,
) -> Result<Duel> {
    let mut one = |i: usize, rest: &[u32]| {
        let session = match &mut own {
            Some(own) if i == 1 => own,
            _ => &mut *session,
        };
        session.set_plan(plans[i].clone())?;
        turn(session, prompt, rest)
    };
    one(1, &rest[..rest.len().min(2)])?;
    let mut turns = Vec::new();
    for round in 0..n_rounds {
        turns.push(match round % 2 {
            0 => [one(0, rest)?, one(1, rest)?],
            _ => {
                let other = one(1, rest)?;
                [one(0, rest)?, other]
            }
        });
    }
    Ok(Duel { turns, n_prompt: prompt.len() })
}

impl Duel {
    /// Speed of reading a prompt.
    pub fn prefill(&self) -> Pace {
        self.pace(|turn| self.n_prompt as f64 / turn.first)
    }

    /// Speed of tokens one by one: of each round's fastest, as what else runs only ever adds time.
    pub fn decode(&self) -> Pace {
        self.pace(|turn| 1.0 / turn.steps.iter().fold(f64::INFINITY, |m, step| step.min(m)))
    }

    fn pace(&self, rate: impl Fn(&Turn) -> f64) -> Pace {
        let rates = self.turns.iter().map(|[_, other]| rate(other)).collect();
        let ratios = self.turns.iter().map(|[base, other]| rate(other) / rate(base)).collect();
        Pace { rates, ratios }
    }
}

impl Pace {
    /// Smallest and largest ratio. That of many rounds lies between those of `n` with a probability
    /// of `1 - 2^(1 - n)`, whatever the noise, as long as it is the same in all rounds.
    pub fn range(&self) -> (f64, f64) {
        let ratios = self.ratios.iter();
        ratios.fold((f64::INFINITY, 0.0), |(low, high), x| (x.min(low), x.max(high)))
    }
}
