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
use crate::sys::fds::{
    GIT, PathRefusal, find_within, find_within_or_in_git, list_found_directory, open_found_file,
};
use crate::sys::signals;
use anyhow::Result;
use sha1::{Digest, Sha1};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsString;
use std::fs::{File, Metadata, ReadDir};
use std::io::{ErrorKind, Read};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The number of bytes that each thread reads at a time. It is large enough to make system calls cheap, and small
/// enough for the CPU's cache.
const BUFFER_BYTES: usize = 256 << 10;
/// The maximal number of threads. This many threads can read faster than any disk delivers data.
const MAX_THREADS: usize = 32;
/// When the metadata of files is read, one thread is used for each 512 files. For fewer files, starting another thread
/// takes longer than it saves.
const STAT_SHARE: usize = 512;
/// The maximal number of files, directories and links in a definition's directories. A definition has far fewer. With
/// this limit, and the next one, a bake needs less than 256 MiB of memory.
pub(crate) const MAX_OBJECTS: usize = 100_000;
/// The maximal size in bytes of the paths of these objects together. Each path may have 4096 bytes.
const MAX_PATH_BYTES: usize = 16 << 20;

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
    /// The canonical path of the project that must contain the file. `None` if the file may be anywhere.
    project: Option<Arc<Path>>,
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
    Kind::Definition.of_io(&error).error(format!("{}: cannot be read: {error}", path.display()))
}

impl DefinitionTree {
    #[cfg(test)]
    pub fn read(directories: &[impl AsRef<Path>]) -> Result<Self> {
        Self::read_within(directories, &|_| None)
    }

    /// Reads the files of these directories. `project` returns the canonical path of the project of each directory.
    /// Links to files must not lead out of the project. If it is `None`, they may lead anywhere.
    ///
    /// Errors: [`Kind::Interrupted`] if a signal asked this process to end.
    pub fn read_within(
        directories: &[impl AsRef<Path>],
        project: &dyn Fn(&Path) -> Option<PathBuf>,
    ) -> Result<Self> {
        TreeReader::new(&signals::is_stop_requested).read(directories, project)
    }

    /// The checksum over the files' SHA1s.
    pub fn checksum(&self) -> String {
        let mut all = Sha1::new();
        self.files.iter().for_each(|file| all.update(&file.sha1));
        hex(&all.finalize())
    }
}

/// Reads the files of directories.
struct TreeReader<'a> {
    tree: DefinitionTree,
    /// The numbers of objects and of bytes of paths that may still be found.
    objects_left: usize,
    path_bytes_left: usize,
    is_stop_requested: &'a (dyn Fn() -> bool + Sync),
}

impl<'a> TreeReader<'a> {
    fn new(is_stop_requested: &'a (dyn Fn() -> bool + Sync)) -> Self {
        let tree = DefinitionTree::default();
        Self { tree, objects_left: MAX_OBJECTS, path_bytes_left: MAX_PATH_BYTES, is_stop_requested }
    }

    fn read(
        mut self,
        directories: &[impl AsRef<Path>],
        project: &dyn Fn(&Path) -> Option<PathBuf>,
    ) -> Result<DefinitionTree> {
        for directory in directories.iter().map(AsRef::as_ref) {
            self.walk(directory, project(directory).map(Arc::from).as_ref())?;
        }
        let tree = &mut self.tree;
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
        self.examine()?;
        Ok(self.tree)
    }

    /// Fails if a signal asked this process to end.
    fn check_stop(&self) -> Result<()> {
        if (self.is_stop_requested)() { Err(Kind::Interrupted.error("interrupted")) } else { Ok(()) }
    }

    /// Counts an object. `top` is the directory in which the user finds it.
    fn count(&mut self, path: &Path, top: &Path) -> Result<()> {
        self.check_stop()?;
        let left =
            (self.objects_left.checked_sub(1), self.path_bytes_left.checked_sub(path.as_os_str().len()));
        let (Some(objects), Some(path_bytes)) = left else {
            let limit = MAX_PATH_BYTES >> 20;
            return Err(Kind::Definition
                .failure(format!(
                    "{}: the definition has too many files: more than {MAX_OBJECTS} files, directories and links, or \
                     more than {limit} MiB of paths",
                    top.display()
                ))
                .hint("Remove the files that the image does not need, or put them into an archive.")
                .into());
        };
        (self.objects_left, self.path_bytes_left) = (objects, path_bytes);
        Ok(())
    }

    /// Lists a directory tree. It does not recurse, so that a deep tree cannot exhaust the thread's stack.
    fn walk(&mut self, top: &Path, project: Option<&Arc<Path>>) -> Result<()> {
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
            for entry in list(&directory, project)? {
                let entry = entry.map_err(|e| unreadable(&directory, e))?;
                let name = entry.file_name();
                let path = directory.join(&name);
                self.count(&path, top)?;
                let kind = entry.file_type().map_err(|e| unreadable(&path, e))?;
                let is_hidden = name.as_bytes().starts_with(b".");
                if kind.is_dir() {
                    if name == ".git" {
                        self.tree.warnings.push(format!(
                            "{} is in the definition. Its files are part of the checksum, so the checksum changes \
                             with each commit",
                            path.display()
                        ));
                    }
                    directories.push(path);
                } else if kind.is_symlink() {
                    self.add_link(path, is_hidden, project)?;
                } else if !is_hidden {
                    self.add_file(path, None, project);
                }
            }
        }
        Ok(())
    }

    /// Adds a symbolic link. A link to a file counts as that file. A link to a directory is not followed. It is
    /// recorded for the fingerprint, because a path in image.toml may lead through the link.
    fn add_link(&mut self, path: PathBuf, is_hidden: bool, project: Option<&Arc<Path>>) -> Result<()> {
        let target = std::fs::metadata(&path);
        let is_directory = target.as_ref().is_ok_and(Metadata::is_dir);
        if is_hidden && !is_directory {
            return Ok(());
        }
        let link = std::fs::read_link(&path).map_err(|e| unreadable(&path, e))?;
        match target {
            Ok(_) if is_directory => self.tree.directory_links.push((path, link)),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(definition_error(
                    &path,
                    format_args!("is a symbolic link to {}, which does not exist", link.display()),
                ));
            }
            // Any other error occurs again in `examine`, which reports it.
            _ => {
                self.add_file(path, Some(link), project);
                if let (Some(project), Some(file)) = (project, self.tree.files.last()) {
                    find(&file.path, project).map_err(|refused| file.refused(refused))?;
                }
            }
        }
        Ok(())
    }

    fn add_file(&mut self, path: PathBuf, link: Option<PathBuf>, project: Option<&Arc<Path>>) {
        let project = project.cloned();
        self.tree.files.push(CountedFile { path, sha1: String::new(), executable: false, link, project });
    }

    /// Reads the files' metadata and content on all cores. Large files are read first. Otherwise one core might still
    /// read a large file at the end, while the others have nothing to do.
    fn examine(&mut self) -> Result<()> {
        let files = &self.tree.files;
        let mut order: Vec<usize> = (0..files.len()).collect();
        let sizes = on_all_cores(&order, STAT_SHARE, |index| {
            self.check_stop()?;
            let path = &files[index].path;
            let metadata = std::fs::metadata(path).map_err(|e| unreadable(path, e))?;
            refuse_special(path, &metadata)?;
            Ok(metadata.len())
        })?;
        let sizes: HashMap<usize, u64> = sizes.into_iter().collect();
        order.sort_by_key(|index| std::cmp::Reverse(sizes[index]));
        let read = on_all_cores(&order, 1, |index| {
            let (file, metadata) = files[index].open()?;
            let sha1 = sha1_of(file, &files[index].path, &|| self.check_stop())?;
            Ok((sha1, metadata.permissions().mode() & 0o100 != 0))
        })?;
        for (index, (sha1, executable)) in read {
            let file = &mut self.tree.files[index];
            (file.sha1, file.executable) = (sha1, executable);
        }
        Ok(())
    }
}

impl CountedFile {
    /// Opens the file for reading. It must still be a regular file in the project, because another process may have
    /// replaced it, or a directory above it, by a link.
    fn open(&self) -> Result<(File, Metadata)> {
        let path = &self.path;
        let file = match &self.project {
            Some(project) => {
                find(path, project).and_then(open_found_file).map_err(|refused| self.refused(refused))?
            }
            None => {
                // With these flags, `open` does not block if a FIFO has replaced the file.
                let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
                let file = File::options().read(true).custom_flags(flags).open(path);
                file.map_err(|e| unreadable(path, e))?
            }
        };
        let metadata = file.metadata().map_err(|e| unreadable(path, e))?;
        refuse_special(path, &metadata)?;
        Ok((file, metadata))
    }

    fn refused(&self, refused: PathRefusal) -> anyhow::Error {
        let path = &self.path;
        let place = match refused {
            PathRefusal::Io(error) => return unreadable(path, error),
            PathRefusal::Special(kind) => return special(path, kind),
            PathRefusal::Outside(_) | PathRefusal::InGit(_) => {
                self.project.as_deref().unwrap_or(Path::new("/")).display()
            }
        };
        match &self.link {
            Some(_) => Kind::Definition
                .failure(format!("{}: is a symbolic link that {refused}", path.display()))
                .hint(format!("Replace the link by a file, or by a link to a file in {place}.")),
            None => Kind::Definition.failure(format!("{}: {refused}", path.display())).hint(
                "Another process replaced it by a link. Do not change the definition while oven reads it.",
            ),
        }
        .into()
    }
}

/// Finds a file or directory in its project. In a `.git` that is part of the definition, it finds git's own files, too.
/// Otherwise a link must not lead to them. So the definition of a stranger cannot make oven read any file of this
/// machine.
fn find(path: &Path, project: &Path) -> Result<OwnedFd, PathRefusal> {
    match path.components().any(|name| name.as_os_str() == GIT) {
        true => find_within_or_in_git(path, project),
        false => find_within(path, project),
    }
}

/// Lists a directory. It must be in the project, because another process may have replaced it by a link.
fn list(directory: &Path, project: Option<&Arc<Path>>) -> Result<ReadDir> {
    let listed = match project {
        None => std::fs::read_dir(directory),
        Some(project) => match find(directory, project) {
            Ok(found) => list_found_directory(&found),
            Err(PathRefusal::Io(error)) => Err(error),
            Err(refused) => return Err(definition_error(directory, refused)),
        },
    };
    listed.map_err(|e| unreadable(directory, e))
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

fn refuse_special(path: &Path, metadata: &Metadata) -> Result<()> {
    if metadata.is_file() {
        return Ok(());
    }
    Err(special(path, kind_of(metadata)))
}

fn special(path: &Path, kind: &str) -> anyhow::Error {
    definition_error(path, format_args!("is {kind}: only regular files can be part of the checksum"))
}

/// The SHA1 of an open file. `check_stop` is called for each buffer.
fn sha1_of(mut file: File, path: &Path, check_stop: &dyn Fn() -> Result<()>) -> Result<String> {
    thread_local! {
        static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into());
    }
    let mut hasher = Sha1::new();
    BUFFER.with_borrow_mut(|buffer| {
        loop {
            check_stop()?;
            match file.read(buffer) {
                Ok(0) => return Ok(hex(&hasher.finalize())),
                Ok(count) => hasher.update(&buffer[..count]),
                Err(e) if e.kind() == ErrorKind::Interrupted => (),
                Err(e) => return Err(unreadable(path, e)),
            }
        }
    })
}
