//! Places a plan's files in the image permanently.

use super::context::MountedImage;
use super::context::ProvisionContext;
use super::definition_files::FILES_PHASE;
use crate::definition::validate;
use crate::error::Kind;
use crate::image::tree::ImageTree;
use crate::sandbox::paths::keep_directory_times;
use crate::text::{count, escape_name};
use anyhow::{Context, Result};
use oven_distro::{FILE_PLACES, Shim};
use rustix::fs::{FileType, OFlags};
use std::path::Path;

/// The maximum size of a file in bytes. Keys and lists of repositories are far smaller than this limit.
const MAX_BYTES: usize = 4 << 20;

/// The title of the step that places this number of files.
pub fn title(files: usize) -> String {
    format!("placing {} of the plan", count(files, "file"))
}

/// Places every file of the plan, owned by root. If the image has a different file at the same path, replaces that file
/// and prints a warning.
///
/// # Errors
/// [`Kind::Machine`] if the plugin puts a file where it may not. [`Kind::Definition`] if the image has a directory at the
/// path of a file.
pub fn place_plan_files(place: &MountedImage<'_>, work: &ProvisionContext<'_>) -> Result<()> {
    let files = &work.plan.files;
    if files.is_empty() {
        return Ok(());
    }
    let step = work.report.step(FILES_PHASE, title(files.len()));
    for file in files {
        check(file, place.unmounted).map_err(|what| {
            let what = format!("the plan puts a file at {:?}, which {what}", file.path);
            Kind::Machine.failure(what).hint("This is a bug in the distribution's plugin.")
        })?;
        write_file(place.inside, file, work)
            .with_context(|| format!("placing {} of the plan", escape_name(&file.path)))?;
    }
    step.done();
    Ok(())
}

fn write_file(inside: &ImageTree, file: &Shim, work: &ProvisionContext<'_>) -> Result<()> {
    let found = inside.metadata(&file.path)?.map(|stat| FileType::from_raw_mode(stat.st_mode));
    match found {
        Some(FileType::Directory) => {
            return Err(
                Kind::Definition.error(format!("the image's {} is a directory", escape_name(&file.path)))
            );
        }
        Some(FileType::RegularFile)
            if inside.read(&file.path)?.as_deref() != Some(file.content.as_bytes()) =>
        {
            work.report.warn(format!("{} of the base image is replaced", escape_name(&file.path)));
        }
        Some(FileType::RegularFile) | None => {}
        Some(_) => work.report.warn(format!(
            "{} of the base image is replaced, because it was not a regular file",
            escape_name(&file.path)
        )),
    }
    work.report.detail(format!("{} ({:04o})", escape_name(&file.path), file.mode));
    let write = || inside.write(&file.path, file.content.as_bytes(), file.mode, 0, 0);
    // The directory's times are preserved. With a newer time, package managers would treat data that an earlier bake
    // cached as outdated, even if the file's content has not changed.
    let parent = Path::new(&file.path).parent().and_then(Path::to_str).unwrap_or_default();
    match inside.open(parent, OFlags::PATH | OFlags::DIRECTORY) {
        Ok(dir) => keep_directory_times(&dir, write),
        Err(_) => write(), // the write creates the directory
    }
}

/// Checks a file of the plan. The error completes the sentence "the plan puts a file at …, which …".
fn check(file: &Shim, unmounted: &[impl AsRef<Path>]) -> Result<(), String> {
    let normalized = validate::target(&file.path)?;
    if normalized != file.path || !FILE_PLACES.iter().any(|dir| Path::new(&normalized).starts_with(dir)) {
        return Err(format!("is not in one of the allowed directories: {}", FILE_PLACES.join(", ")));
    }
    if FILE_PLACES.contains(&normalized.as_str()) {
        return Err("is a directory".into());
    }
    if let Some(dir) = unmounted.iter().find(|dir| Path::new(&normalized).starts_with(dir)) {
        return Err(format!(
            "is below {}, whose file system this kernel cannot mount",
            dir.as_ref().display()
        ));
    }
    if file.mode & !0o755 != 0 {
        return Err(format!("has the mode {:04o}, but at most 0755 is allowed", file.mode));
    }
    if file.content.len() > MAX_BYTES {
        return Err(format!("is larger than {} MiB", MAX_BYTES >> 20));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_configuration_and_keys_are_placed() {
        let at = |path: &str, mode| {
            let file = Shim { path: path.into(), content: "x\n".into(), mode };
            check(&file, &[Path::new("/etc/esp")])
        };
        for path in ["/etc/apt/keyrings/x.asc", "/usr/share/keyrings/x.gpg", "/usr/lib/systemd/a.preset"] {
            assert_eq!(at(path, 0o644), Ok(()), "{path}");
        }
        for path in [
            "/root/.ssh/authorized_keys",
            "/run/x",
            "/usr/bin/x",
            "/usr/library/x",
            "/etc",
            "/etc/",
            "etc/x",
            "/etc/../x",
            "/etc//x",
            "/etc/./x",
            "/boot/x",
            "/etc/esp/x",
            "",
            "/",
            "/etc/a\nb",
        ] {
            assert!(at(path, 0o644).is_err(), "{path}");
        }
        for mode in [0o4755, 0o1755, 0o666, 0o775] {
            assert!(at("/etc/x", mode).unwrap_err().contains("mode"), "{mode:o}");
        }
        let large = Shim { path: "/etc/x".into(), content: "x".repeat(MAX_BYTES + 1), mode: 0o644 };
        assert!(check(&large, &[] as &[&Path]).is_err());
    }
}
