//! A disk in a file that a process of its own serves, through FUSE: what is read of it is the base's, what is written
//! to it is kept beside.
//!
//! Why a process: a thread of this one may be waiting in the kernel for the mounted disk when it is killed, and then no
//! other thread of it is left to serve that disk. The other process ends with the thread that started it, which never
//! touches the disk: whatever waits gets an I/O error then, and all of this one can end, too. And it has none of this
//! one's mounts.

use super::backing;
use super::backing::{FAILED, Lower};
use super::block_map::Marks;
use super::fuse_fs;
use super::overlay::{Below, Overlay, lock};
use crate::error::Kind;
use crate::ids::BLOCK;
use crate::sys::capabilities;
use crate::sys::loop_device;
use crate::sys::mount::api;
use crate::sys::signals;
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, UnmountFlags, mount_change, unmount,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketFlags, SocketType,
};
use rustix::process::{DumpableBehavior, Pid, PidfdFlags, Resource, Rlimit, Signal, setrlimit};
use rustix::thread::UnshareFlags;
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The hidden verb that makes this program the one who serves a disk.
pub const VERB: &str = "__disk";
/// Character device 10:229, by the kernel's list of devices.
const FUSE: (u32, u32) = (10, 229);
/// The longest name of a disk.
const NAME_MAX: usize = 255;
/// The signal that ends the process when it is not needed any more: the kernel, which may need its memory, and the end
/// of oven send another one.
const OURS: Signal = Signal::TERM;
/// How often it is looked whether oven was asked to end.
const LOOK: Duration = Duration::from_millis(250);
/// For so long after that a disk is served: more than it takes to unmount what is thrown away, and less than the ten
/// seconds within which a stopped bake pays its debts.
const GRACE: Duration = Duration::from_secs(2);
/// The other side of the mount, what is written, the marks, and the cache's blocks.
const FILES: usize = 4;

/// A disk that is served. Dropping it ends that: whoever still has the file open gets I/O errors.
pub struct Export {
    /// Open for reading and writing, past the page cache.
    pub file: File,
    server: Server,
}

impl Drop for Export {
    fn drop(&mut self) {
        // Before the file is closed, which may be the end of the mount, and then of the process.
        self.server.ends_now();
    }
}

/// What is served, and by whom.
pub struct Spec<'a> {
    /// This program.
    pub helper: &'a Path,
    /// What the file is called: it can be seen of the loop device.
    pub name: &'a str,
    /// Sparse, as large as the disk.
    pub upper: &'a File,
    pub marks: &'a File,
    /// Where they are kept, for messages.
    pub place: &'a Path,
}

impl Export {
    pub fn start(spec: &Spec, lower: &Arc<Lower>) -> Result<Self> {
        let context = || format!("serving the disk {}", spec.name);
        let fuse = open_fuse()?;
        let mount = mount(&fuse).with_context(context)?;
        let (server, control) = Server::start(spec.helper, spec.name, lower).with_context(context)?;
        let data = lower.cached().reading().with_context(context)?;
        let files = [fuse.as_fd(), spec.upper.as_fd(), spec.marks.as_fd(), data.as_fd()];
        tell(&control, spec.name, &files).with_context(context)?;
        // With ours, the mount would outlive the process.
        drop(fuse);
        lower.answer(&control, spec.place).with_context(context)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::DIRECT;
        match rustix::fs::openat(&mount, spec.name, flags, Mode::empty()) {
            Ok(file) => Ok(Self { file: file.into(), server }),
            Err(error) => {
                // Why it ended says more than that it is not there.
                server.has_ended(Duration::from_secs(1));
                drop(server);
                Err(lower.trouble().take().unwrap_or_else(|| error.into())).with_context(context)
            }
        }
    }
}

/// The process that serves a disk. Dropping it ends it.
struct Server {
    control: Arc<OwnedFd>,
    process: OwnedFd,
    ending: Arc<AtomicBool>,
    /// Waits for the process.
    watch: Option<JoinHandle<()>>,
    lower: Arc<Lower>,
}

impl Server {
    fn start(helper: &Path, name: &str, lower: &Arc<Lower>) -> Result<(Self, Arc<OwnedFd>)> {
        let (flags, kind) = (SocketFlags::CLOEXEC, SocketType::SEQPACKET);
        let (control, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        let mut command = Command::new(helper);
        // Nothing of ours but the socket: no environment, which may hold credentials. The name is for people who look
        // at processes.
        command.arg0("oven").arg(VERB).arg(name).env_clear().current_dir("/");
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let (ending, trouble) = (Arc::new(AtomicBool::new(false)), lower.trouble().clone());
        let (send, started) = mpsc::channel();
        let is_ending = ending.clone();
        // The process ends with this thread, which waits for it and does nothing else: it can always be killed.
        let watch = std::thread::Builder::new().name("disk".to_owned()).spawn(move || {
            let spawned = command.spawn();
            // Its end of the socket is the process's alone.
            drop(command);
            let mut child = match spawned {
                Ok(child) => child,
                Err(error) => {
                    _ = send.send(Err(error.into()));
                    return;
                }
            };
            let opened = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty());
            if opened.is_err() {
                _ = child.kill();
            }
            // Before anybody uses the disk. If it fails, there is none.
            let opened = opened.map_err(anyhow::Error::from).and_then(|process| {
                stand_alone().inspect_err(|_| _ = child.kill())?;
                Ok(process)
            });
            _ = send.send(opened);
            let ended = wait(&mut child, &is_ending);
            // It ends well when nobody has the file open any more.
            let well = |status: &ExitStatus| {
                // It may have been killed by others a moment before: whoever uses the disk knows that sooner.
                let killed = status.signal() == Some(Signal::KILL.as_raw());
                status.success() || is_ending.load(Ordering::SeqCst) && !killed
            };
            match ended {
                Ok(None) => {}
                Ok(Some(status)) if well(&status) => {}
                Ok(Some(status)) => trouble.add(unasked(&status)),
                Err(error) => trouble.add(unasked(&error)),
            }
        })?;
        let process = started.recv().context("starting a process")??;
        let control = Arc::new(control);
        let server =
            Self { control: control.clone(), process, ending, watch: Some(watch), lower: lower.clone() };
        Ok((server, control))
    }

    /// From now on it may end.
    fn ends_now(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// Waits for a while.
    fn has_ended(&self, patience: Duration) -> bool {
        let patience =
            Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
        poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&patience)).is_ok_and(|ready| ready > 0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.ends_now();
        _ = rustix::process::pidfd_send_signal(&self.process, OURS);
        // Who answers it ends, too.
        _ = rustix::net::shutdown(&*self.control, Shutdown::Both);
        self.lower.end();
        if let Some(watch) = self.watch.take() {
            _ = watch.join();
        }
    }
}

/// Waits for the process. Once oven was asked to end, its own thread may be waiting for a block that does not come: then
/// nobody else is left to end the disk. `None`: that was done.
fn wait(child: &mut Child, ending: &AtomicBool) -> io::Result<Option<ExitStatus>> {
    let process = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let look = Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as i64 };
    let mut asked = None;
    loop {
        // Interrupted, it looks once more.
        _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&look));
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if signals::is_asked() && asked.get_or_insert_with(Instant::now).elapsed() > GRACE {
            ending.store(true, Ordering::SeqCst);
            // It may be stopped itself, and would not hear of another signal.
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
    }
}

fn unasked(how: &dyn std::fmt::Display) -> anyhow::Error {
    Kind::Machine
        .failure(format!("the process that serves the disk ended by itself ({how})"))
        .hint("Bake again. If the machine is short of memory, its kernel's log (dmesg) says so.")
        .into()
}

fn open_fuse() -> Result<OwnedFd> {
    let opened = loop_device::open_node("fuse", FileType::CharacterDevice, FUSE);
    opened.map_err(|error| {
        let hint = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
                "Load the kernel's module (modprobe fuse), or bake with disks = \"attached\"."
            }
            _ if !rustix::process::geteuid().is_root() => "Run oven as root.",
            _ => "In a container: give it /dev/fuse (docker run --device /dev/fuse, or --privileged).",
        };
        Kind::Machine.failure(format!("/dev/fuse cannot be opened: {error}")).hint(hint).into()
    })
}

/// Whether disks can be served here: tried.
pub fn available() -> Result<()> {
    mount(&open_fuse()?).map(drop)
}

/// A mount that has no place, and goes with its last descriptor.
fn mount(fuse: &OwnedFd) -> Result<OwnedFd> {
    let make = || -> rustix::io::Result<OwnedFd> {
        let mounting = rustix::mount::fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let set = |name: &str, value: &str| rustix::mount::fsconfig_set_string(&mounting, name, value);
        set("source", "oven")?;
        set("fd", &fuse.as_raw_fd().to_string())?;
        set("rootmode", "40000")?;
        set("user_id", "0")?;
        set("group_id", "0")?;
        rustix::mount::fsconfig_create(&mounting)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        rustix::mount::fsmount(&mounting, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    };
    make().map_err(|error| {
        let failure = Kind::Machine.failure(format!("the kernel makes no FUSE mount: {error}"));
        failure.hint("oven needs root with all its capabilities, and Linux 5.12 or later.").into()
    })
}

fn tell(to: &OwnedFd, name: &str, files: &[std::os::fd::BorrowedFd<'_>; FILES]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    rights.push(SendAncillaryMessage::ScmRights(files));
    rustix::net::sendmsg(to, &[IoSlice::new(name.as_bytes())], &mut rights, SendFlags::NOSIGNAL).map(drop)
}

fn told(from: &OwnedFd) -> Result<(String, [OwnedFd; FILES])> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut name = [0; NAME_MAX];
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(from, &mut [IoSliceMut::new(&mut name)], &mut rights, flags)?;
    let name = String::from_utf8(name[..received.bytes].to_vec())?;
    let files: Vec<OwnedFd> = rights
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(files) => Some(files),
            _ => None,
        })
        .flatten()
        .collect();
    let files = files.try_into().map_err(|_| anyhow::anyhow!("oven gave other files than it should"))?;
    Ok((name, files))
}

/// What `oven __disk` does. First thing in `main`: the process has one thread.
pub fn helper_main() -> ExitCode {
    match child() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("oven: serving a disk: {error:#}");
            ExitCode::from(Kind::Machine as u8)
        }
    }
}

fn child() -> Result<()> {
    crate::sys::fds::close_from(3)?;
    let stdin = rustix::stdio::stdin();
    rustix::net::sockopt::socket_type(stdin).with_context(|| format!("{VERB} is for oven itself"))?;
    let control = rustix::io::fcntl_dupfd_cloexec(stdin, 3)?;
    let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    // A Ctrl-C at the terminal is oven's: the disk is needed for as long as anything is mounted.
    rustix::process::setsid().context("leaving oven's session")?;
    leave_mounts().context("leaving oven's mounts")?;
    io_flusher();
    // All that it needs is open, or comes in a moment.
    capabilities::reduce_to(capabilities::NONE)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).context("hiding")?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).context("hiding")?;
    // Had oven died before that, its end of the socket would be closed.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("tying it to oven")?;
    let (name, [fuse, upper, marks, data]) = told(&control).context("being told what to do")?;
    let asked = Arc::new(Asked::new(control, data.into()));
    let overlay = Overlay::new(asked.clone(), upper.into(), Marks::open(marks.into())?);
    let server = std::thread::Builder::new().name("fuse".to_owned());
    server.spawn(move || {
        // The end of the mount is the end of all.
        let code = fuse_fs::run(Arc::new(overlay), &name, fuse).map_or(Kind::Machine as i32, |()| 0);
        std::process::exit(code)
    })?;
    asked.listen();
    Ok(())
}

/// Makes this thread hold nothing of the process's files and mounts. When all is killed, the last thread that has them
/// closes and unmounts them, and may wait for the disk while it does: was it the one whose end ends the process that
/// serves it, both would wait for ever.
#[allow(unsafe_code)]
fn stand_alone() -> Result<()> {
    // SAFETY: the descriptors of this thread are copies from here on, which nothing of it owns: those it opened before
    // are the process's, and it opens others only after they are closed.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES) }.context("leaving oven's files")?;
    leave_mounts().context("leaving oven's mounts")?;
    crate::sys::fds::close_from(3)
}

/// An empty root, in a mount namespace of its own. In oven's, this process could be the last one when all are killed:
/// then its own end would unmount the disk, and wait for an answer that only it could give.
#[allow(unsafe_code)]
fn leave_mounts() -> Result<()> {
    // SAFETY: nothing of this process's memory or descriptors is unshared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    // Before anything else: what is unmounted here stays mounted elsewhere.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let empty = api::fresh("tmpfs", &[("size", "4k"), ("mode", "0555")], api::READ_ONLY)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    api::attach(&empty, rustix::fs::openat(CWD, "/proc", flags, Mode::empty())?)?;
    rustix::process::fchdir(&empty)?;
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// `<linux/prctl.h>`.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// The kernel does not wait for this disk when this process needs memory. It takes CAP_SYS_RESOURCE, and is a help
/// where memory is short, no more.
#[allow(unsafe_code)]
fn io_flusher() {
    // SAFETY: this prctl takes numbers alone.
    unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
}

/// The base's blocks, as the one who serves them has them: oven is asked to make them ready, in the cache's file.
struct Asked {
    control: OwnedFd,
    data: File,
    /// `None`: asked for. 0: ready. Else it cannot be read.
    answers: Mutex<HashMap<u32, Option<i32>>>,
    told: Condvar,
}

impl Asked {
    fn new(control: OwnedFd, data: File) -> Self {
        Self { control, data, answers: Mutex::default(), told: Condvar::new() }
    }

    /// Until oven is gone.
    fn listen(&self) {
        while let Some((index, errno)) = backing::receive(&self.control) {
            lock(&self.answers).insert(index, Some(errno));
            self.told.notify_all();
        }
    }

    fn ready(&self, index: u32) -> io::Result<()> {
        let mut answers = lock(&self.answers);
        loop {
            match answers.get(&index) {
                Some(Some(0)) => return Ok(()),
                Some(Some(errno)) => return Err(io::Error::from_raw_os_error(*errno)),
                Some(None) => {
                    answers = self.told.wait(answers).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                None => {
                    answers.insert(index, None);
                    drop(answers);
                    // Oven always takes it: else a full socket would stop the one who has to listen.
                    backing::send(&self.control, (index, 0))?;
                    answers = lock(&self.answers);
                }
            }
        }
    }
}

impl Below for Arc<Asked> {
    fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> io::Result<()> {
        self.ready(index)?;
        self.data.read_exact_at(buffer, u64::from(index) * BLOCK as u64 + at as u64)
    }

    fn failed(&self, error: &io::Error) {
        _ = backing::send(&self.control, (FAILED, error.raw_os_error().unwrap_or(libc::EIO)));
    }
}
