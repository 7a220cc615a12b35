//! Registers the uploaded snapshot as an image.

use super::{Import, ImportOutcome, ImportRequest};
use crate::bake::register::snapshot_as;
use crate::cloud::{Attributes, ImageSpec, ROOT_DEVICE, VolumeKind, tag};
use crate::definition::DEFAULT_TYPE;
use crate::transfer::raw::{self, RawDisk};
use crate::transfer::upload::UploadedSnapshot;
use crate::undo::Undo;
use anyhow::Result;

/// Registers the image. If another process has already registered the same image, returns that image.
pub async fn image(
    import: &Import<'_>,
    disk: &RawDisk,
    sent: &UploadedSnapshot,
    undo: &Undo,
) -> Result<ImportOutcome> {
    let Import { site, wanted, run } = import;
    let spec = ImageSpec {
        name: wanted.name.clone(),
        description: wanted.description(),
        architecture: wanted.architecture,
        root_device: ROOT_DEVICE.to_owned(),
        size_gib: disk.size_gib(),
        attributes: attributes(wanted),
        tags: [(tag::SOURCE.to_owned(), raw::digest(&sent.blocks))].into(),
        run: (*run).clone(),
        documents: Default::default(),
    };
    let image = snapshot_as(site, &sent.snapshot, &spec, undo).await?;
    Ok(ImportOutcome { new: image.was_created_by(run), image })
}

/// The attributes of an imported image. All EC2 instance types support these attributes, and none of them costs extra.
fn attributes(wanted: &ImportRequest) -> Attributes {
    let root_volume = VolumeKind { volume_type: Some(DEFAULT_TYPE.to_owned()), ..VolumeKind::default() };
    Attributes { boot_mode: wanted.boot_mode.clone(), ena: Some(true), root_volume, ..Attributes::default() }
}
