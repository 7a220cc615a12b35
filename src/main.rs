//! The program: the re-executed helper of a step, of a plugin or of a disk, or a verb of the command line.

use oven::{commands, disk::export, distros::contained, root::step, stop};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.get(1).is_some_and(|verb| verb == step::VERB) {
        return step::helper_main();
    }
    if args.get(1).is_some_and(|verb| verb == contained::VERB) {
        return contained::helper_main();
    }
    if args.get(1).is_some_and(|verb| verb == export::VERB) {
        return export::helper_main();
    }
    ExitCode::from(stop::beside(move || commands::run(args)))
}
