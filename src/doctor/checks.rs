//! Checks whether this machine has everything that a bake needs. All missing parts are reported together.

use crate::config::project::{AWS, Settings, Strategy};
use crate::disk::direct::server;
use crate::error;
use crate::error::Kind;
use crate::sandbox::cgroup::{CgroupSupport, StepCgroup};
use crate::sys::space::free_space;
use crate::sys::state_files;
use anyhow::Result;
use rustix::thread::CapabilitySet;
use serde::Serialize;
use std::fmt;
use std::io::ErrorKind;
use std::path::Path;

/// The free space in bytes that a region should have. With less, a copy of a usual base image may not fit.
const MIN_SPACE: u64 = 4 << 30;
/// The free space in bytes that the state directory should have. With less, logs may not fit.
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
    /// The feature is missing, but a bake works without it.
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

    /// Makes a check from the result of a trial. `fix` says what the user can do. If the error has a hint, the hint is
    /// used instead of `fix`.
    pub fn from_result<T>(what: &str, tried: &Result<T>, fix: &str) -> Self {
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

    pub fn optional(what: &str, ok: bool, note: &str) -> Self {
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

/// Fails with [`Kind::Machine`] if something is missing. The error lists everything that is missing.
pub fn ensure_ready(needs: Needs) -> Result<()> {
    let lacks: Vec<_> =
        checks(needs).into_iter().filter(Check::lacks).map(|check| format!("\n    {check}")).collect();
    if lacks.is_empty() {
        return Ok(());
    }
    Err(Kind::Machine.error(format!("this machine cannot bake:{}", lacks.concat())))
}

/// The requirements of a cloud and a disk strategy. Every bake has further requirements.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Whether loop devices are needed.
    pub loops: bool,
    /// Whether FUSE is needed. It is needed if oven itself serves the disks.
    pub fuse: bool,
    /// Whether NVMe is needed. It is needed if volumes are attached as NVMe disks.
    pub nvme: bool,
    /// Whether the builder has a role in the cloud. If so, oven needs the role's permissions, and steps must not reach
    /// the role's credentials.
    pub role: bool,
}

impl Needs {
    pub fn of(settings: &Settings) -> Self {
        let (aws, fuse) = (settings.cloud == AWS, settings.disks() == Strategy::Direct);
        Self { loops: fuse || !aws, fuse, nvme: aws && !fuse, role: aws }
    }
}

/// Runs the checks that need no directory and run no step.
pub fn checks(needs: Needs) -> Vec<Check> {
    let mut checks = vec![Check::new(
        "root",
        rustix::process::geteuid().is_root(),
        "oven does not run as root",
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
        ("vfat", "file system vfat", "a bake fails if a step changes the image's /boot/efi"),
        ("overlay", "file system overlay", "images with a [[test]] cannot be baked here"),
    ];
    for (name, what, note) in without {
        checks.push(Check::optional(what, knows(name), note));
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
    checks.push(Check::new(
        "openat2",
        openat2.is_ok(),
        "the kernel does not support it",
        "Use Linux 5.12 or newer.",
    ));
    checks
}

/// Checks whether oven can block access to the builder's credentials in steps that have the network. The check tries to
/// block the access, which needs root. Without root, the result is `None`. `required` is true if steps get the network
/// only when the access is blocked.
pub fn credential_blocking(required: bool) -> Option<Check> {
    const WHAT: &str = "cgroup v2 and BPF";
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let fence = StepCgroup::check_fence();
    if required {
        return Some(Check::from_result(
            WHAT,
            &fence,
            "Set `imds = true` in image.toml to permit that the steps reach the credentials.",
        ));
    }
    let note = fence.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    Some(Check::optional(WHAT, fence.is_ok(), &note))
}

/// Checks whether oven can limit steps, and make the nodes of the image's disk read-only for them. The checks try it,
/// which needs root. Without root, there are no results.
pub fn step_limits() -> Vec<Check> {
    if !rustix::process::geteuid().is_root() {
        return Vec::new();
    }
    let support = CgroupSupport::get();
    let check = |what, gap: Option<&str>, effect: &str| {
        Check::optional(what, gap.is_none(), &format!("{effect}: {}", gap.unwrap_or_default()))
    };
    vec![
        check(
            "limits of steps",
            support.limits_gap(),
            "a step can use all memory of this machine, and before Linux 6.14 all its processes",
        ),
        check("devices of steps", support.devices_gap(), "steps have no device nodes of the image's disk"),
    ]
}

/// Checks whether the kernel waits long enough for a slow EBS volume. `sys` is the path of `/sys`. Returns `None` if
/// the kernel's timeout cannot be read.
pub fn nvme_timeout(sys: &Path) -> Option<Check> {
    let text = std::fs::read_to_string(sys.join("module/nvme_core/parameters/io_timeout")).ok()?;
    let seconds: u64 = text.trim().parse().ok()?;
    let note = format!(
        "it is {seconds} s, and a bake fails if a volume takes longer to respond. AWS recommends the kernel parameter \
         nvme_core.io_timeout=4294967295"
    );
    // A timeout of a day is long enough. The kernel accepts even higher values.
    Some(Check::optional("NVMe timeout", seconds >= 24 * 60 * 60, &note))
}

/// Checks whether logs and locks can be written. If the directory is missing, a bake creates it. So the check uses the
/// nearest parent that exists.
pub fn state_directory(dir: &Path) -> Check {
    let what = format!("directory {}", dir.display());
    let existing = dir.ancestors().find(|dir| dir.exists()).unwrap_or(dir);
    if let Err(errno) = nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK) {
        return Check::new(&what, false, format!("oven cannot write to it: {}", errno.desc()), "Use sudo.");
    }
    if dir.symlink_metadata().is_ok()
        && let Err(error) = state_files::examine_dir(dir)
    {
        return Check::from_result::<()>(&what, &Err(error), "");
    }
    let free = free_space(existing).unwrap_or_default();
    Check::optional(&what, free >= MIN_STATE_SPACE, &format!("only {} MiB are free", free >> 20))
}

/// Checks whether the region's directory can be written and has enough free space. If there is no region yet, `exists`
/// is false, and the check uses the nearest directory that exists.
pub fn region(dir: &Path, exists: bool) -> Check {
    let what = format!("region {}", dir.display());
    let existing = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("."));
    if let Err(errno) = nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK) {
        let why = format!("oven cannot write to it: {}", errno.desc());
        return Check::new(&what, false, why, "Choose another --region-dir.");
    }
    let free = free_space(existing).unwrap_or_default();
    let space = format!("only {} MiB are free", free >> 20);
    if !exists {
        let none = "there is no region yet, and `oven import RAW --name NAME` makes it";
        let note = if free < MIN_SPACE { format!("{none}; {space}") } else { none.to_owned() };
        return Check::optional(&what, false, &note);
    }
    Check::optional(&what, free >= MIN_SPACE, &space)
}

/// Checks whether disks can be served by FUSE (`disks = "direct"`). The check tries to use FUSE, because a container
/// may lack the device node. This trial needs root. Without root, the result is `None`. `required` is true if the
/// settings request direct disks.
fn fuse(required: bool) -> Option<Check> {
    const WHAT: &str = "FUSE";
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let tried = server::check_available();
    if required {
        return Some(Check::from_result(WHAT, &tried, ""));
    }
    let why = tried.as_ref().err().map(|error| format!("bakes with disks = \"direct\" fail: {error:#}"));
    Some(Check::optional(WHAT, tried.is_ok(), &why.unwrap_or_default()))
}

/// The capabilities that every bake needs: for mounts and namespaces, for a step's private `/dev` and `lo`, and for the
/// work of package managers as root.
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
    let verb = if names.len() == 1 { "is" } else { "are" };
    let fix = "If oven runs in a container, make the container privileged.";
    Check::new("capabilities", missing.is_empty(), format!("{} {verb} missing", names.join(", ")), fix)
}

/// The settings of this machine that turn a fault in an image's file system into a panic of the kernel. All are 0 by
/// default. `kernel.panic_on_oops` is not one of them, because some distributions set it, and it needs an error of the
/// kernel itself.
const PANIC_SETTINGS: [&str; 2] = ["kernel/panic_on_warn", "fs/xfs/panic_mask"];

/// Checks whether a damaged file system of an image can stop this machine. `sysctls` is the path of `/proc/sys`.
pub fn panic_settings(sysctls: &Path) -> Check {
    let is_set = |name: &&str| {
        std::fs::read_to_string(sysctls.join(name)).is_ok_and(|value| !matches!(value.trim(), "0" | ""))
    };
    let set: Vec<_> =
        PANIC_SETTINGS.iter().filter(|name| is_set(name)).map(|name| name.replace('/', ".")).collect();
    let verb = if set.len() == 1 { "is" } else { "are" };
    let note = format!(
        "{} {verb} not 0, so a damaged file system of an image may stop this machine. Set it to 0 on a builder",
        set.join(" and ")
    );
    Check::optional("kernel settings", set.is_empty(), &note)
}

/// Checks whether disks can be grown. Without CAP_SYS_RESOURCE, the kernel refuses to grow a mounted ext4. In that
/// case, oven grows the ext4 with e2fsprogs before it is mounted.
pub fn disk_growth() -> Check {
    let is_capable = held_capabilities().contains(CapabilitySet::SYS_RESOURCE);
    let tools = ["e2fsck", "resize2fs"];
    let is_installed = |tool: &&str| {
        ["/usr/sbin", "/sbin", "/usr/bin", "/bin"].iter().any(|d| Path::new(d).join(tool).exists())
    };
    let note = "without CAP_SYS_RESOURCE or e2fsprogs, [disk] size_gib cannot be larger than the base's disk";
    Check::optional("growing disks", is_capable || tools.iter().all(is_installed), note)
}

fn loop_devices() -> Check {
    let control = std::fs::File::options().read(true).write(true).open("/dev/loop-control");
    let why = match control {
        Ok(_) => String::new(),
        // If access is denied, oven does not run as root, which another check reports. If only the node is missing,
        // oven creates its own node.
        Err(e) if e.kind() == ErrorKind::PermissionDenied => String::new(),
        Err(_) if Path::new("/sys/class/misc/loop-control").exists() => String::new(),
        Err(e) => format!("cannot open /dev/loop-control: {e}"),
    };
    let fix =
        "Load the module (`modprobe loop`). If oven runs in a container, make the container privileged.";
    Check::new("loop devices", why.is_empty(), why.clone(), fix)
}

/// Returns whether the running kernel can load the module of a file system.
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
    fn settings_that_stop_the_machine_are_named() {
        let sysctls = tempfile::tempdir().unwrap();
        let set = |name: &str, value: &str| {
            let path = sysctls.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, value).unwrap();
        };
        let is_ok = || panic_settings(sysctls.path()).to_string() == "ok     kernel settings";
        // A kernel without xfs has no such setting.
        set("kernel/panic_on_warn", "0\n");
        assert!(is_ok());
        set("fs/xfs/panic_mask", "0\n");
        assert!(is_ok());
        set("fs/xfs/panic_mask", "8\n");
        let check = panic_settings(sysctls.path());
        assert!(!check.lacks() && check.to_string().contains("fs.xfs.panic_mask is not 0"), "{check}");
        set("kernel/panic_on_warn", "1\n");
        let check = panic_settings(sysctls.path()).to_string();
        assert!(check.contains("kernel.panic_on_warn and fs.xfs.panic_mask are not 0"), "{check}");
    }

    #[test]
    fn what_is_missing_is_named() {
        let check = capabilities(NEEDED.difference(CapabilitySet::MKNOD | CapabilitySet::CHOWN));
        assert!(check.lacks());
        assert!(check.to_string().contains("CHOWN, MKNOD are missing"), "{check}");
        assert!(!capabilities(CapabilitySet::all()).lacks());
    }
}
