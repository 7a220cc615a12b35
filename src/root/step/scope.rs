//! Keeps a step that shares the network from this machine's sockets in the abstract name space: they belong to the
//! network namespace, and no mount hides them.

use rustix::fd::{AsRawFd, FromRawFd, OwnedFd};

/// `struct landlock_ruleset_attr`, as of the version that knows scopes.
#[repr(C)]
struct Ruleset {
    files: u64,
    network: u64,
    scoped: u64,
}
const ABSTRACT_UNIX_SOCKET: u64 = 1;
// The same numbers on every architecture.
const CREATE_RULESET: libc::c_long = 444;
const RESTRICT_SELF: libc::c_long = 446;

/// For this process and all that it starts, for good; needs no_new_privs. Kernels before 6.12, and those without
/// Landlock, cannot: then such a step reaches them, as it reaches this machine's ports.
#[allow(unsafe_code)]
pub fn hide_abstract_sockets() {
    let ruleset = Ruleset { files: 0, network: 0, scoped: ABSTRACT_UNIX_SOCKET };
    // SAFETY: `ruleset` lives through the call, and its size is given; a descriptor that is returned is new.
    unsafe {
        let fd = libc::syscall(CREATE_RULESET, &raw const ruleset, size_of::<Ruleset>(), 0);
        let Ok(fd @ 0..) = i32::try_from(fd) else { return };
        let fd = OwnedFd::from_raw_fd(fd);
        libc::syscall(RESTRICT_SELF, fd.as_raw_fd(), 0);
    }
}
