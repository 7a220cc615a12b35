//! Bakes of disks that are served by their blocks.

pub mod bake;
pub mod by_blocks;
pub mod cached;
