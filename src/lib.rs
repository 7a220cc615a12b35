//! oven bakes Amazon Machine Images in a contained chroot, once for each definition.
//!
//! The story is [`bake::bake`], in six steps: resolve the base image ([`cloud`]), check out its disk ([`disk`]), mount
//! it ([`root`]), provision it ([`distros`]), commit the disk to a snapshot, and register that as an image. What the
//! story owes to the cloud is kept by [`undo`]; what makes two definitions the same is told by [`checksum`].

pub mod ask;
pub mod bake;
pub mod batch;
pub mod checksum;
pub mod cli;
pub mod cloud;
pub mod commands;
pub mod definition;
pub mod disk;
pub mod distros;
mod document;
pub mod download;
pub mod error;
pub mod fingerprint;
mod id_file;
pub mod import;
pub mod key_table;
pub mod machine;
pub mod order;
pub mod owner;
pub mod package;
pub mod report;
pub mod root;
pub mod scratch;
pub mod secrets;
pub mod settings;
pub mod site;
pub mod stop;
mod template;
pub mod trace;
pub mod turn;
pub mod undo;
