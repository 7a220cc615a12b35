//! `oven import`.

use super::{End, answer};
use crate::bake::batch::INTERRUPTED_CLEANLY;
use crate::bake::import::{self, Import, ImportOutcome, ImportRequest};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::cloud::ec2_rules::MAX_VOLUME_GIB;
use crate::error::Kind;
use crate::ids::{Architecture, RunId};
use crate::report::Report;
use crate::site::{Site, Use};
use crate::sys::sparse_copy::{self, STANDARD_INPUT};
use crate::sys::temp_file::TempFile;
use crate::sys::{signals, tasks};
use anyhow::{Context, Result};
use serde_json::json;
use std::fs::File;
use std::io::{IsTerminal, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use tokio::sync::watch;

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
    let source = source(&args.raw, report, &stop).await?;
    // The disk is checked first, so that no region is made for a file that is not a disk.
    import::open_disk(&source.path)?;
    let site = Site::of(&global.overrides(), &[], report.clone(), Use::Imports).await?;
    let args::ImportArgs { name, boot_mode, verify, .. } = args;
    let (raw, name, boot_mode) = (source.path.clone(), name.clone(), boot_mode.clone());
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

/// The disk to import, and the copy of standard input, which exists as long as this value does.
struct ImportSource {
    path: PathBuf,
    _copy: Option<TempFile>,
}

/// Returns the disk that the argument names. The argument `-` means standard input. If that is a file, it is used
/// directly. A stream is copied first, because a disk is not read in order.
async fn source(raw: &Path, report: &Report, stop: &watch::Receiver<bool>) -> Result<ImportSource> {
    if raw != Path::new("-") {
        return Ok(ImportSource { path: raw.to_owned(), _copy: None });
    }
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        let failure = Kind::Usage.failure("standard input is a terminal, and not a disk");
        return Err(failure.hint("Redirect a file or a pipe: oven import - --name NAME < FILE").into());
    }
    let stdin = File::from(stdin.as_fd().try_clone_to_owned().context("duplicating standard input")?);
    let kind = stdin.metadata().context("inspecting standard input")?.file_type();
    let at_start = (&stdin).stream_position().is_ok_and(|position| position == 0);
    if at_start && (kind.is_file() || kind.is_block_device()) {
        return Ok(ImportSource { path: STANDARD_INPUT.into(), _copy: None });
    }
    let dir = std::env::var_os("TMPDIR").filter(|dir| !dir.is_empty());
    let dir = dir.map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    const COPYING: &str = "copying standard input";
    let step = report.step("import", COPYING);
    let copied = tasks::run(move |cancelled| {
        sparse_copy::copy_stream(stdin.as_fd(), MAX_VOLUME_GIB << 30, &dir, cancelled)
    });
    let copied = async { step.follow(copied).await.context(COPYING) };
    let copy = signals::run_until_stopped(stop, copied).await?;
    step.done();
    let path = format!("/proc/self/fd/{}", copy.file().as_raw_fd()).into();
    Ok(ImportSource { path, _copy: Some(copy) })
}
