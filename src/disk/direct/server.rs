//! Serves a disk as a file through FUSE, in a separate process. Unwritten blocks come from the base, and writes go to
//! local files.
//!
//! The server is a separate process, because oven may be killed. If oven's own threads served the disk, a kill would
//! end them. Then another thread of oven could wait in the kernel for the mounted disk, and would never end. The kernel
//! kills the server when the thread that started the server ends. That thread never uses the disk, so it can always
//! end. When the server ends, every waiting thread gets an I/O error, so oven can end, too. The server also leaves
//! oven's mount namespace. Otherwise the kernel could unmount the disk when the server ends, and the unmount would wait
//! for the server.

use super::backing;
use super::backing::{BackingStore, WRITE_FAILED};
use super::block_map::BlockMap;
use super::fuse_fs;
use super::overlay::{BaseBlocks, Overlay};
use crate::error::Kind;
use crate::ids::BLOCK;
use crate::sys::capabilities;
use crate::sys::lock::lock_mutex;
use crate::sys::loop_device;
use crate::sys::mount::api;
use crate::sys::namespaces;
use crate::sys::signals;
use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags};
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

/// The hidden command that runs this program as the server of a disk.
pub const SERVER_VERB: &str = "__disk";
/// The major and minor numbers of the character device `/dev/fuse`. They are fixed in the kernel's list of devices.
const FUSE: (u32, u32) = (10, 229);
/// The maximum length of a disk's name.
const NAME_MAX: usize = 255;
/// The signal with which oven ends a server that is no longer needed. If memory runs out or oven ends, the kernel sends
/// SIGKILL instead.
const END_SIGNAL: Signal = Signal::TERM;
/// How often to check whether oven was asked to stop.
const STOP_POLL: Duration = Duration::from_millis(250);
/// How long a disk is still served after a stop was requested. This is long enough to unmount a disk that is discarded.
/// It is shorter than the ten seconds that an interrupted bake has for its clean-up actions.
const GRACE: Duration = Duration::from_secs(2);
/// The number of files that the server receives: the FUSE descriptor, the file for the written blocks, the block map,
/// and the `data` file of the cache.
const FILE_COUNT: usize = 4;

/// A disk that is being served. Dropping it stops the server. After that, processes that have the file open get I/O
/// errors.
pub struct DiskServer {
    /// The disk's file. It is open for reading and writing, and bypasses the page cache.
    pub file: File,
    server: Server,
}

impl Drop for DiskServer {
    fn drop(&mut self) {
        // This is done before the file is closed, because closing the file may end the mount, and then the server
        // exits.
        self.server.expect_end();
    }
}

/// Describes the disk to serve.
pub struct DiskServerSpec<'a> {
    /// The path of this program.
    pub helper: &'a Path,
    /// The name of the file. It is visible in the loop device's status.
    pub name: &'a str,
    /// The file for the written blocks. It is a sparse file of the disk's size.
    pub upper: &'a File,
    pub marks: &'a File,
    /// The directory of these files, for messages.
    pub place: &'a Path,
}

impl DiskServer {
    pub fn start(spec: &DiskServerSpec, lower: &Arc<BackingStore>) -> Result<Self> {
        let context = || format!("serving the disk {}", spec.name);
        let fuse = open_fuse()?;
        let mount = mount(&fuse).with_context(context)?;
        let (server, control) = Server::start(spec.helper, spec.name, lower).with_context(context)?;
        let data = lower.cached().reading().with_context(context)?;
        let files = [fuse.as_fd(), spec.upper.as_fd(), spec.marks.as_fd(), data.as_fd()];
        send_files(&control, spec.name, &files).with_context(context)?;
        // The mount exists as long as a FUSE descriptor is open. It must end with the server, so this copy is closed.
        drop(fuse);
        lower.start_threads(&control, spec.place).with_context(context)?;
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::DIRECT;
        match rustix::fs::openat(&mount, spec.name, flags, Mode::empty()) {
            Ok(file) => Ok(Self { file: file.into(), server }),
            Err(error) => {
                // The file is missing if the server has ended. In that case, the reason why the server ended is
                // returned instead of this error.
                server.wait_for_end(Duration::from_secs(1));
                drop(server);
                Err(lower.trouble().take().unwrap_or_else(|| error.into())).with_context(context)
            }
        }
    }
}

/// The process that serves a disk. Dropping it ends the process.
struct Server {
    control: Arc<OwnedFd>,
    process: OwnedFd,
    ending: Arc<AtomicBool>,
    /// The thread that waits for the process to end.
    waiter: Option<JoinHandle<()>>,
    lower: Arc<BackingStore>,
}

impl Server {
    fn start(helper: &Path, name: &str, lower: &Arc<BackingStore>) -> Result<(Self, Arc<OwnedFd>)> {
        let (flags, kind) = (SocketFlags::CLOEXEC, SocketType::SEQPACKET);
        let (control, theirs) = rustix::net::socketpair(AddressFamily::UNIX, kind, flags, None)?;
        let mut command = Command::new(helper);
        // The server inherits only the socket. It gets no environment variables, because they may contain credentials.
        // The disk's name is passed only so that process lists show it.
        command.arg0("oven").arg(SERVER_VERB).arg(name).env_clear().current_dir("/");
        command.stdin(Stdio::from(theirs)).stdout(Stdio::null());
        let (ending, trouble) = (Arc::new(AtomicBool::new(false)), lower.trouble().clone());
        let (send, started) = mpsc::channel();
        let is_ending = ending.clone();
        // The kernel kills the server when this thread ends. This thread never uses the disk, so it can always end.
        let waiter = std::thread::Builder::new().name("disk".to_owned()).spawn(move || {
            let spawned = command.spawn();
            // This closes this process's copy of the server's end of the socket.
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
            // This thread must give up its copies of oven's files and mounts before the disk is used. If it cannot, the
            // server is killed.
            let opened = opened.map_err(anyhow::Error::from).and_then(|process| {
                detach_thread().inspect_err(|_| _ = child.kill())?;
                Ok(process)
            });
            _ = send.send(opened);
            let ended = wait_or_kill(&mut child, &is_ending);
            // The server exits successfully when the mount ends, that is, when nobody has the file open any more.
            let is_expected = |status: &ExitStatus| {
                // `Server::drop` uses another signal, so SIGKILL is never expected. After a SIGKILL, a process that
                // uses the disk may have got an I/O error.
                let killed = status.signal() == Some(Signal::KILL.as_raw());
                status.success() || is_ending.load(Ordering::SeqCst) && !killed
            };
            match ended {
                Ok(None) => {}
                Ok(Some(status)) if is_expected(&status) => {}
                Ok(Some(status)) => trouble.add(unexpected_end(&status)),
                Err(error) => trouble.add(unexpected_end(&error)),
            }
        })?;
        let process = started.recv().context("starting a process")??;
        let control = Arc::new(control);
        let server =
            Self { control: control.clone(), process, ending, waiter: Some(waiter), lower: lower.clone() };
        Ok((server, control))
    }

    /// After this call, the end of the server is not reported as an error, unless SIGKILL ended it.
    fn expect_end(&self) {
        self.ending.store(true, Ordering::SeqCst);
    }

    /// Waits until the server has ended, for at most `patience`. Returns whether it has ended.
    fn wait_for_end(&self, patience: Duration) -> bool {
        let patience =
            Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
        poll(&mut [PollFd::new(&self.process, PollFlags::IN)], Some(&patience)).is_ok_and(|ready| ready > 0)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.expect_end();
        _ = rustix::process::pidfd_send_signal(&self.process, END_SIGNAL);
        // This ends the threads that handle the server's requests.
        _ = rustix::net::shutdown(&*self.control, Shutdown::Both);
        self.lower.stop_prefetching();
        if let Some(waiter) = self.waiter.take() {
            _ = waiter.join();
        }
    }
}

/// Waits for the server to end. If oven was asked to stop, oven's main thread may be waiting for a block that never
/// arrives. To release that thread, this function kills the server `GRACE` after the stop was requested, and returns
/// `None`.
fn wait_or_kill(child: &mut Child, ending: &AtomicBool) -> io::Result<Option<ExitStatus>> {
    let process = rustix::process::pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let interval = Timespec { tv_sec: 0, tv_nsec: STOP_POLL.as_nanos() as i64 };
    let mut stop_seen_at = None;
    loop {
        // If a signal interrupts this call, the loop polls again.
        _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&interval));
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if signals::is_stop_requested() && stop_seen_at.get_or_insert_with(Instant::now).elapsed() > GRACE {
            ending.store(true, Ordering::SeqCst);
            // The server may be suspended by SIGSTOP. A suspended process handles only SIGKILL.
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
    }
}

fn unexpected_end(how: &dyn std::fmt::Display) -> anyhow::Error {
    Kind::Machine
        .failure(format!("the process that serves the disk ended unexpectedly ({how})"))
        .hint("Bake again. If the machine ran out of memory, the kernel's log (dmesg) shows it.")
        .into()
}

fn open_fuse() -> Result<OwnedFd> {
    let opened = loop_device::open_node("fuse", FileType::CharacterDevice, FUSE);
    opened.map_err(|error| {
        let hint = match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => {
                "Load the kernel's module (`modprobe fuse`), or bake with disks = \"attached\"."
            }
            _ if !rustix::process::geteuid().is_root() => "Run oven as root.",
            _ => "In a container, allow /dev/fuse, for example by `docker run --device /dev/fuse`.",
        };
        Kind::Machine.failure(format!("cannot open /dev/fuse: {error}")).hint(hint).into()
    })
}

/// Checks that this machine can serve disks, by creating a FUSE mount.
pub fn check_available() -> Result<()> {
    mount(&open_fuse()?).map(drop)
}

/// Creates a detached mount. It ends when its last descriptor is closed.
fn mount(fuse: &OwnedFd) -> Result<OwnedFd> {
    let fd = fuse.as_raw_fd().to_string();
    let options =
        [("source", "oven"), ("fd", &*fd), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")];
    api::new_file_system("fuse", &options, api::PLAIN).map_err(|error| {
        let why = error.root_cause();
        let failure = Kind::Machine.failure(format!("the kernel refused a FUSE mount: {why}"));
        failure.hint("oven needs root with all its capabilities, and Linux 5.12 or later.").into()
    })
}

fn send_files(
    to: &OwnedFd,
    name: &str,
    files: &[std::os::fd::BorrowedFd<'_>; FILE_COUNT],
) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILE_COUNT))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    rights.push(SendAncillaryMessage::ScmRights(files));
    rustix::net::sendmsg(to, &[IoSlice::new(name.as_bytes())], &mut rights, SendFlags::NOSIGNAL).map(drop)
}

fn receive_files(from: &OwnedFd) -> Result<(String, [OwnedFd; FILE_COUNT])> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILE_COUNT))];
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
    let files = files.try_into().map_err(|_| anyhow::anyhow!("oven sent an unexpected number of files"))?;
    Ok((name, files))
}

/// The main function of `oven __disk`. `main` calls it first, while the process has only one thread.
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
    rustix::net::sockopt::socket_type(stdin)
        .with_context(|| format!("{SERVER_VERB} is only for oven itself"))?;
    let control = rustix::io::fcntl_dupfd_cloexec(stdin, 3)?;
    let null = rustix::fs::openat(CWD, "/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    // The server leaves the terminal's session, so that Ctrl-C reaches only oven. The server must run until the disk is
    // unmounted.
    rustix::process::setsid().context("starting a session")?;
    leave_mounts().context("unsharing the mounts")?;
    set_io_flusher();
    // No capability is needed from here on. The process receives the files that it still needs through the socket.
    capabilities::reduce_to(capabilities::NONE)?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable).context("disabling core dumps")?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .context("disabling core dumps")?;
    // If oven died before this call, the kernel does not kill this process. In that case, oven's end of the socket is
    // closed, so `receive_files` fails, and this process ends.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("setting the parent-death signal")?;
    let (name, [fuse, upper, marks, data]) = receive_files(&control).context("receiving the disk's files")?;
    let base = Arc::new(RequestedBlocks::new(control, data.into()));
    let overlay = Overlay::new(base.clone(), upper.into(), BlockMap::open(marks.into())?);
    let server = std::thread::Builder::new().name("fuse".to_owned());
    server.spawn(move || {
        // The process ends when the mount ends.
        let code = fuse_fs::serve_mount(Arc::new(overlay), &name, fuse).map_or(Kind::Machine as i32, |()| 0);
        std::process::exit(code)
    })?;
    base.listen();
    Ok(())
}

/// Gives this thread a separate descriptor table and a separate mount namespace, without oven's files and mounts. If
/// oven is killed, the last thread that shares oven's table and namespace closes the files and unmounts the mounts.
/// That thread may have to wait for the disk, that is, for the server. It must not be this thread, because the server
/// ends only when this thread ends. Otherwise this thread and the server would wait for each other for ever.
#[allow(unsafe_code)]
fn detach_thread() -> Result<()> {
    // SAFETY: after this call, this thread has its own copies of all descriptors, and no value owns such a copy. Each
    // value that exists before this call owns a descriptor in the table of the other threads. Between this call and
    // `close_from`, `leave_mounts` opens descriptors, but it closes all of them before it returns. This thread opens
    // other descriptors only after the copies are closed.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FILES) }.context("unsharing the descriptors")?;
    leave_mounts().context("unsharing the mounts")?;
    crate::sys::fds::close_from(3)
}

/// Moves to an empty root in a new mount namespace. If the server stayed in oven's namespace, it could be the last
/// process there after oven is killed. In that case, the end of the server would unmount the disk, and wait for a reply
/// that only the server could send.
fn leave_mounts() -> Result<()> {
    namespaces::unshare(UnshareFlags::NEWNS)?;
    // The mounts become private first, so that unmounting in this namespace does not unmount in others.
    namespaces::make_mounts_private()?;
    let empty = api::new_file_system("tmpfs", &[("size", "4k"), ("mode", "0555")], api::READ_ONLY)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    api::attach(&empty, rustix::fs::openat(CWD, "/proc", flags, Mode::empty())?)?;
    namespaces::pivot_to(&empty)
}

/// Tells the kernel not to wait for this disk when this process needs memory. This needs CAP_SYS_RESOURCE. Without this
/// capability the server works, but may hang when memory is short.
fn set_io_flusher() {
    _ = rustix::process::configure_io_flusher_behavior(true);
}

/// The server's access to the base's blocks. The server requests blocks from oven. oven writes them to the `data` file
/// of the cache, and replies.
struct RequestedBlocks {
    control: OwnedFd,
    data: File,
    /// The state of each requested block: `None` if there is no reply yet, 0 if the block is ready, and an errno
    /// otherwise.
    replies: Mutex<HashMap<u32, Option<i32>>>,
    changed: Condvar,
}

impl RequestedBlocks {
    fn new(control: OwnedFd, data: File) -> Self {
        Self { control, data, replies: Mutex::default(), changed: Condvar::new() }
    }

    /// Receives replies until oven closes the socket.
    fn listen(&self) {
        while let Some((index, errno)) = backing::receive(&self.control) {
            lock_mutex(&self.replies).insert(index, Some(errno));
            self.changed.notify_all();
        }
    }

    fn wait_until_ready(&self, index: u32) -> io::Result<()> {
        let mut replies = lock_mutex(&self.replies);
        loop {
            match replies.get(&index) {
                Some(Some(0)) => return Ok(()),
                Some(Some(errno)) => return Err(io::Error::from_raw_os_error(*errno)),
                Some(None) => {
                    replies = self.changed.wait(replies).unwrap_or_else(std::sync::PoisonError::into_inner);
                }
                None => {
                    replies.insert(index, None);
                    drop(replies);
                    // The lock is released before this call. If the socket is full, the call waits, and meanwhile
                    // `listen` needs the lock to store replies.
                    backing::send(&self.control, (index, 0))?;
                    replies = lock_mutex(&self.replies);
                }
            }
        }
    }
}

impl BaseBlocks for Arc<RequestedBlocks> {
    fn read(&self, index: u32, at: usize, buffer: &mut [u8]) -> io::Result<()> {
        self.wait_until_ready(index)?;
        self.data.read_exact_at(buffer, u64::from(index) * BLOCK as u64 + at as u64)
    }

    fn report_io_error(&self, error: &io::Error) {
        _ = backing::send(&self.control, (WRITE_FAILED, error.raw_os_error().unwrap_or(libc::EIO)));
    }
}
