//! Lists of a registry's entries, for the commands that show them.

use serde_json::{Value, json};

use super::terminal::{print, print_json};
use crate::error::Result;
use crate::param::Param;

/// An entry.
pub(super) struct Item<'a> {
    /// The name, and what it does or is.
    pub(super) name: &'a str,
    pub(super) what: &'a str,
    /// Where it was published.
    pub(super) paper: &'a str,
    pub(super) params: &'a [Param],
    /// Everything.
    pub(super) json: Value,
}

/// Prints entries, and what goes for all of them.
pub(super) fn show(items: Vec<Item>, as_json: bool, after: &str) -> Result<()> {
    if as_json {
        return print_json(&items.into_iter().map(|item| item.json).collect::<Vec<_>>());
    }
    let mut text = String::new();
    for item in items {
        text += &format!("{}\n  {}\n  {}\n", item.name, item.what, item.paper);
        item.params.iter().for_each(|p| text += &line(p));
    }
    print((text + after).as_bytes())
}

/// A parameter, as lists show it.
pub(super) fn line(param: &Param) -> String {
    format!("    {}: {}\n", param.describe(), param.what)
}

pub(super) fn params_json<'a>(params: impl Iterator<Item = &'a Param>) -> Vec<Value> {
    let one = |param: &Param| {
        json!({"name": param.name, "what": param.what, "default": param.default,
               "allowed": param.domain.to_string()})
    };
    params.map(one).collect()
}
