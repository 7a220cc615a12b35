//! Finds files, directories and other objects of an image by path or by pattern. If a directory in a path is a symlink,
//! the path counts as missing, because the symlink may lead to `/`.

use super::file_version::{FileId, FileVersion};
use super::tree::{ImageTree, open_in};
use crate::text::{escape_name, match_wildcards};
use anyhow::{Context, Result};
use rustix::fs::{FileType, OFlags, ResolveFlags};
use rustix::io::Errno;
use std::os::fd::OwnedFd;

/// The maximum number of paths that match a pattern. The longest lists of usual images have some hundred paths.
const MATCHES_MAX: usize = 100_000;
/// The maximum memory in bytes for the paths that match a pattern.
const MATCHES_MEMORY_MAX: usize = 32 << 20;

impl ImageTree {
    /// Returns the type of the object itself, if it exists and no directory in its path is a symlink.
    pub fn kind_of(&self, path: &str) -> Result<Option<FileType>> {
        let Some(found) = self.open_without_links(path, OFlags::empty())? else { return Ok(None) };
        let stat = rustix::fs::fstat(found)
            .with_context(|| format!("examining {} in the image", escape_name(path)))?;
        Ok(Some(FileType::from_raw_mode(stat.st_mode)))
    }

    /// Returns the device and the inode of a directory, if no directory in its path is a symlink.
    pub fn directory_id(&self, path: &str) -> Result<Option<FileId>> {
        let Some(found) = self.open_without_links(path, OFlags::DIRECTORY)? else { return Ok(None) };
        let version = FileVersion::of(found, c"");
        Ok(Some(version.with_context(|| format!("examining {} in the image", escape_name(path)))?.id))
    }

    fn open_without_links(&self, path: &str, flags: OFlags) -> Result<Option<OwnedFd>> {
        let doing = || format!("examining {} in the image", escape_name(path));
        self.count_object().with_context(doing)?;
        let path = if path.is_empty() { "/" } else { path };
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
        // With these flags, a symlink as the last name of the path is opened itself.
        match open_in(self.dir(), path, flags | OFlags::PATH | OFlags::NOFOLLOW, resolve) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG) => Ok(None),
            found => found.map(Some).with_context(doing),
        }
    }

    /// Returns whether the path is a directory, and no directory above it is a symlink.
    pub fn is_directory(&self, path: &str) -> Result<bool> {
        Ok(self.kind_of(path)? == Some(FileType::Directory))
    }

    /// Returns the paths that match a pattern, each with its type. `*` matches any characters within one name.
    pub fn expand(&self, pattern: &str) -> Result<Vec<(String, FileType)>> {
        let _timer = self.meter().start();
        let mut found = vec![String::new()];
        // The parts without `*` after the last part with one.
        let mut literal = String::new();
        for part in pattern.split('/').filter(|part| !part.is_empty()) {
            if !part.contains('*') {
                literal.push('/');
                literal.push_str(part);
                continue;
            }
            let (mut next, mut memory) = (Vec::new(), 0);
            for dir in found {
                let dir = dir + &literal;
                if !self.is_directory(&dir)? {
                    continue;
                }
                let names = self.list(&dir)?.into_iter().filter_map(|name| name.into_string().ok());
                for name in names.filter(|name| match_wildcards(part, name).is_some()) {
                    next.push(format!("{dir}/{name}"));
                    memory += memory_of_match(&next[next.len() - 1]);
                    self.ensure_few_matches(next.len(), memory, pattern)?;
                }
            }
            literal.clear();
            found = next;
        }
        let (mut all, mut memory) = (Vec::new(), 0);
        for path in found {
            let path = path + &literal;
            if let Some(kind) = self.kind_of(&path)? {
                memory += memory_of_match(&path);
                all.push((path, kind));
                self.ensure_few_matches(all.len(), memory, pattern)?;
            }
        }
        Ok(all)
    }

    fn ensure_few_matches(&self, count: usize, memory: usize, pattern: &str) -> Result<()> {
        if count <= MATCHES_MAX && memory <= MATCHES_MEMORY_MAX {
            return Ok(());
        }
        let (pattern, max) = (escape_name(pattern), MATCHES_MEMORY_MAX >> 20);
        Err(self.meter().exceeded(format!(
            "more than {MATCHES_MAX} paths in the image, or more than {max} MiB of paths, match {pattern}"
        )))
    }

    /// Removes the objects that match a pattern, except directories and the paths that `keep` accepts. Returns whether
    /// it removed any.
    pub fn remove_matching(&self, pattern: &str, keep: &dyn Fn(&str) -> bool) -> Result<bool> {
        let mut any = false;
        for (path, kind) in self.expand(pattern)? {
            if kind != FileType::Directory && !keep(&path) {
                any |= self.remove(&path)?;
            }
        }
        Ok(any)
    }

    /// Returns the text of a file, or an empty text if there is no regular file.
    pub fn read_text(&self, path: &str) -> Result<String> {
        let doing = || format!("examining {} in the image", escape_name(path));
        let found = match self.open(path, OFlags::PATH) {
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(String::new()),
            found => rustix::fs::fstat(found.with_context(doing)?).with_context(doing)?,
        };
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            return Ok(String::new());
        }
        let bytes = self.read(path)?.unwrap_or_default();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

fn memory_of_match(path: &str) -> usize {
    size_of::<(String, FileType)>() + path.len()
}

#[cfg(test)]
mod tests {
    use crate::image::test::Tree;
    use rustix::fs::FileType;

    fn tree() -> Tree {
        let tree = Tree::new();
        for path in
            ["var/log/a.log", "var/log/b.log", "var/log/b.txt", "var/log/d.log/x", "home/a/.x_history"]
        {
            tree.file(path, path);
        }
        tree.link("a.log", "var/log/l.log");
        tree.link("log", "var/logs");
        tree
    }

    #[test]
    fn a_path_through_a_symlink_leads_to_nothing() {
        let tree = tree();
        let inside = tree.tree();
        let kinds = ["/var/log", "/var/log/a.log", "/var/log/l.log", "/var/logs", "/var/logs/a.log", "/none"]
            .map(|path| inside.kind_of(path).unwrap());
        let (file, link) = (Some(FileType::RegularFile), Some(FileType::Symlink));
        assert_eq!(kinds, [Some(FileType::Directory), file, link, link, None, None]);
        let directories = ["/", "/var", "/var/logs", "/var/log/a.log"];
        assert_eq!(directories.map(|path| inside.is_directory(path).unwrap()), [true, true, false, false]);
    }

    #[test]
    fn patterns_match_within_one_name() {
        let tree = tree();
        let paths = |pattern: &str| {
            let mut found: Vec<_> =
                tree.tree().expand(pattern).unwrap().into_iter().map(|(path, _)| path).collect();
            found.sort_unstable();
            found
        };
        assert_eq!(
            paths("/var/log/*.log"),
            ["/var/log/a.log", "/var/log/b.log", "/var/log/d.log", "/var/log/l.log"]
        );
        assert_eq!(paths("/home/*/.*history"), ["/home/a/.x_history"]);
        assert_eq!(paths("/var/log/b.txt"), ["/var/log/b.txt"]);
        assert_eq!(paths("var/*/d.log/x"), ["/var/log/d.log/x"]);
        assert_eq!(paths("/v*/l*/*.txt"), ["/var/log/b.txt"]);
        for pattern in ["/var/logs/*", "/var/*.log", "/none/*", "/none"] {
            assert!(paths(pattern).is_empty(), "{pattern}");
        }
    }

    #[test]
    fn the_paths_that_match_have_a_limit_in_bytes() {
        let tree = Tree::new();
        tree.file(&format!("{}x\ny", "d/".repeat(1900)), "");
        // 10,000 paths of 4 KB have 40 MB.
        let dir = format!("/{}", "d/".repeat(1900));
        let open = tree.tree().open(&dir, rustix::fs::OFlags::PATH).unwrap();
        for number in 0..10_000 {
            rustix::fs::linkat(&open, "x\ny", &open, number.to_string(), rustix::fs::AtFlags::empty())
                .unwrap();
        }
        assert_eq!(tree.tree().expand(&format!("{dir}*00")).unwrap().len(), 99);
        let error = tree.tree().expand(&format!("{dir}*")).unwrap_err();
        assert!(error.to_string().contains("more than 32 MiB of paths"), "{error}");
        assert_eq!(tree.tree().kind_of(&"x/".repeat(4000)).unwrap(), None);
    }

    #[test]
    fn directories_and_excluded_paths_are_not_removed() {
        let tree = tree();
        let keep = |path: &str| path == "/var/log/b.log";
        assert!(tree.tree().remove_matching("/var/log/*.log", &keep).unwrap());
        assert!(!tree.has("var/log/a.log") && !tree.has("var/log/l.log"));
        assert!(tree.has("var/log/b.log") && tree.has("var/log/d.log/x"));
        assert!(!tree.tree().remove_matching("/var/log/*.log", &keep).unwrap());
    }

    #[test]
    fn what_is_not_a_file_has_no_text() {
        let tree = tree();
        assert_eq!(tree.tree().read_text("/var/log/a.log").unwrap(), "var/log/a.log");
        assert_eq!(["/none", "/var/log"].map(|path| tree.tree().read_text(path).unwrap()), ["", ""]);
    }
}
