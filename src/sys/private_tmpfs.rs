//! A private file system for mount points and device nodes. Only this process can see it.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::path::Path;
use sys_mount::{Mount, MountFlags};

/// An empty directory on the host. This process mounts a tmpfs on the directory, in its private mount namespace. So the
/// host's directory remains empty, even if the process is killed.
pub const DIR: &str = "/run/oven";

/// The file system has only mount points and device nodes, so it needs little memory.
const OPTIONS: &str = "mode=0700,size=16m,nr_inodes=16384";

/// Mounts the file system. Call this once, in a private mount namespace. Errors: [`Kind::Machine`].
pub fn mount() -> Result<()> {
    super::state_files::create_dir(Path::new(DIR))?;
    Mount::builder()
        .fstype("tmpfs")
        .flags(MountFlags::NOSUID | MountFlags::NOEXEC)
        .data(OPTIONS)
        .mount("oven", DIR)
        .map(drop)
        .map_err(|error| Kind::Machine.failure(error).hint("`oven doctor` lists what this machine lacks."))
        .with_context(|| format!("mounting a tmpfs on {DIR}"))
}
