//! The limits of a step's cgroup for memory and processes.

use super::files::{read, write};
use super::hierarchy::InheritedLimits;
use crate::config::project::StepLimits;
use crate::sandbox::spec::ExceededLimit;
use crate::text::human_size;
use anyhow::{Context, Result};
use rustix::fd::BorrowedFd;
use rustix::io::Errno;

/// The default memory limit is at least this number of bytes.
const MIN_DEFAULT: u64 = 1 << 30;

/// The limits of one cgroup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CgroupLimits {
    /// In bytes.
    pub memory: u64,
    pub processes: u64,
    /// Whether the limit for memory is that of oven's own cgroup, because it is smaller than the setting.
    memory_is_inherited: bool,
    processes_are_inherited: bool,
}

impl CgroupLimits {
    /// `machine` is the memory in bytes of which the default is a part.
    pub fn new(settings: StepLimits, inherited: InheritedLimits, machine: u64) -> Self {
        let memory = settings.memory_gib.map_or((machine / 2).max(MIN_DEFAULT), |gib| gib << 30);
        let processes = settings.pids;
        Self {
            memory: inherited.memory.map_or(memory, |limit| limit.min(memory)),
            processes: inherited.processes.map_or(processes, |limit| limit.min(processes)),
            memory_is_inherited: inherited.memory.is_some_and(|limit| limit < memory),
            processes_are_inherited: inherited.processes.is_some_and(|limit| limit < processes),
        }
    }

    /// Sets the limits of a cgroup that has no process yet.
    pub fn apply(&self, cgroup: BorrowedFd<'_>) -> Result<()> {
        for (name, value) in [
            ("memory.max", &*self.memory.to_string()),
            // The kernel ends all processes of the step together. Otherwise a step could go on without one of them.
            ("memory.oom.group", "1"),
            ("memory.swap.max", "0"),
            ("pids.max", &*self.processes.to_string()),
        ] {
            match write(cgroup, name, value) {
                // The kernel may be built or started without accounting of swap.
                Err(Errno::NOENT) if name == "memory.swap.max" => {}
                written => written.with_context(|| format!("setting {name} of a step's cgroup"))?,
            }
        }
        Ok(())
    }

    /// Returns the limit that a step exceeded, or `None` if it exceeded no limit. All processes of the cgroup must have
    /// ended.
    pub fn exceeded(&self, cgroup: BorrowedFd<'_>) -> Option<ExceededLimit> {
        let memory = read(cgroup, "memory.events").unwrap_or_default();
        if count(&memory, "oom_kill") + count(&memory, "oom_group_kill") > 0 {
            return Some(self.exceeded_memory(count(&memory, "oom") > 0));
        }
        let processes = read(cgroup, "pids.events").unwrap_or_default();
        (count(&processes, "max") > 0).then(|| self.exceeded_processes())
    }

    /// `own` is false if the kernel ended the step although it did not reach its own limit.
    fn exceeded_memory(&self, own: bool) -> ExceededLimit {
        let limit = human_size(self.memory);
        let message = if own {
            format!(
                "the step needed more memory than its limit of {limit} (`memory_gib` of [limits] in oven.toml), so the \
                 kernel ended it"
            )
        } else {
            format!(
                "the memory of this machine or of oven's cgroup was exhausted, so the kernel ended the step, which may \
                 use {limit}"
            )
        };
        let hint = if !own {
            "Use a machine with more memory, bake fewer images at the same time, or decrease `memory_gib` of [limits] in \
             oven.toml."
        } else if self.memory_is_inherited {
            "The limit is `memory.max` of the cgroup of oven, because it is smaller. Increase it."
        } else {
            "Files in /tmp are on the disk, but those in /run and /dev/shm are in this memory. If the step needs more, \
             increase `memory_gib`. Its default is half of the machine's memory."
        };
        ExceededLimit { message, hint: hint.to_owned(), ended_step: true }
    }

    fn exceeded_processes(&self) -> ExceededLimit {
        let message = format!(
            "the step needed more processes and threads than its limit of {} (`pids` of [limits] in oven.toml)",
            self.processes
        );
        let hint = if self.processes_are_inherited {
            "The limit is `pids.max` of the cgroup of oven, because it is smaller. Increase it."
        } else {
            "If the step needs more, increase `pids`."
        };
        ExceededLimit { message, hint: hint.to_owned(), ended_step: false }
    }
}

/// Returns a count of a file such as `memory.events`, which has a line `NAME COUNT` for each event.
fn count(events: &str, name: &str) -> u64 {
    let lines = events.lines().filter_map(|line| line.split_once(' '));
    lines.filter(|(event, _)| *event == name).find_map(|(_, count)| count.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fd::AsFd;
    use std::fs;

    const GIB: u64 = 1 << 30;

    fn limits(memory_gib: Option<u64>, inherited: InheritedLimits, machine: u64) -> CgroupLimits {
        CgroupLimits::new(StepLimits { memory_gib, ..StepLimits::default() }, inherited, machine)
    }

    #[test]
    fn the_memory_limit_is_half_of_the_machine_or_the_setting() {
        let none = InheritedLimits::default();
        for (setting, machine, expected) in [
            (None, 16 * GIB, 8 * GIB),
            (None, GIB, GIB),
            (None, GIB / 2, GIB),
            (Some(3), 16 * GIB, 3 * GIB),
            (Some(64), 16 * GIB, 64 * GIB),
        ] {
            assert_eq!(limits(setting, none, machine).memory, expected, "{setting:?} {machine}");
        }
        let inherited = InheritedLimits { memory: Some(2 * GIB), processes: Some(100) };
        let capped = limits(Some(3), inherited, 16 * GIB);
        assert_eq!((capped.memory, capped.processes), (2 * GIB, 100));
        let wide = InheritedLimits { memory: Some(9 * GIB), processes: Some(10_000) };
        let capped = limits(Some(3), wide, 16 * GIB);
        assert_eq!((capped.memory, capped.processes), (3 * GIB, 4096));
    }

    #[test]
    fn the_limits_are_written_and_what_exceeds_them_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["memory.max", "memory.oom.group", "pids.max"] {
            fs::write(at(name), "").unwrap();
        }
        let cgroup = fs::File::open(dir.path()).unwrap();
        let own = limits(Some(3), InheritedLimits::default(), 0);
        own.apply(cgroup.as_fd()).unwrap();
        let text = |name: &str| fs::read_to_string(at(name)).unwrap();
        assert_eq!((text("memory.max"), text("pids.max")), ((3 * GIB).to_string(), "4096".to_owned()));
        assert_eq!(text("memory.oom.group"), "1");
        assert!(!at("memory.swap.max").exists(), "only what the kernel has is written");
        fs::write(at("memory.swap.max"), "").unwrap();
        own.apply(cgroup.as_fd()).unwrap();
        assert_eq!(text("memory.swap.max"), "0");

        let failure = |limits: CgroupLimits| {
            let exceeded = limits.exceeded(cgroup.as_fd())?;
            assert_eq!(exceeded.ended_step, exceeded.message.contains("the kernel ended"));
            Some(format!("{}; {}", exceeded.message, exceeded.hint))
        };
        assert_eq!(failure(own), None, "there are no files");
        fs::write(at("memory.events"), "low 0\nhigh 0\nmax 12\noom 0\noom_kill 0\noom_group_kill 0\n")
            .unwrap();
        fs::write(at("pids.events"), "max 0\n").unwrap();
        assert_eq!(failure(own), None);
        fs::write(at("pids.events"), "max 7\n").unwrap();
        let told = failure(own).unwrap();
        assert!(told.contains("limit of 4096 (`pids` of [limits] in oven.toml)"), "{told}");
        let inherited = limits(Some(3), InheritedLimits { memory: Some(GIB), processes: Some(9) }, 0);
        assert!(failure(inherited).unwrap().contains("`pids.max` of the cgroup of oven"));
        fs::write(at("memory.events"), "max 12\noom 1\noom_kill 2\noom_group_kill 1\n").unwrap();
        let told = failure(own).unwrap();
        assert!(told.contains("limit of 3.0 GiB (`memory_gib` of [limits] in oven.toml)"), "{told}");
        let told = failure(inherited).unwrap();
        assert!(told.contains("limit of 1.0 GiB") && told.contains("`memory.max` of the cgroup"), "{told}");
        fs::write(at("memory.events"), "max 0\noom 0\noom_kill 2\noom_group_kill 1\n").unwrap();
        let told = failure(own).unwrap();
        assert!(told.contains("memory of this machine"), "{told}");
        fs::remove_file(at("pids.max")).unwrap();
        assert!(format!("{:#}", own.apply(cgroup.as_fd()).unwrap_err()).contains("setting pids.max"));
    }
}
