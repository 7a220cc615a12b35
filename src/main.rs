//! The program `oven`. It runs one verb of the command line, such as `bake`. oven also starts itself as a helper
//! process that runs a step, runs a plugin, or serves a disk. A helper process does not run a verb.

use oven::disk::direct::server;
use oven::distros::sandboxed_plugin;
use oven::sys::signals;
use oven::{cli, sandbox};
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<_> = std::env::args_os().collect();
    if args.get(1).is_some_and(|verb| verb == sandbox::VERB) {
        return sandbox::helper_main();
    }
    if args.get(1).is_some_and(|verb| verb == sandboxed_plugin::VERB) {
        return sandboxed_plugin::helper_main();
    }
    if args.get(1).is_some_and(|verb| verb == server::SERVER_VERB) {
        return server::helper_main();
    }
    let code = signals::run_in_second_thread(move || cli::run(args));
    sandbox::cgroup::leave();
    ExitCode::from(code)
}
