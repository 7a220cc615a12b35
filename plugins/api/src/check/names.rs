//! Names that a shell, or an option parser, would take for something else.

use super::{Rule, Suite, Tried, named};
use crate::{Job, Package, Plan};

const NAMES: [&str; 10] =
    ["", "$(id)", "`id`", "oven;id", "oven&&id", "oven|id", "oven\nid", "-y", "--root=/x", "oven check"];
const VERSIONS: [&str; 3] = ["", "$(id)", "1;id"];
/// Programs that read a script, or another command line, from an argument.
const SHELLS: [&str; 14] = [
    "ash", "bash", "busybox", "csh", "dash", "env", "fish", "ksh", "perl", "python", "python3", "sh",
    "xargs", "zsh",
];

pub fn run(suite: &mut Suite, empty: &Job) -> Tried<()> {
    for name in NAMES {
        try_one(suite, empty, name, named(name), name)?;
    }
    for version in VERSIONS {
        let package = Package::Named { name: "tree".into(), version: Some(version.into()) };
        try_one(suite, empty, &format!("tree={version}"), package, version)?;
    }
    Ok(())
}

fn try_one(suite: &mut Suite, empty: &Job, spelt: &str, package: Package, word: &str) -> Tried<()> {
    let job = Job { packages: vec![package], ..empty.clone() };
    let Some(Ok(plan)) = suite.plan(&format!("(a package {spelt:?})"), &job)? else { return Ok(()) };
    if let Some(fault) = taken_for_else(&plan, word) {
        suite.fault(Rule::Names, format!("a package {spelt:?}: {fault}; refuse what is no name"));
    }
    Ok(())
}

fn taken_for_else(plan: &Plan, word: &str) -> Option<String> {
    if word.is_empty() {
        return Some("there is a plan for it".into());
    }
    let script = plan.shims.iter().chain(&plan.files).find(|file| {
        file.content.contains(word) && (file.mode & 0o111 != 0 || file.content.starts_with("#!"))
    });
    if let Some(script) = script {
        return Some(format!("it is in the script {}", script.path));
    }
    let commands = plan.steps.iter().flat_map(|step| [&step.argv, &step.before_retry]);
    commands.chain(plan.facts.values()).find_map(|argv| {
        let program = argv.first()?.rsplit('/').next()?;
        let place = argv.iter().position(|argument| argument.contains(word))?;
        let argument = &argv[place];
        if SHELLS.contains(&program) && argument != word {
            return Some(format!("it is in a script for {program}: {argument:?}"));
        }
        let ended = argv[..place].iter().any(|argument| argument == "--");
        (argument.starts_with('-') && argument == word && !ended)
            .then(|| format!("{program} would take it for an option; put `--` before names"))
    })
}
