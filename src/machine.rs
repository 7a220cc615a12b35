//! What a bake needs of the machine that it runs on. All that is missing is told at once.

use crate::error::Kind;
use crate::root::step::egress::Fence;
use crate::site::Site;
use anyhow::Result;
use nix::sys::statvfs::statvfs;
use serde::Serialize;
use std::fmt;
use std::path::Path;

/// Below this, a copy of a usual base image will not fit.
const LITTLE_SPACE: u64 = 4 << 30;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    what: String,
    #[serde(flatten)]
    verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "verdict", rename_all = "lowercase")]
enum Verdict {
    Ok,
    /// A bake can do without.
    Note {
        note: String,
    },
    Lacks {
        why: String,
        fix: String,
    },
}

impl Check {
    pub fn lacks(&self) -> bool {
        matches!(self.verdict, Verdict::Lacks { .. })
    }

    fn new(what: &str, ok: bool, why: impl Into<String>, fix: &str) -> Self {
        let verdict = if ok { Verdict::Ok } else { Verdict::Lacks { why: why.into(), fix: fix.into() } };
        Self { what: what.into(), verdict }
    }

    fn note(what: &str, ok: bool, note: &str) -> Self {
        Self {
            what: what.into(),
            verdict: if ok { Verdict::Ok } else { Verdict::Note { note: note.into() } },
        }
    }
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.verdict {
            Verdict::Ok => write!(f, "ok     {}", self.what),
            Verdict::Note { note } => write!(f, "note   {}: {note}", self.what),
            Verdict::Lacks { why, fix } => write!(f, "lacks  {}: {why}. {fix}", self.what),
        }
    }
}

/// Fails with the list of everything that is missing.
pub fn ensure_fit() -> Result<()> {
    let lacks: Vec<_> =
        checks().into_iter().filter(Check::lacks).map(|check| format!("\n  {check}")).collect();
    if lacks.is_empty() {
        return Ok(());
    }
    Err(Kind::Machine.error(format!("this machine cannot bake:{}", lacks.concat())))
}

/// Everything but the region.
pub fn checks() -> Vec<Check> {
    let root = nix::unistd::geteuid().is_root();
    let mut checks = vec![Check::new("root", root, "oven is not run as root", "Use sudo.")];
    if root {
        checks.push(capabilities(&std::fs::read_to_string("/proc/self/status").unwrap_or_default()));
        checks.push(loops());
    }
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let knows = |name: &str| filesystems.split_whitespace().any(|word| word == name) || has_module(name);
    for name in ["ext4", "tmpfs", "devpts"] {
        checks.push(Check::new(
            &format!("file system {name}"),
            knows(name),
            "the kernel has none",
            "Use a kernel that has it.",
        ));
    }
    checks.push(Check::note("file system xfs", knows("xfs"), "images with an xfs root cannot be baked here"));
    checks.push(Check::note(
        "file system vfat",
        knows("vfat"),
        "/boot/efi is not mounted: no step may change it",
    ));
    checks.push(Check::note("overlay", knows("overlay"), "an image with [[test]] cannot be baked here"));
    for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
        let there = Path::new("/proc/self/ns").join(namespace).exists();
        checks.push(Check::new(
            &format!("{namespace} namespaces"),
            there,
            "the kernel has none",
            "Use a kernel that has them.",
        ));
    }
    let seccomp =
        std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nSeccomp:"));
    checks.push(Check::new(
        "seccomp",
        seccomp,
        "the kernel has no filters",
        "Use a kernel with SECCOMP_FILTER.",
    ));
    let openat2 = rustix::fs::openat2(
        rustix::fs::CWD,
        "/",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
        rustix::fs::ResolveFlags::IN_ROOT,
    );
    checks.push(Check::new("openat2", openat2.is_ok(), "the kernel refuses it", "Use Linux 5.6 or newer."));
    checks
}

/// Whether steps with the network can be kept from the builder's credentials. It is tried, as root.
pub fn egress() -> Option<Check> {
    if !nix::unistd::geteuid().is_root() {
        return None;
    }
    let fence = Fence::make();
    let note = fence.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    Some(Check::note("cgroup v2 and BPF", fence.is_ok(), &note))
}

/// Whether the region can be used, and has room.
pub fn region(site: Result<Site>) -> Check {
    let site = match site {
        Ok(site) => site,
        Err(error) => return Check::new("region", false, format!("{error:#}"), "Give another --region-dir."),
    };
    let what = format!("region {}", site.state.display());
    let writable = nix::unistd::access(&site.state, nix::unistd::AccessFlags::W_OK);
    if let Err(errno) = writable {
        return Check::new(
            &what,
            false,
            format!("it cannot be written: {errno}"),
            "Give another --region-dir.",
        );
    }
    let free = statvfs(&site.state).map_or(0, |s| s.blocks_available() * s.fragment_size());
    Check::note(&what, free >= LITTLE_SPACE, &format!("only {} MiB are free", free >> 20))
}

/// `CAP_SYS_ADMIN` (mounts and namespaces) and `CAP_MKNOD` (a step's private `/dev`), by number (linux/capability.h).
fn capabilities(status: &str) -> Check {
    let held =
        status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("CapEff:")?.trim(), 16).ok());
    let held = held.unwrap_or(0);
    let missing: Vec<_> = [("SYS_ADMIN", 21), ("MKNOD", 27), ("SYS_CHROOT", 18), ("SETPCAP", 8)]
        .iter()
        .filter(|(_, bit)| held & (1 << bit) == 0)
        .map(|(name, _)| *name)
        .collect();
    let fix = "In a container: run it privileged.";
    Check::new("capabilities", missing.is_empty(), format!("{} is missing", missing.join(", ")), fix)
}

fn loops() -> Check {
    let control = std::fs::File::options().read(true).write(true).open("/dev/loop-control");
    let why = control.as_ref().err().map(|e| format!("/dev/loop-control: {e}")).unwrap_or_default();
    Check::new(
        "loop devices",
        control.is_ok(),
        why,
        "Load the module (`modprobe loop`), or run the container privileged.",
    )
}

/// Whether the running kernel can load a file system on demand.
fn has_module(name: &str) -> bool {
    let Ok(uname) = nix::sys::utsname::uname() else { return false };
    let index = Path::new("/lib/modules").join(uname.release()).join("modules.dep");
    std::fs::read_to_string(index)
        .is_ok_and(|dep| dep.lines().any(|line| line.contains(&format!("/{name}.ko"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let check = capabilities("Name:\tx\nCapEff:\t0000000000040100\n");
        assert!(check.lacks());
        assert!(check.to_string().contains("SYS_ADMIN, MKNOD is missing"), "{check}");
        assert!(!capabilities("CapEff:\t000001ffffffffff\n").lacks());
    }
}
