//! A private file system for mount points and device nodes, visible to this process alone.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::os::unix::fs::DirBuilderExt;
use sys_mount::{Mount, MountFlags};

/// An empty directory on the host. This process mounts a tmpfs over it in its own mount namespace, so nothing of a run
/// is left there however it ends.
pub const DIR: &str = "/run/oven";

/// Mounts it. Called once, after the mount namespace was made private. Errors: [`Kind::Machine`].
pub fn mount() -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(DIR)
        .with_context(|| format!("creating {DIR}"))?;
    Mount::builder()
        .fstype("tmpfs")
        .flags(MountFlags::NOSUID | MountFlags::NOEXEC)
        .data("mode=0700")
        .mount("oven", DIR)
        .map(drop)
        .map_err(|error| Kind::Machine.failure(error).hint("`oven doctor` lists what this machine lacks."))
        .with_context(|| format!("mounting a tmpfs on {DIR}"))
}
