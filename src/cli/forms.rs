//! `qkov forms`: how attention can be factored.

use clap::Args;
use serde_json::{Value, json};

use super::Run;
use super::norms::{line, param_json};
use super::terminal::{print, print_json};
use crate::error::Result;
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
        if self.json {
            return print_json(&FORMS.iter().map(|f| as_json(*f)).collect::<Vec<_>>());
        }
        let mut text = String::new();
        for form in FORMS {
            text += &format!("{}\n  {}\n  {}\n", form.name(), form.what(), form.paper());
            form.params().iter().for_each(|p| text += &line(p));
        }
        print(text.as_bytes())
    }
}

fn as_json(form: &dyn Form) -> Value {
    let params: Vec<Value> = form.params().iter().map(param_json).collect();
    json!({
        "name": form.name(),
        "what": form.what(),
        "paper": form.paper(),
        "params": params,
    })
}
