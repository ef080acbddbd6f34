//! `qkov norms`: what can stand for softmax.

use clap::Args;
use serde_json::{Value, json};

use super::Run;
use super::terminal::{print, print_json};
use crate::error::Result;
use crate::normalizer::{self, COMMON, Kind, Param};

#[derive(Args)]
pub(super) struct Norms {
    /// Prints the list as JSON
    #[arg(long)]
    json: bool,
}

impl Run for Norms {
    const NAME: &'static str = "norms";
    const ABOUT: &'static str = "List the normalizers that --norm takes, with their parameters";

    fn run(self) -> Result<()> {
        let kinds = normalizer::kinds();
        if self.json {
            return print_json(&kinds.iter().map(|k| as_json(k)).collect::<Vec<_>>());
        }
        let mut text = String::new();
        for kind in kinds {
            text += &format!("{}\n  {}\n  {}\n", kind.name, kind.formula, kind.paper);
            kind.params.iter().for_each(|p| text += &line(p));
        }
        text += "\nof all of them, for scores x and weights w of n visible keys\n";
        COMMON.iter().for_each(|p| text += &line(p));
        print(text.as_bytes())
    }
}

/// A parameter, as lists show it.
pub(super) fn line(param: &Param) -> String {
    format!("    {}: {}\n", param.describe(), param.what)
}

pub(super) fn param_json(param: &Param) -> Value {
    json!({"name": param.name, "what": param.what, "default": param.default,
           "allowed": param.domain.to_string()})
}

fn as_json(kind: &Kind) -> Value {
    let params: Vec<Value> = kind.params.iter().chain(COMMON).map(param_json).collect();
    json!({
        "name": kind.name,
        "formula": kind.formula,
        "paper": kind.paper,
        "class": format!("{:?}", kind.class),
        "shift_invariant": kind.shift_invariant,
        "sums_to_one": kind.sums_to_one,
        "params": params,
    })
}
