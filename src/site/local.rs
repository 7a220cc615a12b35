//! Makes a [`Site`] in a local region, which is a directory that behaves like EC2.

use super::{Site, Use};
use crate::cloud::local::{Region, RegionAccess};
use crate::config::project::Settings;
use crate::report::Report;
use anyhow::Result;
use std::path::Path;
use std::rc::Rc;

/// The default directory of the local region, in the system's state directory (file-hierarchy(7)).
const REGION_DIR: &str = "/var/lib/oven/region";

pub fn site(settings: Settings, report: Report, used: Use) -> Result<Site> {
    let state = region_dir(&settings).to_owned();
    let access = match used {
        Use::Imports => RegionAccess::Create,
        Use::Builds => RegionAccess::Change,
        Use::Sweeps | Use::Looks | Use::Checks => RegionAccess::Look,
    };
    let region = Rc::new(Region::open_for(&state, access)?);
    Site::with(region.clone(), region, state, settings, report)
}

/// The directory of the local region.
pub fn region_dir(settings: &Settings) -> &Path {
    settings.region_dir.as_deref().unwrap_or(Path::new(REGION_DIR))
}
