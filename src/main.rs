//! The program: the re-executed step helper, or a verb of the command line.

use clap::Parser;
use oven::{cli::Cli, commands, root::step};
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == step::VERB) {
        return step::helper_main();
    }
    ExitCode::from(commands::run(Cli::parse()))
}
