//! A mounted image, and what is done inside it.

pub mod step;
