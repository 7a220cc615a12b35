//! The lines in which apt says how far it is. apt writes some of them to a descriptor, with which its progress has no
//! cursor movements. `APT::Status-Fd` is given as an option and not in a configuration file, because programs that a
//! package's script runs would read the file, too, but do not have the descriptor.

use oven_distro::{Phase, ProgressLine};

/// The option that makes apt write its status to the descriptor that oven reads.
pub const STATUS: [&str; 2] = ["-o", "APT::Status-Fd=3"];

pub fn lines() -> Vec<ProgressLine> {
    let text = |text: &str| Some(text.to_owned());
    let fetch = |output: &str| ProgressLine {
        output: output.to_owned(),
        phases: vec![Phase::Fetch],
        ..ProgressLine::default()
    };
    let change = ProgressLine { phases: vec![Phase::Upgrade, Phase::Install], ..ProgressLine::default() };
    vec![
        ProgressLine { total_bytes: text("{1}"), ..fetch("Need to get * of archives.") },
        // The address, the suite, the architecture, and the package with its architecture, version and size.
        ProgressLine { name: text("{5}"), unit: text("packages"), ..fetch("Get:* * * * * * * [*]") },
        // An index.
        ProgressLine { name: text("{3}"), unit: text("files"), ..fetch("Get:* * * [*]") },
        // apt counts the file that it is downloading.
        ProgressLine {
            done: text("{3}"),
            total: text("{4}"),
            percent: text("{2}"),
            ..fetch("dlstatus:*:*:Retrieving file * of *")
        },
        ProgressLine { total: text("{1}"), unit: text("packages"), ..fetch("unpack:* packages") },
        ProgressLine { done: text("+1"), name: text("{1}"), ..fetch("unpacked:*") },
        ProgressLine { output: "pmstatus:*:*:*".to_owned(), percent: text("{2}"), ..change },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::{Job, Plan, faults_of_plan};

    #[test]
    fn every_line_is_valid() {
        let plan = Plan { progress: lines(), ..Plan::default() };
        assert_eq!(faults_of_plan(&plan, &Job::default()), Vec::<String>::new());
    }
}
