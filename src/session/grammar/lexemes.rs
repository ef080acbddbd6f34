//! Which parts of a grammar the engine may read as a whole.
//!
//! The engine cuts a text into lexemes, each as long as it can be, and parses these. A lexeme per
//! character is always right and slow; one for all that is not recursive is fast, and wrong where
//! the longest lexeme takes what belongs to the next. So parts are taken as large as they are, and
//! cut up as long as one of them could take too much: where it can go on, after a word of any lexeme,
//! with a character that may also follow that lexeme.
//!
//! Characters count by the first byte of their UTF-8, which finds more dangers than there are.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};

use super::gbnf::{Node, Range, Rules};
use crate::bad_usage;
use crate::error::{Result, excerpt};

/// Visits that building the automaton of a lexeme may take; a larger part is cut up.
const MAX_VISITS: usize = 5_000;
/// The same for a grammar that is not recursive, which is one lexeme.
const MAX_ONE: usize = 30_000;
/// Characters in the longest words of a lexeme, many repetitions apart; the engine's time grows with
/// their square.
const MAX_CHARS: usize = 2_000;
/// Parts that a grammar may have outside of lexemes; the engine has room for eight times as many,
/// and takes its time with them.
const MAX_PARTS: usize = 8_000;
/// Rounds of cutting; after the last, everything is cut up.
const MAX_ROUNDS: usize = 40;
/// Pairs of states that are looked at in all; when they are spent, all parts are cut up.
const MAX_PAIRS: usize = 1_000_000;
/// Repetitions up to this number are counted; more are taken for any number.
const MAX_COUNTED: u32 = 8;

/// A set of bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Bytes([u64; 4]);

impl Bytes {
    /// The bytes with which these characters begin.
    fn first(ranges: &[Range]) -> Bytes {
        let byte = |code: u32| {
            let c = char::from_u32(code).unwrap_or_default();
            c.encode_utf8(&mut [0; 4]).as_bytes()[0]
        };
        let mut bytes = Bytes::default();
        for (first, last) in ranges {
            // First bytes are in the order of characters.
            for b in byte(*first)..=byte(*last) {
                bytes.0[usize::from(b / 64)] |= 1 << (b % 64);
            }
        }
        bytes
    }

    /// Adds these; whether that changed anything.
    fn add(&mut self, other: &Bytes) -> bool {
        let old = *self;
        self.0.iter_mut().zip(other.0).for_each(|(a, b)| *a |= b);
        *self != old
    }

    fn meets(&self, other: &Bytes) -> bool {
        self.0.iter().zip(other.0).any(|(a, b)| a & b != 0)
    }
}

/// What can be said of the texts of a part.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Facts {
    /// Whether there are any.
    ends: bool,
    /// Whether the empty one is among them.
    empty: bool,
    first: Bytes,
}

/// A grammar, and how it is cut into lexemes.
pub(super) struct Lexemes {
    pub rules: Rules,
    /// Which parts are read as a whole where they are not inside of one that is.
    pub whole: Vec<bool>,
}

impl Lexemes {
    /// Cuts a grammar. Refuses rules that no text can follow.
    pub fn cut(mut rules: Rules) -> Result<Lexemes> {
        let sizes = sizes(&rules, &uses(&rules));
        let fits = |part: usize, max: usize| {
            sizes[part].is_some_and(|s| s.n_visits <= max && s.n_chars <= MAX_CHARS)
        };
        let body = rules.bodies[rules.root];
        // Nothing follows a text that is one lexeme.
        let is_one = fits(body, MAX_ONE);
        let mut whole = (0..sizes.len()).map(|part| fits(part, MAX_VISITS)).collect();
        join(&mut rules, &mut whole);
        // A rule is one lexeme wherever it is used, not one for every use.
        for (node, whole) in rules.nodes.iter().zip(&mut whole) {
            *whole &= !matches!(node, Node::Rule(_));
        }
        let uses = uses(&rules);
        let facts = facts(&rules, &uses);
        let endless = rules.bodies.iter().position(|body| !facts[*body].ends);
        if let Some(rule) = endless {
            bad_usage!("grammar: rule \"{}\" can never end", excerpt(&rules.names[rule]));
        }
        let follow = follow(&rules, &facts);
        let mut lexemes = Lexemes { rules, whole };
        if is_one {
            lexemes.whole[body] = true;
            return Ok(lexemes);
        }
        let (mut n_rounds, mut n_pairs) = (0, 0);
        while lexemes.cut_further(&facts, &follow, &mut n_pairs)? {
            n_rounds += 1;
            if n_rounds == MAX_ROUNDS || n_pairs > MAX_PAIRS {
                let is_char = |node: &Node| matches!(node, Node::Chars(_));
                lexemes.whole = lexemes.rules.nodes.iter().map(is_char).collect();
            }
        }
        Ok(lexemes)
    }

    /// Cuts up every lexeme that could take too much. False if there was none. Refuses a grammar in
    /// too many parts.
    fn cut_further(
        &mut self,
        facts: &[Facts],
        follow: &[Bytes],
        n_pairs: &mut usize,
    ) -> Result<bool> {
        let (lexemes, n_parts) = self.reached();
        if n_parts > MAX_PARTS {
            bad_usage!("grammar: {n_parts} parts that are not read as one; allowed {MAX_PARTS}");
        }
        let mut changed = false;
        let mut automata: Vec<Automaton> = Vec::new();
        let mut characters: HashMap<&[Range], usize> = HashMap::new();
        for part in lexemes {
            // The same character is often there many times.
            if let Node::Chars(ranges) = &self.rules.nodes[part] {
                match characters.entry(ranges) {
                    Entry::Vacant(free) => free.insert(automata.len()),
                    Entry::Occupied(first) => {
                        automata[*first.get()].follow.add(&follow[part]);
                        continue;
                    }
                };
            }
            match Automaton::new(&self.rules, part, facts[part].first, follow[part]) {
                Some(automaton) => automata.push(automaton),
                None => {
                    self.whole[part] = false;
                    changed = true;
                }
            }
        }
        for long in &automata {
            let is_char = matches!(self.rules.nodes[long.part], Node::Chars(_));
            if !is_char && automata.iter().any(|short| long.takes_from(short, n_pairs)) {
                self.whole[long.part] = false;
                changed = true;
            }
        }
        Ok(changed)
    }

    /// The lexemes, whole parts that are not inside of others, and the number of parts that are
    /// not inside of lexemes.
    fn reached(&self) -> (Vec<usize>, usize) {
        let mut n_parts = 0;
        let mut seen = vec![false; self.rules.nodes.len()];
        let mut found = Vec::new();
        let mut open = vec![self.rules.bodies[self.rules.root]];
        while let Some(part) = open.pop() {
            if std::mem::replace(&mut seen[part], true) {
                continue;
            }
            n_parts += 1;
            if self.whole[part] {
                found.push(part);
                continue;
            }
            open.extend(children(&self.rules, part));
        }
        (found, n_parts)
    }
}

/// The parts of a part; of a use of a rule, what the rule says.
fn children(rules: &Rules, part: usize) -> Vec<usize> {
    match &rules.nodes[part] {
        Node::Chars(_) => Vec::new(),
        Node::Rule(rule) => vec![rules.bodies[*rule]],
        Node::Sequence(items) | Node::Choice(items) => items.clone(),
        Node::Repeat(item, ..) => vec![*item],
    }
}

/// What building the automaton of a part takes, and characters in its longest words, or more.
#[derive(Clone, Copy)]
struct Size {
    n_visits: usize,
    n_chars: usize,
}

/// The sizes of parts in which no rule leads back to itself.
fn sizes(rules: &Rules, uses: &[Vec<usize>]) -> Vec<Option<Size>> {
    let children: Vec<_> = (0..uses.len()).map(|part| children(rules, part)).collect();
    let mut n_left: Vec<usize> = children.iter().map(Vec::len).collect();
    let mut open: Vec<usize> = (0..uses.len()).filter(|part| n_left[*part] == 0).collect();
    let mut sizes: Vec<Option<Size>> = vec![None; uses.len()];
    // A part is done when its own are, and what leads back to itself never is.
    while let Some(part) = open.pop() {
        let times = match rules.nodes[part] {
            Node::Repeat(_, min, max) => max.unwrap_or(min).clamp(1, MAX_COUNTED) as usize,
            _ => 1,
        };
        let (mut n_visits, mut n_chars) = (0usize, 0usize);
        for inner in children[part].iter().filter_map(|child| sizes[*child]) {
            n_visits = n_visits.saturating_add(inner.n_visits);
            n_chars = match rules.nodes[part] {
                Node::Choice(_) => n_chars.max(inner.n_chars),
                _ => n_chars.saturating_add(inner.n_chars),
            };
        }
        if let Node::Chars(_) = rules.nodes[part] {
            n_chars = 1;
        }
        let n_visits = n_visits.saturating_mul(times).saturating_add(1);
        sizes[part] = Some(Size { n_visits, n_chars: n_chars.saturating_mul(times) });
        for user in &uses[part] {
            n_left[*user] -= 1;
            open.extend((n_left[*user] == 0).then_some(*user));
        }
    }
    sizes
}

/// Makes one part of those beside each other that can be whole, in parts that cannot.
fn join(rules: &mut Rules, whole: &mut Vec<bool>) {
    for part in 0..rules.nodes.len() {
        let (items, in_sequence) = match &rules.nodes[part] {
            Node::Sequence(items) if !whole[part] => (items.clone(), true),
            Node::Choice(items) if !whole[part] => (items.clone(), false),
            _ => continue,
        };
        let runs: Vec<Vec<usize>> = match in_sequence {
            true => items.chunk_by(|a, b| whole[*a] && whole[*b]).map(<[_]>::to_vec).collect(),
            false => {
                let (yes, no): (Vec<_>, Vec<_>) = items.iter().partition(|i| whole[**i]);
                [yes].into_iter().chain(no.into_iter().map(|i| vec![i])).collect()
            }
        };
        let mut joined = Vec::new();
        for run in runs {
            match run[..] {
                [] => {}
                [one] => joined.push(one),
                _ => {
                    joined.push(rules.nodes.len());
                    whole.push(true);
                    rules.nodes.push(match in_sequence {
                        true => Node::Sequence(run),
                        false => Node::Choice(run),
                    });
                }
            }
        }
        rules.nodes[part] = match in_sequence {
            true => Node::Sequence(joined),
            false => Node::Choice(joined),
        };
    }
}

/// The parts that each part is directly in.
fn uses(rules: &Rules) -> Vec<Vec<usize>> {
    let mut uses = vec![Vec::new(); rules.nodes.len()];
    for part in 0..rules.nodes.len() {
        children(rules, part).into_iter().for_each(|child| uses[child].push(part));
    }
    uses
}

/// The least facts that hold of all parts together.
fn facts(rules: &Rules, uses: &[Vec<usize>]) -> Vec<Facts> {
    let mut facts = vec![Facts::default(); rules.nodes.len()];
    let mut open: Vec<usize> = (0..facts.len()).rev().collect();
    while let Some(part) = open.pop() {
        let new = match &rules.nodes[part] {
            Node::Chars(ranges) => Facts { ends: true, empty: false, first: Bytes::first(ranges) },
            Node::Rule(rule) => facts[rules.bodies[*rule]],
            Node::Sequence(items) => {
                let mut all = Facts { ends: true, empty: true, first: Bytes::default() };
                for item in items.iter().map(|i| facts[*i]) {
                    if all.empty {
                        all.first.add(&item.first);
                    }
                    all.empty &= item.empty;
                    all.ends &= item.ends;
                }
                all
            }
            Node::Choice(items) => {
                let mut any = Facts::default();
                for item in items.iter().map(|i| facts[*i]) {
                    any.first.add(&item.first);
                    any.empty |= item.empty;
                    any.ends |= item.ends;
                }
                any
            }
            Node::Repeat(_, _, Some(0)) => Facts { ends: true, empty: true, ..Facts::default() },
            Node::Repeat(item, min, _) => {
                let item = facts[*item];
                Facts { ends: item.ends || *min == 0, empty: item.empty || *min == 0, ..item }
            }
        };
        if new != facts[part] {
            facts[part] = new;
            open.extend(&uses[part]);
        }
    }
    facts
}

/// The bytes that may follow each part.
fn follow(rules: &Rules, facts: &[Facts]) -> Vec<Bytes> {
    let mut follow = vec![Bytes::default(); rules.nodes.len()];
    let mut open: Vec<usize> = (0..follow.len()).collect();
    while let Some(part) = open.pop() {
        let after = follow[part];
        let mut give = |child: usize, bytes: &Bytes| {
            if follow[child].add(bytes) {
                open.push(child);
            }
        };
        match &rules.nodes[part] {
            Node::Chars(_) => {}
            Node::Rule(rule) => give(rules.bodies[*rule], &after),
            Node::Choice(items) => items.iter().for_each(|i| give(*i, &after)),
            Node::Sequence(items) => {
                let mut after = after;
                for item in items.iter().rev() {
                    give(*item, &after);
                    if !facts[*item].empty {
                        after = Bytes::default();
                    }
                    after.add(&facts[*item].first);
                }
            }
            Node::Repeat(item, _, max) => {
                let mut after = after;
                if max.is_none_or(|max| max > 1) {
                    after.add(&facts[*item].first);
                }
                give(*item, &after);
            }
        }
    }
    follow
}

/// A state of an automaton.
#[derive(Debug)]
enum State {
    /// The end of a word.
    End,
    /// One of these characters, then the other state.
    Chars(Bytes, usize),
    /// Any of these states.
    Any(Vec<usize>),
}

/// What a state can do without reading.
#[derive(Debug, Default)]
struct Closure {
    ends: bool,
    /// Characters that can come, each with the state behind it.
    steps: Vec<(Bytes, usize)>,
}

/// The words of a lexeme, or more where repetitions are many.
struct Automaton {
    part: usize,
    /// Bytes with which words begin.
    first: Bytes,
    /// Bytes that may follow a word.
    follow: Bytes,
    start: usize,
    closures: Vec<Closure>,
}

impl Automaton {
    /// None if it would be too large.
    fn new(rules: &Rules, part: usize, first: Bytes, follow: Bytes) -> Option<Automaton> {
        let mut states = vec![State::End];
        let mut n_visits = 0;
        let start = build(rules, part, 0, &mut states, &mut n_visits)?;
        // Only states to which a character leads are places where a word can be.
        let mut is_place = vec![false; states.len()];
        is_place[start] = true;
        for state in &states {
            if let State::Chars(_, next) = state {
                is_place[*next] = true;
            }
        }
        let closures = is_place.iter().enumerate().map(|(state, is_place)| match is_place {
            true => closure(&states, state, &mut n_visits),
            false => Some(Closure::default()),
        });
        let closures = closures.collect::<Option<_>>()?;
        Some(Automaton { part, first, follow, start, closures })
    }

    /// Whether this can go on, after a word of the other, with what may follow the other.
    fn takes_from(&self, short: &Automaton, n_pairs: &mut usize) -> bool {
        *n_pairs += 1;
        if !self.first.meets(&short.first) {
            return false;
        }
        let mut seen = HashSet::from([(self.start, short.start)]);
        let mut open = vec![(self.start, short.start)];
        while let Some((a, b)) = open.pop() {
            for (a_bytes, a_next) in &self.closures[a].steps {
                for (b_bytes, b_next) in &short.closures[b].steps {
                    *n_pairs += 1;
                    if *n_pairs > MAX_PAIRS {
                        return true;
                    }
                    let pair = (*a_next, *b_next);
                    if !a_bytes.meets(b_bytes) || !seen.insert(pair) {
                        continue;
                    }
                    let goes_on = |a: usize| {
                        self.closures[a].steps.iter().any(|(bytes, _)| bytes.meets(&short.follow))
                    };
                    if short.closures[*b_next].ends && goes_on(*a_next) {
                        return true;
                    }
                    open.push(pair);
                }
            }
        }
        false
    }
}

/// Adds the states of a part that leads to `next`, and returns the first of them.
fn build(
    rules: &Rules,
    part: usize,
    next: usize,
    states: &mut Vec<State>,
    n_visits: &mut usize,
) -> Option<usize> {
    *n_visits += 1;
    if *n_visits > MAX_VISITS {
        return None;
    }
    let mut add = |state| {
        states.push(state);
        states.len() - 1
    };
    Some(match &rules.nodes[part] {
        Node::Chars(ranges) => add(State::Chars(Bytes::first(ranges), next)),
        Node::Rule(rule) => build(rules, rules.bodies[*rule], next, states, n_visits)?,
        Node::Sequence(items) => {
            let mut next = next;
            for item in items.iter().rev() {
                next = build(rules, *item, next, states, n_visits)?;
            }
            next
        }
        Node::Choice(items) => {
            let starts = items.iter().map(|i| build(rules, *i, next, states, n_visits));
            let starts = starts.collect::<Option<_>>()?;
            states.push(State::Any(starts));
            states.len() - 1
        }
        Node::Repeat(item, min, max) => {
            let counted = max.unwrap_or(*min) <= MAX_COUNTED;
            let (min, max) = if counted { (*min, *max) } else { ((*min).min(1), None) };
            let mut start = next;
            match max {
                None => {
                    start = add(State::Any(vec![next]));
                    let body = build(rules, *item, start, states, n_visits)?;
                    states[start] = State::Any(vec![next, body]);
                }
                Some(max) => {
                    for _ in min..max {
                        let body = build(rules, *item, start, states, n_visits)?;
                        states.push(State::Any(vec![next, body]));
                        start = states.len() - 1;
                    }
                }
            }
            for _ in 0..min {
                start = build(rules, *item, start, states, n_visits)?;
            }
            start
        }
    })
}

/// What this state can do without reading.
fn closure(states: &[State], start: usize, n_visits: &mut usize) -> Option<Closure> {
    let mut closure = Closure::default();
    let mut steps: HashMap<usize, Bytes> = HashMap::new();
    let (mut seen, mut open) = (HashSet::from([start]), vec![start]);
    while let Some(state) = open.pop() {
        *n_visits += 1;
        if *n_visits > MAX_VISITS {
            return None;
        }
        match &states[state] {
            State::End => closure.ends = true,
            State::Chars(bytes, next) => {
                steps.entry(*next).or_default().add(bytes);
            }
            State::Any(others) => open.extend(others.iter().filter(|s| seen.insert(**s))),
        }
    }
    closure.steps = steps.into_iter().map(|(next, bytes)| (bytes, next)).collect();
    Some(closure)
}
