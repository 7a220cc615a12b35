//! Strategy (a): a volume is made of the base's snapshot, attached, and becomes a snapshot again.

use super::{Disk, DiskSpec, Disks, owned};
use crate::cloud::{Base, Tags, VolumeSpec, Volumes};
use crate::device::Device;
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId, VolumeId};
use crate::undo;
use crate::undo::{Debt, DebtId, Due, Undo};
use anyhow::{Context, Result};
use async_trait::async_trait;
use std::fs::File;
use std::rc::Rc;

/// Disks that are volumes.
pub struct Attached<V: Volumes> {
    volumes: Rc<V>,
}

impl<V: Volumes + 'static> Attached<V> {
    pub fn new(volumes: Rc<V>) -> Self {
        Self { volumes }
    }

    fn disk(
        &self,
        run: &RunId,
        volume: VolumeId,
        device: Device,
        tags: Tags,
        owed: Option<DebtId>,
    ) -> Box<dyn Disk> {
        Box::new(AttachedDisk { volumes: self.volumes.clone(), run: run.clone(), volume, device, tags, owed })
    }
}

struct AttachedDisk<V: Volumes> {
    volumes: Rc<V>,
    run: RunId,
    volume: VolumeId,
    device: Device,
    tags: Tags,
    /// The debt for the volume.
    owed: Option<DebtId>,
}

fn volumes_debt<V: Volumes + 'static>(volumes: &Rc<V>, run: &RunId) -> Debt {
    let (pay, keep) = ((volumes.clone(), run.clone()), (volumes.clone(), run.clone()));
    Debt {
        due: Due::Scratch,
        what: format!("the volume of run {run}"),
        command: undo::sweep_command(run),
        pay: Box::new(move || Box::pin(async move { pay.0.ensure_no_volumes(&pay.1).await })),
        keep: Some(Box::new(move || Box::pin(async move { keep.0.keep(&keep.1).await.map(drop) }))),
    }
}

fn snapshots_debt<V: Volumes + 'static>(volumes: &Rc<V>, run: &RunId) -> Debt {
    let pay = (volumes.clone(), run.clone());
    Debt {
        due: Due::OnFailure,
        what: format!("the snapshot of run {run}"),
        command: undo::sweep_command(run),
        pay: Box::new(move || Box::pin(async move { pay.0.ensure_no_snapshots(&pay.1).await })),
        keep: None,
    }
}

#[async_trait(?Send)]
impl<V: Volumes + 'static> Disks for Attached<V> {
    async fn checkout(
        &self,
        base: &Base,
        spec: &DiskSpec,
        run: &RunId,
        undo: &Undo,
    ) -> Result<Box<dyn Disk>> {
        let size_gib = spec.size_on(base)?;
        let tags = owned(&spec.tags, run);
        let owed = undo.owe(volumes_debt(&self.volumes, run));
        let spec = VolumeSpec {
            snapshot: base.snapshot.clone(),
            size_gib,
            kind: spec.kind.clone(),
            run: run.clone(),
            tags: tags.clone(),
        };
        let context = || format!("making a volume of {} ({})", base.snapshot, base.id);
        let volume = self.volumes.create(&spec).await.with_context(context)?;
        let device = self.volumes.attach(&volume).await?;
        Ok(self.disk(run, volume, device, tags, Some(owed)))
    }

    async fn reopen(&self, run: &RunId) -> Result<Box<dyn Disk>> {
        let volume = self.volumes.kept(run).await?.ok_or_else(|| {
            let text = format!("no volume was kept of run {run}");
            Kind::NotFound.failure(text).hint("A bake keeps its volume with --keep-on-failure, if it fails.")
        })?;
        let device = self.volumes.attach(&volume).await?;
        Ok(self.disk(run, volume, device, owned(&Tags::new(), run), None))
    }

    async fn forget(&self, run: &RunId) -> Result<()> {
        // Both are tried: one that is stuck keeps nobody from removing the other.
        let volumes = self.volumes.ensure_no_volumes(run).await;
        let snapshots = self.volumes.ensure_no_snapshots(run).await;
        volumes.and(snapshots).with_context(|| format!("removing what run {run} left"))
    }
}

#[async_trait(?Send)]
impl<V: Volumes + 'static> Disk for AttachedDisk<V> {
    fn device(&self) -> &Device {
        &self.device
    }

    async fn commit(self: Box<Self>, undo: &Undo, _: &dyn Fn(u64)) -> Result<SnapshotId> {
        let Self { volumes, run, volume, device, tags, owed } = *self;
        let path = device.path.clone();
        // An error that only shows when data is written back: such a disk must not become an image.
        let node = File::from(device.node.try_clone().context("duplicating a descriptor")?);
        crate::sys::tasks::run(move |_| Ok(node.sync_all()?))
            .await
            .with_context(|| format!("writing {} ({volume}) to the disk", path.display()))?;
        undo.owe(snapshots_debt(&volumes, &run));
        // Released first: a region need not copy what nobody can write to any more, and on EC2 a device that is open
        // would only stand in the way of detaching.
        drop(device);
        let snapshot = volumes.snapshot(&volume, &run, &tags).await;
        let snapshot = snapshot.with_context(|| format!("taking a snapshot of {volume}"))?;
        // It is complete: nothing needs the volume any more.
        if let (Some(owed), Some(removal)) = (owed, volumes.removal(&run)) {
            undo.pay_early(owed, removal);
        }
        Ok(snapshot)
    }
}
