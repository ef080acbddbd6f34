//! Parameters of registry entries: names, defaults, ranges, and how they are read and shown.

use crate::bad_usage;
use crate::error::Result;

/// A parameter of an entry.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    /// The name.
    pub name: &'static str,
    /// Meaning, and unit where there is one.
    pub what: &'static str,
    /// The value unless given.
    pub default: f32,
    /// What is allowed.
    pub domain: Domain,
}

/// Values that a parameter may have.
#[derive(Debug, Clone, Copy)]
pub enum Domain {
    /// Both ends included.
    From(f32, f32),
    /// The lower end excluded, the upper included.
    Above(f32, f32),
    /// Whole numbers, both ends included.
    Whole(f32, f32),
    /// One of these words; the value is its index.
    Word(&'static [&'static str]),
}

/// Unlimited above.
pub const MAX: f32 = f32::MAX;

/// A parameter.
pub const fn param(name: &'static str, what: &'static str, default: f32, domain: Domain) -> Param {
    Param { name, what, default, domain }
}

/// `NAME[:key=value,..]` as the name and the rest.
pub fn split(text: &str) -> (&str, &str) {
    let (name, rest) = text.split_once(':').unwrap_or((text, ""));
    (name.trim(), rest)
}

/// Values of `params`, in their order: those given, with what `key=value,..` says over them. `owner` is
/// named in errors.
pub fn read<'a>(
    owner: &str,
    params: impl Iterator<Item = &'a Param> + Clone,
    mut values: Vec<f32>,
    text: &str,
) -> Result<Vec<f32>> {
    for pair in text.split(',').map(str::trim).filter(|p| !p.is_empty()) {
        let Some((key, value)) = pair.split_once('=').map(|(k, v)| (k.trim(), v.trim())) else {
            bad_usage!("{owner}: \"{pair}\" is not key=value");
        };
        let Some((i, param)) = params.clone().enumerate().find(|(_, p)| p.name == key) else {
            let known: Vec<_> = params.map(Param::describe).collect();
            let known = if known.is_empty() { "none".into() } else { known.join(", ") };
            bad_usage!("{owner} has no parameter \"{key}\"; it has {known}");
        };
        match param.domain.read(value) {
            Some(value) => values[i] = value,
            None => bad_usage!("{owner}: {key} = {value}; allowed {}", param.domain),
        }
    }
    Ok(values)
}

/// What [`split`] and [`read`] read, with those values that are not defaults.
pub fn show<'a>(name: &str, params: impl Iterator<Item = &'a Param>, values: &[f32]) -> String {
    let given: Vec<String> = params
        .zip(values)
        .filter(|(p, value)| p.default != **value)
        .map(|(p, value)| format!("{}={}", p.name, p.domain.show(*value)))
        .collect();
    match given.is_empty() {
        true => name.into(),
        false => format!("{name}:{}", given.join(",")),
    }
}

impl Param {
    /// Name, default and range, as messages show them.
    pub fn describe(&self) -> String {
        format!("{} (default {}, {})", self.name, self.domain.show(self.default), self.domain)
    }
}

impl Domain {
    fn read(&self, text: &str) -> Option<f32> {
        if let Domain::Word(words) = self {
            return words.iter().position(|w| *w == text).map(|i| i as f32);
        }
        let value: f32 = text.parse().ok()?;
        let inside = match self {
            Domain::From(a, b) => (*a..=*b).contains(&value),
            Domain::Above(a, b) => value > *a && value <= *b,
            Domain::Whole(a, b) => (*a..=*b).contains(&value) && value.fract() == 0.0,
            Domain::Word(_) => false,
        };
        inside.then_some(value)
    }

    /// A value as it is written.
    pub fn show(&self, value: f32) -> String {
        match self {
            Domain::Word(words) => words.get(value as usize).unwrap_or(&"").to_string(),
            _ => value.to_string(),
        }
    }
}

impl std::fmt::Display for Domain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Domain::From(a, b) if *b < MAX => write!(f, "{a} to {b}"),
            Domain::From(a, _) if *a > -MAX => write!(f, "{a} or more"),
            Domain::From(..) => write!(f, "any number"),
            Domain::Above(a, b) if *b < MAX => write!(f, "more than {a}, at most {b}"),
            Domain::Above(a, _) => write!(f, "more than {a}"),
            Domain::Whole(a, b) => write!(f, "whole numbers {a} to {b}"),
            Domain::Word(words) => write!(f, "{}", words.join(" or ")),
        }
    }
}
