//! A mounted image, and what is done inside it.

pub mod shim;
pub mod step;
