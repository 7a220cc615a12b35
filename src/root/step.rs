//! Runs one command in a mounted root, contained: a process tree that ends as a whole.
//!
//! oven starts itself as `oven __step` ([`helper_main`]), as process 1 of a new PID namespace. That process creates the
//! other namespaces and everything that the step sees, enters it, gives up its rights, starts the command and reaps.
//! When the command ends, everything that it started ends; the same happens when oven ends.

pub(crate) mod capabilities;
mod covers;
mod dev;
pub mod egress;
pub(crate) mod helper;
mod lines;
mod message;
pub(crate) mod mounts;
mod reap;
pub(super) mod scope;
pub(crate) mod seccomp;
mod spawn;
mod tree;

use super::caches::CacheMount;
use super::shim::Placeholders;
use crate::error::Kind;
use crate::secrets::Secrets;
use anyhow::{Context, Result};
use egress::Fence;
use lines::Lines;
use message::Message;
use oven_distro::Shim;
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};
use spawn::{Running, Terminal};
use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};
pub(super) use tree::RESOLV_CONF;

/// The hidden verb that makes this program the helper.
pub const VERB: &str = "__step";
/// The time between SIGTERM and SIGKILL, for a step that took too long.
const GRACE: Duration = Duration::from_secs(10);
/// A pipe's capacity: the most that one read returns.
const CHUNK: usize = 64 << 10;

/// The specification of a step, which the helper gets as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// Where the image's root is mounted, in the private mount namespace of this process.
    pub root: PathBuf,
    pub argv: Vec<String>,
    /// The whole environment except for what the containment itself sets.
    pub env: BTreeMap<String, String>,
    /// A directory in the image.
    pub cwd: String,
    /// Without it the step has a network namespace of its own, with nothing but `lo`.
    pub network: bool,
    /// With the network: the step cannot reach the builder's credentials ([`egress`]), or it fails.
    #[serde(default)]
    pub fenced: bool,
    /// With the network: the content of `/etc/resolv.conf`. `None`: this machine's.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// Files that exist only while the step runs.
    pub shims: Vec<Shim>,
    /// Files and directories of this machine that the step sees read-only.
    pub binds: Vec<Bind>,
    /// Cached packages, mounted over the image's own directories.
    #[serde(default)]
    pub caches: Vec<CacheMount>,
    /// The disk's own nodes, for the step's private `/dev`.
    pub nodes: Vec<Node>,
    /// What the step writes is discarded.
    pub throwaway: bool,
    /// It has a terminal for a person (`oven shell`); otherwise standard input is `/dev/null`.
    pub interactive: bool,
}

/// Something of this machine that a step sees read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    pub source: PathBuf,
    /// Absolute, in the image. Below `/run` it is created; elsewhere it has to exist, and links are followed inside the
    /// image.
    pub target: String,
    /// The canonical path of a directory that has to contain the source when it is bound, wherever links lead by then:
    /// the owner of a definition may exchange its directories, and oven follows links as root.
    #[serde(default)]
    pub within: Option<PathBuf>,
}

/// A block device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// In `/dev`: `loop0p1`.
    pub name: String,
    pub rdev: u64,
    /// Below `/dev`: `disk/by-uuid/…`.
    pub links: Vec<String>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub status: ExitStatus,
    /// Names of processes that the command left running. They were killed.
    pub left: Vec<String>,
}

/// How a step's command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By itself. 127: the image has no such program; 126: it cannot be executed.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// It exceeded its time limit.
    TimedOut,
}

impl ExitStatus {
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit status {code}"),
            Self::Signaled(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
            Self::TimedOut => f.write_str("it took too long and was killed"),
        }
    }
}

impl Spec {
    /// The command's whole environment. It has nothing of oven's own environment, such as credentials.
    fn environment(&self) -> BTreeMap<String, String> {
        let defaults = [
            ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("TERM", "dumb"),
            // systemd's tools do what works without a running system, and do not search for one.
            ("SYSTEMD_OFFLINE", "1"),
            ("container", "oven"),
        ];
        let mut environment: BTreeMap<_, _> =
            defaults.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        environment.extend(self.env.clone());
        environment
    }
}

/// Runs `oven __step`. Called first in `main`: the process has one thread, and is process 1 of its namespace.
pub fn helper_main() -> ExitCode {
    helper::main()
}

/// Gives this process mounts of its own: later mounts are invisible to other processes, and disappear with this
/// process, however it ends. Called before there is a second thread, since namespaces belong to threads.
#[allow(unsafe_code)]
pub fn private_mounts() -> Result<()> {
    // SAFETY: nothing of this process's memory or descriptors is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(|error| {
        Kind::Machine
            .failure(format!("this process cannot have mounts of its own ({error})"))
            .hint("Run oven as root.")
    })?;
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .context("making the mounts private")
}

/// Runs a step. `helper`: this program's path. Each line of the step's output goes to `on_line`, without control
/// characters. Dropping the future kills all of the step and waits until it is gone.
///
/// To be called from a thread that lives on: the step dies with it.
///
/// # Errors
/// [`Kind::Step`] if the image cannot be entered, [`Kind::Machine`] if this machine does not allow it. A command that
/// fails is not an error.
pub async fn run(
    helper: &Path,
    spec: &Spec,
    timeout: Duration,
    on_line: &mut dyn FnMut(&str),
) -> Result<Exit> {
    run_with(helper, spec, &Secrets::default(), timeout, on_line).await
}

/// Like [`run`]; all `secrets` are masked in the lines.
pub async fn run_with(
    helper: &Path,
    spec: &Spec,
    secrets: &Secrets,
    timeout: Duration,
    on_line: &mut dyn FnMut(&str),
) -> Result<Exit> {
    // Dropped in the reverse order: processes, then the terminal, then what was created for them in the image and on
    // this machine.
    let fence = if spec.network && spec.fenced { Some(Fence::make()?) } else { None };
    let placeholders = placeholders(spec).context("preparing the image for a step")?;
    let terminal = if spec.interactive { Terminal::note() } else { None };
    let exit = supervise(helper, spec, fence.as_ref(), secrets, timeout, on_line).await;
    drop(terminal);
    drop(fence);
    let removed = placeholders.map_or(Ok(()), Placeholders::remove);
    let exit = exit?;
    // A step that failed makes no image; its own failure (a full disk, for example) says more than its consequences.
    if exit.status.success() {
        removed.context("clearing the image after a step")?;
    }
    Ok(exit)
}

fn placeholders(spec: &Spec) -> Result<Option<Placeholders>> {
    if spec.throwaway {
        return Ok(None); // they are created in the overlay
    }
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::openat(CWD, &spec.root, flags, Mode::empty())
        .with_context(|| format!("opening {}", spec.root.display()))?;
    Placeholders::make(root.as_fd(), spec).map(Some)
}

async fn supervise(
    helper: &Path,
    spec: &Spec,
    fence: Option<&Fence>,
    secrets: &Secrets,
    timeout: Duration,
    on_line: &mut dyn FnMut(&str),
) -> Result<Exit> {
    let mut running = match std::env::var("TERM") {
        Ok(term) if spec.interactive && !spec.env.contains_key("TERM") => {
            let mut spec = spec.clone();
            spec.env.insert("TERM".into(), term);
            Running::start(helper, &spec, fence)?
        }
        _ => Running::start(helper, spec, fence)?,
    };
    let mut lines = Lines::without(secrets);
    let mut output = match running.output.take() {
        Some(output) => Some(watch(output)?),
        None => None,
    };
    let timed_out = {
        let dead = watch(running.process.try_clone().context("waiting for the step")?)?;
        let (mut timed_out, mut deadline) = (false, Instant::now() + timeout);
        let mut buffer = vec![0; CHUNK];
        loop {
            tokio::select! {
                ready = dead.readable() => {
                    _ = ready.context("waiting for the step")?;
                    break timed_out;
                }
                len = read(output.as_ref(), &mut buffer) => match len? {
                    0 => output = None,
                    len => lines.add(&buffer[..len], on_line),
                },
                () = sleep_until(deadline) => {
                    if timed_out {
                        running.kill();
                        // The kernel ends it when it can.
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
    // All of the step is dead: the rest of its output is in the pipe.
    if let Some(output) = output {
        let mut buffer = vec![0; CHUNK];
        while let Ok(len @ 1..) = rustix::io::read(output.get_ref(), &mut buffer) {
            lines.add(&buffer[..len], on_line);
        }
    }
    lines.finish(on_line);
    let signal = running.reap()?;
    let told = Message::receive(&running.control)?;
    match (timed_out, told, signal) {
        (_, Some(Message::Failed { kind, message, hint }), _) => {
            Err(Message::failure(kind, &message, hint)).context("starting a contained step")
        }
        (true, told, _) => {
            let left = if let Some(Message::Ended { left, .. }) = told { left } else { Vec::new() };
            Ok(Exit { status: ExitStatus::TimedOut, left })
        }
        (false, Some(Message::Ended { status, left }), _) => Ok(Exit { status, left }),
        (false, None, Some(signal)) => Ok(Exit { status: ExitStatus::Signaled(signal), left: Vec::new() }),
        (false, None, None) => {
            Err(Kind::Step.error(format!("the step's helper {} ended without a message", helper.display())))
        }
    }
}

/// Reads some of the step's output; 0 at its end. Waits for ever if there is no output.
async fn read(output: Option<&AsyncFd<OwnedFd>>, buffer: &mut [u8]) -> Result<usize> {
    let Some(output) = output else { return std::future::pending().await };
    let read = output.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?));
    read.await.context("reading the step's output")
}

#[allow(unsafe_code)]
fn watch(fd: OwnedFd) -> Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is the same open descriptor as long as it lives, and it cannot be exchanged inside the
    // `AsyncFd`.
    unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.context("watching a step")
}
