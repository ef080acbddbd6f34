//! `qkov completions`: what a shell needs to complete commands and options.

use clap::Args;
use clap_complete::Shell;

use super::Run;
use super::terminal::print;
use crate::error::Result;

#[derive(Args)]
pub(super) struct Completions {
    /// The shell
    shell: Shell,
}

impl Run for Completions {
    const NAME: &'static str = "completions";
    const ABOUT: &'static str = "Print a script that has a shell complete commands and options";

    fn run(self) -> Result<()> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut super::command(), "qkov", &mut script);
        print(&script)
    }
}
