//! Runs one command in a mounted root, contained: a process tree that ends as a whole.

use oven_distro::Shim;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// What the step helper is told, as JSON on its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Spec {
    /// Where the image's root is mounted, in the private mount namespace of this process.
    pub root: PathBuf,
    pub argv: Vec<String>,
    /// The whole environment but for what containment itself sets.
    pub env: BTreeMap<String, String>,
    /// In the image.
    pub cwd: String,
    /// Without it the step has a network namespace of its own, with nothing but `lo`.
    pub network: bool,
    /// Files that are there only while the step runs.
    pub shims: Vec<Shim>,
    /// Files and directories of this machine that the step sees read-only.
    pub binds: Vec<Bind>,
    /// The disk's own nodes, for the step's private `/dev`.
    pub nodes: Vec<Node>,
    /// What the step writes is thrown away.
    pub throwaway: bool,
    /// A terminal for a person (`oven shell`); else standard input is `/dev/null`.
    pub interactive: bool,
}

/// Something of this machine that a step sees read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bind {
    pub source: PathBuf,
    /// Absolute, in the image. Below `/run` it is made; elsewhere it has to exist, and is followed inside the image.
    pub target: String,
}

/// A block device node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// In `/dev`: `loop0p1`.
    pub name: String,
    pub rdev: u64,
    /// Below `/dev`: `disk/by-uuid/…`.
    pub links: Vec<String>,
}
