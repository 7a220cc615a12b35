//! Installs Ansible for the bake only, if the image lacks it. After the last playbook, Ansible is removed together with
//! all packages that were installed with it.

use super::command::{CommandRunner, ImageCommand};
use super::packages;
use super::packages::InstalledPackage;
use super::plan_steps;
use super::programs::{ANSIBLE, has_program};
use crate::definition::Script;
use crate::error::Kind;
use crate::text::{list_first, match_wildcards};
use anyhow::{Context, Result};
use oven_distro::Step;
use std::collections::BTreeSet;
use std::time::Duration;

/// The maximum number of packages that an error message names.
const NAMED_MAX: usize = 10;
/// The time limit for listing the packages that no other package needs. Usually, the command takes only a moment.
const TIMEOUT: Duration = Duration::from_secs(120);

/// The packages that were installed only for the bake and are removed after the last playbook.
pub struct BakeTools {
    installed: Vec<InstalledPackage>,
}

impl BakeTools {
    /// Installs Ansible if it is missing. Returns `None` if the image itself has Ansible.
    pub async fn install(runner: &CommandRunner<'_>, script: &Script) -> Result<Option<Self>> {
        if has_program(runner.place.inside, ANSIBLE)? {
            return Ok(None);
        }
        let place = runner.work.image.place_of_script(script, "playbook", None);
        let Some(tools) = &runner.work.plan.tools else {
            let what = format!("{place} needs {ANSIBLE}, which the image does not have");
            let hint = "This distribution's plugin cannot install Ansible for the bake only. Add Ansible to `packages`.";
            return Err(Kind::Definition.failure(what).at(&place).hint(hint).into());
        };
        let before = list_packages(runner).await?;
        for step in &tools.steps {
            let done = plan_steps::run_step(runner, step).await;
            done.with_context(|| format!("installing Ansible ({place})"))?;
        }
        let after = list_packages(runner).await?;
        packages::ensure_sound(&after, &runner.work.plan.expect, "packages are not installed correctly")?;
        if !has_program(runner.place.inside, ANSIBLE)? {
            return Err(
                Kind::Step.error(format!("{ANSIBLE} was installed, but it is not in the image's PATH"))
            );
        }
        let changed = missing_or_changed(&before, &after);
        if !changed.is_empty() {
            return Err(Kind::Step
                .failure(format!(
                    "installing Ansible for the bake changed packages of the image: {}",
                    list_first(&changed, NAMED_MAX, ", ")
                ))
                .hint("Update the image first (`upgrade = true`), or add Ansible to `packages`.")
                .into());
        }
        let installed: Vec<_> = after.into_iter().filter(|package| !before.contains(package)).collect();
        runner
            .work
            .report
            .note(format!("installed {} for this bake only", crate::text::count(installed.len(), "package")));
        Ok(Some(Self { installed }))
    }

    /// Removes the packages that were installed with Ansible, except those that another package needs. For example, a
    /// script may have installed a package that needs one of them.
    pub async fn remove(self, runner: &CommandRunner<'_>) -> Result<()> {
        let Some(tools) = &runner.work.plan.tools else { return Ok(()) };
        let before = list_packages(runner).await?;
        let call = ImageCommand {
            why: "listing the packages that no other package needs".to_owned(),
            name: tools.unneeded.argv.first().cloned().unwrap_or_default(),
            argv: tools.unneeded.argv.clone(),
            env: tools.unneeded.env.clone(),
            timeout: TIMEOUT,
            ..ImageCommand::plan_defaults(runner)
        };
        let answer = runner.ask(&call).await?;
        let unneeded: BTreeSet<&str> = answer
            .lines()
            .filter_map(|line| match_wildcards(&tools.unneeded.output, line)?.first().copied())
            .map(|name| name.split_once(':').map_or(name, |(name, _)| name))
            .collect();
        let (removable, needed): (Vec<_>, Vec<_>) =
            self.installed.into_iter().partition(|package| unneeded.contains(package.name.as_str()));
        if !needed.is_empty() {
            let names: Vec<_> = needed.iter().map(|package| format!("`{}`", package.name)).collect();
            let text = format!(
                "these packages were installed with Ansible and remain, because packages that were installed later need them: {}",
                list_first(&names, NAMED_MAX, ", ")
            );
            runner.work.report.note(text);
        }
        if removable.is_empty() {
            return Ok(());
        }
        for step in &tools.remove {
            let argv = fill_in_packages(&step.argv, &removable);
            plan_steps::run_step(runner, &Step { argv, ..step.clone() }).await?;
        }
        let after = list_packages(runner).await?;
        let remaining: Vec<_> =
            after.iter().filter(|p| removable.iter().any(|gone| is_same_package(gone, p))).collect();
        let expected: Vec<_> =
            before.into_iter().filter(|p| !removable.iter().any(|gone| is_same_package(gone, p))).collect();
        let mut wrong = missing_or_changed(&expected, &after);
        wrong.extend(remaining.iter().map(|package| format!("`{}` is still installed", package.name)));
        wrong.extend(
            after
                .iter()
                .filter(|p| {
                    !remaining.contains(p) && !expected.iter().any(|package| is_same_package(package, p))
                })
                .map(|package| format!("`{}` is new", package.name)),
        );
        if wrong.is_empty() {
            return Ok(());
        }
        Err(Kind::Step.error(format!(
            "removing Ansible did not restore the image's packages: {}",
            list_first(&wrong, NAMED_MAX, ", ")
        )))
    }
}

/// Returns the packages of the image. Fails if the plan has no fact that lists them, because then oven cannot find out
/// which packages were installed with Ansible.
async fn list_packages(runner: &CommandRunner<'_>) -> Result<Vec<InstalledPackage>> {
    plan_steps::packages_of(runner).await?.ok_or_else(|| {
        let what =
            "the plan installs programs for the bake only, but does not say how to list the image's packages";
        Kind::Step.error(what)
    })
}

fn is_same_package(one: &InstalledPackage, other: &InstalledPackage) -> bool {
    one.name == other.name && one.architecture == other.architecture
}

/// Returns the packages of `before` that are missing or changed.
fn missing_or_changed(before: &[InstalledPackage], after: &[InstalledPackage]) -> Vec<String> {
    let differs = |package: &&InstalledPackage| !after.contains(package);
    let changed = before.iter().filter(differs);
    changed
        .map(|was| match after.iter().find(|is| is_same_package(was, is)) {
            Some(is) => format!("`{}` ({} -> {})", was.name, was.version, is.version),
            None => format!("`{}` is missing", was.name),
        })
        .collect()
}

/// Returns a copy of a command line in which each argument with `{name}` is replaced by one argument for each package.
fn fill_in_packages(argv: &[String], packages: &[InstalledPackage]) -> Vec<String> {
    let one = |argument: &str, package: &InstalledPackage| {
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

#[cfg(test)]
mod tests {
    use super::*;
    use oven_distro::Expect;

    fn installed(text: &str) -> Vec<InstalledPackage> {
        packages::parse(text, &Expect::default()).unwrap()
    }

    #[test]
    fn a_command_takes_all_packages() {
        let argv = ["rpm", "-e", "{name}-{version}.{architecture}", "--quiet"].map(str::to_owned);
        let argv = fill_in_packages(&argv, &installed("a\t1\tx86_64\nb\t2\tnoarch\n"));
        assert_eq!(argv, ["rpm", "-e", "a-1.x86_64", "b-2.noarch", "--quiet"]);
    }

    #[test]
    fn lost_and_changed_packages_are_listed() {
        let (before, after) =
            (installed("a\t1\tx\nb\t1\tx\nc\t1\tx\n"), installed("a\t1\tx\nb\t2\tx\nd\t1\tx\n"));
        assert_eq!(missing_or_changed(&before, &after), ["`b` (1 -> 2)", "`c` is missing"]);
        assert_eq!(missing_or_changed(&before, &before), Vec::<String>::new());
    }
}
