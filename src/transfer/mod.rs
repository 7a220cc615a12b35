//! Transfers snapshots to and from the cloud, block by block.

pub mod download;
#[cfg(test)]
pub mod fake;
pub mod raw;
pub mod readers;
pub mod upload;
