//! The `qkov` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    qkov::cli::run()
}
