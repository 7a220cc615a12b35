//! oven bakes Amazon Machine Images without booting an instance: packages and scripts run in a sandbox, on a copy of the
//! base image's disk. The same definition on the same base is baked only once.
//!
//! The story is [`bake::bake`], in six steps: resolve the base image ([`cloud`]), check out its disk ([`disk`]), mount
//! it ([`mount`]), provision it ([`provision`], with a plan of [`distros`]) and seal it ([`seal`]), commit the disk to a
//! snapshot, and register that as an image.
//!
//! The modules below are the floor plan, from the ground up: each imports only from those above it in this list, and
//! `tests/pure/layers.rs` holds them to it.

// Kinds of failure: exit codes and hints.
pub mod error;

// Small things about text that people read.
pub mod text;

// Names of what a cloud holds; the block.
pub mod ids;

// An opened block device.
pub mod device;

// Values, masked and searched for.
pub mod secrets;

// A Chrome trace of the run.
pub mod trace;

// The kernel, wrapped once.
pub mod sys;

// Partition tables, file systems, packages: from bytes.
pub mod formats;

// The files of an image.
pub mod image;

// Whose a resource is.
pub mod owner;

// Debts to the cloud, and when they are paid.
pub mod undo;

// What the user sees of a run.
pub mod report;

// The settings of oven.toml; TOML, templates.
pub mod config;

// Traits, and the clouds that implement them.
pub mod cloud;

// A definition: image.toml and the files next to it.
pub mod definition;

// Checksum and fingerprint.
pub mod identity;

// Snapshots, block by block.
pub mod transfer;

// One contained step.
pub mod sandbox;

// Where a bake gets its disk.
pub mod disk;

// A mounted root, and the proof of its release.
pub mod mount;

// Packages, files and scripts in a root.
pub mod provision;

// Cleaned, checked, bootable.
pub mod seal;

// Plugins, and which one an image is for.
pub mod distros;

// Whether this machine can bake.
pub mod doctor;

// Wiring: settings become clouds, disks, distros.
pub mod site;

// THE STORY; batches and imports.
pub mod bake;

// The command line.
pub mod cli;
