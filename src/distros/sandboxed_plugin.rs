//! `oven __plugin`: the helper that runs an executable plugin in a sandbox.
//!
//! The plugin runs as user nobody, in its own namespaces without a network, on a read-only view of this machine. So it
//! can read the files that every user may read, and can change nothing. When it ends, all processes that it started are
//! killed. If oven is run by a user other than root, the sandbox uses a user namespace. If the kernel does not allow
//! this, the plugin is an ordinary process of the user without a sandbox. In this case, oven only makes sure that the
//! plugin and its processes end.

use crate::error::Kind;
use crate::sys::mount::api;
use crate::sys::{capabilities, namespaces, seccomp};
use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{CWD, FileType, MemfdFlags, Mode, OFlags, makedev};
use rustix::mount::MountAttrFlags;
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Resource, Rlimit, Signal, WaitOptions, setrlimit};
use rustix::thread::UnshareFlags;
use serde::{Deserialize, Serialize};
use std::fs::{File, Permissions};
use std::io::{ErrorKind, Read, Seek, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// The hidden verb of the command line that runs this helper.
pub const VERB: &str = "__plugin";
/// The ids of `nobody` and its group on every distribution that oven runs on. In a user namespace, the kernel also
/// shows this id for owners that are not mapped.
const NOBODY: u32 = 65534;
/// The directory of the plugin's file in the sandbox. It is on a tmpfs that is mounted over `/run`.
const PLUGIN_DIR: &str = "/run/oven-plugin";
/// When the plugin has ended, the processes that it started have this time to end, too. Processes that run longer are
/// reported.
const GRACE: Duration = Duration::from_millis(100);
/// The maximal number of names of leftover processes in a message.
const MAX_NAMES: usize = 8;
/// The plugin's limits: the memory in bytes, and the number of processes. With these limits, a faulty plugin fails
/// before this machine runs out of memory or processes.
const MAX_MEMORY: u64 = 4 << 30;
const MAX_PROCESSES: u64 = 512;
/// The size of the plugin's `/tmp`.
const TMP_SIZE: &str = "16m";
/// The device nodes in the plugin's `/dev`: name, major number, minor number.
const DEVICES: [(&str, u32, u32); 5] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9)];

/// The first message to the helper. Two more messages follow: the plugin's program and the request.
#[derive(Debug, Serialize, Deserialize)]
pub struct PluginCall {
    /// The plugin's file. In a sandbox, only the file's name is used, because the program is sent in a message. Without
    /// a sandbox, this file is executed.
    pub path: PathBuf,
    pub verb: String,
    /// Whether the plugin runs in a sandbox.
    pub contained: bool,
    /// The time limit of the plugin.
    pub timeout: Duration,
}

/// How a plugin ended.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PluginExit {
    Exited {
        code: i32,
        /// The names of processes that did not end together with the plugin.
        left: Vec<String>,
    },
    Signaled {
        number: i32,
    },
    TimedOut,
    /// The plugin was not started, because this machine does not allow the sandbox.
    Uncontained(String),
    /// The plugin was not run, because its program cannot be started or the helper failed.
    Failed(String),
}

/// Writes a message: its length, then its content.
pub fn send(mut to: impl Write, message: &[u8]) -> std::io::Result<()> {
    to.write_all(&(message.len() as u64).to_le_bytes())?;
    to.write_all(message)
}

/// Reads a message of at most `max` bytes.
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

/// Runs `oven __plugin`. `main` calls this first, while the process has only one thread.
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
    socket.context(format!("{VERB} is only for oven itself"))?;
    let control = UnixStream::from(rustix::io::fcntl_dupfd_cloexec(stdin, 3)?);
    let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    die_with_parent()?;
    rustix::process::setsid().context("starting a new session for the plugin")?;
    const MAX: u64 = 256 << 20;
    let call: PluginCall = serde_json::from_slice(&receive(&control, MAX)?)?;
    let (program, request) = (receive(&control, MAX)?, receive(&control, MAX)?);
    let namespaces = if call.contained { enter_namespaces() } else { Ok(()) };
    if let Err(error) = namespaces {
        return send_result(&control, &PluginExit::Uncontained(format!("{error:#}")));
    }
    // A process that creates a PID namespace does not enter that namespace. The first child of the process becomes the
    // first process of the namespace.
    match fork().context("starting the plugin's parent process")? {
        Some(reaper) => {
            drop(control);
            _ = rustix::process::waitpid(Some(reaper), WaitOptions::empty());
            Ok(ExitCode::SUCCESS)
        }
        None => {
            let ended = run_reaper(&control, &call, &program, &request);
            let code = send_result(
                &control,
                &ended.unwrap_or_else(|error| PluginExit::Failed(format!("{error:#}"))),
            );
            std::process::exit(i32::from(code.is_err()))
        }
    }
}

fn send_result(control: &UnixStream, ended: &PluginExit) -> Result<ExitCode> {
    send(control, &serde_json::to_vec(ended)?).context("writing to oven")?;
    Ok(ExitCode::SUCCESS)
}

fn die_with_parent() -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("setting the signal that ends the plugin together with oven")
}

#[allow(unsafe_code)]
fn fork() -> std::io::Result<Option<Pid>> {
    // SAFETY: this process has only one thread. So the child cannot inherit a lock that another thread holds, or an
    // allocation that another thread has not finished.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => Ok(None),
        pid => Pid::from_raw(pid.max(0)).map(Some).ok_or_else(std::io::Error::last_os_error),
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn enter_namespaces() -> Result<()> {
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    let mut flags = UnshareFlags::NEWPID
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS;
    let needs_user_namespace = !uid.is_root();
    if needs_user_namespace {
        flags |= UnshareFlags::NEWUSER;
    }
    // SAFETY: this process has only one thread, and the flags do not affect its memory or its descriptors.
    namespaces::unshare(flags).context("the kernel does not allow namespaces")?;
    if needs_user_namespace {
        let map =
            |file: &str, text: String| std::fs::write(file, text).with_context(|| format!("writing {file}"));
        map("/proc/self/setgroups", "deny".into())?;
        map("/proc/self/uid_map", format!("{NOBODY} {} 1", uid.as_raw()))?;
        map("/proc/self/gid_map", format!("{NOBODY} {} 1", gid.as_raw()))?;
    }
    Ok(())
}

/// Runs the plugin as a child of this process. In a sandbox, this process is process 1 of the plugin's PID namespace.
fn run_reaper(control: &UnixStream, call: &PluginCall, program: &[u8], request: &[u8]) -> Result<PluginExit> {
    die_with_parent()?;
    let mut path = call.path.clone();
    if call.contained {
        // In a user namespace, this process is already nobody. Without a user namespace, it is still root.
        let root = is_root();
        match set_up_view(root, &call.path, program) {
            Ok(at) => path = at,
            Err(error) => return Ok(PluginExit::Uncontained(format!("{error:#}"))),
        }
        capabilities::reduce_to(if root { capabilities::BECOMING } else { capabilities::NONE })?;
        if root {
            become_nobody().context("changing to the user nobody")?;
            // This function is called again, because the kernel resets the setting when a process changes its user.
            die_with_parent()?;
        }
    } else {
        anyhow::ensure!(!is_root(), "root never runs a plugin without a sandbox");
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .context("becoming the parent of the plugin's orphaned processes")?;
        rustix::thread::set_no_new_privs(true).context("setting no_new_privs")?;
    }
    let hidden = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    hidden.context("protecting the plugin's parent process")?;
    seccomp::SyscallFilter::new(true).install()?;
    let limit = |resource, most| {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })
            .context("setting the plugin's resource limits")
    };
    limit(Resource::Core, 0)?;
    limit(Resource::As, MAX_MEMORY)?;
    if call.contained {
        limit(Resource::Nproc, MAX_PROCESSES)?;
    }
    run(control, call, &path, request)
}

/// Sets up the file system that the plugin sees: a read-only view of this machine, in which new file systems replace
/// `/dev`, `/run`, `/tmp` and `/proc`. `/dev` is replaced only if `root` is true. Copies the plugin's program to
/// [`PLUGIN_DIR`], and returns the path of the copy.
fn set_up_view(root: bool, name: &Path, program: &[u8]) -> Result<PathBuf> {
    let open = |path: &str| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, path, flags, Mode::empty()).with_context(|| format!("opening {path}"))
    };
    let read_only = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID;
    api::restrict(open("/")?, read_only, true).context("making the view of this machine read-only")?;
    let proc = api::new_file_system("proc", &[], api::READ_ONLY | MountAttrFlags::MOUNT_ATTR_NOEXEC)?;
    api::attach(proc, open("/proc")?).context("mounting /proc")?;
    if root {
        let no_exec = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let dev = api::new_file_system("tmpfs", &[("mode", "0755"), ("size", "64k")], no_exec)?;
        for (node, major, minor) in DEVICES {
            let mode = Mode::from_raw_mode(0o666);
            rustix::fs::mknodat(&dev, node, FileType::CharacterDevice, mode, makedev(major, minor))
                .with_context(|| format!("creating /dev/{node}"))?;
            rustix::fs::chmodat(&dev, node, mode, rustix::fs::AtFlags::empty())?;
        }
        rustix::fs::symlinkat("/proc/self/fd", &dev, "fd")?;
        api::attach(dev, open("/dev")?).context("mounting /dev")?;
    }
    let tmp = api::new_file_system("tmpfs", &[("mode", "1777"), ("size", TMP_SIZE)], api::PLAIN)?;
    api::attach(tmp, open("/tmp")?).context("mounting /tmp")?;
    let run = api::new_file_system("tmpfs", &[("mode", "0755"), ("size", "256m")], api::PLAIN)?;
    api::attach(&run, open("/run")?).context("mounting /run")?;
    std::fs::create_dir(PLUGIN_DIR).context("creating a directory for the plugin")?;
    let path = Path::new(PLUGIN_DIR).join(name.file_name().context("the plugin's path has no file name")?);
    std::fs::write(&path, program).context("copying the plugin")?;
    for path in [Path::new(PLUGIN_DIR), &path] {
        std::fs::set_permissions(path, Permissions::from_mode(0o555)).context("copying the plugin")?;
    }
    api::restrict(&open("/run")?, api::READ_ONLY, false).context("making /run read-only")?;
    rustix::process::chdir("/")?;
    Ok(path)
}

fn become_nobody() -> nix::Result<()> {
    let (uid, gid) = (nix::unistd::Uid::from_raw(NOBODY), nix::unistd::Gid::from_raw(NOBODY));
    nix::unistd::setgroups(&[])?;
    nix::unistd::setresgid(gid, gid, gid)?;
    nix::unistd::setresuid(uid, uid, uid)
}

fn run(control: &UnixStream, call: &PluginCall, path: &Path, request: &[u8]) -> Result<PluginExit> {
    let deadline = Instant::now() + call.timeout;
    let started = Command::new(path)
        .arg(&call.verb)
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin")
        .env("HOME", "/")
        .env("LC_ALL", "C.UTF-8")
        .current_dir("/")
        .stdin(Stdio::from(memory_file(request).context("passing the request")?))
        .spawn();
    let mut main = match started {
        Ok(main) => main,
        Err(error) => bail!(start_failure(path, &error)),
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
        // After the request, oven writes nothing more to the socket. So the socket is readable only if oven ended or
        // closed it.
        if !fds[1].revents().is_empty() || Instant::now() >= deadline {
            end_all(call.contained);
            return Ok(PluginExit::TimedOut);
        }
    }
    let status = main.wait().context("waiting for the plugin")?;
    let left = running_after_grace(call.contained);
    end_all(call.contained);
    use std::os::unix::process::ExitStatusExt;
    Ok(match status.signal() {
        Some(number) => PluginExit::Signaled { number },
        None => PluginExit::Exited { code: status.code().unwrap_or(-1), left },
    })
}

fn memory_file(content: &[u8]) -> Result<OwnedFd> {
    let mut file = File::from(rustix::fs::memfd_create("request", MemfdFlags::CLOEXEC)?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file.into())
}

fn start_failure(path: &Path, error: &std::io::Error) -> String {
    let mut begin = Vec::new();
    let read = File::open(path).and_then(|file| file.take(128).read_to_end(&mut begin));
    let line = String::from_utf8_lossy(&begin);
    let line = line.lines().next().unwrap_or_default();
    match (error.kind(), error.raw_os_error()) {
        (ErrorKind::NotFound, _) if read.is_ok() && line.starts_with("#!") => {
            format!("it cannot be started: {line:?} names a program that does not exist")
        }
        (_, Some(libc::ENOEXEC)) => {
            "it cannot be started: it is neither a program nor a script that begins with `#!`".into()
        }
        _ => format!("it cannot be started: {error}"),
    }
}

/// The names of processes that still run [`GRACE`] after the plugin's end.
fn running_after_grace(contained: bool) -> Vec<String> {
    let deadline = Instant::now() + GRACE;
    while reap_children() {
        if Instant::now() >= deadline {
            let mut names: Vec<_> = plugin_processes(contained).into_iter().map(|(_, name)| name).collect();
            names.truncate(MAX_NAMES);
            return names;
        }
        let pause = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        _ = poll(&mut [], Some(&pause));
    }
    Vec::new()
}

/// Reaps ended children. Returns whether any children still run. Orphaned processes of the plugin are also children of
/// this process.
fn reap_children() -> bool {
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return true,
            Err(_) => return false,
        }
    }
}

/// Ends all processes of the plugin. In a sandbox, the kernel ends them when this process ends. Without a sandbox, this
/// process kills its children. If a killed process has children, they become children of this process. So the kill is
/// repeated until no child is left, but for at most 2 s.
fn end_all(contained: bool) {
    let deadline = Instant::now() + Duration::from_secs(2);
    while !contained && reap_children() && Instant::now() < deadline {
        for (pid, _) in plugin_processes(contained) {
            let pid = nix::unistd::Pid::from_raw(pid.as_raw_nonzero().get());
            _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        _ = poll(&mut [], Some(&Timespec { tv_sec: 0, tv_nsec: 1_000_000 }));
    }
}

/// Lists the processes of the plugin. In a sandbox, these are all other processes of this PID namespace. Without a
/// sandbox, these are the children of this process.
fn plugin_processes(contained: bool) -> Vec<(Pid, String)> {
    let own = rustix::process::getpid();
    let Ok(processes) = std::fs::read_dir("/proc") else { return Vec::new() };
    let of = |entry: std::fs::DirEntry| {
        let pid = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
        // `12 (name) S 1 …`. The name may contain any characters.
        let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
        let (name, rest) = stat.split_once(" (")?.1.rsplit_once(") ")?;
        let mut fields = rest.split(' ');
        let (state, parent) = (fields.next()?, fields.next()?.parse::<i32>().ok()?);
        let is_ours = contained || parent == own.as_raw_nonzero().get();
        (pid != own && state != "Z" && is_ours).then(|| (pid, name.to_owned()))
    };
    processes.flatten().filter_map(of).collect()
}
