//! The server without volumes that are devices: how it answers, and the faults that it is asked for.

mod ebs;
mod faults;
mod guest;
mod manners;
#[path = "../support/mod.rs"]
mod support;
