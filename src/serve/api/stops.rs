//! Texts that end a reply, found while it comes. What may be the beginning of one is held back.

/// Looks for texts, each by the automaton of Knuth, Morris and Pratt (1977).
#[derive(Clone)]
pub(super) struct Stops {
    all: Vec<Stop>,
    /// What is held back.
    held: String,
}

#[derive(Clone)]
struct Stop {
    text: Box<[u8]>,
    /// For every length of a beginning, the next shorter beginning with which it ends.
    shorter: Box<[u32]>,
    /// Bytes of the beginning with which the text so far ends.
    n: usize,
}

/// What came of more text.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Passed {
    /// What surely is in front of any stop.
    pub(super) text: String,
    /// Whether a stop follows it.
    pub(super) stopped: bool,
}

impl Stop {
    fn new(text: &str) -> Stop {
        let text: Box<[u8]> = text.as_bytes().into();
        let mut shorter = vec![0u32; text.len() + 1];
        let mut n = 0;
        for i in 1..text.len() {
            while n > 0 && text[i] != text[n] {
                n = shorter[n] as usize;
            }
            n += usize::from(text[i] == text[n]);
            shorter[i + 1] = n as u32;
        }
        Stop { text, shorter: shorter.into(), n: 0 }
    }

    /// Takes the next byte; whether the text ends with the stop.
    fn push(&mut self, byte: u8) -> bool {
        while self.n > 0 && self.text[self.n] != byte {
            self.n = self.shorter[self.n] as usize;
        }
        self.n += usize::from(self.text[self.n] == byte);
        self.n == self.text.len()
    }
}

impl Stops {
    /// Looks for these texts, none of them empty.
    pub(super) fn new(texts: &[String]) -> Stops {
        Stops { all: texts.iter().map(|text| Stop::new(text)).collect(), held: String::new() }
    }

    /// Takes more text. Of several stops the one counts that is complete first, and the longest of
    /// those. Nothing may be taken behind a stop.
    pub(super) fn push(&mut self, text: String) -> Passed {
        if self.all.is_empty() {
            return Passed { text, stopped: false };
        }
        for (i, byte) in text.bytes().enumerate() {
            let mut found = 0;
            for stop in &mut self.all {
                if stop.push(byte) {
                    found = found.max(stop.text.len());
                }
            }
            if found > 0 {
                let end = self.held.len() + i + 1 - found;
                let mut all = std::mem::take(&mut self.held) + &text;
                all.truncate(end);
                return Passed { text: all, stopped: true };
            }
        }
        let n_held = self.all.iter().map(|stop| stop.n).max().unwrap_or(0);
        let mut all = std::mem::take(&mut self.held) + &text;
        self.held = all.split_off(all.len() - n_held);
        Passed { text: all, stopped: false }
    }

    /// What was held back, when no more text comes.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::sampler::Random;

    /// The text in front of the stop that is complete first, by trying all ends.
    fn plain(text: &str, stops: &[String]) -> Option<usize> {
        let ends = (0..=text.len()).filter(|end| text.is_char_boundary(*end));
        let found = ends.filter_map(|end| {
            stops.iter().filter(|s| text[..end].ends_with(s.as_str())).map(|s| end - s.len()).min()
        });
        let mut found = found;
        found.next()
    }

    #[test]
    fn stops_are_found_however_text_is_split() {
        let mut random = Random::new(7);
        let mut below = |n: usize| (random.bits() % n as u64) as usize;
        let letters = ["a", "b", "ab", "é", "😀", "\n"];
        let mut n_found = 0;
        for case in 0..2000 {
            let mut word = |n: usize| (0..n).map(|_| letters[below(letters.len())]).collect();
            let text: String = word(12);
            let stops: Vec<String> = (0..case % 4).map(|i| word(1 + (case + i) % 5)).collect();
            let mut finder = Stops::new(&stops);
            let (mut passed, mut stopped, mut rest) = (String::new(), false, &text[..]);
            while !rest.is_empty() && !stopped {
                let ends = rest.char_indices().map(|(i, c)| i + c.len_utf8());
                let ends: Vec<usize> = std::iter::once(0).chain(ends).collect();
                let (piece, after) = rest.split_at(ends[below(ends.len().min(6))]);
                let new = finder.push(piece.to_string());
                passed += &new.text;
                (stopped, rest) = (new.stopped, after);
                // Nothing of a stop is out at any time.
                let seen = &text[..text.len() - rest.len()];
                assert!(plain(seen, &stops).is_none_or(|at| passed.len() <= at), "{seen:?}");
            }
            if !stopped {
                passed += &finder.finish();
            }
            let expected = plain(&text, &stops);
            assert_eq!(stopped, expected.is_some(), "{text:?} {stops:?}");
            assert_eq!(passed, text[..expected.unwrap_or(text.len())], "{text:?} {stops:?}");
            n_found += usize::from(stopped);
        }
        assert!((500..1500).contains(&n_found), "{n_found}");
    }

    #[test]
    fn no_more_is_held_back_than_may_become_a_stop() {
        let mut stops = Stops::new(&["END".into()]);
        let push = |text: &str| stops.push(text.into()).text;
        assert_eq!(["aE", "N", "ENx", "E", "Q"].map(push), ["a", "", "ENENx", "", "EQ"]);
    }
}
