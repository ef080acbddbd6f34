//! Grammar files in llama.cpp's notation (GBNF): text to rules, checked.
//!
//! The notation is that of llama.cpp's `grammars/README.md`. Left recursion, which is refused there,
//! is allowed; a rule that is defined twice, which replaces the first there, is refused.

use std::collections::HashMap;

use crate::bad_usage;
use crate::error::{Result, excerpt};

/// Longest text in bytes.
const MAX_BYTES: usize = 256 << 10;
/// Most parts of rules, a character of a text being one.
const MAX_NODES: usize = 30_000;
/// Parentheses in each other at most.
const MAX_DEPTH: usize = 100;
/// Repetitions of repetitions at most.
const MAX_OPERATORS: usize = 8;
/// Largest number of repetitions.
const MAX_COUNT: u32 = 10_000;
/// The rule that a text follows.
const ROOT: &str = "root";

/// A range of characters, by code point, ends included.
pub(super) type Range = (u32, u32);

/// Part of a rule; its own parts are indices, smaller than its own after parsing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Node {
    /// One character of these, in order and apart from each other.
    Chars(Vec<Range>),
    /// What this rule says.
    Rule(usize),
    /// One after the other.
    Sequence(Vec<usize>),
    /// One of them.
    Choice(Vec<usize>),
    /// At least, and at most this often.
    Repeat(usize, u32, Option<u32>),
}

/// A grammar.
pub(super) struct Rules {
    /// Parts of all rules.
    pub nodes: Vec<Node>,
    /// The part that is each rule.
    pub bodies: Vec<usize>,
    /// The rule that a text follows.
    pub root: usize,
    /// Names of rules, for messages.
    pub names: Vec<String>,
}

impl Rules {
    /// Reads a grammar. An error names the line.
    pub fn parse(text: &str) -> Result<Rules> {
        if text.len() > MAX_BYTES {
            bad_usage!("grammar: {} bytes; allowed {MAX_BYTES}", text.len());
        }
        let mut parser = Parser { text, ..Parser::default() };
        parser.space(true);
        while parser.peek().is_some() {
            parser.rule()?;
            parser.space(true);
        }
        if parser.nodes.len() > MAX_NODES {
            bad_usage!("grammar: {} parts of rules; allowed {MAX_NODES}", parser.nodes.len());
        }
        let mut bodies = Vec::new();
        for (name, (body, line)) in parser.names.iter().zip(&parser.rules) {
            let Some(body) = body else {
                bad_usage!("grammar line {line}: rule \"{}\" is not defined", excerpt(name));
            };
            bodies.push(*body);
        }
        let Some(root) = parser.ids.get(ROOT) else {
            bad_usage!("grammar: no rule \"{ROOT}\", which a text has to follow");
        };
        Ok(Rules { root: *root, nodes: parser.nodes, bodies, names: parser.names })
    }
}

#[derive(Default)]
struct Parser<'a> {
    text: &'a str,
    at: usize,
    /// Lines that end before `counted`.
    n_lines: usize,
    counted: usize,
    nodes: Vec<Node>,
    /// Body, if it was defined, and the line that defines or first names it.
    rules: Vec<(Option<usize>, usize)>,
    names: Vec<String>,
    ids: HashMap<&'a str, usize>,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Option<char> {
        self.text[self.at..].chars().next()
    }

    /// The line of what comes next.
    fn line(&mut self) -> usize {
        self.n_lines += self.text[self.counted..self.at].matches('\n').count();
        self.counted = self.at;
        self.n_lines + 1
    }

    /// Takes this text if it comes next.
    fn take(&mut self, text: &str) -> bool {
        let found = self.text[self.at..].starts_with(text);
        self.at += if found { text.len() } else { 0 };
        found
    }

    /// Passes over blanks and comments, and ends of lines if `lines`.
    fn space(&mut self, lines: bool) {
        while let Some(c) = self.peek() {
            match c {
                '#' => {
                    let rest = &self.text[self.at..];
                    self.at += rest.find(['\n', '\r']).unwrap_or(rest.len());
                }
                ' ' | '\t' => self.at += 1,
                '\n' | '\r' if lines => self.at += 1,
                _ => return,
            }
        }
    }

    /// What comes next, for a message.
    fn found(&self) -> String {
        match self.text[self.at..].lines().next() {
            Some("") => "the end of the line".into(),
            Some(line) => format!("\"{}\"", excerpt(line)),
            None => "the end".into(),
        }
    }

    fn add(&mut self, node: Node) -> usize {
        self.nodes.push(node);
        self.nodes.len() - 1
    }

    /// The rule that is named next.
    fn name(&mut self) -> Result<usize> {
        let rest = &self.text[self.at..];
        let word = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let name = &rest[..rest.find(|c| !word(c)).unwrap_or(rest.len())];
        let line = self.line();
        if name.is_empty() {
            bad_usage!("grammar line {line}: found {}; expected a rule's name", self.found());
        }
        self.at += name.len();
        let id = *self.ids.entry(name).or_insert(self.rules.len());
        if id == self.rules.len() {
            self.rules.push((None, line));
            self.names.push(name.into());
        }
        Ok(id)
    }

    fn rule(&mut self) -> Result<()> {
        let line = self.line();
        let id = self.name()?;
        self.space(false);
        if !self.take("::=") {
            bad_usage!("grammar line {line}: found {}; expected ::=", self.found());
        }
        if self.rules[id].0.is_some() {
            let name = excerpt(&self.names[id]);
            bad_usage!("grammar line {line}: rule \"{name}\" is defined again");
        }
        self.space(true);
        let body = self.choice(0)?;
        if !matches!(self.peek(), None | Some('\n' | '\r')) {
            bad_usage!(
                "grammar line {}: found {}; expected the end of the rule",
                self.line(),
                self.found()
            );
        }
        self.rules[id] = (Some(body), line);
        Ok(())
    }

    /// Alternatives, at this depth of parentheses.
    fn choice(&mut self, depth: usize) -> Result<usize> {
        let mut items = vec![self.sequence(depth)?];
        while self.take("|") {
            self.space(true);
            items.push(self.sequence(depth)?);
        }
        Ok(match items[..] {
            [one] => one,
            _ => self.add(Node::Choice(items)),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<usize> {
        let mut items = Vec::new();
        let mut n_operators = 0;
        while let Some(c) = self.peek() {
            n_operators = if "*+?{".contains(c) { n_operators + 1 } else { 0 };
            if n_operators > MAX_OPERATORS {
                let line = self.line();
                bad_usage!(
                    "grammar line {line}: more than {MAX_OPERATORS} repetitions of one another"
                );
            }
            let item = match c {
                '"' => self.literal()?,
                '[' => self.class()?,
                '.' => {
                    self.at += 1;
                    self.add(Node::Chars(vec![(0, 0xD7FF), (0xE000, 0x10FFFF)]))
                }
                '(' => self.group(depth)?,
                '*' | '+' | '?' | '{' => match items.pop() {
                    Some(item) => self.repeat(item)?,
                    None => {
                        let (line, found) = (self.line(), self.found());
                        bad_usage!(
                            "grammar line {line}: found {found}; nothing to repeat before it"
                        )
                    }
                },
                c if c.is_ascii_alphanumeric() || c == '-' || c == '_' => {
                    let id = self.name()?;
                    self.add(Node::Rule(id))
                }
                _ => break,
            };
            items.push(item);
            self.space(depth > 0);
        }
        Ok(match items[..] {
            [one] => one,
            _ => self.add(Node::Sequence(items)),
        })
    }

    fn group(&mut self, depth: usize) -> Result<usize> {
        let line = self.line();
        if depth == MAX_DEPTH {
            bad_usage!("grammar line {line}: more than {MAX_DEPTH} parentheses in each other");
        }
        self.at += 1;
        self.space(true);
        let inner = self.choice(depth + 1)?;
        if !self.take(")") {
            bad_usage!(
                "grammar line {}: found {}; expected the ) for line {line}",
                self.line(),
                self.found()
            );
        }
        Ok(inner)
    }

    fn literal(&mut self) -> Result<usize> {
        let line = self.line();
        self.at += 1;
        let mut items = Vec::new();
        while !self.take("\"") {
            let c = self.character(line, "\"")?;
            items.push(self.add(Node::Chars(vec![(c, c)])));
        }
        // It is one item, whatever follows.
        Ok(self.add(Node::Sequence(items)))
    }

    fn class(&mut self) -> Result<usize> {
        let line = self.line();
        self.at += 1;
        let negated = self.take("^");
        let mut ranges = Vec::new();
        while !self.take("]") {
            let first = self.character(line, "]")?;
            let is_range =
                self.text[self.at..].starts_with('-') && !self.text[self.at + 1..].starts_with(']');
            self.at += usize::from(is_range);
            let last = if is_range { self.character(line, "]")? } else { first };
            if last < first {
                bad_usage!(
                    "grammar line {line}: the range U+{first:04X} to U+{last:04X} runs backwards"
                );
            }
            ranges.push((first, last));
        }
        let ranges = match negated {
            true => complement(&merged(ranges)),
            false => merged(ranges),
        };
        if ranges.is_empty() {
            bad_usage!("grammar line {line}: no character is in the class");
        }
        Ok(self.add(Node::Chars(ranges)))
    }

    /// A character of a literal or class that has begun in this line, by code point.
    fn character(&mut self, line: usize, end: &str) -> Result<u32> {
        let Some(c) = self.peek() else {
            bad_usage!("grammar line {line}: the {end} at the end is missing");
        };
        self.at += c.len_utf8();
        if c != '\\' {
            return Ok(c.into());
        }
        let Some(kind) = self.peek() else {
            bad_usage!("grammar line {line}: nothing after \\");
        };
        self.at += kind.len_utf8();
        let n_digits = match kind {
            'x' => 2,
            'u' => 4,
            'U' => 8,
            't' => return Ok(9),
            'n' => return Ok(10),
            'r' => return Ok(13),
            '\\' | '"' | '[' | ']' | '-' | '^' => return Ok(kind.into()),
            _ => bad_usage!(
                "grammar line {line}: unknown escape \\{}; allowed \\n \\r \\t \\\\ \\\" \\[ \\] \
                 \\- \\^ \\xNN \\uNNNN \\UNNNNNNNN",
                excerpt(&kind.to_string())
            ),
        };
        let digits = self.text.get(self.at..self.at + n_digits);
        let digits = digits.filter(|d| d.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = digits.and_then(|d| u32::from_str_radix(d, 16).ok());
        match code.and_then(char::from_u32) {
            Some(c) => {
                self.at += n_digits;
                Ok(c.into())
            }
            None => bad_usage!(
                "grammar line {line}: \\{kind} needs {n_digits} hexadecimal digits of a character"
            ),
        }
    }

    /// The item before, as often as the next operator says.
    fn repeat(&mut self, item: usize) -> Result<usize> {
        let line = self.line();
        for (operator, min, max) in [("*", 0, None), ("+", 1, None), ("?", 0, Some(1))] {
            if self.take(operator) {
                return Ok(self.add(Node::Repeat(item, min, max)));
            }
        }
        self.at += 1;
        let min = self.count(line)?;
        let mut max = Some(min);
        if self.take(",") {
            self.space(false);
            max = if self.peek() == Some('}') { None } else { Some(self.count(line)?) };
        }
        if !self.take("}") {
            bad_usage!("grammar line {line}: found {}; expected }}", self.found());
        }
        if max.is_some_and(|max| max < min) {
            bad_usage!("grammar line {line}: a repetition of {min} times or more, and fewer");
        }
        Ok(self.add(Node::Repeat(item, min, max)))
    }

    fn count(&mut self, line: usize) -> Result<u32> {
        self.space(false);
        let rest = &self.text[self.at..];
        let digits = &rest[..rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len())];
        if digits.is_empty() {
            bad_usage!("grammar line {line}: found {}; expected a number", self.found());
        }
        self.at += digits.len();
        self.space(false);
        match digits.parse() {
            Ok(n) if n <= MAX_COUNT => Ok(n),
            _ => bad_usage!(
                "grammar line {line}: {} repetitions; allowed 0..={MAX_COUNT}",
                excerpt(digits)
            ),
        }
    }
}

/// The same characters in order, in ranges that do not touch.
fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.sort_unstable();
    let mut result: Vec<Range> = Vec::new();
    for (first, last) in ranges {
        match result.last_mut() {
            Some(before) if first <= before.1.saturating_add(1) => before.1 = before.1.max(last),
            _ => result.push((first, last)),
        }
    }
    // Surrogates are no characters, and may only be inside of a range.
    let parts = result
        .into_iter()
        .flat_map(|(first, last)| [(first, last.min(0xD7FF)), (first.max(0xE000), last)]);
    parts.filter(|(first, last)| first <= last).collect()
}

/// All other characters.
fn complement(ranges: &[Range]) -> Vec<Range> {
    let mut result = Vec::new();
    let mut next = 0;
    for (first, last) in ranges {
        if *first > next {
            result.push((next, first - 1));
        }
        next = last + 1;
    }
    if next <= 0x10FFFF {
        result.push((next, 0x10FFFF));
    }
    merged(result)
}
