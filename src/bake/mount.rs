//! Step 3: mounts the root file system. Before the disk is committed, the file system must be unmounted, and nothing
//! may use the disk any more.

use super::Bake;
use crate::device::Device;
use crate::mount::{MountOptions, Root};
use anyhow::Result;

/// Mounts the root file system of the disk. The result borrows the disk. If the definition sets a size, the file system
/// is grown to this size.
pub async fn root<'d>(bake: &Bake<'_>, device: &'d Device) -> Result<Root<'d>> {
    let _activity = bake.site.report.activity("mount", "mounting the disk");
    let options =
        MountOptions { grow: bake.image.size_gib.is_some(), disk_writable: bake.image.disk_writable };
    Root::mount(device, &bake.site.scratch(bake.run)?, &options, &bake.site.report).await
}

/// The phase and the title of the step that unmounts.
pub const RELEASE: (&str, &str) = ("release", "unmounting");

/// Returns the root file system together with the result of the work in it. If the work failed, unmounts the root, and
/// explains the failure if a file system is damaged.
pub async fn unless_failed<'d, T>(result: Result<T>, root: Root<'d>) -> Result<(Root<'d>, T)> {
    match result {
        Ok(value) => Ok((root, value)),
        Err(error) => Err(root.into_explained(error).await),
    }
}

/// Unmounts the root file system, and verifies that nothing uses the disk any more.
pub async fn release(bake: &Bake<'_>, root: Root<'_>) -> Result<()> {
    let step = bake.site.report.step(RELEASE.0, RELEASE.1);
    root.close().await?;
    step.done();
    Ok(())
}
