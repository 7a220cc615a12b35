//! Reads and writes the files of cgroups.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Result;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Opens the directory of a cgroup. A relative path begins at `at`.
pub fn open_directory(at: impl AsFd, path: impl AsRef<Path>) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat(at, path.as_ref(), flags, Mode::empty())
}

/// Returns the content of a file, or `None` if it cannot be read.
pub fn read(at: impl AsFd, path: impl AsRef<Path>) -> Option<String> {
    let mut text = String::new();
    File::from(open(at, path, OFlags::RDONLY).ok()?).read_to_string(&mut text).ok()?;
    Some(text)
}

/// Writes to a file, which must exist. The kernel takes the text of one write as a whole.
pub fn write(at: impl AsFd, path: impl AsRef<Path>, text: &str) -> Result<()> {
    rustix::io::write(open(at, path, OFlags::WRONLY)?, text.as_bytes()).map(drop)
}

fn open(at: impl AsFd, path: impl AsRef<Path>, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::openat(at, path.as_ref(), flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
}
