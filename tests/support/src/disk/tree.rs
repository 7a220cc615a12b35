//! Lists a file system in a raw file without mounting it.

use oven::ids::digest_of;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, err) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    out
}

/// Returns every path of an ext4 file system at the start of a file, with the mode, owner, kind, and a digest of the
/// content. The file system must be clean.
pub fn tree(raw: &Path) -> BTreeMap<String, String> {
    run("e2fsck", &["-f", "-n", raw.to_str().unwrap()]);
    let dir = tempfile::tempdir().unwrap();
    run("debugfs", &["-R", &format!("rdump / {}", dir.path().display()), raw.to_str().unwrap()]);
    let (mut all, mut dirs) = (BTreeMap::new(), vec![dir.path().to_owned()]);
    while let Some(next) = dirs.pop() {
        for entry in fs::read_dir(&next).unwrap() {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let kind = metadata.file_type();
            let what = if kind.is_dir() {
                dirs.push(path.clone());
                "directory".to_owned()
            } else if kind.is_symlink() {
                format!("link to {}", fs::read_link(&path).unwrap().display())
            } else {
                assert!(!kind.is_block_device() && !kind.is_char_device(), "{}", path.display());
                let digest = digest_of(&fs::read(&path).unwrap());
                format!("{} bytes {:02x?}", metadata.len(), &digest[..6])
            };
            let (mode, owner) = (metadata.permissions().mode(), (metadata.uid(), metadata.gid()));
            let path = path.strip_prefix(dir.path()).unwrap().to_str().unwrap().to_owned();
            all.insert(path, format!("{mode:o} {owner:?} {what}"));
        }
    }
    all
}
