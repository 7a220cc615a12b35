//! The files of an image: a directory tree that is not trusted.

pub mod accounts;
pub(crate) mod cursor;
pub mod data;
pub mod file_version;
pub mod label;
pub mod limits;
pub mod os_release;
pub mod patterns;
pub mod remove;
#[cfg(test)]
pub(crate) mod test;
pub mod tree;
pub mod walk;
