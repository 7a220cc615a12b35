//! `oven __plugin`: runs a plugin that is an executable, contained: it reads what every user may read, and changes,
//! reaches and keeps nothing.
//!
//! The plugin is nobody, in namespaces of its own without a network, on a read-only view of this machine, and dies with
//! all it started. A user who is not root gets the same by a user namespace where the kernel gives one; where it does
//! not, the plugin is the user's own process, and only its end is seen to.

use crate::error::Kind;
use crate::sys::mount::api;
use crate::sys::{capabilities, seccomp};
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, FileType, MemfdFlags, Mode, OFlags, makedev};
use rustix::mount::MountAttrFlags;
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, setrlimit};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The hidden verb that makes this program the helper.
pub const VERB: &str = "__plugin";
/// `nobody` and its group, on every distribution that oven runs on: what the kernel shows of owners it cannot name.
const NOBODY: u32 = 65534;
/// Where the plugin's file is while it runs: a file system in memory, over this machine's `/run`.
const HOME: &str = "/run/oven-plugin";
/// What ended with the plugin but a moment later is no daemon.
const GRACE: Duration = Duration::from_millis(100);
/// More names than that say nothing more.
const MAX_NAMES: usize = 8;
/// Bytes of memory, and processes: a plugin that runs away fails before the machine does.
const MEMORY: u64 = 4 << 30;
const PROCESSES: u64 = 512;
const SCRATCH: &str = "16m";
/// Name, major, minor.
const NODES: [(&str, u32, u32); 5] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)];

/// What the helper is told. The program and the request follow.
#[derive(Debug, Serialize, Deserialize)]
pub struct Told {
    /// The plugin's file: its name where it is contained, itself where it is not.
    pub path: PathBuf,
    pub verb: String,
    pub contained: bool,
    /// How long it may take.
    pub timeout: Duration,
}

/// How a plugin ended.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ended {
    Exited {
        code: i32,
        left: Vec<String>,
    },
    Signaled {
        number: i32,
    },
    TimedOut,
    /// It was not started: this machine does not let it.
    Uncontained(String),
    /// It was not started: it cannot be.
    Failed(String),
}

/// Writes a message: its length, then itself.
pub fn send(mut to: impl Write, message: &[u8]) -> std::io::Result<()> {
    to.write_all(&(message.len() as u64).to_le_bytes())?;
    to.write_all(message)
}

/// Reads a message of at most so many bytes.
pub fn receive(mut from: impl Read, max: u64) -> std::io::Result<Vec<u8>> {
    let mut len = [0; 8];
    from.read_exact(&mut len)?;
    let len = u64::from_le_bytes(len);
    if len > max {
        return Err(std::io::Error::other("a message is too long"));
    }
    let mut message = vec![0; len as usize];
    from.read_exact(&mut message)?;
    Ok(message)
}

/// What `oven __plugin` does. First thing in `main`: the process has one thread.
pub fn helper_main() -> ExitCode {
    match serve() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("oven: {error:#}");
            ExitCode::from(Kind::Usage as u8)
        }
    }
}

fn serve() -> Result<ExitCode> {
    crate::sys::fds::close_from(3)?;
    let stdin = rustix::stdio::stdin();
    let socket = rustix::net::sockopt::socket_type(stdin);
    socket.context(format!("{VERB} is for oven itself"))?;
    let control = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(stdin, 3)?);
    let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    die_with_parent()?;
    rustix::process::setsid().context("leaving oven's session")?;
    const MAX: u64 = 256 << 20;
    let told: Told = serde_json::from_slice(&receive(&control, MAX)?)?;
    let (program, request) = (receive(&control, MAX)?, receive(&control, MAX)?);
    let namespaces = if told.contained { namespaces() } else { Ok(()) };
    if let Err(error) = namespaces {
        return tell(&control, &Ended::Uncontained(format!("{error:#}")));
    }
    // The first process of a new PID namespace is the child of who made it.
    match fork().context("starting the plugin's reaper")? {
        Some(reaper) => {
            drop(control);
            _ = rustix::process::waitpid(Some(reaper), WaitOptions::empty());
            Ok(ExitCode::SUCCESS)
        }
        None => {
            let ended = reaper(&control, &told, &program, &request);
            let code = tell(&control, &ended.unwrap_or_else(|error| Ended::Failed(format!("{error:#}"))));
            std::process::exit(i32::from(code.is_err()))
        }
    }
}

fn tell(control: &UnixStream, ended: &Ended) -> Result<ExitCode> {
    send(control, &serde_json::to_vec(ended)?).context("writing to oven")?;
    Ok(ExitCode::SUCCESS)
}

fn die_with_parent() -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("tying the plugin to oven")
}

#[allow(unsafe_code)]
fn fork() -> std::io::Result<Option<Pid>> {
    // SAFETY: this process has one thread, so no lock or allocation of another one is left half done in the child.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => Ok(None),
        pid => Pid::from_raw(pid.max(0)).map(Some).ok_or_else(std::io::Error::last_os_error),
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[allow(unsafe_code)]
fn namespaces() -> Result<()> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let mut flags = UnshareFlags::NEWPID
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    let user = !uid.is_root();
    if user {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: this process has one thread, and the flags share nothing of its memory or descriptors.
    unsafe { rustix::thread::unshare_unsafe(flags) }.context("the kernel gives no namespaces")?;
    if user {
        let map =
            |file: &str, text: String| std::fs::write(file, text).with_context(|| format!("writing {file}"));
        map("/proc/self/setgroups", "deny".into())?;
        map("/proc/self/uid_map", format!("{NOBODY} {} 1", uid.as_raw()))?;
        map("/proc/self/gid_map", format!("{NOBODY} {} 1", gid.as_raw()))?;
    }
    Ok(())
}

/// Process 1 of the plugin's namespaces, if it has any.
fn reaper(control: &UnixStream, told: &Told, program: &[u8], request: &[u8]) -> Result<Ended> {
    die_with_parent()?;
    let mut path = told.path.clone();
    if told.contained {
        // A user namespace is entered as nobody; where this is root, it is still.
        let root = is_root();
        match see(root, &told.path, program) {
            Ok(at) => path = at,
            Err(error) => return Ok(Ended::Uncontained(format!("{error:#}"))),
        }
        capabilities::reduce_to(if root { capabilities::BECOMING } else { capabilities::NONE })?;
        if root {
            become_nobody().context("becoming nobody")?;
            // The kernel forgets it when a process becomes another user.
            die_with_parent()?;
        }
    } else {
        anyhow::ensure!(!is_root(), "root runs a plugin contained, or not at all");
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .context("becoming the plugin's reaper")?;
        rustix::thread::set_no_new_privs(true).context("setting no_new_privs")?;
    }
    let ours = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    ours.context("hiding the reaper")?;
    seccomp::Filter::new(true).install()?;
    let limit = |resource, most| {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
            .context("limiting the plugin")
    };
    limit(Resource::Core, 0)?;
    limit(Resource::As, MEMORY)?;
    if told.contained {
        limit(Resource::Nproc, PROCESSES)?;
    }
    run(control, told, &path, request)
}

/// What the plugin sees: this machine, read-only, without what is in `/dev`, `/run`, `/tmp` and `/proc`, and itself.
fn see(root: bool, name: &Path, program: &[u8]) -> Result<PathBuf> {
    let open = |path: &str| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, path, flags, Mode::empty()).with_context(|| format!("opening {path}"))
    };
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID;
    api::restrict(open("/")?, read_only, true).context("making the view of this machine read-only")?;
    let proc = api::fresh("proc", &[], api::READ_ONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
    api::attach(proc, open("/proc")?).context("mounting /proc")?;
    if root {
        let no_exec = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let dev = api::fresh("tmpfs", &[("mode", "0755"), ("size", "64k")], no_exec)?;
        for (node, major, minor) in NODES {
            let mode = Mode::from_raw_mode(0o666);
            rustix::fs::mknodat(&dev, node, FileType::CharacterDevice, mode, makedev(major, minor))
                .with_context(|| format!("making /dev/{node}"))?;
            rustix::fs::chmodat(&dev, node, mode, rustix::fs::AtFlags::empty())?;
        }
        rustix::fs::symlinkat("/proc/self/fd", &dev, "fd")?;
        api::attach(dev, open("/dev")?).context("mounting /dev")?;
    }
    let tmp = api::fresh("tmpfs", &[("mode", "1777"), ("size", SCRATCH)], api::PLAIN)?;
    api::attach(tmp, open("/tmp")?).context("mounting /tmp")?;
    let run = api::fresh("tmpfs", &[("mode", "0755"), ("size", "256m")], api::PLAIN)?;
    api::attach(&run, open("/run")?).context("mounting /run")?;
    std::fs::create_dir(HOME).context("making a place for the plugin")?;
    let path = Path::new(HOME).join(name.file_name().context("a plugin without a name")?);
    std::fs::write(&path, program).context("copying the plugin")?;
    for made in [Path::new(HOME), &path] {
        rustix::fs::chmod(made, Mode::from_raw_mode(0o555)).context("copying the plugin")?;
    }
    api::restrict(&open("/run")?, api::READ_ONLY, false).context("closing /run")?;
    rustix::process::chdir("/")?;
    Ok(path)
}

fn become_nobody() -> nix::Result<()> {
    let (uid, gid) = (nix::unistd::Uid::from_raw(NOBODY), nix::unistd::Gid::from_raw(NOBODY));
    nix::unistd::setgroups(&[])?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)
}

fn run(control: &UnixStream, told: &Told, path: &Path, request: &[u8]) -> Result<Ended> {
    let deadline = Instant::now() + told.timeout;
    let started = Command::new(path)
        .arg(&told.verb)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin")
        .env("HOME", "/")
        .env("LC_ALL", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::from(memory(request).context("passing the request")?))
        .spawn();
    let mut main = match started {
        Ok(main) => main,
        Err(error) => bail!(why_not(path, &error)),
    };
    let pid = Pid::from_child(&main);
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).context("watching the plugin")?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let control = control.as_fd();
        let mut fds = [PollFd::new(&process, PollFlags::IN), PollFd::new(&control, PollFlags::IN)];
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => continue,
            result => _ = result.context("waiting for the plugin")?,
        }
        if !fds[0].revents().is_empty() {
            break;
        }
        // It says nothing more: it is gone, or has heard enough.
        if !fds[1].revents().is_empty() || Instant::now() >= deadline {
            end_all(told.contained);
            return Ok(Ended::TimedOut);
        }
    }
    let status = main.wait().context("waiting for the plugin")?;
    let left = remaining(told.contained);
    end_all(told.contained);
    use std::os::unix::process::ExitStatusExt;
    Ok(match status.signal() {
        Some(number) => Ended::Signaled { number },
        None => Ended::Exited { code: status.code().unwrap_or(-1), left },
    })
}

fn memory(content: &[u8]) -> Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create("request", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    Ok(file.into())
}

fn why_not(path: &Path, error: &std::io::Error) -> String {
    let mut begin = Vec::new();
    let read = File::open(path).and_then(|file| file.take(128).read_to_end(&mut begin));
    let line = String::from_utf8_lossy(&begin);
    let line = line.lines().next().unwrap_or_default();
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound, _) if read.is_ok() && line.starts_with("#!") => {
            format!("it cannot be started: {line:?} names a program that is not there")
        }
        (_, Some(libc::ENOEXEC)) => {
            "it cannot be started: neither a program nor a script that begins with `#!`".into()
        }
        _ => format!("it cannot be started: {error}"),
    }
}

/// The names of processes that outlive the plugin by more than a moment.
fn remaining(contained: bool) -> Vec<String> {
    let deadline = Instant::now() + GRACE;
    while reap() {
        if Instant::now() >= deadline {
            let mut names: Vec<_> = others(contained).into_iter().map(|(_, name)| name).collect();
            names.truncate(MAX_NAMES);
            return names;
        }
        let pause = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        _ = poll(&mut [], Some(&pause));
    }
    Vec::new()
}

/// Whether there is somebody yet: every orphan becomes a child of this process.
fn reap() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Contained, all dies with this process. Else it is killed here, generation by generation.
fn end_all(contained: bool) {
    let deadline = Instant::now() + Duration::from_secs(2);
    while !contained && reap() && Instant::now() < deadline {
        for (pid, _) in others(contained) {
            _ = rustix::process::kill_process(pid, Signal::KILL);
        }
        _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 }));
    }
}

/// Processes that the plugin left: all others of this namespace, or this process's children.
fn others(contained: bool) -> Vec<(Pid, String)> {
    let own = rustix::process::getpid();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let of = |entry: std::fs::DirEntry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        // `12 (name) S 1 …`; the name may hold anything.
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once(" (")?.1.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let (state, parent) = (fields.next()?, fields.next()?.parse::<i32>().ok()?);
        let is_ours = contained || parent == own.as_raw_nonzero().get();
        (pid != own && state != "Z" && is_ours).then(|| (pid, name.to_owned()))
    };
    processes.flatten().filter_map(of).collect()
}
