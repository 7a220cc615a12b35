//! `ami_config_checksum`: the algorithm of GumGum's AMI Bakery, exactly, so that an image baked by either is found by
//! the other.
//!
//! Every file below the directories whose own name does not begin with a dot, sorted by the bytes of its path as
//! spelt; the SHA1 of each; the SHA1 of those, in hexadecimal, with nothing between. Links to files count as what they
//! lead to, links to directories are not followed.

#[cfg(test)]
mod tests;

use crate::config::toml_reader::kind_of;
use crate::error::Kind;
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

/// Read at a time by each thread: large enough that system calls do not show, small enough for the cache.
const BUFFER_BYTES: usize = 256 << 10;
/// Threads beyond this find no disk that feeds them.
const MAX_THREADS: usize = 32;
/// Files to look at (not to read) for which another thread is worth its start.
const MANY: usize = 512;

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

fn unreadable(path: &Path, error: std::io::Error) -> anyhow::Error {
    wrong(path, format_args!("cannot be read: {error}"))
}

impl Tree {
    pub fn read(directories: &[impl AsRef<Path>]) -> Result<Self> {
        let mut tree = Self::default();
        for directory in directories {
            tree.walk(directory.as_ref())?;
        }
        if tree.files.is_empty() {
            let names: Vec<_> = directories.iter().map(|d| d.as_ref().display().to_string()).collect();
            return Err(Kind::Definition
                .failure(format!("{}: there is no file that counts", names.join(", ")))
                .hint("Files whose own name begins with a dot do not count.")
                .into());
        }
        // By bytes: `Path` compares by component, and puts a/x before a-b/x.
        tree.files.sort_by(|a, b| a.path.as_os_str().as_bytes().cmp(b.path.as_os_str().as_bytes()));
        tree.directory_links.sort();
        tree.examine()?;
        Ok(tree)
    }

    /// The checksum over the files' own.
    pub fn checksum(&self) -> String {
        let mut all = Sha1::new();
        self.files.iter().for_each(|file| all.update(&file.sha1));
        hex(&all.finalize())
    }

    /// Lists a directory and those below it. The stack is ours: a deep tree cannot exhaust the thread's.
    fn walk(&mut self, top: &Path) -> Result<()> {
        let metadata = std::fs::metadata(top).map_err(|e| match e.kind() {
            ErrorKind::NotFound => wrong(top, "there is no such directory"),
            _ => unreadable(top, e),
        })?;
        if !metadata.is_dir() {
            return Err(wrong(top, format_args!("is {}, not a directory", kind_of(&metadata))));
        }
        let mut directories = vec![top.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(&directory).map_err(|e| unreadable(&directory, e))? {
                let entry = entry.map_err(|e| unreadable(&directory, e))?;
                let (path, name) = (entry.path(), entry.file_name());
                let kind = entry.file_type().map_err(|e| unreadable(&path, e))?;
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
                } else if kind.is_symlink() {
                    self.link(path, hidden)?;
                } else if !hidden {
                    self.add(path, None);
                }
            }
        }
        Ok(())
    }

    /// A link to a file counts as that file. One to a directory is not followed, but it is kept in mind: a path in
    /// image.toml may lead through it.
    fn link(&mut self, path: PathBuf, hidden: bool) -> Result<()> {
        let target = std::fs::metadata(&path);
        let is_directory = target.as_ref().is_ok_and(Metadata::is_dir);
        if hidden && !is_directory {
            return Ok(());
        }
        let link = std::fs::read_link(&path).map_err(|e| unreadable(&path, e))?;
        match target {
            Ok(_) if is_directory => self.directory_links.push((path, link)),
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(wrong(
                    &path,
                    format_args!("is a symbolic link to {}, which does not exist", link.display()),
                ));
            }
            // Any other trouble is met again when the file is examined.
            _ => self.add(path, Some(link)),
        }
        Ok(())
    }

    fn add(&mut self, path: PathBuf, link: Option<PathBuf>) {
        self.files.push(Counted { path, sha1: String::new(), executable: false, link });
    }

    /// Fills in what the files are and hold, on all cores. Large files go first, so that none is left for the end.
    fn examine(&mut self) -> Result<()> {
        let files = &self.files;
        let mut order: Vec<usize> = (0..files.len()).collect();
        let metadata = on_all_cores(&order, MANY, |index| {
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

/// Does `work` for each index, in this order, on as many threads as there are cores, but with `share` indexes for
/// each at least. After a failure the others stop; of several, that of the least index is the answer.
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
    Err(wrong(path, format_args!("is {}: only files can count", kind_of(metadata))))
}

fn file_sha1(path: &Path) -> Result<String> {
    thread_local! {
        static BUFFER: RefCell<Box<[u8]>> = RefCell::new(vec![0; BUFFER_BYTES].into());
    }
    // Should a FIFO have taken the file's place, it does not block us.
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
