//! Programs that are in the image for this bake alone: the plan installs them, and what came with them goes again.

use super::command::{Call, Runner};
use super::diagnose;
use super::packages;
use super::packages::Installed;
use super::plan_steps;
use super::scripts::{ANSIBLE, has};
use crate::definition::{FILE, Script};
use crate::error::Kind;
use anyhow::{Context, Result};
use oven_distro::Step;
use std::collections::BTreeSet;
use std::time::Duration;

/// A failure names so many packages.
const NAMED_MAX: usize = 10;
/// A question is answered at once.
const TIMEOUT: Duration = Duration::from_secs(120);

/// What came, to be taken away again.
pub struct Tools {
    came: Vec<Installed>,
}

impl Tools {
    /// Makes sure that playbooks can be run. `None`: the image itself has what it takes.
    pub async fn install(runner: &Runner<'_>, script: &Script) -> Result<Option<Self>> {
        if has(runner.place.inside, ANSIBLE)? {
            return Ok(None);
        }
        let place = format!("{}:{}", runner.work.image.dir.join(FILE).display(), script.line);
        let Some(tools) = &runner.work.plan.tools else {
            let what = format!("{place}: `playbook` of [[ansible]]: the image has no {ANSIBLE}");
            let hint =
                "This distribution's plugin does not install it for a bake: add Ansible to `packages`.";
            return Err(Kind::Definition.failure(what).hint(hint).into());
        };
        let before = all(runner).await?;
        for step in &tools.steps {
            let done = plan_steps::run_step(runner, step).await;
            done.with_context(|| format!("bringing what the [[ansible]] of {place} needs"))?;
        }
        let after = all(runner).await?;
        packages::ensure_sound(&after, &runner.work.plan.expect, "packages are not installed right")?;
        if !has(runner.place.inside, ANSIBLE)? {
            return Err(Kind::Step.error(format!("{ANSIBLE} was installed, and is not in the image's PATH")));
        }
        let changed = lost(&before, &after);
        if !changed.is_empty() {
            return Err(Kind::Step
                .failure(format!(
                    "to install Ansible for the bake changed packages of the image: {}",
                    listed(&changed)
                ))
                .hint("Bring the image up to date first (`upgrade = true`), or add Ansible to `packages`.")
                .into());
        }
        let came: Vec<_> = after.into_iter().filter(|package| !before.contains(package)).collect();
        runner
            .work
            .report
            .note(format!("for this bake alone: {}", crate::text::count(came.len(), "package")));
        Ok(Some(Self { came }))
    }

    /// Takes away what came and nothing needs. What a script installed since, and what that needs, stays.
    pub async fn remove(self, runner: &Runner<'_>) -> Result<()> {
        let Some(tools) = &runner.work.plan.tools else { return Ok(()) };
        let before = all(runner).await?;
        let call = Call {
            why: "asking which packages nothing needs".to_owned(),
            name: tools.unneeded.argv.first().cloned().unwrap_or_default(),
            argv: tools.unneeded.argv.clone(),
            env: tools.unneeded.env.clone(),
            timeout: TIMEOUT,
            ..Call::of_the_plan(runner)
        };
        let answer = runner.ask(&call).await?;
        let unneeded: BTreeSet<&str> = answer
            .lines()
            .filter_map(|line| diagnose::capture(&tools.unneeded.output, line)?.first().copied())
            .map(|name| name.split_once(':').map_or(name, |(name, _)| name))
            .collect();
        let (gone, stays): (Vec<_>, Vec<_>) =
            self.came.into_iter().partition(|package| unneeded.contains(package.name.as_str()));
        if !stays.is_empty() {
            let names: Vec<_> = stays.iter().map(|package| format!("`{}`", package.name)).collect();
            let text = format!(
                "came with Ansible, and stay: what was installed since needs them: {}",
                listed(&names)
            );
            runner.work.report.note(text);
        }
        if gone.is_empty() {
            return Ok(());
        }
        for step in &tools.remove {
            let argv = filled(&step.argv, &gone);
            plan_steps::run_step(runner, &Step { argv, ..step.clone() }).await?;
        }
        let after = all(runner).await?;
        let left: Vec<_> = after.iter().filter(|p| gone.iter().any(|gone| same(gone, p))).collect();
        let kept: Vec<_> = before.into_iter().filter(|p| !gone.iter().any(|gone| same(gone, p))).collect();
        let mut wrong = lost(&kept, &after);
        wrong.extend(left.iter().map(|package| format!("`{}` is still there", package.name)));
        wrong.extend(
            after
                .iter()
                .filter(|p| !left.contains(p) && !kept.iter().any(|kept| same(kept, p)))
                .map(|package| format!("`{}` is new", package.name)),
        );
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Kind::Step
            .error(format!("what Ansible needed was not taken away as it came: {}", listed(&wrong))))
    }
}

/// The packages of the image. Without the fact there is no telling what came.
async fn all(runner: &Runner<'_>) -> Result<Vec<Installed>> {
    plan_steps::packages_of(runner).await?.ok_or_else(|| {
        let what = "the plan installs programs for the bake alone, and does not say what packages there are";
        Kind::Step.error(what)
    })
}

fn same(one: &Installed, other: &Installed) -> bool {
    one.name == other.name && one.architecture == other.architecture
}

/// What of `before` is no more, or not as it was.
fn lost(before: &[Installed], after: &[Installed]) -> Vec<String> {
    let of = |package: &&Installed| !after.contains(package);
    let lost = before.iter().filter(of);
    lost.map(|was| match after.iter().find(|is| same(was, is)) {
        Some(is) => format!("`{}` ({} -> {})", was.name, was.version, is.version),
        None => format!("`{}` is gone", was.name),
    })
    .collect()
}

/// A command with each argument that names a package repeated for all of them.
fn filled(argv: &[String], packages: &[Installed]) -> Vec<String> {
    let one = |argument: &str, package: &Installed| {
        argument
            .replace("{name}", &package.name)
            .replace("{version}", &package.version)
            .replace("{architecture}", &package.architecture)
    };
    let each = |argument: &String| -> Vec<String> {
        if argument.contains("{name}") {
            packages.iter().map(|package| one(argument, package)).collect()
        } else {
            vec![argument.clone()]
        }
    };
    argv.iter().flat_map(each).collect()
}

fn listed(all: &[String]) -> String {
    let more = all.len().saturating_sub(NAMED_MAX);
    let shown = all[..all.len() - more].join(", ");
    if more > 0 { format!("{shown}, and {more} more") } else { shown }
}

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::Expect;

    fn installed(text: &str) -> Vec<Installed> {
        packages::parse(text, &Expect::default()).unwrap()
    }

    #[test]
    fn a_command_takes_all_packages() {
        let argv = ["rpm", "-e", "{name}-{version}.{architecture}", "--quiet"].map(str::to_owned);
        let filled = filled(&argv, &installed("a\t1\tx86_64\nb\t2\tnoarch\n"));
        assert_eq!(filled, ["rpm", "-e", "a-1.x86_64", "b-2.noarch", "--quiet"]);
    }

    #[test]
    fn what_is_lost_is_told() {
        let (before, after) =
            (installed("a\t1\tx\nb\t1\tx\nc\t1\tx\n"), installed("a\t1\tx\nb\t2\tx\nd\t1\tx\n"));
        assert_eq!(lost(&before, &after), ["`b` (1 -> 2)", "`c` is gone"]);
        assert_eq!(lost(&before, &before), Vec::<String>::new());
    }
}
