//! Runs commands in an image. Decides which files they see and how often they are retried, and explains their failures.

mod failure;
#[cfg(test)]
mod tests;

use super::context::{MountedImage, ProvisionContext};
use super::diagnose::{Diagnoser, Diagnosis};
use super::network;
use super::package_cache::{CacheAccess, CacheRequest, CacheUse, DownloadCaches};
use super::packages::InstalledPackage;
use super::progress::ProgressReader;
use super::space::ImageSpace;
use crate::definition::PackageRequest;
use crate::disk::step_record::RecordedStep;
use crate::error::Kind;
use crate::report;
use crate::sandbox;
use crate::sandbox::cgroup::CgroupSupport;
use crate::sandbox::output::OutputSink;
use crate::sandbox::spec::{BindMount, ExitStatus, StepExit, StepSpec};
use crate::text::without_control_characters;
use anyhow::{Context, Result};
use oven_distro::{ProgressLine, Shim, Trouble};
use std::cell::{Cell, OnceCell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PACKAGES: &str = "/run/oven/packages";
/// The pause before the first retry. Each later pause is twice as long as the previous pause.
const PAUSE: Duration = Duration::from_secs(2);
/// The time limit for the command that runs before a retry. This command deletes a cache, which usually takes seconds.
const BEFORE_RETRY_TIMEOUT: Duration = Duration::from_secs(5 * 60);
/// The maximum size of the output that [`CommandRunner::ask`] returns, in bytes. A list of all packages has less than 1
/// MiB. The labels of 400,000 new files have about 48 MiB.
const ANSWER_MAX: usize = 48 << 20;
/// The number of last lines that are searched for an explanation if a command fails whose output [`CommandRunner::ask`]
/// would return.
const EXPLAINED_MAX: usize = 1000;

/// A command, and its permissions.
pub struct ImageCommand<'a> {
    pub phase: String,
    /// The purpose, as a gerund with its object, such as `installing nginx`.
    pub why: String,
    /// The name of the command in messages to the user.
    pub name: String,
    pub argv: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// The names of the secrets that the command gets as environment variables.
    pub secrets: Vec<String>,
    pub cwd: String,
    pub network: bool,
    /// Whether the command downloads packages without running their code. Only such commands get the settings of
    /// `[network]`.
    pub fetches: bool,
    /// True if the command runs neither code of packages nor a script of the definition. When the first command with
    /// the value false starts, the downloads so far are published for later bakes. Later downloads are not published.
    pub trusted: bool,
    pub caches: CacheAccess,
    pub shims: Vec<Shim>,
    pub binds: Vec<BindMount>,
    /// Whether the command may create sockets for the audit log ([`StepSpec::audit_socket`]).
    pub audit_socket: bool,
    /// Whether the command's writes to the image are discarded.
    pub throwaway: bool,
    pub retries: u32,
    /// A command that runs before each retry, without network. If it is empty, nothing runs.
    pub before_retry: Vec<String>,
    pub timeout: Duration,
    pub troubles: &'a [Trouble],
    /// Output lines that count as a failure even if the command's exit code is good.
    pub failures: &'a [Trouble],
    /// Output lines that are explained to the user but do not count as a failure.
    pub notes: &'a [Trouble],
    /// Whether the command has a status descriptor ([`StepSpec::status`]).
    pub status: bool,
    /// The lines that say how far the command is.
    pub progress: Vec<&'a ProgressLine>,
    /// Exit codes that, like 0, do not count as a failure.
    pub also_good: Vec<u8>,
    /// The table in image.toml that requests the command. `None` for a command of the plan.
    pub key: Option<DefinitionTable>,
}

/// A table in image.toml.
pub struct DefinitionTable {
    /// `run`, `ansible` or `test`.
    pub table: &'static str,
    /// The script, program or playbook, as image.toml names it.
    pub name: String,
    pub line: usize,
}

pub struct CommandRunner<'a> {
    pub place: MountedImage<'a>,
    pub work: ProvisionContext<'a>,
    packages: Vec<BindMount>,
    /// Whether steps with the network are prevented from reaching the builder's credentials. This is determined when
    /// the first step with the network starts.
    fenced: OnceCell<bool>,
    /// Whether a command has run in the image. If the first one cannot even start, the base is at fault.
    entered: Cell<bool>,
    /// The step that is running, or that failed, and its access to the caches.
    failed: RefCell<Option<(RecordedStep, CacheAccess)>>,
    /// The environment of commands that download packages.
    network_env: BTreeMap<String, String>,
    certificates: Option<Shim>,
    /// The space of the image's file systems before the first command. `None` if it could not be measured.
    space: Option<ImageSpace>,
    /// The packages of the base image, if they were listed.
    pub base_packages: OnceCell<Vec<InstalledPackage>>,
    pub downloads: DownloadCaches<'a>,
}

/// Returns the path at which steps see a package file of the definition. `index` is the file's position in `packages`.
pub fn package_path(index: usize, source: &Path) -> String {
    let name = source.file_name().unwrap_or_default().to_string_lossy();
    // Because the path contains a `/`, apt treats it as a file and not as the name of a package. Characters that could
    // have a special meaning for apt are replaced.
    let name: String = name
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._+~-".contains(c) { c } else { '_' })
        .collect();
    format!("{PACKAGES}/{index}-{name}")
}

impl<'a> ImageCommand<'a> {
    /// Returns the default values for a command of the plan.
    pub fn plan_defaults(runner: &CommandRunner<'a>) -> Self {
        Self {
            phase: String::new(),
            why: String::new(),
            name: String::new(),
            argv: Vec::new(),
            env: BTreeMap::new(),
            secrets: Vec::new(),
            cwd: "/".to_owned(),
            network: false,
            fetches: false,
            trusted: false,
            caches: CacheAccess::Read,
            shims: runner.work.plan.shims.clone(),
            binds: runner.packages.clone(),
            audit_socket: false,
            throwaway: false,
            retries: 0,
            before_retry: Vec::new(),
            timeout: Duration::ZERO,
            troubles: &runner.work.plan.troubles,
            failures: &[],
            notes: &[],
            status: false,
            progress: Vec::new(),
            also_good: Vec::new(),
            key: None,
        }
    }

    fn is_good(&self, status: ExitStatus) -> bool {
        let also = |code: i32| self.also_good.iter().any(|good| i32::from(*good) == code);
        status.success() || matches!(status, ExitStatus::Exited(code) if also(code))
    }

    /// Returns the default values for a script of the definition.
    pub fn script_defaults(runner: &CommandRunner<'a>) -> Self {
        Self {
            shims: runner.script_shims(),
            binds: Vec::new(),
            caches: CacheAccess::Write,
            troubles: &[],
            ..Self::plan_defaults(runner)
        }
    }
}

impl<'a> CommandRunner<'a> {
    pub fn new(place: &MountedImage<'a>, work: &ProvisionContext<'a>) -> Result<Self> {
        let mut packages = Vec::new();
        for (index, ask) in work.image.packages.iter().enumerate() {
            let (source, within) = match ask {
                PackageRequest::File { source, .. } => (source, Some(work.image.project.clone())),
                PackageRequest::Url { file: Some(file), .. } => (&file.source, None),
                _ => continue,
            };
            let absolute = std::path::absolute(source);
            let absolute = absolute.with_context(|| format!("resolving {}", source.display()))?;
            packages.push(BindMount {
                source: absolute,
                target: package_path(index, source),
                within,
                hidden: Vec::new(),
            });
        }
        let certificates = network::certificates(work.network, place.inside)?;
        let network_env = network::environment(work.network, certificates.is_some());
        let downloads = DownloadCaches::new(CacheRequest {
            cache: work.package_cache,
            plan: work.plan,
            key: None,
            image: place.inside,
            certificates: certificates.clone(),
            report: work.report,
        });
        let (fenced, entered, base_packages) = (OnceCell::new(), Cell::new(false), OnceCell::new());
        Ok(Self {
            place: *place,
            work: *work,
            packages,
            fenced,
            entered,
            failed: RefCell::default(),
            space: ImageSpace::of(place.root).ok(),
            network_env,
            certificates,
            base_packages,
            downloads,
        })
    }

    /// The mount point of the image.
    pub fn root(&self) -> &Path {
        self.place.root
    }

    /// Returns the shims that the definition's scripts see. A shim is a file that replaces a file of the image while a
    /// step runs. Shims in `/etc` are omitted, because a script may have to change the image's own file.
    pub fn script_shims(&self) -> Vec<Shim> {
        let shims = self.work.plan.shims.iter();
        shims.filter(|shim| !Path::new(&shim.path).starts_with("/etc")).cloned().collect()
    }

    /// Runs a command. If it fails, runs it again up to `retries` times, unless a retry cannot help. Shows a progress
    /// line.
    pub async fn run(&self, call: &ImageCommand<'_>) -> Result<()> {
        let report = self.work.report;
        let step = report.step(&call.phase, call.why.clone());
        self.failed.replace(Some((self.record(call), call.caches)));
        let mut pause = PAUSE;
        for attempt in 0.. {
            let (mut diagnoser, mut failures) =
                (Diagnoser::new(call.troubles), Diagnoser::new(call.failures));
            let mut notes = Diagnoser::new(call.notes);
            let progress = RefCell::new(ProgressReader::new(call.progress.clone()));
            let read_progress = |line: &str| {
                if let Some(progress) = progress.borrow_mut().line(line) {
                    step.advance(progress);
                }
            };
            let mut on_status = read_progress;
            let mut on_line = |line: &str| {
                step.output(line);
                read_progress(line);
                diagnoser.line(line);
                failures.line(line);
                notes.line(line);
            };
            let mut sink = OutputSink::WithStatus { on_line: &mut on_line, on_status: &mut on_status };
            let exit = self.once(call, &mut sink).await.with_context(|| call.why.clone())?;
            self.report_daemons(call, &exit);
            let failed = failures.meaning();
            let good = call.is_good(exit.status);
            if good && failed.is_none() {
                self.report_notes(&notes);
                break;
            }
            let meaning = if good { failed } else { diagnoser.meaning().or(failed) };
            let hopeless = exit.status == ExitStatus::TimedOut
                || diagnoser.no_space
                || exit.exceeded_limit.as_ref().is_some_and(|limit| limit.ended_step)
                || meaning.as_ref().is_some_and(|meaning| meaning.package.is_some());
            if attempt == call.retries || hopeless {
                if call.trusted {
                    self.downloads.settle().await; // so that later bakes can use the finished downloads
                }
                let meaning = match meaning {
                    Some(meaning) => Some(self.add_known_versions(call, meaning).await),
                    None => None,
                };
                return Err(self.failure(call, &exit, &diagnoser, meaning).into());
            }
            report.warn(format!("{} failed ({}): retrying in {} s", call.why, exit.status, pause.as_secs()));
            tokio::time::sleep(pause).await;
            pause *= 2;
            self.before_retry(call, &step).await?;
        }
        step.done();
        self.failed.take();
        Ok(())
    }

    /// The step that failed in [`Self::run`], if one did.
    pub fn failed_step(&self) -> Option<RecordedStep> {
        let failed = self.failed.borrow();
        let (step, access) = failed.as_ref()?;
        // The step itself may have opened the caches, so they are known only now.
        Some(RecordedStep { caches: self.downloads.record(*access), ..step.clone() })
    }

    /// Describes a command without its caches, so that `oven shell` can run it again. The description has no secrets.
    fn record(&self, call: &ImageCommand<'_>) -> RecordedStep {
        RecordedStep {
            why: call.why.clone(),
            table: call.key.as_ref().map(|key| key.table.to_owned()),
            line: call.key.as_ref().map(|key| key.line),
            secrets: call.secrets.clone(),
            imds: self.work.image.imds,
            fetches: call.fetches,
            timeout: call.timeout.as_secs(),
            caches: None,
            spec: StepSpec { root: PathBuf::new(), nodes: Vec::new(), ..self.spec(call) },
        }
    }

    /// Runs the command that a step requests before a retry. If this command fails, only a warning is printed, because
    /// the retry of the step decides the result.
    async fn before_retry(&self, call: &ImageCommand<'_>, step: &report::Step) -> Result<()> {
        let Some(program) = call.before_retry.first() else { return Ok(()) };
        let report = self.work.report;
        let before = ImageCommand {
            why: format!("cleaning up before a retry: {program}"),
            name: program.clone(),
            argv: call.before_retry.clone(),
            env: call.env.clone(),
            trusted: call.trusted,
            caches: call.caches,
            timeout: BEFORE_RETRY_TIMEOUT,
            ..ImageCommand::plan_defaults(self)
        };
        report.detail(before.why.clone());
        let exit = self.once(&before, &mut OutputSink::Lines(&mut |line| step.output(line))).await;
        let exit = exit.with_context(|| before.why.clone())?;
        if !exit.status.success() {
            report.warn(format!("{} failed ({})", before.why, exit.status));
        }
        Ok(())
    }

    /// Runs a command, and returns its standard output. Its standard error is only logged, because it may have warnings
    /// even if the command succeeds. Fails if the output is too long.
    pub async fn ask(&self, call: &ImageCommand<'_>) -> Result<String> {
        let (mut answer, mut is_too_long) = (Vec::new(), false);
        let (mut errors, report) = (VecDeque::new(), self.work.report);
        let mut output = |bytes: &[u8]| {
            is_too_long |= answer.len() + bytes.len() > ANSWER_MAX;
            if !is_too_long {
                answer.extend_from_slice(bytes);
            }
        };
        let mut on_line = |line: &str| {
            report.detail(line);
            if errors.len() == EXPLAINED_MAX {
                errors.pop_front();
            }
            errors.push_back(line.to_owned());
        };
        let mut sink = OutputSink::Answer { output: &mut output, on_line: &mut on_line };
        let exit = self.once(call, &mut sink).await.with_context(|| call.why.clone())?;
        let answer = String::from_utf8_lossy(&answer);
        if !call.is_good(exit.status) {
            let mut diagnoser = Diagnoser::new(call.troubles);
            let shown = without_control_characters(&answer);
            let shown = self.work.secrets.mask(&shown);
            let last: Vec<_> = shown.lines().rev().take(EXPLAINED_MAX).collect();
            last.iter().rev().for_each(|line| diagnoser.line(line));
            errors.iter().for_each(|line| diagnoser.line(line));
            let meaning = diagnoser.meaning();
            return Err(self.failure(call, &exit, &diagnoser, meaning).into());
        }
        if is_too_long {
            let what =
                format!("{}: the output of {} has more than {} MiB", call.why, call.name, ANSWER_MAX >> 20);
            return Err(Kind::Step.error(what));
        }
        Ok(self.work.secrets.mask(&answer).into_owned())
    }

    /// The specification of a command without its secrets, the settings of `[network]` and its caches.
    fn spec(&self, call: &ImageCommand<'_>) -> StepSpec {
        StepSpec {
            root: self.place.root.to_owned(),
            argv: call.argv.clone(),
            env: call.env.clone(),
            cwd: call.cwd.clone(),
            network: call.network,
            fenced: false,
            resolv_conf: None,
            shims: call.shims.clone(),
            binds: call.binds.clone(),
            caches: Vec::new(),
            nodes: self.place.nodes.to_vec(),
            disk_writable: self.work.image.disk_writable,
            limits: self.work.limits,
            audit_socket: call.audit_socket,
            status: call.status,
            throwaway: call.throwaway,
            interactive: false,
        }
    }

    async fn once(&self, call: &ImageCommand<'_>, sink: &mut OutputSink<'_>) -> Result<StepExit> {
        let mut spec = self.spec(call);
        spec.env.extend(self.work.secrets.environment(&call.secrets));
        if call.fetches {
            spec.env.extend(self.network_env.clone());
            spec.shims.extend(self.certificates.clone());
        }
        spec.fenced = call.network && self.fenced();
        let wanted = CacheUse { trusted: call.trusted, fetches: call.fetches, access: call.caches };
        spec.caches = self.downloads.mounts(wanted).await?;
        CgroupSupport::get().report_gaps(self.work.limits, self.work.report);
        self.place.inside.meter().note_step();
        let mut span = self.work.report.command(&call.argv);
        let run = sandbox::run_with(self.work.helper, &spec, self.work.secrets, call.timeout, sink);
        let exit = tokio::select! {
            exit = run => match exit {
                Err(error) if !self.entered.get() => return Err(Kind::of_base(error)),
                exit => exit?,
            },
            full = self.downloads.full(call.caches == CacheAccess::Write) => return Err(full),
        };
        self.entered.set(true);
        span.add_arg("status", exit.status.to_string());
        // The command may have ended well although it could not write everything.
        match self.downloads.limit_failure().filter(|_| call.caches == CacheAccess::Write) {
            Some(failure) => Err(failure.into()),
            None => Ok(exit),
        }
    }

    /// Reports the explanations of output lines that the user should know.
    fn report_notes(&self, notes: &Diagnoser) {
        for Diagnosis { means, hint, .. } in notes.all() {
            let hint = hint.map(|hint| format!(" ({})", hint.trim_end_matches('.'))).unwrap_or_default();
            self.work.report.note(format!("{means}{hint}"));
        }
    }

    fn fenced(&self) -> bool {
        let work = &self.work;
        *self.fenced.get_or_init(|| !work.image.imds && work.guard.fences(work.report))
    }

    fn report_daemons(&self, call: &ImageCommand<'_>, exit: &StepExit) {
        if exit.surviving_processes.is_empty() {
            return;
        }
        let text = format!(
            "{} left processes running, and oven killed them: {}",
            call.why,
            exit.surviving_processes.join(", ")
        );
        // This is normal for a test, because it starts the services that it tests.
        if call.throwaway { self.work.report.detail(text) } else { self.work.report.warn(text) }
    }
}
