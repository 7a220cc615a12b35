//! Locks on open files (flock(2)), and on values in this process.
//!
//! A lock on a file belongs to the open file. It ends when the last descriptor of the open file is closed, or when the
//! file is unlocked through one of its descriptors. Between fork and exec, a child process has copies of all
//! descriptors. So the file may stay locked for a moment after oven has closed it. Therefore a [`FileLock`] unlocks the
//! file explicitly.

use super::poll::{PollAnswer, PollPolicy, poll_until};
use super::signals;
use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, Flockable, fcntl};
use std::fs::File;
use std::io;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The pause between two attempts of [`FileLock::wait`]. Most locks are held for milliseconds.
const PAUSE: Duration = Duration::from_millis(5);

/// Who else may have the file locked at the same time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Others who also lock it as shared.
    Shared,
    /// Nobody else.
    Exclusive,
}

/// An open file, or a borrowed one, that `nix` can lock.
#[derive(Debug)]
struct Lockable<F>(F);

impl<F: AsFd> AsRawFd for Lockable<F> {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

// SAFETY: the only requirement is that the type is not `Clone`.
#[allow(unsafe_code)]
unsafe impl<F: AsFd> Flockable for Lockable<F> {}

/// A locked file. The file is unlocked when this value is dropped, even if a copy of the descriptor exists.
#[derive(Debug)]
pub struct FileLock<F: AsFd = File>(Option<Flock<Lockable<F>>>);

impl<F: AsFd> FileLock<F> {
    /// Locks an open file, or returns `None` if somebody else has locked it.
    ///
    /// Other errors are returned. For example, a file system may not support locks, and a caller that retries would
    /// never get one.
    pub fn try_acquire(file: F, mode: LockMode) -> io::Result<Option<Self>> {
        match attempt(file, mode) {
            Ok(lock) => Ok(Some(lock)),
            Err((_, Errno::EWOULDBLOCK | Errno::EINTR)) => Ok(None),
            Err((_, errno)) => Err(errno.into()),
        }
    }

    /// Locks an open file. Blocks this thread while somebody else has locked the file. Use this only for locks that are
    /// held only for a short time.
    ///
    /// # Errors
    /// [`crate::error::Kind::Interrupted`] if this process is asked to end meanwhile.
    #[allow(clippy::disallowed_methods, reason = "the lock is held only for a short time")]
    pub fn wait(mut file: F, mode: LockMode) -> Result<Self> {
        loop {
            file = match attempt(file, mode) {
                Ok(lock) => return Ok(lock),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => file,
                Err((_, errno)) => return Err(io::Error::from(errno).into()),
            };
            signals::ensure_not_stopped()?;
            std::thread::sleep(PAUSE);
        }
    }

    /// Locks an open file, and polls while somebody else has locked it. Dropping the future ends the wait. If the
    /// policy's deadline passes, the error names the lock as `what`. `locking` is the context of all other errors.
    pub async fn poll(
        file: F,
        mode: LockMode,
        policy: &PollPolicy,
        what: &str,
        locking: &str,
    ) -> Result<Self> {
        let mut unlocked = Some(file);
        poll_until(what, policy, async || {
            let file = unlocked.take().expect("a failed attempt returns the file");
            match attempt(file, mode) {
                Ok(lock) => Ok(PollAnswer::Ready(lock)),
                Err((file, Errno::EWOULDBLOCK | Errno::EINTR)) => {
                    unlocked = Some(file);
                    Ok(PollAnswer::NotYet("held by another process".to_owned()))
                }
                Err((_, errno)) => Err(io::Error::from(errno)).context(locking.to_owned()),
            }
        })
        .await
    }
}

impl<F: AsFd> Deref for FileLock<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.0.as_ref().expect("only `drop` takes the lock").0
    }
}

impl<F: AsFd> Drop for FileLock<F> {
    fn drop(&mut self) {
        // nix's guard panics if it cannot unlock the file, for example on a network file system. To prevent that, the
        // guard is leaked in this case, and the file stays locked until this process ends.
        if let Some(Err((lock, _))) = self.0.take().map(Flock::unlock) {
            std::mem::forget(lock);
        }
    }
}

/// Makes one attempt to lock an open file. On failure, returns the file with the error.
fn attempt<F: AsFd>(file: F, mode: LockMode) -> Result<FileLock<F>, (F, Errno)> {
    let how = match mode {
        LockMode::Shared => FlockArg::LockSharedNonblock,
        LockMode::Exclusive => FlockArg::LockExclusiveNonblock,
    };
    Flock::lock(Lockable(file), how).map(|lock| FileLock(Some(lock))).map_err(|(file, errno)| (file.0, errno))
}

/// Locks an open file exclusively until its last descriptor is closed. The last descriptor may be in another process or
/// in a loop device. Returns false if somebody else has locked the file.
pub fn try_lock_until_closed(file: impl AsFd) -> io::Result<bool> {
    let lock = FileLock::try_acquire(file.as_fd(), LockMode::Exclusive)?;
    // The descriptor is borrowed, so only the lock is leaked.
    Ok(lock.map(std::mem::forget).is_some())
}

/// Waits until no other open file has locked a byte of this range, and locks the range until the last descriptor of
/// `file` is closed. This lock is independent of the other locks of this module. It is an OFD lock, which belongs to
/// the open file and not to the process. So it also excludes other threads of this process that open the file
/// themselves.
pub fn lock_range_until_closed(file: &File, range: Range<u32>) -> io::Result<()> {
    let lock = libc::flock {
        l_type: libc::F_WRLCK as _,
        l_whence: libc::SEEK_SET as _,
        l_start: i64::from(range.start),
        l_len: i64::from(range.end - range.start),
        l_pid: 0,
    };
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLKW(&lock)) {
            Err(Errno::EINTR) => {}
            locked => return locked.map(drop).map_err(io::Error::from),
        }
    }
}

/// Returns true if this file exists and nobody has locked it.
pub fn is_unlocked(path: &Path) -> bool {
    let lock = File::open(path).and_then(|file| FileLock::try_acquire(file, LockMode::Exclusive));
    lock.is_ok_and(|lock| lock.is_some())
}

/// Locks a mutex, even if a thread panicked while it had the mutex locked.
pub fn lock_mutex<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap()
    }

    #[test]
    fn a_copy_of_the_descriptor_does_not_keep_the_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let lock = FileLock::try_acquire(open(&path), LockMode::Exclusive).unwrap().expect("free");
        let _copy = lock.try_clone().unwrap();
        assert!(FileLock::try_acquire(open(&path), LockMode::Exclusive).unwrap().is_none());
        assert!(!is_unlocked(&path));
        drop(lock);
        assert!(is_unlocked(&path));
        assert!(FileLock::try_acquire(open(&path), LockMode::Exclusive).unwrap().is_some());
        assert!(!is_unlocked(&dir.path().join("none")));
    }

    #[test]
    fn a_copy_of_the_descriptor_keeps_the_lock_of_an_open_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let file = open(&path);
        assert!(try_lock_until_closed(&file).unwrap());
        assert!(!try_lock_until_closed(open(&path)).unwrap(), "another open file");
        let copy = file.try_clone().unwrap();
        drop(file);
        assert!(!is_unlocked(&path));
        drop(copy);
        assert!(is_unlocked(&path));
    }

    #[test]
    fn shared_locks_exclude_only_exclusive_ones() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let attempt = |mode| FileLock::try_acquire(open(&path), mode).unwrap();
        let (first, second) = (attempt(LockMode::Shared), attempt(LockMode::Shared));
        assert!(first.is_some() && second.is_some());
        assert!(attempt(LockMode::Exclusive).is_none());
        drop(first);
        assert!(attempt(LockMode::Exclusive).is_none());
        drop(second);
        let only = attempt(LockMode::Exclusive);
        assert!(only.is_some() && attempt(LockMode::Shared).is_none());
    }

    #[test]
    fn a_thread_waits_for_a_lock() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let lock = FileLock::wait(open(&path), LockMode::Exclusive).unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let theirs = open(&path);
            scope.spawn(move || {
                let lock = FileLock::wait(theirs, LockMode::Exclusive).unwrap();
                send.send(()).unwrap();
                drop(lock);
            });
            receive.recv_timeout(10 * PAUSE).unwrap_err();
            drop(lock);
            receive.recv_timeout(Duration::from_secs(10)).expect("the lock is free");
        });
    }

    #[tokio::test(start_paused = true)]
    async fn polling_ends_with_the_lock_or_at_the_deadline() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let lock = FileLock::try_acquire(open(&path), LockMode::Exclusive).unwrap().expect("free");
        let policy = PollPolicy::local(Duration::from_secs(1));
        let poll = || FileLock::poll(open(&path), LockMode::Exclusive, &policy, "the lock", "locking it");
        let error = poll().await.unwrap_err();
        assert_eq!(
            format!("{error:#}"),
            "waiting for the lock: after 1s it is still held by another process"
        );
        assert_eq!(Kind::of(&error), Kind::Machine);
        let (polled, ()) = tokio::join!(poll(), async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            drop(lock);
        });
        drop(polled.unwrap());
        assert!(is_unlocked(&path));
    }
}
