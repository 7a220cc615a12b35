//! Computes `ami_config_checksum` with exactly the algorithm of GumGum's AMI Bakery, so that each tool finds the images
//! that the other tool baked.
//!
//! The checksum covers every file below the directories, except files whose name begins with a dot. It also covers the
//! files in directories whose name begins with a dot. The files are sorted by the bytes of their paths. A path begins
//! with the directory as the caller spelled it. The checksum is the SHA1 of the files' hexadecimal SHA1s, concatenated
//! without separators. A link to a file counts as its target. Links to directories are not followed.

#[cfg(test)]
mod tests;

use crate::config::toml_reader::kind_of;
use crate::definition::DIRECTORY_HINT;
use crate::error::Kind;
use crate::sys::fds::{GIT, PathRefusal, find_within};
use anyhow::Result;
use sha1::{Digest, Sha1};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The number of bytes that each thread reads at a time. It is large enough to make system calls cheap, and small
/// enough for the CPU's cache.
const BUFFER_BYTES: usize = 256 << 10;
/// The maximal number of threads. This many threads can read faster than any disk delivers data.
const MAX_THREADS: usize = 32;
/// When the metadata of files is read, one thread is used for each 512 files. For fewer files, starting another thread
/// takes longer than it saves.
const STAT_SHARE: usize = 512;

/// The checksum, and the files that it covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksum {
    /// 40 hexadecimal digits, in lower case.
    pub hex: String,
    /// The path and the SHA1 of each file, in the order in which the checksum covers the files.
    pub files: Vec<(OsString, String)>,
    /// Warnings about files that the user may not have intended to include.
    pub warnings: Vec<String>,
}

/// A file that the checksum covers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CountedFile {
    /// The directory as the caller spelled it, joined with the file's path below the directory.
    pub path: PathBuf,
    pub sha1: String,
    /// The owner's executable bit, which is the only bit that git stores.
    pub executable: bool,
    /// If the file is a symbolic link: the target, as the link spells it.
    pub link: Option<PathBuf>,
}

/// The files that the checksum covers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct DefinitionTree {
    /// Sorted by the bytes of their paths.
    pub files: Vec<CountedFile>,
    /// For each symbolic link to a directory, its path and its target as the link spells it. They are sorted by path.
    /// The checksum ignores these links.
    pub directory_links: Vec<(PathBuf, PathBuf)>,
    pub warnings: Vec<String>,
}

/// Computes the `ami_config_checksum` of the files in all these directories. Errors: [`Kind::Definition`], with the
/// file that cannot be part of the checksum.
pub fn config_checksum(directories: &[impl AsRef<Path>]) -> Result<Checksum> {
    config_checksum_within(directories, &|_| None)
}

/// Like [`config_checksum`], but links to files must not lead out of a project. `project` returns the canonical path of
/// the project of each directory.
pub fn config_checksum_within(
    directories: &[impl AsRef<Path>],
    project: &dyn Fn(&Path) -> Option<PathBuf>,
) -> Result<Checksum> {
    let tree = DefinitionTree::read_within(directories, project)?;
    let hex = tree.checksum();
    let files = tree.files.into_iter().map(|file| (file.path.into_os_string(), file.sha1)).collect();
    Ok(Checksum { hex, files, warnings: tree.warnings })
}

/// Writes bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn definition_error(path: &Path, what: impl std::fmt::Display) -> anyhow::Error {
    Kind::Definition.error(format!("{}: {what}", path.display()))
}

fn unreadable(path: &Path, error: std::io::Error) -> anyhow::Error {
    definition_error(path, format_args!("cannot be read: {error}"))
}

impl DefinitionTree {
    #[cfg(test)]
    pub fn read(directories: &[impl AsRef<Path>]) -> Result<Self> {
        Self::read_within(directories, &|_| None)
    }

    /// Reads the files of these directories. `project` returns the canonical path of the project of each directory.
    /// Links to files must not lead out of the project. If it is `None`, they may lead anywhere.
    pub fn read_within(
        directories: &[impl AsRef<Path>],
        project: &dyn Fn(&Path) -> Option<PathBuf>,
    ) -> Result<Self> {
        let mut tree = Self::default();
        for directory in directories.iter().map(AsRef::as_ref) {
            tree.walk(directory, project(directory).as_deref())?;
        }
        if tree.files.is_empty() {
            let names: Vec<_> = directories.iter().map(|d| d.as_ref().display().to_string()).collect();
            return Err(Kind::Definition
                .failure(format!("{}: no files found for the checksum", names.join(", ")))
                .hint("Files whose names begin with a dot are not part of the checksum.")
                .into());
        }
        // Compares bytes and not `Path`s, because `Path`s are compared by components, which puts a/x before a-b/x.
        tree.files.sort_by(|a, b| a.path.as_os_str().as_bytes().cmp(b.path.as_os_str().as_bytes()));
        tree.directory_links.sort();
        tree.examine()?;
        Ok(tree)
    }

    /// The checksum over the files' SHA1s.
    pub fn checksum(&self) -> String {
        let mut all = Sha1::new();
        self.files.iter().for_each(|file| all.update(&file.sha1));
        hex(&all.finalize())
    }

    /// Lists a directory tree. It does not recurse, so that a deep tree cannot exhaust the thread's stack.
    fn walk(&mut self, top: &Path, project: Option<&Path>) -> Result<()> {
        let metadata = std::fs::metadata(top).map_err(|e| match e.kind() {
            ErrorKind::NotFound => Kind::Definition
                .failure(format!("{}: directory not found", top.display()))
                .hint(DIRECTORY_HINT)
                .into(),
            _ => unreadable(top, e),
        })?;
        if !metadata.is_dir() {
            return Err(definition_error(top, format_args!("is {}, not a directory", kind_of(&metadata))));
        }
        let mut directories = vec![top.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).map_err(|e| unreadable(&directory, e))? {
                let entry = entry.map_err(|e| unreadable(&directory, e))?;
                let (path, name) = (entry.path(), entry.file_name());
                let kind = entry.file_type().map_err(|e| unreadable(&path, e))?;
                let is_hidden = name.as_bytes().starts_with(b".");
                if kind.is_dir() {
                    if name == ".git" {
                        self.warnings.push(format!(
                            "{} is in the definition. Its files are part of the checksum, so the checksum changes \
                             with each commit",
                            path.display()
                        ));
                    }
                    directories.push(path);
                } else if kind.is_symlink() {
                    self.add_link(path, is_hidden, project)?;
                } else if !is_hidden {
                    self.add_file(path, None);
                }
            }
        }
        Ok(())
    }

    /// Adds a symbolic link. A link to a file counts as that file. A link to a directory is not followed. It is
    /// recorded for the fingerprint, because a path in image.toml may lead through the link.
    fn add_link(&mut self, path: PathBuf, is_hidden: bool, project: Option<&Path>) -> Result<()> {
        let target = std::fs::metadata(&path);
        let is_directory = target.as_ref().is_ok_and(Metadata::is_dir);
        if is_hidden && !is_directory {
            return Ok(());
        }
        let link = std::fs::read_link(&path).map_err(|e| unreadable(&path, e))?;
        match target {
            Ok(_) if is_directory => self.directory_links.push((path, link)),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(definition_error(
                    &path,
                    format_args!("is a symbolic link to {}, which does not exist", link.display()),
                ));
            }
            // Any other error occurs again in `examine`, which reports it.
            _ => {
                if let Some(project) = project {
                    ensure_in_project(&path, project)?;
                }
                self.add_file(path, Some(link));
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: PathBuf, link: Option<PathBuf>) {
        self.files.push(CountedFile { path, sha1: String::new(), executable: false, link });
    }

    /// Reads the files' metadata and content on all cores. Large files are read first. Otherwise one core might still
    /// read a large file at the end, while the others have nothing to do.
    fn examine(&mut self) -> Result<()> {
        let files = &self.files;
        let mut order: Vec<usize> = (0..files.len()).collect();
        let metadata = on_all_cores(&order, STAT_SHARE, |index| {
            let path = &files[index].path;
            let metadata = std::fs::metadata(path).map_err(|e| unreadable(path, e))?;
            refuse_special(path, &metadata)?;
            Ok((metadata.len(), metadata.permissions().mode() & 0o100 != 0))
        })?;
        let metadata: HashMap<usize, (u64, bool)> = metadata.into_iter().collect();
        order.sort_by_key(|index| std::cmp::Reverse(metadata[index].0));
        let hashes = on_all_cores(&order, 1, |index| file_sha1(&files[index].path))?;
        for (index, sha1) in hashes {
            self.files[index].sha1 = sha1;
            self.files[index].executable = metadata[&index].1;
        }
        Ok(())
    }
}

/// Calls `work` for each index, in the order of `indexes`. It uses at most as many threads as there are cores, and at
/// most one thread for each `share` indexes. After a failure, all threads stop. If several calls fail, the failure with
/// the smallest index is returned.
fn on_all_cores<T: Send>(
    indexes: &[usize],
    share: usize,
    work: impl Fn(usize) -> Result<T> + Sync,
) -> Result<Vec<(usize, T)>> {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let threads = cores.min(MAX_THREADS).min(indexes.len() / share);
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let run = || {
        let mut done = Vec::new();
        while !failed.load(Ordering::Relaxed) {
            let Some(&index) = indexes.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
            let result = work(index);
            failed.fetch_or(result.is_err(), Ordering::Relaxed);
            done.push(result.map(|value| (index, value)).map_err(|e| (index, e)));
        }
        done
    };
    let done: Vec<_> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(run)).collect();
        let mut done = run();
        for thread in others {
            done.extend(thread.join().expect("listing and hashing do not panic"));
        }
        done
    });
    let mut results = Vec::with_capacity(done.len());
    let mut failures = Vec::new();
    for result in done {
        match result {
            Ok(result) => results.push(result),
            Err(failure) => failures.push(failure),
        }
    }
    match failures.into_iter().min_by_key(|(index, _)| *index) {
        Some((_, error)) => Err(error),
        None => Ok(results),
    }
}

/// Checks that a link to a file does not lead out of the project or into a `.git`. Otherwise the definition of a
/// stranger could make oven read any file of this machine. Git's own links may lead to git's own files.
fn ensure_in_project(path: &Path, project: &Path) -> Result<()> {
    let is_gits_own = path.components().any(|name| name.as_os_str() == GIT);
    match find_within(path, project) {
        Ok(_) => Ok(()),
        Err(PathRefusal::InGit(_)) if is_gits_own => Ok(()),
        Err(PathRefusal::Io(error)) => Err(unreadable(path, error)),
        Err(refused) => Err(Kind::Definition
            .failure(format!("{}: is a symbolic link that {refused}", path.display()))
            .hint(format!("Replace the link by a file, or by a link to a file in {}.", project.display()))
            .into()),
    }
}

fn refuse_special(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(definition_error(
        path,
        format_args!("is {}: only regular files can be part of the checksum", kind_of(metadata)),
    ))
}

fn file_sha1(path: &Path) -> Result<String> {
    thread_local! {
        static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into());
    }
    // With these flags, `open` does not block if a FIFO has replaced the file.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path);
    let mut file = file.map_err(|e| unreadable(path, e))?;
    refuse_special(path, &file.metadata().map_err(|e| unreadable(path, e))?)?;
    let mut hasher = Sha1::new();
    BUFFER.with_borrow_mut(|buffer| {
        loop {
            match file.read(buffer) {
                Ok(0) => return Ok(hex(&hasher.finalize())),
                Ok(count) => hasher.update(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => (),
                Err(e) => return Err(unreadable(path, e)),
            }
        }
    })
}
