//! Changes files that are append-only or immutable. The kernel lets nobody change such a file until `chattr` clears the
//! attribute. So oven clears it, makes its change, and sets it again.

use super::ImageTree;
use crate::error::Kind;
use anyhow::{Context, Result};
use rustix::fs::{AtFlags, FileType, IFlags, Mode, OFlags, ioctl_getflags, ioctl_setflags};
use rustix::io::Errno;
use rustix::path::Arg;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

const PROTECTION: IFlags = IFlags::APPEND.union(IFlags::IMMUTABLE);
/// The maximum number of paths that are recorded. Usual images have a few protected files.
const RECORDED_MAX: usize = 100;

/// Protected files and directories that oven changed. They are protected again.
#[derive(Debug, Default)]
pub(crate) struct ProtectedPaths(BTreeMap<String, IFlags>);

/// An open file or directory whose attributes are cleared.
struct Unprotected {
    object: OwnedFd,
    flags: IFlags,
    shown: String,
}

/// The result of a change.
pub(crate) struct ChangeOutcome<T> {
    pub result: rustix::io::Result<T>,
    /// The attributes that the object had before the change: append-only, immutable or none.
    pub protection: IFlags,
}

impl ImageTree {
    /// Calls `change`, which changes the object `name` in `dir`. If the kernel does not permit it because the object or
    /// the directory is append-only or immutable, clears the attributes, calls `change` again, and sets them again.
    /// `shown` is the object's path.
    ///
    /// Errors: `Machine` if this machine does not permit oven to clear the attributes.
    pub(crate) fn change<T>(
        &self,
        dir: impl AsFd,
        name: impl Arg + Copy,
        shown: &dyn Display,
        change: &mut dyn FnMut() -> rustix::io::Result<T>,
    ) -> Result<ChangeOutcome<T>> {
        let (dir, none) = (dir.as_fd(), IFlags::empty());
        match change() {
            Err(Errno::PERM) => {}
            result => return Ok(ChangeOutcome { result, protection: none }),
        }
        let shown = shown.to_string();
        let parent =
            shown.rsplit_once('/').map_or("/", |(parent, _)| if parent.is_empty() { "/" } else { parent });
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(dir, c".", flags, Mode::empty());
        let directory = directory.with_context(|| format!("opening {parent} in the image"))?;
        let object = open_object(dir, name).with_context(|| format!("opening {shown} in the image"))?;
        let directory = Unprotected::clear(directory, parent)?;
        let object = match object.map(|object| Unprotected::clear(object, &shown)).transpose() {
            Ok(object) => object.flatten(),
            Err(error) => {
                directory.map_or(Ok(()), |directory| directory.protect(self))?;
                return Err(error);
            }
        };
        if directory.is_none() && object.is_none() {
            return Ok(ChangeOutcome { result: Err(Errno::PERM), protection: none });
        }
        let protection = object.as_ref().map_or(none, |object| object.flags & PROTECTION);
        let result = change();
        self.protect_all([object, directory])?;
        Ok(ChangeOutcome { result, protection })
    }

    /// Protects objects again, each even if another one fails. Returns the first error.
    fn protect_all(&self, objects: [Option<Unprotected>; 2]) -> Result<()> {
        let results = objects.map(|object| object.map_or(Ok(()), |object| object.protect(self)));
        results.into_iter().collect()
    }

    /// Protects a file that replaced a protected one.
    pub(crate) fn protect(&self, file: impl AsFd, protection: IFlags, shown: &str) -> Result<()> {
        let doing = || format!("setting the attributes of {shown} in the image");
        let flags = ioctl_getflags(&file).with_context(doing)?;
        ioctl_setflags(&file, flags | protection).with_context(doing)?;
        self.record_protected(shown, protection);
        Ok(())
    }

    fn record_protected(&self, shown: &str, protection: IFlags) {
        let mut recorded = self.protected();
        if recorded.0.len() < RECORDED_MAX {
            recorded.0.insert(shown.to_owned(), protection);
        }
    }

    /// Returns the append-only and immutable objects that oven changed and protected again, each with its attributes.
    /// Does not return objects that it removed later, such as a directory after its content.
    pub fn changed_protected_paths(&self) -> Vec<String> {
        let recorded: Vec<_> =
            self.protected().0.iter().map(|(path, protection)| (path.clone(), *protection)).collect();
        // An escaped name cannot be looked up.
        let remains = |path: &str| path.contains('\\') || self.kind_of(path).is_ok_and(|kind| kind.is_some());
        let remaining = recorded.iter().filter(|(path, _)| remains(path));
        remaining.map(|(path, protection)| format!("{path} ({})", name_of(*protection))).collect()
    }
}

impl Unprotected {
    /// Clears the attributes of an open object. Returns `None` if it has none of them.
    fn clear(object: OwnedFd, shown: &str) -> Result<Option<Self>> {
        let flags = match ioctl_getflags(&object) {
            // The file system has no attributes.
            Err(Errno::NOTTY | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => return Ok(None),
            flags => flags.with_context(|| format!("reading the attributes of {shown} in the image"))?,
        };
        if !flags.intersects(PROTECTION) {
            return Ok(None);
        }
        ioctl_setflags(&object, flags - PROTECTION).map_err(|error| {
            let attributes = name_of(flags);
            let what = format!("{shown} in the image is {attributes}, and oven cannot clear the attribute ({error})");
            let hint = "oven needs the capability CAP_LINUX_IMMUTABLE, which some containers do not have. Or clear the \
                        attribute with `chattr` in the base image.";
            Kind::Machine.failure(what).hint(hint)
        })?;
        Ok(Some(Self { object, flags, shown: shown.to_owned() }))
    }

    /// Sets the attributes again, unless the object was removed.
    fn protect(self, tree: &ImageTree) -> Result<()> {
        let doing = || format!("setting the attributes of {} in the image again", self.shown);
        if rustix::fs::fstat(&self.object).with_context(doing)?.st_nlink > 0 {
            ioctl_setflags(&self.object, self.flags).with_context(doing)?;
            tree.record_protected(&self.shown, self.flags);
        }
        Ok(())
    }
}

/// Opens a regular file or a directory. Other objects have no such attributes, and to open them can have side effects.
fn open_object(dir: BorrowedFd<'_>, name: impl Arg + Copy) -> rustix::io::Result<Option<OwnedFd>> {
    let stat = match rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        stat => stat?,
    };
    if !matches!(FileType::from_raw_mode(stat.st_mode), FileType::RegularFile | FileType::Directory) {
        return Ok(None);
    }
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty()).map(Some)
}

/// Returns the names of the attributes that protect a file, as `chattr` documents them.
fn name_of(flags: IFlags) -> &'static str {
    match (flags.contains(IFlags::APPEND), flags.contains(IFlags::IMMUTABLE)) {
        (true, true) => "append-only and immutable",
        (true, false) => "append-only",
        _ => "immutable",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::test::Tree;

    #[test]
    fn an_object_that_cannot_be_protected_leaves_no_other_unprotected() {
        let tree = Tree::new();
        tree.file("etc/x", "x");
        let inside = tree.tree();
        // A pipe has no attributes.
        let (pipe, _) = rustix::pipe::pipe().unwrap();
        let directory = inside.open("/etc", OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
        let before = ioctl_getflags(&directory).unwrap();
        // Everybody may set this attribute of an own directory.
        let flags = before | IFlags::NODUMP;
        let unprotected = |object, shown: &str| Some(Unprotected { object, flags, shown: shown.to_owned() });
        let objects = [unprotected(pipe, "/etc/x"), unprotected(directory, "/etc")];
        let error = inside.protect_all(objects).unwrap_err();
        assert!(format!("{error:#}").contains("/etc/x"), "{error:#}");
        let directory = inside.open("/etc", OFlags::RDONLY | OFlags::DIRECTORY).unwrap();
        assert!(ioctl_getflags(&directory).unwrap().contains(IFlags::NODUMP));
    }
}
