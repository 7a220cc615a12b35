//! Prevents steps with the network from reading the builder's credentials.
//!
//! A step with the network uses the builder's network. In this network, the metadata service returns the credentials of
//! the builder's role to every process. So such a step runs in a private cgroup. For the sockets of the cgroup, the
//! kernel runs a filter that blocks the addresses of the service. The module `program` builds the filter. The step's
//! first process is created in the cgroup. A socket always belongs to the cgroup in which it was created. A step cannot
//! leave its cgroup, because it cannot access a cgroup file system.
//!
//! A cgroup is a directory. If oven is killed with SIGKILL, the directory is the only part of the step that remains,
//! and the cgroup has no processes. The process that creates a cgroup locks the directory. The next step of any oven on
//! this machine, or `oven sweep`, removes the directories that are not locked. The kernel keeps the filter until the
//! directory is removed, so it is effective as long as the step runs.

mod program;

use crate::error::{Failure, Kind};
use crate::sys::lock::try_lock_until_closed;
use crate::sys::mount::table;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{SigSet, SigmaskHow};
use program::BpfProgram;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use std::ffi::OsStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The prefix of the cgroups' names. 16 hexadecimal digits follow.
const PREFIX: &str = "oven-step-";
/// The number of attempts to create a cgroup. Another oven process may remove a new cgroup before this process has
/// locked it.
const ATTEMPTS: u32 = 16;
/// The number of attempts to remove a cgroup. An attempt may fail, because the kernel still counts a process for a
/// short time after its end. The first pause is 1 ms, and each later pause is twice as long. So the sum of all pauses
/// is about 1 s.
const REMOVALS: u32 = 10;

/// A cgroup whose processes cannot reach the builder's credentials. Dropping the value removes the cgroup. All its
/// processes must have ended before.
pub struct EgressFence {
    parent: OwnedFd,
    name: String,
    /// The open directory, which is locked.
    dir: OwnedFd,
}

impl EgressFence {
    /// Creates a fence below the cgroup of this process, so that the limits of oven's cgroup also apply to its steps.
    ///
    /// # Errors
    /// [`Kind::Machine`] if this machine lacks a writable cgroup v2 file system or BPF.
    pub fn make() -> Result<Self> {
        let make = || -> Result<Self> {
            let parent = open(CWD, &own_cgroup()?).context("opening the cgroup of this process")?;
            remove_unlocked(parent.as_fd());
            let fence = Self::create_below(parent)?;
            for program in program::all() {
                attach(&program, fence.dir.as_fd())
                    .with_context(|| format!("attaching the filter of {}", program.name))?;
            }
            Ok(fence)
        };
        make().map_err(|error| unprotected(&format!("{error:#}")).into())
    }

    fn create_below(parent: OwnedFd) -> Result<Self> {
        for _ in 0..ATTEMPTS {
            let mut bytes = [0; 8];
            rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
            let name = format!("{PREFIX}{:016x}", u64::from_ne_bytes(bytes));
            rustix::fs::mkdirat(&parent, &*name, Mode::from_raw_mode(0o755)).context("making a cgroup")?;
            // If this fails, another process has removed the cgroup, because it was not locked yet.
            let Ok(dir) = open(&parent, Path::new(&name)) else { continue };
            if lock(&dir) && exists(&parent, &name, &dir) {
                return Ok(Self { parent, name, dir });
            }
        }
        bail!("another process removed each cgroup that oven created");
    }

    /// Returns the descriptor for `CLONE_INTO_CGROUP`.
    pub fn cgroup(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }
}

impl Drop for EgressFence {
    #[allow(clippy::disallowed_methods, reason = "a Drop cannot await, and it is for milliseconds")]
    fn drop(&mut self) {
        let mut pause = Duration::from_millis(1);
        for _ in 0..REMOVALS {
            match rustix::fs::unlinkat(&self.parent, &*self.name, AtFlags::REMOVEDIR) {
                Err(Errno::BUSY) => std::thread::sleep(pause),
                _ => return,
            }
            pause *= 2;
        }
        eprintln!("oven: the cgroup {} is still in use; remove it later with `oven sweep`", self.name);
    }
}

/// Removes the cgroups of oven processes that were killed.
pub fn sweep() -> Result<()> {
    let dir = own_cgroup()?;
    remove_unlocked(open(CWD, &dir).with_context(|| format!("opening {}", dir.display()))?.as_fd());
    Ok(())
}

fn remove_unlocked(parent: BorrowedFd<'_>) {
    let Ok(entries) = Dir::read_from(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if !name.to_bytes().starts_with(PREFIX.as_bytes()) {
            continue;
        }
        let Ok(dir) = open(parent, Path::new(OsStr::from_bytes(name.to_bytes()))) else { continue };
        if lock(&dir) {
            // If the cgroup still has a process, this fails, and the cgroup must remain.
            _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
        }
    }
}

/// Checks that the filter is effective. The helper calls this function in the step's cgroup, before any program of the
/// image runs. Before Linux 5.15, the filter has no effect if the machine uses the controllers net_cls or net_prio of
/// cgroup version 1, because then sockets do not record their cgroup.
pub fn verify_filter() -> Result<()> {
    let v6 = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    let addresses = program::V4.map(|bytes| IpAddr::from(Ipv4Addr::from(bytes)));
    for address in addresses.into_iter().chain([v6.into()]) {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let socket = rustix::net::socket_with(family, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
        let socket = match socket {
            Err(Errno::AFNOSUPPORT) => continue, // a kernel without IPv6
            socket => socket.context("making a socket")?,
        };
        // Port 9 is the discard port. The filter refuses the packet before the kernel looks up a route.
        let sent = rustix::net::sendto(&socket, &[], SendFlags::DONTWAIT, &SocketAddr::new(address, 9));
        if sent != Err(Errno::PERM) {
            return Err(unprotected(&format!("the filter does not block {address}")).into());
        }
    }
    Ok(())
}

/// Returns the failure for a machine that cannot protect the credentials.
fn unprotected(why: &str) -> Failure {
    Kind::Machine
        .failure(format!("oven cannot block access to the builder's credentials from a step with the network: {why}"))
        .hint(
            "This needs a writable cgroup v2 file system and BPF. A container must be privileged. If the steps of an \
             image may use the credentials, set `imds = true` in its image.toml.",
        )
}

/// Returns the directory of this thread's cgroup. The thread's mount table is used, because each thread may have its
/// own mount namespace.
fn own_cgroup() -> Result<PathBuf> {
    let read = |path: &str| std::fs::read(path).with_context(|| format!("reading {path}"));
    let (groups, mounts) = (read("/proc/thread-self/cgroup")?, read("/proc/thread-self/mountinfo")?);
    directory(&groups, &mounts)
}

/// Returns the directory of a thread's cgroup. `groups` and `mounts` are the content of the thread's files `cgroup` and
/// `mountinfo` in `/proc`. If several mounts show the cgroup, the first one is used.
fn directory(groups: &[u8], mounts: &[u8]) -> Result<PathBuf> {
    let mut lines = groups.split(|byte| *byte == b'\n');
    let own = lines.find_map(|line| line.strip_prefix(b"0::")).context("this machine has no cgroup v2")?;
    let own = Path::new(OsStr::from_bytes(own));
    let mut mounted = false;
    for entry in table::parse(mounts).iter().filter(|entry| entry.kind == "cgroup2") {
        mounted = true;
        // In a container without a cgroup namespace, only a part of the cgroup tree is mounted. The path of this part
        // is removed from the start of the cgroup's path.
        if let Ok(below) = own.strip_prefix(&entry.root) {
            return Ok(entry.path.join(below));
        }
    }
    ensure!(mounted, "no cgroup v2 file system is mounted");
    bail!("the mounted cgroup v2 file system does not show the cgroup {} of this process", own.display())
}

fn open(at: impl AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, path, flags, Mode::empty())
}

fn lock(dir: &OwnedFd) -> bool {
    try_lock_until_closed(dir).unwrap_or(false)
}

/// Returns whether `name` still leads to this directory.
fn exists(parent: &OwnedFd, name: &str, dir: &OwnedFd) -> bool {
    let there = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
    let same = |stat: rustix::fs::Stat| rustix::fs::fstat(dir).is_ok_and(|own| own.st_ino == stat.st_ino);
    there.is_ok_and(same)
}

/// The part of `union bpf_attr` that loads a program.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    interface: u32,
    expected_attach: u32,
}

/// The part of `union bpf_attr` that attaches a program.
#[repr(C)]
struct Attach {
    target: i32,
    program: i32,
    kind: u32,
    flags: u32,
}

/// Loads a program and attaches it to a cgroup for the cgroup's lifetime. The attachment is not exclusive, so the
/// filters of the parent cgroups also apply.
#[allow(unsafe_code)]
fn attach(program: &BpfProgram, cgroup: BorrowedFd<'_>) -> Result<()> {
    const PROG_LOAD: libc::c_int = 5;
    const PROG_ATTACH: libc::c_int = 8;
    const ALLOW_MULTI: u32 = 2;
    let load = Load {
        kind: program.kind,
        count: u32::try_from(program.code.len())?,
        instructions: program.code.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        expected_attach: program.attach,
        ..Load::default()
    };
    // Signals are blocked, because the call fails with EAGAIN if a signal arrives while the kernel verifies the
    // program.
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK).context("blocking signals")?;
    // SAFETY: `load` has the size that is passed, and points to `count` instructions and a terminated text. All of them
    // live until the call returns, and the call copies them. A returned descriptor is new and has no other owner.
    let loaded = unsafe {
        match libc::syscall(libc::SYS_bpf, PROG_LOAD, &raw const load, size_of::<Load>()) {
            fd if fd < 0 => Err(io::Error::last_os_error()),
            fd => Ok(OwnedFd::from_raw_fd(fd as i32)),
        }
    };
    before.thread_set_mask().context("unblocking signals")?;
    let loaded = loaded.context("the kernel rejected the program")?;
    let attach = Attach {
        target: cgroup.as_raw_fd(),
        program: loaded.as_raw_fd(),
        kind: program.attach,
        flags: ALLOW_MULTI,
    };
    // SAFETY: `attach` has the size that is passed, and lives until the call returns.
    let attached =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_ATTACH, &raw const attach, size_of::<Attach>()) };
    if attached < 0 { Err(io::Error::last_os_error().into()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "25 1 0:23 / /sys rw - sysfs sysfs rw\n30 25 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n";
    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                          32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                          41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    fn at(groups: &str, mounts: &str) -> Result<String, String> {
        let found = directory(groups.as_bytes(), mounts.as_bytes());
        found.map(|path| path.to_str().unwrap().to_owned()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_cgroup_of_a_process_is_found() {
        let cases = [
            ("0::/\n", UNIFIED, "/sys/fs/cgroup/"),
            ("0::/system.slice/ci.service\n", UNIFIED, "/sys/fs/cgroup/system.slice/ci.service"),
            ("1:cpu:/a\n0::/b\n", HYBRID, "/sys/fs/cgroup/unified/b"),
            (
                "0::/docker/abc/x\n",
                "9 8 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
                "/sys/fs/cgroup/x",
            ),
            ("0::/\n", "9 8 0:26 / /with\\040blank rw - cgroup2 cgroup rw\n", "/with blank/"),
            ("0::/a\n", &format!("9 8 0:26 /other /mnt rw - cgroup2 c rw\n{UNIFIED}"), "/sys/fs/cgroup/a"),
        ];
        for (groups, mounts, expected) in cases {
            assert_eq!(at(groups, mounts).as_deref(), Ok(expected), "{groups}");
        }
    }

    #[test]
    fn errors_say_what_is_missing() {
        let cases = [
            ("1:cpu:/\n", UNIFIED, "this machine has no cgroup v2"),
            ("", "", "this machine has no cgroup v2"),
            (
                "0::/\n",
                "9 8 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n",
                "no cgroup v2 file system",
            ),
            ("0::/a\n", "9 8 0:26 /../b /sys/fs/cgroup rw - cgroup2 c rw\n", "does not show the cgroup /a"),
        ];
        for (groups, mounts, expected) in cases {
            let error = at(groups, mounts).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }
}
