//! Tests names and versions that a shell or an option parser would misread.

use super::{Rule, Suite, TestResult, named};
use crate::{Job, Package, Plan};

const NAMES: [&str; 10] =
    ["", "$(id)", "`id`", "oven;id", "oven&&id", "oven|id", "oven\nid", "-y", "--root=/x", "oven check"];
const VERSIONS: [&str; 3] = ["", "$(id)", "1;id"];
/// Programs that execute a script or a command line. They get it as an argument.
const SHELLS: [&str; 14] = [
    "ash", "bash", "busybox", "csh", "dash", "env", "fish", "ksh", "perl", "python", "python3", "sh",
    "xargs", "zsh",
];

pub fn run(suite: &mut Suite, empty: &Job) -> TestResult<()> {
    for name in NAMES {
        test_package(suite, empty, name, named(name), name)?;
    }
    for version in VERSIONS {
        let package = Package::Named { name: "tree".into(), version: Some(version.into()), suite: None };
        test_package(suite, empty, &format!("tree={version}"), package, version)?;
    }
    Ok(())
}

fn test_package(
    suite: &mut Suite,
    empty: &Job,
    spelling: &str,
    package: Package,
    word: &str,
) -> TestResult<()> {
    let job = Job { packages: vec![package], ..empty.clone() };
    let Some(Ok(plan)) = suite.plan(&format!("(a package {spelling:?})"), &job)? else { return Ok(()) };
    if let Some(fault) = find_misuse(&plan, word) {
        suite.fault(Rule::Names, format!("a package {spelling:?}: {fault}. Refuse invalid names"));
    }
    Ok(())
}

fn find_misuse(plan: &Plan, word: &str) -> Option<String> {
    if word.is_empty() {
        return Some("there is a plan for an empty name or version".into());
    }
    let script = plan.shims.iter().chain(&plan.files).find(|file| {
        file.content.contains(word) && (file.mode & 0o111 != 0 || file.content.starts_with("#!"))
    });
    if let Some(script) = script {
        return Some(format!("it becomes part of the script {}", script.path));
    }
    let commands = plan.steps.iter().flat_map(|step| [&step.argv, &step.before_retry]);
    commands.chain(plan.facts.values()).find_map(|argv| {
        let program = argv.first()?.rsplit('/').next()?;
        let position = argv.iter().position(|argument| argument.contains(word))?;
        let argument = &argv[position];
        if SHELLS.contains(&program) && argument != word {
            return Some(format!("it becomes part of a script for {program}: {argument:?}"));
        }
        let options_ended = argv[..position].iter().any(|argument| argument == "--");
        (argument.starts_with('-') && argument == word && !options_ended)
            .then(|| format!("{program} would read it as an option: put `--` before names"))
    })
}
