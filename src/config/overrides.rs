//! Settings of the command line or of environment variables. They override the settings of a project.

use std::path::PathBuf;

/// These settings override those of a project. A setting that is `None` overrides nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Overrides {
    pub cloud: Option<String>,
    pub region: Option<String>,
    /// Relative to the working directory.
    pub region_dir: Option<PathBuf>,
    pub instance_id: Option<String>,
    pub zone: Option<String>,
    pub disks: Option<String>,
    /// Executables of plugins, in addition to the installed ones.
    pub plugins: Vec<PathBuf>,
}
