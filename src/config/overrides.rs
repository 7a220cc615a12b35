//! What the command line or the environment says instead of a project's settings.

use std::path::PathBuf;

/// What the command line or the environment says instead. An empty text says nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    pub cloud: Option<String>,
    pub region: Option<String>,
    /// Relative to the working directory.
    pub region_dir: Option<PathBuf>,
    pub instance_id: Option<String>,
    pub zone: Option<String>,
    pub disks: Option<String>,
    /// Executables that are plugins, beside those that are installed.
    pub plugins: Vec<PathBuf>,
}
