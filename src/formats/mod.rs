//! Parsers for foreign formats: partition tables, file systems, packages. Their input is not trusted. The parsers mount
//! nothing, change nothing, and do not use the kernel's own parsers.

pub mod disk_size;
pub mod ext_metadata;
pub mod fstab;
pub mod initramfs;
pub mod package;
pub mod partition;
pub mod superblock;
