//! A directory tree that tests use as an image.

use super::tree::ImageTree;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

pub struct Tree(tempfile::TempDir);

impl Tree {
    pub fn new() -> Self {
        let temp = tempfile::tempdir().unwrap();
        std::fs::create_dir(temp.path().join("root")).unwrap();
        Self(temp)
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.path().join("root").join(path)
    }

    pub fn tree(&self) -> ImageTree {
        ImageTree::open_dir(&self.path("")).unwrap()
    }

    fn parent(&self, path: &str) -> PathBuf {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        path
    }

    pub fn file(&self, path: &str, content: &str) {
        std::fs::write(self.parent(path), content).unwrap();
    }

    /// Opens a file for reading and writing.
    pub fn open(&self, path: &str) -> std::fs::File {
        std::fs::File::options().read(true).write(true).open(self.path(path)).unwrap()
    }

    pub fn rename(&self, from: &str, to: &std::ffi::OsStr) {
        std::fs::rename(self.path(from), self.0.path().join("root").join(to)).unwrap();
    }

    /// Creates a file below this many directories of the same name. The file has this name, too.
    pub fn deep_file(&self, name: &str, depth: usize, content: &str) {
        use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};
        let open = |dir: &dyn std::os::fd::AsFd, path: &Path| {
            openat(dir, path, OFlags::RDONLY, Mode::empty()).unwrap()
        };
        let mut dir = open(&CWD, &self.path(""));
        for _ in 0..depth {
            mkdirat(&dir, name, Mode::RWXU).unwrap();
            dir = open(&dir, Path::new(name));
        }
        let file = openat(&dir, name, OFlags::WRONLY | OFlags::CREATE, Mode::RWXU).unwrap();
        std::io::Write::write_all(&mut std::fs::File::from(file), content.as_bytes()).unwrap();
    }

    pub fn link(&self, to: &str, path: &str) {
        symlink(to, self.parent(path)).unwrap();
    }

    pub fn hard_link(&self, from: &str, path: &str) {
        std::fs::hard_link(self.path(from), self.parent(path)).unwrap();
    }

    pub fn fifo(&self, path: &str) {
        rustix::fs::mkfifoat(rustix::fs::CWD, self.parent(path), rustix::fs::Mode::RWXU).unwrap();
    }

    /// Removes an object of any kind with its content, if it exists.
    pub fn remove(&self, path: &str) {
        let path = self.path(path);
        match path.symlink_metadata() {
            Ok(found) if found.is_dir() => super::remove::remove_directory(&path, &|| false).unwrap(),
            Ok(_) => std::fs::remove_file(path).unwrap(),
            Err(_) => {}
        }
    }

    pub fn read(&self, path: &str) -> Option<String> {
        std::fs::read_to_string(self.path(path)).ok()
    }

    pub fn has(&self, path: &str) -> bool {
        self.path(path).symlink_metadata().is_ok()
    }

    pub fn mode(&self, path: &str) -> u32 {
        self.path(path).symlink_metadata().unwrap().permissions().mode() & 0o7777
    }

    pub fn link_of(&self, path: &str) -> Option<String> {
        Some(std::fs::read_link(self.path(path)).ok()?.to_str().unwrap().to_owned())
    }

    /// Returns the relative paths of everything in the tree.
    pub fn listing(&self) -> Vec<String> {
        fn visit(dir: &Path, base: &Path, all: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                all.push(path.strip_prefix(base).unwrap().to_str().unwrap().to_owned());
                if path.symlink_metadata().unwrap().is_dir() {
                    visit(&path, base, all);
                }
            }
        }
        let mut all = Vec::new();
        visit(&self.path(""), &self.path(""), &mut all);
        all.sort_unstable();
        all
    }
}
