//! What a step needs and the image lacks: made before the step, and removed after it together with the directories
//! made for it. A machine that fails in between loses nothing: the disk is thrown away.
//!
//! A file is made under another name, with a symlink to it, so that the step may put something of its own there, which
//! stays: a package may ship a `/usr/sbin/policy-rc.d`, alternatives lead there (they replace links alone), a script
//! write and remove one. What is bound over can be neither replaced nor removed.

use super::shims::{Place, holds, resolve, unnoticed, write_new};
use crate::sandbox::RESOLV_CONF;
use crate::sandbox::spec::Spec;
use anyhow::{Context, Result};
use oven_distro::Shim;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// What a step mounts of its own, directly below the root.
const API_DIRECTORIES: [&str; 4] = ["dev", "proc", "run", "sys"];

/// What was made in an image for a step, and goes with it. Dropping removes it, too, and tells of failures on standard
/// error; [`Placeholders::remove`] returns them.
pub(crate) struct Placeholders(Vec<Placeholder>);

struct Placeholder {
    dir: OwnedFd,
    name: OsString,
    device: u64,
    inode: u64,
    what: What,
}

/// What a placeholder is.
enum What {
    Directory,
    /// An empty file, for something to be bound over.
    Empty,
    /// A link to a shim with this name beside it, and this content.
    Shim(OsString, Vec<u8>),
}

impl Placeholders {
    /// Makes what the step will see or mount on, as far as the image lacks it.
    pub fn make(root: BorrowedFd<'_>, spec: &Spec) -> Result<Self> {
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
                made.file(&place, shim).with_context(|| format!("making a place for {path}"))?;
            }
        }
        Ok(made)
    }

    /// Leaves all in place: in an overlay, which goes as a whole.
    pub fn forget(mut self) {
        self.0.clear();
    }

    pub fn remove(mut self) -> Result<()> {
        self.remove_all()
    }

    fn directories(&mut self, place: &Place, names: &[OsString]) -> Result<OwnedFd> {
        let mut dir = place.dir.try_clone()?;
        for name in names {
            rustix::fs::mkdirat(&dir, &**name, Mode::from_raw_mode(0o755))?;
            let next = self.note(dir, name, What::Directory)?;
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            dir = rustix::fs::openat(next, &**name, flags, Mode::empty())?;
        }
        Ok(dir)
    }

    fn file(&mut self, place: &Place, shim: Option<&Shim>) -> Result<()> {
        let (name, parents) = place.rest.split_last().context("a path without a name")?;
        let dir = self.directories(place, parents)?;
        let Some(shim) = shim else {
            write_new(dir.as_fd(), name, b"", 0o644)?;
            self.note(dir, name, What::Empty)?;
            return Ok(());
        };
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        let beside = OsString::from(format!(".oven-{:016x}", u64::from_ne_bytes(bytes)));
        unnoticed(&dir, || {
            write_new(dir.as_fd(), &beside, shim.content.as_bytes(), shim.mode)?;
            Ok(rustix::fs::symlinkat(&*beside, &dir, &**name)?)
        })?;
        self.note(dir, name, What::Shim(beside, shim.content.clone().into_bytes()))?;
        Ok(())
    }

    /// Remembers what was made, and gives its directory.
    fn note(&mut self, dir: OwnedFd, name: &OsStr, what: What) -> Result<&OwnedFd> {
        let stat = rustix::fs::statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let (name, device, inode) = (name.to_owned(), stat.st_dev, stat.st_ino);
        self.0.push(Placeholder { dir, name, device, inode, what });
        Ok(&self.0[self.0.len() - 1].dir)
    }

    fn remove_all(&mut self) -> Result<()> {
        let mut result = Ok(());
        while let Some(placeholder) = self.0.pop() {
            let removed = placeholder.remove();
            let removed = removed.with_context(|| format!("removing a step's own {:?}", placeholder.name));
            result = result.and(removed);
        }
        result
    }
}

impl Placeholder {
    /// Removes it if it is still what was made: a step may have put something else there, or something into it.
    fn remove(&self) -> Result<()> {
        match &self.what {
            What::Directory if self.is(&self.name)? => {
                match rustix::fs::unlinkat(&self.dir, &*self.name, AtFlags::REMOVEDIR) {
                    Err(Errno::NOTEMPTY) => Ok(()), // the step's now
                    result => Ok(result?),
                }
            }
            What::Empty if self.is(&self.name)? && self.holds(&self.name, b"")? => {
                Ok(rustix::fs::unlinkat(&self.dir, &*self.name, AtFlags::empty())?)
            }
            What::Directory | What::Empty => Ok(()),
            What::Shim(beside, content) => unnoticed(&self.dir, || self.remove_shim(beside, content)),
        }
    }

    fn remove_shim(&self, beside: &OsStr, content: &[u8]) -> Result<()> {
        // Written to through the link: then it is what the step wants to be there.
        let kept = self.leads_to(&self.name, beside)? && !self.holds(beside, content)?;
        // Under whatever name: `dpkg-divert` moves aside what has a diverted one.
        for name in std::iter::once(self.name.clone()).chain(self.links()?) {
            if self.leads_to(&name, beside)? {
                rustix::fs::unlinkat(&self.dir, &*name, AtFlags::empty())?;
            }
        }
        let done = if kept {
            rustix::fs::renameat(&self.dir, beside, &self.dir, &*self.name)
        } else {
            rustix::fs::unlinkat(&self.dir, beside, AtFlags::empty())
        };
        match done {
            Err(Errno::NOENT) => Ok(()), // the step removed it
            done => Ok(done?),
        }
    }

    /// Whether what has this name is what was made.
    fn is(&self, name: &OsStr) -> Result<bool> {
        match rustix::fs::statat(&self.dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => Ok(false),
            stat => stat.map(|s| (s.st_dev, s.st_ino) == (self.device, self.inode)).map_err(Into::into),
        }
    }

    /// A new link may have an old one's inode; where it leads is told by its text.
    fn leads_to(&self, name: &OsStr, target: &OsStr) -> Result<bool> {
        match rustix::fs::readlinkat(&self.dir, name, Vec::new()) {
            Err(Errno::NOENT | Errno::INVAL) => Ok(false),
            found => Ok(found?.as_bytes() == target.as_bytes()),
        }
    }

    fn holds(&self, name: &OsStr, content: &[u8]) -> Result<bool> {
        holds(self.dir.as_fd(), name, content)
    }

    /// The symlinks in its directory.
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
