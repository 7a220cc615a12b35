//! The request of an import.

use crate::cloud::ec2_rules::check_image_name;
use crate::definition::UEFI;
use crate::error::Kind;
use crate::ids::Architecture;
use anyhow::Result;
use std::path::PathBuf;

/// The arguments of an import.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    pub raw: PathBuf,
    pub name: String,
    pub architecture: Architecture,
    /// `None` means the cloud's default. A local region has no boot modes.
    pub boot_mode: Option<String>,
    /// Whether to read the snapshot back and compare it with the raw disk.
    pub verify: bool,
}

impl ImportRequest {
    /// The description of the snapshot and the image.
    pub fn description(&self) -> String {
        format!("oven import of {}", self.name)
    }
}

/// Fails if the name or the boot mode is not allowed.
pub fn check(wanted: &ImportRequest) -> Result<()> {
    check_image_name(&wanted.name).map_err(|error| Kind::Usage.error(format!("--name: {error:#}")))?;
    match &wanted.boot_mode {
        Some(mode) if wanted.architecture == Architecture::Arm64 && mode != UEFI => {
            let text = format!("--boot-mode: an arm64 image can boot only with {UEFI}, not with {mode}");
            Err(Kind::Usage.error(text))
        }
        _ => Ok(()),
    }
}
