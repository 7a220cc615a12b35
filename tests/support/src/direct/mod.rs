//! Bakes of disks that are served by their blocks.

pub mod bake;
pub mod base_cache;
pub mod by_blocks;
