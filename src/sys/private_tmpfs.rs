//! A directory for mount points and device nodes that only this process sees.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::os::unix::fs::DirBuilderExt;
use sys_mount::{Mount, MountFlags};

/// An empty directory on the host; this process mounts a file system in memory over it, in its own mount namespace, so
/// that nothing of a run is left there however it ends.
pub const DIR: &str = "/run/oven";

/// Call it once, after the mount namespace was made private.
pub fn make() -> Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(DIR)
        .with_context(|| format!("making {DIR}"))?;
    Mount::builder()
        .fstype("tmpfs")
        .flags(MountFlags::NOSUID | MountFlags::NOEXEC)
        .data("mode=0700")
        .mount("oven", DIR)
        .map(drop)
        .map_err(|error| Kind::Machine.failure(error).hint("`oven doctor` lists what this machine lacks."))
        .with_context(|| format!("mounting a tmpfs on {DIR}"))
}
