//! An image's directory: `image.toml`, and the files beside it.

use crate::cloud::{BaseRef, Tags};
use oven_distro::Conffiles;
use std::path::PathBuf;

/// What a definition stands on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum From {
    Image(BaseRef),
    /// Another definition's directory, as spelt in image.toml but relative to the working directory.
    Parent(PathBuf),
}

/// A package that is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ask {
    Named { name: String, version: Option<String> },
    File { source: PathBuf, package: crate::package::Package },
}

/// `[[file]]`: placed after the packages are installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// On this machine, inside the definition's directories.
    pub source: PathBuf,
    /// Absolute, in the image.
    pub target: String,
    /// Permission bits; default: 0755 if the source is executable, else 0644.
    pub mode: u32,
    /// A user's name or number in the image; default root.
    pub owner: String,
    pub group: String,
}

/// `[[run]]` and `[[test]]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Script {
    /// Relative to the definition's directory, without `..`.
    pub script: PathBuf,
    pub network: bool,
    /// Seconds; default 3600.
    pub timeout: u64,
}

/// A definition, read and checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Definition {
    /// As the user spelt it.
    pub dir: PathBuf,
    /// The family.
    pub name: String,
    pub description: String,
    pub from: From,
    pub packages: Vec<Ask>,
    pub files: Vec<File>,
    pub runs: Vec<Script>,
    pub tests: Vec<Script>,
    pub size_gib: Option<u64>,
    pub tags: Tags,
    /// As spelt in image.toml: relative to `dir`.
    pub inputs: Vec<String>,
    pub upgrade: bool,
    pub recommends: bool,
    pub conffiles: Conffiles,
    pub network: bool,
    /// `[clean] keep`: paths that the clean-up leaves alone and the lint accepts.
    pub keep: Vec<String>,
}
