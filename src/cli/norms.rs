//! `qkov norms`: what can stand for softmax.

use clap::Args;
use serde_json::json;

use super::Run;
use super::list::{Item, line, params_json, show};
use crate::error::Result;
use crate::normalizer::{self, COMMON, Kind};

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
        let item = |kind: &'static Kind| Item {
            name: kind.name,
            what: kind.formula,
            paper: kind.paper,
            params: kind.params,
            json: json!({
                "name": kind.name,
                "formula": kind.formula,
                "paper": kind.paper,
                "class": format!("{:?}", kind.class),
                "shift_invariant": kind.shift_invariant,
                "sums_to_one": kind.sums_to_one,
                "params": params_json(kind.params.iter().chain(COMMON)),
            }),
        };
        let mut after =
            "\nof all of them, for scores x and weights w of n visible keys\n".to_string();
        COMMON.iter().for_each(|p| after += &line(p));
        show(normalizer::kinds().into_iter().map(item).collect(), self.json, &after)
    }
}
