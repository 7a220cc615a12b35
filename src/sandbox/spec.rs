//! The specification of a step, and the result of a step.

use crate::device::DeviceNode;
use oven_distro::Shim;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

/// The specification of a step, which the helper gets as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct StepSpec {
    /// The mount point of the image's root, in the private mount namespace of this process.
    pub root: PathBuf,
    pub argv: Vec<String>,
    /// The complete environment, except for the variables that the sandbox itself sets.
    pub env: BTreeMap<String, String>,
    /// The working directory, a path in the image.
    pub cwd: String,
    /// Whether the step has the network. Otherwise it has a private network namespace with only `lo`.
    pub network: bool,
    /// Used with the network: if true, the step fails unless it can be kept from reaching the builder's credentials
    /// ([`super::egress`]).
    #[serde(default)]
    pub fenced: bool,
    /// Used with the network: the content of `/etc/resolv.conf`. `None` means this machine's.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// Files that exist only while the step runs.
    pub shims: Vec<Shim>,
    /// Files and directories of this machine that the step sees read-only.
    pub binds: Vec<BindMount>,
    /// Cached packages, mounted over the image's directories.
    #[serde(default)]
    pub caches: Vec<CacheMount>,
    /// The nodes of the image's disk, for the step's private `/dev`.
    pub nodes: Vec<DeviceNode>,
    /// Whether the step's writes are discarded.
    pub throwaway: bool,
    /// Whether the step has the terminal, for a person (`oven shell`). Otherwise standard input is `/dev/null`.
    pub interactive: bool,
}

/// A file or directory of this machine that a step sees read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindMount {
    pub source: PathBuf,
    /// An absolute path in the image. Below `/run` it is created. Elsewhere it must exist, and links are followed
    /// inside the image.
    pub target: String,
    /// The canonical path of a directory. When the source is bound, it must be inside this directory, even if links
    /// have changed by then. The reason: the owner of a definition may exchange its directories, and oven follows links
    /// as root.
    #[serde(default)]
    pub within: Option<PathBuf>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepExit {
    pub status: ExitStatus,
    /// The names of processes that were still running when the command ended. They were killed.
    pub left: Vec<String>,
}

/// How a step's command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// It exited. 127: the image has no such program; 126: the program cannot be executed.
    Exited(i32),
    /// This signal killed it.
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

/// A cache to mount for a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheMount {
    /// The directory in the image over which it is mounted.
    pub target: String,
    /// The lower directory, if there is one. All bakes share it.
    pub lower: Option<PathBuf>,
    /// This bake's private directory, over the lower one.
    pub upper: PathBuf,
    pub work: PathBuf,
    /// Whether writes go to `upper`. Otherwise they are discarded with the step.
    pub writable: bool,
}
