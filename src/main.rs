//! The program: the re-executed step helper, or a verb of the command line.

use oven::{commands, root::step};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.get(1).is_some_and(|verb| verb == step::VERB) {
        return step::helper_main();
    }
    ExitCode::from(commands::run(args))
}
