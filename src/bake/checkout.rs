//! Step 2: creates a writable disk with the content of the base image.

use super::Bake;
use super::target::{self, Target};
use crate::cloud::Base;
use crate::disk::{Disk, DiskSpec};
use crate::undo::Undo;
use anyhow::Result;
use std::rc::Rc;

pub const PHASE: &str = "checkout";

/// The title of the step.
pub fn title(base: &Base) -> String {
    format!("checking out the disk of {}", base.id)
}

/// Creates the disk, and registers the clean-up of its resources in `undo`.
pub async fn disk(bake: &Bake<'_>, target: &Target, undo: &Rc<Undo>) -> Result<Box<dyn Disk>> {
    let base = &target.base;
    let step = bake.site.report.step(PHASE, title(base));
    let spec = DiskSpec { verify: bake.options.verify, ..target::disk_spec(bake.image, base, bake.run) };
    let disk = step.follow(bake.site.disks.checkout(base, &spec, bake.run, undo)).await?;
    step.done();
    Ok(disk)
}
