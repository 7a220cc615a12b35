//! Attached disks (`disks = "attached"`). oven creates a volume from the base's snapshot, attaches it, and makes a
//! snapshot of the volume.

use super::{Disk, DiskSpec, DiskStrategy, with_owner_tags};
use crate::cloud::{Base, Tags, VolumeSpec, Volumes};
use crate::device::Device;
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId, VolumeId};
use crate::sys::space;
use crate::transfer::upload::OnProgress;
use crate::undo;
use crate::undo::{Debt, DebtId, Due, Undo};
use anyhow::{Context, Result};
use async_trait::async_trait;
use std::fs::File;
use std::path::Path;
use std::rc::Rc;

/// Creates disks as volumes.
pub struct AttachedDisks<V: Volumes> {
    volumes: Rc<V>,
}

impl<V: Volumes + 'static> AttachedDisks<V> {
    pub fn new(volumes: Rc<V>) -> Self {
        Self { volumes }
    }

    fn disk(
        &self,
        run: &RunId,
        volume: VolumeId,
        device: Device,
        tags: Tags,
        debt: Option<DebtId>,
    ) -> Box<dyn Disk> {
        Box::new(AttachedDisk { volumes: self.volumes.clone(), run: run.clone(), volume, device, tags, debt })
    }
}

struct AttachedDisk<V: Volumes> {
    volumes: Rc<V>,
    run: RunId,
    volume: VolumeId,
    device: Device,
    tags: Tags,
    /// The clean-up action that removes the volume.
    debt: Option<DebtId>,
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
impl<V: Volumes + 'static> DiskStrategy for AttachedDisks<V> {
    async fn checkout(
        &self,
        base: &Base,
        spec: &DiskSpec,
        run: &RunId,
        undo: &Undo,
    ) -> Result<Box<dyn Disk>> {
        let size_gib = spec.size_gib_on(base)?;
        let tags = with_owner_tags(&spec.tags, run);
        let debt = undo.owe(volumes_debt(&self.volumes, run));
        if let Some(dir) = self.volumes.directory().map(Path::to_owned) {
            undo.explain(move || space::full_disk_error(&dir));
        }
        let spec = VolumeSpec {
            snapshot: base.snapshot.clone(),
            size_gib,
            kind: spec.kind.clone(),
            run: run.clone(),
            tags: tags.clone(),
        };
        let context = || format!("creating a volume from {} ({})", base.snapshot, base.id);
        let volume = self.volumes.create(&spec).await.with_context(context)?;
        let device = self.volumes.attach(&volume).await?;
        Ok(self.disk(run, volume, device, tags, Some(debt)))
    }

    async fn reopen(&self, run: &RunId) -> Result<Box<dyn Disk>> {
        let volume = self.volumes.kept(run).await?.ok_or_else(|| {
            let text = format!("run {run} has no preserved volume");
            Kind::NotFound
                .failure(text)
                .hint("With --keep-on-failure, a bake that fails preserves its volume.")
        })?;
        let device = self.volumes.attach(&volume).await?;
        Ok(self.disk(run, volume, device, with_owner_tags(&Tags::new(), run), None))
    }

    async fn forget(&self, run: &RunId) -> Result<()> {
        // The snapshots are removed even if a volume cannot be removed.
        let volumes = self.volumes.ensure_no_volumes(run).await;
        let snapshots = self.volumes.ensure_no_snapshots(run).await;
        volumes.and(snapshots).with_context(|| format!("removing the leftovers of run {run}"))
    }
}

#[async_trait(?Send)]
impl<V: Volumes + 'static> Disk for AttachedDisk<V> {
    fn device(&self) -> &Device {
        &self.device
    }

    async fn commit(self: Box<Self>, undo: &Undo, _: OnProgress<'_>) -> Result<SnapshotId> {
        let Self { volumes, run, volume, device, tags, debt } = *self;
        let path = device.path.clone();
        // The kernel reports some write errors only at a sync. A disk with such an error must not become an image.
        let node = File::from(device.node.try_clone().context("duplicating a descriptor")?);
        crate::sys::tasks::run(move |_| Ok(node.sync_all()?))
            .await
            .with_context(|| format!("syncing {} ({volume})", path.display()))?;
        undo.owe(snapshots_debt(&volumes, &run));
        // The device is closed before the snapshot is taken. Then nobody can write to the volume, so a local region can
        // take the snapshot without copying the volume. On EC2, an open device would delay detaching.
        drop(device);
        let snapshot = volumes.snapshot(&volume, &run, &tags).await;
        let snapshot = snapshot.with_context(|| format!("taking a snapshot of {volume}"))?;
        // The snapshot is complete, so the volume is no longer needed.
        if let (Some(debt), Some(removal)) = (debt, volumes.removal(&run)) {
            undo.pay_early(debt, removal);
        }
        Ok(snapshot)
    }
}
