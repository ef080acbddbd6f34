//! `qkov masks`: which keys queries can see.

use clap::Args;
use serde_json::{Value, json};

use super::Run;
use super::norms::{line, param_json};
use super::terminal::{print, print_json};
use crate::error::Result;
use crate::mask::{Kind, MASKS};

#[derive(Args)]
pub(super) struct Masks {
    /// Prints the list as JSON
    #[arg(long)]
    json: bool,
}

impl Run for Masks {
    const NAME: &'static str = "masks";
    const ABOUT: &'static str = "List the masks that --mask takes, with their parameters";

    fn run(self) -> Result<()> {
        if self.json {
            return print_json(&MASKS.iter().map(|k| as_json(k)).collect::<Vec<_>>());
        }
        let mut text = String::new();
        for kind in MASKS {
            text += &format!("{}\n  {}\n  {}\n", kind.name, kind.what, kind.paper);
            kind.params.iter().for_each(|p| text += &line(p));
        }
        print(text.as_bytes())
    }
}

fn as_json(kind: &Kind) -> Value {
    let params: Vec<Value> = kind.params.iter().map(param_json).collect();
    json!({
        "name": kind.name,
        "what": kind.what,
        "paper": kind.paper,
        "copies": kind.copies,
        "params": params,
    })
}
