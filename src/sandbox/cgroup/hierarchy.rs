//! Finds the cgroup below which the cgroups of steps are made.
//!
//! The limits of a step need the controllers `memory` and `pids`. A cgroup has them only if its parent enables them for
//! its children. The kernel refuses this if the parent has processes, unless the parent is the root of the hierarchy.
//! Other programs, such as systemd, also manage cgroups. So oven changes a cgroup only if it is oven's to change:
//!
//! 1. If oven's own cgroup already enables the controllers, or is the root of the hierarchy, it is the parent. In the
//!    root, oven enables the controllers. They stay enabled when oven ends: meanwhile, another program may have set
//!    limits in cgroups below the root, and these limits would vanish. Enabled controllers limit nothing by themselves.
//! 2. If oven's own cgroup is delegated to it (`Delegate=yes` of systemd, or the root of a container's cgroup
//!    namespace), and has no processes except oven and its children, oven moves these processes into a cgroup below it.
//!    Then it enables the controllers.
//! 3. Otherwise the nearest cgroup above that already enables the controllers is the parent, for example a slice of
//!    systemd. A step in it is outside of oven's own cgroup. So the limits for memory and processes of the cgroups
//!    between also apply to the step. If one of these cgroups has other limits or a BPF program, this rule does not
//!    apply, because the step would escape from them.
//! 4. Otherwise the parent is oven's own cgroup, and steps have no limits.

use super::bpf;
use super::files::{open_directory, read, write};
use crate::sys::mount::api::new_file_system;
use crate::sys::mount::table;
use crate::sys::namespaces;
use anyhow::{Context, Result, bail, ensure};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::fs::{CWD, FsWord, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use rustix::thread::UnshareFlags;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// The type of a cgroup v2 file system in statfs(2).
const CGROUP2_MAGIC: FsWord = 0x6367_7270;
const CONTROLLERS: [&str; 2] = ["memory", "pids"];
const ENABLE: &str = "+memory +pids";
const DISABLE: &str = "-memory -pids";
/// Limits that a step outside of the cgroup would escape, and their values if there is no limit.
const OTHER_LIMITS: [(&str, &str); 5] = [
    ("memory.high", "max"),
    ("cpu.max", "max 100000"),
    ("cpuset.cpus", ""),
    ("cpuset.mems", ""),
    ("io.max", ""),
];
/// Extended attributes that systemd sets to `1` if it delegates a cgroup.
const DELEGATED: [&str; 2] = ["trusted.delegate", "user.delegate"];
/// The number of attempts to move all processes of oven. Meanwhile, oven may start another process.
const MOVES: u32 = 5;

/// The visible part of the cgroup hierarchy.
pub struct Hierarchy {
    /// The directory that shows the highest visible cgroup.
    pub root: PathBuf,
    /// The directory of this process's cgroup: `root`, or a directory below.
    pub own: PathBuf,
    /// Whether this process's cgroup is the root of its cgroup namespace.
    pub owns_namespace: bool,
    /// A cgroup file system that is not attached anywhere. `root` is the path of this descriptor.
    pub mount: Option<OwnedFd>,
}

/// The cgroup below which the cgroups of steps are made.
#[derive(Debug, PartialEq, Eq)]
pub struct Parent {
    pub dir: PathBuf,
    pub limits: InheritedLimits,
    /// The cgroup into which oven has to move before the controllers can be enabled in `dir`.
    pub needs_move: bool,
}

/// Limits of the cgroups between the parent and oven's own cgroup, including the latter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct InheritedLimits {
    /// In bytes.
    pub memory: Option<u64>,
    pub processes: Option<u64>,
}

impl Hierarchy {
    /// Finds the cgroup of this process. If no writable cgroup v2 file system is mounted, as in most containers, makes
    /// one that is not attached anywhere.
    pub fn find() -> Result<Self> {
        let read = |path: &str| std::fs::read(path).with_context(|| format!("reading {path}"));
        let groups = read("/proc/thread-self/cgroup")?;
        let own = own_path(&groups)?;
        let owns_namespace = own == Path::new("/");
        // The thread's mount table is used, because each thread may have its own mount namespace.
        if let Ok((root, own)) = mounted(own, &read("/proc/thread-self/mountinfo")?, &is_writable) {
            return Ok(Self { root, own, owns_namespace, mount: None });
        }
        let mount = mount_own_cgroup()?;
        let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        Ok(Self { own: root.clone(), root, owns_namespace, mount: Some(mount) })
    }

    /// Chooses the parent, without changing anything. The error says why steps have no limits.
    pub fn parent(&self) -> Result<Parent> {
        self.parent_with(&is_delegated, &has_programs)
    }

    fn parent_with(
        &self,
        is_delegated: &dyn Fn(&Path) -> bool,
        has_programs: &dyn Fn(&Path) -> bool,
    ) -> Result<Parent> {
        ensure!(
            has_controllers(&self.root, "cgroup.controllers"),
            "cgroup v2 does not have the controllers memory and pids here"
        );
        let mut limits = InheritedLimits::default();
        for dir in self.own.ancestors().take_while(|dir| dir.starts_with(&self.root)) {
            let is_own = dir == self.own;
            if has_controllers(dir, "cgroup.controllers") {
                let enabled = has_controllers(dir, "cgroup.subtree_control");
                let enters = is_own && (self.owns_namespace || is_delegated(dir));
                let needs_move = !enabled && !is_root(dir) && enters && are_ours(dir).is_ok_and(|ours| ours);
                if enabled || (is_own && is_root(dir)) || needs_move {
                    return Ok(Parent { dir: dir.to_owned(), limits, needs_move });
                }
            }
            if let Some(limit) = other_limit(dir) {
                bail!("a step would escape from `{limit}` of oven's cgroup {}", self.name(dir));
            }
            if has_programs(dir) {
                bail!("a step would escape from a BPF program of oven's cgroup {}", self.name(dir));
            }
            limits.add(dir);
        }
        bail!(
            "oven cannot enable the controllers memory and pids for a cgroup below its own, {}",
            self.name(&self.own)
        )
    }

    /// Enables the controllers for the children of the parent. If this process has to move for it, returns the cgroup
    /// into which it moved.
    pub fn enable(
        &self,
        parent: &Parent,
        make_leaf: impl FnOnce(&Path) -> Result<PathBuf>,
    ) -> Result<Option<PathBuf>> {
        if has_controllers(&parent.dir, "cgroup.subtree_control") {
            return Ok(None);
        }
        let control = parent.dir.join("cgroup.subtree_control");
        let doing = || format!("enabling controllers in the cgroup {}", self.name(&parent.dir));
        if !parent.needs_move {
            write(CWD, &control, ENABLE).with_context(doing)?;
            return Ok(None);
        }
        let leaf = make_leaf(&parent.dir)?;
        let mut result = Ok(());
        for _ in 0..MOVES {
            result = move_processes(&parent.dir, &leaf);
            let enabled = if result.is_ok() { write(CWD, &control, ENABLE) } else { Ok(()) };
            // EBUSY means that oven started another process in the parent.
            let is_busy = enabled == Err(Errno::BUSY);
            result = result.and_then(|()| Ok(enabled?));
            if !is_busy {
                break;
            }
        }
        if let Err(error) = result {
            leave(&parent.dir, &leaf);
            return Err(error).with_context(doing);
        }
        Ok(Some(leaf))
    }

    /// The smallest limit in bytes for the memory of oven's own cgroup, from it and all visible cgroups above.
    pub fn memory_limit(&self) -> Option<u64> {
        let dirs = self.own.ancestors().take_while(|dir| dir.starts_with(&self.root));
        dirs.filter_map(|dir| limit(dir, "memory.max")).min()
    }

    /// The name of a cgroup for messages.
    pub fn name(&self, dir: &Path) -> String {
        Path::new("/").join(dir.strip_prefix(&self.root).unwrap_or(dir)).display().to_string()
    }
}

impl InheritedLimits {
    fn add(&mut self, dir: &Path) {
        let smaller = |a: Option<u64>, b: Option<u64>| a.into_iter().chain(b).min();
        self.memory = smaller(self.memory, limit(dir, "memory.max"));
        self.processes = smaller(self.processes, limit(dir, "pids.max"));
    }
}

/// Moves the processes of oven from the cgroup `leaf` back to its parent, and removes the leaf. An error is ignored: then
/// the empty cgroup remains, and a later oven removes it.
pub fn leave(parent: &Path, leaf: &Path) {
    _ = write(CWD, parent.join("cgroup.subtree_control"), DISABLE);
    _ = move_processes(leaf, parent);
    _ = rustix::fs::rmdir(leaf);
}

/// Returns the cgroup of a thread, from its file `cgroup` in `/proc`.
fn own_path(groups: &[u8]) -> Result<&Path> {
    let mut lines = groups.split(|byte| *byte == b'\n');
    let own = lines.find_map(|line| line.strip_prefix(b"0::")).context("this machine has no cgroup v2")?;
    Ok(Path::new(OsStr::from_bytes(own)))
}

/// Returns the mount point of a cgroup v2 file system that shows the cgroup `own`, and the directory of this cgroup.
/// `mounts` is the content of the thread's file `mountinfo` in `/proc`. If several mounts show the cgroup, the first one
/// that is `writable` is used.
fn mounted(own: &Path, mounts: &[u8], writable: &dyn Fn(&Path) -> bool) -> Result<(PathBuf, PathBuf)> {
    for entry in table::parse(mounts).into_iter().filter(|entry| entry.kind == "cgroup2") {
        // In a container without a cgroup namespace, only a part of the cgroup tree is mounted. The path of this part
        // is removed from the start of the cgroup's path.
        let Ok(below) = own.strip_prefix(&entry.root) else { continue };
        if writable(&entry.path) {
            let dir = entry.path.components().chain(below.components()).collect();
            return Ok((entry.path, dir));
        }
    }
    bail!("no writable cgroup v2 file system that shows the cgroup {} is mounted", own.display())
}

/// Makes a cgroup v2 file system that shows only this process's cgroup, and is not attached anywhere. A thread in a new
/// cgroup namespace makes it. Outside of a namespace, a new mount without options would reset the options of the whole
/// machine's hierarchy, such as `nsdelegate`.
fn mount_own_cgroup() -> Result<OwnedFd> {
    let make = || {
        namespaces::unshare(UnshareFlags::NEWCGROUP).context("creating a cgroup namespace")?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        new_file_system("cgroup2", &[], attributes)
    };
    std::thread::scope(|scope| {
        scope.spawn(make).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Returns whether a cgroup v2 file system is mounted here, not covered by another mount, and not read-only.
fn is_writable(path: &Path) -> bool {
    let kind = rustix::fs::statfs(path).map(|stat| stat.f_type);
    let flags = rustix::fs::statvfs(path).map(|stat| stat.f_flag);
    kind.is_ok_and(|kind| kind == CGROUP2_MAGIC)
        && flags.is_ok_and(|flags| !flags.contains(StatVfsMountFlags::RDONLY))
}

fn is_delegated(dir: &Path) -> bool {
    DELEGATED.iter().any(|name| {
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(dir, *name, &mut value);
        length.is_ok_and(|length| value.get(..length) == Some(&b"1"[..]))
    })
}

fn has_programs(dir: &Path) -> bool {
    open_directory(CWD, dir).map_or(true, |dir| bpf::has_programs(dir.as_fd()))
}

/// Only the root of the hierarchy does not have this file.
fn is_root(dir: &Path) -> bool {
    !dir.join("cgroup.type").exists()
}

fn has_controllers(dir: &Path, file: &str) -> bool {
    let text = read(CWD, dir.join(file)).unwrap_or_default();
    CONTROLLERS.iter().all(|name| text.split_whitespace().any(|word| word == *name))
}

fn other_limit(dir: &Path) -> Option<&'static str> {
    let is_set = |(file, none): &&(&'static str, &str)| {
        read(CWD, dir.join(file)).is_some_and(|text| text.trim() != *none)
    };
    OTHER_LIMITS.iter().find(is_set).map(|(file, _)| *file)
}

/// Reads a limit. The text `max` means that there is no limit.
fn limit(dir: &Path, file: &str) -> Option<u64> {
    read(CWD, dir.join(file))?.trim().parse().ok()
}

/// Returns whether all processes of a cgroup are this process and its children.
fn are_ours(dir: &Path) -> Result<bool> {
    let own = std::process::id();
    Ok(processes(dir)?.into_iter().all(|pid| pid == own || parent_of(pid) == Some(own)))
}

fn processes(dir: &Path) -> Result<Vec<u32>> {
    let text = read(CWD, dir.join("cgroup.procs")).context("reading the processes of a cgroup")?;
    // A process outside of this PID namespace is shown as 0.
    Ok(text.split_whitespace().map(|pid| pid.parse().unwrap_or(0)).collect())
}

fn parent_of(pid: u32) -> Option<u32> {
    // The format is `pid (comm) state ppid …`. `comm` may contain blanks and parentheses.
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()
}

/// Moves all processes of oven from one cgroup to another. Fails if the cgroup has another process.
fn move_processes(from: &Path, to: &Path) -> Result<()> {
    ensure!(are_ours(from)?, "another process is in the cgroup");
    for pid in processes(from)? {
        match write(CWD, to.join("cgroup.procs"), &pid.to_string()) {
            Err(Errno::SRCH) => {} // it has ended
            moved => moved.context("moving a process to another cgroup")?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const UNIFIED: &str = "25 1 0:23 / /sys rw - sysfs sysfs rw\n30 25 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n";
    const HYBRID: &str = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                          32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                          41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";

    fn at(groups: &str, mounts: &str, writable: &dyn Fn(&Path) -> bool) -> Result<String, String> {
        let found = own_path(groups.as_bytes()).and_then(|own| mounted(own, mounts.as_bytes(), writable));
        found.map(|(_, own)| own.to_str().unwrap().to_owned()).map_err(|error| error.to_string())
    }

    #[test]
    fn the_cgroup_of_a_process_is_found() {
        let cases = [
            ("0::/\n", UNIFIED, "/sys/fs/cgroup"),
            ("0::/system.slice/ci.service\n", UNIFIED, "/sys/fs/cgroup/system.slice/ci.service"),
            ("1:cpu:/a\n0::/b\n", HYBRID, "/sys/fs/cgroup/unified/b"),
            (
                "0::/docker/abc/x\n",
                "9 8 0:26 /docker/abc /sys/fs/cgroup rw - cgroup2 cgroup rw\n",
                "/sys/fs/cgroup/x",
            ),
            ("0::/\n", "9 8 0:26 / /with\\040blank rw - cgroup2 cgroup rw\n", "/with blank"),
            ("0::/a\n", &format!("9 8 0:26 /other /mnt rw - cgroup2 c rw\n{UNIFIED}"), "/sys/fs/cgroup/a"),
            ("0::/a\n", &format!("9 8 0:26 / /ro ro - cgroup2 c rw\n{UNIFIED}"), "/sys/fs/cgroup/a"),
        ];
        for (groups, mounts, expected) in cases {
            let found = at(groups, mounts, &|path| path != Path::new("/ro"));
            assert_eq!(found.as_deref(), Ok(expected), "{groups}");
        }
    }

    #[test]
    fn errors_say_what_is_missing() {
        let cases = [
            ("1:cpu:/\n", UNIFIED, "this machine has no cgroup v2"),
            ("", "", "this machine has no cgroup v2"),
            ("0::/\n", "9 8 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n", "no writable cgroup v2"),
            ("0::/a\n", "9 8 0:26 /../b /sys/fs/cgroup rw - cgroup2 c rw\n", "that shows the cgroup /a"),
        ];
        for (groups, mounts, expected) in cases {
            let error = at(groups, mounts, &|_| true).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
    }

    /// Files that look like those of a cgroup hierarchy.
    struct Fake {
        dir: tempfile::TempDir,
        own: &'static str,
        owns_namespace: bool,
        delegated: &'static str,
        with_programs: &'static str,
    }

    impl Fake {
        /// The cgroup `/machine.slice/oven.scope` of systemd, in which the process `pid` is. `own` are the controllers
        /// of the cgroups.
        fn systemd(pid: u32) -> Self {
            let fake = Self {
                dir: tempfile::tempdir().unwrap(),
                own: "machine.slice/oven.scope",
                owns_namespace: false,
                delegated: "none",
                with_programs: "none",
            };
            for dir in ["", "machine.slice", "machine.slice/oven.scope"] {
                fs::create_dir_all(fake.path(dir)).unwrap();
                fake.set(dir, "cgroup.controllers", "cpuset cpu io memory pids");
                fake.set(
                    dir,
                    "cgroup.subtree_control",
                    if dir.ends_with("scope") { "" } else { "memory pids" },
                );
                fake.set(dir, "cgroup.procs", "");
                if !dir.is_empty() {
                    fake.set(dir, "cgroup.type", "domain");
                    fake.set(dir, "memory.max", "max");
                    fake.set(dir, "pids.max", "max");
                }
            }
            fake.set(fake.own, "cgroup.procs", &format!("{pid}\n"));
            fake
        }

        fn path(&self, dir: &str) -> PathBuf {
            self.dir.path().components().chain(Path::new(dir).components()).collect()
        }

        fn set(&self, dir: &str, file: &str, text: &str) {
            fs::write(self.path(dir).join(file), text).unwrap();
        }

        fn get(&self, dir: &str, file: &str) -> String {
            fs::read_to_string(self.path(dir).join(file)).unwrap()
        }

        fn hierarchy(&self) -> Hierarchy {
            Hierarchy {
                root: self.path(""),
                own: self.path(self.own),
                owns_namespace: self.owns_namespace,
                mount: None,
            }
        }

        /// Returns the chosen cgroup, whether oven has to move, and the limits for memory and processes.
        fn parent(&self) -> Result<(String, bool, Option<u64>, Option<u64>), String> {
            let hierarchy = self.hierarchy();
            let parent = hierarchy
                .parent_with(&|dir| dir.ends_with(self.delegated), &|dir| dir.ends_with(self.with_programs));
            let parent = parent.map_err(|error| error.to_string())?;
            let InheritedLimits { memory, processes } = parent.limits;
            Ok((hierarchy.name(&parent.dir), parent.needs_move, memory, processes))
        }
    }

    fn found(name: &str, needs_move: bool) -> Result<(String, bool, Option<u64>, Option<u64>), String> {
        Ok((name.to_owned(), needs_move, None, None))
    }

    #[test]
    fn the_nearest_cgroup_with_controllers_is_the_parent() {
        let own = std::process::id();
        // Not delegated: the slice.
        let mut fake = Fake::systemd(own);
        assert_eq!(fake.parent(), found("/machine.slice", false));
        fake.set("machine.slice", "cgroup.subtree_control", "cpu memory");
        assert_eq!(fake.parent(), found("/", false));
        fake.set("", "cgroup.subtree_control", "pids");
        let error = fake.parent().unwrap_err();
        assert!(error.contains("cannot enable") && error.ends_with("/machine.slice/oven.scope"), "{error}");
        // Delegated, and only oven is in it.
        fake.delegated = "oven.scope";
        assert_eq!(fake.parent(), found("/machine.slice/oven.scope", true));
        // Process 1 is neither oven nor its child.
        fake.set(fake.own, "cgroup.procs", &format!("{own}\n1\n"));
        assert!(fake.parent().is_err());
        fake.set("machine.slice", "cgroup.subtree_control", "memory pids");
        assert_eq!(fake.parent(), found("/machine.slice", false));
        // Somebody has moved oven below a delegated cgroup.
        fake.own = "machine.slice/oven.scope/main";
        fs::create_dir(fake.path(fake.own)).unwrap();
        fake.set("machine.slice/oven.scope", "cgroup.subtree_control", "memory pids");
        assert_eq!(fake.parent(), found("/machine.slice/oven.scope", false));
    }

    #[test]
    fn the_root_of_a_container_or_of_the_hierarchy_is_ovens_own() {
        let mut fake = Fake::systemd(std::process::id());
        (fake.own, fake.owns_namespace) = ("", true);
        fake.set("", "cgroup.subtree_control", "");
        fake.set("", "cgroup.procs", "1\n");
        // The root of the hierarchy may have processes.
        assert_eq!(fake.parent(), found("/", false));
        let hierarchy = fake.hierarchy();
        let parent = hierarchy.parent().unwrap();
        let moved = hierarchy.enable(&parent, |_| panic!("oven moves")).unwrap();
        assert_eq!((moved, &*fake.get("", "cgroup.subtree_control")), (None, "+memory +pids"));
        // A container.
        fake.set("", "cgroup.type", "domain");
        fake.set("", "cgroup.subtree_control", "");
        assert!(fake.parent().is_err(), "the container has another process");
        fake.set("", "cgroup.procs", &format!("{}\n", std::process::id()));
        assert_eq!(fake.parent(), found("/", true));
        fake.set("", "cgroup.controllers", "cpu hugetlb");
        assert!(fake.parent().unwrap_err().contains("does not have the controllers memory and pids"));
    }

    #[test]
    fn oven_moves_into_a_leaf_and_back() {
        let mut fake = Fake::systemd(std::process::id());
        fake.delegated = "oven.scope";
        let hierarchy = fake.hierarchy();
        let parent =
            Parent { dir: hierarchy.own.clone(), limits: InheritedLimits::default(), needs_move: true };
        let leaf = |dir: &Path| {
            let leaf = dir.join("leaf");
            fs::create_dir(&leaf)?;
            fs::write(leaf.join("cgroup.procs"), "")?;
            Ok(leaf)
        };
        let moved = hierarchy.enable(&parent, leaf).unwrap().unwrap();
        assert_eq!(fs::read_to_string(moved.join("cgroup.procs")).unwrap(), std::process::id().to_string());
        assert_eq!(fake.get(fake.own, "cgroup.subtree_control"), "+memory +pids");
        fake.set(fake.own, "cgroup.procs", &" ".repeat(16));
        leave(&parent.dir, &moved);
        assert_eq!(fake.get(fake.own, "cgroup.subtree_control"), "-memory -pids");
        assert_eq!(fake.get(fake.own, "cgroup.procs").trim(), std::process::id().to_string());
        // Nothing is moved if another process came meanwhile.
        crate::image::remove::remove_directory(&moved, &|| false).unwrap();
        fake.set(fake.own, "cgroup.subtree_control", "");
        fake.set(fake.own, "cgroup.procs", "1\n");
        let error = format!("{:#}", hierarchy.enable(&parent, leaf).unwrap_err());
        assert!(error.contains("enabling controllers") && error.contains("another process"), "{error}");
        assert_eq!(fs::read_to_string(moved.join("cgroup.procs")).unwrap(), "");
    }

    #[test]
    fn no_limit_of_ovens_own_cgroup_is_escaped() {
        let mut fake = Fake::systemd(1);
        fake.set(fake.own, "memory.max", "3000000000\n");
        fake.set(fake.own, "pids.max", "500\n");
        assert_eq!(fake.parent(), Ok(("/machine.slice".to_owned(), false, Some(3_000_000_000), Some(500))));
        // The smallest counts.
        fake.set("machine.slice", "cgroup.subtree_control", "");
        fake.set("machine.slice", "memory.max", "2000000000\n");
        fake.set("machine.slice", "pids.max", "700\n");
        assert_eq!(fake.parent(), Ok(("/".to_owned(), false, Some(2_000_000_000), Some(500))));
        assert_eq!(fake.hierarchy().memory_limit(), Some(2_000_000_000));
        for (file, none, some) in [
            ("memory.high", "max\n", "1000000\n"),
            ("cpu.max", "max 100000\n", "50000 100000\n"),
            ("cpuset.cpus", "\n", "0\n"),
            ("io.max", "", "8:0 rbps=1000 wbps=max riops=max wiops=max\n"),
        ] {
            fake.set(fake.own, file, none);
            assert!(fake.parent().is_ok(), "{file}");
            fake.set(fake.own, file, some);
            let error = fake.parent().unwrap_err();
            assert!(error.contains(&format!("`{file}`")) && error.contains("oven.scope"), "{error}");
            fake.set(fake.own, file, none);
        }
        fake.with_programs = "oven.scope";
        assert!(fake.parent().unwrap_err().contains("BPF program"));
    }
}
