//! The default cloud: a region that is a directory and enforces EC2's rules.
//!
//! ```text
//! DIR/region.json                     the format of the directory
//! DIR/lock                            locked (flock) during a change
//! DIR/images/ami-….json               records; written to a temporary file and renamed
//! DIR/documents/ami-….json            texts that are stored with an image, such as the list of its packages
//! DIR/snapshots/snap-….{json,img}     a record, and the data as a sparse file
//! DIR/snapshots/snap-….{put,parent}   for block-level writes: which blocks were put, and the parent's data
//! DIR/volumes/vol-….{json,img}        a record and the data; the file is locked while the volume is attached
//! ```
//!
//! The state of a resource is derived from facts that remain correct even if a process is killed. A resource is pending
//! until a time in its record. A volume is attached while a loop device has the volume's file open, and the file is
//! locked during that time. `oven sweep` removes data that have no record.

mod blocks;
mod import;
mod open_errors;
mod pending_snapshot;
mod private_dir;
mod records;
mod sweep;
#[cfg(test)]
mod tests;
mod volumes;

pub use pending_snapshot::SnapshotState;
pub use records::RegionAccess;

use super::name_conflict::{ConflictResolution, resolve_conflict};
use super::{
    Attributes, BakeKey, Base, BaseRef, Cloud, DiskCopier, Image, ImageSpec, ImageState, StaleRun, tag,
};
use crate::cloud::ec2_rules::{check_description, check_image_name, check_tags, ec2_error, new_id};
use crate::error::{Failure, Kind};
use crate::ids::{ImageId, RunId, SnapshotId};
use crate::sys::poll::{PollAnswer, PollPolicy, poll_until};
use crate::undo::Undo;
use anyhow::{Context, Result};
use async_trait::async_trait;
use records::{ImageRecord, LockedRegion, RegionStore, SnapshotRecord, created_after, now};
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// How long to wait for a pending resource, which becomes ready by itself. The limit is longer than every delay that a
/// test may set. If the clock was set back, the resource stays pending for too long, and the limit ends the wait.
const PENDING_POLL: PollPolicy = PollPolicy::local(Duration::from_secs(120)).of_region();

/// A pending snapshot expires if no block is put for this time. On EBS, oven requests at least the same time. The time
/// is long, because a bake starts its snapshot before its steps, and the steps may take hours.
const WRITE_TIMEOUT: Duration = Duration::from_secs(6 * 60 * 60);

/// A directory that acts as a cloud. Cloning is cheap, and several processes may use one directory concurrently.
#[derive(Debug, Clone)]
pub struct Region(Rc<Inner>);

#[derive(Debug)]
struct Inner {
    store: RegionStore,
    /// The time for which new resources are pending.
    delay: Duration,
    /// A pending snapshot expires if no block is put for this time.
    patience: Duration,
    /// Limits the number of concurrent copies of parents' data.
    copies: Rc<blocks::Copies>,
}

impl Inner {
    fn clone_inner(&self) -> Self {
        Self { store: self.store.clone(), copies: self.copies.clone(), ..*self }
    }
}

impl Region {
    /// Opens the region in a directory, or creates one in a new or empty directory: see [`RegionAccess::Create`].
    pub fn open(dir: &Path) -> Result<Self> {
        Self::open_for(dir, RegionAccess::Create)
    }

    /// Opens a region. Fails with [`Kind::Machine`] if the directory cannot be used, with [`Kind::NotFound`] if it has
    /// no region and none may be created, and with [`Kind::Definition`] if a region would be created among other files.
    pub fn open_for(dir: &Path, access: RegionAccess) -> Result<Self> {
        Ok(Self(Rc::new(Inner {
            store: RegionStore::open(dir, access)?,
            delay: Duration::ZERO,
            patience: WRITE_TIMEOUT,
            copies: Rc::default(),
        })))
    }

    /// Returns the same region, but with new resources that are `pending` for `delay`, as on EC2. For tests.
    pub fn with_delays(&self, delay: Duration) -> Self {
        Self(Rc::new(Inner { delay, ..self.0.clone_inner() }))
    }

    /// Returns the same region, but with snapshots that become `error` if no block was put for `patience`, as with the
    /// `Timeout` of EBS's StartSnapshot.
    pub fn with_write_timeout(&self, patience: Duration) -> Self {
        Self(Rc::new(Inner { patience, ..self.0.clone_inner() }))
    }

    /// Returns the directory as an absolute path.
    pub fn dir(&self) -> &Path {
        self.0.store.dir()
    }

    fn store(&self) -> &RegionStore {
        &self.0.store
    }

    fn ready_at(&self) -> u64 {
        now() + self.0.delay.as_millis() as u64
    }

    /// Deregisters an image. Its snapshot is not deleted.
    pub async fn deregister(&self, id: &ImageId) -> Result<()> {
        let id = id.clone();
        self.store().locked(move |region| region.deregister(&id)).await
    }

    /// Deletes a snapshot, even a pending one. Fails if an image uses it.
    pub async fn delete_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let id = id.clone();
        self.store().locked(move |region| delete_snapshot(region, &id)).await
    }

    /// Deletes every snapshot of the run that no image uses, including pending ones.
    pub async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()> {
        let run = run.clone();
        let delete = move |region: &LockedRegion| {
            for snapshot in region.tagged::<SnapshotRecord>(tag::RUN, &run.0)? {
                match delete_snapshot(region, &snapshot.id) {
                    // An image uses the snapshot, so the snapshot is a result and not a leftover.
                    Err(e)
                        if Kind::of(&e) == Kind::Cloud
                            && e.to_string().starts_with("InvalidSnapshot.InUse") => {}
                    result => result.with_context(|| format!("deleting {}", snapshot.id))?,
                }
            }
            Ok(())
        };
        self.store().locked(delete).await
    }

    /// Makes an image fail, as EC2 may do. For tests.
    pub async fn fail(&self, id: &ImageId, why: &str) -> Result<()> {
        let (id, why) = (id.clone(), why.to_owned());
        let fail = move |region: &LockedRegion| {
            let image: ImageRecord = region.get(&id.0)?;
            region.write(&ImageRecord { failed: Some(why), ..image }, true)
        };
        self.store().locked(fail).await
    }

    fn describe(&self, record: ImageRecord) -> Image {
        let state = self.store().state(&record);
        let ImageRecord { id, name, architecture, snapshot, size_gib, created, description, tags, .. } =
            record;
        Image { id, name, state, architecture, snapshot, size_gib, created, description, tags }
    }

    /// Waits until an image is no longer pending. Returns `None` if it was deregistered meanwhile.
    async fn settled(&self, id: &ImageId) -> Result<Option<ImageRecord>> {
        poll_until(&format!("the image {id}"), &PENDING_POLL, async || {
            Ok(match self.store().find::<ImageRecord>(&id.0)? {
                Some(image) if self.store().state(&image) == ImageState::Pending => {
                    PollAnswer::NotYet("pending".to_owned())
                }
                image => PollAnswer::Ready(image),
            })
        })
        .await
    }

    /// Returns the newest available image among `candidates`. If none is available yet, waits for the pending images,
    /// and returns the newest one that becomes available.
    async fn newest(&self, mut candidates: Vec<ImageRecord>) -> Result<Option<ImageRecord>> {
        let of = |state| move |image: &&ImageRecord| self.store().state(image) == state;
        if let Some(image) = candidates.iter().rfind(of(ImageState::Available)) {
            return Ok(Some(image.clone()));
        }
        candidates.retain(|image| of(ImageState::Pending)(&image));
        while let Some(image) = candidates.pop() {
            let settled = self.settled(&image.id).await?;
            if let Some(image) = settled.filter(|i| self.store().state(i) == ImageState::Available) {
                return Ok(Some(image));
            }
        }
        Ok(None)
    }

    /// Adopts the image with the requested name, or fails with the reason why it cannot be adopted. Returns `None` if
    /// the image was deregistered while this function waited for it.
    async fn adopt(&self, holder: ImageRecord, spec: &ImageSpec) -> Result<Option<Image>> {
        let mut holder = self.describe(holder);
        loop {
            match resolve_conflict(&holder, spec) {
                ConflictResolution::Adopt => return Ok(Some(holder)),
                ConflictResolution::Refuse(error) => {
                    let id = &holder.id;
                    let text = format!("AMI name {} is already in use by AMI {id}", spec.name);
                    return Err(error.context(format!("InvalidAMIName.Duplicate: {text}")));
                }
                ConflictResolution::Wait => match self.settled(&holder.id).await? {
                    Some(image) => holder = self.describe(image),
                    None => return Ok(None),
                },
            }
        }
    }

    /// Waits for the image that this process registered, and verifies it.
    async fn read_back(&self, id: &ImageId, spec: &ImageSpec) -> Result<Image> {
        let gone = || Kind::Cloud.error(format!("the image {id} was deregistered while it was pending"));
        let record = self.settled(id).await?.ok_or_else(gone)?;
        if let Some(why) = self.store().why_failed(&record) {
            // The failed image is useless. After it is deregistered, its name can be used again and the snapshot can be
            // deleted.
            self.deregister(id)
                .await
                .with_context(|| format!("deregistering the failed image {id} (it failed: {why})"))?;
            return Err(Kind::Cloud.error(format!("the image {id} failed: {why}")));
        }
        let image = self.describe(record);
        if spec.tags.iter().any(|(key, value)| image.tags.get(key) != Some(value)) {
            return Err(Kind::Cloud.error(format!("the image {id} lacks tags that it was registered with")));
        }
        Ok(image)
    }
}

/// The result of an attempt to register an image.
enum Registered {
    New(ImageId),
    Taken(Box<ImageRecord>),
}

fn register(
    region: &LockedRegion,
    image: ImageRecord,
    documents: &BTreeMap<String, String>,
) -> Result<Registered> {
    let images: Vec<ImageRecord> = region.list()?;
    let snapshot: SnapshotRecord = region.get(&image.snapshot.0)?;
    region.ensure_completed(&snapshot)?;
    if image.size_gib < snapshot.size_gib {
        let text = format!(
            "a volume of {} GiB is smaller than its snapshot {}, which has {} GiB",
            image.size_gib, snapshot.id, snapshot.size_gib
        );
        return Err(ec2_error("InvalidBlockDeviceMapping", text));
    }
    let created = created_after(&images);
    // A name is in use from the registration of an image until its deregistration, whatever the image's state.
    if let Some(holder) = images.into_iter().find(|other| other.name == image.name) {
        return Ok(Registered::Taken(holder.into()));
    }
    if !documents.is_empty() {
        region.write_documents(&image.id, documents)?;
    }
    let id = image.id.clone();
    region.write(&ImageRecord { created, ..image }, true)?;
    Ok(Registered::New(id))
}

fn delete_snapshot(region: &LockedRegion, id: &SnapshotId) -> Result<()> {
    region.get::<SnapshotRecord>(&id.0)?;
    if let Some(image) = region.list::<ImageRecord>()?.into_iter().find(|image| image.snapshot == *id) {
        return Err(ec2_error(
            "InvalidSnapshot.InUse",
            format!("The snapshot {id} is currently in use by {}", image.id),
        ));
    }
    region.remove::<SnapshotRecord>(&id.0)
}

#[async_trait(?Send)]
impl Cloud for Region {
    async fn base(&self, from: &BaseRef) -> Result<Base> {
        let from = if let BaseRef::Deprecated(from) = from { from } else { from };
        let missing = |why: &str| Kind::NotFound.failure(format!("{from} was not found: {why}"));
        let import =
            "Import a raw disk image with `oven import RAW --name NAME`, or bake on EC2 with --cloud aws.";
        let found = match from {
            BaseRef::Id(id) => {
                self.store().get::<ImageRecord>(&id.0)?;
                let image = self.settled(id).await?;
                if let Some(why) = image.as_ref().and_then(|image| self.store().why_failed(image)) {
                    return Err(Kind::NotFound.error(format!("the image {id} failed: {why}")));
                }
                image
            }
            BaseRef::Name { name, owner: None } => self.named(name).await?,
            BaseRef::Name { name, owner: Some(owner) } if owner == "self" => self.named(name).await?,
            BaseRef::Tag { key, value, owner: None } => self.tagged(key, value).await?,
            BaseRef::Tag { key, value, owner: Some(owner) } if owner == "self" => {
                self.tagged(key, value).await?
            }
            BaseRef::Name { .. } | BaseRef::Tag { .. } => {
                let why = "a local region has no images of other owners";
                return Err(missing(why).hint(import).into());
            }
            BaseRef::Ssm(_) | BaseRef::Deprecated(_) => {
                return Err(missing("the local region has no SSM parameters").hint(import).into());
            }
        };
        let image = match found {
            Some(image) => image,
            None => return Err(self.no_such_base(from, missing)?.into()),
        };
        let ImageRecord { id, name, snapshot, architecture, size_gib, root_device, .. } = image;
        let attributes = Attributes::default();
        Ok(Base { id, name, snapshot, architecture, size_gib, root_device, attributes })
    }

    async fn find(&self, key: &BakeKey) -> Result<Option<Image>> {
        let mut images: Vec<ImageRecord> = self.store().tagged(tag::CHECKSUM, &key.checksum)?;
        images.retain(|image| {
            let fits = |print| image.tags.get(tag::FINGERPRINT) == Some(print);
            image.architecture == key.architecture && key.fingerprint.as_ref().is_none_or(fits)
        });
        Ok(self.newest(images).await?.map(|image| self.describe(image)))
    }

    async fn register(&self, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image> {
        check_image_name(&spec.name)?;
        check_description(&spec.description)?;
        let mut tags = spec.tags.clone();
        tags.insert(tag::RUN.to_owned(), spec.run.0.clone());
        check_tags(&tags)?;
        // If a pending image has the name, `adopt` waits for that image. If the image is deregistered meanwhile, the
        // name is free, and the loop tries again.
        loop {
            let record = ImageRecord {
                id: ImageId(new_id("ami")),
                name: spec.name.clone(),
                architecture: spec.architecture,
                snapshot: snapshot.clone(),
                size_gib: spec.size_gib,
                root_device: spec.root_device.clone(),
                created: String::new(),
                description: spec.description.clone(),
                tags: tags.clone(),
                ready_at: self.ready_at(),
                failed: None,
                source: None,
            };
            let documents = spec.documents.clone();
            match self.store().locked(move |region| register(region, record, &documents)).await? {
                Registered::New(id) => {
                    let image = self.read_back(&id, spec).await?;
                    undo.forgive_on_failure();
                    return Ok(image);
                }
                Registered::Taken(holder) => {
                    let Some(image) = self.adopt(*holder, spec).await? else { continue };
                    if image.snapshot == *snapshot {
                        // This process registered the image in a call whose response was lost.
                        undo.forgive_on_failure();
                    } else {
                        undo.make_all_due();
                    }
                    return Ok(image);
                }
            }
        }
    }

    async fn images(&self, family: Option<&str>) -> Result<Vec<Image>> {
        let images = match family {
            Some(family) => self.store().tagged(tag::NAME, family)?,
            None => self.store().list()?,
        };
        Ok(images.into_iter().map(|image| self.describe(image)).collect())
    }

    async fn image(&self, id: &ImageId) -> Result<(Image, BTreeMap<String, String>)> {
        let image = self.describe(self.store().get(&id.0)?);
        Ok((image, self.store().documents(id)?))
    }

    async fn replace_failed(&self, name: &str) -> Result<Option<ImageId>> {
        let holder = self.store().list::<ImageRecord>()?.into_iter().find(|image| image.name == name);
        let Some(holder) = holder.map(|image| self.describe(image)) else { return Ok(None) };
        let id = holder.id.clone();
        if !super::name_conflict::is_replaceable(&holder) {
            let text = format!(
                "{id} has the name {name}, but oven replaces only images that it created itself and that failed"
            );
            return Err(Kind::Cloud.error(text));
        }
        let replace = move |region: &LockedRegion| {
            // Another process may have deregistered the image meanwhile.
            let Some(image) = region.find::<ImageRecord>(&holder.id.0)? else { return Ok(()) };
            region.deregister(&image.id)?;
            let used = region.list::<ImageRecord>()?.iter().any(|other| other.snapshot == image.snapshot);
            if used { Ok(()) } else { region.remove::<SnapshotRecord>(&image.snapshot.0) }
        };
        self.store().locked(replace).await.with_context(|| format!("deregistering {id}"))?;
        Ok(Some(id))
    }

    async fn remove(&self, id: &ImageId, snapshot: &SnapshotId) -> Result<()> {
        self.deregister(id).await.with_context(|| format!("deregistering {id}"))?;
        let used = self.images(None).await?.iter().any(|other| other.snapshot == *snapshot);
        if used { Ok(()) } else { self.delete_snapshot(snapshot).await }
            .with_context(|| format!("deleting {snapshot}, the snapshot of {id}"))
    }

    fn removal_command(&self, id: &ImageId) -> String {
        format!("oven images remove {id}")
    }

    async fn stale_runs(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>> {
        self.stale(older_than).await
    }

    async fn tidy(&self) -> Result<()> {
        self.remove_orphans().await
    }

    fn disk_copier(&self) -> Option<&dyn DiskCopier> {
        Some(self)
    }

    fn has_foreign_images(&self) -> bool {
        false
    }

    fn is_on_this_machine(&self) -> bool {
        true
    }

    fn has_credentials(&self) -> bool {
        false
    }
}

impl Region {
    async fn named(&self, pattern: &str) -> Result<Option<ImageRecord>> {
        let mut images: Vec<ImageRecord> = self.store().list()?;
        images.retain(|image| crate::cloud::ec2_rules::matches_filter(pattern, &image.name));
        self.newest(images).await
    }

    async fn tagged(&self, key: &str, value: &str) -> Result<Option<ImageRecord>> {
        self.newest(self.store().tagged(key, value)?).await
    }

    /// Returns the error for a base that was not found. The error's hint names the image with the most similar name, if
    /// any name is similar.
    fn no_such_base(&self, from: &BaseRef, missing: impl Fn(&str) -> Failure) -> Result<Failure> {
        let images: Vec<ImageRecord> = self.store().list()?;
        let import = "Import a raw disk image under that name with `oven import RAW --name NAME`.";
        if images.is_empty() {
            let why = format!("the local region {} is empty", self.dir().display());
            return Ok(missing(&why).hint(import));
        }
        let why = format!("no available image matches ({} images in {})", images.len(), self.dir().display());
        let wanted = if let BaseRef::Name { name, .. } = from { name.as_str() } else { "" };
        let similarity = |image: &&ImageRecord| (strsim::jaro_winkler(wanted, &image.name) * 1000.0) as u64;
        let nearest = images.iter().max_by_key(similarity).filter(|image| similarity(image) > 800);
        Ok(missing(&why).hint(match nearest {
            Some(image) => format!("Did you mean {}? `oven images list` lists all of them.", image.name),
            None => format!("`oven images list` lists them. {import}"),
        }))
    }
}
