//! The specification of a step, and the result of a step.

use crate::config::project::StepLimits;
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
    /// The environment variables. The sandbox adds defaults, such as `PATH`, for variables that are not set here.
    pub env: BTreeMap<String, String>,
    /// The working directory, a path in the image.
    pub cwd: String,
    /// Whether the step has the builder's network. If false, the step has a private network namespace with only `lo`.
    pub network: bool,
    /// Whether oven blocks the step's access to the builder's credentials ([`super::cgroup::egress`]). If oven cannot block it,
    /// the step fails. The field has no meaning for a step without the network.
    #[serde(default)]
    pub fenced: bool,
    /// The content of `/etc/resolv.conf` for a step with the network. `None` means the content of this machine's file.
    #[serde(default)]
    pub resolv_conf: Option<String>,
    /// Files that exist only while the step runs.
    pub shims: Vec<Shim>,
    /// Files and directories of this machine that the step sees read-only.
    pub binds: Vec<BindMount>,
    /// The package caches to mount over directories of the image.
    #[serde(default)]
    pub caches: Vec<CacheMount>,
    /// The device nodes of the image's disk, which the step's private `/dev` contains. The step can read them.
    pub nodes: Vec<DeviceNode>,
    /// Whether the step can also write to the nodes. A step whose writes are discarded never can.
    #[serde(default)]
    pub disk_writable: bool,
    #[serde(default)]
    pub limits: StepLimits,
    /// Whether the step may create sockets for the audit log, although it cannot send records. Some programs end if they
    /// cannot create one.
    #[serde(default)]
    pub audit_socket: bool,
    /// Whether descriptor 3 of the command is a pipe, to which it writes lines that say how far it is. They are not part
    /// of its output.
    #[serde(default)]
    pub status: bool,
    /// Whether the step's writes are discarded.
    pub throwaway: bool,
    /// Whether the step uses oven's terminal, as in `oven shell`. If false, standard input is `/dev/null`.
    pub interactive: bool,
}

impl StepSpec {
    /// Whether the step can write to the disk of the image, below its file systems.
    pub fn can_write_disk(&self) -> bool {
        self.disk_writable && !self.throwaway
    }
}

/// A file or directory of this machine that a step sees read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BindMount {
    pub source: PathBuf,
    /// An absolute path in the image. If the path is below `/run`, it is created. Otherwise it must exist, and links
    /// are followed inside the image.
    pub target: String,
    /// The canonical path of a directory that must contain the source, or `None` if there is no such limit. oven checks
    /// the source when it binds the source, not earlier. After an earlier check, the owner of a definition could
    /// replace a directory with a symlink, and oven would follow the symlink as root.
    #[serde(default)]
    pub within: Option<PathBuf>,
    /// Paths relative to the source that the step does not see: an empty directory or an empty file is mounted over
    /// each. They are git's own directories and files, which may contain credentials.
    #[serde(default)]
    pub hidden: Vec<PathBuf>,
}

/// How a step ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepExit {
    pub status: ExitStatus,
    /// The names of processes that were still running when the command ended. These processes were killed.
    pub surviving_processes: Vec<String>,
    /// The step's file systems in memory that were full when the command ended.
    pub full_file_systems: Vec<FullMemory>,
    /// The memory for the writes of a step whose writes are discarded. The first is that of `/`.
    pub discarded: Vec<DiscardMemory>,
    /// The limit that the step exceeded, if it failed. oven measures it after the helper has ended.
    #[serde(skip)]
    pub exceeded_limit: Option<ExceededLimit>,
}

/// A file system in memory that was full when a step's command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FullMemory {
    /// Which file system is full, and its limits.
    pub message: String,
    /// The mount point in the image whose free space is the limit. `None` if this machine's memory is the limit.
    pub of_image: Option<String>,
}

impl FullMemory {
    /// A file system whose limit depends only on this machine's memory.
    pub fn of_machine(message: String) -> Self {
        Self { message, of_image: None }
    }
}

/// The memory for writes to one file system of the image, which are discarded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiscardMemory {
    /// The mount point in the image.
    pub path: String,
    /// The description of this memory if it is full.
    pub if_full: FullMemory,
}

/// A limit of a step's cgroup that the step exceeded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExceededLimit {
    /// What the step needed, with the limit and its key.
    pub message: String,
    /// What the user can do.
    pub hint: String,
    /// Whether the kernel ended the step because of the limit. If not, the step could go on, and may have failed for
    /// another reason.
    pub ended_step: bool,
}

impl StepExit {
    /// The result of a command about which only its status is known.
    pub fn of(status: ExitStatus) -> Self {
        let (surviving_processes, full_file_systems, discarded) = (Vec::new(), Vec::new(), Vec::new());
        Self { status, surviving_processes, full_file_systems, discarded, exceeded_limit: None }
    }
}

/// How a step's command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitStatus {
    /// The command exited with this code. As in a shell, code 127 means that the program was not found in the image,
    /// and code 126 means that the program cannot be executed.
    Exited(i32),
    /// A signal with this number killed the command.
    Signaled(i32),
    /// The command exceeded its time limit.
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
    /// The directory in the image over which the cache is mounted.
    pub target: String,
    /// The lower directory of an overlay. All bakes share this directory. If it is `None`, `upper` is mounted without
    /// an overlay.
    pub lower: Option<PathBuf>,
    /// The overlay's upper directory, which is private to this bake.
    pub upper: PathBuf,
    pub work: PathBuf,
    /// Whether writes go to `upper`. If false, they are discarded when the step ends.
    pub writable: bool,
}
