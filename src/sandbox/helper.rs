//! `oven __step`, the first process of a step. It creates the step's namespaces, starts the step's program, and reaps
//! the step's processes.
//!
//! The helper starts as process 1 of a new PID namespace. When it ends for any reason, the kernel kills all processes
//! of the step. The helper is a direct child of oven. When oven has reaped the helper, all processes of the step have
//! ended.

use super::cgroup::egress;
use super::protocol::{CONTROL, HelperMessage, SPEC, STATUS};
use super::spec::StepSpec;
use super::tmpfs::TmpfsLimits;
use super::{init, mount_tree};
use crate::error::Kind;
use crate::sys::fds::close_from;
use crate::sys::seccomp::SyscallFilter;
use crate::sys::{capabilities, landlock, namespaces};
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::process::{DumpableBehavior, Signal};
use rustix::thread::UnshareFlags;
use std::fs::File;
use std::io::Read;
use std::process::ExitCode;

/// The host name in a step. Every `/etc/hosts` has this name. Some packages write the host name into a configuration
/// file. They write this name instead of the builder's.
const HOST_NAME: &str = "localhost";
/// The smallest number that the kernel accepts as `pid_max`.
const MIN_PID_MAX: u64 = 301;
/// The value for `oom_score_adj`. When memory runs out, the kernel kills the step before the builder's other processes.
const OOM_SCORE: &str = "800";
/// The maximum number of message queues of System V. Each can hold 16 KiB of the kernel's memory, and the kernel's own
/// limit is 32,000 queues.
const MAX_QUEUES: &str = "1024";
/// The limits of semaphores of System V: per set, in total, per call, and the number of sets. The kernel's own limit in
/// total is 10^9, and each semaphore takes 64 bytes of the kernel's memory. Databases need some thousands.
const MAX_SEMAPHORES: &str = "32000 262144 500 1024";
/// Since this version of Linux, each PID namespace has its own `pid_max`. In earlier versions, the whole machine has
/// only one `pid_max`, so oven must not set it.
const PID_MAX_IS_NAMESPACED: (u32, u32) = (6, 14);

mod raw {
    #![allow(unsafe_code, clippy::undocumented_unsafe_blocks)]
    nix::ioctl_write_ptr_bad!(set_interface_flags, libc::SIOCSIFFLAGS, libc::ifreq);
}

pub fn main() -> ExitCode {
    let Some((status, spec, control)) = take_descriptors() else {
        eprintln!("oven: {} is only for oven itself", super::VERB);
        return ExitCode::from(Kind::Usage as u8);
    };
    let ended = serve(status, spec, &control).unwrap_or_else(HelperMessage::failed);
    match ended.send(&control) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE, // oven has ended
    }
}

/// Returns the descriptors `STATUS`, `SPEC` and `CONTROL`, or `None` if oven did not start this process. Programs that this
/// process executes do not inherit the descriptors.
#[allow(unsafe_code)]
fn take_descriptors() -> Option<(OwnedFd, File, OwnedFd)> {
    if std::process::id() != 1 {
        return None;
    }
    for number in [STATUS, SPEC, CONTROL] {
        // SAFETY: the process has one thread, so nothing opens or closes this descriptor meanwhile. If it is not open,
        // the call fails.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(fd, FdFlags::CLOEXEC).ok()?;
    }
    // SAFETY: the loop above has checked that the descriptors are open. Nothing else owns them, because the process
    // has just started.
    let (status, spec, control) =
        unsafe { (OwnedFd::from_raw_fd(STATUS), File::from_raw_fd(SPEC), OwnedFd::from_raw_fd(CONTROL)) };
    rustix::net::sockopt::socket_type(&control).ok()?;
    Some((status, spec, control))
}

fn serve(status: OwnedFd, mut spec: File, control: &OwnedFd) -> Result<HelperMessage> {
    close_from(CONTROL + 1)?;
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("setting the parent-death signal")?;
    // If oven ended before that call, the kernel does not kill this process. But in this case, oven's end of the socket
    // is closed. So the socket is checked here, and again while the step runs.
    let mut hung_up = [PollFd::new(control, PollFlags::empty())];
    poll(&mut hung_up, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).context("checking that oven is running")?;
    anyhow::ensure!(!hung_up[0].revents().contains(PollFlags::HUP), "oven has ended");

    let mut text = Vec::new();
    spec.read_to_end(&mut text).context("reading the step's spec")?;
    drop(spec);
    let spec: StepSpec = serde_json::from_slice(&text).context("reading the step's spec")?;
    let status = spec.status.then_some(status);
    rustix::process::umask(Mode::empty());
    if spec.interactive {
        // The process remains in the terminal's session, in a separate process group.
        rustix::process::setpgid(None, None).context("starting a process group")?;
    } else {
        rustix::process::setsid().context("starting a session")?;
    }
    create_namespaces(&spec)?;
    if spec.network && spec.fenced {
        egress::verify_filter()?;
    }
    let limited = limit_processes(spec.limits.pids);
    yield_memory_first();
    limit_ipc();
    let discarded = mount_tree::enter_mount_tree(&spec)?;
    rustix::process::chdir(&*spec.cwd)
        .with_context(|| format!("entering the step's directory {}", spec.cwd))?;
    limited?;

    forget_keys();
    set_limits()?;
    capabilities::reduce(spec.network)?;
    if spec.network {
        landlock::hide_abstract_sockets();
    }
    // After this call, even root in the step cannot access this process's memory, descriptors or program.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .context("protecting the step's helper")?;
    let mut filter = if spec.audit_socket {
        SyscallFilter::with_audit_socket(spec.interactive)
    } else {
        SyscallFilter::new(spec.interactive)
    };
    init::run(&spec, &discarded, &mut filter, control.as_fd(), status.as_ref()).map(HelperMessage::Ended)
}

/// Creates the step's namespaces, except the PID namespace, which exists already.
fn create_namespaces(spec: &StepSpec) -> Result<()> {
    let mut flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    if !spec.network {
        flags |= UnshareFlags::NEWNET;
    }
    namespaces::unshare(flags).map_err(|error| {
        Kind::Machine
            .failure(format!("the kernel refuses to create namespaces ({error})"))
            .hint("oven needs root with all its capabilities; `oven doctor` shows what is missing.")
    })?;
    // A failure is ignored, because not every kernel supports cgroup namespaces. The namespace only hides the path of
    // the cgroup.
    let _ = namespaces::unshare(UnshareFlags::NEWCGROUP);
    rustix::system::sethostname(HOST_NAME.as_bytes()).context("setting the step's host name")?;
    if !spec.network {
        raise_loopback().context("bringing up the loopback interface")?;
    }
    Ok(())
}

#[allow(unsafe_code)]
fn raise_loopback() -> Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    // SAFETY: an `ifreq` is plain data, for which all zeros are a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = libc::IFF_UP as libc::c_short;
    // SAFETY: the request takes an `ifreq`, which lives until the call returns.
    unsafe { raw::set_interface_flags(socket.as_raw_fd(), &raw const request) }
        .map_err(std::io::Error::from)?;
    Ok(())
}

/// Limits the number of processes in this PID namespace, if the kernel has a separate limit for each namespace. Because
/// of this limit, a fork bomb fails before the builder runs out of processes. At this time, the host's `/proc` is still
/// mounted. Nevertheless, the write changes only the limit of the writer's own namespace.
fn limit_processes(most: u64) -> Result<()> {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    if (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) < PID_MAX_IS_NAMESPACED {
        return Ok(());
    }
    std::fs::write("/proc/sys/kernel/pid_max", most.max(MIN_PID_MAX).to_string())
        .context("limiting the step's processes")
}

/// Makes the kernel end this step before the builder's other processes when memory runs out. All processes of the step
/// inherit the score. If a process with `CAP_SYS_RESOURCE` writes the score, it is also the minimum for processes
/// without this capability. So this call is made while the helper still has the capability, and no process of the step
/// can lower its score. A failure is ignored, because the score is not essential and some kernels do not permit the
/// change.
fn yield_memory_first() {
    _ = std::fs::write("/proc/self/oom_score_adj", OOM_SCORE);
}

/// Limits the memory that the step's IPC namespace can use. Such memory belongs to no process, so the kernel could not
/// free it by killing one. The host's `/proc` is still mounted, but these writes change only the limits of the writer's
/// own namespace. A failure is ignored, because a kernel may lack System V IPC, and a container may have made
/// `/proc/sys` read-only.
#[allow(unsafe_code)]
fn limit_ipc() {
    // SAFETY: the call has no requirements. It returns -1 only for names that libc does not know.
    let page_bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) } as u64;
    let pages = TmpfsLimits::run().bytes / page_bytes;
    for (name, limit) in [("shmall", &*pages.to_string()), ("msgmni", MAX_QUEUES), ("sem", MAX_SEMAPHORES)] {
        _ = std::fs::write(format!("/proc/sys/kernel/{name}"), limit);
    }
}

/// Gives the step a new, empty session keyring. An error is ignored, because a kernel without keyrings has nothing to
/// hide.
#[allow(unsafe_code)]
fn forget_keys() {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name requests a new anonymous keyring.
    unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) };
}

/// The number of files that a process of a step can have open, and the number to which it can raise this limit. With a
/// much higher limit, programs that close all possible descriptors, such as old versions of rpm, are slow.
pub const OPEN_FILES: (u64, u64) = (65_536, 524_288);

/// Forbids core dumps, and limits the number of open files.
fn set_limits() -> Result<()> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    const SOFT: u64 = OPEN_FILES.0;
    const HARD: u64 = OPEN_FILES.1;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .context("forbidding core dumps")?;
    let most = getrlimit(Resource::Nofile).maximum.map_or(HARD, |maximum| maximum.min(HARD));
    let files = Rlimit { current: Some(SOFT.min(most)), maximum: Some(most) };
    setrlimit(Resource::Nofile, files).context("limiting descriptors")
}
