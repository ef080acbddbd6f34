//! Numbers that are not finite, and where they came up.

use std::fmt::{Display, Formatter};
use std::sync::atomic::{AtomicBool, Ordering};

use super::forward::{Buffers, Pass};
use super::spans::Part;
use crate::error::{Error, Result};
use crate::simd;

/// A part of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// What a token begins as.
    Embedding,
    /// A layer, from 0.
    Layer(usize),
    /// What comes after the last layer.
    Output,
}

impl Display for Place {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Embedding => write!(f, "the token embedding"),
            Place::Layer(i) => write!(f, "layer {i}"),
            Place::Output => write!(f, "the output"),
        }
    }
}

/// The first number in the residual stream of a sequence that is not finite.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Position of its token.
    pub position: usize,
    /// What it came out of.
    pub place: Place,
    /// Position of the first token that went through the layers together with it: all from there on
    /// may have come out wrong, since products run over whole blocks of keys.
    pub start: usize,
    /// Position after the last token that was read since.
    pub(super) end: usize,
}

/// Refuses numbers that come of a model when they are not finite, with the place where that began;
/// without one, after the last layer.
///
/// # Errors
///
/// That a token cannot be chosen by them: a line with the place.
pub fn check_finite(numbers: &[f32], fault: Option<Fault>) -> Result<()> {
    if simd::are_finite(numbers) {
        return Ok(());
    }
    let place = fault.map_or(Place::Output, |fault| fault.place);
    let at = fault.map(|fault| format!(", token {}", fault.position)).unwrap_or_default();
    Err(Error::Runtime(format!(
        "{place} makes numbers that are not finite{at}: its weights are damaged, or this model \
         cannot be computed so"
    )))
}

impl Buffers {
    /// Takes down what in `x`, which came out of `place`, is not finite, for each part that had no
    /// fault before.
    pub(super) fn check_finite(&mut self, pass: &Pass, place: Place, parts: &mut [Part]) {
        if place == Place::Embedding {
            for part in parts.iter_mut() {
                part.cache.heal(part.position);
                if let Some(fault) = &mut part.cache.fault {
                    fault.end = part.position + part.rows.len();
                }
            }
        }
        let n_embd = pass.model.hparams.n_embd;
        let x = match &mut self.x[..] {
            x if x.len() == n_embd && simd::are_finite(x) => return,
            x => x,
        };
        let are_finite = AtomicBool::new(true);
        pass.crew.chunks(x, n_embd, |_, _, row| {
            if !simd::are_finite(row) {
                are_finite.store(false, Ordering::Relaxed);
            }
        });
        if are_finite.into_inner() {
            return;
        }
        for part in parts.iter_mut().filter(|part| part.cache.fault.is_none()) {
            let (start, end) = (part.position, part.position + part.rows.len());
            let mut rows = part.of(&self.x, n_embd).chunks_exact(n_embd);
            let row = rows.position(|row| !simd::are_finite(row));
            part.cache.fault = row.map(|row| Fault { position: start + row, place, start, end });
        }
    }
}
