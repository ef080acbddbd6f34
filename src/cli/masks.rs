//! `qkov masks`: which keys queries can see.

use clap::Args;
use serde_json::json;

use super::Run;
use super::list::{Item, params_json, show};
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
        let item = |kind: &&'static Kind| Item {
            name: kind.name,
            what: kind.what,
            paper: kind.paper,
            params: kind.params,
            json: json!({
                "name": kind.name,
                "what": kind.what,
                "paper": kind.paper,
                "copies": kind.copies,
                "params": params_json(kind.params.iter()),
            }),
        };
        show(MASKS.iter().map(item).collect(), self.json, "")
    }
}
