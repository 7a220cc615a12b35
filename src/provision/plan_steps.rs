//! Runs the steps of a plan, and queries its facts. A fact is a command whose output describes the image, such as the
//! list of its packages.

use super::command::{CommandRunner, ImageCommand};
use super::diagnose::command_name;
use super::package_cache::{CacheAccess, key};
use super::packages::{self, InstalledPackage};
use crate::secrets::Secrets;
use crate::text::without_control_characters;
use anyhow::{Context, Result};
use oven_distro::{Phase, Plan, ProgressLine, Step};
use std::collections::BTreeMap;
use std::time::Duration;

/// The time limit for the query of a fact. Usually, a query takes only a moment.
const FACT_TIMEOUT: Duration = Duration::from_secs(120);

/// Returns the steps of a plan that change the image.
pub fn provisioning(plan: &Plan) -> impl Iterator<Item = &Step> {
    plan.steps.iter().filter(|step| step.phase != Phase::Clean)
}

/// Returns the steps of a plan that clean the image.
pub fn cleaning(plan: &Plan) -> impl Iterator<Item = &Step> {
    plan.steps.iter().filter(|step| step.phase == Phase::Clean)
}

pub async fn run_step(runner: &CommandRunner<'_>, step: &Step) -> Result<()> {
    let call = ImageCommand {
        phase: phase(step.phase).to_owned(),
        why: step.why.clone(),
        name: command_name(step),
        argv: step.argv.clone(),
        env: step.env.clone(),
        network: step.network,
        fetches: step.phase == Phase::Fetch,
        trusted: matches!(step.phase, Phase::Prepare | Phase::Fetch),
        caches: match step.phase {
            Phase::Fetch => CacheAccess::Write,
            Phase::Prepare | Phase::Upgrade | Phase::Install | Phase::Verify => CacheAccess::Read,
            Phase::Clean => CacheAccess::None,
        },
        retries: step.retries,
        before_retry: step.before_retry.clone(),
        failures: &runner.work.plan.failures,
        notes: &runner.work.plan.notes,
        status: !runner.work.plan.progress.is_empty(),
        progress: progress_lines(runner.work.plan, step.phase),
        also_good: step.also_good.clone(),
        timeout: Duration::from_secs(step.timeout),
        ..ImageCommand::plan_defaults(runner)
    };
    if !step.once {
        return runner.run(&call).await;
    }
    let name = key::step_key(&runner.work, step)?;
    if runner.downloads.is_done(&name).await {
        runner.work.report.detail(format!(
            "{}: skipped, because an earlier bake did it and nothing has changed since",
            step.why
        ));
        // The step is recorded as if it had run, so that the next bake can also skip it.
        runner.downloads.note_done(name);
        return Ok(());
    }
    runner.run(&call).await?;
    runner.downloads.note_done(name);
    Ok(())
}

/// Returns the lines that say how far a step of this phase is.
fn progress_lines(plan: &Plan, phase: Phase) -> Vec<&ProgressLine> {
    plan.progress.iter().filter(|line| line.phases.is_empty() || line.phases.contains(&phase)).collect()
}

/// Returns the phase's name for the table of durations.
pub fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "prepare",
        Phase::Fetch => "fetch",
        Phase::Upgrade => "upgrade",
        Phase::Install => "install",
        Phase::Verify => "verify",
        Phase::Clean => "clean",
    }
}

/// Returns the packages of the image, or `None` if the plan has no fact that lists them.
pub async fn packages_of(runner: &CommandRunner<'_>) -> Result<Option<Vec<InstalledPackage>>> {
    let Some(argv) = runner.work.plan.facts.get(packages::FACT) else { return Ok(None) };
    let output = ask(runner, packages::FACT, argv).await?;
    let packages = packages::parse(&output, &runner.work.plan.expect);
    Ok(Some(packages.with_context(|| reading(packages::FACT, argv))?))
}

/// Returns the held packages of the image, which no upgrade changes.
pub async fn held_packages(runner: &CommandRunner<'_>) -> Result<Vec<String>> {
    let Some(argv) = runner.work.plan.facts.get(packages::HELD) else { return Ok(Vec::new()) };
    let output = ask(runner, packages::HELD, argv).await?;
    packages::parse_held(&output).with_context(|| reading(packages::HELD, argv))
}

fn reading(fact: &str, argv: &[String]) -> String {
    format!("reading the image's {fact} with {}", argv.first().map_or("", String::as_str))
}

pub async fn facts(
    runner: &CommandRunner<'_>,
    installed: Option<Vec<InstalledPackage>>,
) -> Result<BTreeMap<String, String>> {
    let mut facts = BTreeMap::new();
    for (name, argv) in &runner.work.plan.facts {
        let text = match &installed {
            Some(installed) if name == packages::FACT => packages::document(installed),
            _ => ask(runner, name, argv).await?,
        };
        facts.insert(name.clone(), fact_text(&text, runner.work.secrets));
    }
    Ok(facts)
}

/// Returns a fact as it is stored. Control characters are removed first, so that they cannot hide a secret.
fn fact_text(output: &str, secrets: &Secrets) -> String {
    secrets.mask(&without_control_characters(output)).into_owned()
}

async fn ask(runner: &CommandRunner<'_>, name: &str, argv: &[String]) -> Result<String> {
    let call = ImageCommand {
        why: format!("reading the image's {name}"),
        name: argv.first().cloned().unwrap_or_default(),
        argv: argv.to_vec(),
        env: BTreeMap::from([("LC_ALL".to_owned(), "C.UTF-8".to_owned())]),
        trusted: true,
        caches: CacheAccess::None,
        timeout: FACT_TIMEOUT,
        ..ImageCommand::plan_defaults(runner)
    };
    runner.ask(&call).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secrets::MASK;

    #[test]
    fn a_fact_has_neither_control_characters_nor_secrets() {
        let secrets = Secrets::of_test(&[("TOKEN", "hunter2hunter2")]);
        for (output, stored) in [
            ("curl\t7.88\tamd64\nwget\t1\tall\n", "curl\t7.88\tamd64\nwget\t1\tall\n"),
            ("a \u{1b}[31mred\u{1b}[0m\u{7} line\r\n", "a red line\n"),
            ("x hunter2\u{1b}[1mhunter2\n", &format!("x {MASK}\n")),
            ("x hunter2\u{0}hunter2\u{200b}\n", &format!("x {MASK}\n")),
        ] {
            assert_eq!(fact_text(output, &secrets), stored, "{output:?}");
        }
    }
}
