//! Files that get a name only when they are complete.

use super::lock::try_lock_until_closed;
use super::space::no_space;
use crate::ids::RunId;
use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The prefix of named temporary files, for file systems without O_TMPFILE.
pub const TEMP_PREFIX: &str = ".copy-";

/// A file that is removed unless it gets a name. If the file was created with O_TMPFILE, it is removed even if this
/// process is killed.
#[derive(Debug)]
pub struct TempFile {
    file: File,
    /// The temporary name, which the file has only on a file system without O_TMPFILE. A lock on the file shows that
    /// oven is still writing it.
    name: Option<PathBuf>,
}

impl TempFile {
    /// Creates the file in the directory in which it will get its name.
    pub fn new(dir: &Path) -> Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::open(dir, flags, Mode::from_raw_mode(0o600)) {
            Ok(fd) => Ok(Self { file: fd.into(), name: None }),
            // EISDIR means that the kernel or file system does not know the flag.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::named(dir),
            Err(e) => Err(e).with_context(|| format!("creating a temporary file in {}", dir.display())),
        }
    }

    fn named(dir: &Path) -> Result<Self> {
        let name = dir.join(format!("{TEMP_PREFIX}{}", RunId::new()));
        let context = || format!("creating {}", name.display());
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&name)
            .with_context(context)?;
        // Another process that removes orphaned temporary files may have locked the new file already.
        if !try_lock_until_closed(&file).with_context(context)? {
            return Err(Errno::WOULDBLOCK).with_context(context);
        }
        Ok(Self { file, name: Some(name) })
    }

    /// Creates a temporary second name in `dir` for the file at `path`. `file` is this file, which the caller has
    /// opened and locked.
    pub fn linked(file: File, path: &Path, dir: &Path) -> std::io::Result<Self> {
        let name = dir.join(format!("{TEMP_PREFIX}{}", RunId::new()));
        std::fs::hard_link(path, &name)?;
        Ok(Self { file, name: Some(name) })
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Gives the file its name. Fails if the name exists.
    pub fn link(mut self, path: &Path) -> Result<()> {
        let context = || format!("naming {}", path.display());
        if let Some(name) = self.name.take() {
            let renamed = match rustix::fs::renameat_with(CWD, &name, CWD, path, RenameFlags::NOREPLACE) {
                // This file system does not support NOREPLACE. Another process could create a file at `path` between
                // the check and the rename. In a region and for preserved disks, paths contain random ids, so this does
                // not happen there. It can happen for the file of `oven export`, which would then be replaced.
                Err(Errno::INVAL) if !path.exists() => std::fs::rename(&name, path),
                result => result.map_err(std::io::Error::from),
            };
            return renamed.inspect_err(|_| self.name = Some(name)).with_context(context);
        }
        let nameless = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        rustix::fs::linkat(CWD, nameless.as_str(), CWD, path, AtFlags::SYMLINK_FOLLOW).with_context(context)
    }

    /// Gives the file a name. If another file has this name, the other file is replaced.
    pub fn replace(self, path: &Path) -> Result<()> {
        let (dir, name) = (path.parent().unwrap_or(Path::new(".")), RunId::new());
        let temporary = dir.join(format!("{TEMP_PREFIX}{name}"));
        self.link(&temporary)?;
        // If the rename fails, the temporary name is removed, because it would remain otherwise.
        let replaced =
            std::fs::rename(&temporary, path).inspect_err(|_| _ = std::fs::remove_file(&temporary));
        replaced.with_context(|| format!("replacing {}", path.display()))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            _ = std::fs::remove_file(name);
        }
    }
}

/// Writes a small file under a temporary name and renames it, so that concurrent writers do not interfere. If `durable`
/// is true, the file is synced before the renaming. To survive a power failure, the caller must also sync the
/// directory.
pub fn write_atomically(path: &Path, content: &[u8], durable: bool) -> Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let temporary = dir.join(format!("{TEMP_PREFIX}{}", RunId::new()));
    let write = || -> std::io::Result<()> {
        let mut file = File::options().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        if durable {
            file.sync_all()?;
        }
        std::fs::rename(&temporary, path)
    };
    write().map_err(|e| {
        _ = std::fs::remove_file(&temporary);
        match Errno::from_io_error(&e) {
            Some(Errno::NOSPC | Errno::DQUOT) => no_space(dir, content.len() as u64),
            _ => anyhow::Error::from(e).context(format!("writing {}", path.display())),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn files_get_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let temp = TempFile::new(dir.path()).unwrap();
        temp.file().write_all_at(b"one", 0).unwrap();
        temp.link(&path).unwrap();
        assert!(TempFile::new(dir.path()).unwrap().link(&path).is_err(), "the name is taken");
        let temp = TempFile::named(dir.path()).unwrap();
        assert!(temp.link(&path).is_err(), "the name is taken");
        let temp = TempFile::named(dir.path()).unwrap();
        temp.file().write_all_at(b"two", 0).unwrap();
        temp.replace(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        drop(TempFile::named(dir.path()).unwrap());
        std::fs::create_dir(dir.path().join("y")).unwrap();
        for temp in [TempFile::new(dir.path()), TempFile::named(dir.path())] {
            assert!(temp.unwrap().replace(&dir.path().join("y")).is_err(), "that is a directory");
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 2, "x and y");
    }
}
