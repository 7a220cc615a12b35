//! The mount API, and the kernel's tables of mounts.

pub(crate) mod api;
pub mod table;
