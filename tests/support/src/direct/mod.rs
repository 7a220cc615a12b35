//! Bakes on disks that oven serves block by block.

pub mod bake;
pub mod base_cache;
pub mod by_blocks;
