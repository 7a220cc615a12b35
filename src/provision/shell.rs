//! Runs an isolated shell for a person, and runs the failed step of a bake again.

use super::context::EgressGuard;
use super::network;
use super::package_cache::{CacheAccess, CacheRequest, CacheStore, CacheUse, DownloadCaches, PackageCache};
use super::script_mounts::hide_git;
use crate::config::project::{NetworkSettings, StepLimits};
use crate::disk::step_record::{RecordedCaches, RecordedStep};
use crate::error::Kind;
use crate::mount::Root;
use crate::report::Report;
use crate::sandbox::cgroup::CgroupSupport;
use crate::sandbox::output::OutputSink;
use crate::sandbox::spec::{CacheMount, ExitStatus, StepExit, StepSpec};
use crate::sandbox::{run, run_with};
use crate::secrets::Secrets;
use crate::text::{escape_name, shell_command, shell_quote};
use anyhow::Result;
use oven_distro::{Plan, Shim};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

/// The directory in which a shell starts if it does not have the environment of a script.
const HOME: &str = "/root";
/// The time limit of a shell. A person may leave a shell open for days, so the limit is one year.
const SHELL_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// The failed step of a bake, prepared to run again on this machine.
#[derive(Debug)]
pub struct ReopenedStep {
    recorded: RecordedStep,
    secrets: Secrets,
}

impl ReopenedStep {
    /// Prepares a step. The second value has a clause for each file or directory of this machine that the step saw, and
    /// that no longer exists or cannot be searched for `.git`, which no step may see. The step does not see these any
    /// more.
    pub fn new(mut recorded: RecordedStep, secrets: Secrets) -> Result<(Self, Vec<String>)> {
        let (mut binds, mut missing) = (Vec::new(), Vec::new());
        for bind in &recorded.spec.binds {
            let what = format!("{}, which the step saw as {},", escape_name(&bind.source), bind.target);
            if !bind.source.exists() {
                missing.push(format!("{what} no longer exists"));
                continue;
            }
            match hide_git(bind) {
                Ok(bind) => binds.push(bind),
                Err(error) if Kind::of(&error) == Kind::Interrupted => return Err(error),
                Err(error) => missing.push(format!("{what} cannot be used: {error:#}")),
            }
        }
        recorded.spec.binds = binds;
        Ok((Self { recorded, secrets }, missing))
    }

    /// The command of the step, quoted for a shell. If the step has another working directory than `/`, the command
    /// begins with the change to it.
    pub fn command(&self) -> String {
        let StepSpec { argv, cwd, .. } = &self.recorded.spec;
        let command = shell_command(argv);
        if cwd == "/" { command } else { format!("cd {} && {command}", shell_quote(cwd)) }
    }

    /// Whether the step had the network.
    pub fn has_network(&self) -> bool {
        self.recorded.spec.network
    }

    /// Whether the step gets the settings of `[network]`.
    pub fn has_network_settings(&self) -> bool {
        self.recorded.fetches
    }

    /// Whether the step could write to the disk of the image.
    pub fn can_write_disk(&self) -> bool {
        self.recorded.spec.disk_writable
    }

    fn environment(&self) -> BTreeMap<String, String> {
        let mut environment = self.recorded.spec.env.clone();
        environment.extend(self.secrets.environment(&self.recorded.secrets));
        environment
    }

    /// The directory in which a shell starts: that of the step, if it exists and the step is a script.
    fn shell_directory(&self) -> &str {
        let StepSpec { cwd, binds, .. } = &self.recorded.spec;
        if binds.iter().any(|bind| Path::new(cwd).starts_with(&bind.target)) { cwd } else { HOME }
    }
}

/// The package caches of a step that runs again. Its writes to them are discarded.
struct StepCaches {
    plan: Plan,
    key: String,
    cache: PackageCache,
    writable: bool,
}

impl StepCaches {
    fn new(context: &StepContext<'_>) -> Option<Self> {
        let RecordedCaches { base, key, caches, writable } = context.step.recorded.caches.clone()?;
        Some(Self {
            plan: Plan { caches, ..Plan::default() },
            key,
            cache: PackageCache { store: context.store.clone(), base },
            writable,
        })
    }

    fn open<'a>(&'a self, root: &'a Root<'_>, report: &'a Report) -> DownloadCaches<'a> {
        DownloadCaches::new(CacheRequest {
            cache: Some(&self.cache),
            plan: &self.plan,
            key: Some(&self.key),
            image: root.tree(),
            certificates: None,
            report,
        })
    }

    async fn mounts(&self, opened: &DownloadCaches<'_>) -> Result<Vec<CacheMount>> {
        let access = if self.writable { CacheAccess::Write } else { CacheAccess::Read };
        // A command that is not trusted would publish the downloads for later bakes.
        opened.mounts(CacheUse { trusted: true, fetches: true, access }).await
    }
}

/// A failed step, and what it needs of this machine.
pub struct StepContext<'a> {
    pub step: &'a ReopenedStep,
    /// The package cache of this machine.
    pub store: &'a CacheStore,
}

/// The options of an isolated shell.
pub struct ShellRequest<'a> {
    /// The path of this program.
    pub helper: &'a Path,
    pub shims: Vec<Shim>,
    /// How the builder's credentials are protected from the shell. `None` means that the shell has no network.
    pub network: Option<EgressGuard>,
    pub limits: StepLimits,
    /// The step whose files, environment, caches and limits the shell gets, instead of `shims` and `limits`.
    pub failed: Option<StepContext<'a>>,
    /// A command to run instead of the shell.
    pub command: &'a [String],
}

/// Runs an isolated shell, or a command instead of it, on the terminal of this process. Returns the exit code of the
/// shell or command.
pub async fn shell(root: &Root<'_>, request: ShellRequest<'_>, report: &Report) -> Result<u8> {
    let ShellRequest { helper, shims, network, limits, failed, command } = request;
    CgroupSupport::get().report_gaps(limits, report);
    let bash = root.tree().exists("/bin/bash")?;
    let argv = match command {
        [] if bash => vec!["/bin/bash".to_owned(), "--login".to_owned()],
        [] => vec!["/bin/sh".to_owned(), "-l".to_owned()],
        command => command.to_vec(),
    };
    let step = failed.as_ref().map(|failed| failed.step);
    let recorded = step.map(|step| &step.recorded.spec);
    let caches = failed.as_ref().and_then(StepCaches::new);
    let opened = caches.as_ref().map(|caches| caches.open(root, report));
    let spec = StepSpec {
        root: root.path().to_owned(),
        argv,
        env: step.map(ReopenedStep::environment).unwrap_or_default(),
        cwd: step.map_or(HOME, ReopenedStep::shell_directory).to_owned(),
        network: network.is_some(),
        fenced: network.is_some_and(|guard| guard.fences(report)),
        resolv_conf: None,
        shims: recorded.map_or(shims, |spec| spec.shims.clone()),
        binds: recorded.map(|spec| spec.binds.clone()).unwrap_or_default(),
        caches: match (&caches, &opened) {
            (Some(caches), Some(opened)) => caches.mounts(opened).await?,
            _ => Vec::new(),
        },
        nodes: root.nodes().to_vec(),
        disk_writable: false,
        limits: recorded.map_or(limits, |spec| spec.limits),
        audit_socket: false,
        // The command of the step may write to the status descriptor.
        status: recorded.is_some_and(|spec| spec.status),
        throwaway: false,
        interactive: true,
    };
    let exit = run(helper, &spec, SHELL_TIMEOUT, &mut |_| ()).await?;
    Ok(exit_code(&exit, report))
}

/// How to run a step again.
pub struct RerunRequest<'a> {
    /// The path of this program.
    pub helper: &'a Path,
    pub failed: StepContext<'a>,
    /// The settings of the project of the definition.
    pub network: &'a NetworkSettings,
    /// How the builder's credentials are protected from a step with the network.
    pub guard: EgressGuard,
}

/// Runs a step again, contained as it was in the bake. Returns the exit code of its command. `on_line` gets the lines of
/// its output, in which secrets are masked.
pub async fn rerun(
    root: &Root<'_>,
    request: RerunRequest<'_>,
    report: &Report,
    on_line: &mut dyn FnMut(&str),
) -> Result<u8> {
    let RerunRequest { helper, failed, network, guard } = request;
    let step = failed.step;
    let recorded = &step.recorded;
    CgroupSupport::get().report_gaps(recorded.spec.limits, report);
    let caches = StepCaches::new(&failed);
    let opened = caches.as_ref().map(|caches| caches.open(root, report));
    let mut spec = StepSpec {
        root: root.path().to_owned(),
        env: step.environment(),
        fenced: recorded.spec.network && !recorded.imds && guard.fences(report),
        resolv_conf: None,
        caches: match (&caches, &opened) {
            (Some(caches), Some(opened)) => caches.mounts(opened).await?,
            _ => Vec::new(),
        },
        nodes: root.nodes().to_vec(),
        interactive: false,
        ..recorded.spec.clone()
    };
    if recorded.fetches {
        let certificates = network::certificates(network, root.tree())?;
        spec.env.extend(network::environment(network, certificates.is_some()));
        spec.shims.extend(certificates);
    }
    let mut on_status = |_: &str| ();
    let mut sink = OutputSink::WithStatus { on_line, on_status: &mut on_status };
    let timeout = Duration::from_secs(recorded.timeout);
    let running = run_with(helper, &spec, &step.secrets, timeout, &mut sink);
    let exit = match (&caches, &opened) {
        (Some(caches), Some(opened)) => tokio::select! {
            exit = running => exit?,
            full = opened.full(caches.writable) => return Err(full),
        },
        _ => running.await?,
    };
    if let Some(failure) = opened.as_ref().and_then(DownloadCaches::limit_failure) {
        return Err(failure.into());
    }
    if exit.status == ExitStatus::TimedOut {
        report.warn(format!("the step took longer than {} s and was killed", recorded.timeout));
    }
    Ok(exit_code(&exit, report))
}

fn exit_code(exit: &StepExit, report: &Report) -> u8 {
    if let Some(limit) = &exit.exceeded_limit {
        report.warn(format!("{}. {}", limit.message, limit.hint));
    }
    match exit.status {
        ExitStatus::Exited(code) => u8::try_from(code).unwrap_or(u8::MAX),
        // Shells use the same exit code for a command that a signal killed.
        ExitStatus::Signaled(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        ExitStatus::TimedOut => u8::MAX,
    }
}
