//! Safe access to a directory tree that is not trusted.
//!
//! The kernel resolves every path inside the tree (`openat2`, `RESOLVE_IN_ROOT`). An absolute symlink starts at the
//! tree's own root, `..` does not leave the tree, and magic links are refused. A path of the tree is never joined to a
//! path of the host.

mod protection;
#[cfg(test)]
mod tests;

use super::limits::ReadMeter;
use crate::sys::lock::lock_mutex;
use crate::text::escape_name;
use anyhow::{Context, Result, bail};
use protection::ProtectedPaths;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;
use std::ffi::{CStr, CString, OsString};
use std::fmt::Display;
use std::fs::{File, Permissions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{PermissionsExt, fchown};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};

/// The maximum size of a file that oven itself reads. Release files, tables and lists of packages are small.
const READ_MAX: u64 = 16 << 20;
/// The memory in bytes that a name needs besides its own bytes.
const NAME_OVERHEAD: usize = 40;
/// The number of attempts to open a path. A look-up fails with EAGAIN if another process renames an object at the same
/// time.
const RETRIES: u32 = 32;

/// A directory tree. Paths are absolute and start at the tree's root. The leading `/` may be left out.
#[derive(Debug)]
pub struct ImageTree {
    dir: OwnedFd,
    meter: Arc<ReadMeter>,
    protected: Mutex<ProtectedPaths>,
}

/// The names in a directory.
pub(crate) struct NameList {
    pub names: Vec<CString>,
    /// The memory in bytes that the names need.
    pub size: usize,
}

impl ImageTree {
    /// `dir` is a descriptor of a directory. It may be an `O_PATH` descriptor.
    pub fn new(dir: OwnedFd) -> Self {
        Self::with_meter(dir, ReadMeter::default())
    }

    /// Like [`Self::new`], with other limits for reads.
    pub fn with_meter(dir: OwnedFd, meter: ReadMeter) -> Self {
        Self { dir, meter: Arc::new(meter), protected: Mutex::default() }
    }

    pub fn open_dir(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::openat(CWD, path, flags, Mode::empty());
        Ok(Self::new(dir.with_context(|| format!("opening {}", path.display()))?))
    }

    /// Returns the tree's root.
    pub fn dir(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Returns the counts of everything that was read.
    pub fn meter(&self) -> &Arc<ReadMeter> {
        &self.meter
    }

    pub(crate) fn protected(&self) -> MutexGuard<'_, ProtectedPaths> {
        lock_mutex(&self.protected)
    }

    /// Counts an object that is examined.
    pub(crate) fn count_object(&self) -> Result<()> {
        let inodes =
            || rustix::fs::fstatvfs(&self.dir).map_or(0, |stat| stat.f_files.saturating_sub(stat.f_ffree));
        self.meter.count_object(inodes)
    }

    /// Opens the object to which a path leads. Opening a FIFO does not block, and a terminal does not become the
    /// controlling terminal.
    pub(crate) fn open(&self, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { "/" } else { path };
        open_in(self.dir.as_fd(), path, flags, ResolveFlags::IN_ROOT)
    }

    /// Returns a file's content, or `None` if the file does not exist. Fails if it is not a regular file, or if it is
    /// larger than 16 MiB.
    pub fn read(&self, path: &str) -> Result<Option<Vec<u8>>> {
        self.read_at_most(path, READ_MAX)
    }

    /// Like [`Self::read`], with another limit in bytes.
    pub fn read_at_most(&self, path: &str, max: u64) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open_file(path)? else { return Ok(None) };
        self.content_of(file, path, max).map(Some)
    }

    /// Returns the content of an open file. `path` is the file's path, for messages. Fails if the file is larger than
    /// `max` bytes.
    pub(crate) fn content_of(&self, mut file: File, path: &str, max: u64) -> Result<Vec<u8>> {
        let doing = || format!("reading {} in the image", escape_name(path));
        let size = file.metadata().with_context(doing)?.len();
        let mut content = Vec::new();
        if size <= max {
            self.meter.count_content(size).with_context(doing)?;
            (&mut file).take(max + 1).read_to_end(&mut content).with_context(doing)?;
        }
        if size > max || content.len() as u64 > max {
            let max = if max < 1 << 20 { format!("{} KiB", max >> 10) } else { format!("{} MiB", max >> 20) };
            let path = escape_name(path);
            return Err(self.meter.exceeded(format!("{path} in the image is larger than {max}")));
        }
        Ok(content)
    }

    /// Returns the first `length` bytes of a file, or the whole file if it is shorter. Returns `None` if the file does
    /// not exist.
    pub fn read_start(&self, path: &str, length: u64) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open_file(path)? else { return Ok(None) };
        let mut content = Vec::new();
        file.take(length)
            .read_to_end(&mut content)
            .with_context(|| format!("reading {} in the image", escape_name(path)))?;
        Ok(Some(content))
    }

    /// Opens a regular file for reading. Returns `None` if the file does not exist.
    pub fn open_file(&self, path: &str) -> Result<Option<File>> {
        let doing = || format!("opening {} in the image", escape_name(path));
        self.count_object().with_context(doing)?;
        // The type is checked before the file is opened for reading, because opening a device or a FIFO can have side
        // effects.
        let Some(found) = absent(self.open(path, OFlags::PATH)).with_context(doing)? else { return Ok(None) };
        ensure_regular(&found, path)?;
        let Some(file) = absent(self.open(path, OFlags::RDONLY)).with_context(doing)? else {
            return Ok(None);
        };
        ensure_regular(&file, path)?;
        Ok(Some(File::from(file)))
    }

    /// Returns whether a path leads to an object. A dangling symlink does not.
    pub fn exists(&self, path: &str) -> Result<bool> {
        let doing = || format!("checking for {} in the image", escape_name(path));
        self.count_object().with_context(doing)?;
        Ok(absent(self.open(path, OFlags::PATH)).with_context(doing)?.is_some())
    }

    /// Returns the metadata of the directory to which a path leads, or `None` if there is no directory.
    pub fn directory(&self, path: &str) -> Result<Option<Stat>> {
        let doing = || format!("examining {} in the image", escape_name(path));
        self.count_object().with_context(doing)?;
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            found => Ok(Some(rustix::fs::fstat(&found.with_context(doing)?).with_context(doing)?)),
        }
    }

    /// Returns the metadata of the object itself. A symlink is not followed.
    pub fn metadata(&self, path: &str) -> Result<Option<Stat>> {
        let doing = || format!("examining {} in the image", escape_name(path));
        self.count_object().with_context(doing)?;
        let Some(found) = absent(self.open(path, OFlags::PATH | OFlags::NOFOLLOW)).with_context(doing)?
        else {
            return Ok(None);
        };
        Ok(Some(rustix::fs::fstat(&found).with_context(doing)?))
    }

    /// Returns the text of a symlink, or `None` if the object is not a symlink or does not exist.
    pub fn read_link(&self, path: &str) -> Result<Option<OsString>> {
        let doing = || format!("reading the link {} in the image", escape_name(path));
        self.count_object().with_context(doing)?;
        let Some(found) = absent(self.open(path, OFlags::PATH | OFlags::NOFOLLOW)).with_context(doing)?
        else {
            return Ok(None);
        };
        if FileType::from_raw_mode(rustix::fs::fstat(&found).with_context(doing)?.st_mode)
            != FileType::Symlink
        {
            return Ok(None);
        }
        let target = rustix::fs::readlinkat(&found, c"", Vec::new()).with_context(doing)?;
        Ok(Some(OsString::from_vec(target.into_bytes())))
    }

    /// Returns the sorted names in a directory. The list is empty if the directory does not exist.
    pub fn list(&self, path: &str) -> Result<Vec<OsString>> {
        let doing = || format!("listing {} in the image", escape_name(path));
        let dir = absent(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)).with_context(doing)?;
        let Some(dir) = dir else { return Ok(Vec::new()) };
        let list = self.names_of(&dir, &escape_name(path), self.meter.limits().names).with_context(doing)?;
        let mut names: Vec<_> =
            list.names.into_iter().map(|name| OsString::from_vec(name.into_bytes())).collect();
        names.sort_unstable();
        Ok(names)
    }

    /// Returns the names in an open directory, without `.` and `..`. They are not sorted. `shown` is the directory's
    /// path, for messages. Fails if the names need more than `max` bytes of memory.
    pub(crate) fn names_of(&self, dir: &OwnedFd, shown: &dyn Display, max: usize) -> Result<NameList> {
        let (mut names, mut size) = (Vec::new(), 0);
        names_in(dir, &mut |name| {
            self.count_object()?;
            size += memory_of(name);
            if size > max {
                let what = format!("the directory {shown} in the image, or one above it, has too many names");
                return Err(self.meter.exceeded(what));
            }
            names.push(name.to_owned());
            Ok(true)
        })?;
        Ok(NameList { names, size })
    }

    /// Writes a file under a temporary name, and then renames it to `path`. An existing file or symlink at `path` is
    /// replaced. `mode` does not depend on the umask. Missing parents are created with mode 0755, owned by root.
    pub fn write(&self, path: &str, content: &[u8], mode: u32, uid: u32, gid: u32) -> Result<()> {
        self.replace(path, mode, uid, gid, &mut |file| file.write_all(content))
    }

    /// Like [`Self::write`], with the content of an open file.
    pub fn write_from(&self, path: &str, source: &mut File, mode: u32, uid: u32, gid: u32) -> Result<()> {
        self.replace(path, mode, uid, gid, &mut |file| std::io::copy(source, file).map(drop))
    }

    fn replace(
        &self,
        path: &str,
        mode: u32,
        uid: u32,
        gid: u32,
        fill: &mut dyn FnMut(&mut File) -> std::io::Result<()>,
    ) -> Result<()> {
        let doing = || format!("writing {} in the image", escape_name(path));
        let (parent, name) = split(path)?;
        self.create_dir_all(&parent, 0o755)?;
        let dir = self.open_directory(&parent).with_context(doing)?;
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        let temporary = format!(".oven-{:016x}", u64::from_ne_bytes(bytes));
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut create = || rustix::fs::openat(&dir, &*temporary, flags, Mode::from_raw_mode(0o600));
        let shown = escape_name(path);
        let file = self.change(&dir, &*temporary, &shown, &mut create).with_context(doing)?;
        let mut file = File::from(file.result.with_context(doing)?);
        let written = fill(&mut file).and_then(|()| {
            // The owner is changed first, because a change of the owner clears setuid.
            fchown(&file, Some(uid), Some(gid))?;
            file.set_permissions(Permissions::from_mode(mode & 0o7777))
        });
        let mut rename = || rustix::fs::renameat(&dir, &*temporary, &dir, &*name);
        let placed = written.map_err(anyhow::Error::from).and_then(|()| {
            let renamed = self.change(&dir, &*name, &shown, &mut rename)?;
            renamed.result.map(|()| renamed.protection).map_err(anyhow::Error::from)
        });
        match placed {
            Ok(protection) if protection.is_empty() => Ok(()),
            Ok(protection) => self.protect(&file, protection, &shown),
            Err(error) => {
                let mut unlink = || rustix::fs::unlinkat(&dir, &*temporary, AtFlags::empty());
                _ = self.change(&dir, &*temporary, &shown, &mut unlink);
                Err(error).with_context(doing)
            }
        }
    }

    /// Removes a file or a symlink. A symlink is not followed. Returns false if nothing exists at the path.
    pub fn remove(&self, path: &str) -> Result<bool> {
        let doing = || format!("removing {} in the image", escape_name(path));
        let (parent, name) = split(path)?;
        let Some(dir) = absent(self.open_directory(&parent)).with_context(doing)? else { return Ok(false) };
        let mut unlink = || rustix::fs::unlinkat(&dir, &*name, AtFlags::empty());
        match self.change(&dir, &*name, &escape_name(path), &mut unlink).with_context(doing)?.result {
            Err(Errno::NOENT) => Ok(false),
            done => done.map(|()| true).with_context(doing),
        }
    }

    /// Empties a regular file. A symlink is not followed. Returns false if there is no regular file.
    pub fn truncate(&self, path: &str) -> Result<bool> {
        let doing = || format!("emptying {} in the image", escape_name(path));
        let opened = absent(self.open(path, OFlags::PATH | OFlags::NOFOLLOW)).with_context(doing)?;
        let Some(found) = opened.filter(|found| ensure_regular(found, path).is_ok()) else {
            return Ok(false);
        };
        drop(found);
        let (parent, name) = split(path)?;
        let Some(dir) = absent(self.open_directory(&parent)).with_context(doing)? else { return Ok(false) };
        let mut empty = || {
            let file =
                open_in(dir.as_fd(), &*name, OFlags::WRONLY | OFlags::NOFOLLOW, ResolveFlags::BENEATH)?;
            if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
                return Ok(false);
            }
            rustix::fs::ftruncate(&file, 0).map(|()| true)
        };
        match self.change(&dir, &*name, &escape_name(path), &mut empty).with_context(doing)?.result {
            // Another process replaced the file in the meantime.
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::ISDIR) => Ok(false),
            done => done.with_context(doing),
        }
    }

    /// Creates a directory and its missing parents with this mode, owned by root. Existing directories keep their mode.
    /// A symlink to a directory counts as a directory.
    pub fn create_dir_all(&self, path: &str, mode: u32) -> Result<()> {
        let doing = || format!("creating the directory {} in the image", escape_name(path));
        let path = normalize(path)?;
        if self.open_directory(&path).is_ok() {
            return Ok(());
        }
        let ends = path.match_indices('/').map(|(at, _)| at).skip(1).chain([path.len()]);
        for end in ends {
            let so_far = &path[..end];
            let known = absent(self.open_directory(so_far)).with_context(doing)?;
            if known.is_none() {
                let (parent, name) = split(so_far)?;
                let dir = self.open_directory(&parent).with_context(doing)?;
                let mut make = || rustix::fs::mkdirat(&dir, &*name, Mode::from_raw_mode(0o700));
                let made = self.change(&dir, &*name, &escape_name(so_far), &mut make).with_context(doing)?;
                match made.result {
                    Ok(()) => {}
                    Err(Errno::EXIST) => match self.read_link(so_far)? {
                        Some(to) => bail!(
                            "{} in the image is a symlink to {}, which does not exist",
                            escape_name(so_far),
                            escape_name(&to)
                        ),
                        None => bail!("{} in the image is not a directory", escape_name(so_far)),
                    },
                    Err(error) => return Err(error).with_context(doing),
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(&dir, &*name, flags, Mode::empty()).with_context(doing)?;
                let permissions = Permissions::from_mode(mode & 0o7777);
                File::from(made).set_permissions(permissions).with_context(doing)?;
            }
        }
        Ok(())
    }

    /// Opens the directory to which a path leads.
    fn open_directory(&self, path: &str) -> rustix::io::Result<OwnedFd> {
        self.open(path, OFlags::PATH | OFlags::DIRECTORY)
    }
}

/// Calls `openat2`. Retries while another process disturbs the look-up by a rename.
pub(crate) fn open_in<P: rustix::path::Arg + Copy>(
    dir: BorrowedFd<'_>,
    path: P,
    flags: OFlags,
    resolve: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    let mut flags = flags | OFlags::CLOEXEC;
    if !flags.contains(OFlags::PATH) {
        flags |= OFlags::NONBLOCK | OFlags::NOCTTY;
    }
    let resolve = resolve | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..RETRIES {
        match rustix::fs::openat2(dir, path, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            done => return done,
        }
    }
    Err(Errno::AGAIN)
}

/// Returns `None` if the object does not exist, or if the path goes through an object that is not a directory.
pub(crate) fn absent<T>(found: rustix::io::Result<T>) -> rustix::io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn ensure_regular(fd: &OwnedFd, path: &str) -> Result<()> {
    let stat =
        rustix::fs::fstat(fd).with_context(|| format!("examining {} in the image", escape_name(path)))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Ok(()),
        other => bail!("{} in the image is not a regular file but {}", escape_name(path), kind_name(other)),
    }
}

/// Returns the name of a file type in words.
pub fn kind_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symlink",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        FileType::Unknown => "something unknown",
    }
}

/// Makes a path absolute, without empty components and `.`. `..` is an error, because its meaning depends on symlinks.
fn normalize(path: &str) -> Result<String> {
    let parts: Vec<_> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    if parts.contains(&"..") {
        bail!("the path {} contains `..`", escape_name(path));
    }
    Ok(format!("/{}", parts.join("/")))
}

/// Returns the parent and the last name of a path.
pub(crate) fn split(path: &str) -> Result<(String, String)> {
    let path = normalize(path)?;
    match path.rsplit_once('/') {
        Some((parent, name)) if !name.is_empty() => Ok((format!("{parent}/"), name.to_owned())),
        _ => bail!("the path {} is the root directory", escape_name(&path)),
    }
}

/// Returns the memory in bytes that a name needs in a list.
pub(crate) fn memory_of(name: &CStr) -> usize {
    name.to_bytes().len() + NAME_OVERHEAD
}

/// Calls `take` with each name in an open directory, except `.` and `..`, until `take` returns false.
pub(crate) fn names_in(dir: &OwnedFd, take: &mut dyn FnMut(&CStr) -> Result<bool>) -> Result<()> {
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        if !matches!(name.to_bytes(), b"." | b"..") && !take(name)? {
            break;
        }
    }
    Ok(())
}

pub(crate) fn os_string(name: impl AsRef<CStr>) -> OsString {
    OsString::from_vec(name.as_ref().to_bytes().to_vec())
}
