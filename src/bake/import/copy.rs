//! Copies the disk, if the cloud supports this.

use super::{Import, ImportOutcome, name, source, verify};
use crate::cloud::{DiskCopier, Image};
use crate::sys::sparse_copy::disk_name;
use crate::undo::{Debt, Due, Undo};
use anyhow::Result;
use std::fs::File;

/// Copies the disk into an image. `holder` is the image that already has the wanted name.
pub async fn disk(
    import: &Import<'_>,
    copier: &dyn DiskCopier,
    file: File,
    holder: Option<&Image>,
    undo: &Undo,
) -> Result<ImportOutcome> {
    let Import { site, wanted, .. } = import;
    let step = site.report.step("import", format!("importing {}", disk_name(&wanted.raw)));
    let copying = copier.copy_disk(&wanted.raw, &wanted.name, wanted.architecture, &site.report);
    let copied = step.follow(copying).await;
    let image = copied.map_err(|error| name::explain_conflict(import, holder, error))?;
    let new = holder.is_none();
    if new {
        step.done()
    } else {
        drop(step)
    }
    if wanted.verify {
        if new {
            undo.owe(image_debt(import, &image));
        }
        let step = site.report.step("verify", source::reading_context(wanted));
        let digests = source::digests(wanted, source::disk(wanted, file).await?, &step).await?;
        step.done();
        verify::snapshot(import, &image.snapshot, &digests).await?;
        undo.forgive_on_failure();
    }
    Ok(ImportOutcome { image, new })
}

/// The clean-up action that removes a new image if its verification fails.
fn image_debt(import: &Import<'_>, image: &Image) -> Debt {
    let (cloud, id, snapshot) = (import.site.cloud.clone(), image.id.clone(), image.snapshot.clone());
    Debt {
        due: Due::OnFailure,
        what: format!("the image {id}"),
        command: format!("oven images remove {id}"),
        pay: Box::new(move || Box::pin(async move { cloud.remove(&id, &snapshot).await })),
        keep: None,
    }
}
