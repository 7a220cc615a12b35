//! The errors of a region that cannot be opened.

use crate::error::Kind;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

/// The error for a directory without a region.
pub fn no_region(dir: &Path) -> anyhow::Error {
    let why = match fs::read_dir(dir) {
        Ok(_) => "the directory is not a region",
        Err(error) if error.kind() == ErrorKind::NotFound => "the directory does not exist",
        Err(error) => return error.into(),
    };
    Kind::NotFound
        .failure(format!("there is no region in {}: {why}", dir.display()))
        .hint(
            "`oven import RAW --name NAME` makes a region and its first base image. If you meant another region, \
             correct --region-dir, OVEN_REGION_DIR or `region_dir` of oven.toml.",
        )
        .into()
}

/// Adds the kind and a hint to an error of the system.
pub fn explain(error: anyhow::Error, dir: &Path) -> anyhow::Error {
    use ErrorKind::{AlreadyExists, NotADirectory, PermissionDenied, ReadOnlyFilesystem, StorageFull};
    match error.downcast_ref::<std::io::Error>().map(std::io::Error::kind) {
        Some(
            kind @ (PermissionDenied | ReadOnlyFilesystem | NotADirectory | AlreadyExists | StorageFull),
        ) => Kind::Machine.failure(format!("{error:#}")).hint(region_hint(dir, kind)).into(),
        _ => error,
    }
}

/// Returns what the user can do about a region that cannot be opened.
fn region_hint(dir: &Path, kind: ErrorKind) -> String {
    let is_file = |path: &&Path| fs::metadata(path).is_ok_and(|found| !found.is_dir());
    match dir.ancestors().find(is_file) {
        Some(file) => format!("{} is a file, not a directory; pass another --region-dir.", file.display()),
        None if kind == ErrorKind::StorageFull => {
            "Free some space on that disk, or pass another --region-dir.".to_owned()
        }
        None => "Run oven as root, or pass a --region-dir that you can write to.".to_owned(),
    }
}
