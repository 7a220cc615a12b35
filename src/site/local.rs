//! Makes a [`Site`] in a local region, which is a directory that behaves like EC2.

use super::Site;
use crate::cloud::local::Region;
use crate::config::project::Settings;
use crate::report::Report;
use anyhow::Result;
use std::path::Path;
use std::rc::Rc;

/// The default directory of the local region, in the system's state directory (file-hierarchy(7)).
const REGION_DIR: &str = "/var/lib/oven/region";

pub fn site(settings: Settings, report: Report) -> Result<Site> {
    let state = region_dir(&settings).to_owned();
    let region = Rc::new(Region::open(&state)?);
    Site::with(region.clone(), region, state, settings, report)
}

/// The directory of the local region.
pub fn region_dir(settings: &Settings) -> &Path {
    settings.region_dir.as_deref().unwrap_or(Path::new(REGION_DIR))
}
