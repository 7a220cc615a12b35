//! `oven import`.

use super::{End, answer};
use crate::bake::batch::INTERRUPTED_CLEANLY;
use crate::bake::import::{self, Import, ImportOutcome, ImportRequest};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::local::Region;
use crate::error::Kind;
use crate::formats::partition;
use crate::formats::partition::{ReadAt, TableScheme};
use crate::formats::superblock;
use crate::ids::{Architecture, RunId};
use crate::report::Report;
use crate::site::{Site, Use};
use crate::sys::sparse_copy;
use anyhow::Result;
use serde_json::json;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tokio::sync::watch;

/// The size of a sector in bytes. Partition tables give offsets and sizes in sectors.
const SECTOR: u64 = 512;

pub async fn run(
    global: &GlobalArgs,
    args: &args::ImportArgs,
    report: &Report,
    mut stop: watch::Receiver<bool>,
) -> Result<End> {
    let architecture = match args.arch.as_deref() {
        None => Architecture::HOST,
        Some("x86_64" | "amd64") => Architecture::X86_64,
        Some("arm64" | "aarch64") => Architecture::Arm64,
        Some(other) => {
            let message = format!("--arch must be x86_64 or arm64, not {other}");
            return Err(Kind::Usage.error(message));
        }
    };
    // The disk is checked first, so that no region is made for a file that is not a disk.
    ensure_disk(&args.raw)?;
    let site = Site::of(&global.overrides(), &[], report.clone(), Use::Imports).await?;
    let args::ImportArgs { raw, name, boot_mode, verify, .. } = args;
    let (raw, name, boot_mode) = (raw.clone(), name.clone(), boot_mode.clone());
    let wanted = ImportRequest { raw, name, architecture, boot_mode, verify: *verify };
    let import = Import { site: &site, wanted: &wanted, run: &RunId::new() };
    let ended = import::import(&import, async move { _ = stop.wait_for(|stop| *stop).await }).await;
    let left = super::warn_of_leftovers(&site, &ended.leftovers);
    let ImportOutcome { image, new } = match ended.result {
        Ok(imported) => imported,
        // The error was already reported.
        Err(error) => {
            if Kind::of(&error) == Kind::Interrupted && !left {
                report.note(INTERRUPTED_CLEANLY);
            }
            return Ok(End::failure(&error));
        }
    };
    if !new {
        report.note(format!("{} was already imported from this disk", image.id));
    }
    if !global.json {
        answer(&image.id);
    }
    let result = json!({"ami_id": image.id, "ami_name": image.name, "snapshot_id": image.snapshot});
    Ok(if left { End { code: Kind::LeftBehind as u8, result } } else { End::success(result) })
}

struct Raw {
    file: File,
    size: u64,
}

impl ReadAt for Raw {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// Rejects a file that is not a disk. This check comes before the file is copied.
fn ensure_disk(path: &Path) -> Result<()> {
    let file = Region::open_raw(path)?;
    let size = sparse_copy::length(&file)?;
    let raw = Raw { file, size };
    // A partition table that cannot be used is accepted here. A bake rejects it later and says why.
    let no_table = partition::read(&raw, SECTOR).is_ok_and(|table| table.scheme == TableScheme::None);
    if no_table && superblock::probe(&raw, 0, size).is_none() {
        let message =
            format!("{} is not a disk: it has neither a partition table nor a file system", path.display());
        return Err(Kind::Usage.failure(message).hint("Import the raw image of a whole disk.").into());
    }
    Ok(())
}
