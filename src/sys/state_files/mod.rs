//! The directories and files in which oven stores its state on this machine: logs, locks, caches, preserved disks, the
//! local region. Other users cannot read or write them, whatever the umask is.
//!
//! A directory or file that another user made is not used, and neither is a symlink. Otherwise this user could read
//! what oven writes, or make oven write to another file.

#[cfg(test)]
mod tests;

use crate::error::Kind;
use anyhow::{Context, Result};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::geteuid;
use std::fs::{self, File, Metadata, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const DIRECTORY_MODE: u32 = 0o700;
const FILE_MODE: u32 = 0o600;
/// The mode bit that lets everybody write. The group's write bit is not checked, because a user's default group often
/// has no other members.
const OTHERS_WRITE: u32 = 0o002;
/// The directory of the files that record which hints were shown.
const HINTS: &str = "hints";
const STICKY: u32 = 0o1000;
/// The number of attempts to open a directory that other processes of oven create and remove.
const RETRIES: u32 = 32;
const NOT_A_DIRECTORY: &str = "is a link or a file, not a directory";
const NOT_A_DIRECTORY_HINT: &str =
    "Remove it. If the directory should be on another disk, mount that disk on it.";
const OWNER_HINT: &str = "Correct its owner and mode (chown, chmod o-w), or remove it.";

/// Creates a private directory, and its missing parents. If the directory exists, checks it, and makes it private if it
/// belongs to this user.
///
/// # Errors
/// [`Kind::Machine`] if the directory is a symlink or a file, if it belongs to another user, or if everybody can write
/// to it or can replace it. An error of the system has no kind.
pub fn create_dir(dir: &Path) -> Result<()> {
    let dir = without_final_slash(dir);
    let context = || format!("creating {}", dir.display());
    let parent = match dir.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    for _ in 0..RETRIES {
        match fs::metadata(parent) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && parent != dir => create_dir(parent)?,
            found => {
                let mode = found.with_context(context)?.permissions().mode();
                if mode & OTHERS_WRITE != 0 && mode & STICKY == 0 {
                    let what = format!("is in {}, which is writable by everybody", parent.display());
                    return Err(unsafe_path(dir, &what, "Correct the mode of that directory (chmod o-w)."));
                }
            }
        }
        match rustix::fs::mkdirat(CWD, dir, Mode::from_raw_mode(DIRECTORY_MODE)) {
            Ok(()) | Err(Errno::EXIST) => {}
            // Another process removed the parent.
            Err(Errno::NOENT) => continue,
            Err(error) => return Err(io::Error::from(error)).with_context(context),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = match rustix::fs::openat(CWD, dir, flags, Mode::empty()) {
            // Another process removed the directory.
            Err(Errno::NOENT) => continue,
            Err(Errno::NOTDIR | Errno::LOOP) => {
                return Err(unsafe_path(dir, NOT_A_DIRECTORY, NOT_A_DIRECTORY_HINT));
            }
            opened => File::from(opened.map_err(io::Error::from).with_context(context)?),
        };
        let found = opened.metadata().with_context(context)?;
        check_directory(dir, &found, OWNER_HINT)?;
        make_private(&opened, &found, DIRECTORY_MODE)
            .with_context(|| format!("restricting the access to {}", dir.display()))?;
        return Ok(());
    }
    Err(Kind::Machine.error(format!("other processes remove {} repeatedly", dir.display())))
}

/// Checks an existing directory as [`create_dir`] does, without changing it.
pub fn examine_dir(dir: &Path) -> Result<()> {
    let dir = without_final_slash(dir);
    let found = fs::symlink_metadata(dir).with_context(|| format!("examining {}", dir.display()))?;
    if !found.is_dir() {
        return Err(unsafe_path(dir, NOT_A_DIRECTORY, NOT_A_DIRECTORY_HINT));
    }
    check_directory(dir, &found, OWNER_HINT)
}

/// Checks that no other user can write to a directory. `hint` says what to do if one can.
pub fn check_directory(dir: &Path, found: &Metadata, hint: &str) -> Result<()> {
    if let Some(owner) = foreign_owner(found) {
        let what = format!("belongs to user {owner}, who is neither you nor root");
        return Err(unsafe_path(dir, &what, hint));
    }
    if found.permissions().mode() & OTHERS_WRITE != 0 {
        return Err(unsafe_path(dir, "is writable by everybody", hint));
    }
    Ok(())
}

/// Opens a private file. `flags` may contain `CREATE` and `EXCL`. If the file exists, checks it, and makes it private if
/// it belongs to this user. Fails if it is a symlink, is not a regular file, or belongs to another user.
pub fn open_file(path: &Path, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = match rustix::fs::openat(CWD, path, flags, Mode::from_raw_mode(FILE_MODE)) {
        Err(Errno::LOOP) => return Err(io::Error::other("it is a link")),
        file => File::from(file?),
    };
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::other("it is not a regular file"));
    }
    if let Some(owner) = foreign_owner(&found) {
        return Err(io::Error::other(format!("it belongs to user {owner}, who is neither you nor root")));
    }
    make_private(&file, &found, FILE_MODE)?;
    Ok(file)
}

/// Removes the files of a directory with this extension, except the newest `keep`. Errors are ignored.
pub fn remove_oldest(dir: &Path, extension: &str, keep: usize) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    let mut files: Vec<(SystemTime, PathBuf)> = entries
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|found| found == extension))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    files.sort();
    let excess = files.len().saturating_sub(keep);
    for (_, path) in files.into_iter().take(excess) {
        _ = fs::remove_file(path);
    }
}

/// Returns whether this function is called for the first time with this name. A private file in `state`, which is the
/// state directory of this machine, records it. If the file cannot be created, returns false.
pub fn is_first_time(state: &Path, name: &str) -> bool {
    let dir = state.join(HINTS);
    let create = || -> Result<File> {
        create_dir(&dir)?;
        Ok(open_file(&dir.join(name), OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?)
    };
    create().is_ok()
}

/// Returns the owner of a directory or file if the owner is another user: neither this user nor root. The user who
/// called sudo is not another user, because that user can become root anyway.
pub fn foreign_owner(found: &Metadata) -> Option<u32> {
    let sudo = std::env::var("SUDO_UID").ok().and_then(|uid| uid.parse().ok());
    let own = [Some(0), Some(geteuid().as_raw()), sudo];
    (!own.contains(&Some(found.uid()))).then_some(found.uid())
}

/// Returns the same path without `/` or `/.` at its end. With them, the system follows a symlink at the path, even if
/// it was asked not to.
fn without_final_slash(dir: &Path) -> &Path {
    dir.components().as_path()
}

/// Sets the mode, unless the directory or file already has it or belongs to somebody else.
fn make_private(opened: &File, found: &Metadata, mode: u32) -> io::Result<()> {
    if found.permissions().mode() & 0o777 == mode || found.uid() != geteuid().as_raw() {
        return Ok(());
    }
    opened.set_permissions(Permissions::from_mode(mode))
}

fn unsafe_path(path: &Path, why: &str, hint: &str) -> anyhow::Error {
    Kind::Machine.failure(format!("{} {why}", path.display())).hint(hint).into()
}
