//! Disks and file systems as files of this machine.

pub mod image_reader;
pub mod loop_disk;
pub mod tree;
pub mod unmount;
