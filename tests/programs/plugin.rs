//! A plugin in Rust, as an executable: the one for Debian, which is built into oven, too.

use std::process::ExitCode;

fn main() -> ExitCode {
    oven_distro::serve(&oven_debian::Debian)
}
