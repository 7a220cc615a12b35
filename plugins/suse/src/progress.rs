//! The lines in which zypper says how far it is.

use oven_distro::{Phase, ProgressLine};

pub fn lines() -> Vec<ProgressLine> {
    let text = |text: &str| Some(text.to_owned());
    let line = |output: &str| ProgressLine { output: output.to_owned(), ..ProgressLine::default() };
    let fetch = |line| ProgressLine { phases: vec![Phase::Fetch], ..line };
    let change = |line| ProgressLine { phases: vec![Phase::Upgrade, Phase::Install], ..line };
    let counted = |output: &str| ProgressLine { unit: text("packages"), ..line(output) };
    vec![
        fetch(ProgressLine { total_bytes: text("{1}"), ..line("Overall download size: *. Already cached*") }),
        // Since zypper 1.14.60.
        fetch(ProgressLine {
            name: text("{1}"),
            done: text("{3}"),
            total: text("{4}"),
            bytes: text("+{5}"),
            ..counted("Retrieving: * (*) (*/*), *")
        }),
        fetch(ProgressLine {
            name: text("{1}"),
            done: text("{2}"),
            total: text("{3}"),
            bytes: text("+{4}"),
            ..counted("Retrieving package * (*/*), *")
        }),
        change(ProgressLine {
            done: text("{1}"),
            total: text("{2}"),
            name: text("{3}"),
            ..counted("(*/*) Installing: * *")
        }),
    ]
}
