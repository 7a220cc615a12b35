//! Packages whose scripts misbehave, baked by `oven` itself: each has the right outcome, nothing is left, and nothing
//! of the host has changed. Needs root, `OVEN_TEST_TINY` and `OVEN_TEST_BASE`; what a test downloads it says.

mod host;
pub mod lab;

mod daemons;
mod escapes;
mod limits;
mod network;
mod package_files;
mod planted_files;
mod reads;
mod real;
mod space;
mod table;
