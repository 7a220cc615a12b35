//! Starts and ends a step's helper, which is process 1 of the step. This code runs in oven, not in the helper.

use super::cgroup::StepCgroup;
use super::protocol::{CONTROL, SPEC, STATUS, TERMINATE};
use super::spec::StepSpec;
use crate::error::Kind;
use crate::sys::mount::api::{READ_ONLY, clone_mount, restrict};
use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use rustix::fs::{CWD, MemfdFlags, Mode, OFlags};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType};
use rustix::pipe::PipeFlags;
use rustix::process::{Signal, WaitId, WaitIdOptions};
use std::io::{self, Seek, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// How long to wait for a killed process to end. A process that takes longer probably hangs in the kernel, for example
/// because a disk does not respond.
const DEATH_TIMEOUT: Duration = Duration::from_secs(8);
/// The lowest number for oven's duplicates of descriptors. The helper expects its descriptors at lower numbers. So
/// while the child copies the duplicates to these lower numbers, it does not overwrite a duplicate.
const OUT_OF_THE_WAY: RawFd = 16;
/// The size in bytes of the stack that the child uses until it executes the helper. A small stack is sufficient,
/// because the child makes only a few system calls.
const STACK: usize = 64 << 10;
/// The flag of linux/sched.h. It exists since Linux 5.7.
const CLONE_INTO_CGROUP: u64 = 1 << 33;

/// The processes of a step. Dropping the value kills all of them and waits until they have ended.
pub struct StepProcess {
    /// The pidfd of the step's process 1. It becomes readable when all processes of the step have ended.
    pub process: OwnedFd,
    pub control: OwnedFd,
    /// Standard output of the step, and also its standard error, unless `errors` has it. `None` if the step has the
    /// terminal.
    pub output: Option<OwnedFd>,
    /// Standard error of the step, if it is separate.
    pub errors: Option<OwnedFd>,
    /// What the step writes to its status descriptor, if it has one.
    pub status: Option<OwnedFd>,
    reaped: bool,
}

impl StepProcess {
    /// Starts `helper` for `spec`. If there is a `cgroup`, the helper starts in it. The kernel kills the helper when the
    /// calling thread ends. If `separates_errors` is true, standard error gets a pipe of its own.
    pub fn start(
        helper: &Path,
        spec: &StepSpec,
        cgroup: Option<&StepCgroup>,
        separates_errors: bool,
    ) -> Result<Self> {
        let program = open_read_only(helper).with_context(|| format!("opening {}", helper.display()))?;
        // The helper expects its own descriptors at low numbers. So the program's descriptor is duplicated to a higher
        // number.
        let program = duplicate(&program)?;
        let spec_file = write_spec(spec).context("passing the spec to the step's helper")?;
        let (control, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .context("making a socket to the step's helper")?;
        let (output, errors, standard) = if spec.interactive {
            (None, None, [0, 1, 2].map(|fd| duplicate(&borrowed(fd))))
        } else {
            let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
                .context("opening /dev/null")?;
            let (output, writer) = make_pipe()?;
            let (errors, errors_writer) = match separates_errors {
                true => make_pipe().map(|(reader, writer)| (Some(reader), writer))?,
                false => (None, duplicate(&writer)?),
            };
            (Some(output), errors, [duplicate(&null), duplicate(&writer), duplicate(&errors_writer)])
        };
        let [stdin, stdout, stderr] = standard;
        let (status, status_writer) = make_pipe()?;
        let [status_writer, spec_file] = [duplicate(&status_writer)?, duplicate(&spec_file)?];
        let inherited = [stdin?, stdout?, stderr?, status_writer, spec_file, duplicate(&theirs)?];
        let process = spawn(&program, &inherited, cgroup.map(StepCgroup::cgroup)).map_err(|error| {
            Kind::Machine
                .failure(format!("cannot start a contained process ({error})"))
                .hint("oven needs root with all its capabilities; `oven doctor` shows what is missing.")
        })?;
        let status = spec.status.then_some(status);
        Ok(Self { process, control, output, errors, status, reaped: false })
    }

    /// Asks the helper to send SIGTERM to the step's program. Has no effect if the program has already ended.
    pub fn terminate(&self) {
        let _ = rustix::net::send(&self.control, TERMINATE, SendFlags::NOSIGNAL);
    }

    /// Kills all processes of the step.
    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.process, Signal::KILL);
    }

    /// Waits until all processes of the step have ended. Returns the signal that ended process 1, or `None` if process
    /// 1 exited. Fails after some seconds if the kernel cannot end the processes.
    pub fn reap(&mut self) -> Result<Option<i32>> {
        let deadline = Instant::now() + DEATH_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&left)) {
                Ok(0) => {
                    let what = "the step's processes do not end; perhaps the disk does not respond";
                    return Err(Kind::Machine.error(what));
                }
                Err(rustix::io::Errno::INTR) => continue,
                result => _ = result.context("waiting for the step")?,
            }
            let ended = rustix::process::waitid(WaitId::PidFd(self.process.as_fd()), WaitIdOptions::EXITED);
            match ended {
                Err(rustix::io::Errno::INTR) => {}
                result => {
                    self.reaped = true;
                    let status = result.context("waiting for the step")?;
                    return Ok(status.and_then(|status| status.terminating_signal()));
                }
            }
        }
    }
}

impl Drop for StepProcess {
    fn drop(&mut self) {
        if self.reaped {
            return;
        }
        self.kill();
        if let Err(error) = self.reap() {
            eprintln!("oven: {error:#}");
        }
    }
}

/// Opens the program on a separate read-only mount. A step can open this file through the link `exe` in `/proc` of a
/// process that still runs the helper. Because the mount is read-only, the step cannot write to the file.
fn open_read_only(program: &Path) -> Result<OwnedFd> {
    let mount_error = |error: io::Error| {
        if error.kind() == io::ErrorKind::NotFound {
            return anyhow::Error::from(error);
        }
        Kind::Machine
            .failure(format!("the kernel cannot copy a mount ({error})"))
            .hint("oven needs root with all its capabilities, and Linux 5.12 or later.")
            .into()
    };
    let file = clone_mount(CWD, program, false).map_err(mount_error)?;
    restrict(&file, READ_ONLY, false).map_err(mount_error)?;
    Ok(file)
}

/// Makes a pipe for the step's output. Reads do not block.
fn make_pipe() -> Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).context("making a pipe")?;
    rustix::fs::fcntl_setfl(&reader, OFlags::NONBLOCK).context("making a pipe")?;
    Ok((reader, writer))
}

fn write_spec(spec: &StepSpec) -> Result<OwnedFd> {
    let fd = rustix::fs::memfd_create("step", MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&serde_json::to_vec(spec)?)?;
    file.rewind()?;
    Ok(file.into())
}

fn duplicate(fd: &impl AsFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(fd, OUT_OF_THE_WAY).context("copying a descriptor")
}

#[allow(unsafe_code)]
fn borrowed(fd: RawFd) -> BorrowedFd<'static> {
    // SAFETY: Rust's runtime keeps the standard descriptors open as long as the process runs.
    unsafe { BorrowedFd::borrow_raw(fd) }
}

/// The data that the child needs. The child shares the memory of its parent.
struct Child {
    program: RawFd,
    inherited: [RawFd; 6],
    arguments: [*const libc::c_char; 3],
    /// The file `cgroup.procs` of the cgroup that the child has to enter, or -1.
    processes: RawFd,
    /// The child sets this if it cannot enter the cgroup.
    is_outside: bool,
}

/// Enters the cgroup, if there is one, and executes the helper, with the inherited descriptors as 0, 1, … and an empty
/// environment. Returns an exit code if the helper cannot be executed. This function runs in a new process, which shares
/// the memory of its parent, so the function makes only system calls.
#[allow(unsafe_code)]
extern "C" fn become_helper(child: *mut libc::c_void) -> libc::c_int {
    let environment = [std::ptr::null::<libc::c_char>()];
    // SAFETY: only `spawn` calls this function. The argument is a `Child` with open descriptors and C strings, and the
    // `Child` lives until this process executes the helper or ends.
    unsafe {
        let child = &mut *child.cast::<Child>();
        // 0 means the process that writes.
        if child.processes >= 0 && libc::syscall(libc::SYS_write, child.processes, c"0".as_ptr(), 1) < 0 {
            child.is_outside = true;
            return 126;
        }
        for (to, from) in child.inherited.iter().enumerate() {
            libc::syscall(libc::SYS_dup3, *from, to, 0);
        }
        libc::syscall(
            libc::SYS_execveat,
            child.program,
            c"".as_ptr(),
            child.arguments.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        );
    }
    126
}

/// Starts `program` as process 1 of a new PID namespace, with `inherited` as descriptors 0, 1, … and an empty
/// environment. Returns the pidfd. If there is a `cgroup`, the process starts in this cgroup.
fn spawn(program: &OwnedFd, inherited: &[OwnedFd; 6], cgroup: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    const _: () = assert!(STATUS == 3 && SPEC == 4 && CONTROL == 5);
    let verb = std::ffi::CString::new(super::VERB)?;
    let mut child = Child {
        program: program.as_raw_fd(),
        inherited: std::array::from_fn(|at| inherited[at].as_raw_fd()),
        arguments: [c"oven".as_ptr(), verb.as_ptr(), std::ptr::null()],
        processes: -1,
        is_outside: false,
    };
    let Some(cgroup) = cgroup else { return start_child(&mut child, None) };
    match start_child(&mut child, Some(cgroup)) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {}
        started => return started,
    }
    // Some containers forbid `clone3`. There the child enters the cgroup by itself. This is slower, because the kernel
    // waits until no process of the machine is in the middle of a fork.
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let processes = rustix::fs::openat(cgroup, "cgroup.procs", flags, Mode::empty())?;
    child.processes = processes.as_raw_fd();
    let process = start_child(&mut child, None)?;
    if child.is_outside {
        _ = rustix::process::waitid(WaitId::PidFd(process.as_fd()), WaitIdOptions::EXITED);
        return Err(io::Error::other("it cannot enter its cgroup"));
    }
    Ok(process)
}

/// Starts a process that runs [`become_helper`]. The process shares the memory of this one, which waits until the
/// process has executed the helper. A copy of the memory for each step would be slow, because oven may use much memory.
#[allow(unsafe_code)]
fn start_child(child: &mut Child, cgroup: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    const FLAGS: libc::c_int = libc::CLONE_NEWPID | libc::CLONE_PIDFD | libc::CLONE_VM | libc::CLONE_VFORK;
    let child: *mut libc::c_void = (&raw mut *child).cast();
    let mut pidfd: RawFd = -1;
    let mut stack = vec![0_u128; STACK / size_of::<u128>()];
    let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    // SAFETY: until the child executes the helper or ends, it makes only system calls, with pointers to data that exist
    // already. It allocates nothing, and needs no lock that another thread may hold. No signal handler of this process
    // runs in the child, because all signals are blocked during the call. The kernel writes `pidfd` when the call
    // succeeds, and the descriptor has no other owner. The child has a separate stack, and this thread continues only
    // when the child no longer uses the memory (CLONE_VFORK).
    unsafe {
        let pid = match cgroup {
            // Every container permits `clone`.
            None => {
                let top = stack.as_mut_ptr_range().end.cast();
                libc::c_long::from(libc::clone(
                    become_helper,
                    top,
                    FLAGS | libc::SIGCHLD,
                    child,
                    &raw mut pidfd,
                ))
            }
            Some(cgroup) => {
                let mut arguments = std::mem::zeroed::<libc::clone_args>();
                arguments.flags = FLAGS as u64 | CLONE_INTO_CGROUP;
                arguments.pidfd = &raw mut pidfd as u64;
                arguments.exit_signal = libc::SIGCHLD as u64;
                arguments.stack = stack.as_mut_ptr() as u64;
                arguments.stack_size = STACK as u64;
                arguments.cgroup = cgroup.as_raw_fd() as u64;
                clone3(&raw mut arguments, child)
            }
        };
        let error = io::Error::last_os_error();
        // This cannot fail, because the kernel returned this mask before.
        _ = before.thread_set_mask();
        match pid {
            // The C library's functions return -1, and the system call returns the negative error number.
            -1 if cgroup.is_none() => Err(error),
            ..0 => Err(io::Error::from_raw_os_error((-pid) as i32)),
            _ => Ok(OwnedFd::from_raw_fd(pidfd)),
        }
    }
}

/// The system call `clone3`, for which the C library has no function. Returns the child's number or a negative error
/// number. The child begins with an empty stack, on which it calls [`become_helper`], and then it ends.
///
/// # Safety
/// `arguments` have a separate stack, whose end is aligned to 16 bytes. `child` is what [`become_helper`] expects. Both
/// live until the child has executed another program or has ended.
#[cfg(target_arch = "x86_64")]
#[allow(unsafe_code)]
unsafe fn clone3(arguments: *mut libc::clone_args, child: *mut libc::c_void) -> libc::c_long {
    let result;
    // SAFETY: in this process, the code is only a system call, which changes rax, rcx and r11. The child never leaves
    // the code, and its registers and stack are its own.
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r12",
            "call r13",
            "mov edi, eax",
            "mov eax, {exit}",
            "syscall",
            "ud2",
            "2:",
            exit = const libc::SYS_exit,
            inlateout("rax") libc::SYS_clone3 => result,
            in("rdi") arguments,
            in("rsi") size_of::<libc::clone_args>(),
            in("r12") child,
            in("r13") become_helper as extern "C" fn(*mut libc::c_void) -> libc::c_int,
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    result
}

/// The system call `clone3`, for which the C library has no function. Returns the child's number or a negative error
/// number. The child begins with an empty stack, on which it calls [`become_helper`], and then it ends.
///
/// # Safety
/// `arguments` have a separate stack, whose end is aligned to 16 bytes. `child` is what [`become_helper`] expects. Both
/// live until the child has executed another program or has ended.
#[cfg(target_arch = "aarch64")]
#[allow(unsafe_code)]
unsafe fn clone3(arguments: *mut libc::clone_args, child: *mut libc::c_void) -> libc::c_long {
    let result;
    // SAFETY: in this process, the code is only a system call, which changes x0. The child never leaves the code, and
    // its registers and stack are its own.
    unsafe {
        std::arch::asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x0, x20",
            "blr x21",
            "mov x8, #{exit}",
            "svc #0",
            "brk #1",
            "2:",
            exit = const libc::SYS_exit,
            in("x8") libc::SYS_clone3,
            inlateout("x0") arguments => result,
            in("x1") size_of::<libc::clone_args>(),
            in("x20") child,
            in("x21") become_helper as extern "C" fn(*mut libc::c_void) -> libc::c_int,
        );
    }
    result
}

/// The state of the terminal before a step uses it.
pub struct TerminalState {
    group: rustix::process::Pid,
    modes: rustix::termios::Termios,
}

impl TerminalState {
    /// Records the state of standard input's terminal. Returns `None` if standard input is not a terminal.
    pub fn note() -> Option<Self> {
        let stdin = rustix::stdio::stdin();
        let modes = rustix::termios::tcgetattr(stdin).ok()?;
        Some(Self { group: rustix::termios::tcgetpgrp(stdin).ok()?, modes })
    }
}

impl Drop for TerminalState {
    fn drop(&mut self) {
        let stdin = rustix::stdio::stdin();
        // This process is in the background now. When it takes the terminal back, the kernel sends SIGTTOU, which would
        // stop the process. So this signal is blocked.
        let mut background = SigSet::empty();
        background.add(nix::sys::signal::Signal::SIGTTOU);
        let before = background.thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let _ = rustix::termios::tcsetpgrp(stdin, self.group);
        // A step may have stopped the terminal's output. The output is resumed, because otherwise the next program that
        // writes to the terminal would hang. Unread input is discarded, because it may be the terminal's reply to a
        // query of a program. The user's shell would treat such a reply as typed input.
        let _ = rustix::termios::tcflow(stdin, rustix::termios::Action::OOn);
        let _ = rustix::termios::tcsetattr(stdin, rustix::termios::OptionalActions::Now, &self.modes);
        let _ = rustix::termios::tcflush(stdin, rustix::termios::QueueSelector::IFlush);
        let _ = before.and_then(|before| before.thread_set_mask());
    }
}
