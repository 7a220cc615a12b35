//! Makes sure that a region's directories are private, for two reasons. Other users must not read the images. And if
//! the directory belongs to another user (for example `--region-dir /tmp/region`, which that user created first), that
//! user could place a link in it that makes root write to another file.

use crate::error::Kind;
use crate::sys::state_files;
use anyhow::Result;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;

const HINT: &str =
    "Correct its owner and mode (chown, chmod o-w), or pass a --region-dir that does not exist yet.";

/// Creates the region's directory if it is missing, and checks its owner and mode.
pub fn create_region_dir(dir: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    check_region_dir(dir)
}

/// Checks the owner and the mode of an existing region's directory.
pub fn check_region_dir(dir: &Path) -> Result<()> {
    // The user chose this path, so it is allowed to be a symbolic link. `metadata` follows the link.
    state_files::check_directory(dir, &fs::metadata(dir)?, HINT)
}

/// Creates a private directory in the region. If the directory exists, checks it and makes it private.
pub fn create_subdirectory(dir: &Path) -> Result<()> {
    state_files::create_dir(dir)
}

/// Checks that a directory in the region is private, if it exists. Changes nothing.
pub fn check_subdirectory(dir: &Path) -> Result<()> {
    let found = match fs::symlink_metadata(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        found => found?,
    };
    state_files::examine_dir(dir)?;
    let mode = found.permissions().mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(Kind::Machine
            .failure(format!("other users have access to {}: its mode is {mode:04o}", dir.display()))
            .hint(format!("Run `chmod 700 {}`, or pass another --region-dir.", dir.display()))
            .into());
    }
    Ok(())
}
