//! Checks the files that a definition names. A file outside the directories that the checksum covers is refused,
//! because a change of such a file would not cause a new bake.

use super::FILE;
use super::budget::Budget;
use crate::config::project::is_checkout;
use crate::config::toml_reader::{Table, kind_of, until_stopped};
use crate::config::within::resolve_within;
use crate::sys::fds::{PathRefusal, open_file_within};
use crate::text::escape_name;
use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The maximal number of `inputs`. Nobody uses more than a few.
const MAX_INPUTS: usize = 100;

/// The directories whose files a definition can use.
pub struct Sources<'b> {
    /// The definition's directory as the user wrote it.
    pub dir: PathBuf,
    /// The canonical paths of the definition's directory and of its inputs.
    roots: Vec<PathBuf>,
    /// Whether `inputs` has a mistake. Then a file may only seem to be outside of the definition.
    has_wrong_inputs: bool,
    /// The canonical path of the project.
    pub project: PathBuf,
    pub(super) budget: &'b Budget,
}

/// A file that the checksum covers.
#[derive(Debug)]
pub struct Source {
    /// The definition's directory as the user wrote it, joined with the file's path in image.toml, without `./` inside.
    pub path: PathBuf,
    pub executable: bool,
}

/// Returns whether the owner's executable bit is set. git also ignores the other executable bits.
pub fn is_executable(metadata: &Metadata) -> bool {
    metadata.permissions().mode() & 0o100 != 0
}

/// Returns `dir`, and `dir` joined with each input as image.toml spells it. Trailing slashes of `dir` are removed,
/// because they could change the order of the files, and thereby the checksum.
pub fn directories(dir: &Path, inputs: &[String]) -> Vec<PathBuf> {
    let bytes = dir.as_os_str().as_bytes();
    let end = bytes.iter().rposition(|b| *b != b'/').map_or(bytes.len().min(1), |last| last + 1);
    let dir = PathBuf::from(std::ffi::OsStr::from_bytes(&bytes[..end]));
    let inputs = inputs.iter().map(|input| dir.join(input)).collect::<Vec<_>>();
    std::iter::once(dir).chain(inputs).collect()
}

/// Returns the project directory. If the definition's directory is a git checkout, returns that directory. Otherwise
/// returns the nearest directory above it that is a git checkout or has an oven.toml. If no such directory exists,
/// returns the parent of the definition's directory. `real` is the canonical path of the definition's directory.
///
/// `inputs` and symbolic links must not lead out of the project. Otherwise a definition that somebody else wrote could
/// copy any file of this machine into the image, because oven often runs as root.
pub fn project(real: &Path) -> PathBuf {
    let mut above = real.ancestors().skip(1);
    if is_checkout(real) {
        return real.to_owned();
    }
    let marked = above
        .find(|dir| is_checkout(dir) || dir.join(crate::config::project::FILE).symlink_metadata().is_ok());
    marked.or(real.parent()).unwrap_or(real).to_owned()
}

impl<'b> Sources<'b> {
    /// Only the definition's directory. `real` is its canonical path.
    pub(super) fn new(dir: &Path, real: &Path, project: &Path, budget: &'b Budget) -> Self {
        let (dir, project) = (dir.to_owned(), project.to_owned());
        Self { dir, roots: vec![real.to_owned()], has_wrong_inputs: false, project, budget }
    }

    /// Reads `inputs`. Checks that each is a directory in the project, and that no two are the same.
    pub fn with_inputs(mut self, top: &Table) -> (Self, Vec<String>) {
        let mut inputs = Vec::new();
        let all = top.strings("inputs");
        let elements =
            top.value("inputs").map(|at| at.value.as_array().map_or(usize::MAX, |array| array.len()));
        self.has_wrong_inputs = top.misspells("inputs") || elements.unwrap_or_default() != all.len();
        if let Some(first) = all.get(MAX_INPUTS) {
            let count = all.len();
            let what = format!(
                "has {count} entries, but at most {MAX_INPUTS} are allowed: list a directory above them"
            );
            top.wrong::<()>("inputs", first.line, what);
            self.has_wrong_inputs = true;
        }
        for at in until_stopped(all.into_iter().take(MAX_INPUTS)) {
            match top.check("inputs", at.line, self.input(at.value)) {
                Some(root) => {
                    self.roots.push(root);
                    inputs.push(at.value.to_owned());
                }
                None => self.has_wrong_inputs = true,
            }
        }
        (self, inputs)
    }

    fn input(&self, spelt: &str) -> Result<PathBuf, String> {
        relative(spelt)?;
        let refused = |refused| self.describe("has", spelt, refused);
        let real = self.resolve(Path::new(spelt)).map_err(refused)?;
        let metadata = std::fs::metadata(&real).map_err(|e| refused(PathRefusal::Io(e)))?;
        if !metadata.is_dir() {
            return Err(format!(
                "has {spelt:?}, which is {}: list its directory instead",
                kind_of(&metadata)
            ));
        }
        if real.starts_with(&self.roots[0]) {
            return Err(format!("has {spelt:?}, which is already part of the definition: remove it"));
        }
        if self.roots.contains(&real) {
            return Err(format!("has {spelt:?} twice: remove one"));
        }
        Ok(real)
    }

    /// The canonical path of a file or directory of the project. `path` is relative to the definition's directory.
    pub(super) fn resolve(&self, path: &Path) -> Result<PathBuf, PathRefusal> {
        resolve_within(self.real(), path, &self.project)
    }

    /// Joins a path of image.toml with the definition's directory. Messages show the result, so it has no `./` inside.
    pub fn path(&self, spelt: &str) -> PathBuf {
        self.dir.join(spelt).components().collect()
    }

    /// The canonical path of the definition's directory.
    pub fn real(&self) -> &Path {
        &self.roots[0]
    }

    /// Opens a file that [`Self::file`] returned. The error completes a sentence that begins with the key's name.
    pub fn open(&self, spelt: &str, path: &Path) -> Result<File, String> {
        open_file_within(path, &self.project).map_err(|refused| match refused {
            PathRefusal::Io(error) => missing(spelt, path, &error),
            refused => format!("is {spelt:?}, which {refused}"),
        })
    }

    /// Describes a path that is refused. `verb` is the one between the key's name and its value.
    fn describe(&self, verb: &str, spelt: &str, refused: PathRefusal) -> String {
        match refused {
            PathRefusal::Io(error) => missing(spelt, &self.path(spelt), &error),
            PathRefusal::Outside(place) => format!(
                "{verb} {spelt:?}, which resolves to {}, outside the project {} (the nearest directory with a .git or \
                 an oven.toml, or else the definition's parent directory)",
                escape_name(&place),
                escape_name(&self.project)
            ),
            refused => format!("{verb} {spelt:?}, which {refused}"),
        }
    }

    /// Checks that `spelt`, a path in image.toml, is a regular file that the checksum covers.
    pub fn file(&self, spelt: &str) -> Result<Source, String> {
        relative(spelt)?;
        let path = self.path(spelt);
        let name = match path.file_name() {
            Some(name) if !spelt.ends_with('/') && !spelt.ends_with("/.") => name,
            _ => return Err(format!("is {spelt:?}: it must be a file, not a directory")),
        };
        let refused = |refused| self.describe("is", spelt, refused);
        let parent = Path::new(spelt).parent().unwrap_or(Path::new("."));
        let covered = match self.resolve(parent) {
            Ok(real) => self.roots.iter().any(|root| real.starts_with(root)),
            Err(PathRefusal::Outside(_)) => false,
            Err(error) => return Err(refused(error)),
        };
        if !covered && !self.has_wrong_inputs {
            return Err(format!(
                "is {spelt:?}, which is outside the definition: list its directory in `inputs`, so that the checksum \
                 covers it"
            ));
        }
        let real = self.resolve(Path::new(spelt)).map_err(refused)?;
        let metadata = std::fs::metadata(&real).map_err(|e| refused(PathRefusal::Io(e)))?;
        if !metadata.is_file() {
            return Err(format!("is {spelt:?}, which is {}: it must be a file", kind_of(&metadata)));
        }
        if name.as_bytes().starts_with(b".") {
            return Err(format!(
                "is {spelt:?}: rename the file, because files whose names begin with a dot are not part of the \
                 checksum, and oven would not notice a change"
            ));
        }
        Ok(Source { path, executable: is_executable(&metadata) })
    }

    /// Checks that `spelt`, a path in image.toml, is a script that the kernel can start.
    pub fn script(&self, spelt: &str) -> Result<PathBuf, String> {
        let source = self.file(spelt)?;
        let mut start = Vec::new();
        let file = self.open(spelt, &source.path)?;
        // The kernel also reads only the first 256 bytes to determine the kind of a program.
        file.take(256).read_to_end(&mut start).map_err(|e| missing(spelt, &source.path, &e))?;
        let first = start.split(|b| *b == b'\n').next().unwrap_or_default();
        if start.starts_with(b"\x7fELF") {
            Ok(spelt.into())
        } else if !start.starts_with(b"#!") {
            Err(format!("is {spelt:?}, which has no `#!` line: begin it with `#!/bin/sh`, for example"))
        } else if first.ends_with(b"\r") {
            Err(format!(
                "is {spelt:?}, which has Windows line endings (CR LF): convert them with `sed -i 's/\\r$//'`"
            ))
        } else {
            Ok(spelt.into())
        }
    }
}

fn relative(spelt: &str) -> Result<(), String> {
    if spelt.is_empty() {
        Err("is empty: it must be a path".into())
    } else if spelt.starts_with('/') {
        Err(format!("has {spelt:?}: paths must be relative to the directory of {FILE}"))
    } else if spelt.chars().any(char::is_control) {
        Err(format!("has {spelt:?}: a path cannot contain control characters"))
    } else {
        Ok(())
    }
}

fn missing(spelt: &str, path: &Path, error: &std::io::Error) -> String {
    match error.kind() {
        ErrorKind::NotFound if std::fs::symlink_metadata(path).is_ok() => {
            format!("names {spelt:?}, a symbolic link whose target does not exist")
        }
        ErrorKind::NotFound => format!("names {spelt:?}, but {} does not exist", escape_name(path)),
        _ => format!("names {spelt:?}, but {} cannot be read: {error}", escape_name(path)),
    }
}
