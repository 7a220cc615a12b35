//! The cgroup of a step. Each step runs in a cgroup v2 of its own, if this machine has cgroup v2.
//!
//! The cgroup limits the memory and the processes of the step (the module `limits`), the device nodes that it can use
//! (`devices`), and, if the step has the network, the addresses and ports that it can use (`egress`, `ports`). The
//! module `hierarchy` finds the place for the cgroup. The step's first process is created in the cgroup. A step cannot
//! leave its cgroup, because it cannot access a cgroup file system.
//!
//! A cgroup is a directory. If oven is killed with SIGKILL, the directory is the only part of the step that remains,
//! and the cgroup has no processes. The process that creates a cgroup locks the directory. Before a step, and in `oven
//! sweep`, oven removes the directories that are not locked. It looks only in the cgroup that it has chosen for its own
//! steps, and `oven sweep` also in oven's own cgroup. So an oven in another cgroup does not remove them. The kernel keeps the BPF programs until
//! the directory is removed, so they are effective as long as the step runs.

mod bpf;
mod devices;
pub mod egress;
mod files;
mod hierarchy;
mod limits;
mod ports;

use super::spec::{ExceededLimit, StepSpec};
use crate::config::project::StepLimits;
use crate::error::Kind;
use crate::report::Report;
use crate::sys::lock::{lock_mutex, try_lock_until_closed};
use crate::sys::space::machine_memory;
use anyhow::{Context, Result, bail, ensure};
use devices::AllowedDevices;
use files::open_directory;
use hierarchy::{Hierarchy, InheritedLimits};
use limits::CgroupLimits;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::{CStr, OsStr};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, Once, OnceLock};
use std::time::Duration;

/// The prefixes of the cgroups' names. 16 hexadecimal digits follow. The second one is that of the cgroup into which
/// oven itself moves, if this is necessary for the limits of steps.
const STEP: &str = "oven-step-";
const MAIN: &str = "oven-main-";
/// The number of attempts to create a cgroup. Another oven process may remove a new cgroup before this process has
/// locked it.
const ATTEMPTS: u32 = 16;
/// The number of attempts to remove a cgroup. An attempt may fail, because the kernel still counts a process for a
/// short time after its end. The first pause is 1 ms, and each later pause is twice as long. So the sum of all pauses
/// is about 1 s.
const REMOVALS: u32 = 10;

/// What cgroups of steps can do on this machine.
pub struct CgroupSupport {
    /// The cgroup below which the cgroups of steps are made. The error says why there is none.
    place: Result<Place, String>,
    /// The error says why the kernel does not restrict the devices and ports of a step.
    programs: Result<(), String>,
}

/// The place of steps' cgroups.
struct Place {
    dir: OwnedFd,
    limits: Result<Limits, String>,
    /// A file system that is not attached anywhere, and that has the cgroup.
    _mount: Option<OwnedFd>,
}

/// What the limits of each step depend on.
#[derive(Debug, Clone, Copy)]
struct Limits {
    inherited: InheritedLimits,
    /// The memory in bytes of which the default limit is a part.
    memory: u64,
}

/// The cgroup from which this process moved, the one into which it moved, and the lock of the latter.
static MOVED: Mutex<Option<(PathBuf, PathBuf, OwnedFd)>> = Mutex::new(None);

impl CgroupSupport {
    /// Returns what a trial has found. The trial is made once in a process.
    pub fn get() -> &'static Self {
        static SUPPORT: OnceLock<CgroupSupport> = OnceLock::new();
        SUPPORT.get_or_init(Self::probe)
    }

    fn probe() -> Self {
        let place = Place::find().map_err(|error| format!("{error:#}"));
        let programs = match &place {
            Ok(place) => place.try_programs().map_err(|error| format!("{error:#}")),
            Err(why) => Err(why.clone()),
        };
        Self { place, programs }
    }

    /// Why steps have no limits for memory and processes, or `None` if they have.
    pub fn limits_gap(&self) -> Option<&str> {
        match &self.place {
            Ok(place) => place.limits.as_ref().err().map(String::as_str),
            Err(why) => Some(why),
        }
    }

    /// Why the kernel does not restrict the devices of steps, or `None` if it does.
    pub fn devices_gap(&self) -> Option<&str> {
        self.programs.as_ref().err().map(String::as_str)
    }

    /// Reports what steps lack. Only the first call in this process has an effect. The report is a detail, because
    /// nobody can change the machine during a bake, and `oven doctor` reports the same. But it is a warning if oven.toml
    /// sets limits that cannot be enforced.
    pub fn report_gaps(&self, limits: StepLimits, report: &Report) {
        static REPORTED: Once = Once::new();
        REPORTED.call_once(|| self.report_gaps_again(limits, report));
    }

    fn report_gaps_again(&self, limits: StepLimits, report: &Report) {
        if let Some(why) = self.limits_gap() {
            let text = format!(
                "oven cannot limit the memory of steps (and, before Linux 6.14, the number of their processes): {why}"
            );
            match limits == StepLimits::default() {
                true => report.detail(text),
                false => report.warn(format!("[limits] of oven.toml is not fully enforced, because {text}")),
            }
        }
        if let Some(why) = self.devices_gap() {
            report.detail(format!(
                "steps have no device nodes of the image's disk, because oven cannot make them read-only: {why}"
            ));
        }
    }
}

impl Place {
    fn find() -> Result<Self> {
        let hierarchy = Hierarchy::find()?;
        let (limited, why) = match Self::with_limits(&hierarchy) {
            Ok(found) => (Some(found), String::new()),
            Err(error) => (None, format!("{error:#}")),
        };
        let (dir, limits) = match limited {
            Some((dir, limits)) => (dir, Ok(limits)),
            // The limits of oven's cgroup apply to its steps, too.
            None => {
                let own =
                    open_directory(CWD, &hierarchy.own).context("opening the cgroup of this process")?;
                remove_unlocked(own.as_fd());
                StepCgroup::trial(&own)?;
                (own, Err(why))
            }
        };
        Ok(Self { dir, limits, _mount: hierarchy.mount })
    }

    /// Finds a place for cgroups with limits, and tries to make one.
    fn with_limits(hierarchy: &Hierarchy) -> Result<(OwnedFd, Limits)> {
        let parent = hierarchy.parent()?;
        let machine = machine_memory();
        let memory = hierarchy.memory_limit().map_or(machine, |limit| limit.min(machine));
        let mut locked = None;
        let moved = hierarchy.enable(&parent, |dir| {
            let (name, leaf) = make_directory(&open_directory(CWD, dir)?, MAIN)?;
            locked = Some(leaf);
            Ok(dir.join(name))
        })?;
        if let (Some(leaf), Some(lock)) = (moved, locked) {
            *lock_mutex(&MOVED) = Some((parent.dir.clone(), leaf, lock));
        }
        let dir = open_directory(CWD, &parent.dir)?;
        remove_unlocked(dir.as_fd());
        let limits = Limits { inherited: parent.limits, memory };
        let trial = StepCgroup::trial(&dir)?;
        CgroupLimits::new(StepLimits::default(), limits.inherited, limits.memory).apply(trial.cgroup())?;
        drop(trial);
        Ok((dir, limits))
    }

    fn try_programs(&self) -> Result<()> {
        let trial = StepCgroup::create_below(&self.dir)?;
        trial.attach(&AllowedDevices::default().program())?;
        trial.restrict_ports()
    }
}

/// The cgroup of a step or of a tool. Dropping the value kills its processes and removes it.
pub struct StepCgroup {
    parent: OwnedFd,
    name: String,
    /// The open directory, which is locked.
    dir: OwnedFd,
    limits: Option<CgroupLimits>,
}

impl StepCgroup {
    /// Creates the cgroup for a step. Returns `None` if this machine has no cgroup v2.
    ///
    /// # Errors
    /// [`Kind::Machine`], for example if the step must not reach the builder's credentials, and this machine lacks
    /// cgroup v2 or BPF.
    pub fn create(spec: &StepSpec) -> Result<Option<Self>> {
        let support = CgroupSupport::get();
        match &support.place {
            Ok(place) => {
                let cgroup = Self::create_in(place, support.programs.is_ok(), spec);
                cgroup.map(Some).map_err(|error| Kind::Machine.unless_known(error))
            }
            Err(why) if spec.network && spec.fenced => Err(egress::unprotected(why).into()),
            Err(_) => Ok(None),
        }
    }

    /// Creates a cgroup with the default limits of a step, for a program of this machine that parses the content of an
    /// image. Returns `None` if this machine has no cgroup v2.
    pub fn for_tool() -> Result<Option<Self>> {
        let Ok(place) = &CgroupSupport::get().place else { return Ok(None) };
        Self::create_limited(place, StepLimits::default()).map(Some)
    }

    fn create_limited(place: &Place, limits: StepLimits) -> Result<Self> {
        remove_unlocked(place.dir.as_fd());
        let mut cgroup = Self::create_below(&place.dir)?;
        if let Ok(of_place) = &place.limits {
            let limits = CgroupLimits::new(limits, of_place.inherited, of_place.memory);
            limits.apply(cgroup.cgroup())?;
            cgroup.limits = Some(limits);
        }
        Ok(cgroup)
    }

    fn create_in(place: &Place, has_programs: bool, spec: &StepSpec) -> Result<Self> {
        let cgroup = Self::create_limited(place, spec.limits)?;
        if has_programs {
            cgroup.attach(&allowed_devices(spec).program())?;
            if spec.network {
                cgroup.restrict_ports()?;
            }
        }
        if spec.network && spec.fenced {
            cgroup.fence()?;
        }
        Ok(cgroup)
    }

    /// Checks whether oven can block access to the builder's credentials.
    ///
    /// # Errors
    /// [`Kind::Machine`] if this machine lacks cgroup v2 or BPF.
    pub fn check_fence() -> Result<()> {
        match &CgroupSupport::get().place {
            Ok(place) => Self::create_below(&place.dir)?.fence(),
            Err(why) => Err(egress::unprotected(why).into()),
        }
    }

    fn fence(&self) -> Result<()> {
        let fence = || egress::programs().iter().try_for_each(|program| self.attach(program));
        fence().map_err(|error| egress::unprotected(&format!("{error:#}")).into())
    }

    fn restrict_ports(&self) -> Result<()> {
        ports::programs().iter().try_for_each(|program| self.attach(program))
    }

    fn attach(&self, program: &bpf::BpfProgram) -> Result<()> {
        bpf::attach(program, self.dir.as_fd())
            .with_context(|| format!("attaching the filter of {}", program.name))
    }

    /// Creates a cgroup, and checks that it can have processes. It cannot if its parent is threaded.
    fn trial(parent: &OwnedFd) -> Result<Self> {
        let trial = Self::create_below(parent)?;
        let kind = files::read(trial.cgroup(), "cgroup.type").unwrap_or_default();
        ensure!(kind.trim() == "domain", "a new cgroup has the type \"{}\"", kind.trim());
        Ok(trial)
    }

    fn create_below(parent: &OwnedFd) -> Result<Self> {
        let parent = parent.try_clone().context("copying a descriptor")?;
        let (name, dir) = make_directory(&parent, STEP)?;
        Ok(Self { parent, name, dir, limits: None })
    }

    /// Returns the descriptor for `CLONE_INTO_CGROUP`.
    pub fn cgroup(&self) -> BorrowedFd<'_> {
        self.dir.as_fd()
    }

    /// Opens the file through which a process enters the cgroup: it writes `0`.
    pub fn open_entrance(&self) -> Result<OwnedFd> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.dir, c"cgroup.procs", flags, Mode::empty());
        file.context("opening cgroup.procs of a new cgroup")
    }

    /// Whether the kernel counts the processes of the step, and so limits them.
    pub fn limits_processes(&self) -> bool {
        self.limits.is_some()
    }

    /// Returns the limit that the step exceeded. All its processes must have ended.
    pub fn exceeded_limit(&self) -> Option<ExceededLimit> {
        self.limits.as_ref()?.exceeded(self.dir.as_fd())
    }
}

impl Drop for StepCgroup {
    #[allow(clippy::disallowed_methods, reason = "a Drop cannot await, and it is for milliseconds")]
    fn drop(&mut self) {
        // A step has no processes any more. A tool may have started one. Before Linux 5.14, this file does not exist.
        _ = files::write(&self.dir, "cgroup.kill", "1");
        let mut pause = Duration::from_millis(1);
        for _ in 0..REMOVALS {
            match rustix::fs::unlinkat(&self.parent, &*self.name, AtFlags::REMOVEDIR) {
                Err(Errno::BUSY) => std::thread::sleep(pause),
                _ => return,
            }
            pause *= 2;
        }
        eprintln!("oven: the cgroup {} is still in use; remove it later with `oven sweep`", self.name);
    }
}

/// Creates a cgroup, and locks its directory.
fn make_directory(parent: &OwnedFd, prefix: &str) -> Result<(String, OwnedFd)> {
    for _ in 0..ATTEMPTS {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
        let name = format!("{prefix}{:016x}", u64::from_ne_bytes(bytes));
        // No other user has to see what a step uses.
        rustix::fs::mkdirat(parent, &*name, Mode::RWXU).context("making a cgroup")?;
        // If this fails, another process has removed the cgroup, because it was not locked yet.
        let Ok(dir) = open_directory(parent, &name) else { continue };
        if lock(&dir) && exists(parent, &name, &dir) {
            return Ok((name, dir));
        }
    }
    bail!("another process removed each cgroup that oven created");
}

/// The step's helper can also create the nodes of these devices. It does so in the cgroup of the step.
fn allowed_devices(spec: &StepSpec) -> AllowedDevices {
    let mut devices = AllowedDevices {
        disk: spec.nodes.iter().map(|node| node.rdev).collect(),
        writable: spec.can_write_disk(),
        terminals: Vec::new(),
    };
    if spec.interactive {
        // A program may open the shell's terminal again, such as a serial line.
        let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
        let stats = standard.iter().filter_map(|fd| rustix::fs::fstat(fd).ok());
        let terminals =
            stats.filter(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice);
        devices.terminals.extend(terminals.map(|stat| stat.st_rdev));
    }
    devices
}

/// Removes the cgroups of oven processes that were killed.
pub fn sweep() -> Result<()> {
    let hierarchy = Hierarchy::find()?;
    let mut dirs = vec![hierarchy.own.clone()];
    dirs.extend(hierarchy.parent().map(|parent| parent.dir).ok().filter(|dir| *dir != hierarchy.own));
    for dir in dirs {
        remove_unlocked(
            open_directory(CWD, &dir).with_context(|| format!("opening {}", dir.display()))?.as_fd(),
        );
    }
    Ok(())
}

/// Moves this process back into the cgroup in which it started. Call this when no step runs any more, at the end of the
/// process.
pub fn leave() {
    if let Some((parent, leaf, _lock)) = lock_mutex(&MOVED).take() {
        leave_unless_used(&parent, &leaf);
    }
}

/// If another oven has a step below the parent, the controllers must stay enabled, because the step would lose its
/// limits. Then the parent cannot have processes, so this process stays in the leaf until it ends. A later oven removes
/// the leaf.
fn leave_unless_used(parent: &Path, leaf: &Path) {
    if open_directory(CWD, parent).is_ok_and(|dir| !has_locked_step(dir.as_fd())) {
        hierarchy::leave(parent, leaf);
    }
}

/// Returns whether a cgroup of a step is below the parent, and its oven is running.
fn has_locked_step(parent: BorrowedFd<'_>) -> bool {
    let is_step = |name: &CStr| name.to_bytes().starts_with(STEP.as_bytes());
    let entries = Dir::read_from(parent).into_iter().flatten().flatten();
    entries.filter(|entry| is_step(entry.file_name())).any(|entry| {
        open_directory(parent, OsStr::from_bytes(entry.file_name().to_bytes())).is_ok_and(|dir| !lock(&dir))
    })
}

fn remove_unlocked(parent: BorrowedFd<'_>) {
    let Ok(entries) = Dir::read_from(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        if ![STEP, MAIN].iter().any(|prefix| name.to_bytes().starts_with(prefix.as_bytes())) {
            continue;
        }
        let Ok(dir) = open_directory(parent, Path::new(OsStr::from_bytes(name.to_bytes()))) else { continue };
        if lock(&dir) {
            // If the cgroup still has a process, this fails, and the cgroup must remain.
            _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
        }
    }
}

fn lock(dir: &OwnedFd) -> bool {
    try_lock_until_closed(dir).unwrap_or(false)
}

/// Returns whether `name` still leads to this directory.
fn exists(parent: &OwnedFd, name: &str, dir: &OwnedFd) -> bool {
    let there = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW);
    let same = |stat: rustix::fs::Stat| rustix::fs::fstat(dir).is_ok_and(|own| own.st_ino == stat.st_ino);
    there.is_ok_and(same)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn a_gap_is_a_detail_unless_limits_are_set() {
        let (dir, none) = (tempfile::tempdir().unwrap(), StepLimits::default());
        let log = |support: &CgroupSupport, limits| {
            let (path, report) = (dir.path().join("log"), Report::silent());
            report.log_to(&path, "");
            // The file is created when the first step begins.
            report.step("run", "running true").done();
            support.report_gaps_again(limits, &report);
            let text = fs::read_to_string(&path).unwrap_or_default();
            _ = fs::remove_file(&path);
            text
        };
        let gap = || CgroupSupport { place: Err("no controllers".into()), programs: Err("no BPF".into()) };
        let text = log(&gap(), none);
        for part in [" oven cannot limit the memory of steps", ": no controllers", "read-only: no BPF"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(!text.contains("warning") && !text.contains(" note"), "{text}");
        for limits in [StepLimits { memory_gib: Some(1), ..none }, StepLimits { pids: 100, ..none }] {
            let text = log(&gap(), limits);
            assert_eq!(text.matches("warning").count(), 1, "{text}");
            assert!(
                text.contains("[limits] of oven.toml is not fully enforced, because oven cannot"),
                "{text}"
            );
        }
    }

    #[test]
    fn controllers_stay_enabled_while_another_oven_has_a_step() {
        let dir = tempfile::tempdir().unwrap();
        let (parent, leaf) = (dir.path(), dir.path().join("oven-main-1"));
        let step = parent.join("oven-step-1");
        let control = parent.join("cgroup.subtree_control");
        for path in [&leaf, &step] {
            fs::create_dir(path).unwrap();
        }
        for path in [&control, &parent.join("cgroup.procs")] {
            fs::write(path, "memory pids   ").unwrap();
        }
        let locked = open_directory(CWD, &step).unwrap();
        assert!(lock(&locked));
        leave_unless_used(parent, &leaf);
        assert_eq!(fs::read_to_string(&control).unwrap(), "memory pids   ");
        assert!(leaf.exists());
        drop(locked);
        leave_unless_used(parent, &leaf);
        assert_eq!(fs::read_to_string(&control).unwrap().trim(), "-memory -pids");
        assert!(!leaf.exists());
    }
}
