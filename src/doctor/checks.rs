//! Checks of what a bake needs from this machine. All missing parts are reported at once.

use crate::disk::direct::server;
use crate::error;
use crate::error::Kind;
use crate::sandbox::egress::EgressFence;
use crate::sys::space::free_space;
use anyhow::Result;
use rustix::thread::CapabilitySet;
use serde::Serialize;
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

/// Bytes. With less, a copy of a usual base image may not fit.
const MIN_SPACE: u64 = 4 << 30;
/// Bytes. With less, logs may not fit.
const MIN_STATE_SPACE: u64 = 64 << 20;

/// The result of one check.
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
    /// Missing, but a bake works without it.
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

    /// The check of an attempt. `fix`: what to do, if the error has no hint.
    pub fn tried<T>(what: &str, tried: &Result<T>, fix: &str) -> Self {
        let (why, hint) = match tried {
            Ok(_) => return Self::new(what, true, "", ""),
            Err(error) => (format!("{error:#}"), error::hint_of(error)),
        };
        Self::new(what, false, why, &hint.unwrap_or_else(|| fix.to_owned()))
    }

    pub fn new(what: &str, ok: bool, why: impl Into<String>, fix: &str) -> Self {
        let verdict = if ok { Verdict::Ok } else { Verdict::Lacks { why: why.into(), fix: fix.into() } };
        Self { what: what.into(), verdict }
    }

    pub fn note(what: &str, ok: bool, note: &str) -> Self {
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
            Verdict::Lacks { why, fix } if fix.is_empty() => write!(f, "lacks  {}: {why}", self.what),
            Verdict::Lacks { why, fix } => write!(f, "lacks  {}: {why}. {fix}", self.what),
        }
    }
}

/// Errors: [`Kind::Machine`], with everything that is missing.
pub fn ensure_ready(needs: Needs) -> Result<()> {
    let lacks: Vec<_> =
        checks(needs).into_iter().filter(Check::lacks).map(|check| format!("\n  {check}")).collect();
    if lacks.is_empty() {
        return Ok(());
    }
    Err(Kind::Machine.error(format!("this machine cannot bake:{}", lacks.concat())))
}

/// Needs of a disk strategy, in addition to what every bake needs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Loop devices.
    pub loops: bool,
    /// Disks that this program serves by FUSE.
    pub fuse: bool,
}

/// All checks that need no region and no attempt.
pub fn checks(needs: Needs) -> Vec<Check> {
    let mut checks = vec![Check::new(
        "root",
        rustix::process::geteuid().is_root(),
        "oven is not run as root",
        "Use sudo.",
    )];
    if !checks[0].lacks() {
        checks.push(capabilities(held_capabilities()));
    }
    if needs.loops {
        checks.push(loop_devices());
    }
    checks.extend(fuse(needs.fuse));
    let filesystems = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let knows = |name: &str| filesystems.split_whitespace().any(|word| word == name) || has_module(name);
    for name in ["ext4", "tmpfs", "devpts"] {
        let fix = "Use a kernel that has it.";
        checks.push(Check::new(
            &format!("file system {name}"),
            knows(name),
            "the kernel does not support it",
            fix,
        ));
    }
    let without = [
        ("xfs", "file system xfs", "images with an xfs root cannot be baked here"),
        ("vfat", "file system vfat", "an image's /boot/efi cannot be changed: a step that does so fails"),
        ("overlay", "file system overlay", "images with a [[test]] cannot be baked here"),
    ];
    for (name, what, note) in without {
        checks.push(Check::note(what, knows(name), note));
    }
    let exists = |namespace: &&str| Path::new("/proc/self/ns").join(namespace).exists();
    let missing: Vec<_> = ["mnt", "pid", "ipc", "uts", "net"].into_iter().filter(|n| !exists(n)).collect();
    let why = format!("the kernel has no {} namespaces", missing.join(", "));
    checks.push(Check::new("namespaces", missing.is_empty(), why, "Use a kernel that has them."));
    let seccomp =
        std::fs::read_to_string("/proc/self/status").is_ok_and(|status| status.contains("\nSeccomp:"));
    let fix = "Use a kernel with SECCOMP_FILTER.";
    checks.push(Check::new("seccomp", seccomp, "the kernel has no seccomp filters", fix));
    let openat2 = rustix::fs::openat2(
        rustix::fs::CWD,
        "/",
        rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
        rustix::fs::ResolveFlags::IN_ROOT,
    );
    checks.push(Check::new("openat2", openat2.is_ok(), "the kernel refuses it", "Use Linux 5.12 or newer."));
    checks
}

/// Whether oven can block access from steps with the network to the builder's credentials. It is tried, as root.
/// `required`: without it no step gets the network.
pub fn credential_blocking(required: bool) -> Option<Check> {
    const WHAT: &str = "cgroup v2 and BPF";
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let fence = EgressFence::make();
    if required {
        return Some(Check::tried(
            WHAT,
            &fence,
            "Or allow a definition's steps to reach the credentials: imds = true.",
        ));
    }
    let note = fence.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    Some(Check::note(WHAT, fence.is_ok(), &note))
}

/// Whether the kernel waits long enough for a slow EBS volume. `sys` is `/sys`.
pub fn nvme_timeout(sys: &Path) -> Option<Check> {
    let text = std::fs::read_to_string(sys.join("module/nvme_core/parameters/io_timeout")).ok()?;
    let seconds: u64 = text.trim().parse().ok()?;
    let note = format!(
        "it is {seconds} s: a volume that answers later fails a bake. AWS recommends the kernel parameter \
         nvme_core.io_timeout=4294967295"
    );
    // A day is as good as the highest value that the kernel accepts.
    Some(Check::note("NVMe timeout", seconds >= 24 * 60 * 60, &note))
}

/// Whether logs and locks can be written. A missing directory will be created.
pub fn state_directory(dir: &Path) -> Check {
    let what = format!("directory {}", dir.display());
    let existing = dir.ancestors().find(|dir| dir.exists()).unwrap_or(dir);
    if let Err(errno) = nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK) {
        return Check::new(&what, false, format!("it cannot be written: {}", errno.desc()), "Use sudo.");
    }
    let free = free_space(existing).unwrap_or_default();
    Check::note(&what, free >= MIN_STATE_SPACE, &format!("only {} MiB are free", free >> 20))
}

/// Whether the region is usable and has free space.
pub fn region(dir: &Path) -> Check {
    let what = format!("region {}", dir.display());
    if let Err(errno) = nix::unistd::access(dir, nix::unistd::AccessFlags::W_OK) {
        let why = format!("it cannot be written: {}", errno.desc());
        return Check::new(&what, false, why, "Choose another --region-dir.");
    }
    let free = free_space(dir).unwrap_or_default();
    Check::note(&what, free >= MIN_SPACE, &format!("only {} MiB are free", free >> 20))
}

/// Whether disks can be served by FUSE (`disks = "direct"`). It is tried, as root, as a container may lack the device
/// node. `required`: the settings ask for such disks.
fn fuse(required: bool) -> Option<Check> {
    const WHAT: &str = "FUSE";
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let tried = server::check_available();
    if required {
        return Some(Check::tried(WHAT, &tried, ""));
    }
    let why = tried.as_ref().err().map(|error| format!("bakes with disks = \"direct\" fail: {error:#}"));
    Some(Check::note(WHAT, tried.is_ok(), &why.unwrap_or_default()))
}

/// Capabilities that every bake needs: for mounts and namespaces, a step's private `/dev` and its `lo`, and for what
/// package managers do as root.
const NEEDED: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_ADMIN)
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::KILL);

fn held_capabilities() -> CapabilitySet {
    rustix::thread::capabilities(None).map_or(CapabilitySet::empty(), |sets| sets.effective)
}

fn capabilities(held: CapabilitySet) -> Check {
    let missing = NEEDED.difference(held);
    let names: Vec<_> = missing.iter_names().map(|(name, _)| name).collect();
    let fix = "In a container: run it privileged.";
    Check::new("capabilities", missing.is_empty(), format!("{} missing", names.join(", ")), fix)
}

/// Whether disks can be grown. Without CAP_SYS_RESOURCE the kernel cannot grow a mounted ext4; then e2fsprogs grow it
/// before it is mounted.
pub fn disk_growth() -> Check {
    let is_capable = held_capabilities().contains(CapabilitySet::SYS_RESOURCE);
    let tools = ["e2fsck", "resize2fs"];
    let is_installed = |tool: &&str| {
        ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|d| Path::new(d).join(tool).exists())
    };
    let note = "without CAP_SYS_RESOURCE or e2fsprogs, [disk] size_gib cannot be larger than the base's disk";
    Check::note("growing disks", is_capable || tools.iter().all(is_installed), note)
}

fn loop_devices() -> Check {
    let control = std::fs::File::options().read(true).write(true).open("/dev/loop-control");
    let why = match control {
        Ok(_) => String::new(),
        // Not root: another check reports that. No node: oven creates its own, if the kernel has the device.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => String::new(),
        Err(_) if Path::new("/sys/class/misc/loop-control").exists() => String::new(),
        Err(e) => format!("/dev/loop-control: {e}"),
    };
    let fix = "Load the module (`modprobe loop`), or run the container privileged.";
    Check::new("loop devices", why.is_empty(), why.clone(), fix)
}

/// Whether the running kernel can load a file system on demand.
fn has_module(name: &str) -> bool {
    let uname = rustix::system::uname();
    let index = Path::new("/lib/modules").join(&*uname.release().to_string_lossy()).join("modules.dep");
    std::fs::read_to_string(index)
        .is_ok_and(|dep| dep.lines().any(|line| line.contains(&format!("/{name}.ko"))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let check = capabilities(NEEDED.difference(CapabilitySet::MKNOD | CapabilitySet::CHOWN));
        assert!(check.lacks());
        assert!(check.to_string().contains("CHOWN, MKNOD missing"), "{check}");
        assert!(!capabilities(CapabilitySet::all()).lacks());
    }
}
