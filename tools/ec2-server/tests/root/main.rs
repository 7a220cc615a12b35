//! The server with volumes that are loop devices: needs root.

mod attach;
#[path = "../support/mod.rs"]
mod support;
