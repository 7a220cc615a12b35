//! Copies of snapshots into this account, each made once. CopySnapshot has no client token: it is sent once, and what
//! it made is found by a tag that names what it is a copy of.

use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::call::{Refused, done};
use crate::cloud::aws::ec2::client::errors::{COPY_SNAPSHOT, Class};
use crate::cloud::aws::ec2::images::convert;
use crate::cloud::aws::ec2::images::convert::{tag_filter, tagged};
use crate::cloud::{Tags, VolumeKind, tag};
use crate::ids::SnapshotId;
use crate::sys::poll::{Probe, until};
use anyhow::Result;
use aws_sdk_ec2::types::{ResourceType, Snapshot, SnapshotState};
use tokio::time::{Instant, sleep};

/// At least so many looks find nothing before a lost call counts as one that did nothing.
const LOOKS: u32 = 3;

/// What the copy's tag says: the snapshot, and how it is encrypted if it was asked for.
fn name(of: &SnapshotId, kind: &VolumeKind) -> String {
    match (&kind.kms_key, kind.encrypted) {
        (Some(key), _) => format!("{of} {key}"),
        (None, Some(true)) => format!("{of} encrypted"),
        (None, _) => of.0.clone(),
    }
}

impl Ec2 {
    /// `tell`: called once, before a copy is made or waited for.
    pub(crate) async fn copy_of(
        &self,
        of: &SnapshotId,
        kind: &VolumeKind,
        tell: &dyn Fn(),
    ) -> Result<SnapshotId> {
        let name = name(of, kind);
        // Bakes of this process, one after the other: the second finds the first's.
        let turn = self.0.copying.lock().await;
        let (mut failed, mut told) = (None, false);
        // One that fails is replaced once.
        for _ in 0..2 {
            let there = self.copies(&name).await?.into_iter().next();
            let is_there = there.as_ref().is_some_and(|copy| copy.state == Some(SnapshotState::Completed));
            if !is_there && !std::mem::replace(&mut told, true) {
                tell();
            }
            let id = match there {
                Some(copy) => SnapshotId(convert::id("snap", copy.snapshot_id.as_deref())?),
                None => {
                    let made = self.make_copy(of, kind, &name).await?;
                    self.born(&made.0);
                    // Another builder's may have come before it.
                    let id = self.settled_copy(&name, &made).await?;
                    if id != made {
                        done(self.send_delete(&made).await)?;
                    }
                    id
                }
            };
            match self.completed(&id).await? {
                Ok(()) => {
                    drop(turn);
                    return Ok(id);
                }
                Err(error) => {
                    if let Err(refused) = done(self.send_delete(&id).await) {
                        return Err(error.context(format!("{id} failed, and is still there ({refused})")));
                    }
                    failed = Some(error);
                }
            }
        }
        Err(failed.expect("it failed twice"))
    }

    /// The copies that may become of use, oldest first.
    async fn copies(&self, name: &str) -> Result<Vec<Snapshot>, Refused> {
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

    async fn make_copy(&self, of: &SnapshotId, kind: &VolumeKind, name: &str) -> Result<SnapshotId> {
        let tags: Tags = [(tag::COPY.to_owned(), name.to_owned())].into();
        let region = self.region();
        let mut doubted = false;
        loop {
            let sent = self.call(&COPY_SNAPSHOT, &of.0, |client| {
                let call = client.copy_snapshot().source_snapshot_id(&of.0).source_region(&region);
                let call = call.description(format!("oven: a copy of {of}"));
                let call = call.set_encrypted(kind.encrypted.filter(|encrypted| *encrypted));
                call.set_kms_key_id(kind.kms_key.clone())
                    .tag_specifications(tagged(ResourceType::Snapshot, &tags))
                    .send()
            });
            match sent.await {
                Ok(copy) => return convert::id("snap", copy.snapshot_id.as_deref()).map(SnapshotId),
                Err(refused) if refused.class == Class::Lost => {
                    if let Some(id) = self.lost_copy(name).await? {
                        return Ok(id);
                    }
                    if std::mem::replace(&mut doubted, true) {
                        return Err(anyhow::Error::from(refused).context("twice, and no copy is to be seen"));
                    }
                }
                Err(refused) => return Err(refused.into()),
            }
        }
    }

    async fn lost_copy(&self, name: &str) -> Result<Option<SnapshotId>> {
        let (end, mut looks) = (Instant::now() + self.pace().lost, 0);
        loop {
            if let Some(id) = self.oldest_copy(name).await? {
                return Ok(Some(id));
            }
            looks += 1;
            if looks >= LOOKS && Instant::now() >= end {
                return Ok(None);
            }
            sleep((self.pace().lost / 8).max(self.pace().look)).await;
        }
    }

    /// Once EC2 shows the copy that was made, it shows those before it.
    async fn settled_copy(&self, name: &str, made: &SnapshotId) -> Result<SnapshotId> {
        let policy = self.pace().until(self.pace().visible);
        until(&format!("the copy {made}"), &policy, async || {
            let copies = self.copies(name).await?;
            if !copies.iter().any(|copy| copy.snapshot_id.as_deref() == Some(&made.0)) {
                let state = self.snapshot_state(made).await?;
                // It failed at once: that is told by who waits for it.
                return Ok(match state {
                    Some(SnapshotState::Error) => Probe::Ready(made.clone()),
                    _ => Probe::NotYet("not to be seen".to_owned()),
                });
            }
            let oldest = convert::id("snap", copies[0].snapshot_id.as_deref())?;
            Ok(Probe::Ready(SnapshotId(oldest)))
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_named_by_what_it_is_a_copy_of_and_its_key() {
        let id = SnapshotId("snap-0123456789abcdef0".into());
        let key = |encrypted, key: Option<&str>| VolumeKind {
            encrypted,
            kms_key: key.map(Into::into),
            ..Default::default()
        };
        assert_eq!(name(&id, &key(None, None)), "snap-0123456789abcdef0");
        assert_eq!(name(&id, &key(Some(false), None)), "snap-0123456789abcdef0");
        assert_eq!(name(&id, &key(Some(true), None)), "snap-0123456789abcdef0 encrypted");
        assert_eq!(name(&id, &key(Some(true), Some("alias/k"))), "snap-0123456789abcdef0 alias/k");
    }
}
