//! `oven checksum`.

use super::{End, answer};
use crate::cli::args;
use crate::cli::args::GlobalArgs;
use crate::definition::Definition;
use crate::identity::checksum::config_checksum;
use crate::report::Report;
use anyhow::Result;
use serde_json::json;

pub fn run(global: &GlobalArgs, args: &args::ChecksumArgs, report: &Report) -> Result<End> {
    let directories = match args.directories.as_slice() {
        // If there is only one directory and it is a definition, the checksum also covers the definition's inputs.
        // Otherwise it covers only the given directories, as in GumGum's tool.
        [dir] if dir.join("image.toml").exists() => Definition::load(dir)?.directories(),
        directories => directories.to_vec(),
    };
    let checksum = config_checksum(&directories)?;
    for warning in &checksum.warnings {
        report.warn(warning);
    }
    if !global.json {
        if global.verbose {
            for (path, sha1) in &checksum.files {
                answer(format!("{sha1}  {}", path.to_string_lossy()));
            }
        }
        answer(&checksum.hex);
    }
    let files =
        checksum.files.iter().map(|(path, sha1)| json!({"path": path.to_string_lossy(), "sha1": sha1}));
    Ok(End::success(json!({"ami_config_checksum": checksum.hex, "files": files.collect::<Vec<_>>()})))
}
