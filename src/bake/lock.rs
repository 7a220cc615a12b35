//! Locks a fingerprint on this host. A second bake of the same fingerprint waits for the first bake, and then finds the
//! image of the first bake.

use super::Bake;
use super::target::Target;
use crate::error::Kind;
use crate::site;
use crate::sys::lock::{FileLock, LockMode};
use crate::sys::state_files;
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The interval at which the lock is polled. It is too short for users to notice, and long enough that polling needs
/// almost no CPU time.
const POLL: Duration = Duration::from_millis(100);

/// The lock on a fingerprint during its bake. The kernel releases it when the process ends, even if it is killed.
#[derive(Debug)]
pub struct BakeLock {
    path: PathBuf,
    _lock: FileLock,
}

/// Waits until no other bake of this fingerprint is running on this host. The lock is advisory (flock(2)).
pub async fn acquire(bake: &Bake<'_>, target: &Target) -> Result<BakeLock> {
    let path = bake.site.state.join(site::LOCKS).join(target.inputs.fingerprint());
    let mut waiting = None;
    loop {
        let lock = try_acquire(&path).map_err(|error| Kind::Machine.unless_known(error));
        if let Some(lock) = lock.with_context(|| format!("locking {}", path.display()))? {
            return Ok(lock);
        }
        waiting.get_or_insert_with(|| {
            let what = "waiting for another bake of the same definition on this machine";
            bake.site.report.note(what);
            bake.site.report.activity("wait", what)
        });
        tokio::time::sleep(POLL).await;
    }
}

fn try_acquire(path: &Path) -> Result<Option<BakeLock>> {
    state_files::create_dir(path.parent().expect("a lock file is in a directory"))?;
    let file = state_files::open_file(path, OFlags::WRONLY | OFlags::CREATE)?;
    let Some(lock) = FileLock::try_acquire(file, LockMode::Exclusive)? else { return Ok(None) };
    // If the inodes differ, the previous holder has removed the file. A lock on a removed file excludes nobody, so the
    // caller tries again.
    let is_current = std::fs::metadata(path).is_ok_and(|m| m.ino() == lock.metadata().map_or(0, |l| l.ino()));
    Ok(is_current.then(|| BakeLock { path: path.to_owned(), _lock: lock }))
}

impl Drop for BakeLock {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_waits_and_no_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("locks/f");
        let first = try_acquire(&path).unwrap().expect("free");
        assert!(try_acquire(&path).unwrap().is_none());
        drop(first);
        drop(try_acquire(&path).unwrap().expect("free again"));
        assert_eq!(std::fs::read_dir(dir.path().join("locks")).unwrap().count(), 0);
    }
}
