//! Imports a raw disk: uploads its blocks to a snapshot, and registers the snapshot as a base image. A local region
//! copies the disk instead, because that is faster and has the same result.

use super::register;
use crate::cloud::block_api::NewSnapshot;
use crate::cloud::ec2_rules::check_image_name;
use crate::cloud::local::Region;
use crate::cloud::{Attributes, BaseRef, Image, ImageSpec, ImageState, ROOT_DEVICE, Tags, VolumeKind, tag};
use crate::definition::{DEFAULT_TYPE, UEFI};
use crate::disk::with_owner_tags;
use crate::error::Kind;
use crate::ids::Digest;
use crate::ids::{Architecture, ImageId, RunId, SnapshotId};
use crate::site::Site;
use crate::sys::tasks;
use crate::transfer::raw;
use crate::transfer::raw::RawDisk;
use crate::transfer::upload;
use crate::undo;
use crate::undo::{Debt, Due, Ended, Undo};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// The arguments of an import.
#[derive(Debug, Clone)]
pub struct ImportRequest {
    pub raw: PathBuf,
    pub name: String,
    pub architecture: Architecture,
    /// `None` means the cloud's default. A local region has no boot modes.
    pub boot_mode: Option<String>,
    /// Whether to read the snapshot back and compare it with the raw disk.
    pub verify: bool,
}

/// The image of the disk, and whether this import created it.
#[derive(Debug)]
pub struct ImportOutcome {
    pub image: Image,
    pub new: bool,
}

/// Imports a raw disk. If the same disk was imported under the same name before, returns that image.
pub async fn import(
    site: &Site,
    wanted: &ImportRequest,
    stop: impl Future<Output = ()>,
) -> Ended<ImportOutcome> {
    let run = RunId::new();
    undo::scope(site.undo_policy(false), stop, async |undo| {
        let ImportRequest { name, .. } = wanted;
        check_image_name(name).map_err(|error| Kind::Usage.error(format!("--name: {error:#}")))?;
        check_boot_mode(wanted)?;
        let file = Region::open_raw(&wanted.raw)?;
        let holder = site.cloud.images(None).await?.into_iter().find(|image| image.name == *name);
        let imported = async {
            match site.cloud.disk_copier() {
                Some(_) => import_locally(site, wanted, file, holder.is_none(), &undo).await,
                None => import_to_cloud(site, wanted, file, holder.as_ref(), &run, &undo).await,
            }
        };
        imported.await.map_err(|error| match &holder {
            Some(holder) if Kind::of(&error) == Kind::Cloud => with_name_hint(site, error, &holder.id),
            _ => error,
        })
    })
    .await
}

fn check_boot_mode(wanted: &ImportRequest) -> Result<()> {
    match &wanted.boot_mode {
        Some(mode) if wanted.architecture == Architecture::Arm64 && mode != UEFI => {
            let text = format!("--boot-mode: an arm64 image only boots by {UEFI}, not by {mode}");
            Err(Kind::Usage.error(text))
        }
        _ => Ok(()),
    }
}

/// Adds a hint to the error: what the user can do if another image has the name.
fn with_name_hint(site: &Site, error: anyhow::Error, holder: &ImageId) -> anyhow::Error {
    let remove = site.spelt(&site.cloud.removal_command(holder));
    let hint = format!("That image has another disk. Choose another --name, or remove that image: {remove}");
    Kind::Cloud.failure(format!("{error:#}")).hint(hint).into()
}

/// Copies the disk into a local region.
async fn import_locally(
    site: &Site,
    wanted: &ImportRequest,
    file: File,
    new: bool,
    undo: &Undo,
) -> Result<ImportOutcome> {
    let step = site.report.step("import", format!("importing {}", wanted.raw.display()));
    let copier = site.cloud.disk_copier().context("no copier")?;
    let image = copier.copy_disk(&wanted.raw, &wanted.name, wanted.architecture, &site.report).await?;
    if new {
        step.done()
    } else {
        drop(step)
    }
    if wanted.verify {
        if new {
            undo.owe(image_debt(site, &image));
        }
        let digests = upload::digests(open_source(wanted, file).await?)
            .await
            .with_context(|| reading_context(wanted))?;
        verify_snapshot(site, &image.snapshot, &digests).await?;
        undo.forgive_on_failure();
    }
    Ok(ImportOutcome { image, new })
}

/// The clean-up of a new image, which is executed if its verification fails.
fn image_debt(site: &Site, image: &Image) -> Debt {
    let (cloud, id, snapshot) = (site.cloud.clone(), image.id.clone(), image.snapshot.clone());
    Debt {
        due: Due::OnFailure,
        what: format!("the image {id}"),
        command: format!("oven images remove {id}"),
        pay: Box::new(move || Box::pin(async move { cloud.remove(&id, &snapshot).await })),
        keep: None,
    }
}

fn reading_context(wanted: &ImportRequest) -> String {
    format!("reading {}", wanted.raw.display())
}

async fn open_source(wanted: &ImportRequest, file: File) -> Result<Arc<RawDisk>> {
    let name = wanted.raw.clone();
    Ok(Arc::new(tasks::run(move |_| RawDisk::new(file, &name)).await?))
}

async fn verify_snapshot(site: &Site, snapshot: &SnapshotId, digests: &BTreeMap<u32, Digest>) -> Result<()> {
    let step = site.report.step("verify", format!("verifying {snapshot}"));
    crate::transfer::download::verify(&*site.blocks, snapshot, digests, None)
        .await
        .context("comparing it with the raw disk")?;
    step.done();
    Ok(())
}

/// Uploads the disk block by block to the cloud.
async fn import_to_cloud(
    site: &Site,
    wanted: &ImportRequest,
    file: File,
    holder: Option<&Image>,
    run: &RunId,
    undo: &Rc<Undo>,
) -> Result<ImportOutcome> {
    let ImportRequest { name, architecture, .. } = wanted;
    let source = open_source(wanted, file).await?;
    if let Some(holder) = holder {
        let step = site.report.step("import", reading_context(wanted));
        let digests = upload::digests(source).await.with_context(|| reading_context(wanted))?;
        drop(step);
        let image = existing_import(site, wanted, holder, &raw::digest(&digests)).await?;
        if wanted.verify {
            verify_snapshot(site, &image.snapshot, &digests).await?;
        }
        return Ok(ImportOutcome { image, new: false });
    }
    ensure_free(site, name).await?;
    let spec = NewSnapshot {
        parent: None,
        size_gib: source.size_gib(),
        description: format!("oven import of {name}"),
        run: run.clone(),
        tags: with_owner_tags(&Tags::new(), run),
        encrypted: false,
        kms_key: None,
    };
    undo.owe(upload::snapshot_debt(site.blocks.clone(), run));
    let step = site.report.step("import", format!("uploading {}", wanted.raw.display()));
    let sent =
        upload::upload(&*site.blocks, &spec, source.clone(), &|bytes| step.progress(bytes, None)).await;
    let sent = sent.with_context(|| format!("importing {}", wanted.raw.display()))?;
    step.done();
    if wanted.verify {
        verify_snapshot(site, &sent.snapshot, &sent.blocks).await?;
    }
    let image = ImageSpec {
        name: name.clone(),
        description: spec.description,
        architecture: *architecture,
        root_device: ROOT_DEVICE.to_owned(),
        size_gib: source.size_gib(),
        attributes: attributes(wanted),
        tags: [(tag::SOURCE.to_owned(), raw::digest(&sent.blocks))].into(),
        run: run.clone(),
        documents: Default::default(),
    };
    let image = register::snapshot_as(site, &sent.snapshot, &image, undo).await?;
    // Another process may have registered the image before this one.
    Ok(ImportOutcome { new: image.was_created_by(run), image })
}

/// The attributes of an imported image: those that all EC2 instance types need. None of them costs extra.
fn attributes(wanted: &ImportRequest) -> Attributes {
    let root_volume = VolumeKind { volume_type: Some(DEFAULT_TYPE.to_owned()), ..VolumeKind::default() };
    Attributes { boot_mode: wanted.boot_mode.clone(), ena: Some(true), root_volume, ..Attributes::default() }
}

/// Returns the image with this name if it was imported from the same disk. Errors: [`Kind::Cloud`].
async fn existing_import(site: &Site, wanted: &ImportRequest, holder: &Image, digest: &str) -> Result<Image> {
    let id = &holder.id;
    let is_same_disk = holder.tags.get(tag::SOURCE).is_some_and(|source| source == digest);
    if !is_same_disk || holder.architecture != wanted.architecture {
        return Err(Kind::Cloud.error(format!("the name {} is taken by {id}", wanted.name)));
    }
    if holder.state == ImageState::Pending {
        // This call waits for the image. Its error is ignored, because the image need not be usable as a base here.
        _ = site.cloud.base(&BaseRef::Id(id.clone())).await;
    }
    let (image, _) = site.cloud.image(id).await?;
    if image.state != ImageState::Available {
        let text = format!("the name {} is taken by {id}, which is {:?}", wanted.name, image.state);
        return Err(Kind::Cloud.error(text.to_lowercase()));
    }
    Ok(image)
}

/// Fails if an image that oven did not create has the name. Called before the upload. Errors: [`Kind::Cloud`].
async fn ensure_free(site: &Site, name: &str) -> Result<()> {
    // This field takes a pattern. An image name is a safe pattern, because it cannot contain wildcards.
    let named = BaseRef::Name { name: name.to_owned(), owner: Some("self".to_owned()) };
    match site.cloud.base(&BaseRef::Deprecated(named.into())).await {
        Ok(base) => {
            let error = Kind::Cloud.error(format!("the name {name} is taken by {}", base.id));
            Err(with_name_hint(site, error, &base.id))
        }
        Err(error) if Kind::of(&error) == Kind::NotFound => Ok(()),
        // The image exists, but cannot be used as a base.
        Err(error) if Kind::of(&error) == Kind::Definition => {
            let text = format!("the name {name} is taken: {error:#}");
            Err(Kind::Cloud.failure(text).hint("Choose another --name.").into())
        }
        Err(error) => Err(error),
    }
}
