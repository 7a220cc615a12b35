//! Runs a function in a child process with limits on memory and time. The template engine counts instructions, but a
//! single instruction can request any amount of memory, and a failed request ends the whole process.

use crate::error::Kind;
use crate::sys::signals::is_stop_requested;
use anyhow::{Context, Error, Result};
use nix::sys::signal::{self, SigSet};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, WaitStatus, setrlimit};
use std::any::Any;
use std::fs::File;
use std::io::{Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

/// The memory in bytes that the child can allocate. A template of the maximal size needs less than this.
pub const MEMORY: u64 = 128 << 20;
/// The processor time in seconds that the child can use. The instructions that the engine permits take less than a
/// second.
const CPU_SECONDS: u64 = 2;
/// The child is killed after this time, even if it used no processor time.
const DEADLINE: Duration = Duration::from_secs(30);
/// How often a waiting parent checks whether a signal asked it to end.
const POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// What this module does, for errors.
const DOING: &str = "rendering a template in a child process";
const KILLED: &str = "the kernel killed it, probably because this machine has too little free memory";
/// The first byte of the child's answer.
const SUCCESS: u8 = b's';
/// The work failed.
const FAILURE: u8 = b'f';
/// The work panicked.
const PANIC: u8 = b'p';
/// The child could not limit itself, so it did not begin the work.
const UNLIMITED: u8 = b'u';

/// The child. Dropping the value kills the child, and waits until it has ended.
struct Child(Option<Pid>);

impl Child {
    fn wait(&mut self) -> Result<Option<WaitStatus>> {
        let Some(pid) = self.0.take() else { return Ok(None) };
        loop {
            match rustix::process::waitpid(Some(pid), WaitOptions::empty()) {
                Err(rustix::io::Errno::INTR) => {}
                ended => return Ok(ended.context("waiting for the child")?.map(|(_, status)| status)),
            }
        }
    }
}
impl Drop for Child {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            _ = rustix::process::kill_process(pid, Signal::KILL);
            _ = self.wait();
        }
    }
}

/// Runs `work` in a child process. Returns its result. If the child reached a limit, the result is the reason.
///
/// Errors: [`Kind::Machine`] if there can be no child, or if the kernel killed it for another reason than its limits;
/// [`Kind::Interrupted`] if a signal asked this process to end.
///
/// `work` must not use locks that other threads may hold.
pub fn run(work: impl FnOnce() -> Result<String, String>) -> Result<Result<String, String>> {
    run_limited(&limit, work).map_err(|error| Kind::Machine.unless_known(error.context(DOING)))
}

fn run_limited(
    limit: &dyn Fn() -> Result<()>,
    work: impl FnOnce() -> Result<String, String>,
) -> Result<Result<String, String>> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).context("making a pipe")?;
    let pid = fork(|| answer(&mut File::from(writer), limit, work)).context("starting a child")?;
    let mut child = Child(Some(pid));
    let mut reader = File::from(reader);
    let (mut bytes, mut buffer, begin) = (Vec::new(), [0; 64 << 10], Instant::now());
    loop {
        if is_stop_requested() {
            return Err(Kind::Interrupted.error("interrupted"));
        }
        if begin.elapsed() > DEADLINE {
            return Ok(Err(too_long()));
        }
        match poll(&mut [PollFd::new(&reader, PollFlags::IN)], Some(&POLL)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => continue,
            ready => _ = ready.context("waiting for the child")?,
        }
        match reader.read(&mut buffer).context("reading from the child")? {
            0 => break,
            count => bytes.extend_from_slice(&buffer[..count]),
        }
    }
    let status = child.wait()?;
    let text = bytes.split_first().map(|(first, rest)| (*first, String::from_utf8_lossy(rest).into_owned()));
    let status = status.context("the child's status is unknown")?;
    if let Some(signal) = status.terminating_signal() {
        return match signal {
            libc::SIGXCPU => Ok(Err(too_long())),
            // A failed allocation aborts the process. A stack that cannot grow is an invalid access.
            libc::SIGABRT | libc::SIGSEGV | libc::SIGBUS => Ok(Err(too_much_memory())),
            // The kernel kills a process if the machine has no memory left. The child's own limits do not do this.
            libc::SIGKILL => Err(Error::msg(KILLED)),
            signal => Err(Error::msg(format!("the child was ended by signal {signal}"))),
        };
    }
    match (status.exit_status(), text) {
        (Some(0), Some((SUCCESS, text))) => Ok(Ok(text)),
        (Some(0), Some((FAILURE, text))) => Ok(Err(text)),
        (Some(0), Some((PANIC, text))) if text.contains("capacity overflow") => Ok(Err(too_much_memory())),
        (Some(0), Some((PANIC, text))) => Ok(Err(format!("the template engine failed: {text}"))),
        (Some(0), Some((UNLIMITED, text))) => {
            Err(Error::msg(format!("the child's limits cannot be set: {text}")))
        }
        (status, _) => {
            Err(Error::msg(format!("the child ended with status {status:?} and without a result")))
        }
    }
}

fn too_much_memory() -> String {
    format!("it needs too much memory to render (the limit is {} MiB)", MEMORY >> 20)
}

pub fn too_long() -> String {
    "it takes too long to render".into()
}

/// Calls `child` in a new process, which then ends. Returns the new process.
#[allow(unsafe_code)]
fn fork(child: impl FnOnce()) -> std::io::Result<Pid> {
    // SAFETY: the C library prepares its allocator for a fork, so the child can allocate. The child uses no lock that
    // another thread of the parent may hold, and it ends below without running any code of its parent.
    match unsafe { libc::fork() } {
        0 => {
            let code = i32::from(catch_unwind(AssertUnwindSafe(child)).is_err());
            // SAFETY: this ends only the child. The child is a copy of its parent, so none of its values has to be
            // dropped.
            unsafe { libc::_exit(code) }
        }
        pid => Pid::from_raw(pid.max(0)).ok_or_else(std::io::Error::last_os_error),
    }
}

/// Runs `work` in the child, and writes its result.
fn answer(parent: &mut File, limit: &dyn Fn() -> Result<()>, work: impl FnOnce() -> Result<String, String>) {
    let (first, text) = match limit() {
        Err(error) => (UNLIMITED, format!("{error:#}")),
        // A failed assertion of the library is a panic.
        Ok(()) => match catch_unwind(AssertUnwindSafe(work)) {
            Ok(Ok(text)) => (SUCCESS, text),
            Ok(Err(text)) => (FAILURE, text),
            Err(panic) => (PANIC, panic_message(&*panic)),
        },
    };
    _ = parent.write_all(&[first]).and_then(|()| parent.write_all(text.as_bytes()));
}

/// The beginning of a panic's message.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("it panicked").chars().take(super::MAX_SHOWN).collect()
}

/// Limits this process. It ends with its parent, and ignores signals that are meant for the parent.
fn limit() -> Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut blocked = SigSet::all();
    blocked.remove(signal::SIGXCPU);
    blocked.thread_set_mask()?;
    // The message of a failed allocation is not for the user.
    rustix::stdio::dup2_stderr(File::options().write(true).open("/dev/null")?)?;
    let status = std::fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let used = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
        kib.map(|kib| kib << 10).with_context(|| format!("/proc/self/status has no {name}"))
    };
    let limit = |resource, most| setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) });
    limit(Resource::Core, 0)?;
    // At the first limit, the kernel sends SIGXCPU. At the second one, it would send SIGKILL, which does not show that
    // the child reached a limit.
    setrlimit(Resource::Cpu, Rlimit { current: Some(CPU_SECONDS), maximum: Some(CPU_SECONDS + 1) })?;
    limit(Resource::As, used("VmSize:")? + 2 * MEMORY)?;
    limit(Resource::Data, used("VmData:")? + MEMORY)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_and_an_error_come_back() {
        assert_eq!(run(|| Ok("ä".repeat(1 << 20))).unwrap(), Ok("ä".repeat(1 << 20)));
        assert_eq!(run(|| Err("no".into())).unwrap(), Err("no".into()));
    }

    #[test]
    fn a_child_that_reaches_a_limit_ends_alone() {
        let memory = |bytes: usize| run(move || Ok(vec![1u8; bytes].len().to_string())).unwrap();
        assert_eq!(memory(16 << 20), Ok((16 << 20).to_string()));
        assert!(memory(2 * MEMORY as usize).unwrap_err().contains("too much memory"));
        assert!(memory(usize::MAX / 4).unwrap_err().contains("too much memory"));
        let panic = |what: String| run(move || std::panic::panic_any(what)).unwrap().unwrap_err();
        assert_eq!(panic("a bug".into()), "the template engine failed: a bug");
        assert!(panic("capacity overflow".into()).contains("too much memory"));
        let forever = || {
            let mut number = 1u64;
            while std::hint::black_box(number) != 0 {
                number |= 1;
            }
            Ok(String::new())
        };
        let begin = Instant::now();
        assert_eq!(run(forever).unwrap(), Err(too_long()));
        assert!(begin.elapsed() < DEADLINE);
    }

    #[test]
    fn a_failure_of_this_machine_is_not_the_works() {
        let killed = || {
            _ = signal::raise(signal::SIGKILL);
            Ok(String::new())
        };
        let error = run(killed).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Machine);
        assert_eq!(format!("{error:#}"), format!("{DOING}: {KILLED}"));
        let no_limit = || Err(Error::from(rustix::io::Errno::PERM).context("limiting memory"));
        let error = run_limited(&no_limit, || Ok("it ran without limits".into())).unwrap_err();
        assert_eq!(Kind::of(&error), Kind::Machine);
        assert!(
            format!("{error:#}").starts_with("the child's limits cannot be set: limiting memory: "),
            "{error:#}"
        );
    }
}
