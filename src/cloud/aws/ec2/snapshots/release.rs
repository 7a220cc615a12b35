//! Removes the volumes and snapshots that a run, which is a single bake, created. If the answer to a call was lost,
//! oven first finds out whether that call created a volume or snapshot.

use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::errors::{CREATE_VOLUME, DELETE_VOLUME, ErrorClass};
use crate::cloud::aws::ec2::images::convert;
use crate::cloud::aws::ec2::images::convert::{filter, from_tags, tag_filter};
use crate::cloud::aws::ec2::volumes::{ABSENT_POLLS, current_attachment, send_create_volume, state_text};
use crate::cloud::tag;
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId, VolumeId};
use crate::sys::poll::{PollAnswer, poll_until};
use anyhow::{Context, Result};
use aws_sdk_ec2::types::{self, VolumeAttachmentState, VolumeState};
use std::collections::BTreeMap;

/// The number of polls after which DetachVolume is sent again, if the volume is still attached.
const DETACH_EVERY: u32 = 4;
/// The number of polls after which DeleteVolume is tried again, if the volume is still being created.
const DELETE_EVERY: u32 = 4;
/// The minimum age of a volume before oven tests its client token, in units of
/// [`Timeouts::first_poll`](crate::cloud::aws::ec2::Timeouts). EC2 recognizes a repeated CreateVolume by this token. If
/// EC2 does not show the volume and refuses its token, the volume counts as removed.
const GONE_POLLS: u32 = 8;

impl Ec2 {
    pub(crate) async fn remove_volumes(&self, run: &RunId) -> Result<()> {
        self.0.made.settled(run).await;
        self.resolve_volume(run).await?;
        // The key is the volume's id. The value is EC2's description of the volume, if EC2 shows it.
        let mut volumes: BTreeMap<String, Option<types::Volume>> =
            self.0.made.with_run(run, |run| run.volumes.iter().map(|id| (id.clone(), None)).collect());
        for volume in self.volumes(&run.0, &[tag_filter(tag::RUN, &run.0)]).await? {
            volumes.insert(convert::id("vol", volume.volume_id.as_deref())?, Some(volume));
        }
        // All volumes are tried, so that a stuck volume does not prevent the removal of the others.
        let mut result = Ok(());
        for (id, described) in volumes {
            let id = VolumeId(id);
            let removed = self.remove_volume(&id, run, described).await;
            if removed.is_ok() {
                self.0.made.with_run(run, |run| run.volumes.remove(&id.0));
            }
            result = result.and(removed.with_context(|| format!("deleting {id}")));
        }
        result
    }

    /// If the answer to CreateVolume was lost, sends the call again with the same client token. If the first call did
    /// create a volume, EC2 returns that volume's id. Otherwise, the second call creates a volume. In both cases, EC2's
    /// answer contains the id of the volume to delete.
    async fn resolve_volume(&self, run: &RunId) -> Result<()> {
        let Some(request) = self.0.made.with_run(run, |run| run.doubtful_volume.clone()) else {
            return Ok(());
        };
        let what = format!("to find out what was created for run {run}");
        match self
            .call(&CREATE_VOLUME, &what, |client| send_create_volume(request.clone(), client.clone()))
            .await
        {
            Ok(volume) => {
                let id = convert::id("vol", volume.volume_id.as_deref())?;
                self.born(&id);
                self.0.made.with_run(run, |run| {
                    run.volumes.insert(id);
                    run.doubtful_volume = None;
                });
                Ok(())
            }
            Err(refused) if refused.class == ErrorClass::Ambiguous => Err(refused.into()),
            // The outcome of the first call is still unknown, so `doubtful_volume` remains set.
            Err(refused)
                if matches!(refused.class, ErrorClass::Throttled | ErrorClass::CredentialsExpired) =>
            {
                Err(refused.into())
            }
            // EC2 refused the second call. Either the first call was also refused, or its volume no longer exists, or
            // the caller finds the volume by the run's tag.
            Err(_) => {
                self.0.made.with_run(run, |run| run.doubtful_volume = None);
                Ok(())
            }
        }
    }

    async fn remove_volume(
        &self,
        id: &VolumeId,
        run: &RunId,
        mut described: Option<types::Volume>,
    ) -> Result<()> {
        let is_ours = self.0.made.with_run(run, |run| run.volumes.contains(&id.0));
        if is_ours {
            // A bake that was cancelled may not have recorded that the volume is new. So this is done here.
            self.born(&id.0);
        }
        let mut known = described.is_some();
        let request = self.0.made.with_run(run, |run| run.requests.get(&id.0).cloned());
        let (mut polls, mut absent) = (0, 0);
        poll_until(
            &format!("the release of {id}"),
            &self.timeouts().until(self.timeouts().released),
            async || {
                let found = match described.take() {
                    Some(volume) => Some(volume),
                    None => self.volume(id).await?,
                };
                let Some(volume) = found else {
                    // EC2 does not show the volume. Either the volume does not exist, or it is not visible yet, or
                    // EC2's answer is stale. In all three cases, DeleteVolume is sent.
                    let tried = self.try_delete(id, &mut known).await?;
                    absent += 1;
                    // If EC2 lacks the permission for a volume's KMS key, EC2 removes the volume. After that, EC2
                    // refuses the volume's client token. EC2 also refuses the token of a failed volume that exists but
                    // is not visible yet. An old volume would be visible. So the token is tested only if the volume has
                    // a minimum age.
                    let old =
                        self.age(&id.0).is_none_or(|age| age >= self.timeouts().first_poll * GONE_POLLS);
                    let asked = matches!(tried, PollAnswer::NotYet(_)) && absent % ABSENT_POLLS == 0 && old;
                    if let Some(request) = request.as_ref().filter(|_| asked)
                        && self.is_token_used_up(run, request).await?
                    {
                        return Ok(PollAnswer::Ready(()));
                    }
                    return Ok(tried);
                };
                known = true;
                // A volume that this process created for the run is deleted even if its tags are not visible yet.
                if !is_ours && from_tags(volume.tags()).get(tag::RUN) != Some(&run.0) {
                    return Err(Kind::Cloud
                        .error(format!("oven does not delete {id}, because it lacks the tag of run {run}")));
                }
                match (&volume.state, current_attachment(&volume)) {
                    (Some(VolumeState::Deleting | VolumeState::Deleted), _) => Ok(PollAnswer::Ready(())),
                    (_, Some(a)) => {
                        // DetachVolume is sent again every few polls. If EC2 used a stale state for an earlier call,
                        // that call had no effect.
                        let under_way =
                            matches!(a.state, VolumeAttachmentState::Detaching | VolumeAttachmentState::Busy);
                        if !under_way && polls % DETACH_EVERY == 0 {
                            self.detach(id).await?;
                        }
                        polls += 1;
                        Ok(PollAnswer::NotYet(match a.state {
                            VolumeAttachmentState::Busy => "busy, because something uses it".to_owned(),
                            state => state.as_str().to_owned(),
                        }))
                    }
                    // EC2 usually refuses to delete a volume that is being created. But if the creation is stuck, EC2
                    // does delete the volume. So DeleteVolume is tried from time to time.
                    (state, None) => {
                        let creating = *state == Some(VolumeState::Creating);
                        polls += 1;
                        if creating && polls % DELETE_EVERY != 0 {
                            return Ok(PollAnswer::NotYet(state_text(&volume).to_owned()));
                        }
                        match self.try_delete(id, &mut known).await? {
                            PollAnswer::NotYet(_) if creating => {
                                Ok(PollAnswer::NotYet(state_text(&volume).to_owned()))
                            }
                            tried => Ok(tried),
                        }
                    }
                }
            },
        )
        .await
    }

    /// Sends DeleteVolume. Sets `known` if the answer shows that EC2 knows the volume.
    async fn try_delete(&self, id: &VolumeId, known: &mut bool) -> Result<PollAnswer<()>> {
        let sent =
            self.call(&DELETE_VOLUME, &id.0, |client| client.delete_volume().volume_id(&id.0).send()).await;
        match sent {
            Ok(_) => Ok(PollAnswer::Ready(())),
            Err(refused) if refused.class == ErrorClass::AlreadyDone && !*known && self.is_unseen(&id.0) => {
                Ok(PollAnswer::NotYet("not visible".to_owned()))
            }
            Err(refused) if refused.class == ErrorClass::AlreadyDone => Ok(PollAnswer::Ready(())),
            // EC2's last description of the volume was stale. The volume is attached, or still being created.
            Err(refused) if refused.is("VolumeInUse") || refused.is("IncorrectState") => {
                *known = true;
                let state = if refused.is("VolumeInUse") { "in use" } else { "not ready to be deleted" };
                Ok(PollAnswer::NotYet(state.to_owned()))
            }
            Err(refused) => Err(refused.into()),
        }
    }

    pub(crate) async fn remove_snapshots(&self, run: &RunId) -> Result<()> {
        self.0.made.settled(run).await;
        if let Some(volume) = self.0.made.with_run(run, |run| run.doubtful_snapshot.clone()) {
            let found = self.find_lost_snapshot(&volume, run).await?;
            self.0.made.with_run(run, |run| {
                run.snapshots.extend(found);
                run.doubtful_snapshot = None;
            });
        }
        let mut ids = self.0.made.with_run(run, |run| run.snapshots.clone());
        ids.iter().for_each(|id| self.born(id));
        for snapshot in self.snapshots(&run.0, &[tag_filter(tag::RUN, &run.0)]).await? {
            ids.insert(convert::id("snap", snapshot.snapshot_id.as_deref())?);
        }
        // EC2 still shows deleted snapshots for a while. These are not deleted again.
        let deleted = self.0.made.with_run(run, |run| run.deleted.clone());
        ids.retain(|id| !deleted.contains(id));
        let mut result = Ok(());
        for id in ids {
            let id = SnapshotId(id);
            let removed = self.remove_snapshot(&id).await;
            if removed.is_ok() {
                self.0.made.with_run(run, |run| run.snapshots.remove(&id.0));
            }
            result = result.and(removed.with_context(|| format!("deleting {id}")));
        }
        result
    }

    /// Deletes a snapshot, unless an image uses it. The snapshot of an image is the result of a bake, so this function
    /// then returns `Ok` without deleting the snapshot.
    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let policy = self.timeouts().until(self.timeouts().released);
        poll_until(&format!("the release of {id}"), &policy, async || {
            match self.send_delete(id).await {
                Ok(()) => Ok(PollAnswer::Ready(())),
                Err(refused) if refused.class == ErrorClass::AlreadyDone && self.is_unseen(&id.0) => {
                    Ok(PollAnswer::NotYet("not visible".to_owned()))
                }
                Err(refused) if refused.class == ErrorClass::AlreadyDone => Ok(PollAnswer::Ready(())),
                Err(refused) if refused.is("InvalidSnapshot.InUse") => {
                    let used = filter("block-device-mapping.snapshot-id", [id.0.as_str()]);
                    let images = self.own_images(&id.0, &[used]).await?;
                    Ok(if images.iter().any(is_registered) {
                        PollAnswer::Ready(())
                    } else {
                        // The image that uses the snapshot is not visible yet, or was deregistered just now. In both
                        // cases, the next poll shows more.
                        PollAnswer::NotYet("in use".to_owned())
                    })
                }
                Err(refused) => Err(refused.into()),
            }
        })
        .await
    }
}

/// Returns whether an image is still registered.
pub fn is_registered(image: &types::Image) -> bool {
    image.state != Some(types::ImageState::Deregistered)
}
