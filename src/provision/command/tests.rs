use super::*;
use crate::config::project::{NetworkSettings, StepLimits};
use crate::error::hint_of;
use crate::image::tree::ImageTree;
use crate::provision::context::EgressGuard;
use crate::provision::space;
use crate::provision::test::definition;
use crate::report::Report;
use crate::sandbox::spec::ExceededLimit;
use crate::secrets::Secrets;
use crate::sys::fds::open_directory;
use oven_distro::Plan;

/// Returns the message and the hint of the failure of a command that printed a line.
fn failed(exit: &StepExit, line: &str) -> (String, String) {
    failed_of(None, exit, &[line])
}

/// Returns the message and the hint of the failure of a command of this table of the definition, or of the plan.
fn failed_of(table: Option<&'static str>, exit: &StepExit, lines: &[&str]) -> (String, String) {
    let dir = tempfile::tempdir().unwrap();
    let inside = ImageTree::new(open_directory(dir.path()).unwrap());
    let (image, plan, network) =
        (definition(dir.path(), |_| ()), Plan::default(), NetworkSettings::default());
    let (secrets, report) = (Secrets::default(), Report::silent());
    let place = MountedImage { root: dir.path(), inside: &inside, nodes: &[], unmounted: &[] };
    let work = ProvisionContext {
        image: &image,
        plan: &plan,
        network: &network,
        secrets: &secrets,
        guard: EgressGuard::Wanted,
        limits: StepLimits::default(),
        helper: Path::new("/oven"),
        package_cache: None,
        report: &report,
    };
    let runner = CommandRunner::new(&place, &work).unwrap();
    let (why, name) = ("building".to_owned(), "make".to_owned());
    let key = table.map(|table| DefinitionTable { table, name: "check.sh".into(), line: 3 });
    let call = ImageCommand { why, name, key, ..ImageCommand::plan_defaults(&runner) };
    let mut diagnoser = Diagnoser::new(&[]);
    lines.iter().for_each(|line| diagnoser.line(line));
    let error = anyhow::Error::from(runner.failure(&call, exit, &diagnoser, None));
    assert_eq!(Kind::of(&error), Kind::Step);
    (error.to_string(), hint_of(&error).unwrap_or_default())
}

#[test]
fn an_exceeded_limit_does_not_hide_the_error_of_the_command() {
    let exit = |status, ended_step| {
        let (message, hint) = ("too many processes".to_owned(), "Increase it.".to_owned());
        let exceeded_limit = Some(ExceededLimit { message, hint, ended_step });
        StepExit { exceeded_limit, ..StepExit::of(status) }
    };
    let (message, hint) = failed(&exit(ExitStatus::Exited(2), false), "x.c:1: syntax error");
    assert!(message.starts_with("building failed: make: exit status 2; too many processes"), "{message}");
    assert!(message.contains("x.c:1: syntax error"), "{message}");
    assert_eq!(hint, "Increase it.");
    // The cause is known.
    let (message, hint) = failed(&exit(ExitStatus::Exited(2), false), "No space left on device");
    assert!(message.contains("disk is full") && message.contains("too many processes"), "{message}");
    assert_eq!(hint, space::LARGER_DISK_HINT);
    let (message, hint) = failed(&exit(ExitStatus::Signaled(9), true), "compiling x.c");
    assert!(
        message.starts_with("building failed: too many processes (make: killed by SIGKILL)"),
        "{message}"
    );
    assert!(message.contains("compiling x.c"), "{message}");
    assert_eq!(hint, "Increase it.");
}

#[test]
fn only_a_script_that_prints_nothing_may_miss_the_network() {
    let exit = StepExit::of(ExitStatus::Exited(1));
    for (table, lines, expected) in [
        (Some("run"), &[][..], "It printed nothing. It runs without the network"),
        (Some("ansible"), &[], "It printed nothing. It runs without the network"),
        (Some("run"), &["why not"], ""),
        // `grep -q` and `test -e` print nothing.
        (Some("test"), &[], "oven makes no image if a test fails."),
        (Some("test"), &["why not"], "oven makes no image if a test fails."),
        (Some("test"), &["curl: (6) Could not resolve host: x"], "It runs without the network."),
        (None, &[], ""),
    ] {
        let (message, hint) = failed_of(table, &exit, lines);
        assert!(hint.starts_with(expected) && hint.is_empty() == expected.is_empty(), "{message}\n{hint}");
    }
}

#[test]
fn a_package_has_a_path_that_is_only_a_path() {
    assert_eq!(package_path(2, Path::new("a/site_1.0_all.deb")), "/run/oven/packages/2-site_1.0_all.deb");
    assert_eq!(package_path(0, Path::new("x y$(z)é.deb")), "/run/oven/packages/0-x_y__z__.deb");
}
