//! What a step is given, and how it ended.

use crate::device::Node;
use oven_distro::Shim;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
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
    /// With the network: the builder's credentials are out of the step's reach ([`egress`]), or there is no step.
    #[serde(default)]
    pub fenced: bool,
    /// With the network: what `/etc/resolv.conf` says. `None`: what this machine's says.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// Files that are there only while the step runs.
    pub shims: Vec<Shim>,
    /// Files and directories of this machine that the step sees read-only.
    pub binds: Vec<Bind>,
    /// What is kept of downloads, over the image's own directories.
    #[serde(default)]
    pub caches: Vec<CacheMount>,
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
    /// The canonical path of a directory that the source has to lie in when it is bound, wherever links lead by then:
    /// who owns a definition may exchange its directories, and root follows.
    #[serde(default)]
    pub within: Option<PathBuf>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exit {
    pub status: ExitStatus,
    /// Names of processes that the command left. They were killed.
    pub left: Vec<String>,
}

/// How a step's command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// By itself. 127: there is no such program in the image; 126: it cannot be executed.
    Exited(i32),
    /// By this signal.
    Signaled(i32),
    /// It took longer than it may.
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

/// A cache, as a step finds it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheMount {
    /// In the image.
    pub target: String,
    /// The directory below, if there is one: that of all bakes.
    pub lower: Option<PathBuf>,
    /// This bake's own, over it.
    pub upper: PathBuf,
    pub work: PathBuf,
    /// Else nothing is written there: what the step writes goes with it.
    pub writable: bool,
}
