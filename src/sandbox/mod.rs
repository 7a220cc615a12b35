//! Runs a step. A step is one command that runs isolated in a mounted image.
//!
//! oven starts its own program again with the verb `__step` ([`helper_main`]). The new process is the step's helper and
//! process 1 of a new PID namespace. It creates the other namespaces and the step's mount tree, enters the tree, drops
//! its privileges, starts the command, and reaps processes. When the command or oven ends, all processes of the step
//! are killed.

pub mod cgroup;
mod dev;
pub(crate) mod helper;
mod init;
mod masks;
mod mount_tree;
pub mod mountpoints;
pub mod output;
pub(crate) mod paths;
mod protocol;
pub mod shims;
mod spawn;
pub mod spec;
pub(crate) mod tmpfs;

use crate::error::Kind;
use crate::secrets::Secrets;
use anyhow::{Context, Result};
use cgroup::{CgroupSupport, StepCgroup};
pub(crate) use mount_tree::RESOLV_CONF;
use mountpoints::Placeholders;
use output::{OutputLines, OutputSink};
use protocol::HelperMessage;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags};
use spawn::{StepProcess, TerminalState};
use spec::{ExitStatus, StepExit, StepSpec};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};

/// The hidden verb with which oven starts its own program as a step's helper.
pub const VERB: &str = "__step";
/// The time between SIGTERM and SIGKILL for a step that exceeded its time limit.
const GRACE: Duration = Duration::from_secs(10);
/// The kernel's maximum of `pid_max`.
const MAX_PID: u64 = 1 << 22;
/// The capacity of a pipe in bytes. One read returns at most this number of bytes.
const CHUNK: usize = 64 << 10;

impl StepSpec {
    /// Returns the command's complete environment. Variables of oven's own environment are not passed on, because they
    /// may contain credentials.
    fn environment(&self) -> BTreeMap<String, String> {
        let defaults = [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("TERM", "dumb"),
            // Because of this variable, systemd's tools do not try to reach a running systemd. They do only the work
            // that is possible without it.
            ("SYSTEMD_OFFLINE", "1"),
            ("container", "oven"),
        ];
        let mut environment: BTreeMap<_, _> =
            defaults.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        environment.extend(self.env.clone());
        environment
    }
}

/// Runs `oven __step`. `main` calls this function before anything else, while the process has only one thread. This
/// process is process 1 of the step's PID namespace.
pub fn helper_main() -> ExitCode {
    helper::main()
}

/// Runs a step. `helper` is the path of this program. `on_line` is called for each line of the step's output, without
/// control characters. Dropping the future kills all processes of the step and waits until they have ended.
///
/// Call this function on a thread that outlives the step, because the step is killed when that thread ends.
///
/// # Errors
/// [`Kind::Step`] if the image cannot be entered, for example because a mount point is missing. [`Kind::Machine`] if
/// this machine does not permit oven to isolate the step. A command that fails is not an error, nor is one that is
/// missing or cannot be executed (exit codes 127 and 126). If a command that failed exceeded a limit of the step, the
/// result names the limit.
pub async fn run(
    helper: &Path,
    spec: &StepSpec,
    timeout: Duration,
    on_line: &mut dyn FnMut(&str),
) -> Result<StepExit> {
    run_with(helper, spec, &Secrets::default(), timeout, &mut OutputSink::Lines(on_line)).await
}

/// Like [`run`], but passes the output to `sink`, and masks all `secrets` in the lines.
pub async fn run_with(
    helper: &Path,
    spec: &StepSpec,
    secrets: &Secrets,
    timeout: Duration,
    sink: &mut OutputSink<'_>,
) -> Result<StepExit> {
    // `cgroup`, `placeholders` and `terminal` must live longer than the step's processes. If this future is dropped, the
    // processes are killed first. Then the terminal is restored, and then the files in the image and the cgroup are
    // removed.
    let cgroup = StepCgroup::create(spec)?;
    let placeholders = placeholders(spec)
        .context("preparing the image for a step")
        .map_err(|error| Kind::Step.unless_machine(error))?;
    let terminal = if spec.interactive { TerminalState::note() } else { None };
    let exit = match start(helper, spec, cgroup.as_ref(), sink.separates_errors()) {
        Ok(running) => supervise(running, helper, secrets, timeout, sink).await,
        Err(error) => Err(Kind::Machine.unless_known(error)),
    };
    drop(terminal);
    let has_succeeded = exit.as_ref().is_ok_and(|exit| exit.status.success());
    let exceeded = cgroup.as_ref().filter(|_| !has_succeeded).and_then(StepCgroup::exceeded_limit);
    drop(cgroup);
    let removed = placeholders.map_or(Ok(()), Placeholders::remove);
    let exit = match (exit, exceeded) {
        (Ok(exit), exceeded_limit) => StepExit { exceeded_limit, ..exit },
        // The kernel also ended the helper.
        (Err(_), Some(limit)) => {
            return Err(Kind::Step.failure(limit.message).hint(limit.hint).after_start().into());
        }
        (Err(error), None) => return Err(error),
    };
    // If the step failed, an error of the removal is ignored, because no image is made from the disk. The step's own
    // failure, such as a full disk, is more useful to the user.
    if exit.status.success() {
        removed
            .context("removing the step's temporary files from the image")
            .map_err(|error| Kind::Step.unless_machine(error))?;
    }
    Ok(exit)
}

fn placeholders(spec: &StepSpec) -> Result<Option<Placeholders>> {
    if spec.throwaway {
        return Ok(None); // the helper creates them in the overlay
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, &spec.root, flags, Mode::empty())
        .with_context(|| format!("opening {}", spec.root.display()))?;
    Placeholders::make(root.as_fd(), spec).map(Some)
}

/// Starts the step's helper. An interactive step gets the `TERM` of this process if its own environment does not set
/// it.
fn start(
    helper: &Path,
    spec: &StepSpec,
    cgroup: Option<&StepCgroup>,
    separates_errors: bool,
) -> Result<StepProcess> {
    let mut spec = spec.clone();
    if let (true, Ok(term)) = (spec.interactive, std::env::var("TERM")) {
        spec.env.entry("TERM".into()).or_insert(term);
    }
    if !spec.can_write_disk() && CgroupSupport::get().devices_gap().is_some() {
        // The step could write to the disk of its own root, because nothing would prevent it.
        spec.nodes.clear();
    }
    if cgroup.is_some_and(StepCgroup::limits_processes) {
        // The cgroup counts the processes, so that oven can report which limit the step exceeded. The helper's own limit
        // is for the numbers of processes, and must not take effect earlier.
        spec.limits.pids = spec.limits.pids.saturating_mul(2).min(MAX_PID);
    }
    StepProcess::start(helper, &spec, cgroup, separates_errors)
}

/// Waits until the step ends. If the step takes longer than `timeout`, terminates it. `helper` is only used in an error
/// message.
async fn supervise(
    mut running: StepProcess,
    helper: &Path,
    secrets: &Secrets,
    timeout: Duration,
    sink: &mut OutputSink<'_>,
) -> Result<StepExit> {
    let (mut lines, mut status_lines) = (OutputLines::without(secrets), OutputLines::without(secrets));
    let mut output = running.output.take().map(watch).transpose()?;
    let mut errors = running.errors.take().map(watch).transpose()?;
    let mut status = running.status.take().map(watch).transpose()?;
    let timed_out = {
        let dead = watch(running.process.try_clone().context("waiting for the step")?)?;
        let (mut timed_out, mut deadline) = (false, Instant::now() + timeout);
        let [mut buffer, mut errors_buffer, mut status_buffer] = std::array::from_fn(|_| vec![0; CHUNK]);
        loop {
            tokio::select! {
                ready = dead.readable() => {
                    _ = ready.context("waiting for the step")?;
                    break timed_out;
                }
                len = read(output.as_ref(), &mut buffer) => match len? {
                    0 => output = None,
                    len => {
                        sink.add_output(&mut lines, &buffer[..len]);
                        // A step may write without a pause. Without this, a signal would be noticed only after many
                        // more chunks of output.
                        tokio::task::yield_now().await;
                    }
                },
                len = read(errors.as_ref(), &mut errors_buffer) => match len? {
                    0 => errors = None,
                    len => {
                        lines.add(&errors_buffer[..len], sink.on_line());
                        tokio::task::yield_now().await;
                    }
                },
                len = read(status.as_ref(), &mut status_buffer) => match len? {
                    0 => status = None,
                    len => {
                        sink.add_status(&mut status_lines, &status_buffer[..len]);
                        tokio::task::yield_now().await;
                    }
                },
                () = sleep_until(deadline) => {
                    if timed_out {
                        running.kill();
                        // The kernel is ending the processes. oven can only wait for this, so the next deadline is far
                        // away.
                        deadline += Duration::from_secs(3600);
                    } else {
                        timed_out = true;
                        running.terminate();
                        deadline = Instant::now() + GRACE;
                    }
                }
            }
        }
    };
    // All processes of the step have ended, so all remaining output is in the pipes.
    let mut buffer = vec![0; CHUNK];
    if let Some(output) = output {
        while let Ok(len @ 1..) = rustix::io::read(output.get_ref(), &mut buffer) {
            sink.add_output(&mut lines, &buffer[..len]);
        }
    }
    if let Some(errors) = errors {
        while let Ok(len @ 1..) = rustix::io::read(errors.get_ref(), &mut buffer) {
            lines.add(&buffer[..len], sink.on_line());
        }
    }
    lines.finish(sink.on_line());
    let signal = running.reap()?;
    let message = HelperMessage::receive(&running.control)?;
    match (timed_out, message, signal) {
        (_, Some(HelperMessage::Failed { kind, message, hint }), _) => {
            Err(HelperMessage::failure(kind, &message, hint)).context("starting a contained step")
        }
        (true, Some(HelperMessage::Ended(exit)), _) => Ok(StepExit { status: ExitStatus::TimedOut, ..exit }),
        (true, None, _) => Ok(StepExit::of(ExitStatus::TimedOut)),
        (false, Some(HelperMessage::Ended(exit)), _) => Ok(exit),
        (false, None, Some(signal)) => Ok(StepExit::of(ExitStatus::Signaled(signal))),
        (false, None, None) => Err(Kind::Machine
            .error(format!("the step's helper process {} ended without a result", helper.display()))),
    }
}

/// Reads a part of the step's output, and returns 0 at the end of the output. Waits for ever if `output` is `None`.
async fn read(output: Option<&AsyncFd<OwnedFd>>, buffer: &mut [u8]) -> Result<usize> {
    let Some(output) = output else { return std::future::pending().await };
    let read = output.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?));
    read.await.context("reading the step's output")
}

#[allow(unsafe_code)]
fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: the `OwnedFd` keeps its descriptor open until it is dropped, and the `AsyncFd` keeps the same `OwnedFd`
    // until then.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.context("watching a step")
}
