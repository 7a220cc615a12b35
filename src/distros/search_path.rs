//! Finds executable plugins, and decides which of them are trusted.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::fs::{File, Metadata};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The directories of installed plugins. The first is for the administrator's plugins, and takes precedence. The second
/// is for plugins that packages install.
pub const PLUGIN_DIRECTORIES: [&str; 2] = ["/etc/oven/distros.d", "/usr/lib/oven/distros.d"];
/// The maximal size of a plugin's file, in bytes.
const MAX: u64 = 64 << 20;

/// A file in one of the directories of plugins.
#[derive(Debug)]
pub struct PluginFile {
    pub path: PathBuf,
    /// The file's content, or the reason why the file is rejected.
    pub program: Result<Vec<u8>, String>,
}

/// Returns the name of a plugin, which is the name of its file without the ending. The error says what is wrong with
/// the name.
pub fn plugin_name(path: &Path) -> Result<String, String> {
    let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
    if stem.is_empty() || !stem.chars().all(plain) {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        return Err(format!(
            "has the invalid name {file:?}: use lower-case letters, digits, `-` and `_`, and an ending such as `.sh`"
        ));
    }
    Ok(stem.to_owned())
}

/// Returns the files of these directories, in the order of the directories. The files of each directory are sorted by
/// name. Hidden files are ignored.
pub fn find_plugins(directories: &[PathBuf]) -> Vec<PluginFile> {
    let mut found = Vec::new();
    for directory in directories {
        let entries = match std::fs::read_dir(directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            Err(error) => {
                found.push(PluginFile {
                    path: directory.clone(),
                    program: Err(format!("cannot be read: {error}")),
                });
                continue;
            }
        };
        let mut names: Vec<_> = entries.flatten().map(|entry| entry.file_name()).collect();
        names.retain(|name| !name.to_string_lossy().starts_with('.'));
        names.sort_unstable();
        let fault = directory_fault(directory);
        for name in names {
            let path = directory.join(name);
            let program = match &fault {
                Some(why) => Err(why.clone()),
                None => read_trusted(&path),
            };
            found.push(PluginFile { path, program });
        }
    }
    found
}

/// Returns the reason why the files of a directory are not trusted, or `None` if only root can replace them.
fn directory_fault(directory: &Path) -> Option<String> {
    let real = match directory.canonicalize() {
        Ok(real) => real,
        Err(error) => return Some(format!("is in {}, which cannot be read: {error}", directory.display())),
    };
    real.ancestors().find_map(|dir| match dir.symlink_metadata() {
        Ok(metadata) => {
            // A parent directory that is writable by others is accepted if it is sticky, because then others cannot
            // rename root's files in it.
            let sticky = dir != real && metadata.mode() & 0o1000 != 0;
            let why = ownership_fault(&metadata).filter(|why| !(sticky && why.starts_with("is writable")));
            why.map(|why| format!("is in the directory {}, which {why}", dir.display()))
        }
        Err(error) => Some(format!("is in {}, which cannot be read: {error}", dir.display())),
    })
}

fn ownership_fault(metadata: &Metadata) -> Option<String> {
    if metadata.uid() != 0 {
        Some(format!("belongs to user {}, not to root", metadata.uid()))
    } else if metadata.mode() & 0o022 != 0 {
        Some(format!("is writable by users other than root (mode {:04o})", metadata.mode() & 0o7777))
    } else {
        None
    }
}

/// Reads a plugin's file. The file is rejected if a user other than root can write to it.
fn read_trusted(path: &Path) -> Result<Vec<u8>, String> {
    plugin_name(path)?;
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(|error| {
        match error.raw_os_error() {
            Some(libc::ELOOP) => "is a symbolic link: replace it with a copy of the file".to_owned(),
            _ => format!("cannot be read: {error}"),
        }
    })?;
    let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
    if let Some(why) = ownership_fault(&metadata) {
        return Err(why);
    }
    read_content(file, &metadata)
}

fn read_content(file: File, metadata: &Metadata) -> Result<Vec<u8>, String> {
    if !metadata.is_file() {
        return Err("is not a file: a plugin is one executable file".into());
    }
    if metadata.mode() & 0o111 == 0 {
        return Err("is not executable: run `chmod +x` on it".into());
    }
    if metadata.len() > MAX {
        return Err(format!("is larger than {} MiB", MAX >> 20));
    }
    let mut program = Vec::new();
    file.take(MAX + 1).read_to_end(&mut program).map_err(|error| format!("cannot be read: {error}"))?;
    Ok(program)
}

/// Reads a plugin that was given on the command line. Its owner is not checked, because the user chose the file.
/// Errors: [`Kind::Usage`].
pub fn read_given(path: &Path) -> Result<Vec<u8>> {
    let open = || -> Result<Vec<u8>, String> {
        plugin_name(path)?;
        let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|error| format!("cannot be read: {error}"))?;
        let metadata = file.metadata().map_err(|error| format!("cannot be read: {error}"))?;
        read_content(file, &metadata)
    };
    let program = open().map_err(|why| Kind::Usage.failure(format!("the plugin {} {why}", path.display())));
    program.context("reading a plugin")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    fn put(dir: &Path, name: &str, mode: u32) {
        let path = dir.join(name);
        fs::write(&path, "#!/bin/sh\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn names() {
        assert_eq!(plugin_name(Path::new("/x/void.py")).as_deref(), Ok("void"));
        assert_eq!(plugin_name(Path::new("arch-linux")).as_deref(), Ok("arch-linux"));
        for bad in ["Void.sh", "void.sh.bak", "a b", "void~", "ä.sh"] {
            assert!(plugin_name(Path::new(bad)).unwrap_err().contains(bad), "{bad}");
        }
    }

    #[test]
    fn a_given_plugin_has_to_be_an_executable_file() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "void.sh", 0o755);
        put(dir.path(), "plain.sh", 0o644);
        fs::create_dir(dir.path().join("directory")).unwrap();
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            dir.path().join("fifo"),
            rustix::fs::Mode::from_raw_mode(0o755),
        )
        .unwrap();
        assert_eq!(read_given(&dir.path().join("void.sh")).unwrap(), b"#!/bin/sh\n");
        for (file, why) in [
            ("plain.sh", "not executable"),
            ("directory", "not a file"),
            ("fifo", "not a file"),
            ("no", "No such"),
        ] {
            let error = read_given(&dir.path().join(file)).unwrap_err();
            assert!(format!("{error:#}").contains(why), "{error:#}");
            assert_eq!(Kind::of(&error), Kind::Usage);
        }
    }

    /// If the test does not run as root, it only checks that every file in a directory of the user is rejected.
    #[test]
    fn files_that_others_can_change_are_not_trusted() {
        let dir = tempfile::tempdir().unwrap();
        let own = dir.path().join("distros.d");
        fs::create_dir(&own).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o755)).unwrap();
        put(&own, "good.sh", 0o755);
        put(&own, "open.sh", 0o757);
        put(&own, "README", 0o644);
        put(&own, ".hidden", 0o755);
        std::os::unix::fs::symlink("good.sh", own.join("link.sh")).unwrap();
        let reasons = |dirs: &[PathBuf]| -> Vec<(String, String)> {
            find_plugins(dirs)
                .into_iter()
                .map(|found| {
                    let name = found.path.file_name().unwrap().to_string_lossy().into_owned();
                    (name, found.program.err().unwrap_or_default())
                })
                .collect()
        };
        let found = reasons(std::slice::from_ref(&own));
        let names: Vec<_> = found.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["README", "good.sh", "link.sh", "open.sh"]);
        if !rustix::process::geteuid().is_root() {
            assert!(found.iter().all(|(_, why)| why.contains("not to root")), "{found:?}");
            return;
        }
        assert_eq!(found[1].1, "");
        assert!(found[0].1.contains("has the invalid name"), "{found:?}");
        assert!(found[2].1.contains("symbolic link"), "{found:?}");
        assert!(found[3].1.contains("writable by users other") && found[3].1.contains("0757"), "{found:?}");

        fs::set_permissions(&own, fs::Permissions::from_mode(0o775)).unwrap();
        assert!(reasons(std::slice::from_ref(&own)).iter().all(|(_, why)| why.contains("in the directory")));
        assert!(reasons(&[dir.path().join("none")]).is_empty());
    }
}
