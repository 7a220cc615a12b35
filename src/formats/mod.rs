//! Parsers for foreign formats: partition tables, file systems, packages. Their input is not trusted. They mount
//! nothing, ask the kernel nothing, and change nothing.

pub mod ext_metadata;
pub mod fstab;
pub mod initramfs;
pub mod package;
pub mod partition;
pub mod superblock;
