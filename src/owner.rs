//! The process that a resource belongs to, as a tag: so that what a killed bake left can be told from what a living
//! one still needs.

use anyhow::{Context, Result};
use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// The inode of the first PID namespace (`PROC_PID_INIT_INO`): the host's own.
const FIRST_PID_NAMESPACE: &str = "pid:[4026531836]";

/// A process, told apart from every other one: also from one that got its PID later, and from one before a reboot.
/// As text, and as the tag `oven:owner`: `HOST/BOOT/PID/START`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Owner {
    /// The instance id on EC2, else the machine id; with the PID namespace, where that is not the first one.
    pub host: String,
    /// The kernel's boot id.
    pub boot: String,
    pub pid: u32,
    /// When it began, in clock ticks since the boot (field 22 of `/proc/PID/stat`).
    pub started: u64,
}

/// Whether an owner is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    Yes,
    No,
    /// It is of another host, or of a namespace that cannot be looked into.
    Unknown,
}

/// Stands for what this machine does not tell.
const UNKNOWN: &str = "unknown";

impl Owner {
    /// This process.
    pub fn this() -> Self {
        Self::on(&host_id(Path::new("/")))
    }

    /// This process, on a host that has a better name than its machine id: an instance id.
    pub fn on(host: &str) -> Self {
        Self::of(host, std::process::id(), Path::new("/proc"))
    }

    /// What cannot be read is unknown, and such an owner is never taken for gone.
    fn of(host: &str, pid: u32, proc: &Path) -> Self {
        let boot = std::fs::read_to_string(proc.join("sys/kernel/random/boot_id")).unwrap_or_default();
        let boot = if boot.trim().is_empty() { UNKNOWN } else { boot.trim() };
        let started = process(proc, pid).ok().flatten().map_or(0, |process| process.started);
        // A PID means nothing outside its namespace: a container's processes are another host's.
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

    /// Whether this owner is gone, as seen from `here`, a process that is alive.
    pub fn is_gone_from(&self, here: &Owner, proc: &Path) -> Gone {
        let known = |owner: &Owner| owner.host != UNKNOWN && owner.boot != UNKNOWN && owner.started != 0;
        if self.host != here.host || !known(self) || !known(here) {
            return Gone::Unknown;
        }
        if self.boot != here.boot {
            return Gone::Yes;
        }
        match process(proc, self.pid) {
            Ok(None) => Gone::Yes,
            // A zombie holds nothing any more.
            Ok(Some(found)) if found.started != self.started || found.dead => Gone::Yes,
            Ok(Some(_)) => Gone::No,
            Err(_) => Gone::Unknown,
        }
    }

    /// Whether this owner is gone, as seen from this process.
    pub fn is_gone(&self) -> Gone {
        self.is_gone_from(&Self::this(), Path::new("/proc"))
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}/{}", self.host, self.boot, self.pid, self.started)
    }
}

/// The text is no owner.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoOwner(String);
impl fmt::Display for NoOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no owner (HOST/BOOT/PID/START)", self.0)
    }
}
impl std::error::Error for NoOwner {}

impl FromStr for Owner {
    type Err = NoOwner;
    fn from_str(text: &str) -> Result<Self, NoOwner> {
        let no = || NoOwner(text.to_owned());
        let parts: Vec<&str> = text.split('/').collect();
        let [host, boot, pid, started] = parts[..] else { return Err(no()) };
        if host.is_empty() || boot.is_empty() {
            return Err(no());
        }
        // Whole numbers only: "+1" parses as one, too, and would not be spelt the same again.
        let number = |digits: &str| digits.bytes().all(|b| b.is_ascii_digit()).then_some(()).ok_or_else(no);
        number(pid)?;
        number(started)?;
        let (host, boot) = (host.to_owned(), boot.to_owned());
        Ok(Self {
            host,
            boot,
            pid: pid.parse().map_err(|_| no())?,
            started: started.parse().map_err(|_| no())?,
        })
    }
}

/// The machine id, or else the host's name, below `root`. Never with a `/`, which separates the parts of an owner.
fn host_id(root: &Path) -> String {
    let id = std::fs::read_to_string(root.join("etc/machine-id")).unwrap_or_default();
    let id = id.trim();
    if id.len() == 32 && id.bytes().all(|b| b.is_ascii_hexdigit()) {
        return id.to_owned();
    }
    // An image whose first boot is to come has none, or the word "uninitialized".
    let name = std::fs::read_to_string(root.join("proc/sys/kernel/hostname")).unwrap_or_default();
    if name.trim().is_empty() { UNKNOWN.to_owned() } else { name.trim().replace('/', "_") }
}

struct Process {
    started: u64,
    dead: bool,
}

/// What `/proc/PID/stat` says; `None` if there is no such process.
fn process(proc: &Path, pid: u32) -> Result<Option<Process>> {
    let stat = match std::fs::read(proc.join(pid.to_string()).join("stat")) {
        Ok(stat) => stat,
        // ESRCH: it ended between open and read.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => {
            return Ok(None);
        }
        Err(e) => return Err(e.into()),
    };
    let stat = String::from_utf8_lossy(&stat);
    // Field 2 is the program's name in parentheses, and may hold parentheses and blanks itself.
    let (_, rest) = stat.rsplit_once(')').context("no name in parentheses")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let (Some(state), Some(started)) = (fields.first(), fields.get(22 - 3)) else {
        anyhow::bail!("too few fields");
    };
    Ok(Some(Process { started: started.parse()?, dead: matches!(*state, "Z" | "X" | "x") }))
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
    fn this_process_is_alive_and_survives_text() {
        let this = Owner::this();
        assert_eq!(this.to_string().parse::<Owner>().unwrap(), this);
        assert_eq!(this.is_gone(), Gone::No);
        assert_eq!(Owner { started: this.started + 1, ..this.clone() }.is_gone(), Gone::Yes);
        assert_eq!(Owner { boot: "other".into(), ..this.clone() }.is_gone(), Gone::Yes);
        assert_eq!(Owner { host: "other".into(), ..this }.is_gone(), Gone::Unknown);
    }

    #[test]
    fn a_child_that_ended_is_gone() {
        let mut child = std::process::Command::new("/bin/sleep").arg("1000").spawn().unwrap();
        let owner = Owner::of(&host_id(Path::new("/")), child.id(), Path::new("/proc"));
        assert_eq!(owner.is_gone(), Gone::No);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(owner.is_gone(), Gone::Yes);
    }

    #[test]
    fn a_machine_that_tells_nothing_takes_nobody_for_gone() {
        let nothing = tempfile::tempdir().unwrap();
        let blind = Owner::of(UNKNOWN, 7, nothing.path());
        assert_eq!(blind.to_string(), "unknown/unknown/7/0");
        assert_eq!(blind.is_gone_from(&blind, nothing.path()), Gone::Unknown);
        let this = Owner::this();
        assert_eq!(Owner { started: 0, ..this.clone() }.is_gone(), Gone::Unknown);
        assert_eq!(Owner { boot: UNKNOWN.into(), ..this }.is_gone(), Gone::Unknown);
    }

    #[test]
    fn names_with_parentheses_and_zombies() {
        let here = owner(1, 1);
        let gone = |stat: &str| owner(7, 99).is_gone_from(&here, fake_proc(7, stat).path());
        assert_eq!(gone(&stat("a) R (b", "S", 99)), Gone::No);
        assert_eq!(gone(&stat("x", "S", 98)), Gone::Yes);
        assert_eq!(gone(&stat("x", "Z", 99)), Gone::Yes);
        for garbage in
            ["", ")", "7 (x", "7 (x) S 1", "\u{fffd}", "7 (x) S 1 7 7 0 -1 4 1 2 3 4 5 6 7 8 2 0 1 0 -5"]
        {
            assert_eq!(gone(garbage), Gone::Unknown, "{garbage:?}");
        }
        assert_eq!(owner(8, 99).is_gone_from(&here, fake_proc(7, "").path()), Gone::Yes);
    }

    #[test]
    fn garbage_is_no_owner() {
        for text in
            ["", "/", "a/b/c/d", "a/b/1", "a/b/1/2/3", "/b/1/2", "a//1/2", "a/b/-1/2", "a/b/+1/2", "a/b//"]
        {
            assert!(text.parse::<Owner>().is_err(), "{text:?}");
        }
        assert!(format!("a/b/{}/1", u64::MAX).parse::<Owner>().is_err());
        assert_eq!("h/b/1/2".parse::<Owner>().unwrap(), owner(1, 2));
    }

    #[test]
    fn a_machine_without_an_id_has_its_name() {
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
