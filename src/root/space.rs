//! How much room is left on the image's disk.

use crate::error::Kind;
use anyhow::{Context, Result};
use std::path::Path;

/// A disk with less than this share free is full: something may have failed to write, and have hidden it.
const FLOOR: u64 = 1024;

/// A file system's blocks and files.
#[derive(Debug, Clone, Copy)]
pub struct Space {
    blocks: (u64, u64),
    /// None where they are made as needed.
    files: (u64, u64),
}

impl Space {
    pub fn of(root: &Path) -> Result<Self> {
        let stat = rustix::fs::statvfs(root).with_context(|| format!("measuring {}", root.display()))?;
        Ok(Self { blocks: (stat.f_bfree, stat.f_blocks), files: (stat.f_ffree, stat.f_files) })
    }

    pub fn is_full(&self) -> bool {
        let low = |(free, all): (u64, u64)| all > 0 && free <= all / FLOOR;
        low(self.blocks) || low(self.files)
    }

    /// Fails if the disk became full since this was measured.
    pub fn ensure_left(&self, root: &Path) -> Result<()> {
        let now = Self::of(root)?;
        if self.is_full() || !now.is_full() {
            return Ok(());
        }
        let what = if now.blocks.0 <= now.blocks.1 / FLOOR { "space" } else { "room for files (inodes)" };
        Err(Kind::Step
            .failure(format!(
                "no {what} is left on the image's disk, so a step may not have written all that it should"
            ))
            .hint("Give it a larger one: `size_gib` of `[disk]` in image.toml.")
            .into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn full_is_the_last_thousandth() {
        let space = |blocks, files| Space { blocks, files }.is_full();
        assert!(!space((100, 1000), (0, 0)), "files made as needed are never short");
        assert!(space((0, 1000), (0, 0)) && space((5, 100_000), (9, 10)));
        assert!(space((500, 1000), (0, 65536)));
        assert!(!Space::of(Path::new("/")).unwrap().is_full());
    }
}
