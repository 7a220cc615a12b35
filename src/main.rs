use std::process::ExitCode;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == oven::root::step::VERB) {
        return oven::root::step::helper_main();
    }
    ExitCode::SUCCESS
}
