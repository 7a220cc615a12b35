//! Before a step, creates the files and directories that the step needs and the image lacks. After the step, removes
//! them. If oven is killed or the machine fails during the step, the files remain. In this case, the disk is discarded.
//!
//! A shim is a file that exists only while steps run. If the image has no file at the shim's path, two objects are
//! created. The shim's content is in a file with a hidden name, and the shim's path is a symlink to this file. So a
//! step can replace the symlink with its own file, and this file remains after the step. For example, a package may
//! contain `/usr/sbin/policy-rc.d`, or a script may write this file and remove it. `update-alternatives` replaces a
//! file only if it is a symlink. With a bind mount instead of a symlink, the step could neither replace nor remove the
//! file.

use super::paths::{ResolvedPath, has_content, keep_directory_times, resolve, write_new};
use crate::sandbox::RESOLV_CONF;
use crate::sandbox::spec::StepSpec;
use anyhow::{Context, Result};
use oven_distro::Shim;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The directories directly below the root over which a step mounts new file systems.
const API_DIRECTORIES: [&str; 4] = ["dev", "proc", "run", "sys"];

/// The objects that were created in an image for a step. Dropping this value removes the objects, and prints errors on
/// standard error. [`Placeholders::remove`] also removes them, but returns the first error.
pub(crate) struct Placeholders(Vec<Placeholder>);

struct Placeholder {
    dir: OwnedFd,
    name: OsString,
    device: u64,
    inode: u64,
    what: PlaceholderKind,
}

/// The kind of a placeholder.
enum PlaceholderKind {
    Directory,
    /// An empty file, for a bind mount.
    Empty,
    /// A symlink at a shim's path. The first field is the name of the symlink's target, a file in the same directory.
    /// The second field is the shim's content.
    Shim(OsString, Vec<u8>),
}

impl Placeholders {
    /// Creates the files and mount points of the step that the image lacks.
    pub fn make(root: BorrowedFd<'_>, spec: &StepSpec) -> Result<Self> {
        let mut made = Self(Vec::new());
        for name in API_DIRECTORIES {
            let place = resolve(root, Path::new(name), false)?;
            if place.found.is_none() {
                made.directories(&place, &place.rest).with_context(|| format!("making /{name}"))?;
            }
        }
        let shims = spec.shims.iter().map(|shim| (&*shim.path, Some(shim)));
        for (path, shim) in shims.chain(spec.network.then_some((RESOLV_CONF, None))) {
            let place = resolve(root, Path::new(path), false)?;
            if !place.in_run() && place.found.is_none() && !place.rest.is_empty() {
                made.file(&place, shim).with_context(|| format!("creating a mount point for {path}"))?;
            }
        }
        Ok(made)
    }

    /// Drops the value without removing the objects. Use this if the step's root is an overlay, because the whole
    /// overlay is discarded after the step.
    pub fn forget(mut self) {
        self.0.clear();
    }

    pub fn remove(mut self) -> Result<()> {
        self.remove_all()
    }

    fn directories(&mut self, place: &ResolvedPath, names: &[OsString]) -> Result<OwnedFd> {
        let mut dir = place.dir.try_clone()?;
        for name in names {
            rustix::fs::mkdirat(&dir, &**name, Mode::from_raw_mode(0o755))?;
            let next = self.record(dir, name, PlaceholderKind::Directory)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            dir = rustix::fs::openat(next, &**name, flags, Mode::empty())?;
        }
        Ok(dir)
    }

    fn file(&mut self, place: &ResolvedPath, shim: Option<&Shim>) -> Result<()> {
        let (name, parents) = place.rest.split_last().context("a path without a name")?;
        let dir = self.directories(place, parents)?;
        let Some(shim) = shim else {
            write_new(dir.as_fd(), name, b"", 0o644)?;
            self.record(dir, name, PlaceholderKind::Empty)?;
            return Ok(());
        };
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        let hidden = OsString::from(format!(".oven-{:016x}", u64::from_ne_bytes(bytes)));
        keep_directory_times(&dir, || {
            write_new(dir.as_fd(), &hidden, shim.content.as_bytes(), shim.mode)?;
            Ok(rustix::fs::symlinkat(&*hidden, &dir, &**name)?)
        })?;
        self.record(dir, name, PlaceholderKind::Shim(hidden, shim.content.clone().into_bytes()))?;
        Ok(())
    }

    /// Records an object that was created, so that the object is removed after the step. Returns the object's
    /// directory.
    fn record(&mut self, dir: OwnedFd, name: &OsStr, what: PlaceholderKind) -> Result<&OwnedFd> {
        let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let (name, device, inode) = (name.to_owned(), stat.st_dev, stat.st_ino);
        self.0.push(Placeholder { dir, name, device, inode, what });
        Ok(&self.0[self.0.len() - 1].dir)
    }

    fn remove_all(&mut self) -> Result<()> {
        let mut result = Ok(());
        while let Some(placeholder) = self.0.pop() {
            let removed = placeholder.remove();
            let removed =
                removed.with_context(|| format!("removing the step's temporary file {:?}", placeholder.name));
            result = result.and(removed);
        }
        result
    }
}

impl Placeholder {
    /// Removes the object if it is unchanged. If the step replaced the object or put files into it, the object remains.
    fn remove(&self) -> Result<()> {
        match &self.what {
            PlaceholderKind::Directory if self.is_unchanged(&self.name)? => {
                match rustix::fs::unlinkat(&self.dir, &*self.name, AtFlags::REMOVEDIR) {
                    Err(Errno::NOTEMPTY) => Ok(()), // the step put files into it, so it remains
                    result => Ok(result?),
                }
            }
            PlaceholderKind::Empty
                if self.is_unchanged(&self.name)? && self.file_has_content(&self.name, b"")? =>
            {
                Ok(rustix::fs::unlinkat(&self.dir, &*self.name, AtFlags::empty())?)
            }
            PlaceholderKind::Directory | PlaceholderKind::Empty => Ok(()),
            PlaceholderKind::Shim(hidden, content) => {
                keep_directory_times(&self.dir, || self.remove_shim(hidden, content))
            }
        }
    }

    fn remove_shim(&self, hidden: &OsStr, content: &[u8]) -> Result<()> {
        // If the step wrote to the shim through the symlink, the written file remains at the shim's path.
        let is_written = self.links_to(&self.name, hidden)? && !self.file_has_content(hidden, content)?;
        // `dpkg-divert` may have renamed the symlink, so all symlinks of the directory are checked.
        for name in std::iter::once(self.name.clone()).chain(self.links()?) {
            if self.links_to(&name, hidden)? {
                rustix::fs::unlinkat(&self.dir, &*name, AtFlags::empty())?;
            }
        }
        let done = if is_written {
            rustix::fs::renameat(&self.dir, hidden, &self.dir, &*self.name)
        } else {
            rustix::fs::unlinkat(&self.dir, hidden, AtFlags::empty())
        };
        match done {
            Err(Errno::NOENT) => Ok(()), // the step removed it
            done => Ok(done?),
        }
    }

    /// Returns whether the object with this name is the one that was created.
    fn is_unchanged(&self, name: &OsStr) -> Result<bool> {
        match rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            stat => stat.map(|s| (s.st_dev, s.st_ino) == (self.device, self.inode)).map_err(Into::into),
        }
    }

    /// Returns whether `name` is a symlink to `target`. The target is compared instead of the symlink's inode number,
    /// because a new symlink may have the inode number of a removed one.
    fn links_to(&self, name: &OsStr, target: &OsStr) -> Result<bool> {
        match rustix::fs::readlinkat(&self.dir, name, Vec::new()) {
            Err(Errno::NOENT | Errno::INVAL) => Ok(false),
            found => Ok(found?.as_bytes() == target.as_bytes()),
        }
    }

    fn file_has_content(&self, name: &OsStr, content: &[u8]) -> Result<bool> {
        has_content(self.dir.as_fd(), name, content)
    }

    /// Returns the symlinks in the object's directory.
    fn links(&self) -> Result<Vec<OsString>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut names = Vec::new();
        for entry in Dir::read_from(rustix::fs::openat(&self.dir, ".", flags, Mode::empty())?)? {
            let entry = entry?;
            if matches!(entry.file_type(), FileType::Symlink | FileType::Unknown) {
                names.push(OsStr::from_bytes(entry.file_name().to_bytes()).to_owned());
            }
        }
        Ok(names)
    }
}

impl Drop for Placeholders {
    fn drop(&mut self) {
        if let Err(error) = self.remove_all() {
            eprintln!("oven: {error:#}");
        }
    }
}
