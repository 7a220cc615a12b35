//! The pure ring: needs neither root nor devices. `cargo test --test pure`; tests/README.md describes the rings.

mod apt_scripts;
mod cli;
mod completions;
mod docs;
#[cfg(feature = "aws")]
mod ebs;
#[cfg(feature = "aws")]
mod ec2;
mod export;
mod faults_catalogue;
mod fuzz;
mod help;
mod hostile_definitions;
mod layers;
mod names;
mod plugins;
mod preflight;
mod region;
mod rust_source;
mod validate;
mod wrong_inputs;
