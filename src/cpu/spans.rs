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

/// Takes about `n_batch` of the tokens out of the spans, first spans first, each with the tokens that it
/// must be read together with.
pub(super) fn next_batch<'a>(
    spans: &'a mut [Span],
    tokens: &mut Vec<u32>,
    n_batch: usize,
) -> Vec<Part<'a>> {
    let mut parts = Vec::with_capacity(spans.len());
    tokens.clear();
    for span in spans {
        let n = span.tokens.len().min(n_batch.saturating_sub(tokens.len()));
        if n == 0 {
            continue;
        }
        let positions = span.n_past..span.n_past + n;
        let n = together(span.attention, positions, span.prompt) - span.n_past;
        let (now, later) = span.tokens.split_at(n);
        let first = tokens.len();
        tokens.extend_from_slice(now);
        let Range { start, end } = span.wanted;
        parts.push(Part {
            rows: first..tokens.len(),
            position: span.n_past,
            wanted: first + start.min(n)..first + end.min(n),
            prompt: span.prompt,
            attention: span.attention,
            cache: span.cache,
        });
        (span.tokens, span.n_past) = (later, span.n_past + n);
        span.wanted = start.saturating_sub(n)..end.saturating_sub(n);
    }
    parts
}

/// Leaves of the parts only what is wanted, as rows that follow each other; `kept`: where they were.
pub(super) fn narrow(parts: &mut [Part], kept: &mut Vec<Range<usize>>) {
    let mut n = 0;
    kept.clear();
    for part in parts {
        kept.push(part.wanted.clone());
        part.position += part.wanted.start - part.rows.start;
        part.rows = n..n + part.wanted.len();
        n = part.rows.end;
        part.wanted = part.rows.clone();
    }
}
