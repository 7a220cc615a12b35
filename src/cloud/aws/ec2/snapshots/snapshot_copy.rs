//! Copies snapshots into this account. Each copy has a tag that names its source. Later bakes find the copy by this tag
//! and use it. oven also uses the tag to find a copy if the answer to CopySnapshot was lost.

use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::call::{ApiError, ok_if_already_done};
use crate::cloud::aws::ec2::client::errors::{COPY_SNAPSHOT, ErrorClass};
use crate::cloud::aws::ec2::images::convert;
use crate::cloud::aws::ec2::images::convert::{tag_filter, tag_specification};
use crate::cloud::{Tags, VolumeKind, tag};
use crate::ids::SnapshotId;
use crate::sys::poll::{PollAnswer, poll_until};
use anyhow::Result;
use aws_sdk_ec2::types::{ResourceType, Snapshot, SnapshotState};
use tokio::time::{Instant, sleep};

/// The minimum number of polls after the answer to a call was lost. If none of them finds a copy, oven assumes that the
/// call created nothing.
const MIN_POLLS: u32 = 3;

/// Returns the value of the copy's tag. It is the source's id. If encryption is requested, the KMS key or the word
/// `encrypted` follows.
fn copy_name(of: &SnapshotId, kind: &VolumeKind) -> String {
    match (&kind.kms_key, kind.encrypted) {
        (Some(key), _) => format!("{of} {key}"),
        (None, Some(true)) => format!("{of} encrypted"),
        (None, _) => of.0.clone(),
    }
}

impl Ec2 {
    /// Returns a complete copy of a snapshot, and creates one if none exists. Calls `tell` once before it creates a
    /// copy or waits for one.
    pub(crate) async fn ensure_copy(
        &self,
        of: &SnapshotId,
        kind: &VolumeKind,
        tell: &dyn Fn(),
    ) -> Result<SnapshotId> {
        let name = copy_name(of, kind);
        // Only one bake of this process can create a copy at a time. The next bake then finds this copy.
        let guard = self.0.copying.lock().await;
        let (mut failed, mut announced) = (None, false);
        // If the copy fails, another one is created, but only once.
        for _ in 0..2 {
            let existing = self.copies(&name).await?.into_iter().next();
            let is_complete =
                existing.as_ref().is_some_and(|copy| copy.state == Some(SnapshotState::Completed));
            if !is_complete && !std::mem::replace(&mut announced, true) {
                tell();
            }
            let id = match existing {
                Some(copy) => SnapshotId(convert::id("snap", copy.snapshot_id.as_deref())?),
                None => {
                    let created = self.create_copy(of, kind, &name).await?;
                    self.born(&created.0);
                    // Another builder may have created a copy at the same time. All builders use the oldest copy. If
                    // this builder's copy is newer, this builder deletes it.
                    let id = self.wait_for_oldest(&name, &created).await?;
                    if id != created {
                        ok_if_already_done(self.send_delete(&created).await)?;
                    }
                    id
                }
            };
            match self.completed(&id).await? {
                Ok(()) => {
                    drop(guard);
                    return Ok(id);
                }
                Err(error) => {
                    if let Err(refused) = ok_if_already_done(self.send_delete(&id).await) {
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

    /// Returns the copies that are complete or pending, oldest first.
    async fn copies(&self, name: &str) -> Result<Vec<Snapshot>, ApiError> {
        let mut copies = self.snapshots(name, &[tag_filter(tag::COPY, name)]).await?;
        copies.retain(|copy| {
            matches!(copy.state, None | Some(SnapshotState::Pending | SnapshotState::Completed))
        });
        copies.sort_by_key(|copy| (convert::time(copy.start_time.as_ref()), copy.snapshot_id.clone()));
        Ok(copies)
    }

    async fn oldest_copy(&self, name: &str) -> Result<Option<SnapshotId>> {
        let copies = self.copies(name).await?;
        let id = copies.first().map(|copy| convert::id("snap", copy.snapshot_id.as_deref()));
        Ok(id.transpose()?.map(SnapshotId))
    }

    async fn create_copy(&self, of: &SnapshotId, kind: &VolumeKind, name: &str) -> Result<SnapshotId> {
        let tags: Tags = [(tag::COPY.to_owned(), name.to_owned())].into();
        let region = self.region();
        let mut retried = false;
        loop {
            let sent = self.call(&COPY_SNAPSHOT, &of.0, |client| {
                let call = client.copy_snapshot().source_snapshot_id(&of.0).source_region(&region);
                let call = call.description(format!("oven: a copy of {of}"));
                let call = call.set_encrypted(kind.encrypted.filter(|encrypted| *encrypted));
                call.set_kms_key_id(kind.kms_key.clone())
                    .tag_specifications(tag_specification(ResourceType::Snapshot, &tags))
                    .send()
            });
            match sent.await {
                Ok(copy) => return convert::id("snap", copy.snapshot_id.as_deref()).map(SnapshotId),
                Err(refused) if refused.class == ErrorClass::Ambiguous => {
                    if let Some(id) = self.find_lost_copy(name).await? {
                        return Ok(id);
                    }
                    if std::mem::replace(&mut retried, true) {
                        return Err(anyhow::Error::from(refused)
                            .context("the call was sent twice, but no copy is visible"));
                    }
                }
                Err(refused) => return Err(refused.into()),
            }
        }
    }

    async fn find_lost_copy(&self, name: &str) -> Result<Option<SnapshotId>> {
        let (end, mut polls) = (Instant::now() + self.timeouts().lost_answer_window, 0);
        loop {
            if let Some(id) = self.oldest_copy(name).await? {
                return Ok(Some(id));
            }
            polls += 1;
            if polls >= MIN_POLLS && Instant::now() >= end {
                return Ok(None);
            }
            sleep((self.timeouts().lost_answer_window / 8).max(self.timeouts().first_poll)).await;
        }
    }

    /// Waits until EC2 shows the copy `created`. EC2 then also shows all copies that were created earlier. Returns the
    /// oldest copy.
    async fn wait_for_oldest(&self, name: &str, created: &SnapshotId) -> Result<SnapshotId> {
        let policy = self.timeouts().until(self.timeouts().visible);
        poll_until(&format!("the copy {created}"), &policy, async || {
            let copies = self.copies(name).await?;
            if !copies.iter().any(|copy| copy.snapshot_id.as_deref() == Some(&created.0)) {
                let state = self.snapshot_state(created).await?;
                // If the copy failed immediately, returns its id. The caller checks the copy's state and reports the
                // failure.
                return Ok(match state {
                    Some(SnapshotState::Error) => PollAnswer::Ready(created.clone()),
                    _ => PollAnswer::NotYet("not visible".to_owned()),
                });
            }
            let oldest = convert::id("snap", copies[0].snapshot_id.as_deref())?;
            Ok(PollAnswer::Ready(SnapshotId(oldest)))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_named_by_its_source_and_key() {
        let id = SnapshotId("snap-0123456789abcdef0".into());
        let key = |encrypted, key: Option<&str>| VolumeKind {
            encrypted,
            kms_key: key.map(Into::into),
            ..Default::default()
        };
        assert_eq!(copy_name(&id, &key(None, None)), "snap-0123456789abcdef0");
        assert_eq!(copy_name(&id, &key(Some(false), None)), "snap-0123456789abcdef0");
        assert_eq!(copy_name(&id, &key(Some(true), None)), "snap-0123456789abcdef0 encrypted");
        assert_eq!(copy_name(&id, &key(Some(true), Some("alias/k"))), "snap-0123456789abcdef0 alias/k");
    }
}
