//! What would make a bake fail at its end, found before it begins.

use super::Bake;
use super::target::{self, Target};
use crate::cloud::Image;
use crate::cloud::name_conflict::is_replaceable;
use crate::error::Kind;
use crate::site::Site;
use anyhow::{Context, Result};

/// Refuses, before any work, what cannot end well: the name is held by a failed or incomplete image (that one is removed
/// if the user wishes so), the role may not do it, or the base's disk cannot be had.
pub async fn check(bake: &Bake<'_>, target: &Target) -> Result<()> {
    let (site, base) = (bake.site, &target.base);
    let spec = target::disk_spec(bake.image, base, bake.run);
    // Each waits for the cloud.
    let (free, permitted, disk) = tokio::join!(
        ensure_name_is_free(bake, target),
        site.cloud.ensure_permitted(base),
        site.disks.look(base, &spec, bake.run),
    );
    free?;
    permitted.context("asking what the role may do")?;
    disk
}

async fn ensure_name_is_free(bake: &Bake<'_>, target: &Target) -> Result<()> {
    let (site, options) = (bake.site, bake.options);
    if options.force {
        // Its name is the run's alone.
        return Ok(());
    }
    let name = target::name(bake.image, &target.inputs, None);
    if options.replace_failed {
        if let Some(removed) = site.cloud.replace_failed(&name).await? {
            site.report.note(format!("deregistered {removed}, a failed image named {name}"));
        }
        return Ok(());
    }
    match name_holder(site, &name).await? {
        Some(holder) => Err(Kind::Cloud
            .failure(format!("{} is a failed or incomplete image named {name}", holder.id))
            .hint("Give --replace-failed to deregister it and bake again.")
            .into()),
        None => Ok(()),
    }
}

/// The failed or incomplete image that holds a name.
pub async fn name_holder(site: &Site, name: &str) -> Result<Option<Image>> {
    // Of all images: an incomplete one may lack the family's tag.
    let holder = site.cloud.images(None).await?.into_iter().find(|holder| holder.name == name);
    Ok(holder.filter(is_replaceable))
}
