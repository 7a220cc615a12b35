//! Takes and deletes snapshots. CreateSnapshot accepts no client token, by which EC2 would recognize a repeated call.
//! So if the answer to a call is lost, oven searches for the snapshot before it sends the call again.

pub mod release;
pub mod snapshot_copy;
pub mod snapshot_parent;
pub mod sweep;

use super::Ec2;
use super::client::call::{ApiError, ok_if_already_done};
use super::client::errors::{CREATE_SNAPSHOT, DELETE_SNAPSHOT, DESCRIBE_SNAPSHOTS, ErrorClass};
use super::images::PAGE;
use super::images::convert;
use super::images::convert::{filter, tag_filter};
use crate::cloud::{Tags, tag};
use crate::error::Kind;
use crate::ids::{RunId, SnapshotId, VolumeId};
use crate::sys::poll::{PollAnswer, poll_until, wait_with_background};
use crate::sys::tasks;
use anyhow::Result;
use aws_sdk_ec2::types::{self, ResourceType, SnapshotState};
use tokio::time::{Instant, sleep};

/// The minimum number of polls after the answer to a call was lost. If none of them finds a new snapshot, oven assumes
/// that the call created nothing.
const MIN_POLLS: u32 = 3;

impl Ec2 {
    pub(crate) async fn snapshots(
        &self,
        what: &str,
        filters: &[types::Filter],
    ) -> Result<Vec<types::Snapshot>, ApiError> {
        let (mut all, mut token) = (Vec::new(), None::<String>);
        loop {
            let send = |client: &aws_sdk_ec2::Client| {
                let call = client.describe_snapshots().owner_ids("self").max_results(PAGE);
                call.set_filters(Some(filters.to_vec())).set_next_token(token.clone()).send()
            };
            let page = self.call(&DESCRIBE_SNAPSHOTS, what, send).await?;
            all.extend(page.snapshots.unwrap_or_default());
            self.seen(all.iter().filter_map(|snapshot| snapshot.snapshot_id.as_deref()));
            token = page.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    pub(crate) async fn take_snapshot(
        &self,
        volume: &VolumeId,
        run: &RunId,
        tags: &Tags,
    ) -> Result<SnapshotId> {
        let tags = self.owned(tags, run)?;
        let mut failed = None;
        // If the snapshot fails, a second one is taken of the same volume.
        for _ in 0..2 {
            let (id, may_have_twin) = self.start_snapshot(volume, run, &tags).await?;
            // When EC2 answers the request, the snapshot's content can no longer change. So the volume is detached
            // while the snapshot is pending. The volume is not deleted, because a second snapshot of it is taken if the
            // first one fails. An error from `detach` is ignored, because the clean-up detaches the volume again.
            let detached = async { _ = self.detach(volume).await };
            let result = wait_with_background(self.completed(&id), detached).await?;
            if may_have_twin {
                self.delete_twins(volume, run, &id).await?;
            }
            match result {
                Ok(()) => return Ok(id),
                Err(error) => {
                    // If the deletion fails, both errors are reported. The clean-up tries to delete the snapshot again.
                    if let Err(refused) = self.delete_snapshot(&id, run).await {
                        return Err(
                            error.context(format!("{id} failed, and deleting it failed, too ({refused})"))
                        );
                    }
                    failed = Some(error);
                }
            }
        }
        Err(failed.expect("it failed twice"))
    }

    /// Starts a snapshot. Returns its id, and whether a call with a lost answer may have created a second snapshot.
    async fn start_snapshot(
        &self,
        volume: &VolumeId,
        run: &RunId,
        tags: &Tags,
    ) -> Result<(SnapshotId, bool)> {
        let mut may_have_twin = false;
        loop {
            let what = format!("of {volume}");
            let sent = self.repeat(&CREATE_SNAPSHOT, &what, async || {
                let request = self
                    .client()
                    .create_snapshot()
                    .volume_id(&volume.0)
                    .description(format!("oven {run}"))
                    .tag_specifications(convert::tag_specification(ResourceType::Snapshot, tags));
                let of = volume.clone();
                self.send_in_background(run, &CREATE_SNAPSHOT, &what, request.send(), |run, result| {
                    match result {
                        Ok(snapshot) => {
                            run.snapshots.extend(snapshot.snapshot_id.clone());
                            run.doubtful_snapshot = None;
                        }
                        Err(refused) if refused.class == ErrorClass::Ambiguous => {
                            run.doubtful_snapshot = Some(of)
                        }
                        Err(_) => {}
                    }
                })
                .await
            });
            let id = match sent.await {
                Ok(answer) => Some(convert::id("snap", answer.snapshot_id.as_deref())?),
                Err(refused) if refused.class == ErrorClass::Ambiguous => {
                    let found = self.find_lost_snapshot(volume, run).await?;
                    if found.is_none() && std::mem::replace(&mut may_have_twin, true) {
                        return Err(anyhow::Error::from(refused)
                            .context("the call was sent twice, but no snapshot is visible"));
                    }
                    may_have_twin = true;
                    found
                }
                Err(refused) => return Err(refused.into()),
            };
            if let Some(id) = id {
                self.born(&id);
                self.0.made.with_run(run, |run| {
                    run.snapshots.insert(id.clone());
                    run.doubtful_snapshot = None;
                });
                return Ok((SnapshotId(id), may_have_twin));
            }
        }
    }

    /// Searches for the snapshot that a call with a lost answer created. Such a snapshot has the run's tag, and this
    /// process has not recorded it yet. If the volume has several such snapshots, returns the oldest one.
    pub(crate) async fn find_lost_snapshot(&self, volume: &VolumeId, run: &RunId) -> Result<Option<String>> {
        let filters = [filter("volume-id", [volume.0.as_str()]), tag_filter(tag::RUN, &run.0)];
        let known = self.0.made.with_run(run, |run| &run.snapshots | &run.deleted);
        let (end, mut polls) = (Instant::now() + self.timeouts().lost_answer_window, 0);
        loop {
            let mut found = self.snapshots(&format!("of {volume}"), &filters).await?;
            found.retain(|snapshot| snapshot.snapshot_id.as_ref().is_some_and(|id| !known.contains(id)));
            if let Some(oldest) =
                found.iter().min_by_key(|snapshot| convert::time(snapshot.start_time.as_ref()))
            {
                return convert::id("snap", oldest.snapshot_id.as_deref()).map(Some);
            }
            polls += 1;
            if polls >= MIN_POLLS && Instant::now() >= end {
                return Ok(None);
            }
            let pause = (self.timeouts().lost_answer_window / 8).max(self.timeouts().first_poll);
            sleep(pause).await;
        }
    }

    /// Deletes the run's snapshots of the volume, except `keep`. There are several snapshots if the answer to a call
    /// was lost, and both this call and the repeated one created a snapshot.
    async fn delete_twins(&self, volume: &VolumeId, run: &RunId, keep: &SnapshotId) -> Result<()> {
        let filters = [filter("volume-id", [volume.0.as_str()]), tag_filter(tag::RUN, &run.0)];
        for twin in self.snapshots(&format!("of {volume}"), &filters).await? {
            let id = SnapshotId(convert::id("snap", twin.snapshot_id.as_deref())?);
            if id != *keep {
                self.delete_snapshot(&id, run).await?;
            }
        }
        Ok(())
    }

    pub(crate) async fn send_delete(&self, id: &SnapshotId) -> Result<(), ApiError> {
        self.call(&DELETE_SNAPSHOT, &id.0, |client| client.delete_snapshot().snapshot_id(&id.0).send())
            .await?;
        self.0.made.snapshot_deleted(id);
        Ok(())
    }

    /// Deletes a snapshot of the run, and records that it was deleted.
    async fn delete_snapshot(&self, id: &SnapshotId, run: &RunId) -> Result<(), ApiError> {
        ok_if_already_done(self.send_delete(id).await)?;
        self.0.made.with_run(run, |run| {
            run.snapshots.remove(&id.0);
            run.deleted.insert(id.0.clone());
        });
        Ok(())
    }

    /// Waits until a snapshot is complete. `Ok(Err(…))` means that the snapshot failed, and that another snapshot of
    /// the volume may succeed.
    pub(crate) async fn completed(&self, id: &SnapshotId) -> Result<Result<()>> {
        self.wait_before_first_poll().await;
        let begun = Instant::now();
        let mut last_seen = begun;
        // The deadline depends on the volume's size. It is set when a poll shows the size.
        let mut deadline = self.timeouts().snapshot;
        poll_until(
            &format!("the snapshot {id}"),
            &self.timeouts().frequent_polls(self.timeouts().snapshot_of(u64::MAX)),
            async || {
                let found = self.snapshots(&id.0, &[filter("snapshot-id", [id.0.as_str()])]).await?;
                let Some(snapshot) = found.first() else {
                    // A single answer without the snapshot may be stale, so polling continues.
                    if last_seen.elapsed() >= self.timeouts().visible {
                        return Err(Kind::Cloud.error(format!("the snapshot {id} is no longer visible")));
                    }
                    return Ok(PollAnswer::NotYet("not visible".to_owned()));
                };
                last_seen = Instant::now();
                if let Some(size) = snapshot.volume_size.and_then(|size| u64::try_from(size).ok()) {
                    deadline = self.timeouts().snapshot_of(size);
                }
                if let Some(percent) = snapshot.progress.as_deref().and_then(percentage) {
                    tasks::report_percent(percent);
                }
                let state = snapshot.state.as_ref().map_or("in no state", SnapshotState::as_str);
                match snapshot.state {
                    Some(SnapshotState::Completed) => Ok(PollAnswer::Ready(Ok(()))),
                    Some(SnapshotState::Error | SnapshotState::Recoverable | SnapshotState::Recovering) => {
                        let why = snapshot.state_message.as_deref().unwrap_or("EC2 gives no reason");
                        Ok(PollAnswer::Ready(Err(
                            Kind::Cloud.error(format!("the snapshot {id} is in the state {state}: {why}"))
                        )))
                    }
                    _ if begun.elapsed() >= deadline => {
                        let progress =
                            snapshot.progress.as_deref().filter(|text| !text.is_empty()).unwrap_or("0%");
                        let time = humantime::format_duration(deadline);
                        let text = format!(
                            "waiting for the snapshot {id}: after {time} it is still {state} ({progress})"
                        );
                        Err(Kind::Cloud.error(text))
                    }
                    _ => Ok(PollAnswer::NotYet(state.to_owned())),
                }
            },
        )
        .await
    }
}

/// Parses EC2's text for the progress of a snapshot, such as `45%`.
fn percentage(text: &str) -> Option<u64> {
    text.trim().trim_end_matches('%').parse().ok()
}
