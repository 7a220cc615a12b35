//! Imports a raw disk: uploads its blocks to a snapshot, and registers the snapshot as a base image. A local region
//! copies the disk instead, because that is faster and has the same result.

mod copy;
mod name;
mod register;
mod request;
mod reuse;
mod source;
mod upload;
mod verify;

use crate::cloud::Image;
use crate::ids::RunId;
use crate::site::Site;
use crate::undo::{self, Ended, Undo};
use anyhow::Result;
pub use request::ImportRequest;
pub use source::open as open_disk;
use std::fs::File;

/// The inputs of one import: its request and site.
#[derive(Clone, Copy)]
pub struct Import<'a> {
    pub site: &'a Site,
    pub wanted: &'a ImportRequest,
    pub run: &'a RunId,
}

/// The image of the disk, and whether this import created it.
#[derive(Debug)]
pub struct ImportOutcome {
    pub image: Image,
    pub new: bool,
}

/// Imports a raw disk. If the same disk was imported under the same name before, returns that image.
pub async fn import(import: &Import<'_>, stop: impl Future<Output = ()>) -> Ended<ImportOutcome> {
    undo::scope(import.site.undo_policy(false), stop, async |undo| {
        request::check(import.wanted)?; //                              1. check
        let file = source::open(&import.wanted.raw)?;
        let holder = name::holder(import).await?; //                    2. look up the name
        // The other steps: 3. copy the disk or upload its blocks, 4. verify, 5. register.
        match import.site.cloud.disk_copier() {
            Some(copier) => copy::disk(import, copier, file, holder.as_ref(), &undo).await,
            None => import_blocks(import, file, holder.as_ref(), &undo).await,
        }
    })
    .await
}

/// Imports a disk block by block. `holder` is the image that already has the wanted name.
async fn import_blocks(
    import: &Import<'_>,
    file: File,
    holder: Option<&Image>,
    undo: &Undo,
) -> Result<ImportOutcome> {
    let disk = source::disk(import.wanted, file).await?;
    if let Some(holder) = holder {
        return reuse::image(import, holder, disk).await;
    }
    name::ensure_free(import).await?;
    let sent = upload::blocks(import, &disk, undo).await?; //           3. upload
    verify::snapshot(import, &sent.snapshot, &sent.blocks).await?; //   4. verify
    register::image(import, &disk, &sent, undo).await //                5. register
}
