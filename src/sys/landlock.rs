//! Restricts a process with Landlock. A step that shares the network cannot reach this machine's abstract sockets,
//! which belong to the network namespace, so that no mount hides them. A tool of this machine cannot write to files.

use rustix::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// `struct landlock_ruleset_attr`, as of the version that has scopes.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}
const ABSTRACT_UNIX_SOCKET: u64 = 1;
// The same numbers on every architecture.
const CREATE_RULESET: libc::c_long = 444;
const ADD_RULE: libc::c_long = 445;
const RESTRICT_SELF: libc::c_long = 446;

/// `LANDLOCK_CREATE_RULESET_VERSION`: returns only the kernel's version.
const VERSION: libc::c_long = 1;
/// `LANDLOCK_RULE_PATH_BENEATH`.
const BENEATH: libc::c_long = 1;
const WRITE_FILE: u64 = 1 << 1;
/// The rights to remove and create objects of every kind.
const CHANGE: u64 = 0b1_1111_1111 << 4;
/// Since version 3.
const TRUNCATE: u64 = 1 << 14;

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
struct Beneath {
    allowed: u64,
    parent: i32,
}

/// The kernel's version of Landlock; below 1 if it has none.
#[allow(unsafe_code)]
pub fn version() -> libc::c_long {
    // SAFETY: nothing is read or written with this flag.
    unsafe { libc::syscall(CREATE_RULESET, std::ptr::null::<u8>(), 0, VERSION) }
}

/// From now on this process and its children can write only to this open file, and cannot create or remove anything;
/// needs no_new_privs. Nothing changes where the kernel has no Landlock. Allocates nothing.
#[allow(unsafe_code)]
pub fn restrict_writes_to(file: BorrowedFd<'_>) {
    // SAFETY: the structures live through the calls, with their sizes; a returned descriptor is new.
    unsafe {
        let files = WRITE_FILE | CHANGE | if version() >= 3 { TRUNCATE } else { 0 };
        let ruleset = Ruleset { files, network: 0, scoped: 0 };
        // The first version has only the first field.
        let fd = libc::syscall(CREATE_RULESET, &raw const ruleset, size_of::<u64>(), 0);
        let Ok(fd @ 0..) = i32::try_from(fd) else { return };
        let fd = OwnedFd::from_raw_fd(fd);
        let rule = Beneath { allowed: WRITE_FILE, parent: file.as_raw_fd() };
        libc::syscall(ADD_RULE, fd.as_raw_fd(), BENEATH, &raw const rule, 0);
        libc::syscall(RESTRICT_SELF, fd.as_raw_fd(), 0);
    }
}

/// Hides them from this process and its children, permanently; needs no_new_privs. Kernels before 6.12, and those
/// without Landlock, cannot do this: there such a step reaches the sockets, as it reaches this machine's ports.
#[allow(unsafe_code)]
pub fn hide_abstract_sockets() {
    let ruleset = Ruleset { files: 0, network: 0, scoped: ABSTRACT_UNIX_SOCKET };
    // SAFETY: `ruleset` lives through the call, with its size; a returned descriptor is new.
    unsafe {
        let fd = libc::syscall(CREATE_RULESET, &raw const ruleset, size_of::<Ruleset>(), 0);
        let Ok(fd @ 0..) = i32::try_from(fd) else { return };
        let fd = OwnedFd::from_raw_fd(fd);
        libc::syscall(RESTRICT_SELF, fd.as_raw_fd(), 0);
    }
}
