//! `qkov forms`: how attention can be factored.

use clap::Args;
use serde_json::json;

use super::Run;
use super::list::{Item, line, params_json, show};
use crate::error::Result;
use crate::measure::choose::PARAMS;
use crate::merge::{FORMS, Form};

#[derive(Args)]
pub(super) struct Forms {
    /// Prints the list as JSON
    #[arg(long)]
    json: bool,
}

impl Run for Forms {
    const NAME: &'static str = "forms";
    const ABOUT: &'static str = "List the forms that --form takes, with their parameters";

    fn run(self) -> Result<()> {
        let item = |form: &&'static dyn Form| Item {
            name: form.name(),
            what: form.what(),
            paper: form.paper(),
            params: form.params(),
            json: json!({
                "name": form.name(),
                "what": form.what(),
                "paper": form.paper(),
                "params": params_json(form.params().iter()),
            }),
        };
        let auto = PARAMS.iter().map(line).collect::<String>();
        let auto = format!(
            "auto, in place of a form: the one that takes least time on this machine, if it surely does\n{auto}"
        );
        show(FORMS.iter().map(item).collect(), self.json, &auto)
    }
}
