//! Removes what a run created: detaches and deletes it, and looks for what a call with a lost answer may have created.

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

/// A volume that is still attached is detached again every so many polls.
const DETACH_EVERY: u32 = 4;
/// Deletion of a volume that is still being created is tried every so many polls.
const DELETE_EVERY: u32 = 4;
/// A volume is gone if it was not visible for this many times [`Timeouts::first_poll`](crate::cloud::aws::ec2::Timeouts) and its token was used up.
const GONE_POLLS: u32 = 8;

impl Ec2 {
    pub(crate) async fn remove_volumes(&self, run: &RunId) -> Result<()> {
        self.0.made.settled(run).await;
        self.resolve_volume(run).await?;
        // By id: the volume's description, if EC2 showed it.
        let mut volumes: BTreeMap<String, Option<types::Volume>> =
            self.0.made.of(run, |run| run.volumes.iter().map(|id| (id.clone(), None)).collect());
        for volume in self.volumes(&run.0, &[tag_filter(tag::RUN, &run.0)]).await? {
            volumes.insert(convert::id("vol", volume.volume_id.as_deref())?, Some(volume));
        }
        // All are tried: a volume that is stuck does not keep the others from being removed.
        let mut first = Ok(());
        for (id, described) in volumes {
            let id = VolumeId(id);
            let removed = self.remove_volume(&id, run, described).await;
            if removed.is_ok() {
                self.0.made.of(run, |run| run.volumes.remove(&id.0));
            }
            first = first.and(removed.with_context(|| format!("deleting {id}")));
        }
        first
    }

    /// Sends a call again that may have created a volume: EC2 recognizes the token and answers with that volume. If the
    /// first call never arrived, this one creates a volume, whose id is then known.
    async fn resolve_volume(&self, run: &RunId) -> Result<()> {
        let Some(request) = self.0.made.of(run, |run| run.doubtful_volume.clone()) else { return Ok(()) };
        let what = format!("to find out what was created for run {run}");
        match self
            .call(&CREATE_VOLUME, &what, |client| send_create_volume(request.clone(), client.clone()))
            .await
        {
            Ok(volume) => {
                let id = convert::id("vol", volume.volume_id.as_deref())?;
                self.born(&id);
                self.0.made.of(run, |run| {
                    run.volumes.insert(id);
                    run.doubtful_volume = None;
                });
                Ok(())
            }
            Err(refused) if refused.class == ErrorClass::Lost => Err(refused.into()),
            // The outcome is still unknown.
            Err(refused) if matches!(refused.class, ErrorClass::Throttled | ErrorClass::Expired) => {
                Err(refused.into())
            }
            // It was refused: then the first call was refused too, or its volume is gone or is found by its tag.
            Err(_) => {
                self.0.made.of(run, |run| run.doubtful_volume = None);
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
        let is_ours = self.0.made.of(run, |run| run.volumes.contains(&id.0));
        if is_ours {
            // The bake may have been cancelled before it recorded the id.
            self.born(&id.0);
        }
        let mut known = described.is_some();
        let request = self.0.made.of(run, |run| run.requests.get(&id.0).cloned());
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
                    // It is gone, or so new that it is not visible yet, or the answer is stale: DeleteVolume decides.
                    let tried = self.try_delete(id, &mut known).await?;
                    absent += 1;
                    // Or EC2 removed it because it may not use its key: then its token is used up. So is that of a volume
                    // that failed, which may not be visible yet.
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
                // A volume that this process created is ours, even if its tags are not visible yet.
                if !is_ours && from_tags(volume.tags()).get(tag::RUN) != Some(&run.0) {
                    return Err(Kind::Cloud
                        .error(format!("oven does not delete {id}, because it lacks the tag of run {run}")));
                }
                match (&volume.state, current_attachment(&volume)) {
                    (Some(VolumeState::Deleting | VolumeState::Deleted), _) => Ok(PollAnswer::Ready(())),
                    (_, Some(a)) => {
                        // Detaching is repeated now and then: EC2 may have answered with an earlier state.
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
                    // EC2 refuses to delete it until it is created; it does delete one that never will be.
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

    /// Sets `known` if EC2 knows the volume.
    async fn try_delete(&self, id: &VolumeId, known: &mut bool) -> Result<PollAnswer<()>> {
        let sent =
            self.call(&DELETE_VOLUME, &id.0, |client| client.delete_volume().volume_id(&id.0).send()).await;
        match sent {
            Ok(_) => Ok(PollAnswer::Ready(())),
            Err(refused) if refused.class == ErrorClass::Done && !*known && self.is_unseen(&id.0) => {
                Ok(PollAnswer::NotYet("not visible".to_owned()))
            }
            Err(refused) if refused.class == ErrorClass::Done => Ok(PollAnswer::Ready(())),
            // The last description was stale: it is attached, or still being created.
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
        if let Some(volume) = self.0.made.of(run, |run| run.doubtful_snapshot.clone()) {
            let found = self.find_lost_snapshot(&volume, run).await?;
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
        // EC2 may show deleted ones for a while.
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

    /// Deletes a snapshot, unless an image uses it: then it is a result of a bake.
    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let policy = self.timeouts().until(self.timeouts().released);
        poll_until(&format!("the release of {id}"), &policy, async || {
            match self.send_delete(id).await {
                Ok(()) => Ok(PollAnswer::Ready(())),
                Err(refused) if refused.class == ErrorClass::Done && self.is_unseen(&id.0) => {
                    Ok(PollAnswer::NotYet("not visible".to_owned()))
                }
                Err(refused) if refused.class == ErrorClass::Done => Ok(PollAnswer::Ready(())),
                Err(refused) if refused.is("InvalidSnapshot.InUse") => {
                    let used = filter("block-device-mapping.snapshot-id", [id.0.as_str()]);
                    let images = self.own_images(&id.0, &[used]).await?;
                    Ok(if images.iter().any(is_registered) {
                        PollAnswer::Ready(())
                    } else {
                        // Its image was deregistered or registered just now.
                        PollAnswer::NotYet("in use".to_owned())
                    })
                }
                Err(refused) => Err(refused.into()),
            }
        })
        .await
    }
}

/// Whether an image is still registered.
pub fn is_registered(image: &types::Image) -> bool {
    image.state != Some(types::ImageState::Deregistered)
}
