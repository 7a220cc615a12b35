//! Runs a plan, and what the definition adds to it, in a mounted image.

use super::caches::{Access, Kept, key};
use super::listen::command;
use super::packages::{self, Installed};
use super::runner::{Call, Place, Runner};
use super::space::{self, Space};
use super::step::egress::Fence;
use super::{Root, boot, clean, files, leak, lint, plan_files, provision, selinux};
use crate::definition::Definition;
use crate::error::Kind;
use crate::report::Report;
use crate::secrets::Secrets;
use crate::settings::NetworkSettings;
use anyhow::{Context, Result};
use oven_distro::{Phase, Plan, Shim, Step};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, SystemTime};

pub use super::network::CA_FILE;
pub use super::runner::package_path;

/// What is to be done in an image, and with what.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    pub image: &'a Definition,
    pub plan: &'a Plan,
    pub network: &'a NetworkSettings,
    /// The values of the definition's secrets.
    pub secrets: &'a Secrets,
    /// Whether steps have to be fenced; with `imds = true` in the definition, none is.
    pub guard: Guard,
    /// The path of this program.
    pub helper: &'a Path,
    /// The package cache; `None`: packages are cached in the image, during the bake.
    pub kept: Option<&'a Kept>,
    pub report: &'a Report,
}

/// The message for broken packages of the base.
const BASE: &str = "packages of the base image are not installed correctly";
/// Whether steps with the network are fenced off from the builder's credentials ([`super::step::egress`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// If this machine can. For a bake that needs no credentials: there may be none.
    Wanted,
    /// Without a fence, such a step fails. For a builder in the cloud: its role may do what the bake does, and more.
    Required,
}

impl Guard {
    /// Whether steps are fenced. If that is impossible and not required, the reason is logged once.
    pub(super) fn fences(self, report: &Report) -> bool {
        if self == Self::Required {
            return true;
        }
        let fence = Fence::make();
        if let Err(error) = &fence {
            report.detail(format!("{error:#}"));
        }
        fence.is_ok()
    }
}

/// Upper bound for a fact, which is answered at once.
const FACT_TIMEOUT: Duration = Duration::from_secs(120);

/// Provisions the image: the plan's steps, the definition's files, scripts and tests. Then cleans it, and makes sure
/// that no machine-specific data or secrets are left. Returns the plan's facts, `packages` among them.
///
/// Errors: `Step` if a step fails or the image is not as it should be; `Definition` if the definition asks for
/// something impossible.
pub async fn execute(root: &Root<'_>, work: &Work<'_>) -> Result<BTreeMap<String, String>> {
    let unmounted = root.unmounted();
    let place = Place { root: root.path(), inside: root.inside(), nodes: root.nodes(), unmounted };
    execute_in(&place, work).await
}

/// Like [`execute`], in any directory that is a mount point and has an image.
pub async fn execute_in(place: &Place<'_>, work: &Work<'_>) -> Result<BTreeMap<String, String>> {
    let provisioned = do_all(place, work).await;
    provisioned.map_err(|error| work.secrets.mask_error(Kind::Step.unless_known(space::explain(error))))
}

async fn do_all(place: &Place<'_>, work: &Work<'_>) -> Result<BTreeMap<String, String>> {
    let begun = SystemTime::now();
    let runner = Runner::new(place, work)?;
    runner.downloads.look_ahead(&runner);
    let (space, since) = (Space::of(place.root)?, leak::Since::now());
    let mut before = lint::Before::of(place.inside, work)?;
    let boots = boot::Before::of(place.inside)?;

    let steps =
        |clean: bool| work.plan.steps.iter().filter(move |step| (step.phase == Phase::Clean) == clean);
    let changes = steps(false).next().is_some();
    let base = if changes { packages_of(&runner).await? } else { None };
    if let Some(base) = &base {
        packages::ensure_sound(base, &work.plan.expect, BASE)?;
    }
    let held = if changes { held(&runner).await? } else { Vec::new() };
    packages::ensure_free(&held, base.as_deref().unwrap_or_default(), work)?;
    plan_files::place(place, work)?;
    for step in steps(false) {
        run_step(&runner, step).await?;
    }
    let mut installed = if changes { packages_of(&runner).await? } else { None };
    if let Some(installed) = &installed {
        packages::ensure_sound(installed, &work.plan.expect, "packages are not installed correctly")?;
        packages::ensure_there(installed, &work.plan.expect)?;
        if let Some(what) = packages::difference(base.as_deref().unwrap_or_default(), installed) {
            work.report.note(what);
        }
    }
    before.packages_are_done(place.inside)?;

    if !work.image.files.is_empty() {
        let step = work.report.step("files", format!("placing {}", count(work.image.files.len(), "file")));
        files::place(place.inside, work.image, place.unmounted)?;
        step.done();
    }
    provision::run(&runner).await?;
    provision::test(&runner).await?;

    if installed.is_none() || !work.image.runs.is_empty() {
        installed = packages_of(&runner).await?;
        let whose = match work.image.runs[..] {
            [] => BASE,
            _ => "packages are not installed correctly after the definition's scripts",
        };
        packages::ensure_sound(installed.as_deref().unwrap_or_default(), &work.plan.expect, whose)?;
    }
    let facts = facts(&runner, installed).await?;
    for step in steps(true) {
        run_step(&runner, step).await?;
    }
    boot::lint(place, &boots, work.report).await?;
    clean_up(place, work, &before, since)?;
    selinux::label(&runner, place.inside, work.image.selinux, begun).await?;
    space.ensure_left(place.root)?;
    Ok(facts)
}

pub(super) async fn run_step(runner: &Runner<'_>, step: &Step) -> Result<()> {
    let call = Call {
        phase: phase(step.phase).to_owned(),
        why: step.why.clone(),
        name: command(step),
        argv: step.argv.clone(),
        env: step.env.clone(),
        network: step.network,
        fetches: step.phase == Phase::Fetch,
        trusted: matches!(step.phase, Phase::Prepare | Phase::Fetch),
        caches: match step.phase {
            Phase::Fetch => Access::Write,
            Phase::Prepare | Phase::Upgrade | Phase::Install | Phase::Verify => Access::Read,
            Phase::Clean => Access::None,
        },
        retries: step.retries,
        before_retry: step.before_retry.clone(),
        failures: &runner.work.plan.failures,
        notes: &runner.work.plan.notes,
        also_good: step.also_good.clone(),
        timeout: Duration::from_secs(step.timeout),
        ..Call::of_the_plan(runner)
    };
    if !step.once {
        return runner.run(&call).await;
    }
    let name = key::of_step(&runner.work, step)?;
    if runner.downloads.is_done(&name) {
        runner
            .work
            .report
            .detail(format!("{}: skipped, because it was done before and nothing has changed", step.why));
        // As if it had run: the next bake finds it done.
        runner.downloads.note_done(name);
        return Ok(());
    }
    runner.run(&call).await?;
    runner.downloads.note_done(name);
    Ok(())
}

/// The phase's name in the table of times.
fn phase(phase: Phase) -> &'static str {
    match phase {
        Phase::Prepare => "prepare",
        Phase::Fetch => "fetch",
        Phase::Upgrade => "upgrade",
        Phase::Install => "install",
        Phase::Verify => "verify",
        Phase::Clean => "clean",
    }
}

/// The packages of the image; `None` if the plan has no such fact.
pub(super) async fn packages_of(runner: &Runner<'_>) -> Result<Option<Vec<Installed>>> {
    let Some(argv) = runner.work.plan.facts.get(packages::FACT) else { return Ok(None) };
    let output = ask(runner, packages::FACT, argv).await?;
    Ok(Some(packages::parse(&output, &runner.work.plan.expect)?))
}

/// The packages of the image that no upgrade changes.
async fn held(runner: &Runner<'_>) -> Result<Vec<String>> {
    let Some(argv) = runner.work.plan.facts.get(packages::HELD) else { return Ok(Vec::new()) };
    let output = ask(runner, packages::HELD, argv).await?;
    Ok(output.lines().map(str::trim).filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

async fn facts(runner: &Runner<'_>, installed: Option<Vec<Installed>>) -> Result<BTreeMap<String, String>> {
    let mut facts = BTreeMap::new();
    for (name, argv) in &runner.work.plan.facts {
        let text = match &installed {
            Some(installed) if name == packages::FACT => packages::document(installed),
            _ => ask(runner, name, argv).await?,
        };
        facts.insert(name.clone(), runner.work.secrets.mask(&text).into_owned());
    }
    Ok(facts)
}

async fn ask(runner: &Runner<'_>, name: &str, argv: &[String]) -> Result<String> {
    let call = Call {
        why: format!("reading the image's {name}"),
        name: argv.first().cloned().unwrap_or_default(),
        argv: argv.to_vec(),
        env: BTreeMap::from([("LC_ALL".to_owned(), "C.UTF-8".to_owned())]),
        trusted: true,
        caches: Access::None,
        timeout: FACT_TIMEOUT,
        ..Call::of_the_plan(runner)
    };
    runner.ask(&call).await
}

fn clean_up(place: &Place<'_>, work: &Work<'_>, before: &lint::Before, since: leak::Since) -> Result<()> {
    let step = work.report.step("clean", "cleaning (machine-id, host keys, logs)");
    for note in clean::clean(place.inside, &work.image.keep).context("cleaning the image")? {
        work.report.note(note);
    }
    lint::lint(place.inside, work, before)?;
    leak::ensure_none(place.inside, work.secrets, since)?;
    step.done();
    Ok(())
}

/// Runs a contained shell, or a command instead of it, on the terminal of this process. Returns its exit code.
/// `network`: whether it has the network, and how that is guarded.
pub async fn shell(
    root: &Root<'_>,
    helper: &Path,
    shims: Vec<Shim>,
    network: Option<Guard>,
    command: &[String],
    report: &Report,
) -> Result<u8> {
    let bash = root.inside().exists("/bin/bash")?;
    let argv = match command {
        [] if bash => vec!["/bin/bash".to_owned(), "--login".to_owned()],
        [] => vec!["/bin/sh".to_owned(), "-l".to_owned()],
        command => command.to_vec(),
    };
    let spec = super::step::Spec {
        root: root.path().to_owned(),
        argv,
        env: BTreeMap::new(),
        cwd: "/root".to_owned(),
        network: network.is_some(),
        fenced: network.is_some_and(|guard| guard.fences(report)),
        resolv_conf: None,
        shims,
        binds: Vec::new(),
        caches: Vec::new(),
        nodes: root.nodes().to_vec(),
        throwaway: false,
        interactive: true,
    };
    let exit = super::step::run(helper, &spec, SHELL_TIMEOUT, &mut |_| ()).await?;
    Ok(match exit.status {
        super::step::ExitStatus::Exited(code) => u8::try_from(code).unwrap_or(u8::MAX),
        // As shells report it.
        super::step::ExitStatus::Signaled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        super::step::ExitStatus::TimedOut => u8::MAX,
    })
}

/// A person may leave a shell open over the weekend; a year is practically unlimited.
const SHELL_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

pub(super) fn count(number: usize, what: &str) -> String {
    if number == 1 { format!("1 {what}") } else { format!("{number} {what}s") }
}
