//! Writing grammars in the engine's notation, in which every part has a name of its own: the
//! engine's limits on nesting are narrow.

use std::fmt::Write;

use super::gbnf::{Node, Range};
use super::lexemes::Lexemes;

/// A grammar in the engine's notation.
pub(super) fn write(lexemes: &Lexemes) -> String {
    let n = lexemes.rules.nodes.len();
    let mut writer = Writer { lexemes, open: Vec::new(), seen: [vec![false; n], vec![false; n]] };
    let start = lexemes.rules.bodies[lexemes.rules.root];
    let mut text = format!("start: {}\n", writer.part(start));
    while let Some((part, is_lexeme)) = writer.open.pop() {
        let name = name(part, is_lexeme);
        let body = writer.body(part, is_lexeme);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{name}: {body}");
    }
    text
}

struct Writer<'a> {
    lexemes: &'a Lexemes,
    /// Parts that are named, and whether as a lexeme or part of one.
    open: Vec<(usize, bool)>,
    /// Which parts are named, as rules and as lexemes.
    seen: [Vec<bool>; 2],
}

impl Writer<'_> {
    /// The name of a part in a rule.
    fn part(&mut self, part: usize) -> String {
        self.named(part, self.lexemes.whole[part])
    }

    fn named(&mut self, part: usize, is_lexeme: bool) -> String {
        if !std::mem::replace(&mut self.seen[usize::from(is_lexeme)][part], true) {
            self.open.push((part, is_lexeme));
        }
        name(part, is_lexeme)
    }

    fn body(&mut self, part: usize, is_lexeme: bool) -> String {
        let lexemes = self.lexemes;
        let rules = &lexemes.rules;
        let mut item = |part: &usize| match is_lexeme {
            true => self.named(*part, true),
            false => self.part(*part),
        };
        let chars = |part: usize| match &rules.nodes[part] {
            Node::Chars(ranges) => Some(&ranges[..]),
            _ => None,
        };
        match &rules.nodes[part] {
            Node::Chars(ranges) => format!("/{}/", class(ranges)),
            Node::Rule(rule) => item(&rules.bodies[*rule]),
            Node::Sequence(items) if items.is_empty() => "\"\"".into(),
            Node::Sequence(items) if is_lexeme && items.iter().all(|i| chars(*i).is_some()) => {
                let classes: String = items.iter().filter_map(|i| chars(*i)).map(class).collect();
                format!("/{classes}/")
            }
            Node::Sequence(items) => items.iter().map(item).collect::<Vec<_>>().join(" "),
            Node::Choice(items) => items.iter().map(item).collect::<Vec<_>>().join(" | "),
            Node::Repeat(_, _, Some(0)) => "\"\"".into(),
            Node::Repeat(part, min, max) => {
                let item = item(part);
                match (min, max) {
                    (0, None) => format!("{item}*"),
                    (1, None) => format!("{item}+"),
                    (0, Some(1)) => format!("{item}?"),
                    (min, None) => format!("{item}{{{min},}}"),
                    (min, Some(max)) => format!("{item}{{{min},{max}}}"),
                }
            }
        }
    }
}

/// The name of a part.
fn name(part: usize, is_lexeme: bool) -> String {
    format!("{}{part}", if is_lexeme { 'T' } else { 'r' })
}

/// A regular expression of one character.
fn class(ranges: &[Range]) -> String {
    let ranges: String = ranges.iter().map(|(a, b)| format!("\\x{{{a:X}}}-\\x{{{b:X}}}")).collect();
    format!("[{ranges}]")
}
