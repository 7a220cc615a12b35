//! The process that owns a resource. Each resource in the cloud has a tag that names its owner. By this tag, oven
//! distinguishes the leftovers of killed bakes from resources in use.

use anyhow::{Context, Result};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// The target of the link `/proc/PID/ns/pid` in the initial PID namespace (the kernel's `PROC_PID_INIT_INO`).
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Identifies a process among all processes of all hosts, even if its PID is reused later or after a reboot. The text
/// form, which is the value of the tag `oven:owner`, is `HOST/BOOT/PID/START`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The instance id on EC2, otherwise the machine id. The PID namespace is appended if it is not the initial one.
    pub host: String,
    /// The kernel's boot id.
    pub boot: String,
    pub pid: u32,
    /// When the process started, in clock ticks since the boot (field 22 of `/proc/PID/stat`).
    pub started: u64,
}

/// Whether an owner has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OwnerEnded {
    Yes,
    No,
    /// This process cannot know whether the owner has ended. The owner is on another host or in another PID namespace,
    /// or a part of the owner's or of this process's identity is unknown.
    Unknown,
}

/// The value of `host` or `boot` if it cannot be determined.
const UNKNOWN: &str = "unknown";

impl Owner {
    /// This process.
    pub fn this() -> Self {
        Self::on(&host_id(Path::new("/")))
    }

    /// This process, on a host with the given name. On EC2, the name is the instance id.
    pub fn on(host: &str) -> Self {
        Self::of(host, std::process::id(), Path::new("/proc"))
    }

    /// A part that cannot be read becomes `UNKNOWN` or 0. An owner with such a part never counts as ended.
    fn of(host: &str, pid: u32, proc: &Path) -> Self {
        let boot = std::fs::read_to_string(proc.join("sys/kernel/random/boot_id")).unwrap_or_default();
        let boot = if boot.trim().is_empty() { UNKNOWN } else { boot.trim() };
        let started = read_process(proc, pid).ok().flatten().map_or(0, |stat| stat.started);
        // A PID has no meaning outside its namespace. So another PID namespace counts as another host.
        let host = match std::fs::read_link(proc.join("self/ns/pid")) {
            Ok(namespace) if namespace.as_os_str() != FIRST_PID_NAMESPACE => {
                let digits: String =
                    namespace.to_string_lossy().chars().filter(char::is_ascii_digit).collect();
                format!("{host}+pidns-{digits}")
            }
            _ => host.to_owned(),
        };
        Self { host, boot: boot.to_owned(), pid, started }
    }

    /// Returns whether this owner has ended, as far as the running process `here` can determine it.
    pub fn has_ended_seen_from(&self, here: &Owner, proc: &Path) -> OwnerEnded {
        let known = |owner: &Owner| owner.host != UNKNOWN && owner.boot != UNKNOWN && owner.started != 0;
        if self.host != here.host || !known(self) || !known(here) {
            return OwnerEnded::Unknown;
        }
        if self.boot != here.boot {
            return OwnerEnded::Yes;
        }
        match read_process(proc, self.pid) {
            Ok(None) => OwnerEnded::Yes,
            // A zombie has released its resources.
            Ok(Some(found)) if found.started != self.started || found.has_ended => OwnerEnded::Yes,
            Ok(Some(_)) => OwnerEnded::No,
            Err(_) => OwnerEnded::Unknown,
        }
    }

    /// Returns whether this owner has ended, as far as this process can determine it.
    pub fn is_gone(&self) -> OwnerEnded {
        self.has_ended_seen_from(&Self::this(), Path::new("/proc"))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.host, self.boot, self.pid, self.started)
    }
}

/// The error for a text that is not an owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseOwnerError(String);
impl fmt::Display for ParseOwnerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not an owner (HOST/BOOT/PID/START)", self.0)
    }
}
impl std::error::Error for ParseOwnerError {}

impl FromStr for Owner {
    type Err = ParseOwnerError;
    fn from_str(text: &str) -> Result<Self, ParseOwnerError> {
        let invalid = || ParseOwnerError(text.to_owned());
        let parts: Vec<&str> = text.split('/').collect();
        let [host, boot, pid, started] = parts[..] else { return Err(invalid()) };
        if host.is_empty() || boot.is_empty() {
            return Err(invalid());
        }
        // `parse` would also accept "+1". But that owner would be formatted as "1", which is a different text.
        let check_digits =
            |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then_some(()).ok_or_else(invalid);
        check_digits(pid)?;
        check_digits(started)?;
        let (host, boot) = (host.to_owned(), boot.to_owned());
        Ok(Self {
            host,
            boot,
            pid: pid.parse().map_err(|_| invalid())?,
            started: started.parse().map_err(|_| invalid())?,
        })
    }
}

/// Returns the machine id of the system below `root`, or its host name if it has no machine id. A `/` in the host name
/// is replaced, because `/` separates the parts of an owner.
fn host_id(root: &Path) -> String {
    let id = std::fs::read_to_string(root.join("etc/machine-id")).unwrap_or_default();
    let id = id.trim();
    if id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return id.to_owned();
    }
    // Before the first boot, the machine id is missing or is the word "uninitialized".
    let name = std::fs::read_to_string(root.join("proc/sys/kernel/hostname")).unwrap_or_default();
    if name.trim().is_empty() { UNKNOWN.to_owned() } else { name.trim().replace('/', "_") }
}

struct ProcessStat {
    started: u64,
    has_ended: bool,
}

/// Reads `/proc/PID/stat`; `None` if there is no such process.
fn read_process(proc: &Path, pid: u32) -> Result<Option<ProcessStat>> {
    let stat = match std::fs::read(proc.join(pid.to_string()).join("stat")) {
        Ok(stat) => stat,
        // ESRCH: the process ended between open and read.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            return Ok(None);
        }
        Err(e) => return Err(e.into()),
    };
    let stat = String::from_utf8_lossy(&stat);
    // Field 2 is the program's name in parentheses. The name itself may contain parentheses and blanks.
    let (_, rest) = stat.rsplit_once(')').context("the process's stat file has no name in parentheses")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let (Some(state), Some(started)) = (fields.first(), fields.get(22 - 3)) else {
        anyhow::bail!("the process's stat file has too few fields");
    };
    Ok(Some(ProcessStat { started: started.parse()?, has_ended: matches!(*state, "Z" | "X" | "x") }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn fake_proc(pid: u32, stat: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join(pid.to_string())).unwrap();
        fs::write(dir.path().join(pid.to_string()).join("stat"), stat).unwrap();
        dir
    }

    fn stat(name: &str, state: &str, started: u64) -> String {
        format!("7 ({name}) {state} 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 {started} 10 11 12\n")
    }

    fn owner(pid: u32, started: u64) -> Owner {
        Owner { host: "h".into(), boot: "b".into(), pid, started }
    }

    #[test]
    fn this_process_has_not_ended_and_parses_back() {
        let this = Owner::this();
        assert_eq!(this.to_string().parse::<Owner>().unwrap(), this);
        assert_eq!(this.is_gone(), OwnerEnded::No);
        assert_eq!(Owner { started: this.started + 1, ..this.clone() }.is_gone(), OwnerEnded::Yes);
        assert_eq!(Owner { boot: "other".into(), ..this.clone() }.is_gone(), OwnerEnded::Yes);
        assert_eq!(Owner { host: "other".into(), ..this }.is_gone(), OwnerEnded::Unknown);
    }

    #[test]
    fn a_killed_child_has_ended() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let owner = Owner::of(&host_id(Path::new("/")), child.id(), Path::new("/proc"));
        assert_eq!(owner.is_gone(), OwnerEnded::No);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(owner.is_gone(), OwnerEnded::Yes);
    }

    #[test]
    fn without_machine_facts_no_owner_counts_as_ended() {
        let nothing = tempfile::tempdir().unwrap();
        let blind = Owner::of(UNKNOWN, 7, nothing.path());
        assert_eq!(blind.to_string(), "unknown/unknown/7/0");
        assert_eq!(blind.has_ended_seen_from(&blind, nothing.path()), OwnerEnded::Unknown);
        let this = Owner::this();
        assert_eq!(Owner { started: 0, ..this.clone() }.is_gone(), OwnerEnded::Unknown);
        assert_eq!(Owner { boot: UNKNOWN.into(), ..this }.is_gone(), OwnerEnded::Unknown);
    }

    #[test]
    fn stat_files_with_parentheses_and_zombies() {
        let here = owner(1, 1);
        let gone = |stat: &str| owner(7, 99).has_ended_seen_from(&here, fake_proc(7, stat).path());
        assert_eq!(gone(&stat("a) R (b", "S", 99)), OwnerEnded::No);
        assert_eq!(gone(&stat("x", "S", 98)), OwnerEnded::Yes);
        assert_eq!(gone(&stat("x", "Z", 99)), OwnerEnded::Yes);
        for garbage in
            ["", ")", "7 (x", "7 (x) S 1", "\u{fffd}", "7 (x) S 1 7 7 0 -1 4 1 2 3 4 5 6 7 8 2 0 1 0 -5"]
        {
            assert_eq!(gone(garbage), OwnerEnded::Unknown, "{garbage:?}");
        }
        assert_eq!(owner(8, 99).has_ended_seen_from(&here, fake_proc(7, "").path()), OwnerEnded::Yes);
    }

    #[test]
    fn invalid_texts_are_rejected() {
        for text in
            ["", "/", "a/b/c/d", "a/b/1", "a/b/1/2/3", "/b/1/2", "a//1/2", "a/b/-1/2", "a/b/+1/2", "a/b//"]
        {
            assert!(text.parse::<Owner>().is_err(), "{text:?}");
        }
        assert!(format!("a/b/{}/1", u64::MAX).parse::<Owner>().is_err());
        assert_eq!("h/b/1/2".parse::<Owner>().unwrap(), owner(1, 2));
    }

    #[test]
    fn a_machine_without_an_id_uses_its_host_name() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(host_id(root.path()), UNKNOWN);
        fs::create_dir_all(root.path().join("proc/sys/kernel")).unwrap();
        fs::write(root.path().join("proc/sys/kernel/hostname"), "a/b\n").unwrap();
        assert_eq!(host_id(root.path()), "a_b");
        fs::create_dir_all(root.path().join("etc")).unwrap();
        fs::write(root.path().join("etc/machine-id"), "uninitialized\n").unwrap();
        assert_eq!(host_id(root.path()), "a_b");
        fs::write(root.path().join("etc/machine-id"), "0123456789abcdef0123456789abcdef\n").unwrap();
        assert_eq!(host_id(root.path()), "0123456789abcdef0123456789abcdef");
    }
}
