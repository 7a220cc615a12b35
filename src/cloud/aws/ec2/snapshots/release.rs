//! What a run made is removed: detached, deleted, and looked for where a call's answer was lost.

use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::errors::{CREATE_VOLUME, Class, DELETE_VOLUME};
use crate::cloud::aws::ec2::images::convert;
use crate::cloud::aws::ec2::images::convert::{filter, from_tags, tag_filter};
use crate::cloud::aws::ec2::volumes::{LOOKS, attachment, send, state_of};
use crate::cloud::tag;
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId, VolumeId};
use crate::sys::poll::{Probe, until};
use anyhow::{Context, Result};
use aws_sdk_ec2::types::{self, VolumeAttachmentState, VolumeState};
use std::collections::BTreeMap;

/// A volume that is attached in so many looks in a row is detached once more.
const DETACH_EVERY: u32 = 4;
/// A volume that is being created in so many looks is tried to be deleted all the same.
const DELETE_EVERY: u32 = 4;
/// A volume that is not to be seen for so many times [`Pace::look`](crate::cloud::aws::ec2::Pace), and whose token is burned, is no more.
const TAKEN_BACK: u32 = 8;

impl Ec2 {
    pub(crate) async fn remove_volumes(&self, run: &RunId) -> Result<()> {
        self.0.made.settled(run).await;
        self.resolve_volume(run).await?;
        // By id: what is known of a volume, if it was seen.
        let mut volumes: BTreeMap<String, Option<types::Volume>> =
            self.0.made.of(run, |run| run.volumes.iter().map(|id| (id.clone(), None)).collect());
        for volume in self.volumes(&run.0, &[tag_filter(tag::RUN, &run.0)]).await? {
            volumes.insert(convert::id("vol", volume.volume_id.as_deref())?, Some(volume));
        }
        // All are tried: one that is stuck keeps nobody from removing the others.
        let mut first = Ok(());
        for (id, seen) in volumes {
            let id = VolumeId(id);
            let removed = self.remove_volume(&id, run, seen).await;
            if removed.is_ok() {
                self.0.made.of(run, |run| run.volumes.remove(&id.0));
            }
            first = first.and(removed.with_context(|| format!("deleting {id}")));
        }
        first
    }

    /// A call that may have made a volume is sent again: with its token, EC2 answers with that volume. If it never
    /// arrived, it makes one now, which is known then.
    async fn resolve_volume(&self, run: &RunId) -> Result<()> {
        let Some(request) = self.0.made.of(run, |run| run.doubtful_volume.clone()) else { return Ok(()) };
        let what = format!("to learn what was made for run {run}");
        match self.call(&CREATE_VOLUME, &what, |client| send(request.clone(), client.clone())).await {
            Ok(volume) => {
                let id = convert::id("vol", volume.volume_id.as_deref())?;
                self.born(&id);
                self.0.made.of(run, |run| {
                    run.volumes.insert(id);
                    run.doubtful_volume = None;
                });
                Ok(())
            }
            Err(refused) if refused.class == Class::Lost => Err(refused.into()),
            // It still is not known.
            Err(refused) if matches!(refused.class, Class::Throttled | Class::Expired) => Err(refused.into()),
            // Refused: so the first one was, or what it made is gone, or is found by its tag.
            Err(_) => {
                self.0.made.of(run, |run| run.doubtful_volume = None);
                Ok(())
            }
        }
    }

    async fn remove_volume(&self, id: &VolumeId, run: &RunId, mut seen: Option<types::Volume>) -> Result<()> {
        let made = self.0.made.of(run, |run| run.volumes.contains(&id.0));
        if made {
            // The story may have been stopped before it took note.
            self.born(&id.0);
        }
        let mut ever = seen.is_some();
        let request = self.0.made.of(run, |run| run.requests.get(&id.0).cloned());
        let (mut looks, mut unseen) = (0, 0);
        until(&format!("the release of {id}"), &self.pace().until(self.pace().released), async || {
            let found = match seen.take() {
                Some(volume) => Some(volume),
                None => self.volume(id).await?,
            };
            let Some(volume) = found else {
                // Gone, or so new that it does not show yet, or a stale answer: DeleteVolume's word counts.
                let tried = self.try_delete(id, &mut ever).await?;
                unseen += 1;
                // Or EC2 took it back, as one whose key it may not use: its token is burned then. So is that of one that
                // failed, which may not show yet.
                let old = self.age(&id.0).is_none_or(|age| age >= self.pace().look * TAKEN_BACK);
                let asked = matches!(tried, Probe::NotYet(_)) && unseen % LOOKS == 0 && old;
                if let Some(request) = request.as_ref().filter(|_| asked)
                    && self.is_burned(run, request).await?
                {
                    return Ok(Probe::Ready(()));
                }
                return Ok(tried);
            };
            ever = true;
            // What we made ourselves is ours, even if its tags do not show yet.
            if !made && from_tags(volume.tags()).get(tag::RUN) != Some(&run.0) {
                return Err(Kind::Cloud.error(format!("{id} does not carry the tag of run {run}: it stays")));
            }
            match (&volume.state, attachment(&volume)) {
                (Some(VolumeState::Deleting | VolumeState::Deleted), _) => Ok(Probe::Ready(())),
                (_, Some(a)) => {
                    // Sent again now and then: EC2 may have answered with what was true before.
                    let under_way =
                        matches!(a.state, VolumeAttachmentState::Detaching | VolumeAttachmentState::Busy);
                    if !under_way && looks % DETACH_EVERY == 0 {
                        self.detach(id).await?;
                    }
                    looks += 1;
                    Ok(Probe::NotYet(match a.state {
                        VolumeAttachmentState::Busy => "busy: something still uses it".to_owned(),
                        state => state.as_str().to_owned(),
                    }))
                }
                // EC2 refuses to delete it until it is made; one that never is, it deletes.
                (state, None) => {
                    let creating = *state == Some(VolumeState::Creating);
                    looks += 1;
                    if creating && looks % DELETE_EVERY != 0 {
                        return Ok(Probe::NotYet(state_of(&volume).to_owned()));
                    }
                    match self.try_delete(id, &mut ever).await? {
                        Probe::NotYet(_) if creating => Ok(Probe::NotYet(state_of(&volume).to_owned())),
                        tried => Ok(tried),
                    }
                }
            }
        })
        .await
    }

    /// `ever` becomes true where EC2 knows the volume.
    async fn try_delete(&self, id: &VolumeId, ever: &mut bool) -> Result<Probe<()>> {
        let sent =
            self.call(&DELETE_VOLUME, &id.0, |client| client.delete_volume().volume_id(&id.0).send()).await;
        match sent {
            Ok(_) => Ok(Probe::Ready(())),
            Err(refused) if refused.class == Class::Done && !*ever && self.is_unseen(&id.0) => {
                Ok(Probe::NotYet("not to be seen".to_owned()))
            }
            Err(refused) if refused.class == Class::Done => Ok(Probe::Ready(())),
            // A stale look: it is attached, or still being made.
            Err(refused) if refused.is("VolumeInUse") || refused.is("IncorrectState") => {
                *ever = true;
                let state = if refused.is("VolumeInUse") { "in use" } else { "not ready to be deleted" };
                Ok(Probe::NotYet(state.to_owned()))
            }
            Err(refused) => Err(refused.into()),
        }
    }

    pub(crate) async fn remove_snapshots(&self, run: &RunId) -> Result<()> {
        self.0.made.settled(run).await;
        if let Some(volume) = self.0.made.of(run, |run| run.doubtful_snapshot.clone()) {
            let found = self.lost_snapshot(&volume, run).await?;
            self.0.made.of(run, |run| {
                run.snapshots.extend(found);
                run.doubtful_snapshot = None;
            });
        }
        let mut ids = self.0.made.of(run, |run| run.snapshots.clone());
        ids.iter().for_each(|id| self.born(id));
        for snapshot in self.snapshots(&run.0, &[tag_filter(tag::RUN, &run.0)]).await? {
            ids.insert(convert::id("snap", snapshot.snapshot_id.as_deref())?);
        }
        // They may show for a while.
        let deleted = self.0.made.of(run, |run| run.deleted.clone());
        ids.retain(|id| !deleted.contains(id));
        let mut first = Ok(());
        for id in ids {
            let id = SnapshotId(id);
            let removed = self.remove_snapshot(&id).await;
            if removed.is_ok() {
                self.0.made.of(run, |run| run.snapshots.remove(&id.0));
            }
            first = first.and(removed.with_context(|| format!("deleting {id}")));
        }
        first
    }

    /// Deletes a snapshot, unless an image uses it: then it is a result.
    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let policy = self.pace().until(self.pace().released);
        until(&format!("the release of {id}"), &policy, async || {
            match self.send_delete(id).await {
                Ok(()) => Ok(Probe::Ready(())),
                Err(refused) if refused.class == Class::Done && self.is_unseen(&id.0) => {
                    Ok(Probe::NotYet("not to be seen".to_owned()))
                }
                Err(refused) if refused.class == Class::Done => Ok(Probe::Ready(())),
                Err(refused) if refused.is("InvalidSnapshot.InUse") => {
                    let used = filter("block-device-mapping.snapshot-id", [id.0.as_str()]);
                    let images = self.own_images(&id.0, &[used]).await?;
                    Ok(if images.iter().any(holds) {
                        Probe::Ready(())
                    } else {
                        // Its image was deregistered just now, or was registered just now.
                        Probe::NotYet("in use".to_owned())
                    })
                }
                Err(refused) => Err(refused.into()),
            }
        })
        .await
    }
}

/// Whether an image is registered still.
pub fn holds(image: &types::Image) -> bool {
    image.state != Some(types::ImageState::Deregistered)
}
