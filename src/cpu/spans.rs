//! What goes through the layers together: tokens of one sequence, or of several, each with a cache of
//! its own.

use std::ops::Range;

use super::KvCache;
use crate::attention::{Attention, together};
use crate::mask::Visible;

/// Tokens of one sequence, at positions that follow each other.
pub struct Span<'a> {
    /// The tokens.
    pub tokens: &'a [u32],
    /// Position of the first; all must fit the cache.
    pub n_past: usize,
    /// Positions of a prompt; if its tokens see later ones, those must be in `tokens` too.
    pub prompt: &'a Range<usize>,
    /// The tokens of which something is asked: indices into `tokens`.
    pub wanted: Range<usize>,
    /// The attention of every layer, in the forms of the engine's model.
    pub attention: &'a [Attention],
    /// The sequence's cache.
    pub cache: &'a mut KvCache,
}

/// The part of a span that is in a batch.
pub(super) struct Part<'a> {
    /// Rows of the batch.
    pub(super) rows: Range<usize>,
    /// Position of the first of them.
    pub(super) position: usize,
    /// Those of them that go on after the last cache is filled.
    pub(super) wanted: Range<usize>,
    pub(super) prompt: &'a Range<usize>,
    pub(super) attention: &'a [Attention],
    pub(super) cache: &'a mut KvCache,
}

impl<'a> Part<'a> {
    /// `n` tokens from position 0 on that are no prompt, as all there is.
    pub(super) fn alone(n: usize, attention: &'a [Attention], cache: &'a mut KvCache) -> Part<'a> {
        Part { rows: 0..n, position: 0, wanted: 0..n, prompt: &(0..0), attention, cache }
    }

    /// What the query of its row `t` sees.
    pub(super) fn visible(&self, layer: usize, t: usize) -> Visible {
        self.attention[layer].visible(self.position + t, self.prompt)
    }

    /// The cache that has a layer's keys and values, and the layer of it.
    pub(super) fn keys_and_values(&self, layer: usize) -> (&KvCache, usize) {
        self.cache.rebuilt(layer).unwrap_or((self.cache, layer))
    }

    /// The rows of a matrix of this width.
    pub(super) fn of<'b>(&self, data: &'b [f32], width: usize) -> &'b [f32] {
        &data[self.rows.start * width..self.rows.end * width]
    }
}

/// Takes about `n_batch` of the tokens that are left, from where `starts` says, first spans first, each
/// with the tokens that it must be read together with. Nothing if none are left.
pub(super) fn next_batch<'a>(
    spans: &'a mut [Span],
    starts: &mut [usize],
    n_batch: usize,
) -> (Vec<u32>, Vec<Part<'a>>) {
    let (mut tokens, mut parts) = (Vec::new(), Vec::new());
    for (span, start) in spans.iter_mut().zip(starts) {
        let end = span.tokens.len().min(*start + n_batch.saturating_sub(tokens.len()));
        if *start == end {
            continue;
        }
        let positions = span.n_past + *start..span.n_past + end;
        let end = together(span.attention, positions, span.prompt) - span.n_past;
        let first = tokens.len();
        tokens.extend_from_slice(&span.tokens[*start..end]);
        let row = |at: usize| first + at.clamp(*start, end) - *start;
        parts.push(Part {
            rows: first..tokens.len(),
            position: span.n_past + *start,
            wanted: row(span.wanted.start)..row(span.wanted.end.max(span.wanted.start)),
            prompt: span.prompt,
            attention: span.attention,
            cache: span.cache,
        });
        *start = end;
    }
    (tokens, parts)
}

/// Leaves of the parts only what is wanted, as the rows that are left after the others are gone: these.
pub(super) fn narrow(parts: &mut [Part]) -> Vec<Range<usize>> {
    let mut n = 0;
    let kept = parts.iter().map(|part| part.wanted.clone()).collect();
    for part in parts {
        part.position += part.wanted.start - part.rows.start;
        part.rows = n..n + part.wanted.len();
        n = part.rows.end;
        part.wanted = part.rows.clone();
    }
    kept
}
