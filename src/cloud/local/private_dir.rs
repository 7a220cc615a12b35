//! A region's directories are ours alone. Images hold what nobody else should read; and in a directory of somebody
//! else's (`--region-dir /tmp/region`, say) a link could be waiting for root to write through it.

use crate::error::Kind;
use anyhow::{Context, Result};
use rustix::process::geteuid;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::Path;

/// Others may write. The group may: with a group for each user that is the owner alone.
const OTHERS_WRITE: u32 = 0o002;

/// Makes the region's directory, if it is not there, and makes sure whose it is.
pub fn make(dir: &Path) -> Result<()> {
    create(dir)?;
    // What it is called may be a link of the user's own.
    check(dir, &fs::metadata(dir)?)
}

/// Makes a directory of the region, private, and makes sure that it is one.
pub fn make_part(dir: &Path) -> Result<()> {
    create(dir)?;
    let found = fs::symlink_metadata(dir)?;
    if !found.is_dir() {
        return Err(refused(dir, "is no directory, but leads elsewhere"));
    }
    check(dir, &found)?;
    if found.permissions().mode() & 0o077 != 0 && found.uid() == geteuid().as_raw() {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))
            .with_context(|| format!("making {} private", dir.display()))?;
    }
    Ok(())
}

fn create(dir: &Path) -> Result<()> {
    Ok(fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?)
}

fn check(dir: &Path, found: &fs::Metadata) -> Result<()> {
    // With sudo the region may be the user's own, who is root if they want to.
    let sudo = std::env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
    if ![Some(0), Some(geteuid().as_raw()), sudo].contains(&Some(found.uid())) {
        return Err(refused(dir, &format!("belongs to user {}, who is neither you nor root", found.uid())));
    }
    if found.permissions().mode() & OTHERS_WRITE != 0 {
        return Err(refused(dir, "can be written by everybody"));
    }
    Ok(())
}

fn refused(dir: &Path, why: &str) -> anyhow::Error {
    Kind::Machine
        .failure(format!("{} {why}", dir.display()))
        .hint("Name a directory that is not there yet (oven makes it), or take it over: chown, chmod o-w.")
        .into()
}
