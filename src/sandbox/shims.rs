//! Places shims and bind mounts in a step's view of an image. A shim is a file that exists only while steps run.
//!
//! If the image has a file with the same path, the shim is mounted over that file, and nothing is written into the
//! image. If the image has no such file, the module `mountpoints` first creates a placeholder in the image.

use super::paths::{ResolvedPath, resolve, write_new};
use super::spec::BindMount;
use crate::error::Kind;
use crate::sys::fds::open_path;
use crate::sys::mount::api::{READ_ONLY, attach, clone_mount, new_file_system, restrict};
use anyhow::{Context, Result, bail};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::ffi::{OsStr, OsString};
use std::path::Path;

/// Places files in a step's view of an image. It is used in the step's mount namespace, after `/run` is mounted.
pub(crate) struct ShimMounter<'a> {
    pub root: BorrowedFd<'a>,
    /// A file system of this step that programs of the image cannot access.
    pub scratch: BorrowedFd<'a>,
    pub count: usize,
}

impl ShimMounter<'_> {
    /// Places a file at `path`. If the path leads to the step's own `/run` (possibly through a link), the file is
    /// created there. Otherwise the file is mounted over the path's last name. If the last name is a link, the mount
    /// covers the link, and the link's target does not change.
    pub fn put(&mut self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        let place = resolve(self.root, Path::new(path), false)?;
        if place.in_run() {
            return write_in_run(&place, content, mode);
        }
        if place.rest.is_empty() {
            return Err(Kind::Step
                .failure(format!("the image's {path} is a directory, but steps need a file with this path"))
                .hint("Make it a file in the base image.")
                .into());
        }
        let is_link = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        if place.found.as_ref().is_some_and(is_link) {
            match resolve(self.root, Path::new(path), true) {
                Ok(target) if target.in_run() && !target.rest.is_empty() => {
                    return write_in_run(&target, content, mode);
                }
                // The link leads to a file with the shim's content and mode, so nothing has to be bound. Usually, that
                // file is the placeholder of this shim.
                Ok(target) if target.is_file(content, mode)? => return Ok(()),
                _ => {} // in all other cases, the link itself is covered
            }
        }
        self.count += 1;
        let name = format!("shim{}", self.count);
        write_new(self.scratch, OsStr::new(&name), content, mode)?;
        let cover = clone_mount(self.scratch, &name, false)?;
        restrict(&cover, READ_ONLY, false)?;
        attach(cover, open_last(&place)?)?;
        Ok(())
    }

    /// Binds a file or directory of this machine, read-only.
    pub fn bind(&mut self, bind: &BindMount) -> Result<()> {
        let opened = open_path(&bind.source, bind.within.as_deref())?;
        let source =
            clone_mount(&opened, "", false).with_context(|| format!("opening {}", bind.source.display()))?;
        restrict(&source, READ_ONLY, false)?;
        let stat = rustix::fs::fstat(&source)?;
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let place = resolve(self.root, Path::new(&bind.target), true)?;
        if !place.in_run() && place.found.is_none() && !place.rest.is_empty() {
            bail!("{} was not found in the image", bind.target);
        }
        let mount_point = if place.in_run() && place.found.is_none() && !place.rest.is_empty() {
            make_in_run(&place, is_directory)?
        } else if place.rest.is_empty() {
            place.dir.try_clone()?
        } else {
            open_last(&place)?
        };
        let is_target_directory =
            FileType::from_raw_mode(rustix::fs::fstat(&mount_point)?.st_mode) == FileType::Directory;
        if is_target_directory != is_directory {
            let what = |is_directory| if is_directory { "a directory" } else { "a file" };
            bail!(
                "{} is {}, but the image's {} is {}",
                bind.source.display(),
                what(is_directory),
                bind.target,
                what(is_target_directory)
            );
        }
        attach(&source, mount_point)?;
        for path in &bind.hidden {
            self.hide(source.as_fd(), path).with_context(|| format!("hiding {}", path.display()))?;
        }
        Ok(())
    }

    /// Mounts an empty directory or an empty file over a path of a mounted tree.
    fn hide(&mut self, tree: BorrowedFd<'_>, path: &Path) -> Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let on = match rustix::fs::openat2(tree, path, flags, Mode::empty(), resolve) {
            Err(Errno::NOENT) => return Ok(()),
            on => on?,
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&on)?.st_mode) == FileType::Directory {
            let empty = new_file_system("tmpfs", &[("mode", "0555"), ("nr_inodes", "2")], READ_ONLY)?;
            return Ok(attach(empty, on)?);
        }
        self.count += 1;
        let name = format!("hidden{}", self.count);
        write_new(self.scratch, OsStr::new(&name), b"", 0o444)?;
        let empty = clone_mount(self.scratch, &name, false)?;
        restrict(&empty, READ_ONLY, false)?;
        Ok(attach(empty, on)?)
    }
}

fn open_last(place: &ResolvedPath) -> Result<OwnedFd> {
    let name = place.rest.first().context("a path without a name")?;
    if place.rest.len() > 1 || place.found.is_none() {
        bail!("the directory in the image does not contain {name:?}");
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&place.dir, name.as_os_str(), flags, Mode::empty())?)
}

/// Creates a mount point in the step's own `/run`.
fn make_in_run(place: &ResolvedPath, is_directory: bool) -> Result<OwnedFd> {
    let (last, parents) = place.rest.split_last().context("a path without a name")?;
    let dir = make_parents(&place.dir, parents)?;
    if is_directory {
        rustix::fs::mkdirat(&dir, last.as_os_str(), Mode::from_raw_mode(0o755))?;
    } else {
        write_new(dir.as_fd(), last, b"", 0o644)?;
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&dir, last.as_os_str(), flags, Mode::empty())?)
}

fn write_in_run(place: &ResolvedPath, content: &[u8], mode: u32) -> Result<()> {
    let Some((last, parents)) = place.rest.split_last() else { bail!("it is a directory") };
    if place.found.is_some() {
        bail!("it exists already");
    }
    write_new(make_parents(&place.dir, parents)?.as_fd(), last, content, mode).map(drop)
}

fn make_parents(dir: &OwnedFd, names: &[OsString]) -> Result<OwnedFd> {
    let mut dir = dir.try_clone()?;
    for name in names {
        rustix::fs::mkdirat(&dir, name.as_os_str(), Mode::from_raw_mode(0o755))?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        dir = rustix::fs::openat(&dir, name.as_os_str(), flags, Mode::empty())?;
    }
    Ok(dir)
}
