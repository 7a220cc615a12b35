//! `oven checksum`.

use super::{End, answer};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::definition::{self, Definition};
use crate::identity::checksum::config_checksum_within;
use crate::report::Report;
use crate::text::escape_name;
use anyhow::Result;
use serde_json::json;
use std::path::Path;

pub fn run(global: &GlobalArgs, args: &args::ChecksumArgs, report: &Report) -> Result<End> {
    let mut project = None;
    let directories = match args.directories.as_slice() {
        // If there is only one directory and it is a definition, the checksum also covers the definition's inputs.
        // Otherwise it covers only the given directories, as in GumGum's tool.
        [dir] if dir.join(definition::FILE).symlink_metadata().is_ok() => {
            let image = Definition::load(dir)?;
            project = Some(image.project.clone());
            image.directories()
        }
        directories => directories.to_vec(),
    };
    // The directory may be a stranger's. So links are limited to the project, although GumGum's tool follows all links.
    let project = |dir: &Path| project.clone().or_else(|| definition::project_of(dir));
    let checksum = config_checksum_within(&directories, &project)?;
    for warning in &checksum.warnings {
        report.warn(warning);
    }
    if !global.json {
        if global.verbose {
            for (path, sha1) in &checksum.files {
                answer(format!("{sha1}  {}", escape_name(path)));
            }
        }
        answer(&checksum.hex);
    }
    let files =
        checksum.files.iter().map(|(path, sha1)| json!({"path": path.to_string_lossy(), "sha1": sha1}));
    Ok(End::success(json!({"ami_config_checksum": checksum.hex, "files": files.collect::<Vec<_>>()})))
}
