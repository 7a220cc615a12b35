//! oven bakes Amazon Machine Images in a contained chroot, once for each definition.
//!
//! The story is [`bake::bake`], in six steps: resolve the base image ([`cloud`]), check out its disk ([`disk`]), mount
//! it ([`mount`]), provision it ([`provision`], with a plan of [`distros`]) and seal it ([`seal`]), commit the disk to a
//! snapshot, and register that as an image.
//!
//! The modules below are the floor plan, from the ground up: each imports only from those above it in this list, and
//! `tests/pure/layers.rs` holds them to it.

pub mod bake; // THE STORY; batches and imports
pub mod cli;
pub mod cloud; // traits, and the clouds that implement them
pub mod config; // oven.toml, TOML, templates
pub mod definition; // image.toml and the files beside it
pub mod device; // an opened block device
pub mod disk; // where a bake gets its disk
pub mod distros; // plugins, and which one an image is for
pub mod doctor; // whether this machine can bake
pub mod error; // Kinds of failure: exit codes and hints
pub mod formats; // partition tables, file systems, packages: from bytes
pub mod identity; // checksum and fingerprint
pub mod ids; // names of what a cloud holds; the block
pub mod image; // the files of an image
pub mod mount; // a mounted root, and the proof of its release
pub mod owner; // whose a resource is
pub mod provision; // packages, files and scripts in a root
pub mod report; // what the user sees of a run
pub mod sandbox; // one contained step
pub mod seal; // cleaned, checked, bootable
pub mod secrets; // values, masked and searched for
pub mod site; // wiring: settings become clouds, disks, distros
pub mod sys; // the kernel, wrapped once
pub mod text; // small things about text that people read
pub mod trace; // a Chrome trace of the run
pub mod transfer; // snapshots, block by block
pub mod undo; // debts to the cloud, and when they are paid // the command line
