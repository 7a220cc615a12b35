//! What a step is given, and how it ended.

use crate::device::DeviceNode;
use oven_distro::Shim;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// The specification of a step, which the helper gets as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepSpec {
    /// Where the image's root is mounted, in the private mount namespace of this process.
    pub root: PathBuf,
    pub argv: Vec<String>,
    /// The whole environment except for what the containment itself sets.
    pub env: BTreeMap<String, String>,
    /// A directory in the image.
    pub cwd: String,
    /// Without it the step has a network namespace of its own, with nothing but `lo`.
    pub network: bool,
    /// With the network: the step cannot reach the builder's credentials ([`super::egress`]), or it fails.
    #[serde(default)]
    pub fenced: bool,
    /// With the network: the content of `/etc/resolv.conf`. `None`: this machine's.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// Files that exist only while the step runs.
    pub shims: Vec<Shim>,
    /// Files and directories of this machine that the step sees read-only.
    pub binds: Vec<BindMount>,
    /// Cached packages, mounted over the image's own directories.
    #[serde(default)]
    pub caches: Vec<CacheMount>,
    /// The disk's own nodes, for the step's private `/dev`.
    pub nodes: Vec<DeviceNode>,
    /// What the step writes is discarded.
    pub throwaway: bool,
    /// It has a terminal for a person (`oven shell`); otherwise standard input is `/dev/null`.
    pub interactive: bool,
}

/// Something of this machine that a step sees read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindMount {
    pub source: PathBuf,
    /// Absolute, in the image. Below `/run` it is created; elsewhere it has to exist, and links are followed inside the
    /// image.
    pub target: String,
    /// The canonical path of a directory that has to contain the source when it is bound, wherever links lead by then:
    /// the owner of a definition may exchange its directories, and oven follows links as root.
    #[serde(default)]
    pub within: Option<PathBuf>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepExit {
    pub status: ExitStatus,
    /// Names of processes that the command left running. They were killed.
    pub left: Vec<String>,
}

/// How a step's command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By itself. 127: the image has no such program; 126: it cannot be executed.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// It exceeded its time limit.
    TimedOut,
}

impl ExitStatus {
    pub fn success(self) -> bool {
        self == Self::Exited(0)
    }
}

impl fmt::Display for ExitStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exit status {code}"),
            Self::Signaled(number) => match nix::sys::signal::Signal::try_from(*number) {
                Ok(signal) => write!(f, "killed by {signal}"),
                Err(_) => write!(f, "killed by signal {number}"),
            },
            Self::TimedOut => f.write_str("it took too long and was killed"),
        }
    }
}

/// A cache as it is mounted for a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheMount {
    /// Its directory in the image.
    pub target: String,
    /// The lower directory, if there is one: it is shared by all bakes.
    pub lower: Option<PathBuf>,
    /// This bake's own directory, over the lower one.
    pub upper: PathBuf,
    pub work: PathBuf,
    /// Otherwise nothing is written to `upper`: what the step writes is discarded with the step.
    pub writable: bool,
}
