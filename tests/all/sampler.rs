//! Samplers: the reference rows of llama.cpp, plain definitions, distributions and repetition.

use std::collections::BTreeMap;

use qkov::error::Error;
use qkov::session::sampler::{Candidates, Random, SAMPLERS, Sampler, SamplerParams};

/// A sampler that is alone, by name.
struct One {
    name: &'static str,
    params: SamplerParams,
}

fn off() -> SamplerParams {
    SamplerParams { top_k: 0, top_p: 1.0, min_p: 0.0, temperature: 1.0, ..SamplerParams::default() }
}

fn one(name: &'static str, set: impl FnOnce(&mut SamplerParams)) -> One {
    let mut params = off();
    set(&mut params);
    One { name, params }
}

impl One {
    fn apply(&self, candidates: &mut Candidates, past: &[u32]) {
        assert!(SAMPLERS.iter().any(|s| s.name == self.name));
        for entry in SAMPLERS.iter().filter(|s| s.name == self.name) {
            if let Some(mut sampler) = (entry.make)(&self.params) {
                sampler.apply(candidates, past, &mut Random::new(0));
            }
        }
    }
}

fn logits(p: &[f32]) -> Vec<f32> {
    p.iter().map(|p| p.ln()).collect()
}

/// Probabilities of what a sampler leaves of `p`, by token; renormalized, or as they were.
fn left(one: &One, p: &[f32], past: &[u32], renormalize: bool) -> Vec<(u32, f32)> {
    let mut candidates = Candidates::new(&logits(p));
    one.apply(&mut candidates, past);
    candidates.softmax();
    let p =
        |c: &qkov::session::sampler::Candidate| if renormalize { c.p } else { p[c.id as usize] };
    candidates.list().iter().map(|c| (c.id, p(c))).collect()
}

#[track_caller]
fn near(found: &[(u32, f32)], expected: &[f32]) {
    let found: Vec<f32> = found.iter().map(|(_, p)| *p).collect();
    let same = found.len() == expected.len()
        && found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-5);
    assert!(same, "{found:?} is not {expected:?}");
}

const P4: [f32; 4] = [0.1, 0.2, 0.3, 0.4];

#[test]
fn reference_rows_of_truncation() {
    let sorted = [0.4, 0.3, 0.2, 0.1];
    let row = |one: One, expected: &[f32]| near(&left(&one, &P4, &[], true), expected);
    let top_k = |k| one("top_k", |p| p.top_k = k);
    row(top_k(1), &[1.0]);
    row(top_k(3), &[0.44444, 0.33333, 0.22222]);
    row(top_k(4), &sorted);
    row(top_k(0), &P4);
    let top_p = |x| one("top_p", |p| p.top_p = x);
    row(top_p(0.0), &[1.0]);
    row(top_p(0.7), &[0.571429, 0.428571]);
    row(top_p(0.8), &[0.44444, 0.33333, 0.22222]);
    row(top_p(1.0), &P4);
    let min_p = |x| one("min_p", |p| p.min_p = x);
    let kept = |n: usize| {
        let sum: f32 = P4[4 - n..].iter().sum();
        P4[4 - n..].iter().map(|p| p / sum).collect::<Vec<_>>()
    };
    for (x, n) in [
        (0.0, 4),
        (0.24, 4),
        (0.26, 3),
        (0.49, 3),
        (0.51, 2),
        (0.74, 2),
        (0.76, 1),
        (1.0, 1),
        (1.05, 1),
    ] {
        row(min_p(x), &kept(n));
    }
    let sigma = |x| one("top_n_sigma", |p| p.top_n_sigma = x);
    row(sigma(1.0), &[0.428571, 0.571429]);
    row(sigma(0.0), &P4);
    row(sigma(3.0), &P4);
    let typical = one("typical", |p| p.typical_p = 0.5);
    near(&left(&typical, &[0.97, 0.01, 0.01, 0.01], &[], false), &[0.97]);
    near(&left(&typical, &[0.4, 0.2, 0.2, 0.2], &[], false), &[0.2, 0.2, 0.2]);
    let xtc = |t| one("xtc", |p| (p.xtc_probability, p.xtc_threshold) = (0.99, t));
    near(&left(&xtc(0.09), &sorted, &[], false), &[0.1]);
    near(&left(&xtc(0.19), &sorted, &[], false), &[0.2, 0.1]);
    near(&left(&xtc(0.29), &sorted, &[], false), &[0.3, 0.2, 0.1]);
    near(&left(&xtc(0.39), &sorted, &[], false), &sorted);
}

#[test]
fn reference_rows_of_temperature() {
    let temperature = |t, range, exponent| {
        one("temperature", |p| {
            (p.temperature, p.dynatemp_range, p.dynatemp_exponent) = (t, range, exponent)
        })
    };
    near(&left(&temperature(1.0, 0.0, 1.0), &P4, &[], true), &P4);
    assert_eq!(left(&temperature(0.0, 0.0, 1.0), &P4, &[], true), [(3, 1.0)]);
    near(&left(&temperature(0.5, 0.0, 1.0), &[0.2, 0.8], &[], true), &[1.0 / 17.0, 16.0 / 17.0]);
    // Equal candidates have the whole entropy, and the highest temperature.
    near(&left(&temperature(1.0, 0.5, 1.0), &[0.5, 0.5], &[], true), &[0.5, 0.5]);
    // 0.2 and 0.8 have 0.721928 bits of 1: the temperature is 0.5 + 0.721928.
    let (low, high) = (0.2f32.powf(1.0 / 1.221928), 0.8f32.powf(1.0 / 1.221928));
    let expected = [low / (low + high), high / (low + high)];
    near(&left(&temperature(1.0, 0.5, 1.0), &[0.2, 0.8], &[], true), &expected);
}

#[test]
fn reference_rows_of_penalties() {
    let penalties = |repeat, frequency, presence| {
        one("penalties", |p| {
            (p.repeat_penalty, p.frequency_penalty, p.presence_penalty) =
                (repeat, frequency, presence)
        })
    };
    let row = |x: (f32, f32, f32), past: &[u32], expected: &[f32]| {
        near(&left(&penalties(x.0, x.1, x.2), &[0.2; 5], past, true), expected);
    };
    row((50.0, 0.0, 0.0), &[0], &[0.0, 0.25, 0.25, 0.25, 0.25]);
    row((50.0, 0.0, 0.0), &[0, 1, 2], &[0.0, 0.0, 0.0, 0.5, 0.5]);
    row((50.0, 0.0, 0.0), &[0, 1, 2, 0, 0], &[0.0, 0.0, 0.0, 0.5, 0.5]);
    let rest = 0.249997;
    row((1.0, 5.0, 5.0), &[0], &[0.000011, rest, rest, rest, rest]);
    let rest = 0.499966;
    row((1.0, 5.0, 5.0), &[0, 1, 2], &[0.000023, 0.000023, 0.000023, rest, rest]);
    let rest = 0.499977;
    row((1.0, 5.0, 5.0), &[0, 1, 2, 0, 0], &[0.0, 0.000023, 0.000023, rest, rest]);
    // Positive logits are divided.
    let mut candidates = Candidates::new(&[2.0, 1.0]);
    penalties(2.0, 0.0, 0.0).apply(&mut candidates, &[0]);
    assert_eq!(candidates.list()[0].logit, 1.0);
}

#[test]
fn reference_rows_of_dry() {
    let row = |x: (f32, usize, &[u32]), p: f32, past: &[u32], expected: &[f32]| {
        let dry = one("dry", |params| {
            params.dry_multiplier = x.0;
            params.dry_base = 1.1;
            params.dry_allowed_length = x.1;
            params.dry_breakers = vec![x.2.to_vec()];
        });
        near(&left(&dry, &vec![p; expected.len()], past, true), expected);
    };
    row((1.0, 2, &[]), 0.25, &[0, 1], &[0.25; 4]);
    row((1.0, 2, &[]), 0.25, &[0, 1, 2, 0, 1], &[0.296923, 0.296923, 0.109232, 0.296923]);
    row((1.0, 2, &[3]), 0.2, &[0, 1, 3, 4, 0, 1], &[0.2; 5]);
    let (other, found) = (0.241818, 0.032727);
    row((2.0, 2, &[]), 0.2, &[0, 1, 2, 0, 1], &[other, other, found, other, other]);
    row((1.0, 4, &[]), 0.2, &[0, 1, 2, 3, 4, 0, 1], &[0.2; 5]);
    // A breaker of two tokens that ends two tokens ago leaves a repetition of two.
    row((2.0, 2, &[4, 3]), 0.2, &[0, 1, 2, 4, 3, 0, 1], &[other, other, found, other, other]);
    row((2.0, 2, &[4, 0]), 0.2, &[4, 0, 1, 2, 4, 0, 1], &[0.2; 5]);
}

/// DRY's repetitions by the definition, on random texts of two tokens.
#[test]
fn dry_finds_the_longest_repetition() {
    let mut random = Random::new(7);
    for length in 0..60 {
        let past: Vec<u32> = (0..length).map(|_| (random.bits() % 2) as u32).collect();
        let dry = one("dry", |p| (p.dry_multiplier, p.dry_base) = (1.0, 1.5));
        let mut candidates = Candidates::new(&[0.0; 2]);
        dry.apply(&mut candidates, &past);
        for token in 0..2 {
            let repeat = |at: usize| {
                (0..at).take_while(|n| past[at - 1 - n] == past[past.len() - 1 - n]).count()
            };
            let places = (0..past.len()).filter(|at| past[*at] == token);
            let longest = places.map(repeat).max().unwrap_or(0);
            let expected = if longest < 2 { 0.0 } else { -1.5f32.powi(longest as i32 - 2) };
            let found = candidates.list()[token as usize].logit;
            assert!((found / expected - 1.0).abs() < 1e-5 || found == expected, "{past:?}");
        }
    }
}

/// All orders of top-k, top-p and min-p on 10 000 tokens leave what a formula says.
#[test]
fn reference_queue() {
    let n = 10_000usize;
    // Token i is i + 1 times as likely as the first.
    let logits: Vec<f32> = (1..=n).map(|i| (i as f32).ln()).collect();
    for (k, p, m) in [
        (n, 1.0, 1.0),
        (n, 1.0, 1e-12),
        (n, 0.0, 0.0),
        (1, 1.0, 0.0),
        (100, 0.8, 0.1),
        (100, 0.8, 0.99945),
        (5000, 0.8, 0.9),
        (3000, 0.99, 0.3),
    ] {
        for order in ["kpm", "kmp", "pkm", "pmk", "mkp", "mpk"] {
            let mut candidates = Candidates::new(&logits);
            // The likeliest `kept` tokens are left, the best of which is n times the first.
            let mut kept = n;
            for step in order.chars() {
                let name = match step {
                    'k' => "top_k",
                    'p' => "top_p",
                    _ => "min_p",
                };
                one(name, |x| (x.top_k, x.top_p, x.min_p) = (k, p, m)).apply(&mut candidates, &[]);
                let least = (m * n as f32 - 1e-3).ceil().max(1.0) as usize;
                let sum = |kept: usize| (n - kept + 1..=n).sum::<usize>() as f32;
                kept = match step {
                    'k' => kept.min(k),
                    'p' if p == 1.0 => kept,
                    'p' => (1..=kept).find(|few| sum(*few) >= p * sum(kept)).unwrap(),
                    _ => kept.min(n - least + 1),
                };
            }
            let mut ids: Vec<usize> = candidates.list().iter().map(|c| c.id as usize).collect();
            ids.sort_unstable();
            assert_eq!(ids.len(), kept, "{order} {k} {p} {m}");
            assert!(ids.into_iter().eq(n - kept..n), "{order} {k} {p} {m}");
        }
    }
}

/// What each sampler keeps, by its definition: everything sorted, in f64.
fn plain(one: &One, logits: &[f32]) -> Vec<u32> {
    let params = &one.params;
    let max = logits.iter().copied().fold(f32::MIN, f32::max);
    let weights: Vec<f64> = logits.iter().map(|l| f64::from(l - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let p: Vec<f64> = weights.iter().map(|w| w / sum).collect();
    let mut ids: Vec<usize> = (0..logits.len()).collect();
    ids.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
    let until = |ids: &[usize], limit: f32, beyond: bool| {
        let mut total = 0.0;
        let n = ids.iter().position(|id| {
            total += p[*id];
            if beyond { total > f64::from(limit) } else { total >= f64::from(limit) }
        });
        ids[..n.map_or(ids.len(), |n| n + 1)].to_vec()
    };
    let ids = match one.name {
        "top_k" => ids[..params.top_k.min(ids.len())].to_vec(),
        "top_p" => until(&ids, params.top_p, false),
        "min_p" => {
            ids.retain(|id| {
                p[*id] >= f64::from(params.min_p) * p.iter().copied().fold(0., f64::max)
            });
            ids
        }
        "typical" => {
            let entropy: f64 = -p.iter().map(|p| p * p.ln()).sum::<f64>();
            let score = |id: &usize| (-p[*id].ln() - entropy).abs();
            ids.sort_by(|a, b| score(a).total_cmp(&score(b)));
            until(&ids, params.typical_p, true)
        }
        "top_n_sigma" => {
            let n = logits.len() as f64;
            let mean = logits.iter().map(|l| f64::from(*l)).sum::<f64>() / n;
            let square = |l: &f32| (f64::from(*l) - mean).powi(2);
            let sigma = (logits.iter().map(square).sum::<f64>() / n).sqrt();
            let least = f64::from(max) - f64::from(params.top_n_sigma) * sigma;
            ids.retain(|id| f64::from(logits[*id]) >= least);
            ids
        }
        "xtc" => {
            let top = ids.iter().filter(|id| p[**id] >= f64::from(params.xtc_threshold)).count();
            ids[top.saturating_sub(1)..].to_vec()
        }
        "temperature" if params.temperature == 0.0 => ids[..1].to_vec(),
        _ => ids,
    };
    let mut ids: Vec<u32> = ids.into_iter().map(|id| id as u32).collect();
    ids.sort_unstable();
    ids
}

#[test]
fn samplers_match_their_plain_definitions() {
    let mut random = Random::new(11);
    for (n_vocab, scale) in [(1, 1.0), (2, 1.0), (50, 3.0), (3000, 0.5), (3000, 8.0), (40_000, 2.0)]
    {
        let logits: Vec<f32> = (0..n_vocab)
            .map(|_| {
                let normal: f64 = (0..12).map(|_| random.uniform()).sum::<f64>() - 6.0;
                (normal * scale) as f32
            })
            .collect();
        for entry in SAMPLERS {
            for share in [0.001f32, 0.05, 0.3, 0.45, 0.9, 0.999] {
                let one = one(entry.name, |p| {
                    p.top_k = (n_vocab as f32 * share).ceil() as usize;
                    (p.top_p, p.min_p, p.typical_p, p.xtc_threshold) = (share, share, share, share);
                    p.top_n_sigma = 4.0 * share;
                    p.xtc_probability = 1.0;
                    p.temperature = if share < 0.01 { 0.0 } else { share };
                    p.xtc_threshold = share / 2.0;
                });
                let mut candidates = Candidates::new(&logits);
                one.apply(&mut candidates, &[]);
                let mut ids: Vec<u32> = candidates.list().iter().map(|c| c.id).collect();
                ids.sort_unstable();
                let expected = plain(&one, &logits);
                let differ = ids.len().abs_diff(expected.len());
                assert!(ids == expected, "{} {share} of {n_vocab}: {differ}", entry.name);
            }
        }
    }
}

/// A partial selection leaves the same list as a full sort, ties included.
#[test]
fn partial_selection_is_a_sort() {
    let mut random = Random::new(5);
    for n_vocab in [1, 10, 1000, 20_000] {
        for levels in [1, 7, 1 << 20] {
            let logits: Vec<f32> =
                (0..n_vocab).map(|_| (random.bits() % levels) as f32 - 3.0).collect();
            let mut expected: Vec<u32> = (0..n_vocab as u32).collect();
            expected.sort_by(|a, b| logits[*b as usize].total_cmp(&logits[*a as usize]));
            for k in [1, 2, 40, 300, n_vocab] {
                let mut best = Candidates::new(&logits);
                best.keep_best(k);
                let mut until = Candidates::new(&logits);
                let mut n = 0;
                until.keep_until(|_| {
                    n += 1;
                    n == k
                });
                for list in [best.list(), until.list()] {
                    assert!(list.iter().map(|c| c.id).eq(expected.iter().copied().take(k)));
                }
            }
        }
    }
}

fn draws(params: SamplerParams, logits: &[f32], n: usize) -> Vec<u32> {
    let Ok(mut sampler) = Sampler::new(params, logits.len()) else { return Vec::new() };
    let draw = |_| {
        let token = sampler.sample(logits);
        sampler.accept(token);
        token
    };
    (0..n).map(draw).collect()
}

#[test]
fn draws_follow_the_distribution() {
    let p = [0.4, 0.05, 0.25, 0.0, 0.2, 0.1];
    let n = 100_000;
    let mut counts = BTreeMap::new();
    draws(SamplerParams { seed: 3, ..off() }, &logits(&p), n)
        .iter()
        .for_each(|token| *counts.entry(*token).or_insert(0) += 1);
    let mut chi_square = 0.0;
    for (token, p) in (0..).zip(p).filter(|(_, p)| *p > 0.0) {
        let (found, expected) = (f64::from(counts[&token]), n as f64 * f64::from(p));
        chi_square += (found - expected).powi(2) / expected;
    }
    assert_eq!(counts.len(), 5, "a token without probability was drawn");
    // 4 degrees of freedom: exceeded by one seed in a thousand.
    assert!(chi_square < 18.47, "{chi_square}");
}

#[test]
fn the_generator_is_the_published_one() {
    // From a C program of the published algorithms: splitmix64 from 0, then xoshiro256++.
    let mut random = Random::new(0);
    assert_eq!(random.bits(), 0x53175d61490b23df);
    assert_eq!(random.bits(), 0x61da6f3dc380d507);
    assert_eq!(random.bits(), 0x5c0fdf91ec9a7bfc);
}

#[test]
fn a_seed_gives_the_same_tokens_everywhere() {
    let logits: Vec<f32> = (0..1000).map(|i| ((i * 37) % 101) as f32 / 10.0).collect();
    let mut params = SamplerParams { seed: 42, repeat_penalty: 1.2, ..SamplerParams::default() };
    (params.dry_multiplier, params.xtc_probability, params.typical_p) = (0.8, 0.3, 0.9);
    (params.dynatemp_range, params.top_n_sigma) = (0.2, 3.0);
    let found = draws(params.clone(), &logits, 24);
    assert_eq!(found, draws(params.clone(), &logits, 24));
    assert_eq!(found, GOLDEN, "another seed sequence than in earlier versions");
    params.seed = 43;
    assert_ne!(found, draws(params.clone(), &logits, 24));
    params.mirostat = true;
    assert_eq!(draws(params, &logits, 24), GOLDEN_MIROSTAT);
}

const GOLDEN: [u32; 24] = [
    939, 393, 191, 90, 524, 120, 232, 868, 131, 767, 827, 292, 535, 554, 150, 999, 161, 423, 666,
    251, 737, 726, 696, 625,
];
const GOLDEN_MIROSTAT: [u32; 24] = [
    166, 600, 876, 947, 464, 333, 19, 210, 977, 262, 726, 494, 191, 49, 434, 90, 161, 423, 969,
    797, 363, 453, 767, 636,
];

#[test]
fn mirostat_holds_the_surprise() {
    // Zipf's law over 10 000 tokens.
    let p: Vec<f32> = (1..=10_000).map(|i| 1.0 / i as f32).collect();
    let sum: f32 = p.iter().sum();
    for tau in [2.0, 4.0] {
        let params = SamplerParams { mirostat: true, mirostat_tau: tau, seed: 9, ..off() };
        let drawn = draws(params, &logits(&p), 3000);
        let bits = drawn[500..].iter().map(|id| -(p[*id as usize] / sum).log2());
        let mean = bits.sum::<f32>() / 2500.0;
        // The surprise is held among the kept, whose entropy is then tau: n of them. Among all
        // tokens they are rarer.
        let entropy = |n: usize| {
            let part: f32 = p[..n].iter().sum();
            -p[..n].iter().map(|p| p / part * (p / part).log2()).sum::<f32>()
        };
        let n = (1..=p.len()).find(|n| entropy(*n) >= tau).unwrap();
        let expected = tau + (sum / p[..n].iter().sum::<f32>()).log2();
        assert!((mean - expected).abs() < 0.3, "{mean} bits for {expected}");
    }
}

#[test]
fn odd_logits_never_panic() {
    let inf = f32::INFINITY;
    let all = |set: &dyn Fn(&mut SamplerParams)| {
        let mut params = SamplerParams::default();
        (params.typical_p, params.top_n_sigma, params.xtc_probability) = (0.9, 2.0, 0.5);
        (params.repeat_penalty, params.dry_multiplier, params.dynatemp_range) = (1.1, 0.8, 0.5);
        set(&mut params);
        params
    };
    let mut kinds =
        vec![off(), SamplerParams::default(), all(&|_| {}), all(&|p| p.mirostat = true)];
    for t in [0.0, 1e-30, 1e30] {
        kinds.push(SamplerParams { temperature: t, ..off() });
        kinds.push(all(&|p| p.temperature = t));
    }
    for params in kinds {
        let one = |logits: &[f32]| draws(params.clone(), logits, 20);
        assert_eq!(one(&[-inf; 9]), [0; 20], "all minus infinity");
        assert_eq!(one(&[f32::NAN; 9]), [0; 20], "all NaN");
        assert_eq!(one(&[0.3]), [0; 20], "a vocabulary of one");
        assert!(!one(&[1.0, f32::NAN, 1.0, 1.0]).contains(&1), "NaN");
        assert!(!one(&[1.0, -inf, 1.0, 1.0]).contains(&1), "minus infinity");
        assert!(one(&[2.5; 50]).iter().all(|t| *t < 50), "all equal");
        assert!(one(&[f32::MAX, f32::MIN, f32::MAX]).iter().all(|t| *t < 3), "largest");
        if params.repeat_penalty == 1.0 {
            assert_eq!(one(&[0.0, inf, 3.0]), [1; 20], "plus infinity");
        }
    }
    assert_eq!(draws(SamplerParams { temperature: 0.0, ..off() }, &[1.0, 2.0, 2.0], 5), [1; 5]);
    assert_eq!(draws(SamplerParams { temperature: 1e-30, ..off() }, &[1.0, 2.0, 1.5], 5), [1; 5]);
    let flat = draws(SamplerParams { temperature: 1e30, ..off() }, &[-50.0, 50.0], 50);
    assert!(flat.contains(&0) && flat.contains(&1));
}

#[test]
fn one_candidate_takes_one_random_number() {
    let mut sampler = Sampler::new(SamplerParams { seed: 1, ..off() }, 100).unwrap();
    let mut other = Sampler::new(SamplerParams { seed: 1, ..off() }, 100).unwrap();
    let mut single = [f32::NEG_INFINITY; 100];
    single[7] = 1.0;
    assert_eq!(sampler.sample(&single), 7);
    other.sample(&[0.0; 100]);
    for _ in 0..20 {
        assert_eq!(sampler.sample(&[0.0; 100]), other.sample(&[0.0; 100]));
    }
}

#[test]
fn forgetting_clears_the_history_and_not_the_random_numbers() {
    let params = || SamplerParams { frequency_penalty: 1e6, repeat_last_n: 3, ..off() };
    let mut sampler = Sampler::new(params(), 4).unwrap();
    for token in [3, 2, 1, 0] {
        sampler.accept(token);
    }
    assert_eq!(sampler.sample(&[0.0; 4]), 3, "only the last three count");
    (0..50).for_each(|_| sampler.accept(3));
    assert!((0..20).all(|_| sampler.sample(&[0.0; 4]) != 3));
    sampler.forget();
    let first: Vec<u32> = (0..30).map(|_| sampler.sample(&[0.0; 4])).collect();
    assert!(first.contains(&3));
    sampler.forget();
    let second: Vec<u32> = (0..30).map(|_| sampler.sample(&[0.0; 4])).collect();
    assert_ne!(first, second);
    assert_eq!(off().n_history(), 0);
    assert_eq!(params().n_history(), 3);
    assert_eq!(SamplerParams { dry_multiplier: 1.0, ..off() }.n_history(), usize::MAX);
}

#[test]
fn bias_and_order() {
    let bias = vec![(1, f32::NEG_INFINITY), (2, 100.0)];
    let params = SamplerParams { logit_bias: bias, temperature: 0.0, ..off() };
    assert_eq!(draws(params.clone(), &[5.0, 90.0, 0.0], 3), [2; 3]);
    assert_eq!(
        draws(
            SamplerParams { logit_bias: vec![(1, f32::NEG_INFINITY)], ..params },
            &[5.0, 90.0, 0.0],
            3
        ),
        [0; 3]
    );
    // Before the temperature, top-p keeps both; after it, one.
    let order = |names: &str| SamplerParams {
        samplers: names.split(' ').map(String::from).collect(),
        temperature: 0.1,
        top_p: 0.7,
        ..off()
    };
    let logits = logits(&[0.6, 0.4]);
    assert!(draws(order("top_p temperature"), &logits, 500).contains(&1));
    assert!(!draws(order("temperature top_p"), &logits, 500).contains(&1));
}

#[test]
fn parameters_out_of_range_are_refused() {
    type Set = fn(&mut SamplerParams);
    let set: [(&str, Set); 13] = [
        ("top-p = NaN; allowed 0 to 1", |p| p.top_p = f32::NAN),
        ("top-p = 7; allowed 0 to 1", |p| p.top_p = 7.0),
        ("min-p = -0.1; allowed 0 to 1", |p| p.min_p = -0.1),
        ("temp = -1; allowed 0 or more", |p| p.temperature = -1.0),
        ("temp = inf; allowed 0 or more", |p| p.temperature = f32::INFINITY),
        ("repeat-penalty = 0; allowed above 0", |p| p.repeat_penalty = 0.0),
        ("presence-penalty = inf; allowed any finite number", |p| {
            p.presence_penalty = f32::INFINITY
        }),
        ("dry-base = 0.5; allowed 1 or more", |p| p.dry_base = 0.5),
        ("typical = 2; allowed 0 to 1", |p| p.typical_p = 2.0),
        ("logit-bias of token 10; allowed 0 to 9", |p| p.logit_bias = vec![(10, 1.0)]),
        ("logit-bias = NaN of token 1; allowed any number and -inf", |p| {
            p.logit_bias = vec![(1, f32::NAN)]
        }),
        (
            "samplers = \"beam\"; allowed penalties, dry, top_n_sigma, top_k, typical, top_p, min_p, xtc, temperature",
            |p| p.samplers = vec!["beam".into()],
        ),
        ("mirostat-eta = 2; allowed 0 to 1", |p| p.mirostat_eta = 2.0),
    ];
    for (text, set) in set {
        let mut params = SamplerParams::default();
        set(&mut params);
        assert_eq!(Sampler::new(params, 10).err(), Some(Error::Usage(text.into())));
    }
    assert!(Sampler::new(SamplerParams::default(), 0).is_err());
}

/// Not a benchmark, only a bound: sorting everything would take several times longer.
#[test]
fn large_vocabularies_are_fast() {
    let mut random = Random::new(1);
    let logits: Vec<f32> = (0..131_072).map(|_| (random.uniform() * 20.0) as f32).collect();
    for (name, params) in [
        ("default", SamplerParams::default()),
        ("top-p only", SamplerParams { top_k: 0, min_p: 0.0, ..SamplerParams::default() }),
    ] {
        let mut sampler = Sampler::new(params, logits.len()).unwrap();
        sampler.sample(&logits);
        let start = std::time::Instant::now();
        (0..20).for_each(|_| sampler.accept(0));
        let n = 50;
        (0..n).for_each(|_| assert!(sampler.sample(&logits) < 131_072));
        let ms = start.elapsed().as_secs_f64() * 1e3 / f64::from(n);
        eprintln!("{name}: {ms:.3} ms per token of a vocabulary of {}", logits.len());
        assert!(ms < 100.0, "{name}: {ms} ms");
    }
}
