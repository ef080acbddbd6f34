//! The tokens of one sequence, as far as they are read.

use std::borrow::Cow;
use std::ops::Range;

use crate::attention::{Attention, looks_ahead};

/// Tokens by position, and which of them are kept or forgotten together.
#[derive(Debug, Clone, Default)]
pub(super) struct Timeline {
    /// All copies of prompts among them.
    tokens: Vec<u32>,
    /// Prompts that are kept or forgotten as a whole, first to last.
    prompts: Vec<Prompt>,
}

/// A prompt whose tokens have seen later ones, or that was read more than once.
#[derive(Debug, Clone)]
struct Prompt {
    /// Its positions, those of all copies.
    positions: Range<usize>,
    /// Tokens of the first copy.
    n: usize,
}

impl Timeline {
    /// The tokens that were read.
    pub(super) fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// Its prompts as text: `START-END:N` with `,` between them.
    pub(super) fn prompts_text(&self) -> String {
        let text = |p: &Prompt| format!("{}-{}:{}", p.positions.start, p.positions.end, p.n);
        self.prompts.iter().map(text).collect::<Vec<_>>().join(",")
    }

    /// These tokens, with prompts from such a text.
    pub(super) fn of(tokens: Vec<u32>, prompts: &str) -> Option<Timeline> {
        let mut all: Vec<Prompt> = Vec::new();
        for text in prompts.split(',').filter(|text| !text.is_empty()) {
            let (positions, n) = text.split_once(':')?;
            let (start, end) = positions.split_once('-')?;
            let positions = start.parse().ok()?..end.parse().ok()?;
            let n = n.parse().ok()?;
            let first = all.last().map_or(0, |p| p.positions.end);
            let fits = first <= positions.start && positions.end <= tokens.len();
            if !fits || !(1..=positions.len()).contains(&n) {
                return None;
            }
            all.push(Prompt { positions, n });
        }
        Some(Timeline { tokens, prompts: all })
    }

    /// Takes more.
    pub(super) fn extend(&mut self, tokens: &[u32]) {
        self.tokens.extend_from_slice(tokens);
    }

    /// The positions of a prompt that follows, of `n` tokens in all copies and `n_first` in the first.
    pub(super) fn begin_prompt(
        &mut self,
        layers: &[Attention],
        n: usize,
        n_first: usize,
    ) -> Range<usize> {
        let start = self.tokens.len();
        let positions = start..start + n;
        if n > n_first || looks_ahead(layers, &positions) {
            self.prompts.push(Prompt { positions: positions.clone(), n: n_first });
        }
        positions
    }

    /// Forgets everything after the first `n` tokens, and of a prompt whose tokens have seen each
    /// other everything if it is cut.
    pub(super) fn rewind(&mut self, n: usize) {
        let cut = self.prompts.iter().find(|p| p.positions.end > n);
        let n = cut.map_or(n, |p| p.positions.start.min(n));
        self.prompts.retain(|p| p.positions.end <= n);
        self.tokens.truncate(n);
    }

    /// What of a prompt and a reply need not be read again: its number of tokens, and of positions.
    /// At least one token is left to read.
    pub(super) fn shared(&self, prompt: &[u32], reply: &[u32]) -> (usize, usize) {
        let tokens = [prompt, reply].concat();
        let rest = &tokens[..tokens.len().saturating_sub(1)];
        let equal = |at: usize, from: usize, most: usize| {
            let pairs = self.tokens[at..].iter().zip(&rest[from..]).take(most);
            pairs.take_while(|(a, b)| a == b).count()
        };
        let (mut n, mut position) = (0, 0);
        for Prompt { positions, n: n_given } in &self.prompts {
            let before = equal(position, n, positions.start - position);
            (n, position) = (n + before, position + before);
            let is_whole = position == positions.start && n + n_given <= prompt.len();
            if !is_whole || equal(position, n, *n_given) < *n_given {
                return (n, position);
            }
            (n, position) = (n + n_given, positions.end);
        }
        let after = equal(position, n, usize::MAX);
        (n + after, position + after)
    }
}

/// A prompt as often as it is read; a BOS that it begins with stays the only one.
pub(super) fn copies(tokens: &[u32], n_copies: usize, bos: Option<u32>) -> Cow<'_, [u32]> {
    if n_copies == 1 {
        return Cow::Borrowed(tokens);
    }
    let again = &tokens[usize::from(bos.is_some() && tokens.first() == bos.as_ref())..];
    Cow::Owned([tokens, &again.repeat(n_copies - 1)].concat())
}
