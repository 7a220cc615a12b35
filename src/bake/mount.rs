//! Step 3: mounts the root; and, before the disk is committed, unmounts it and proves that it was released.

use super::Bake;
use crate::device::Device;
use crate::mount::{MountOptions, Root};
use anyhow::Result;

/// Mounts the root of the disk, which it borrows. The root grows if the definition sets a size.
pub async fn root<'d>(bake: &Bake<'_>, device: &'d Device) -> Result<Root<'d>> {
    let options = MountOptions { grow: bake.image.size_gib.is_some() };
    Root::mount(device, &bake.site.scratch(bake.run)?, &options, &bake.site.report).await
}

/// Unmounts the root and proves that nothing uses the disk any more.
pub async fn release(bake: &Bake<'_>, root: Root<'_>) -> Result<()> {
    let step = bake.site.report.step("release", "unmounting");
    root.close().await?;
    step.done();
    Ok(())
}
