//! The story of an import: a raw disk is sent, block by block, and registered as a base image. A local region copies
//! it, which is faster and the same.

use super::register;
use crate::cloud::block_api::NewSnapshot;
use crate::cloud::ec2_rules::check_image_name;
use crate::cloud::local::Region;
use crate::cloud::{Attributes, BaseRef, Image, ImageSpec, ImageState, ROOT_DEVICE, Tags, VolumeKind, tag};
use crate::definition::{DEFAULT_TYPE, UEFI};
use crate::disk::owned;
use crate::error::Kind;
use crate::ids::Digest;
use crate::ids::{Architecture, ImageId, RunId, SnapshotId};
use crate::site::Site;
use crate::sys::tasks;
use crate::transfer::raw;
use crate::transfer::raw::Raw;
use crate::transfer::upload;
use crate::undo;
use crate::undo::{Debt, Due, Ended, Undo};
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub raw: PathBuf,
    pub name: String,
    pub architecture: Architecture,
    /// `None` leaves it to the cloud. A local region has no boot modes.
    pub boot_mode: Option<String>,
    /// Whether the snapshot is read back, and compared.
    pub verify: bool,
}

/// An image of the disk, and whether it is new.
#[derive(Debug)]
pub struct Imported {
    pub image: Image,
    pub new: bool,
}

/// Imports a raw disk. The same disk under the same name again answers with the image that is there.
pub async fn import(site: &Site, wanted: &Wanted, stop: impl Future<Output = ()>) -> Ended<Imported> {
    let run = RunId::new();
    undo::scope(site.undo_policy(false), stop, async |undo| {
        let Wanted { name, .. } = wanted;
        check_image_name(name).map_err(|error| Kind::Usage.error(format!("--name: {error:#}")))?;
        check_boot_mode(wanted)?;
        let file = Region::open_raw(&wanted.raw)?;
        let holder = site.cloud.images(None).await?.into_iter().find(|image| image.name == *name);
        let story = async {
            match &site.region {
                Some(_) => copied(site, wanted, file, holder.is_none(), &undo).await,
                None => sent(site, wanted, file, holder.as_ref(), &run, &undo).await,
            }
        };
        story.await.map_err(|error| match &holder {
            Some(holder) if Kind::of(&error) == Kind::Cloud => taken(site, error, &holder.id),
            _ => error,
        })
    })
    .await
}

fn check_boot_mode(wanted: &Wanted) -> Result<()> {
    match &wanted.boot_mode {
        Some(mode) if wanted.architecture == Architecture::Arm64 && mode != UEFI => {
            let text = format!("--boot-mode: an arm64 image boots by {UEFI} alone, and not by {mode}");
            Err(Kind::Usage.error(text))
        }
        _ => Ok(()),
    }
}

/// What to do about a name that something else has.
fn taken(site: &Site, error: anyhow::Error, holder: &ImageId) -> anyhow::Error {
    let remove = match &site.region {
        Some(_) => site.spelt(&format!("oven images remove {holder}")),
        None => format!("aws ec2 deregister-image --image-id {holder}"),
    };
    let hint = format!("That is another disk. Give this one another --name, or remove that: {remove}");
    Kind::Cloud.failure(format!("{error:#}")).hint(hint).into()
}

/// Into a local region.
async fn copied(site: &Site, wanted: &Wanted, file: File, new: bool, undo: &Undo) -> Result<Imported> {
    let step = site.report.step("import", format!("importing {}", wanted.raw.display()));
    let image = site.import(&wanted.raw, &wanted.name, wanted.architecture).await?;
    if new {
        step.done()
    } else {
        drop(step)
    }
    if wanted.verify {
        if new {
            undo.owe(image_debt(site, &image));
        }
        let digests = upload::digests(source(wanted, file).await?).await.with_context(|| reading(wanted))?;
        read_back(site, &image.snapshot, &digests).await?;
        undo.forgive_on_failure();
    }
    Ok(Imported { image, new })
}

/// One that is not what it was to be must not stay.
fn image_debt(site: &Site, image: &Image) -> Debt {
    let (site, id, snapshot) = (site.clone(), image.id.clone(), image.snapshot.clone());
    Debt {
        due: Due::OnFailure,
        what: format!("the image {id}"),
        command: format!("oven images remove {id}"),
        pay: Box::new(move || Box::pin(async move { site.remove(&id, &snapshot).await })),
        keep: None,
    }
}

fn reading(wanted: &Wanted) -> String {
    format!("reading {}", wanted.raw.display())
}

async fn source(wanted: &Wanted, file: File) -> Result<Arc<Raw>> {
    let name = wanted.raw.clone();
    Ok(Arc::new(tasks::run(move |_| Raw::new(file, &name)).await?))
}

async fn read_back(site: &Site, snapshot: &SnapshotId, digests: &BTreeMap<u32, Digest>) -> Result<()> {
    let step = site.report.step("verify", format!("reading {snapshot} back"));
    crate::transfer::download::verify(&*site.blocks, snapshot, digests, None)
        .await
        .context("comparing it with the raw disk")?;
    step.done();
    Ok(())
}

/// By its blocks.
async fn sent(
    site: &Site,
    wanted: &Wanted,
    file: File,
    holder: Option<&Image>,
    run: &RunId,
    undo: &Rc<Undo>,
) -> Result<Imported> {
    let Wanted { name, architecture, .. } = wanted;
    let source = source(wanted, file).await?;
    if let Some(holder) = holder {
        let step = site.report.step("import", reading(wanted));
        let digests = upload::digests(source).await.with_context(|| reading(wanted))?;
        drop(step);
        let image = same(site, wanted, holder, &raw::digest(&digests)).await?;
        if wanted.verify {
            read_back(site, &image.snapshot, &digests).await?;
        }
        return Ok(Imported { image, new: false });
    }
    ensure_free(site, name).await?;
    let spec = NewSnapshot {
        parent: None,
        size_gib: source.size_gib(),
        description: format!("oven import of {name}"),
        run: run.clone(),
        tags: owned(&Tags::new(), run),
        encrypted: false,
        kms_key: None,
    };
    undo.owe(upload::debt(site.blocks.clone(), run));
    let step = site.report.step("import", format!("sending {}", wanted.raw.display()));
    let sent =
        upload::upload(&*site.blocks, &spec, source.clone(), &|bytes| step.progress(bytes, None)).await;
    let sent = sent.with_context(|| format!("importing {}", wanted.raw.display()))?;
    step.done();
    if wanted.verify {
        read_back(site, &sent.snapshot, &sent.blocks).await?;
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
    // Somebody else may have been faster.
    Ok(Imported { new: image.made_by(run), image })
}

/// What instances of every kind that EC2 has need, and what costs nothing more.
fn attributes(wanted: &Wanted) -> Attributes {
    let root_volume = VolumeKind { volume_type: Some(DEFAULT_TYPE.to_owned()), ..VolumeKind::default() };
    Attributes { boot_mode: wanted.boot_mode.clone(), ena: Some(true), root_volume, ..Attributes::default() }
}

/// The holder of the name, if it is this very disk.
async fn same(site: &Site, wanted: &Wanted, holder: &Image, digest: &str) -> Result<Image> {
    let id = &holder.id;
    let known = holder.tags.get(tag::SOURCE).is_some_and(|theirs| theirs == digest);
    if !known || holder.architecture != wanted.architecture {
        return Err(Kind::Cloud.error(format!("the name {} is taken by {id}", wanted.name)));
    }
    if holder.state == ImageState::Pending {
        // It waits. Whether something can be baked on it does not matter here.
        _ = site.cloud.base(&BaseRef::Id(id.clone())).await;
    }
    let (image, _) = site.cloud.image(id).await?;
    if image.state != ImageState::Available {
        let text = format!("the name {} is held by {id}, which is {:?}", wanted.name, image.state);
        return Err(Kind::Cloud.error(text.to_lowercase()));
    }
    Ok(image)
}

/// Before all is sent for nothing: the name may be that of an image that oven did not make.
async fn ensure_free(site: &Site, name: &str) -> Result<()> {
    // A pattern, but none of what makes one is allowed in a name.
    let named = BaseRef::Name { name: name.to_owned(), owner: Some("self".to_owned()) };
    match site.cloud.base(&BaseRef::Deprecated(named.into())).await {
        Ok(base) => {
            let error = Kind::Cloud.error(format!("the name {name} is taken by {}", base.id));
            Err(taken(site, error, &base.id))
        }
        Err(error) if Kind::of(&error) == Kind::NotFound => Ok(()),
        // There is one, whatever is wrong with it.
        Err(error) if Kind::of(&error) == Kind::Definition => {
            let text = format!("the name {name} is taken: {error:#}");
            Err(Kind::Cloud.failure(text).hint("Give another --name.").into())
        }
        Err(error) => Err(error),
    }
}
