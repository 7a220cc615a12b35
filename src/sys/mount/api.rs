//! The kernel's mount API, used with descriptors. If oven used paths, somebody could exchange the object at a path
//! after oven has checked it. The object of a descriptor cannot be exchanged.

use anyhow::{Context, Result};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::io;
use std::path::Path;

/// The attributes of an image's mounts while steps run: device nodes, set-user-ID bits and set-group-ID bits have no
/// effect.
pub const PLAIN: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV);
pub const READ_ONLY: MountAttrFlags = PLAIN.union(MountAttrFlags::MOUNT_ATTR_RDONLY);

/// Creates a file system that is not attached anywhere yet. Mount tables show its type as its source, unless `options`
/// has a `source`. An option with an empty value is a flag.
pub fn new_file_system(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> Result<OwnedFd> {
    let mount = || -> io::Result<OwnedFd> {
        let fs = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
        if options.iter().all(|(key, _)| *key != "source") {
            fsconfig_set_string(&fs, "source", kind)?;
        }
        for (key, value) in options {
            if value.is_empty() {
                fsconfig_set_flag(&fs, *key)?;
            } else {
                fsconfig_set_string(&fs, *key, *value)?;
            }
        }
        fsconfig_create(&fs)?;
        Ok(fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
    };
    mount().with_context(|| format!("making a {kind} file system"))
}

/// Creates an overlay of `upper` over `lower`. The overlay is not attached anywhere yet. Writes go to `upper`. `work`
/// is a directory for the kernel, and must be on the file system of `upper`.
pub fn overlay(lower: BorrowedFd<'_>, upper: BorrowedFd<'_>, work: BorrowedFd<'_>) -> Result<OwnedFd> {
    // Descriptors are passed instead of the directories' names, because a name may contain a `:` or a comma.
    let [lower, upper, work] = [lower, upper, work].map(|fd| format!("/proc/self/fd/{}", fd.as_raw_fd()));
    // Without an index, the next overlay can use the same directories before the kernel has released this overlay.
    let options = [("lowerdir", &*lower), ("upperdir", &upper), ("workdir", &work), ("index", "off")];
    new_file_system("overlay", &options, PLAIN)
}

/// Copies the mount that contains `path`, with `path` as the root of the copy. If `path` is empty, `at` is the root of
/// the copy. The copy is not attached anywhere yet.
pub fn clone_mount(at: impl AsFd, path: impl AsRef<Path>, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.as_ref().as_os_str().is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    Ok(open_tree(at, path.as_ref(), flags)?)
}

/// Adds attributes to a mount. If `recursive` is true, adds them to all mounts below it too. Also makes these mounts
/// private, so that mounts are propagated neither to them nor from them.
#[allow(unsafe_code)]
pub fn restrict(mount: impl AsFd, attributes: MountAttrFlags, recursive: bool) -> io::Result<()> {
    #[repr(C)]
    struct MountAttr {
        set: u64,
        clear: u64,
        propagation: u64,
        userns: u64,
    }
    let attr =
        MountAttr { set: attributes.bits().into(), clear: 0, propagation: libc::MS_PRIVATE, userns: 0 };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path and `attr` live until the call returns, and the size is that of `attr`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<MountAttr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Attaches `mount` on top of `on`, which is a directory, a file or a symbolic link. A link is not followed.
pub fn attach(mount: impl AsFd, on: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", on, "", flags)?)
}

/// Opens `path` below `dir` without following any symbolic link.
pub fn open_plain(dir: impl AsFd, path: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    Ok(rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve)?)
}
