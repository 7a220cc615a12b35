//! The files of an image: a directory tree that is not trusted.

pub mod accounts;
pub mod label;
pub mod os_release;
pub mod patterns;
#[cfg(test)]
pub(crate) mod test;
pub mod tree;
pub mod walk;
