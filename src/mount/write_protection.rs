//! Protects partitions from the kernel while oven only reads their file systems.
//!
//! A read-only mount is not enough. ext4 writes to the disk of a read-only mount if it finds an error, because it records
//! the error in the superblock, and if deleted files are still on the list of orphans. It does neither if the block
//! device is read-only.

use super::partitions::DiskPart;
use crate::error::Kind;
use crate::sys::block_ioctls;
use anyhow::{Context, Result};
use std::os::fd::AsFd;

/// Partitions that are read-only at block level while this value exists. The whole disk keeps its own flag, because the
/// flag of a loop device survives the disk: if oven were killed, the next user of the loop device could not write to it.
/// The kernel removes partitions, and so their flags, together with the disk.
#[derive(Debug)]
pub struct WriteProtection<'a> {
    parts: Vec<&'a DiskPart>,
}

impl<'a> WriteProtection<'a> {
    /// Makes partitions read-only. The flag may be set already, because oven was killed with the disk attached. So it is
    /// not compared with its earlier value, and [`Self::disable`] always clears it.
    ///
    /// Errors: `Machine` if the kernel refuses.
    pub fn enable(parts: impl IntoIterator<Item = &'a DiskPart>) -> Result<Self> {
        let mut protection = Self { parts: Vec::new() };
        for part in parts.into_iter().filter(|part| part.partition.is_some()) {
            let set = block_ioctls::set_read_only(part.node.as_fd(), true);
            set.map_err(|error| Kind::Machine.error(error))
                .with_context(|| format!("making {} read-only", part.name))?;
            protection.parts.push(part);
        }
        Ok(protection)
    }

    /// Makes the partitions writable again.
    ///
    /// Errors: `Machine` if the kernel refuses.
    pub fn disable(mut self) -> Result<()> {
        while let Some(part) = self.parts.pop() {
            let set = block_ioctls::set_read_only(part.node.as_fd(), false);
            set.map_err(|error| Kind::Machine.error(error))
                .with_context(|| format!("making {} writable again", part.name))?;
        }
        Ok(())
    }
}

impl Drop for WriteProtection<'_> {
    fn drop(&mut self) {
        for part in self.parts.drain(..) {
            _ = block_ioctls::set_read_only(part.node.as_fd(), false);
        }
    }
}
