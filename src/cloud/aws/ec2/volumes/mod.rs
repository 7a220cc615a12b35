//! Describes, creates and preserves volumes.

pub mod attach;
pub mod builder_check;
pub mod device_names;

use super::Ec2;
use super::client::call::ApiError;
use super::client::errors::{CREATE_TAGS, CREATE_VOLUME, DESCRIBE_VOLUMES, ErrorClass, KMS_HINT};
use super::images::PAGE;
use super::images::convert;
use super::images::convert::{filter, tag_filter};
use crate::cloud::ec2_rules::MAX_VOLUME_GIB;
use crate::cloud::image_attributes::check_volume_kind;
use crate::cloud::{VolumeSpec, tag};
use crate::error::Kind;
use crate::ids::{RunId, VolumeId};
use crate::sys::poll::{PollAnswer, poll_until, wait_with_background};
use anyhow::{Context, Result};
use aws_sdk_ec2::Client;
use aws_sdk_ec2::error::SdkError;
use aws_sdk_ec2::operation::create_volume::builders::CreateVolumeInputBuilder;
use aws_sdk_ec2::operation::create_volume::{CreateVolumeError, CreateVolumeInput, CreateVolumeOutput};
use aws_sdk_ec2::types::{self, ResourceType, VolumeAttachmentState, VolumeState};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::time::Instant;

/// If this many polls in a row do not show a new volume, CreateVolume is sent again with the same client token. EC2's
/// answer shows whether the volume still exists.
pub const ABSENT_POLLS: u32 = 3;

/// Makes a client token, by which EC2 recognizes a repeated call. The token is derived from the run's id. If it were
/// derived from the definition's fingerprint, two builders of the same definition would get the same volume. EC2
/// accepts at most 64 characters.
pub fn client_token(run: &RunId, step: &str, attempt: u32) -> String {
    let digest = Sha256::digest(format!("{run}/{step}/{attempt}"));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Sends a CreateVolume request. The caller keeps a copy of the request, so that it can send the request again.
pub async fn send_create_volume(
    request: CreateVolumeInputBuilder,
    client: Client,
) -> Result<CreateVolumeOutput, SdkError<CreateVolumeError>> {
    request.send_with(&client).await
}

/// An attachment of a volume, as DescribeVolumes reports it.
pub struct Attachment<'a> {
    pub instance: &'a str,
    pub device: &'a str,
    pub state: VolumeAttachmentState,
}

/// Returns the current attachment of a volume, if there is one.
pub fn current_attachment(volume: &types::Volume) -> Option<Attachment<'_>> {
    let live = |a: &&types::VolumeAttachment| a.state != Some(VolumeAttachmentState::Detached);
    let found = volume.attachments().iter().find(live)?;
    Some(Attachment {
        instance: found.instance_id.as_deref().unwrap_or("?"),
        device: found.device.as_deref().unwrap_or("?"),
        state: found.state.clone().unwrap_or(VolumeAttachmentState::Attaching),
    })
}

pub fn state_text(volume: &types::Volume) -> &str {
    volume.state.as_ref().map_or("in no state", VolumeState::as_str)
}

impl Ec2 {
    /// Returns all volumes that match the filters.
    pub(crate) async fn volumes(
        &self,
        what: &str,
        filters: &[types::Filter],
    ) -> Result<Vec<types::Volume>, ApiError> {
        let (mut all, mut token) = (Vec::new(), None::<String>);
        loop {
            let send = |client: &aws_sdk_ec2::Client| {
                let call = client.describe_volumes().max_results(PAGE).set_filters(Some(filters.to_vec()));
                call.set_next_token(token.clone()).send()
            };
            let page = self.call(&DESCRIBE_VOLUMES, what, send).await?;
            all.extend(page.volumes.unwrap_or_default());
            self.seen(all.iter().filter_map(|volume| volume.volume_id.as_deref()));
            token = page.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    /// Returns one volume; `None` if EC2 does not show it. The id is passed as a filter. If it were passed as an id,
    /// EC2 would report an unknown id as an error.
    pub(crate) async fn volume(&self, id: &VolumeId) -> Result<Option<types::Volume>, ApiError> {
        Ok(self.volumes(&id.0, &[filter("volume-id", [id.0.as_str()])]).await?.into_iter().next())
    }

    pub(crate) async fn create_volume(&self, spec: &VolumeSpec) -> Result<VolumeId> {
        let tags = self.owned(&spec.tags, &spec.run)?;
        check_volume_kind(&spec.kind, "[disk]")?;
        if spec.size_gib > MAX_VOLUME_GIB {
            let text = format!(
                "a volume of {} GiB is too large: the maximum is {MAX_VOLUME_GIB} GiB",
                spec.size_gib
            );
            return Err(Kind::Definition.error(text));
        }
        let (zone, what) = (self.zone()?, format!("of {}, run {}", spec.snapshot, spec.run));
        let mut attempt = 1;
        let (volume, request) = loop {
            let kind = &spec.kind;
            let request = CreateVolumeInput::builder()
                .snapshot_id(&spec.snapshot.0)
                .availability_zone(zone)
                .size(convert::to_i32(spec.size_gib))
                .set_volume_type(kind.volume_type.as_deref().map(types::VolumeType::from))
                .set_iops(kind.iops.map(convert::to_i32))
                .set_throughput(kind.throughput.map(convert::to_i32))
                .set_encrypted(kind.encrypted.filter(|encrypted| *encrypted))
                .set_kms_key_id(kind.kms_key.clone())
                .tag_specifications(convert::tag_specification(ResourceType::Volume, &tags))
                .client_token(client_token(&spec.run, "volume", attempt));
            let sent = self.repeat(&CREATE_VOLUME, &what, async || {
                let (again, client) = (request.clone(), self.client());
                self.send_in_background(
                    &spec.run,
                    &CREATE_VOLUME,
                    &what,
                    send_create_volume(request.clone(), client),
                    |run, result| match result {
                        Ok(volume) => {
                            run.volumes.extend(volume.volume_id.clone());
                            run.requests.extend(volume.volume_id.clone().zip(Some(again)));
                            run.doubtful_volume = None;
                        }
                        Err(refused) if refused.class == ErrorClass::Ambiguous => {
                            run.doubtful_volume = Some(again)
                        }
                        Err(_) => {}
                    },
                )
                .await
            });
            match sent.await {
                Ok(volume) => break (convert::id("vol", volume.volume_id.as_deref())?, request),
                // EC2 refuses a client token if the volume that it created failed, or if the first request had other
                // parameters. One more attempt is made, with a new token.
                Err(refused) if refused.is("IdempotentParameterMismatch") && attempt == 1 => attempt += 1,
                // Perhaps an earlier call created a volume, but its answer was lost. That volume then counts towards
                // the limit. So oven searches for that volume.
                Err(refused) if refused.is("VolumeLimitExceeded") || refused.is("MaxIOPSLimitExceeded") => {
                    match self.find_lost_volume(&spec.run).await? {
                        Some(id) => break (id, request),
                        None => return Err(refused.into()),
                    }
                }
                Err(refused) => return Err(refused.into()),
            }
        };
        let volume = VolumeId(volume);
        self.born(&volume.0);
        self.0.made.with_run(&spec.run, |run| {
            run.volumes.insert(volume.0.clone());
            run.doubtful_volume = None;
        });
        self.wait_until_created(&volume, spec, request).await?;
        Ok(volume)
    }

    /// Returns the volume that a call with a lost answer created, if there is one. Waits for it, because it may not be
    /// visible immediately.
    async fn find_lost_volume(&self, run: &RunId) -> Result<Option<String>> {
        let lost = self.0.made.with_run(run, |run| run.doubtful_volume.is_some());
        let end = Instant::now() + if lost { self.timeouts().lost_answer_window } else { Duration::ZERO };
        loop {
            let found = self.volumes(&run.0, &[tag_filter(tag::RUN, &run.0)]).await?;
            if let Some(volume) = found.first() {
                return convert::id("vol", volume.volume_id.as_deref()).map(Some);
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            tokio::time::sleep((self.timeouts().lost_answer_window / 8).max(self.timeouts().first_poll))
                .await;
        }
    }

    /// Waits until a new volume is available.
    async fn wait_until_created(
        &self,
        id: &VolumeId,
        spec: &VolumeSpec,
        request: CreateVolumeInputBuilder,
    ) -> Result<()> {
        let hint = || {
            if spec.kind.encrypted == Some(true) || spec.kind.kms_key.is_some() {
                KMS_HINT.to_owned()
            } else {
                format!(
                    "Perhaps {} is encrypted, or the account encrypts by default. {KMS_HINT}",
                    spec.snapshot
                )
            }
        };
        let mut absent = 0;
        let created = async {
            self.wait_before_first_poll().await;
            poll_until(
                &format!("the volume {id}"),
                &self.timeouts().frequent_polls(self.timeouts().created),
                async || {
                    let Some(volume) = self.volume(id).await? else {
                        absent += 1;
                        // If EC2 lacks the permission for a new volume's KMS key, EC2 removes the volume. After that,
                        // EC2 refuses the volume's client token. So the token shows whether the volume vanished or is
                        // not visible yet.
                        if absent % ABSENT_POLLS == 0 && self.is_token_used_up(&spec.run, &request).await? {
                            // EC2 also refuses the token of a failed volume that exists but is not visible yet. So the
                            // clean-up action for the volume remains registered.
                            let text = format!("the volume {id} vanished while it was being created");
                            return Err(Kind::Cloud.failure(text).hint(hint()).into());
                        }
                        return Ok(PollAnswer::NotYet("not visible".to_owned()));
                    };
                    absent = 0;
                    match volume.state {
                        Some(VolumeState::Available | VolumeState::InUse) => Ok(PollAnswer::Ready(())),
                        Some(VolumeState::Error | VolumeState::Deleting | VolumeState::Deleted) => {
                            let text = format!(
                                "EC2 could not create the volume {id}: it is {}",
                                state_text(&volume)
                            );
                            Err(Kind::Cloud.failure(text).hint(hint()).into())
                        }
                        _ => Ok(PollAnswer::NotYet(state_text(&volume).to_owned())),
                    }
                },
            )
            .await
        };
        wait_with_background(created, self.look_up_names(id))
            .await
            .with_context(|| format!("creating the volume {id} of {}", spec.snapshot))
    }

    /// Sends a request again, and returns whether EC2 refuses its client token. If so, the request's volume vanished or
    /// failed.
    pub(crate) async fn is_token_used_up(
        &self,
        run: &RunId,
        request: &CreateVolumeInputBuilder,
    ) -> Result<bool> {
        let what = format!("to find out what became of the volume of run {run}");
        match self
            .call(&CREATE_VOLUME, &what, |client| send_create_volume(request.clone(), client.clone()))
            .await
        {
            Ok(again) => {
                let id = convert::id("vol", again.volume_id.as_deref())?;
                self.0.made.with_run(run, |run| run.volumes.insert(id));
                Ok(false)
            }
            Err(refused) => Ok(refused.is("IdempotentParameterMismatch")),
        }
    }

    pub(crate) async fn tag_and_detach_volumes(&self, run: &RunId) -> Result<Vec<VolumeId>> {
        self.0.made.settled(run).await;
        let mut ids: BTreeSet<String> = self.0.made.with_run(run, |run| run.volumes.clone());
        for volume in self.volumes(&run.0, &[tag_filter(tag::RUN, &run.0)]).await? {
            ids.insert(convert::id("vol", volume.volume_id.as_deref())?);
        }
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let kept = types::Tag::builder().key(tag::KEPT).value("true").build();
        let ids: Vec<String> = ids.into_iter().collect();
        let what = ids.join(", ");
        let sent = self.call(&CREATE_TAGS, &what, |client| {
            client.create_tags().set_resources(Some(ids.clone())).tags(kept.clone()).send()
        });
        sent.await?;
        let ids: Vec<VolumeId> = ids.into_iter().map(VolumeId).collect();
        // The volumes are copies of a root disk. If one remained attached, the instance might boot from it at its next
        // start.
        for id in &ids {
            self.detach(id).await?;
        }
        Ok(ids)
    }

    pub(crate) async fn find_preserved_volume(&self, run: &RunId) -> Result<Option<VolumeId>> {
        let filters = [tag_filter(tag::RUN, &run.0), filter("tag-key", [tag::KEPT])];
        let mut found = self.volumes(&run.0, &filters).await?;
        found.retain(|volume| matches!(volume.state, Some(VolumeState::Available | VolumeState::InUse)));
        let newest = found.into_iter().max_by_key(|volume| convert::time(volume.create_time.as_ref()));
        newest.map(|volume| convert::id("vol", volume.volume_id.as_deref()).map(VolumeId)).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_depend_on_run_step_and_attempt() {
        let (a, b) = (RunId("a".into()), RunId("b".into()));
        assert_eq!(client_token(&a, "volume", 1).len(), 64);
        assert_eq!(client_token(&a, "volume", 1), client_token(&a, "volume", 1));
        let all: BTreeSet<String> = [
            client_token(&a, "volume", 1),
            client_token(&a, "volume", 2),
            client_token(&b, "volume", 1),
            client_token(&a, "image", 1),
        ]
        .into();
        assert_eq!(all.len(), 4);
    }
}
