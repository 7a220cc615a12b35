//! Bakes on disks that oven serves block by block.

pub mod bake;
pub mod by_blocks;
pub mod cached;
