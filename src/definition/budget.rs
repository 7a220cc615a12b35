//! Limits for the sums over all files that are read of a definition. A definition that the user names has a
//! budget of its own. All definitions that are loaded only as parents share one budget, because a single definition of
//! a stranger may have many parents.

use crate::formats::package::{self, PackageFile, PackageLimits};
use anyhow::Result;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

/// The maximal sum of the sizes of image.toml. A single one has at most 1 MiB, and usually a few KiB.
const TEXTS: u64 = 4 << 20;
/// The maximal sum of the sizes of the keys of repositories. A key usually has a few KiB.
const KEYS: u64 = 16 << 20;
/// The maximal sum of the sizes of package files. The largest packages have 2 to 4 GiB.
const PACKAGES: u64 = 8 << 30;
/// The maximal sum of the unpacked metadata of package files. A package usually has less than 100 KiB.
const METADATA: u64 = 512 << 20;
/// The maximal time in which all templates are rendered. Each usually takes a few milliseconds.
const TEMPLATES: Duration = Duration::from_secs(10);
/// Whose files the sums are about, for errors.
const OF: &str = "of a definition, or of all its parent definitions together,";

pub(super) struct Budget {
    texts: Cell<u64>,
    keys: Cell<u64>,
    templates: Cell<Duration>,
    packages: PackageLimits,
    /// The package files that were read, by device and inode. The same file may have several spellings.
    known: RefCell<HashMap<(u64, u64), PackageFile>>,
}

impl Default for Budget {
    fn default() -> Self {
        Self {
            texts: Cell::default(),
            keys: Cell::default(),
            templates: Cell::default(),
            packages: PackageLimits::new(PACKAGES, METADATA),
            known: RefCell::default(),
        }
    }
}

impl Budget {
    /// Counts the text of an image.toml. The error completes a sentence that begins with the file.
    pub fn add_text(&self, text: &str) -> Result<(), String> {
        add(&self.texts, text.len(), TEXTS, "cannot be used, because the files image.toml")
            .map_err(|what| format!("{what}: use smaller files or fewer parent definitions"))
    }

    /// Counts a repository's key. The error completes a sentence that begins with the key's name.
    pub fn add_key(&self, spelt: &str, key: &str) -> Result<(), String> {
        add(&self.keys, key.len(), KEYS, &format!("is {spelt:?}, but the keys of all repositories"))
            .map_err(|what| format!("{what}: export only the keys that the repositories need"))
    }

    /// Calls `check`, which renders a template, unless the templates before it took too long. The error completes a
    /// sentence that begins with the key's name.
    pub fn render(&self, check: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        if self.templates.get() > TEMPLATES {
            return Err(format!(
                "cannot be rendered as a template: the templates {OF} may take at most {} seconds: make them simpler",
                TEMPLATES.as_secs()
            ));
        }
        let begin = Instant::now();
        let checked = check();
        self.templates.set(self.templates.get() + begin.elapsed());
        checked
    }

    /// Reads a package file.
    pub fn package(&self, file: File) -> Result<PackageFile> {
        let metadata = file.metadata()?;
        let inode = (metadata.dev(), metadata.ino());
        if let Some(package) = self.known.borrow().get(&inode) {
            return Ok(package.clone());
        }
        let package = package::read_from(file, &self.packages)?;
        self.known.borrow_mut().insert(inode, package.clone());
        Ok(package)
    }

    /// If the package files exceeded a limit, returns the reason why no further one is read.
    pub fn exceeded_by_packages(&self) -> Option<String> {
        self.packages.exceeded().map(|limit| {
            format!(
                "the package files {OF} may have at most {limit}: install packages from a repository, or write them \
                 as {{ url = \"…\", sha256 = \"…\" }}"
            )
        })
    }
}

fn add(sum: &Cell<u64>, size: usize, limit: u64, what: &str) -> Result<(), String> {
    sum.set(sum.get().saturating_add(size as u64));
    if sum.get() <= limit {
        return Ok(());
    }
    Err(format!("{what} {OF} may have at most {} MiB", limit >> 20))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_templates_together_have_a_limit() {
        let budget = Budget::default();
        assert_eq!(budget.render(|| Ok(())), Ok(()));
        assert!(budget.templates.get() > Duration::ZERO);
        budget.templates.set(TEMPLATES + Duration::from_millis(1));
        let error = budget.render(|| panic!("it is not called")).unwrap_err();
        assert_eq!(
            error,
            "cannot be rendered as a template: the templates of a definition, or of all its parent definitions \
             together, may take at most 10 seconds: make them simpler"
        );
    }

    #[test]
    fn a_file_is_counted_once() {
        let top = tempfile::tempdir().unwrap();
        let (one, link, other) =
            (top.path().join("a.deb"), top.path().join("b.deb"), top.path().join("c.deb"));
        let deb = package::fixture::deb("Package: a\nVersion: 1\nArchitecture: all\n", ".gz");
        std::fs::write(&one, &deb).unwrap();
        std::fs::write(&other, &deb).unwrap();
        std::fs::hard_link(&one, &link).unwrap();
        let budget = Budget { packages: PackageLimits::new(deb.len() as u64, METADATA), ..Budget::default() };
        let read = |path| budget.package(File::open(path).unwrap());
        assert_eq!(read(&one).unwrap(), read(&link).unwrap());
        assert_eq!(budget.exceeded_by_packages(), None);
        assert!(read(&other).is_err() && budget.exceeded_by_packages().is_some());
    }
}
