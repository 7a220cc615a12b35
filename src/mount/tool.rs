//! Runs a program of this machine on the device of an image.

use crate::sandbox::cgroup::StepCgroup;
use crate::sys::seccomp::SyscallFilter;
use crate::sys::{capabilities, landlock, namespaces};
use anyhow::{Context, Result};
use rustix::thread::{CapabilitySet, UnshareFlags};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt};

/// How many bytes of the start and of the end of each output stream are stored. e2fsck prints a line for each error.
pub const OUTPUT_MAX: usize = 2048;
const CHUNK: usize = 16 << 10;
/// The value for `oom_score_adj`, as for steps. When memory runs out, the kernel kills the tool before other processes.
const OOM_SCORE: &str = "800";

/// How a tool ended.
pub enum ToolEnd {
    Ended(ToolOutput),
    /// This machine does not have the tool.
    Missing,
    /// The tool was killed, because it exceeded a limit. The text names the limit.
    Limited(String),
}

/// The exit status of a tool, and parts of its output.
pub struct ToolOutput {
    pub status: ExitStatus,
    /// The start of standard output.
    pub first: String,
    /// The end of standard output.
    pub last: String,
    /// The end of standard error.
    pub errors: String,
}

/// Runs a program of this machine on a device, with an empty environment. The program parses the image's content, so
/// oven isolates the program. It has no capabilities and no network, and can write only to the device. Its memory, its
/// time and its output are limited. If this future is dropped, the program is killed.
#[allow(unsafe_code)]
pub async fn run(name: &str, arguments: &[&str], device: &OwnedFd, timeout: Duration) -> Result<ToolEnd> {
    // Declared first, so that it is dropped last: then the program has been killed.
    let cgroup = StepCgroup::for_tool()?;
    let entrance = cgroup.as_ref().map(StepCgroup::open_entrance).transpose()?;
    let mut command = tokio::process::Command::new(name);
    let (device, mut filter) = (device.as_raw_fd(), SyscallFilter::new(true));
    let contain = move || -> std::io::Result<()> {
        if let Some(entrance) = &entrance {
            rustix::io::write(entrance, b"0")?;
        }
        // Some containers do not permit it.
        _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
        // SAFETY: the child inherits the descriptor, because the parent keeps it open until the child has ended.
        let device = unsafe { BorrowedFd::borrow_raw(device) };
        rustix::io::fcntl_setfd(device, rustix::io::FdFlags::empty())?;
        namespaces::unshare(UnshareFlags::NEWNET | UnshareFlags::NEWIPC)?;
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        let failed = |_| std::io::Error::from(std::io::ErrorKind::PermissionDenied);
        capabilities::reduce_to(CapabilitySet::empty()).map_err(failed)?;
        landlock::restrict_writes_to(device);
        filter.install().map_err(failed)
    };
    // SAFETY: between fork and exec the child makes only system calls. It allocates memory only for the text of an
    // error. glibc permits this even if another thread held the allocator's lock at the fork.
    unsafe { command.pre_exec(contain) };
    command
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut tool = match command.kill_on_drop(true).spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(ToolEnd::Missing),
        tool => tool.with_context(|| format!("running {name}"))?,
    };
    let (output, errors) = (tool.stdout.take(), tool.stderr.take());
    let end = async { tokio::try_join!(ends_of(output), ends_of(errors), tool.wait()) };
    let Ok(ended) = tokio::time::timeout(timeout, end).await else {
        tool.kill().await.with_context(|| format!("ending {name}"))?;
        let limit = humantime::format_duration(timeout);
        return Ok(ToolEnd::Limited(format!("{name} took longer than {limit}")));
    };
    let ((first, output), (_, errors), status) = ended.with_context(|| format!("running {name}"))?;
    let has_exceeded =
        || cgroup.as_ref().and_then(StepCgroup::exceeded_limit).is_some_and(|limit| limit.ended_step);
    if !status.success() && has_exceeded() {
        return Ok(ToolEnd::Limited(format!("{name} needed too much memory, so the kernel ended it")));
    }
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (first, last, errors) = (text(&first), text(&output), text(&errors));
    Ok(ToolEnd::Ended(ToolOutput { status, first, last, errors }))
}

/// Reads a stream to its end, and returns its first and its last [`OUTPUT_MAX`] bytes.
async fn ends_of(stream: Option<impl AsyncRead + Unpin>) -> std::io::Result<(Vec<u8>, Vec<u8>)> {
    let (mut first, mut last, mut chunk) = (Vec::new(), Vec::new(), vec![0; CHUNK]);
    let Some(mut stream) = stream else { return Ok((first, last)) };
    while let length @ 1.. = stream.read(&mut chunk).await? {
        let room = OUTPUT_MAX - first.len();
        first.extend_from_slice(&chunk[..length.min(room)]);
        last.extend_from_slice(&chunk[..length]);
        last.drain(..last.len().saturating_sub(OUTPUT_MAX));
    }
    Ok((first, last))
}
