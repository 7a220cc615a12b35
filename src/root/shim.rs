//! Files that are there only while steps run.
//!
//! Where the image has such a file, the step's is bound over it, so that nothing is written into it. Where it has none
//! there is nothing to bind over: then the file is made before the step, and removed after it together with the
//! directories made for it. It is made under another name, with a symlink to it, so that the step may put something of
//! its own there, which stays: a package may ship a `/usr/sbin/policy-rc.d`, alternatives lead there (they replace
//! links alone), a script write and remove one. What is bound over can be neither replaced nor removed. A machine that
//! fails in between loses nothing: the disk is thrown away.

use super::step::mounts::{READ_ONLY, attach, copy, restrict};
use super::step::{Bind, RESOLV_CONF, Spec};
use crate::error::Kind;
use anyhow::{Context, Result, bail};
use oven_distro::Shim;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path};

/// Where the kernel gives up, too.
const MAX_LINKS: usize = 40;
/// Mounted anew in each step; a target below is simply made there.
const RUN: &str = "run";
/// What a step mounts of its own, directly below the root.
const API_DIRECTORIES: [&str; 4] = ["dev", "proc", "run", "sys"];

/// Where a path ends inside an image.
pub(super) struct Place {
    /// The deepest directory there is.
    pub dir: OwnedFd,
    /// The names of the directories down to `dir`, without links.
    pub real: Vec<OsString>,
    /// What follows below `dir`: nothing if the path is a directory; the last name alone if its directory is there.
    pub rest: Vec<OsString>,
    /// What has the last name, if it is there and no directory.
    pub found: Option<Stat>,
}

impl Place {
    fn in_run(&self) -> bool {
        self.real.iter().chain(&self.rest).next().is_some_and(|first| first == RUN)
    }

    fn is_file(&self, content: &[u8], mode: u32) -> Result<bool> {
        let same_mode = |stat: &Stat| stat.st_mode & 0o777 == mode & 0o777;
        Ok(self.found.as_ref().is_some_and(same_mode) && holds(self.dir.as_fd(), &self.rest[0], content)?)
    }
}

/// Follows a path inside `root`, one name at a time, as the kernel would if `root` were `/`. `follow`: also a link
/// that is the last name.
pub(super) fn resolve(root: BorrowedFd<'_>, path: &Path, follow: bool) -> Result<Place> {
    let mut dirs: Vec<(OwnedFd, OsString)> = Vec::new();
    let mut queue = names(path);
    let mut links = 0;
    while let Some(name) = queue.pop_front() {
        if name == ".." {
            dirs.pop();
            continue;
        }
        let dir = dirs.last().map_or(root, |(dir, _)| dir.as_fd());
        let stat = match rustix::fs::statat(dir, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => {
                if queue.iter().any(|name| name == "..") {
                    bail!("{} leads out of a directory that is not there", path.display());
                }
                return place(root, dirs, std::iter::once(name).chain(queue).collect(), None);
            }
            Err(error) => return Err(error).with_context(|| format!("looking at {}", path.display())),
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink if follow || !queue.is_empty() => {
                links += 1;
                if links > MAX_LINKS {
                    bail!("{} goes round in links", path.display());
                }
                let target = rustix::fs::readlinkat(dir, &*name, Vec::new())
                    .with_context(|| format!("reading a link of {}", path.display()))?;
                let target = Path::new(OsStr::from_bytes(target.as_bytes()));
                if target.is_absolute() {
                    dirs.clear();
                }
                let mut rest = names(target);
                rest.append(&mut queue);
                queue = rest;
            }
            FileType::Directory => {
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let next = rustix::fs::openat(dir, &*name, flags, Mode::empty())
                    .with_context(|| format!("opening a directory of {}", path.display()))?;
                dirs.push((next, name));
            }
            _ if queue.is_empty() => return place(root, dirs, vec![name], Some(stat)),
            _ => bail!("{} leads through {name:?}, which is not a directory", path.display()),
        }
    }
    place(root, dirs, Vec::new(), None)
}

fn place(
    root: BorrowedFd<'_>,
    dirs: Vec<(OwnedFd, OsString)>,
    rest: Vec<OsString>,
    found: Option<Stat>,
) -> Result<Place> {
    let mut real = Vec::new();
    let mut dir = None;
    for (fd, name) in dirs {
        dir = Some(fd);
        real.push(name);
    }
    let dir = match dir {
        Some(dir) => dir,
        None => root.try_clone_to_owned().context("copying a descriptor")?,
    };
    Ok(Place { dir, real, rest, found })
}

fn names(path: &Path) -> VecDeque<OsString> {
    let name = |part| match part {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        _ => None,
    };
    path.components().filter_map(name).collect()
}

/// What was made in an image for a step, and goes with it. Dropping removes it, too, and tells of failures on standard
/// error; [`Placeholders::remove`] returns them.
pub(super) struct Placeholders(Vec<Placeholder>);

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
        write_new(dir.as_fd(), &beside, shim.content.as_bytes(), shim.mode)?;
        rustix::fs::symlinkat(&*beside, &dir, &**name)?;
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
            What::Shim(beside, content) => self.remove_shim(beside, content),
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

/// Puts files into a step's view of an image; runs in the step's mount namespace, `/run` being mounted already.
pub(super) struct Shims<'a> {
    pub root: BorrowedFd<'a>,
    /// A file system of this step alone, mounted out of the image's reach.
    pub scratch: BorrowedFd<'a>,
    pub count: usize,
}

impl Shims<'_> {
    /// A file at `path`: in the step's own `/run` if the path leads there (a link may), else bound over the very name,
    /// so that a link stays what it is and its target, too.
    pub fn put(&mut self, path: &str, content: &[u8], mode: u32) -> Result<()> {
        let place = resolve(self.root, Path::new(path), false)?;
        if place.in_run() {
            return write_in_run(&place, content, mode);
        }
        if place.rest.is_empty() {
            return Err(Kind::Step
                .failure(format!("the image's {path} is a directory, where a step needs a file"))
                .hint("Make it a file in the base image.")
                .into());
        }
        let link = |stat: &Stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
        if place.found.as_ref().is_some_and(link) {
            match resolve(self.root, Path::new(path), true) {
                Ok(target) if target.in_run() && !target.rest.is_empty() => {
                    return write_in_run(&target, content, mode);
                }
                // Made for this step, or as good as that.
                Ok(target) if target.is_file(content, mode)? => return Ok(()),
                _ => {} // wherever it leads: it is covered itself
            }
        }
        self.count += 1;
        let name = format!("shim{}", self.count);
        write_new(self.scratch, OsStr::new(&name), content, mode)?;
        let cover = copy(self.scratch, &name, false)?;
        restrict(&cover, READ_ONLY, false)?;
        attach(cover, open_last(&place)?)?;
        Ok(())
    }

    /// A file or directory of this machine, read-only.
    pub fn bind(&self, bind: &Bind) -> Result<()> {
        let opened = open_within(&bind.source, bind.within.as_deref(), OFlags::PATH)?;
        let source =
            copy(&opened, "", false).with_context(|| format!("opening {}", bind.source.display()))?;
        restrict(&source, READ_ONLY, false)?;
        let stat = rustix::fs::fstat(&source)?;
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let place = resolve(self.root, Path::new(&bind.target), true)?;
        if !place.in_run() && place.found.is_none() && !place.rest.is_empty() {
            bail!("the image has no {}", bind.target);
        }
        let on = if place.in_run() && place.found.is_none() && !place.rest.is_empty() {
            make_in_run(&place, directory)?
        } else if place.rest.is_empty() {
            place.dir.try_clone()?
        } else {
            open_last(&place)?
        };
        let target = FileType::from_raw_mode(rustix::fs::fstat(&on)?.st_mode) == FileType::Directory;
        if target != directory {
            let what = |directory| if directory { "a directory" } else { "a file" };
            bail!(
                "{} is {}, the image's {} {}",
                bind.source.display(),
                what(directory),
                bind.target,
                what(target)
            );
        }
        attach(source, on)?;
        Ok(())
    }
}

/// Opens something of this machine that has to lie in a directory, whose path is canonical. What was opened is looked
/// at, not the path: nobody can exchange it afterwards.
pub(super) fn open_within(path: &Path, within: Option<&Path>, flags: OFlags) -> Result<OwnedFd> {
    let opening = || format!("opening {}", path.display());
    let fd = rustix::fs::openat(rustix::fs::CWD, path, flags | OFlags::CLOEXEC, Mode::empty());
    let fd = fd.with_context(opening)?;
    let Some(within) = within else { return Ok(fd) };
    let real = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).with_context(opening)?;
    if !real.starts_with(within) {
        let (path, real, within) = (path.display(), real.display(), within.display());
        return Err(Kind::Definition
            .failure(format!("{path} leads to {real}, out of the project {within}"))
            .hint("It did not when the definition was read. Leave it alone while it is baked.")
            .into());
    }
    Ok(fd)
}

fn open_last(place: &Place) -> Result<OwnedFd> {
    let name = place.rest.first().context("a path without a name")?;
    if place.rest.len() > 1 || place.found.is_none() {
        bail!("the image has no {name:?} there");
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&place.dir, name.as_os_str(), flags, Mode::empty())?)
}

/// Makes a mount point in the step's own `/run`.
fn make_in_run(place: &Place, directory: bool) -> Result<OwnedFd> {
    let (last, parents) = place.rest.split_last().context("a path without a name")?;
    let dir = make_parents(&place.dir, parents)?;
    if directory {
        rustix::fs::mkdirat(&dir, last.as_os_str(), Mode::from_raw_mode(0o755))?;
    } else {
        write_new(dir.as_fd(), last, b"", 0o644)?;
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&dir, last.as_os_str(), flags, Mode::empty())?)
}

fn write_in_run(place: &Place, content: &[u8], mode: u32) -> Result<()> {
    let Some((last, parents)) = place.rest.split_last() else { bail!("it is a directory") };
    if place.found.is_some() {
        bail!("there is one already");
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

fn write_new(dir: BorrowedFd<'_>, name: &OsStr, content: &[u8], mode: u32) -> Result<OwnedFd> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o600))?);
    let written = file.write_all(content);
    if written.is_err() {
        _ = rustix::fs::unlinkat(dir, name, AtFlags::empty()); // the disk is full
    }
    written?;
    rustix::fs::fchmod(&file, Mode::from_raw_mode(mode & 0o777))?;
    Ok(file.into())
}

/// Whether a name is that of a regular file with this content.
fn holds(dir: BorrowedFd<'_>, name: &OsStr, content: &[u8]) -> Result<bool> {
    let is_like_it = |stat: &Stat| {
        FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile && stat.st_size == content.len() as i64
    };
    match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(false),
        stat if !is_like_it(&stat?) => return Ok(false),
        _ => {}
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(dir, name, flags, Mode::empty())?);
    let mut found = Vec::new();
    Ok(is_like_it(&rustix::fs::fstat(&file)?) && {
        (&mut file).take(content.len() as u64 + 1).read_to_end(&mut found)?;
        found == content
    })
}
