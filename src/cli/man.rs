//! `qkov man`: manual pages.

use std::path::PathBuf;

use clap::Args;
use clap_mangen::Man;

use super::Run;
use super::terminal::{note, print};
use crate::error::{Error, Result};

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
            let mut page = Vec::new();
            let done = Man::new(command).render(&mut page);
            done.map_err(|e| Error::Runtime(format!("cannot make the page: {e}")))?;
            return print(&page);
        };
        let n = 1 + command.get_subcommands().count();
        let write = || {
            std::fs::create_dir_all(folder)?;
            clap_mangen::generate_to(command, folder)
        };
        write().map_err(|e| Error::Runtime(format!("cannot write pages: {e}")).at(folder))?;
        note(&format!("{n} pages written"));
        Ok(())
    }
}
