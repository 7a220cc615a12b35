//! Wrappers for features of the kernel: files, mounts, loop devices, signals, threads.

pub mod block_ioctls;
pub(crate) mod capabilities;
pub mod fds;
pub(crate) mod landlock;
pub mod lock;
pub mod loop_device;
pub mod mount;
pub mod namespaces;
pub mod poll;
pub mod private_tmpfs;
pub(crate) mod seccomp;
pub mod signals;
pub mod space;
pub mod sparse_copy;
pub mod state_files;
pub mod tasks;
pub mod temp_file;
