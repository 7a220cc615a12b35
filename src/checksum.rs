//! `ami_config_checksum`: the algorithm of GumGum's AMI Bakery, exactly, so that an image baked by either is found by
//! the other.
//!
//! Every file below the directories whose own name does not begin with a dot, sorted by the bytes of its path as
//! spelt; the SHA1 of each; the SHA1 of those, in hexadecimal, with nothing between. Links to files count as what they
//! lead to, links to directories are not followed.

use crate::document::kind_of;
use crate::error::Kind;
use anyhow::{Context, Result};
use sha1::{Digest, Sha1};
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Read at a time by each thread: large enough that system calls do not show, small enough for the cache.
const BUFFER: usize = 256 << 10;
/// Threads beyond this find no disk that feeds them.
const MAX_THREADS: usize = 32;

/// The answer, and what it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksum {
    /// 40 digits, in lower case.
    pub hex: String,
    /// Path as spelt and SHA1, in the order in which they count.
    pub files: Vec<(OsString, String)>,
    /// What the user may not have meant.
    pub warnings: Vec<String>,
}

/// A file that counts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Counted {
    /// As spelt: a directory as it was given, and the way from there.
    pub path: PathBuf,
    pub sha1: String,
    /// The owner's bit, as git keeps it.
    pub executable: bool,
    /// What it says, if it is a symbolic link.
    pub link: Option<PathBuf>,
}

/// Directories, as the checksum sees them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Tree {
    /// Sorted by the bytes of their paths.
    pub files: Vec<Counted>,
    /// Symbolic links to directories, and what they say; sorted. The checksum passes over them.
    pub directory_links: Vec<(PathBuf, PathBuf)>,
    pub warnings: Vec<String>,
}

/// `ami_config_checksum` of these directories, taken as one list of files. A failure names the file that cannot count.
pub fn config_checksum(directories: &[impl AsRef<Path>]) -> Result<Checksum> {
    let tree = Tree::read(directories)?;
    let hex = tree.checksum();
    let files = tree.files.into_iter().map(|file| (file.path.into_os_string(), file.sha1)).collect();
    Ok(Checksum { hex, files, warnings: tree.warnings })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn wrong(path: &Path, what: impl std::fmt::Display) -> anyhow::Error {
    Kind::Definition.error(format!("{}: {what}", path.display()))
}

impl Tree {
    pub fn read(directories: &[impl AsRef<Path>]) -> Result<Self> {
        let mut tree = Self::default();
        let mut sizes = Vec::new();
        for directory in directories {
            tree.walk(directory.as_ref(), &mut sizes)?;
        }
        if tree.files.is_empty() {
            let names: Vec<_> = directories.iter().map(|d| d.as_ref().display().to_string()).collect();
            return Err(Kind::Definition
                .failure(format!("{}: there is no file that counts", names.join(", ")))
                .hint("Files whose own name begins with a dot do not count.")
                .into());
        }
        tree.hash(&sizes)?;
        // By bytes: `Path` compares by component, and puts a/x before a-b/x.
        tree.files.sort_by(|a, b| a.path.as_os_str().as_bytes().cmp(b.path.as_os_str().as_bytes()));
        tree.directory_links.sort();
        Ok(tree)
    }

    /// The checksum over the files' own.
    pub fn checksum(&self) -> String {
        let mut all = Sha1::new();
        self.files.iter().for_each(|file| all.update(&file.sha1));
        hex(&all.finalize())
    }

    /// Lists a directory and those below it. The stack is ours: a deep tree cannot exhaust the thread's.
    fn walk(&mut self, top: &Path, sizes: &mut Vec<u64>) -> Result<()> {
        let metadata = std::fs::metadata(top).map_err(|e| match e.kind() {
            ErrorKind::NotFound => wrong(top, "there is no such directory"),
            _ => wrong(top, format_args!("cannot be read: {e}")),
        })?;
        if !metadata.is_dir() {
            return Err(wrong(top, format_args!("is {}, not a directory", kind_of(&metadata))));
        }
        let mut directories = vec![top.to_owned()];
        while let Some(directory) = directories.pop() {
            let unreadable = |e| wrong(&directory, format_args!("cannot be listed: {e}"));
            for entry in std::fs::read_dir(&directory).map_err(unreadable)? {
                let entry = entry.map_err(unreadable)?;
                let (path, name) = (entry.path(), entry.file_name());
                let kind = entry.file_type().map_err(unreadable)?;
                let hidden = name.as_bytes().starts_with(b".");
                if kind.is_dir() {
                    if name == ".git" {
                        self.warnings.push(format!(
                            "{} is inside, and files in hidden directories count: the checksum changes with each \
                             commit",
                            path.display()
                        ));
                    }
                    directories.push(path);
                    continue;
                }
                let target = kind.is_symlink().then(|| std::fs::metadata(&path));
                if matches!(&target, Some(Ok(target)) if target.is_dir()) {
                    let link = std::fs::read_link(&path).map_err(|e| wrong(&path, e))?;
                    self.directory_links.push((path, link));
                } else if !hidden {
                    let metadata = target.unwrap_or_else(|| entry.metadata());
                    self.file(path, kind.is_symlink(), metadata, sizes)?;
                }
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        path: PathBuf,
        is_link: bool,
        metadata: std::io::Result<Metadata>,
        sizes: &mut Vec<u64>,
    ) -> Result<()> {
        let link = match is_link.then(|| std::fs::read_link(&path)).transpose() {
            Ok(link) => link,
            Err(e) => return Err(wrong(&path, format_args!("cannot be read: {e}"))),
        };
        let metadata = metadata.map_err(|e| match (&link, e.kind()) {
            (Some(link), ErrorKind::NotFound) => {
                let link = link.display();
                wrong(&path, format_args!("is a symbolic link to {link}, which does not exist"))
            }
            _ => wrong(&path, format_args!("cannot be read: {e}")),
        })?;
        if !metadata.is_file() {
            return Err(wrong(&path, format_args!("is {}: only files can count", kind_of(&metadata))));
        }
        sizes.push(metadata.len());
        let executable = metadata.permissions().mode() & 0o100 != 0;
        self.files.push(Counted { path, sha1: String::new(), executable, link });
        Ok(())
    }

    /// Fills in the files' checksums, on all cores. Large files go first, so that none is left for the end.
    fn hash(&mut self, sizes: &[u64]) -> Result<()> {
        let mut order: Vec<usize> = (0..self.files.len()).collect();
        order.sort_by_key(|index| std::cmp::Reverse(sizes[*index]));
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = cores.min(MAX_THREADS).min(order.len());
        let next = AtomicUsize::new(0);
        let files = &self.files;
        let work = || {
            let mut buffer = vec![0u8; BUFFER];
            let mut done = Vec::new();
            while let Some(&index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                let hash = file_sha1(&files[index].path, &mut buffer);
                // The others stop, too.
                if hash.is_err() {
                    next.store(order.len(), Ordering::Relaxed);
                }
                done.push((index, hash));
            }
            done
        };
        let done: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
            let mine = work();
            let others =
                threads.into_iter().flat_map(|thread| thread.join().expect("hashing does not panic"));
            mine.into_iter().chain(others).collect()
        });
        for (index, hash) in done {
            self.files[index].sha1 = hash?;
        }
        Ok(())
    }
}

fn file_sha1(path: &Path, buffer: &mut [u8]) -> Result<String> {
    // Should a FIFO have taken the file's place, it does not block us.
    let mut file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(path)
        .map_err(|e| wrong(path, format_args!("cannot be read: {e}")))?;
    let metadata = file.metadata().with_context(|| format!("examining {}", path.display()))?;
    if !metadata.is_file() {
        return Err(wrong(path, format_args!("is {}: only files can count", kind_of(&metadata))));
    }
    let mut hasher = Sha1::new();
    loop {
        match file.read(buffer) {
            Ok(0) => break,
            Ok(count) => hasher.update(&buffer[..count]),
            Err(e) if e.kind() == ErrorKind::Interrupted => (),
            Err(e) => return Err(wrong(path, format_args!("cannot be read: {e}"))),
        }
    }
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests;
