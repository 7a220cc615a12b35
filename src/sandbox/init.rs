//! Process 1 of a step. It starts the step's program and reaps all processes of the step. It returns the names of the
//! processes that are still running when the program has ended.

use super::protocol::{STATUS, TERMINATE};
use super::spec::{ExitStatus, StepExit, StepSpec};
use super::tmpfs::{self, DiscardedWrites};
use crate::sys::fds::close_from;
use crate::sys::seccomp::SyscallFilter;
use crate::text::escape_name;
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{BorrowedFd, OwnedFd};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::FdFlags;
use rustix::process::{Pid, WaitOptions, wait};
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::io::{self, IsTerminal};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A process that ends within this time after the program's end is not reported, because it is probably not a daemon.
/// For example, it may be the last command of a pipeline.
const GRACE: Duration = Duration::from_millis(100);
/// The maximum number of reported names.
const MAX_NAMES: usize = 32;
/// Exit codes as shells use them.
const NOT_FOUND: i32 = 127;
const NOT_EXECUTABLE: i32 = 126;

/// Runs the step's program until it ends. The program inherits `status`, which is the descriptor [`STATUS`]. `discarded`
/// are the file systems of the image whose writes are discarded.
pub fn run(
    spec: &StepSpec,
    discarded: &[DiscardedWrites],
    filter: &mut SyscallFilter,
    control: BorrowedFd<'_>,
    status: Option<&OwnedFd>,
) -> Result<StepExit> {
    let children = child_signals().context("watching for processes that end")?;
    let main = start(spec, filter, status).context("starting the step's program")?;
    let status = loop {
        let mut fds = [PollFd::new(&children, PollFlags::IN), PollFd::new(&control, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            result => _ = result.context("waiting for the step")?,
        }
        if !fds[1].revents().is_empty() {
            let mut buffer = [0_u8; 32];
            match rustix::net::recv(control, &mut buffer, rustix::net::RecvFlags::DONTWAIT) {
                Ok((0, _)) | Err(rustix::io::Errno::CONNRESET) => anyhow::bail!("oven has ended"),
                Ok((len, _)) if buffer.get(..len) == Some(TERMINATE) => {
                    let _ = kill(nix::unistd::Pid::from_raw(main.as_raw_nonzero().get()), Signal::SIGTERM);
                }
                _ => {}
            }
        }
        drain(&children);
        if let Some(status) = reap(main)? {
            break status;
        }
    };
    let surviving_processes = remaining(&children)?;
    let full_file_systems = tmpfs::full_file_systems(spec, discarded);
    let discarded = discarded.iter().map(DiscardedWrites::memory).collect();
    Ok(StepExit { surviving_processes, full_file_systems, discarded, ..StepExit::of(status) })
}

/// Returns a descriptor that becomes readable when a child has ended.
fn child_signals() -> io::Result<SignalFd> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?)
}

fn drain(signals: &SignalFd) {
    let mut buffer = [0_u8; 1024];
    while rustix::io::read(signals, &mut buffer).is_ok_and(|len| len > 0) {}
}

/// Reaps all children that have ended. Returns the status of `main` if `main` is one of them.
fn reap(main: Pid) -> Result<Option<ExitStatus>> {
    let mut ended = None;
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == main => {
                ended = Some(match status.terminating_signal() {
                    Some(signal) => ExitStatus::Signaled(signal),
                    None => ExitStatus::Exited(status.exit_status().unwrap_or(-1)),
                });
            }
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) | Err(rustix::io::Errno::CHILD) => return Ok(ended),
            Err(error) => return Err(error).context("reaping the step's processes"),
        }
    }
}

/// Returns the names of the processes that are still running [`GRACE`] after the program's end. The kernel kills them
/// when this process ends.
fn remaining(children: &SignalFd) -> Result<Vec<String>> {
    let deadline = Instant::now() + GRACE;
    loop {
        drain(children);
        reap(Pid::INIT)?; // process 1 is this process and not a child, so there is no status
        let left = list_processes()?;
        let now = Instant::now();
        if left.is_empty() || now >= deadline {
            return Ok(left.into_values().take(MAX_NAMES).collect());
        }
        // If a child of this process ends, a signal ends the wait. Orphans count as children of this process. If
        // another process ends, this process does not always get a signal, so each wait is short.
        let pause = (deadline - now).min(Duration::from_millis(10));
        let pause = Timespec { tv_sec: 0, tv_nsec: pause.as_nanos() as i64 };
        match poll(&mut [PollFd::new(children, PollFlags::IN)], Some(&pause)) {
            Err(rustix::io::Errno::INTR) => {}
            result => _ = result.context("waiting for the step's processes")?,
        }
    }
}

/// Returns all processes of the namespace except this one.
fn list_processes() -> Result<BTreeMap<u32, String>> {
    let mut processes = BTreeMap::new();
    for entry in std::fs::read_dir("/proc").context("listing the step's processes")? {
        let name = entry.context("listing the step's processes")?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        // The format is `pid (comm) state …`. `comm` is the process's name, which may contain blanks and parentheses.
        let Ok(stat) = std::fs::read(format!("/proc/{pid}/stat")) else { continue };
        let stat = String::from_utf8_lossy(&stat);
        let (Some(open), Some(close)) = (stat.find('('), stat.rfind(')')) else { continue };
        let dead = stat.get(close + 2..).is_some_and(|state| state.starts_with(['Z', 'X']));
        if pid != 1 && !dead {
            let comm = stat.get(open + 1..close).unwrap_or_default();
            processes.insert(pid, escape_name(comm));
        }
    }
    Ok(processes)
}

/// Forks and executes the step's program.
#[allow(unsafe_code)]
fn start(spec: &StepSpec, filter: &mut SyscallFilter, status: Option<&OwnedFd>) -> Result<Pid> {
    // SAFETY: this process has one thread, so the child is not restricted to async-signal-safe functions.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error().into()),
        0 => {
            let code = match execute(spec, filter, status) {
                Ok(never) => match never {},
                Err(failure) => {
                    eprintln!("oven: {:#}", failure.0);
                    failure.1
                }
            };
            // SAFETY: this ends only the child. The child is a copy of its parent, so none of its values has to be
            // dropped.
            unsafe { libc::_exit(code) }
        }
        child => Pid::from_raw(child).context("the process has no number"),
    }
}

/// The reason why the program was not started, and the exit code for it.
struct NotStarted(anyhow::Error, i32);
impl From<anyhow::Error> for NotStarted {
    fn from(error: anyhow::Error) -> Self {
        Self(error, NOT_EXECUTABLE)
    }
}

/// Replaces this process with the step's program.
fn execute(
    spec: &StepSpec,
    filter: &mut SyscallFilter,
    status: Option<&OwnedFd>,
) -> Result<Infallible, NotStarted> {
    if spec.interactive {
        rustix::process::setpgid(None, None).context("making a process group")?;
        let standard_input = rustix::stdio::stdin();
        if standard_input.is_terminal() {
            // This process is in the background, so the kernel would stop it with SIGTTOU. But this signal is still
            // blocked here.
            rustix::termios::tcsetpgrp(standard_input, rustix::process::getpid())
                .context("giving the terminal to the step")?;
        }
    } else {
        rustix::process::setsid().context("making a session")?;
        let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .context("opening /dev/null")?;
        rustix::stdio::dup2_stdin(&null).context("setting standard input")?;
    }
    rustix::process::umask(Mode::from_raw_mode(0o022));
    let environment = spec.environment();
    let programs = candidates(&spec.argv, environment.get("PATH").map_or("", String::as_str))?;
    let arguments = c_strings(spec.argv.iter().cloned())?;
    let environment = c_strings(environment.iter().map(|(name, value)| format!("{name}={value}")))?;
    let inherited = match status {
        Some(status) => {
            rustix::io::fcntl_setfd(status, FdFlags::empty()).context("passing on the status descriptor")?;
            STATUS + 1
        }
        None => STATUS,
    };
    close_from(inherited)?;
    default_signals();
    filter.install()?;
    Err(exec(&spec.argv[0], &programs, &arguments, &environment))
}

fn c_strings(texts: impl Iterator<Item = String>) -> Result<Vec<CString>> {
    texts.map(|text| CString::new(text).context("an argument contains a zero byte")).collect()
}

/// Returns the paths at which to look for the program.
fn candidates(argv: &[String], path: &str) -> Result<Vec<CString>> {
    let program = argv.first().context("the step has no program")?;
    let paths: Vec<PathBuf> = if program.contains('/') {
        vec![PathBuf::from(program)]
    } else {
        path.split(':').filter(|dir| !dir.is_empty()).map(|dir| Path::new(dir).join(program)).collect()
    };
    paths
        .iter()
        .map(|path| {
            CString::new(path.as_os_str().as_bytes()).context("the program's path contains a zero byte")
        })
        .collect()
}

/// Makes sure that no signal is blocked or ignored.
#[allow(unsafe_code)]
fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is valid for every signal. If the call fails, it changes nothing.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    _ = SigSet::empty().thread_set_mask();
}

#[allow(unsafe_code)]
fn exec(name: &str, programs: &[CString], arguments: &[CString], environment: &[CString]) -> NotStarted {
    let pointers = |texts: &[CString]| {
        texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect::<Vec<_>>()
    };
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    let mut denied = None;
    for program in programs {
        // SAFETY: both arrays end with a null pointer, and the strings to which they point outlive the call.
        unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
        let error = io::Error::last_os_error();
        let missing = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR));
        let lacks_interpreter =
            missing && Path::new(std::ffi::OsStr::from_bytes(program.to_bytes())).is_file();
        if lacks_interpreter {
            denied = Some(anyhow::anyhow!(
                "{}: its interpreter is not in the image",
                escape_name(std::ffi::OsStr::from_bytes(program.to_bytes()))
            ));
        } else if !missing {
            denied.get_or_insert(anyhow::anyhow!(
                "{}: {error}",
                escape_name(std::ffi::OsStr::from_bytes(program.to_bytes()))
            ));
        }
    }
    match denied {
        Some(error) => NotStarted(error, NOT_EXECUTABLE),
        None => NotStarted(
            anyhow::anyhow!("{}: the program was not found in the image", escape_name(name)),
            NOT_FOUND,
        ),
    }
}
