//! File descriptors.

use crate::error::Kind;
use crate::text::escape_name;
use anyhow::Context;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use std::fmt;
use std::fs::{File, Metadata, ReadDir};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Closes all descriptors from `first` on.
#[allow(unsafe_code)]
pub(crate) fn close_from(first: i32) -> anyhow::Result<()> {
    // SAFETY: after this call, no thread that shares this thread's descriptor table uses or drops a value that owns a
    // descriptor from `first` on.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result < 0 {
        return Err(std::io::Error::last_os_error()).context("closing inherited descriptors");
    }
    Ok(())
}

/// The name of git's own directory in a checkout. In a worktree and in a submodule, it is a file.
pub(crate) const GIT: &str = ".git";

/// The reason why a file of a project cannot be used.
#[derive(Debug)]
pub(crate) enum PathRefusal {
    Io(io::Error),
    /// The path leads to this place, which is outside the project.
    Outside(PathBuf),
    /// The path leads to this place, which is inside a `.git`.
    InGit(PathBuf),
    /// The path leads to something that is not a regular file.
    Special(&'static str),
}

impl PathRefusal {
    /// The kind of the failure. A definition's file is refused because of the definition, unless this machine cannot
    /// read it.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Io(error) => Kind::Definition.of_io(error),
            Self::Outside(_) | Self::InGit(_) | Self::Special(_) => Kind::Definition,
        }
    }
}

/// Writes the reason so that it completes the sentence "the file …".
impl fmt::Display for PathRefusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "cannot be read: {error}"),
            Self::Outside(real) => {
                write!(f, "resolves to {}, which is outside the project", escape_name(real))
            }
            Self::InGit(real) => write!(
                f,
                "resolves to {}, which is inside a .git: oven does not use git's own files, because they may contain \
                 credentials",
                escape_name(real)
            ),
            Self::Special(kind) => write!(f, "is {kind}, not a file"),
        }
    }
}

/// The kind of a file, with its article: `a directory`.
pub(crate) fn kind_of(metadata: &Metadata) -> &'static str {
    let kind = metadata.file_type();
    match () {
        () if kind.is_dir() => "a directory",
        () if kind.is_symlink() => "a symbolic link",
        () if kind.is_fifo() => "a FIFO",
        () if kind.is_socket() => "a socket",
        () if kind.is_block_device() || kind.is_char_device() => "a device",
        () => "a file",
    }
}

/// Returns whether a path below the directory `project` leads into a `.git`. Both paths are canonical.
pub(crate) fn is_in_git(real: &Path, project: &Path) -> bool {
    real.strip_prefix(project).is_ok_and(|below| below.components().any(|name| name.as_os_str() == GIT))
}

/// Finds a file or directory of a project, without opening it. So a device or a FIFO outside of the project is not
/// touched. The returned descriptor has `O_PATH`. `project` is the canonical path of a directory. oven checks the
/// descriptor and not the path, so nobody can exchange the file after the check. Magic links of `/proc` are rejected,
/// because they lead to files of other mount namespaces, whose paths mean nothing here.
pub(crate) fn find_within(path: &Path, project: &Path) -> Result<OwnedFd, PathRefusal> {
    let (found, real) = find_real(path, project)?;
    if is_in_git(&real, project) { Err(PathRefusal::InGit(real)) } else { Ok(found) }
}

/// Like [`find_within`], but also finds git's own files in the project.
pub(crate) fn find_within_or_in_git(path: &Path, project: &Path) -> Result<OwnedFd, PathRefusal> {
    find_real(path, project).map(|(found, _)| found)
}

/// Finds a file or directory of a project, and the path to which it leads.
fn find_real(path: &Path, project: &Path) -> Result<(OwnedFd, PathBuf), PathRefusal> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS);
    let found = found.map_err(|error| PathRefusal::Io(error.into()))?;
    let real = std::fs::read_link(link_to(&found)).map_err(PathRefusal::Io)?;
    if real.starts_with(project) { Ok((found, real)) } else { Err(PathRefusal::Outside(real)) }
}

/// Opens a regular file of a project for reading. See [`find_within`].
pub(crate) fn open_file_within(path: &Path, project: &Path) -> Result<File, PathRefusal> {
    open_found_file(find_within(path, project)?)
}

/// Opens a regular file for reading that [`find_within`] returned.
pub(crate) fn open_found_file(found: OwnedFd) -> Result<File, PathRefusal> {
    let found = File::from(found);
    let metadata = found.metadata().map_err(PathRefusal::Io)?;
    if !metadata.is_file() {
        return Err(PathRefusal::Special(kind_of(&metadata)));
    }
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    File::options().read(true).custom_flags(flags).open(link_to(&found)).map_err(PathRefusal::Io)
}

/// Lists the directory that [`find_within`] returned.
pub(crate) fn list_found_directory(found: &OwnedFd) -> io::Result<ReadDir> {
    std::fs::read_dir(link_to(found))
}

fn link_to(found: &impl AsRawFd) -> String {
    format!("/proc/self/fd/{}", found.as_raw_fd())
}

/// Opens a file or directory of this machine with `O_PATH`. If `within` is given, it is the canonical path of a
/// directory, and the opened file must be in that directory and not in a `.git`: see [`find_within`].
pub(crate) fn open_path(path: &Path, within: Option<&Path>) -> anyhow::Result<OwnedFd> {
    let Some(within) = within else {
        let opened = rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        return opened.with_context(|| format!("opening {}", path.display()));
    };
    find_within(path, within).map_err(|refused| changed(path, refused))
}

/// The error for a file of a definition that was correct when the definition was read, and is refused now.
pub(crate) fn changed(path: &Path, refused: PathRefusal) -> anyhow::Error {
    let failure = refused.kind().failure(format!("{} {refused}", escape_name(path)));
    if failure.kind == Kind::Machine {
        return failure.into();
    }
    failure
        .hint("The path was correct when the definition was read. Do not change it during the bake.")
        .into()
}

/// Opens a directory that is used for mounts. Fails if the path is a symbolic link.
pub fn open_directory(path: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::openat(CWD, path, flags, Mode::empty());
    opened.with_context(|| format!("opening {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;
    use rustix::io::Errno;

    #[test]
    fn a_file_that_vanished_is_the_definitions_fault_and_a_broken_disk_is_not() {
        let refused = |errno: Errno| changed(Path::new("web/x"), PathRefusal::Io(errno.into()));
        for errno in [Errno::NOENT, Errno::ACCESS, Errno::LOOP, Errno::NAMETOOLONG] {
            let error = refused(errno);
            assert_eq!(Kind::of(&error), Kind::Definition, "{error:#}");
            assert!(error.to_string().starts_with("web/x cannot be read: "), "{error:#}");
            assert!(hint_of(&error).is_some_and(|hint| hint.contains("during the bake")), "{error:#}");
        }
        for errno in [Errno::IO, Errno::MFILE, Errno::NFILE, Errno::NOMEM] {
            let error = refused(errno);
            assert_eq!((Kind::of(&error), hint_of(&error)), (Kind::Machine, None), "{error:#}");
        }
    }
}
