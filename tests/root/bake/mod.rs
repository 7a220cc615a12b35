//! Whole bakes on a local region.

mod boot;
mod definition_limits;
mod failed_step;
mod faults;
mod plan;
mod secrets;
mod security;
mod story;
mod trace;
mod verify;
