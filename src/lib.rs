//! oven bakes Amazon Machine Images without booting an instance: packages and scripts run in a sandbox, on a copy of the
//! base image's disk. The same definition on the same base is baked only once.
//!
//! [`bake::bake`] runs a bake from start to end. A bake has six steps: resolve the base image ([`cloud`]), check out
//! its disk ([`disk`]), mount the disk ([`mount`]), provision the mounted image ([`provision`]), commit the disk to a
//! snapshot, and register the snapshot as an image. [`distros`] makes the plan for provisioning. Before the commit,
//! [`seal`] cleans and checks the image.
//!
//! The modules are listed in the order of their imports. A module imports only from modules that are listed before it;
//! `tests/pure/layers.rs` checks this.

// Kinds of failure, with exit codes and hints.
pub mod error;

// Formatting of text that people read.
pub mod text;

// Ids of images, snapshots, volumes and runs; the size of a block.
pub mod ids;

// Open block devices.
pub mod device;

// Secret values: they are masked in output, and searched for in the image.
pub mod secrets;

// A Chrome trace of the run.
pub mod trace;

// Wrappers of the kernel's interfaces.
pub mod sys;

// Parsers of partition tables, file systems and packages.
pub mod formats;

// The files of an image.
pub mod image;

// The process that owns a resource.
pub mod owner;

// Clean-up actions, and when they run.
pub mod undo;

// The output of a run: screen, log file, JSON events.
pub mod report;

// The settings of oven.toml; readers of TOML and of templates.
pub mod config;

// The traits of a cloud, and the clouds that implement them.
pub mod cloud;

// A definition: image.toml and the files next to it.
pub mod definition;

// Checksum and fingerprint, which decide whether two bakes would make the same image.
pub mod identity;

// Upload and download of snapshots, block by block.
pub mod transfer;

// The sandbox of one step.
pub mod sandbox;

// The disk that a bake works on.
pub mod disk;

// A mounted root file system, and the check after unmounting that nothing uses its disk.
pub mod mount;

// Installs packages, places files and runs scripts in a root file system.
pub mod provision;

// Cleans the finished root file system, and checks that it is clean and can boot.
pub mod seal;

// Distro plugins, and the choice of the plugin for an image.
pub mod distros;

// Checks whether this machine can bake.
pub mod doctor;

// Makes the cloud, the disks and the plugins from the settings.
pub mod site;

// The steps of a bake; bakes of several definitions; imports of disk images.
pub mod bake;

// The command line.
pub mod cli;
