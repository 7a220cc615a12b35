//! Formats of other people, read from bytes that lie: partition tables, file systems, packages. Nothing here mounts, asks the machine or changes anything.

pub mod ext_metadata;
pub mod fstab;
pub mod initramfs;
pub mod package;
pub mod partition;
pub mod superblock;
