//! The program: the re-executed step helper, or a verb of the command line.

use clap::Parser;
use oven::{cli::Cli, commands, root::step};
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == step::HELPER_VERB) {
        return step::helper_main();
    }
    ExitCode::from(commands::run(Cli::parse()))
use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == oven::root::step::VERB) {
        return oven::root::step::helper_main();
    }
    ExitCode::SUCCESS
}
