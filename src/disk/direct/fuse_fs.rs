//! Serves a disk as the only file of a FUSE mount.
//!
//! The file is opened with direct I/O. Otherwise the page cache would have the file's content twice: for the file, and
//! for the loop device that uses the file. apt is as fast on a disk in this file as on a disk in a local file: `apt-get
//! install` of three packages took 3.7 s on both.

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, Session, SessionACL, WriteFlags,
};
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

/// The disk to serve. Several threads call its methods concurrently.
pub trait DiskContent: Send + Sync + 'static {
    /// Returns the size in bytes, which does not change.
    fn size(&self) -> u64;
    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()>;
    fn write(&self, at: u64, data: &[u8]) -> io::Result<()>;
    /// Overwrites `length` bytes from the offset `at` with zeros.
    fn zero(&self, at: u64, length: u64) -> io::Result<()>;
    /// Handles an fsync of the file.
    fn sync(&self) -> io::Result<()>;
}

const FILE: INodeNo = INodeNo(2);
/// How long the kernel may cache attributes. The time is very long, because the attributes never change.
const ATTRIBUTE_TTL: Duration = Duration::from_secs(1 << 30);
/// The number of requests that are served concurrently. Several threads are needed, because a request that waits for
/// the network must not delay requests that need only local files.
const THREADS: usize = 16;
/// The largest request in bytes. A loop device sends requests of this size for a large write.
const MAX_REQUEST: u32 = 1 << 20;
/// The number of requests that the kernel sends before it waits for replies. It equals the depth of a loop device's
/// queue.
const MAX_BACKGROUND: u16 = 128;

struct DiskFs {
    content: Arc<dyn DiskContent>,
    name: OsString,
}

impl DiskFs {
    fn attributes(&self, inode: INodeNo) -> FileAttr {
        let root = inode != FILE;
        FileAttr {
            ino: inode,
            size: if root { 0 } else { self.content.size() },
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if root { FileType::Directory } else { FileType::RegularFile },
            perm: if root { 0o700 } else { 0o600 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// Returns whether a range is within the disk.
    fn is_within_disk(&self, at: u64, length: u64) -> bool {
        at.checked_add(length).is_some_and(|end| end <= self.content.size())
    }
}

fn to_fuse_errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_i32)
}

impl Filesystem for DiskFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Allows concurrent reads and writes of the file. This is safe, because the loop device never sends two
        // concurrent requests for the same range.
        _ = config.add_capabilities(InitFlags::FUSE_PARALLEL_DIROPS | InitFlags::FUSE_ASYNC_DIO);
        _ = config.set_max_write(MAX_REQUEST);
        _ = config.set_max_background(MAX_BACKGROUND);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == self.name {
            reply.entry(&ATTRIBUTE_TTL, &self.attributes(FILE), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&ATTRIBUTE_TTL, &self.attributes(inode));
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if inode == FILE {
            // The kernel must not cache the file's content, because it already caches the loop device's content.
            reply.opened(
                FileHandle(0),
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
            );
        } else {
            reply.error(Errno::EISDIR);
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = self.content.size().saturating_sub(at);
        let mut buffer = vec![0; left.min(size.into()) as usize];
        match self.content.read(at, &mut buffer) {
            Ok(()) => reply.data(&buffer),
            Err(error) => reply.error(to_fuse_errno(&error)),
        }
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        if !self.is_within_disk(at, data.len() as u64) {
            return reply.error(Errno::ENOSPC);
        }
        match self.content.write(at, data) {
            Ok(()) => reply.written(data.len() as u32),
            Err(error) => reply.error(to_fuse_errno(&error)),
        }
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        at: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let zeroes = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE;
        let known = zeroes | libc::FALLOC_FL_KEEP_SIZE;
        if mode & !known != 0 || mode & zeroes == 0 || !self.is_within_disk(at, length) {
            return reply.error(Errno::EOPNOTSUPP);
        }
        match self.content.zero(at, length) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(to_fuse_errno(&error)),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.content.sync() {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(to_fuse_errno(&error)),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }
}

/// Serves a disk as the file `name`. Returns when the mount to which `fuse` belongs ends.
pub fn serve_mount(content: Arc<dyn DiskContent>, name: &str, fuse: OwnedFd) -> io::Result<()> {
    let mut config = Config::default();
    config.n_threads = Some(THREADS);
    // The session permits every user, because the loop device's requests come from the kernel. Other users cannot reach
    // the file, because the mount is not attached to any directory.
    let session = Session::from_fd(DiskFs { content, name: name.into() }, fuse, SessionACL::All, config)?;
    session.run()
}
