//! Perplexity, and divergence from a base, defined as llama.cpp's `perplexity` tool defines them.
//!
//! The text is cut into windows of `n_ctx` tokens. The first token of each is replaced by BOS where
//! the model uses one, and the second half of each is scored: positions `n_ctx / 2 .. n_ctx - 1`
//! predict the token after them. To masks, the first half is a prompt, and the scored half is not.

use super::base::{encode, header};
use crate::error::Result;
use crate::gguf::Sink;
use crate::session::Session;

pub use super::base::{Base, MAX_BASE_BYTES, Windows};
pub use super::divergence::{Divergence, Estimate, POINTS, Row, Spread, Tally};

/// What was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Quality {
    /// Scored tokens.
    pub tokens: usize,
    /// Window in tokens.
    pub n_ctx: usize,
    /// Perplexity: `exp` of the mean negative log-likelihood.
    pub ppl: Estimate,
    /// From the base, if there is one.
    pub divergence: Option<Divergence>,
}

impl Quality {
    /// Every number with its name in reports; those that need a base only with one.
    pub fn fields(&self) -> Vec<(String, f64)> {
        let own = [("ppl".to_string(), self.ppl.value), ("ppl_err".to_string(), self.ppl.err)];
        own.into_iter().chain(self.divergence.iter().flat_map(Divergence::fields)).collect()
    }
}

/// Scores all windows, against `base` if there is one, which must be of the same windows. `save`
/// gets a file that can be the base of other models. `progress` is called after every window with
/// its number.
pub fn evaluate(
    session: &mut Session,
    windows: &Windows,
    mut base: Option<&mut Base>,
    mut save: Option<&mut Sink>,
    progress: &mut dyn FnMut(usize),
) -> Result<Quality> {
    let n_vocab = session.model().hparams.n_vocab;
    if let Some(base) = &base {
        base.check(n_vocab, windows)?;
    }
    if let Some(save) = &mut save {
        save(&header(windows, n_vocab))?;
    }
    let (mut nll, mut tally) = (Vec::new(), Tally::default());
    for i in 0..windows.len() {
        let targets = windows.targets(i);
        let rows = windows.read(i, session)?.chunks_exact(n_vocab).map(Row::new);
        let rows: Vec<Row> = rows.collect();
        nll.extend(rows.iter().zip(targets).map(|(row, target)| -row.ln_p(*target)));
        if let Some(save) = &mut save {
            rows.iter().try_for_each(|row| save(&encode(*row)))?;
        }
        if let Some(base) = &mut base {
            let pairs = rows.iter().zip(base.rows(i)?).zip(targets);
            pairs.for_each(|((row, base), target)| tally.add(*row, base, *target));
        }
        progress(i + 1);
    }
    let ppl = Estimate::mean(&nll).exp();
    let divergence = base.map(|_| tally.finish());
    Ok(Quality { tokens: nll.len(), n_ctx: windows.n_ctx, ppl, divergence })
}
