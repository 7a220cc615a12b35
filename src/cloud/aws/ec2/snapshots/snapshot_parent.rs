//! Decides whether a snapshot can be the parent of a new snapshot that oven writes through the EBS direct APIs. A new
//! snapshot with a parent needs only the blocks that differ from the parent.

use crate::cloud::VolumeKind;
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::call::ApiError;
use crate::cloud::aws::ec2::client::errors::{DESCRIBE_SNAPSHOTS, ErrorClass, GET_EBS_ENCRYPTION_BY_DEFAULT};
use crate::cloud::aws::ec2::images::convert::filter;
use crate::cloud::block_api::ParentUse;
use crate::error::Kind;
use crate::ids::SnapshotId;
use anyhow::Result;
use aws_sdk_ec2::types::{self, SnapshotState};

/// Values of DescribeSnapshots' parameter RestorableByUserIds. `all` selects snapshots that are shared with everybody,
/// and `self` selects those that are shared with this account.
const SHARED_WITH_ALL: &str = "all";
const SHARED_WITH_US: &str = "self";

impl Ec2 {
    /// Returns the state of a snapshot of this account; `None` if EC2 does not show the snapshot.
    pub(crate) async fn snapshot_state(&self, id: &SnapshotId) -> Result<Option<SnapshotState>, ApiError> {
        let found = self.snapshots(&id.0, &[filter("snapshot-id", [id.0.as_str()])]).await?;
        Ok(found.into_iter().next().and_then(|snapshot| snapshot.state))
    }

    /// Returns a snapshot of another account, if it is shared. `with` is [`SHARED_WITH_ALL`] or [`SHARED_WITH_US`].
    async fn shared_snapshot(
        &self,
        id: &SnapshotId,
        with: &str,
    ) -> Result<Option<types::Snapshot>, ApiError> {
        let wanted = filter("snapshot-id", [id.0.as_str()]);
        let sent = self.call(&DESCRIBE_SNAPSHOTS, &id.0, |client| {
            client.describe_snapshots().restorable_by_user_ids(with).filters(wanted.clone()).send()
        });
        Ok(sent.await?.snapshots.unwrap_or_default().into_iter().next())
    }

    pub(crate) async fn parent_of(&self, id: &SnapshotId, kind: &VolumeKind) -> Result<ParentUse> {
        // DescribeSnapshots and GetEbsEncryptionByDefault are called concurrently to save time. The second answer is
        // needed only if the snapshot belongs to this account and is not encrypted. This is the usual case.
        let wanted = [filter("snapshot-id", [id.0.as_str()])];
        let default = async {
            match kind {
                VolumeKind { encrypted: Some(true), .. } | VolumeKind { kms_key: Some(_), .. } => Ok(false),
                _ => self.encrypts_by_default().await,
            }
        };
        let (ours, by_default) = tokio::join!(self.snapshots(&id.0, &wanted), default);
        let Some(ours) = ours?.into_iter().next() else {
            return self.shared_parent(id).await;
        };
        match &ours.state {
            None | Some(SnapshotState::Completed) => {}
            Some(state) => {
                return Err(Kind::Cloud.error(format!("the snapshot is {}, not completed", state.as_str())));
            }
        }
        let (is_encrypted, key) = (ours.encrypted == Some(true), ours.kms_key_id.as_deref());
        Ok(match kind {
            VolumeKind { encrypted: Some(false), .. } if is_encrypted => {
                ParentUse::FullUpload { why: "it is encrypted, and the image must not be".to_owned() }
            }
            VolumeKind { kms_key: Some(wanted), .. }
                if !(is_encrypted && key.is_some_and(|key| same_key(key, wanted))) =>
            {
                let is =
                    key.map_or_else(|| "not encrypted".to_owned(), |key| format!("encrypted with {key}"));
                ParentUse::CopyFirst {
                    why: format!("it is {is}, and the image must be encrypted with {wanted}"),
                }
            }
            VolumeKind { encrypted: Some(true), .. } if !is_encrypted => {
                ParentUse::CopyFirst { why: "it is not encrypted, and the image must be".to_owned() }
            }
            _ if !is_encrypted && by_default? => {
                let why = "it is not encrypted, but this account encrypts by default, so EBS rejects it as a parent";
                ParentUse::CopyFirst { why: why.to_owned() }
            }
            _ => ParentUse::UseAsParent,
        })
    }

    /// Decides how to use a snapshot of another account. It always has to be copied, because a snapshot and its parent
    /// must belong to the same account.
    async fn shared_parent(&self, id: &SnapshotId) -> Result<ParentUse> {
        if let Some(public) = self.shared_snapshot(id, SHARED_WITH_ALL).await? {
            let owner = public.owner_id.unwrap_or_else(|| "another account".to_owned());
            let why = format!("it is a public snapshot of {owner}, which EBS direct cannot read");
            return Ok(ParentUse::CopyFirst { why });
        }
        if let Some(private) = self.shared_snapshot(id, SHARED_WITH_US).await? {
            let owner = private.owner_id.unwrap_or_else(|| "another account".to_owned());
            return Ok(ParentUse::CopyFirst {
                why: format!(
                    "it belongs to {owner}, and a snapshot has to be in the same account as its parent"
                ),
            });
        }
        let hint = "Perhaps the base image is shared with this account, but its snapshot is not. Copy the image into \
                    this account (aws ec2 copy-image), and bake on the copy (owner = \"self\").";
        Err(Kind::NotFound.failure("it is not in this account, and not shared with it").hint(hint).into())
    }

    /// Returns whether this account encrypts every new volume and snapshot. Also returns false if the role lacks the
    /// permission for this query. If the account does encrypt by default in that case, a later call fails.
    async fn encrypts_by_default(&self) -> Result<bool, ApiError> {
        let sent =
            self.call(&GET_EBS_ENCRYPTION_BY_DEFAULT, "", |c| c.get_ebs_encryption_by_default().send()).await;
        match sent {
            Ok(answer) => Ok(answer.ebs_encryption_by_default == Some(true)),
            Err(refused) if refused.class == ErrorClass::Fatal => Ok(false),
            Err(refused) => Err(refused),
        }
    }
}

/// Returns whether `arn` is the ARN of the key `wanted`. `wanted` is an ARN, an id or an alias. Returns false for an
/// alias, because only KMS knows which key the alias names.
fn same_key(arn: &str, wanted: &str) -> bool {
    arn == wanted || arn.rsplit_once("key/").is_some_and(|(_, id)| id == wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_match_by_arn_and_id() {
        let arn = "arn:aws:kms:eu-central-1:123456789012:key/mrk-1";
        assert!(same_key(arn, arn) && same_key(arn, "mrk-1"));
        assert!(!same_key(arn, "alias/web") && !same_key(arn, "mrk-11") && !same_key(arn, ""));
    }
}
