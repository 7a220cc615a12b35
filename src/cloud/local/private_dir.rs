//! Makes sure that a region's directories are private, for two reasons. Other users must not read the images. And if
//! the directory belongs to another user (for example `--region-dir /tmp/region`, which that user created first), that
//! user could place a link in it that makes root write to another file.

use crate::error::Kind;
use anyhow::Result;
use rustix::process::geteuid;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// The mode bit that lets everybody write. The group's write bit is not checked, because a user's default group often
/// has no other members.
const OTHERS_WRITE: u32 = 0o002;

/// Creates the region's directory if it is missing, and checks its owner and mode.
pub fn create_region_dir(dir: &Path) -> Result<()> {
    create(dir)?;
    // The user chose this path, so it is allowed to be a symbolic link. `metadata` follows the link.
    check_owner_and_mode(dir, &fs::metadata(dir)?)
}

/// Checks the owner and the mode of an existing region's directory.
pub fn check_region_dir(dir: &Path) -> Result<()> {
    check_owner_and_mode(dir, &fs::metadata(dir)?)
}

/// Creates a private directory in the region. If the directory exists, checks it.
pub fn create_subdirectory(dir: &Path) -> Result<()> {
    match create(dir) {
        // If a file or a link has this name, the check below reports it.
        Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
        created => created?,
    }
    check_subdirectory(dir)
}

/// Checks that a directory in the region is private, if it exists. Its mode is not changed, because another program may
/// depend on it.
pub fn check_subdirectory(dir: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    if !found.is_dir() {
        let failure =
            Kind::Machine.failure(format!("{} is a link or a file, not a directory", dir.display()));
        return Err(failure.hint("Remove it, or pass another --region-dir.").into());
    }
    check_owner_and_mode(dir, &found)?;
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Kind::Machine
            .failure(format!("other users have access to {}: its mode is {mode:04o}", dir.display()))
            .hint(format!("Run `chmod 700 {}`, or pass another --region-dir.", dir.display()))
            .into());
    }
    Ok(())
}

fn create(dir: &Path) -> std::io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

fn check_owner_and_mode(dir: &Path, found: &fs::Metadata) -> Result<()> {
    // The region may belong to the user who called sudo, because that user can become root anyway.
    let sudo = std::env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
    if ![Some(0), Some(geteuid().as_raw()), sudo].contains(&Some(found.uid())) {
        return Err(unsafe_directory(
            dir,
            &format!("belongs to user {}, who is neither you nor root", found.uid()),
        ));
    }
    if found.permissions().mode() & OTHERS_WRITE != 0 {
        return Err(unsafe_directory(dir, "is writable by everybody"));
    }
    Ok(())
}

fn unsafe_directory(dir: &Path, why: &str) -> anyhow::Error {
    Kind::Machine
        .failure(format!("{} {why}", dir.display()))
        .hint(
            "Correct its owner and mode (chown, chmod o-w), or pass a --region-dir that does not exist yet.",
        )
        .into()
}
