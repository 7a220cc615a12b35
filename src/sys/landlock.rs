//! Restricts a process with Landlock, for two purposes. First, a step with network access must not reach this machine's
//! abstract sockets. Mounts cannot hide these sockets, because the sockets belong to the network namespace. Second,
//! e2fsck and resize2fs, which oven runs outside the image, must not write to any file except the disk.

use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// The kernel's `struct landlock_ruleset_attr`. The field `scoped` exists since version 6 of Landlock.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}
const ABSTRACT_UNIX_SOCKET: u64 = 1;
// The numbers of these system calls are the same on every architecture.
const CREATE_RULESET: libc::c_long = 444;
const ADD_RULE: libc::c_long = 445;
const RESTRICT_SELF: libc::c_long = 446;

/// `LANDLOCK_CREATE_RULESET_VERSION`: with this flag, the call only returns the kernel's version of Landlock.
const VERSION: libc::c_long = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const BENEATH: libc::c_long = 1;
const WRITE_FILE: u64 = 1 << 1;
/// The rights to remove and create files of all types.
const CHANGE: u64 = 0b1_1111_1111 << 4;
/// The right to truncate, since version 3.
const TRUNCATE: u64 = 1 << 14;

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct Beneath {
    allowed: u64,
    parent: i32,
}

/// Returns the kernel's version of Landlock. The result is below 1 if the kernel does not support Landlock.
#[allow(unsafe_code)]
pub fn version() -> libc::c_long {
    // SAFETY: with this flag, the call reads and writes no memory.
    unsafe { libc::syscall(CREATE_RULESET, std::ptr::null::<u8>(), 0, VERSION) }
}

/// Permits this process and its children to write only to this open file. They cannot create or remove anything. Needs
/// no_new_privs. Has no effect on a kernel without Landlock. Allocates no memory.
#[allow(unsafe_code)]
pub fn restrict_writes_to(file: BorrowedFd<'_>) {
    // SAFETY: the structures live until the calls return, and no size is larger than its structure. A returned
    // descriptor is new.
    unsafe {
        let files = WRITE_FILE | CHANGE | if version() >= 3 { TRUNCATE } else { 0 };
        let ruleset = Ruleset { files, network: 0, scoped: 0 };
        // The first version of Landlock knows only the first field. So the size that is passed is the size of this
        // field.
        let fd = libc::syscall(CREATE_RULESET, &raw const ruleset, size_of::<u64>(), 0);
        let Ok(fd @ 0..) = i32::try_from(fd) else { return };
        let fd = OwnedFd::from_raw_fd(fd);
        let rule = Beneath { allowed: WRITE_FILE, parent: file.as_raw_fd() };
        libc::syscall(ADD_RULE, fd.as_raw_fd(), BENEATH, &raw const rule, 0);
        libc::syscall(RESTRICT_SELF, fd.as_raw_fd(), 0);
    }
}

/// Permanently prevents this process and its children from reaching abstract sockets of other processes. Needs
/// no_new_privs. Has no effect on kernels before 6.12 or without Landlock. On such a kernel, a step with network access
/// can reach these sockets. (It can always reach this machine's ports.)
#[allow(unsafe_code)]
pub fn hide_abstract_sockets() {
    let ruleset = Ruleset { files: 0, network: 0, scoped: ABSTRACT_UNIX_SOCKET };
    // SAFETY: `ruleset` lives until the call returns, and the size is its size. A returned descriptor is new.
    unsafe {
        let fd = libc::syscall(CREATE_RULESET, &raw const ruleset, size_of::<Ruleset>(), 0);
        let Ok(fd @ 0..) = i32::try_from(fd) else { return };
        let fd = OwnedFd::from_raw_fd(fd);
        libc::syscall(RESTRICT_SELF, fd.as_raw_fd(), 0);
    }
}
