//! `qkov man`: manual pages.

use std::path::PathBuf;

use clap::Args;
use clap_mangen::Man;

use super::Run;
use super::terminal::{note, print};
use crate::error::{Error, Result};
use crate::gguf::replace_file;

#[derive(Args)]
pub(super) struct ManPages {
    /// Writes a page for the program and one for each command into this folder, instead of the
    /// program's to stdout
    #[arg(short, long, value_name = "FOLDER")]
    out: Option<PathBuf>,
}

impl Run for ManPages {
    const NAME: &'static str = "man";
    const ABOUT: &'static str = "Print the manual page, or write those of all commands";

    fn run(self) -> Result<()> {
        let command = super::command().disable_help_subcommand(true);
        let Some(folder) = &self.out else {
            return print(&rendered(&Man::new(command))?);
        };
        let n = 1 + command.get_subcommands().count();
        let made = std::fs::create_dir_all(folder);
        made.map_err(|e| Error::Runtime(format!("cannot write pages: {e}")).at(folder))?;
        let mut command = command;
        // Gives commands the names of their pages.
        command.build();
        for command in command.get_subcommands().chain([&command]) {
            let page = Man::new(command.clone());
            let text = rendered(&page)?;
            replace_file(&folder.join(page.get_filename()), |out| out(&text))?;
        }
        note(&format!("{n} pages written"));
        Ok(())
    }
}

fn rendered(page: &Man) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    let done = page.render(&mut text);
    done.map_err(|e| Error::Runtime(format!("cannot make the page: {e}")))?;
    Ok(text)
}
