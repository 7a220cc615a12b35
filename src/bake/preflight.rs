//! Checks, before a bake, for problems that would otherwise make the bake fail at its end.

use super::Bake;
use super::target::{self, Target};
use crate::cloud::Image;
use crate::cloud::name_conflict::is_replaceable;
use crate::error::Kind;
use crate::site::Site;
use anyhow::{Context, Result};

/// Fails if `ca_file` of oven.toml is not a file, if a failed or incomplete image has the name of the new image, if the role lacks a permission, or if the disk
/// of the base image is not accessible. With --replace-failed, the failed or incomplete image is deregistered instead.
pub async fn check(bake: &Bake<'_>, target: &Target) -> Result<()> {
    let (site, base) = (bake.site, &target.base);
    site.settings.network.check()?;
    let spec = target::disk_spec(bake.image, base, bake.run);
    // These calls run concurrently, because each of them spends its time waiting for the cloud.
    let (free, permitted, disk) = tokio::join!(
        ensure_name_is_free(bake, target),
        site.cloud.ensure_permitted(base),
        site.disks.query_facts(base, &spec, bake.run),
    );
    free?;
    permitted.context("checking the role's permissions")?;
    disk
}

async fn ensure_name_is_free(bake: &Bake<'_>, target: &Target) -> Result<()> {
    let (site, options) = (bake.site, bake.options);
    if options.force {
        // With --force, the name contains the run's id, so no other image has this name.
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

/// Returns the failed or incomplete image that has this name.
pub async fn name_holder(site: &Site, name: &str) -> Result<Option<Image>> {
    // Searches all images, because an incomplete image may lack the tag with the definition's name.
    let holder = site.cloud.images(None).await?.into_iter().find(|holder| holder.name == name);
    Ok(holder.filter(is_replaceable))
}
