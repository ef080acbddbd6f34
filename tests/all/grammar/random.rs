//! Random grammars against the plain definition of what a grammar accepts.

use std::collections::BTreeSet;
use std::fmt::Write;

use qkov::session::grammar::Grammar;
use qkov::session::sampler::Random;

use super::{Bytes, gbnf};

enum Node {
    Literal(&'static str),
    Rule(usize),
    Sequence(Vec<Node>),
    Choice(Vec<Node>),
    Repeat(Box<Node>, usize, usize),
}

const LITERALS: [&str; 8] = ["a", "b", "ab", "ba", "aa", "", "abb", "b"];
const N_RULES: usize = 3;
const MAX_LEN: usize = 6;

fn number(random: &mut Random, n: usize) -> usize {
    (random.uniform() * n as f64) as usize
}

fn node(random: &mut Random, depth: usize) -> Node {
    let many = |random: &mut Random| {
        let n = 1 + number(random, 3);
        (0..n).map(|_| node(random, depth + 1)).collect()
    };
    match number(random, if depth > 2 { 2 } else { 6 }) {
        0 => Node::Literal(LITERALS[number(random, LITERALS.len())]),
        1 if number(random, 2) == 0 => Node::Rule(number(random, N_RULES)),
        1 => Node::Literal(LITERALS[number(random, LITERALS.len())]),
        2 | 3 => Node::Sequence(many(random)),
        4 => Node::Choice(many(random)),
        _ => {
            let min = number(random, 2);
            let max = min + number(random, 3);
            // Three stands for any number: no text here is longer than that is seen.
            let max = if number(random, 2) == 0 { MAX_LEN + 1 } else { max };
            Node::Repeat(Box::new(node(random, depth + 1)), min, max)
        }
    }
}

fn write(node: &Node, out: &mut String) {
    let all = |items: &[Node], between: &str, out: &mut String| {
        out.push('(');
        for (i, item) in items.iter().enumerate() {
            out.push_str(if i > 0 { between } else { "" });
            write(item, out);
        }
        out.push(')');
    };
    match node {
        Node::Literal(text) => write!(out, "\"{text}\"").unwrap(),
        Node::Rule(0) => out.push_str("root"),
        Node::Rule(rule) => write!(out, "r{rule}").unwrap(),
        Node::Sequence(items) => all(items, " ", out),
        Node::Choice(items) => all(items, " | ", out),
        Node::Repeat(item, min, max) => {
            write(item, out);
            match max {
                max if *max > MAX_LEN => write!(out, "{{{min},}}").unwrap(),
                max => write!(out, "{{{min},{max}}}").unwrap(),
            }
        }
    }
}

/// All texts up to the longest length that are known to follow each rule.
type Known = Vec<BTreeSet<String>>;

fn joined(a: &BTreeSet<String>, b: &BTreeSet<String>) -> BTreeSet<String> {
    let pairs = a.iter().flat_map(|a| b.iter().map(move |b| format!("{a}{b}")));
    pairs.filter(|text| text.len() <= MAX_LEN).collect()
}

fn texts(node: &Node, known: &Known) -> BTreeSet<String> {
    let nothing = || BTreeSet::from([String::new()]);
    match node {
        Node::Literal(text) => BTreeSet::from([text.to_string()]),
        Node::Rule(rule) => known[*rule].clone(),
        Node::Sequence(items) => {
            items.iter().fold(nothing(), |all, item| joined(&all, &texts(item, known)))
        }
        Node::Choice(items) => items.iter().flat_map(|item| texts(item, known)).collect(),
        Node::Repeat(item, min, max) => {
            let item = texts(item, known);
            let (mut all, mut power) = (BTreeSet::new(), nothing());
            for n in 0..=*max {
                if n >= *min {
                    all.extend(power.clone());
                }
                power = joined(&power, &item);
            }
            all
        }
    }
}

/// What follows the first rule: rules give more texts until they give no new ones.
fn all_texts(rules: &[Node]) -> BTreeSet<String> {
    let mut known: Known = vec![BTreeSet::new(); rules.len()];
    loop {
        let new: Known = rules.iter().map(|rule| texts(rule, &known)).collect();
        if new == known {
            return known.swap_remove(0);
        }
        known = new;
    }
}

#[test]
fn random_grammars_accept_what_they_define() {
    let bytes = Bytes::new();
    let mut random = Random::new(1);
    let (mut n_tried, mut n_good) = (0, 0);
    for _ in 0..400 {
        let rules: Vec<Node> = (0..N_RULES).map(|_| node(&mut random, 0)).collect();
        let mut text = String::new();
        for (i, rule) in rules.iter().enumerate() {
            text.push_str(&if i == 0 { "root ::= ".into() } else { format!("r{i} ::= ") });
            write(rule, &mut text);
            text.push('\n');
        }
        let spec = gbnf(&text);
        // Rules without an end are refused.
        let Ok(grammar) = Grammar::new(&bytes.vocabulary, &spec) else {
            let line = bytes.refused(&spec);
            assert!(line.ends_with("can never end"), "{line}\n{text}");
            continue;
        };
        let all = all_texts(&rules);
        let mut candidates: BTreeSet<String> = all.iter().take(12).cloned().collect();
        for _ in 0..12 {
            let n = number(&mut random, MAX_LEN + 1);
            candidates.insert((0..n).map(|_| ["a", "b"][number(&mut random, 2)]).collect());
        }
        for candidate in candidates {
            let expected = all.contains(&candidate);
            assert_eq!(
                bytes.follows(grammar.clone(), &candidate),
                expected,
                "{candidate:?}\n{text}"
            );
            n_tried += 1;
            n_good += usize::from(expected);
        }
    }
    assert!(n_tried > 2000 && n_good > 500 && n_tried - n_good > 500, "{n_good} of {n_tried}");
}
