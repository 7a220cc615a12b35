//! `oven export`.

use super::End;
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::ec2_rules::is_id;
use crate::error::Kind;
use crate::ids::{ImageId, SnapshotId};
use crate::report::Report;
use crate::site::{Site, Use};
use crate::sys::signals;
use crate::sys::temp_file::TempFile;
use anyhow::{Context, Result};
use serde_json::json;
use std::fs::{self, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use tokio::sync::watch;

pub async fn run(
    global: &GlobalArgs,
    args: &args::ExportArgs,
    report: &Report,
    stop: watch::Receiver<bool>,
) -> Result<End> {
    let dir = ensure_free(&args.file, args.force)?;
    // If the export is stopped, no file remains, because the file has no name before it is complete.
    signals::run_until_stopped(&stop, async {
        let site = Site::of(&global.overrides(), &[], report.clone(), Use::Looks).await?;
        let snapshot = snapshot(&site, &args.what).await?;
        export(&site, &snapshot, &dir, args).await
    })
    .await
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
    let contents =
        crate::transfer::download::download_with_progress(&*site.blocks, snapshot, temp.file(), &on_progress)
            .await
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
