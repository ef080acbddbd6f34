//! The windows of a text that are scored, and what a model is judged against there: stored
//! log-probabilities, or another model.

use std::path::Path;
use std::sync::Arc;

use super::divergence::Row;
use crate::bad_file;
use crate::bad_usage;
use crate::error::Result;
use crate::gguf::Bytes;
use crate::session::Session;
use crate::simd;
use crate::token::Tokenizer;

/// Log-probabilities of a base below this do not count in the divergence, nor keep their value in
/// a file.
pub(super) const KL_FLOOR: f32 = -16.0;

/// Most memory for a base that is kept.
pub const MAX_BASE_BYTES: usize = 2 << 30;

/// Tokens cut into windows. Cloning copies no token.
#[derive(Clone)]
pub struct Windows {
    /// Tokens of one window.
    pub n_ctx: usize,
    tokens: Arc<[u32]>,
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
        Ok(Windows { n_ctx, tokens: tokens.into() })
    }

    /// Tokens of each window that are a prompt: its first half.
    pub fn n_prompt(&self) -> usize {
        scored(self.n_ctx).start
    }

    /// Context that a window takes when its prompt is read `n_copies` times.
    pub fn n_positions(&self, n_copies: usize) -> usize {
        self.n_ctx + (n_copies - 1) * self.n_prompt()
    }

    /// Number of windows.
    pub fn len(&self) -> usize {
        self.tokens.len() / self.n_ctx
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The tokens of all windows.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens[..self.len() * self.n_ctx]
    }

    /// Positions that are scored in a window.
    pub fn n_scored(&self) -> usize {
        scored(self.n_ctx).len()
    }

    fn window(&self, i: usize) -> &[u32] {
        &self.tokens[i * self.n_ctx..(i + 1) * self.n_ctx]
    }

    /// The right tokens at the scored positions of window `i`.
    pub fn targets(&self, i: usize) -> &[u32] {
        &self.window(i)[scored(self.n_ctx).start + 1..]
    }

    /// Every window as a model reads it: begun by BOS where the model uses one, and without its last
    /// token, which only ever is a target.
    pub fn inputs(&self, tokenizer: &Tokenizer) -> impl Iterator<Item = Vec<u32>> {
        (0..self.len()).map(|i| self.input(i, tokenizer))
    }

    fn input(&self, i: usize, tokenizer: &Tokenizer) -> Vec<u32> {
        let mut input = self.window(i)[..self.n_ctx - 1].to_vec();
        let bos = tokenizer.bos().filter(|_| tokenizer.add_bos());
        input[0] = bos.unwrap_or(input[0]);
        input
    }

    /// What a model predicts at the scored positions of window `i`. `[n_scored, n_vocab]`
    pub fn read<'s>(&self, i: usize, session: &'s mut Session) -> Result<&'s [f32]> {
        let input = self.input(i, &session.model().tokenizer);
        session.rewind(0);
        let (prompt, rest) = input.split_at(self.n_prompt());
        session.feed_prompt(prompt)?;
        session.feed_wanting(rest, 0..rest.len())
    }
}

/// What a model is judged against, in the same windows.
pub struct Base {
    /// The windows that are scored.
    pub windows: Windows,
    n_vocab: usize,
    source: Source,
    /// Of one window, where the source holds them in another form. `[n_scored, n_vocab]`
    logits: Vec<f32>,
    /// Of the same rows. `[n_scored]`
    log_sums: Vec<f64>,
}

enum Source {
    /// Log-probabilities in the format of llama.cpp's `--kl-divergence-base`.
    File(Bytes),
    /// Logits and log-sums of all windows.
    Memory(Vec<f32>, Vec<f64>),
    /// A model that reads each window when it is its turn.
    Live(Box<Session>),
}

impl Base {
    /// Opens a file of a model with `n_vocab` tokens.
    pub fn open(path: &Path, n_vocab: usize) -> Result<Base> {
        Base::parse(Bytes::map(path)?, n_vocab).map_err(|e| e.at(path))
    }

    /// Another model, or the same one otherwise set up. It reads every window again for each model
    /// that is judged, and keeps no more than one window's logits; see [`Base::in_memory`].
    pub fn live(session: Session, windows: Windows) -> Base {
        let n_vocab = session.model().hparams.n_vocab;
        Base::new(windows, n_vocab, Source::Live(Box::new(session)))
    }

    fn new(windows: Windows, n_vocab: usize, source: Source) -> Base {
        Base { windows, n_vocab, source, logits: Vec::new(), log_sums: Vec::new() }
    }

    /// What `session` predicts in all windows, in memory, so that many models can be judged without
    /// reading the base each time: by the same session, under other plans, too. None if that takes
    /// more than `max_bytes`. `progress` is called as by [`evaluate`](super::quality::evaluate).
    pub fn in_memory(
        session: &mut Session,
        windows: &Windows,
        max_bytes: usize,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Option<Base>> {
        let n_vocab = session.model().hparams.n_vocab;
        let n_rows = windows.len() * windows.n_scored();
        let row_bytes = size_of::<f32>() * n_vocab + size_of::<f64>();
        if n_rows.saturating_mul(row_bytes) > max_bytes {
            return Ok(None);
        }
        let mut logits = Vec::with_capacity(n_rows * n_vocab);
        for i in 0..windows.len() {
            logits.extend_from_slice(windows.read(i, session)?);
            progress(i + 1);
        }
        let log_sums = log_sums(&logits, n_vocab);
        Ok(Some(Base::new(windows.clone(), n_vocab, Source::Memory(logits, log_sums))))
    }

    /// The session of a base that is live.
    pub fn session(&mut self) -> Option<&mut Session> {
        match &mut self.source {
            Source::Live(session) => Some(session),
            _ => None,
        }
    }

    /// Refuses a model with another vocabulary, and windows that are not these.
    pub(super) fn check(&self, n_vocab: usize, windows: &Windows) -> Result<()> {
        if self.n_vocab != n_vocab {
            bad_usage!("the base has a vocabulary of {}; this model has {n_vocab}", self.n_vocab);
        }
        if self.windows.n_ctx != windows.n_ctx {
            bad_usage!("windows of {}, but the base has {}", windows.n_ctx, self.windows.n_ctx);
        }
        if self.windows.tokens() != windows.tokens() {
            bad_usage!("the base was made from another text, or with another tokenizer");
        }
        Ok(())
    }

    /// What it predicts at the scored positions of window `i`.
    pub(super) fn rows(&mut self, i: usize) -> Result<impl Iterator<Item = Row<'_>>> {
        let (n_vocab, n) = (self.n_vocab, self.windows.n_scored());
        let (logits, log_sums): (&[f32], &[f64]) = match &mut self.source {
            Source::File(bytes) => {
                decode(&bytes[i * n * row_bytes(n_vocab)..], (n, n_vocab), &mut self.logits);
                self.log_sums.resize(n, 0.0);
                (&self.logits, &self.log_sums)
            }
            Source::Memory(logits, log_sums) => {
                (&logits[i * n * n_vocab..(i + 1) * n * n_vocab], &log_sums[i * n..(i + 1) * n])
            }
            Source::Live(session) => {
                let logits = self.windows.read(i, session)?;
                self.log_sums = log_sums(logits, n_vocab);
                (logits, &self.log_sums)
            }
        };
        let rows = logits.chunks_exact(n_vocab).zip(log_sums);
        Ok(rows.map(|(logits, log_sum)| Row { logits, log_sum: *log_sum }))
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
        Ok(Base::new(Windows { n_ctx, tokens: tokens.into() }, n_vocab, Source::File(rows)))
    }
}

/// The beginning of a base's file, for windows of a model with `n_vocab` tokens; rows follow it.
pub(super) fn header(windows: &Windows, n_vocab: usize) -> Vec<u8> {
    let mut out = b"_logits_".to_vec();
    let counts = [windows.n_ctx, n_vocab, windows.len()].map(|n| n as u32);
    let numbers = counts.iter().chain(windows.tokens());
    numbers.for_each(|n| out.extend(n.to_le_bytes()));
    out
}

/// A row as a file stores it.
pub(super) fn encode(row: Row) -> Vec<u8> {
    let max = simd::max(row.logits);
    let min = row.logits.iter().copied().fold(f32::INFINITY, f32::min).max(max + KL_FLOOR);
    let scale = (max - min) / 65_535.0;
    let mut out = scale.to_le_bytes().to_vec();
    out.extend(((f64::from(min) - row.log_sum) as f32).to_le_bytes());
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for x in row.logits {
        // Casting saturates, so what is below the floor becomes 0.
        out.extend((((x - min) * inverse).round() as u16).to_le_bytes());
    }
    out.resize(row_bytes(row.logits.len()), 0);
    out
}

/// The log-probabilities in `n` stored rows.
fn decode(bytes: &[u8], (n, n_vocab): (usize, usize), out: &mut Vec<f32>) {
    out.clear();
    for row in bytes.chunks_exact(row_bytes(n_vocab)).take(n) {
        let float = |at: usize| f32::from_le_bytes(row[at..at + 4].try_into().unwrap_or_default());
        let (scale, min) = (float(0), float(4));
        let codes = row[8..].chunks_exact(2).take(n_vocab);
        out.extend(codes.map(|b| scale * f32::from(u16::from_le_bytes([b[0], b[1]])) + min));
    }
}

/// Two floats and a code of 16 bits per token, padded to an even number.
fn row_bytes(n_vocab: usize) -> usize {
    2 * (n_vocab.next_multiple_of(2) + 4)
}

/// Log-sums of rows of logits.
fn log_sums(logits: &[f32], n_vocab: usize) -> Vec<f64> {
    logits.chunks_exact(n_vocab).map(|row| Row::new(row).log_sum).collect()
}

/// The positions of a window that are scored.
fn scored(n_ctx: usize) -> std::ops::Range<usize> {
    n_ctx / 2..n_ctx - 1
}
