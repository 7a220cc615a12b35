//! The lines in which dnf, yum and microdnf say how far they are.

use oven_distro::{Phase, ProgressLine};

pub fn lines() -> Vec<ProgressLine> {
    let text = |text: &str| Some(text.to_owned());
    let line = |output: &str| ProgressLine { output: output.to_owned(), ..ProgressLine::default() };
    let counted = |output: &str| ProgressLine {
        done: text("{1}"),
        total: text("{2}"),
        unit: text("packages"),
        name: text("{3}"),
        ..line(output)
    };
    let fetch = |line| ProgressLine { phases: vec![Phase::Fetch], ..line };
    let change = |line| ProgressLine { phases: vec![Phase::Upgrade, Phase::Install], ..line };
    vec![
        // dnf 4 and yum
        fetch(ProgressLine { total_bytes: text("{1}"), ..line("Total download size: *") }),
        fetch(ProgressLine { bytes: text("+{5}"), ..counted("(*/*): *.rpm*|*") }),
        change(ProgressLine {
            done: text("{3}"),
            total: text("{4}"),
            name: text("{2}"),
            ..counted("  Installing*: * */*")
        }),
        change(ProgressLine {
            done: text("{3}"),
            total: text("{4}"),
            name: text("{2}"),
            ..counted("  Upgrading*: * */*")
        }),
        // dnf 5
        fetch(ProgressLine { total_bytes: text("{2}"), ..line("*Need to download *.") }),
        ProgressLine { name: None, ..counted("[*/*] Total *") },
        fetch(ProgressLine { bytes: text("+{6}"), ..counted("[*/*] * *% | *|*|*") }),
        change(ProgressLine { name: text("{4}"), ..counted("[*/*] * * *% |*") }),
    ]
}
