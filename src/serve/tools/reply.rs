//! Finding calls in a reply while it is written.
//!
//! Text is held back only as long as it may be the beginning of a call. What turns out to be none is
//! given as content, every byte of it; once a call has a name and its arguments have begun, it is one,
//! and what is wrong behind that is content after it.

use super::{Format, Shape, Tool};

/// Longest text of a call before its arguments, in bytes.
const MAX_HEAD: usize = 4096;

/// What a reply has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Text that is part of no call.
    Content(String),
    /// A call begins, the first with index 0.
    Begin {
        /// Which call it is.
        index: usize,
        /// The function's name.
        name: String,
    },
    /// More of the text of its arguments, which is JSON.
    Arguments {
        /// Which call it is.
        index: usize,
        /// The text.
        text: String,
    },
    /// It is complete.
    End {
        /// Which call it is.
        index: usize,
    },
}

/// Where in a reply the parser is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// Before anything but blanks, where calls may be the whole reply.
    Start,
    Content,
    /// Behind the opening, or between calls of a list.
    Call,
    /// In the arguments of a call that has begun.
    Arguments,
    /// Behind arguments, up to the end of the call.
    Behind,
    /// Behind a call, where only blanks are expected before another one.
    Between,
}

/// A reply as it comes.
pub struct Reply {
    format: Format,
    /// Names of functions; calls that are the whole reply are calls of these only.
    names: Vec<String>,
    at: At,
    /// Text that was taken but not given.
    held: String,
    /// Where in it the call's own text begins, behind openings.
    n_open: usize,
    /// The value that is being read.
    value: JsonEnd,
    /// Calls so far.
    n_calls: usize,
}

/// What reading a piece of a call gave.
enum Step {
    /// It is complete up to here, and something else begins.
    Done(At, usize),
    /// More text is needed to tell.
    More,
    /// It is no call.
    Wrong,
}

impl Reply {
    /// A reply in this format, with calls of these tools perhaps.
    pub fn new(format: Format, tools: &[Tool]) -> Reply {
        let names = tools.iter().map(|tool| tool.name.clone()).collect();
        let at = if format.open.is_empty() { At::Start } else { At::Content };
        let (held, value) = (String::new(), JsonEnd::default());
        Reply { format, names, at, held, n_open: 0, value, n_calls: 0 }
    }

    /// Takes more text, in which control tokens of [`Format::controls`] are written with their names.
    pub fn push(&mut self, text: &str) -> Vec<Event> {
        self.held.push_str(text);
        let mut events = Vec::new();
        loop {
            let (at, len) = (self.at, self.held.len());
            match self.at {
                At::Start => self.start(),
                At::Content | At::Between => self.content(&mut events),
                At::Call => self.call(&mut events),
                At::Arguments => self.arguments(&mut events),
                At::Behind => self.behind(&mut events),
            }
            if (at, len) == (self.at, self.held.len()) {
                return events;
            }
        }
    }

    /// Ends the reply: what was held back is no call, and a call whose arguments are not complete has
    /// no end.
    pub fn finish(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        match self.at {
            // Only a part of what ends a call is held back here.
            At::Behind => events.push(Event::End { index: self.n_calls - 1 }),
            At::Between if self.held.trim().is_empty() => {}
            At::Arguments => {}
            _ => give(&mut events, std::mem::take(&mut self.held)),
        }
        self.held.clear();
        self.at = At::Content;
        events
    }

    /// Takes the first `n` bytes of what is held back.
    fn take(&mut self, n: usize) -> String {
        let rest = self.held.split_off(n);
        std::mem::replace(&mut self.held, rest)
    }

    /// Whether the reply begins with what calls begin with.
    fn start(&mut self) {
        let text = self.held.trim_start();
        let optional = self.format.optional;
        let rest = text.strip_prefix(optional).unwrap_or(text).trim_start();
        if rest.starts_with('{') {
            self.n_open = self.held.len() - rest.len();
            self.at = At::Call;
        } else if !rest.is_empty() && !optional.starts_with(text) {
            self.at = At::Content;
        }
    }

    fn content(&mut self, events: &mut Vec<Event>) {
        let open = self.format.open;
        if open.is_empty() {
            if self.at == At::Between && self.held.trim().is_empty() {
                return;
            }
            self.at = At::Content;
            let text = std::mem::take(&mut self.held);
            return give(events, text);
        }
        if let Some(at) = self.held.find(open) {
            let before = self.take(at);
            if self.at == At::Content || !before.trim().is_empty() {
                give(events, before);
            }
            self.n_open = open.len();
            self.at = At::Call;
            return;
        }
        // The end may be the beginning of an opening.
        let ends = self.held.char_indices().map(|(at, _)| at);
        let mut ends = ends.filter(|at| self.held.len() - at < open.len());
        let n = ends.find(|at| open.starts_with(&self.held[*at..])).unwrap_or(self.held.len());
        if self.at == At::Between && self.held[..n].trim().is_empty() {
            return;
        }
        self.at = At::Content;
        let text = self.take(n);
        give(events, text);
    }

    /// Reads a call up to its arguments.
    fn call(&mut self, events: &mut Vec<Event>) {
        let text = &self.held[self.n_open..];
        if text.len() > MAX_HEAD {
            return self.no_call(events, Head::Wrong);
        }
        let (name, n) = match self.format.shape {
            Shape::Named(middle) => match head_named(text, middle) {
                Head::Found(name, n) => (name, n),
                other => return self.no_call(events, other),
            },
            Shape::Object(name, key) => match head_object(text, name, key) {
                Head::Found(name, n) => (name, n),
                other => return self.no_call(events, other),
            },
            Shape::List(name, key) => {
                // The first call is behind the bracket of the list, others behind commas.
                let inner = text.trim_start();
                let Some(inner) = inner.strip_prefix(['[', ',']) else {
                    let head = if inner.is_empty() { Head::More } else { Head::Wrong };
                    return self.no_call(events, head);
                };
                match head_object(inner, name, key) {
                    Head::Found(name, n) => (name, text.len() - inner.len() + n),
                    other => return self.no_call(events, other),
                }
            }
        };
        if self.format.open.is_empty() && !self.names.contains(&name) {
            return self.no_call(events, Head::Wrong);
        }
        self.take(self.n_open + n);
        self.n_open = 0;
        self.value = JsonEnd::default();
        events.push(Event::Begin { index: self.n_calls, name });
        self.n_calls += 1;
        self.at = At::Arguments;
    }

    fn no_call(&mut self, events: &mut Vec<Event>, head: Head) {
        if let Head::Wrong = head {
            // The opening is content, and behind it another one may come.
            let n = self.n_open.max(1).min(self.held.len());
            let n = (n..=self.held.len()).find(|n| self.held.is_char_boundary(*n)).unwrap_or(n);
            let text = self.take(n);
            give(events, text);
            self.n_open = 0;
            self.at = At::Content;
        }
    }

    fn arguments(&mut self, events: &mut Vec<Event>) {
        let index = self.n_calls - 1;
        let (n, ended) = self.value.read(&self.held);
        let text = self.take(n);
        if !text.is_empty() {
            events.push(Event::Arguments { index, text });
        }
        if ended {
            self.at = At::Behind;
        }
    }

    /// Reads the end of a call, and of a list of calls.
    fn behind(&mut self, events: &mut Vec<Event>) {
        match self.tail() {
            Step::More => {}
            Step::Done(at, n) => {
                events.push(Event::End { index: self.n_calls - 1 });
                self.take(n);
                (self.at, self.n_open) = (at, 0);
            }
            Step::Wrong => {
                events.push(Event::End { index: self.n_calls - 1 });
                self.at = At::Content;
            }
        }
    }

    fn tail(&self) -> Step {
        let text = &self.held;
        let at = |rest: &str| text.len() - rest.len();
        let mut rest = text.trim_start();
        if matches!(self.format.shape, Shape::Object(..) | Shape::List(..)) {
            rest = match object_end(rest) {
                Ok(Some(rest)) => rest.trim_start(),
                Ok(None) => return Step::More,
                Err(()) => return Step::Wrong,
            };
        }
        if let Shape::List(..) = self.format.shape {
            rest = match rest.chars().next() {
                Some(',') => return Step::Done(At::Call, at(rest)),
                Some(']') => rest[1..].trim_start(),
                Some(_) => return Step::Wrong,
                None => return Step::More,
            };
        }
        let close = self.format.close;
        match rest.strip_prefix(close) {
            Some(rest) => Step::Done(At::Between, at(rest)),
            None if close.starts_with(rest) => Step::More,
            None => Step::Done(At::Between, at(rest)),
        }
    }
}

fn give(events: &mut Vec<Event>, text: String) {
    if text.is_empty() {
        return;
    }
    match events.last_mut() {
        Some(Event::Content(before)) => before.push_str(&text),
        _ => events.push(Event::Content(text)),
    }
}

/// The part of a call before the arguments.
enum Head {
    /// The name, and where arguments begin.
    Found(String, usize),
    More,
    Wrong,
}

/// `name [CALL_ID] id [ARGS] {`
fn head_named(text: &str, middle: &str) -> Head {
    let Some(at) = text.find(middle) else {
        return Head::More;
    };
    let name = text[..at].split("[CALL_ID]").next().unwrap_or_default().trim();
    let rest = &text[at + middle.len()..];
    let value = rest.trim_start();
    let allowed = |c: char| c.is_alphanumeric() || "_-.".contains(c);
    if name.is_empty() || !name.chars().all(allowed) {
        return Head::Wrong;
    }
    match value.chars().next() {
        Some('{') => Head::Found(name.into(), text.len() - value.len()),
        Some(_) => Head::Wrong,
        None => Head::More,
    }
}

/// `{"name": "..", .., "arguments": {`; other keys may be there too.
fn head_object(text: &str, name_key: &str, arguments_key: &str) -> Head {
    let mut rest = text.trim_start();
    let mut name = None;
    let mut expected = '{';
    loop {
        match rest.chars().next() {
            Some(c) if c == expected => rest = rest[1..].trim_start(),
            Some(_) => return Head::Wrong,
            None => return Head::More,
        }
        expected = ',';
        let key = match string(&mut rest) {
            Ok(Some(key)) => key,
            Ok(None) => return Head::More,
            Err(()) => return Head::Wrong,
        };
        rest = match rest.trim_start().strip_prefix(':') {
            Some(rest) => rest.trim_start(),
            None if rest.trim_start().is_empty() => return Head::More,
            None => return Head::Wrong,
        };
        if key == arguments_key {
            return match (name, rest.chars().next()) {
                (Some(name), Some('{')) => Head::Found(name, text.len() - rest.len()),
                (_, None) => Head::More,
                _ => Head::Wrong,
            };
        }
        let value = rest;
        let (n, ended) = JsonEnd::default().read(rest);
        if !ended {
            return Head::More;
        }
        rest = rest[n..].trim_start();
        if key == name_key {
            match serde_json::from_str(&value[..n]) {
                Ok(text) => name = Some(text),
                Err(_) => return Head::Wrong,
            }
        }
    }
}

/// What is behind the end of an object whose arguments were read; other keys may follow them.
/// `None`: more text is needed.
fn object_end(text: &str) -> Result<Option<&str>, ()> {
    let mut rest = text.trim_start();
    loop {
        match rest.chars().next() {
            Some('}') => return Ok(Some(&rest[1..])),
            Some(',') => rest = rest[1..].trim_start(),
            Some(_) => return Err(()),
            None => return Ok(None),
        }
        if string(&mut rest)?.is_none() {
            return Ok(None);
        }
        rest = match rest.trim_start().strip_prefix(':') {
            Some(rest) => rest.trim_start(),
            None if rest.trim_start().is_empty() => return Ok(None),
            None => return Err(()),
        };
        let (n, ended) = JsonEnd::default().read(rest);
        if !ended {
            return Ok(None);
        }
        rest = rest[n..].trim_start();
    }
}

/// Takes a JSON string. `None`: it is not complete.
fn string(rest: &mut &str) -> Result<Option<String>, ()> {
    match rest.chars().next() {
        None => return Ok(None),
        Some('"') => {}
        Some(_) => return Err(()),
    }
    let (n, ended) = JsonEnd::default().read(rest);
    if !ended {
        return Ok(None);
    }
    let text = serde_json::from_str(&rest[..n]).map_err(|_| ())?;
    *rest = &rest[n..];
    Ok(Some(text))
}

/// Finds the end of a JSON value, by its brackets and quotes alone.
#[derive(Debug, Default)]
struct JsonEnd {
    depth: usize,
    in_string: bool,
    escaped: bool,
    started: bool,
}

impl JsonEnd {
    /// How much of the text belongs to the value, and whether it ends there. A number or a name ends
    /// before the character behind it.
    fn read(&mut self, text: &str) -> (usize, bool) {
        for (at, c) in text.char_indices() {
            let after = at + c.len_utf8();
            if self.in_string {
                match c {
                    _ if self.escaped => self.escaped = false,
                    '\\' => self.escaped = true,
                    '"' => {
                        self.in_string = false;
                        if self.depth == 0 {
                            return (after, true);
                        }
                    }
                    _ => {}
                }
                continue;
            }
            match c {
                '"' => self.in_string = true,
                '{' | '[' => self.depth += 1,
                '}' | ']' if self.depth == 0 => return (at, true),
                '}' | ']' => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return (after, true);
                    }
                }
                ',' if self.depth == 0 => return (at, true),
                c if self.depth == 0 && self.started && c.is_whitespace() => return (at, true),
                _ => {}
            }
            self.started = true;
        }
        (text.len(), false)
    }
}
