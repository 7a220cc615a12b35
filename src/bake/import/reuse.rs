//! Returns the image of an earlier import of the same disk.

use super::{Import, ImportOutcome, name, source, verify};
use crate::cloud::{BaseRef, Image, ImageState, tag};
use crate::error::Kind;
use crate::transfer::raw::{self, RawDisk};
use anyhow::Result;
use std::sync::Arc;

/// Returns `holder`, the image that already has the wanted name. Fails if it was imported from another disk.
pub async fn image(import: &Import<'_>, holder: &Image, disk: Arc<RawDisk>) -> Result<ImportOutcome> {
    let step = import.site.report.step("import", source::reading_context(import.wanted));
    let digests = source::digests(import.wanted, disk, &step).await?;
    drop(step);
    let existing = existing_import(import, holder, &raw::digest(&digests)).await;
    let image = existing.map_err(|error| name::explain_conflict(import, Some(holder), error))?;
    verify::snapshot(import, &image.snapshot, &digests).await?;
    Ok(ImportOutcome { image, new: false })
}

/// Returns `holder` if it was imported from the same disk. Errors: [`Kind::Cloud`].
async fn existing_import(import: &Import<'_>, holder: &Image, digest: &str) -> Result<Image> {
    let (cloud, wanted, id) = (&import.site.cloud, import.wanted, &holder.id);
    let is_same_disk = holder.tags.get(tag::SOURCE).is_some_and(|source| source == digest);
    if !is_same_disk || holder.architecture != wanted.architecture {
        return Err(Kind::Cloud.error(format!("the name {} is already used by {id}", wanted.name)));
    }
    if holder.state == ImageState::Pending {
        // This call waits until the image is no longer pending. Its error is ignored, because it also fails if the
        // image cannot be used as a base. That does not matter here.
        _ = cloud.base(&BaseRef::Id(id.clone())).await;
    }
    let (image, _) = cloud.image(id).await?;
    if image.state != ImageState::Available {
        let text = format!("the name {} is already used by {id}, which is {:?}", wanted.name, image.state);
        return Err(Kind::Cloud.error(text.to_lowercase()));
    }
    Ok(image)
}
