//! The command line: one file per command, one line in the table.

mod bench;
mod bench_forms;
mod calibrate;
mod chat;
mod circuits;
mod compare;
mod completions;
mod devices;
mod doctor;
mod embed;
mod eval;
mod forms;
mod generate;
mod grammar;
mod heads;
mod imatrix;
mod inspect;
mod list;
mod man;
mod masks;
mod memory;
mod merge;
mod model_file;
mod models;
mod norms;
mod options;
mod patterns;
#[cfg(feature = "ggml")]
mod quantize;
#[cfg(feature = "rpc")]
mod rpc_worker;
mod sampling;
mod serve;
mod signals;
mod stores;
mod template;
mod terminal;
mod tokenize;

use std::process::ExitCode;

use clap::{ArgMatches, Args, Command};

use crate::error::{Error, Result};

/// A command: its options are its fields.
trait Run: Args {
    const NAME: &'static str;
    const ABOUT: &'static str;
    /// Whether it ends at signals in a way of its own.
    const ENDS_ITSELF: bool = false;
    fn run(self) -> Result<()>;
}

struct Entry {
    name: &'static str,
    command: fn() -> Command,
    run: fn(&ArgMatches) -> Result<()>,
}

const fn entry<C: Run>() -> Entry {
    Entry {
        name: C::NAME,
        command: || C::augment_args(Command::new(C::NAME).about(C::ABOUT)),
        run: |matches| {
            let command = C::from_arg_matches(matches);
            let command = command.map_err(|e| Error::Usage(e.to_string().trim().to_string()))?;
            signals::guard()?;
            if !C::ENDS_ITSELF {
                signals::watch()?;
            }
            command.run()
        },
    }
}

/// Every command, in the order of the help.
static COMMANDS: &[Entry] = &[
    entry::<chat::Chat>(),
    entry::<generate::Generate>(),
    entry::<serve::Serve>(),
    entry::<embed::Embed>(),
    entry::<eval::Eval>(),
    entry::<bench::Bench>(),
    entry::<compare::Compare>(),
    entry::<calibrate::Calibrate>(),
    entry::<merge::Merge>(),
    entry::<imatrix::Imatrix>(),
    #[cfg(feature = "ggml")]
    entry::<quantize::Quantize>(),
    entry::<norms::Norms>(),
    entry::<masks::Masks>(),
    entry::<forms::Forms>(),
    entry::<patterns::Patterns>(),
    entry::<inspect::Inspect>(),
    entry::<models::Models>(),
    entry::<doctor::Doctor>(),
    entry::<tokenize::Tokenize>(),
    entry::<template::Template>(),
    #[cfg(feature = "rpc")]
    entry::<rpc_worker::RpcWorker>(),
    entry::<completions::Completions>(),
    entry::<man::ManPages>(),
];

fn command() -> Command {
    Command::new("qkov")
        .version(concat!(env!("CARGO_PKG_VERSION"), " (", env!("QKOV_REVISION"), ")"))
        .long_version(devices::VERSION.as_str())
        .about("Runs local language models, and measures what is inside a head.")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(COMMANDS.iter().map(|c| (c.command)()))
}

/// Runs the program with the process's arguments; messages go to stderr.
pub fn run() -> ExitCode {
    #[cfg(feature = "ggml")]
    crate::ggml::devices::tell(
        |warning| terminal::note(&format!("warning: ggml: {warning}")),
        |end| {
            terminal::note(&format!("error: ggml: {end}"));
            signals::leave(1)
        },
    );
    // The exit code of a usage error is clap's, 2.
    let matches = command().get_matches();
    let result = match matches.subcommand() {
        Some((name, matches)) => match COMMANDS.iter().find(|c| c.name == name) {
            Some(entry) => (entry.run)(matches),
            None => Ok(()),
        },
        None => Ok(()),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            terminal::note(&format!("error: {error}"));
            ExitCode::from(error.exit_code())
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn options_are_consistent() {
        super::command().debug_assert();
    }
}
