//! Perplexity, and divergence from a base, defined as llama.cpp's `perplexity` tool defines them.
//!
//! The text is cut into windows of `n_ctx` tokens. The first token of each is replaced by BOS where
//! the model uses one, and the second half of each is scored: positions `n_ctx / 2 .. n_ctx - 1`
//! predict the token after them.

use std::path::Path;

use crate::bad_file;
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::{Bytes, Sink};
use crate::session::Session;
use crate::simd;
use crate::token::Tokenizer;

/// Log-probabilities of a base below this do not count in the divergence.
const KL_FLOOR: f32 = -16.0;

/// What was measured. Divergences are in nats per token.
#[derive(Debug, Clone, PartialEq)]
pub struct Quality {
    /// Scored tokens.
    pub tokens: usize,
    /// Window in tokens.
    pub n_ctx: usize,
    /// Perplexity: `exp` of the mean negative log-likelihood.
    pub ppl: f64,
    /// Its standard error.
    pub ppl_err: f64,
    /// Against the base, if there is one.
    pub divergence: Option<Divergence>,
}

/// How the model's distribution differs from a base's.
#[derive(Debug, Clone, PartialEq)]
pub struct Divergence {
    /// Mean of `KL(base || model)`.
    pub kl_mean: f64,
    /// Its standard error.
    pub kl_err: f64,
    /// 99th percentile.
    pub kl_p99: f64,
    /// Largest.
    pub kl_max: f64,
    /// Share of tokens where both have the same most likely token.
    pub same_top: f64,
    /// Its standard error.
    pub same_top_err: f64,
    /// Perplexity of the base, from its stored log-probabilities.
    pub base_ppl: f64,
}

/// Tokens cut into windows.
pub struct Windows {
    /// Tokens of one window.
    pub n_ctx: usize,
    tokens: Vec<u32>,
}

impl Windows {
    /// Whole windows of a text's tokens; what is left over is not used.
    pub fn new(tokens: Vec<u32>, n_ctx: usize) -> Result<Windows> {
        if n_ctx < 4 {
            bad_usage!("context = {n_ctx}; allowed 4 or more tokens");
        }
        if tokens.len() < 2 * n_ctx {
            bad_usage!("the text has {} tokens; two windows of {n_ctx} are needed", tokens.len());
        }
        Ok(Windows { n_ctx, tokens })
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.n_ctx
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Every window as a model reads it: begun by BOS where the model uses one, and without its last
    /// token, which only ever is a target.
    pub fn inputs(&self, tokenizer: &Tokenizer) -> impl Iterator<Item = Vec<u32>> {
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        self.tokens().chunks_exact(self.n_ctx).map(move |window| {
            let mut input = window[..self.n_ctx - 1].to_vec();
            if let (Some(bos), Some(first)) = (bos, input.first_mut()) {
                *first = bos;
            }
            input
        })
    }

    /// The tokens of all windows.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens[..self.len() * self.n_ctx]
    }
}

/// Stored log-probabilities of a base, in the file format of llama.cpp's `--kl-divergence-base`.
pub struct Base {
    /// The windows that were scored.
    pub windows: Windows,
    n_vocab: usize,
    rows: Bytes,
}

impl Base {
    /// Opens a file of a model with `n_vocab` tokens.
    pub fn open(path: &Path, n_vocab: usize) -> Result<Base> {
        Base::parse(Bytes::map(path)?, n_vocab).map_err(|e| e.at(path))
    }

    fn parse(bytes: Bytes, n_vocab: usize) -> Result<Base> {
        if !bytes.starts_with(b"_logits_") {
            bad_file!("not a file of base log-probabilities: it does not begin with \"_logits_\"");
        }
        let field = |i: usize| -> Result<usize> {
            match bytes.get(8 + 4 * i..12 + 4 * i) {
                Some(b) => Ok(u32::from_le_bytes(b.try_into().unwrap_or_default()) as usize),
                None => bad_file!("truncated header: it has 20 bytes, the file {}", bytes.len()),
            }
        };
        let (n_ctx, base_vocab, n_chunk) = (field(0)?, field(1)?, field(2)?);
        if base_vocab != n_vocab {
            bad_file!("made with a vocabulary of {base_vocab}; this model has {n_vocab}");
        }
        if n_ctx < 4 {
            bad_file!("n_ctx = {n_ctx} at byte 8; allowed 4 or more");
        }
        let n_tokens = n_ctx as u64 * n_chunk as u64;
        let n_rows = n_chunk as u64 * scored(n_ctx).len() as u64;
        let needed = 20 + 4 * n_tokens as u128 + n_rows as u128 * row_bytes(n_vocab) as u128;
        if n_chunk == 0 || needed != bytes.len() as u128 {
            bad_file!(
                "{n_chunk} windows of {n_ctx} tokens need {needed} bytes; the file has {}",
                bytes.len()
            );
        }
        let start = 20 + 4 * n_tokens as usize;
        let tokens = bytes[20..start].chunks_exact(4);
        let tokens: Vec<u32> =
            tokens.map(|b| u32::from_le_bytes(b.try_into().unwrap_or_default())).collect();
        if let Some(token) = tokens.iter().find(|t| **t as usize >= n_vocab) {
            bad_file!("token {token}; the vocabulary has {n_vocab}");
        }
        let Some(rows) = bytes.slice(start..bytes.len()) else { bad_file!("truncated rows") };
        Ok(Base { windows: Windows { n_ctx, tokens }, n_vocab, rows })
    }

    /// The file's beginning, for windows of a model with `n_vocab` tokens; rows follow it.
    fn header(windows: &Windows, n_vocab: usize) -> Vec<u8> {
        let mut out = b"_logits_".to_vec();
        let counts = [windows.n_ctx, n_vocab, windows.len()].map(|n| n as u32);
        let numbers = counts.iter().chain(windows.tokens());
        numbers.for_each(|n| out.extend(n.to_le_bytes()));
        out
    }

    /// The stored form of one scored token's logits, whose log-sum is `log_sum`.
    fn encode(logits: &[f32], log_sum: f64) -> Vec<u8> {
        let max = simd::max(logits);
        let min = logits.iter().copied().fold(f32::INFINITY, f32::min).max(max + KL_FLOOR);
        let scale = (max - min) / 65_535.0;
        let mut out = scale.to_le_bytes().to_vec();
        out.extend(((f64::from(min) - log_sum) as f32).to_le_bytes());
        let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
        for x in logits {
            // Casting saturates, so what is below the floor becomes 0.
            out.extend((((x - min) * inverse).round() as u16).to_le_bytes());
        }
        out.resize(row_bytes(logits.len()), 0);
        out
    }

    /// The log-probabilities of one scored token.
    fn row(&self, i: usize, out: &mut Vec<f32>) {
        let n = row_bytes(self.n_vocab);
        let row = &self.rows[i * n..(i + 1) * n];
        let float = |at: usize| f32::from_le_bytes(row[at..at + 4].try_into().unwrap_or_default());
        let (scale, min) = (float(0), float(4));
        let codes = row[8..].chunks_exact(2).take(self.n_vocab);
        out.clear();
        out.extend(codes.map(|b| scale * f32::from(u16::from_le_bytes([b[0], b[1]])) + min));
    }
}

/// Two floats and a code of 16 bits per token, padded to an even number.
fn row_bytes(n_vocab: usize) -> usize {
    2 * (n_vocab.next_multiple_of(2) + 4)
}

/// The positions of a window that are scored.
fn scored(n_ctx: usize) -> std::ops::Range<usize> {
    n_ctx / 2..n_ctx - 1
}

/// Scores all windows, against `base` if there is one, which must be of the same windows. `save`
/// gets a file that can be the base of other models. `progress` is called after every window with
/// its number.
pub fn evaluate(
    session: &mut Session,
    windows: &Windows,
    base: Option<&Base>,
    mut save: Option<&mut Sink>,
    progress: &mut dyn FnMut(usize),
) -> Result<Quality> {
    let model = session.model().clone();
    let n_vocab = model.hparams.n_vocab;
    let n_ctx = windows.n_ctx;
    if let Some(save) = &mut save {
        save(&Base::header(windows, n_vocab))?;
    }
    let (mut nll, mut base_nll) = (Vec::new(), Vec::new());
    let (mut kl, mut n_same, mut base_row) = (Vec::new(), 0usize, Vec::new());
    let inputs = windows.inputs(&model.tokenizer);
    for (i, (window, input)) in windows.tokens().chunks_exact(n_ctx).zip(inputs).enumerate() {
        session.rewind(0);
        let logits = session.feed_wanting(&input, scored(n_ctx))?;
        for (logits, at) in logits.chunks_exact(n_vocab).zip(scored(n_ctx)) {
            let target = window[at + 1] as usize;
            let log_sum = log_sum_exp(logits);
            nll.push(log_sum - f64::from(logits[target]));
            if let Some(save) = &mut save {
                save(&Base::encode(logits, log_sum))?;
            }
            if let Some(base) = base {
                base.row(nll.len() - 1, &mut base_row);
                base_nll.push(-f64::from(base_row[target]));
                kl.push(divergence(&base_row, logits, log_sum));
                n_same += usize::from(top(&base_row) == top(logits));
            }
        }
        progress(i + 1);
    }
    let (mean, err) = mean_and_error(&nll);
    let ppl = mean.exp();
    let divergence = base.map(|_| {
        let (kl_mean, kl_err) = mean_and_error(&kl);
        let n = kl.len() as f64;
        let same_top = n_same as f64 / n;
        kl.sort_by(f64::total_cmp);
        Divergence {
            kl_mean,
            kl_err,
            kl_p99: percentile(&kl, 0.99),
            kl_max: percentile(&kl, 1.0),
            same_top,
            same_top_err: (same_top * (1.0 - same_top) / (n - 1.0)).sqrt(),
            base_ppl: mean_and_error(&base_nll).0.exp(),
        }
    });
    Ok(Quality { tokens: nll.len(), n_ctx, ppl, ppl_err: ppl * err, divergence })
}

/// `ln sum exp x`.
fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits.iter().fold(f32::NEG_INFINITY, |m, x| m.max(*x)));
    max + logits.iter().map(|x| (f64::from(*x) - max).exp()).sum::<f64>().ln()
}

/// `sum_i b_i (ln b_i - ln q_i)` over what the base finds likely enough to have stored.
fn divergence(base: &[f32], logits: &[f32], log_sum: f64) -> f64 {
    let terms = base.iter().zip(logits).filter(|(b, _)| **b > KL_FLOOR).map(|(b, x)| {
        let b = f64::from(*b);
        b.exp() * (b - (f64::from(*x) - log_sum))
    });
    terms.sum()
}

/// The index of the largest; the first of equals.
fn top(x: &[f32]) -> usize {
    x.iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), |m, (i, x)| if *x > m.1 { (i, *x) } else { m })
        .0
}

/// Mean and its standard error.
fn mean_and_error(x: &[f64]) -> (f64, f64) {
    let n = x.len() as f64;
    let mean = x.iter().sum::<f64>() / n;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / n;
    (mean, (variance / (n - 1.0)).sqrt())
}

/// Linear interpolation in a sorted list, at `fraction * (n - 1)`.
fn percentile(sorted: &[f64], fraction: f64) -> f64 {
    let at = fraction * (sorted.len().saturating_sub(1)) as f64;
    let get = |i: usize| sorted.get(i).copied().unwrap_or(f64::NAN);
    let (low, high) = (get(at.floor() as usize), get(at.ceil() as usize));
    low + (high - low) * at.fract()
}
