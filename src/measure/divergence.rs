//! How one model's predictions differ from another's, defined as `llama-perplexity --kl-divergence`
//! defines it (`kl_divergence` in llama.cpp's `tools/perplexity/perplexity.cpp`).

use super::base::KL_FLOOR;

/// A number with its standard error.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Its standard error.
    pub err: f64,
}

/// What a model predicts at one position.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// Logits, or log-probabilities with a log-sum of 0. `[n_vocab]`
    pub logits: &'a [f32],
    /// `ln sum exp` of the logits.
    pub log_sum: f64,
}

/// A value per token, seen as a distribution.
#[derive(Debug, Clone, PartialEq)]
pub struct Spread {
    /// The mean.
    pub mean: Estimate,
    sorted: Vec<f64>,
}

/// Points of a [`Spread`] that reports carry: what their names end in, and the share of tokens below.
pub const POINTS: [(&str, f64); 13] = [
    ("max", 1.0),
    ("p99_9", 0.999),
    ("p99", 0.99),
    ("p95", 0.95),
    ("p90", 0.9),
    ("p75", 0.75),
    ("p50", 0.5),
    ("p25", 0.25),
    ("p10", 0.1),
    ("p5", 0.05),
    ("p1", 0.01),
    ("p0_1", 0.001),
    ("min", 0.0),
];

/// How a model's predictions differ from a base's. Shares and probabilities are from 0 to 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// Perplexity of the base.
    pub base_ppl: Estimate,
    /// Perplexity over the base's.
    pub ppl_ratio: Estimate,
    /// Perplexity minus the base's.
    pub ppl_diff: Estimate,
    /// Logarithm of the ratio.
    pub ln_ppl_ratio: Estimate,
    /// Correlation of the two logarithms over tokens.
    pub ln_ppl_correlation: f64,
    /// `KL(base || model)` in nats.
    pub kl: Spread,
    /// Probability of the right token, minus the base's.
    pub dp: Spread,
    /// Root of the mean square of `dp`.
    pub dp_rms: Estimate,
    /// Share of tokens where both find the same token most likely.
    pub same_top: Estimate,
}

/// Pairs of predictions, counted one by one.
#[derive(Debug, Default)]
pub struct Tally {
    nll: Vec<f64>,
    base_nll: Vec<f64>,
    kl: Vec<f64>,
    dp: Vec<f64>,
    n_same: usize,
}

impl Estimate {
    /// The mean of values, with `sqrt((mean(x^2) - mean(x)^2) / (n - 1))`.
    pub fn mean(x: &[f64]) -> Estimate {
        let value = x.iter().sum::<f64>() / x.len() as f64;
        Estimate { value, err: covariance((x, value), (x, value)).sqrt() }
    }

    /// Both times `factor`: 100 for percent.
    pub fn times(self, factor: f64) -> Estimate {
        Estimate { value: self.value * factor, err: self.err * factor }
    }

    /// `exp` of the number; its error grows by the slope.
    pub fn exp(self) -> Estimate {
        let value = self.value.exp();
        Estimate { value, err: value * self.err }
    }
}

impl<'a> Row<'a> {
    /// Logits with their log-sum.
    pub fn new(logits: &'a [f32]) -> Row<'a> {
        let max = f64::from(logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x)));
        let log_sum = max + logits.iter().map(|x| (f64::from(*x) - max).exp()).sum::<f64>().ln();
        Row { logits, log_sum }
    }

    /// Log-probability of a token.
    pub fn ln_p(&self, token: u32) -> f64 {
        f64::from(self.logits[token as usize]) - self.log_sum
    }

    /// The most likely token; the first of equals.
    pub fn top(&self) -> u32 {
        let largest = |m: (usize, f32), (i, x): (usize, &f32)| if *x > m.1 { (i, *x) } else { m };
        self.logits.iter().enumerate().fold((0, f32::NEG_INFINITY), largest).0 as u32
    }

    /// `sum_i b_i (ln b_i - ln q_i)` for this base `b`, over what it finds likely enough for a file.
    pub fn kl(&self, model: &Row) -> f64 {
        let pairs = self.logits.iter().zip(model.logits);
        let terms = pairs.map(|(b, q)| (f64::from(*b) - self.log_sum, f64::from(*q)));
        let kept = terms.filter(|(b, _)| *b > f64::from(KL_FLOOR));
        kept.map(|(b, q)| b.exp() * (b - (q - model.log_sum))).sum()
    }
}

impl Spread {
    fn new(mut values: Vec<f64>) -> Spread {
        let mean = Estimate::mean(&values);
        values.sort_by(f64::total_cmp);
        Spread { mean, sorted: values }
    }

    /// The value that `share` of the tokens lie below: linear interpolation in the sorted list, at
    /// `share * (n - 1)`.
    pub fn at(&self, share: f64) -> f64 {
        let at = share * self.sorted.len().saturating_sub(1) as f64;
        let get = |i: f64| self.sorted.get(i as usize).copied().unwrap_or(f64::NAN);
        let (low, high) = (get(at.floor()), get(at.ceil()));
        low + (high - low) * at.fract()
    }
}

impl Tally {
    /// Counts a position whose right token is `target`.
    pub fn add(&mut self, model: Row, base: Row, target: u32) {
        let (ln_q, ln_b) = (model.ln_p(target), base.ln_p(target));
        self.nll.push(-ln_q);
        self.base_nll.push(-ln_b);
        self.kl.push(base.kl(&model));
        self.dp.push(ln_q.exp() - ln_b.exp());
        self.n_same += usize::from(model.top() == base.top());
    }

    /// What all of them say.
    pub fn finish(self) -> Divergence {
        let n = self.nll.len() as f64;
        let pairs = || self.nll.iter().zip(&self.base_nll);
        let (nll, base_nll) = (Estimate::mean(&self.nll), Estimate::mean(&self.base_nll));
        let shared = covariance((&self.nll, nll.value), (&self.base_nll, base_nll.value));
        // The error of a difference, from differences: `s_q^2 + s_b^2 - 2 cov` would cancel.
        let ln_ppl_ratio = Estimate::mean(&pairs().map(|(q, b)| q - b).collect::<Vec<_>>());
        let (ppl, base_ppl) = (nll.exp(), base_nll.exp());
        let weighted = pairs().map(|(q, b)| ppl.value * q - base_ppl.value * b);
        let diff_err = Estimate::mean(&weighted.collect::<Vec<_>>()).err;
        let squares = Estimate::mean(&self.dp.iter().map(|d| d * d).collect::<Vec<_>>());
        let rms = squares.value.sqrt();
        let same = self.n_same as f64 / n;
        Divergence {
            base_ppl,
            ppl_ratio: ln_ppl_ratio.exp(),
            ppl_diff: Estimate { value: ppl.value - base_ppl.value, err: diff_err },
            ln_ppl_ratio,
            ln_ppl_correlation: shared / (nll.err * base_nll.err),
            kl: Spread::new(self.kl),
            dp: Spread::new(self.dp),
            dp_rms: Estimate {
                value: rms,
                err: if rms == 0.0 { 0.0 } else { squares.err / (2.0 * rms) },
            },
            same_top: Estimate { value: same, err: (same * (1.0 - same) / (n - 1.0)).sqrt() },
        }
    }
}

impl Divergence {
    /// Every number with its name in reports; `_err` is a standard error.
    pub fn fields(&self) -> Vec<(String, f64)> {
        let mut out = Vec::new();
        for (name, x) in [
            ("base_ppl", self.base_ppl),
            ("ppl_ratio", self.ppl_ratio),
            ("ppl_diff", self.ppl_diff),
            ("ln_ppl_ratio", self.ln_ppl_ratio),
            ("same_top", self.same_top),
            ("dp_rms", self.dp_rms),
        ] {
            out.extend([(name.to_string(), x.value), (format!("{name}_err"), x.err)]);
        }
        out.push(("ln_ppl_correlation".into(), self.ln_ppl_correlation));
        for (name, x) in [("kl", &self.kl), ("dp", &self.dp)] {
            out.push((format!("{name}_mean"), x.mean.value));
            out.push((format!("{name}_err"), x.mean.err));
            out.extend(POINTS.iter().map(|(end, share)| (format!("{name}_{end}"), x.at(*share))));
        }
        out
    }
}

/// Covariance of two means: of lists with their means, over `n - 1`.
fn covariance((a, mean_a): (&[f64], f64), (b, mean_b): (&[f64], f64)) -> f64 {
    let n = a.len() as f64;
    a.iter().zip(b).map(|(a, b)| (a - mean_a) * (b - mean_b)).sum::<f64>() / n / (n - 1.0)
}
