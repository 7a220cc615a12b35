//! `oven export`.

use super::End;
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::ec2_rules::is_id;
use crate::error::{Kind, errno_of};
use crate::ids::{ImageId, SnapshotId};
use crate::report::Report;
use crate::site::{Site, Use};
use crate::sys::signals;
use crate::sys::temp_file::TempFile;
use crate::transfer::download::{download_in_order, download_with_progress};
use anyhow::{Context, Result};
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde_json::json;
use std::fs::{self, File, Permissions};
use std::io::{ErrorKind, IsTerminal, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tokio::sync::watch;

pub async fn run(
    global: &GlobalArgs,
    args: &args::ExportArgs,
    report: &Report,
    stop: watch::Receiver<bool>,
) -> Result<End> {
    if args.file == Path::new("-") {
        let stdout = stdout(global)?;
        return signals::run_until_stopped(&stop, async {
            let site = Site::of(&global.overrides(), &[], report.clone(), Use::Looks).await?;
            let snapshot = snapshot(&site, &args.what).await?;
            export_to_stdout(&site, &snapshot, stdout).await
        })
        .await;
    }
    let dir = ensure_free(&args.file, args.force)?;
    // If the export is stopped, no file remains, because the file has no name before it is complete.
    signals::run_until_stopped(&stop, async {
        let site = Site::of(&global.overrides(), &[], report.clone(), Use::Looks).await?;
        let snapshot = snapshot(&site, &args.what).await?;
        export(&site, &snapshot, &dir, args).await
    })
    .await
}

/// Returns standard output. Fails if the disk cannot be written to it.
fn stdout(global: &GlobalArgs) -> Result<File> {
    let stdout = std::io::stdout();
    if global.json {
        let failure = Kind::Usage
            .failure("--json needs standard output for its events, so no disk can be written to it");
        return Err(failure.hint("Name a file instead of `-`.").into());
    }
    if stdout.is_terminal() {
        let failure = Kind::Usage.failure("standard output is a terminal, so no disk is written to it");
        return Err(failure.hint("Redirect it: oven export AMI - > FILE").into());
    }
    Ok(File::from(stdout.as_fd().try_clone_to_owned().context("duplicating standard output")?))
}

/// Writes a snapshot to standard output. If that is a new file, the file becomes sparse. In a stream, a device or an
/// existing file, all zeros are written.
async fn export_to_stdout(site: &Site, snapshot: &SnapshotId, mut stdout: File) -> Result<End> {
    let context = || format!("exporting {snapshot} to standard output");
    let step = site.report.step("export", context());
    let on_progress = |done, all| step.progress(done, Some(all));
    let metadata = stdout.metadata().with_context(context)?;
    let appends = rustix::fs::fcntl_getfl(&stdout).with_context(context)?.contains(OFlags::APPEND);
    let is_new = metadata.is_file() && metadata.len() == 0 && !appends;
    let contents = if is_new {
        let incomplete = IncompleteFile(&stdout);
        let written = download_with_progress(&*site.blocks, snapshot, &stdout, &on_progress).await;
        let contents = written.map_err(|error| explain_full(error, FULL_STDOUT)).with_context(context)?;
        incomplete.complete();
        // Programs that write to the same file later begin after the disk.
        stdout.seek(SeekFrom::End(0)).with_context(context)?;
        contents
    } else {
        let written = download_in_order(&*site.blocks, snapshot, &stdout, &on_progress).await;
        written.map_err(|error| explain_full(error, FULL_STDOUT)).with_context(context)?
    };
    step.done();
    Ok(End::success(json!({
        "snapshot_id": snapshot, "file": "-", "size_gib": contents.size_gib, "blocks": contents.blocks.len(),
        "bytes_on_disk": stdout.metadata().map_or(0, |metadata| metadata.blocks() * 512),
    })))
}

/// A new file that has its full length before all of its data. It is emptied if it is not completed, because nobody could
/// see that data are missing.
struct IncompleteFile<'a>(&'a File);

impl IncompleteFile<'_> {
    fn complete(self) {
        std::mem::forget(self);
    }
}

impl Drop for IncompleteFile<'_> {
    fn drop(&mut self) {
        _ = self.0.set_len(0);
    }
}

/// The hint if standard output cannot take more data.
const FULL_STDOUT: &str = "Free some space on the disk to which standard output is redirected, or redirect it to \
                           another disk: oven export AMI - > FILE";

/// Adds a hint to the error of a write if there is no space for the data.
fn explain_full(error: anyhow::Error, hint: &str) -> anyhow::Error {
    match errno_of(&error) {
        Some(Errno::NOSPC | Errno::DQUOT | Errno::FBIG) => {
            Kind::Machine.failure(format!("{error:#}")).hint(hint).into()
        }
        _ => error,
    }
}

/// Checks whether the file can be written, before anything is read. Returns the directory of the file.
fn ensure_free(file: &Path, force: bool) -> Result<PathBuf> {
    let name = file.display();
    let dir = match file.parent() {
        Some(dir) if dir != Path::new("") => dir,
        _ => Path::new("."),
    };
    if !dir.is_dir() {
        return Err(Kind::Usage.error(format!("{} is not a directory", dir.display())));
    }
    match fs::symlink_metadata(file) {
        Err(error) if error.kind() == ErrorKind::NotFound && file.file_name().is_some() => {}
        Err(error) => return Err(error).with_context(|| format!("examining {name}")),
        Ok(metadata) if !metadata.is_file() => {
            return Err(Kind::Usage.error(format!("{name} exists, but is not a regular file")));
        }
        Ok(_) if !force => return Err(taken(file)),
        Ok(_) => {}
    }
    Ok(dir.to_owned())
}

fn taken(file: &Path) -> anyhow::Error {
    let text = format!("{} already exists", file.display());
    Kind::Usage.failure(text).hint("Use --force to replace it.").into()
}

async fn snapshot(site: &Site, what: &str) -> Result<SnapshotId> {
    if is_id("snap", what) {
        return Ok(SnapshotId(what.to_owned()));
    }
    if !is_id("ami", what) {
        let text = format!("{what} is not a valid id of an image (ami-…) or a snapshot (snap-…)");
        return Err(Kind::Usage.failure(text).hint("`oven images list` prints the ids of images.").into());
    }
    Ok(site.cloud.image(&ImageId(what.to_owned())).await?.0.snapshot)
}

async fn export(site: &Site, snapshot: &SnapshotId, dir: &Path, args: &args::ExportArgs) -> Result<End> {
    let name = args.file.display();
    let context = || format!("exporting {snapshot} to {name}");
    let step = site.report.step("export", context());
    let temp = TempFile::new(dir)?;
    let on_progress = |done, all| step.progress(done, Some(all));
    let contents = download_with_progress(&*site.blocks, snapshot, temp.file(), &on_progress)
        .await
        .map_err(|error| explain_full(error, "Free some space on that disk, or choose another directory."))
        .with_context(context)?;
    // The data may not be on the disk yet, because oven does not sync the file. cp, curl and qemu-img do not sync
    // either. Only this user can read the file, whatever the umask is, because a disk contains keys and password
    // hashes.
    temp.file().set_permissions(Permissions::from_mode(0o600)).with_context(context)?;
    let metadata = temp.file().metadata().with_context(context)?;
    if args.force {
        temp.replace(&args.file)?;
    } else {
        temp.link(&args.file).map_err(|error| if args.file.exists() { taken(&args.file) } else { error })?;
    }
    step.done();
    Ok(End::success(json!({
        "snapshot_id": snapshot, "file": args.file.to_string_lossy(), "size_gib": contents.size_gib,
        "blocks": contents.blocks.len(), "bytes_on_disk": metadata.blocks() * 512,
    })))
}
