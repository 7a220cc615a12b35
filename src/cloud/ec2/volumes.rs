//! Volumes: created, attached, kept.

use super::Ec2;
use super::call::{Refused, done};
use super::class::{
    ATTACH_VOLUME, CREATE_TAGS, CREATE_VOLUME, Class, DESCRIBE_VOLUMES, DETACH_VOLUME, KMS,
    MODIFY_INSTANCE_ATTRIBUTE,
};
use super::convert::{self, filter, tag_filter};
use super::images::PAGE;
use super::made::may_have_acted;
use crate::cloud::attributes::check_kind;
use crate::cloud::wait::{Probe, until};
use crate::cloud::{RunId, VolumeId, VolumeSpec, tag};
use crate::disk::Device;
use crate::error::Kind;
use anyhow::{Context, Result};
use aws_sdk_ec2::operation::create_volume::CreateVolumeInput;
use aws_sdk_ec2::types::{self, ResourceType, VolumeAttachmentState, VolumeState};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use tokio::time::Instant;

/// EC2's largest volume (io2; the others end at 16 TiB, and EC2 says so).
const LARGEST: u64 = 65536;

/// A token by which EC2 knows a call again: of the run, never of the fingerprint, or two builders would be given the
/// same volume. 64 characters are allowed.
pub fn token(run: &RunId, step: &str, attempt: u32) -> String {
    let digest = Sha256::digest(format!("{run}/{step}/{attempt}"));
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// How a volume is attached, in DescribeVolumes' view.
pub struct Attachment<'a> {
    pub instance: &'a str,
    pub device: &'a str,
    pub state: VolumeAttachmentState,
}

/// The attachment of a volume that is not over.
pub fn attachment(volume: &types::Volume) -> Option<Attachment<'_>> {
    let live = |a: &&types::VolumeAttachment| a.state != Some(VolumeAttachmentState::Detached);
    let found = volume.attachments().iter().find(live)?;
    Some(Attachment {
        instance: found.instance_id.as_deref().unwrap_or("?"),
        device: found.device.as_deref().unwrap_or("?"),
        state: found.state.clone().unwrap_or(VolumeAttachmentState::Attaching),
    })
}

pub fn state_of(volume: &types::Volume) -> &str {
    volume.state.as_ref().map_or("in no state", VolumeState::as_str)
}

impl Ec2 {
    /// All volumes that pass the filters.
    pub(super) async fn volumes(
        &self,
        what: &str,
        filters: &[types::Filter],
    ) -> Result<Vec<types::Volume>, Refused> {
        let (mut all, mut token) = (Vec::new(), None::<String>);
        loop {
            let send = |client: &aws_sdk_ec2::Client| {
                let call = client.describe_volumes().max_results(PAGE).set_filters(Some(filters.to_vec()));
                call.set_next_token(token.clone()).send()
            };
            let page = self.call(&DESCRIBE_VOLUMES, what, send).await?;
            all.extend(page.volumes.unwrap_or_default());
            token = page.next_token.filter(|token| !token.is_empty());
            if token.is_none() {
                return Ok(all);
            }
        }
    }

    /// One volume; `None` where EC2 does not show it. By filter: then an unknown id is no error.
    pub(super) async fn volume(&self, id: &VolumeId) -> Result<Option<types::Volume>, Refused> {
        Ok(self.volumes(&id.0, &[filter("volume-id", [id.0.as_str()])]).await?.into_iter().next())
    }

    pub(super) async fn create_volume(&self, spec: &VolumeSpec) -> Result<VolumeId> {
        let tags = self.owned(&spec.tags, &spec.run)?;
        check_kind(&spec.kind, "[disk]")?;
        if spec.size_gib > LARGEST {
            let text = format!("a volume of {} GiB: {LARGEST} are allowed", spec.size_gib);
            return Err(Kind::Definition.error(text));
        }
        let (zone, what) = (self.zone()?, format!("of {}, run {}", spec.snapshot, spec.run));
        let mut attempt = 1;
        let volume = loop {
            let kind = &spec.kind;
            let request = CreateVolumeInput::builder()
                .snapshot_id(&spec.snapshot.0)
                .availability_zone(zone)
                .size(convert::number(spec.size_gib))
                .set_volume_type(kind.volume_type.as_deref().map(types::VolumeType::from))
                .set_iops(kind.iops.map(convert::number))
                .set_throughput(kind.throughput.map(convert::number))
                .set_encrypted(kind.encrypted.filter(|encrypted| *encrypted))
                .set_kms_key_id(kind.kms_key.clone())
                .tag_specifications(convert::tagged(ResourceType::Volume, &tags))
                .client_token(token(&spec.run, "volume", attempt));
            self.0.made.of(&spec.run, |run| run.doubtful_volume = Some(request.clone()));
            let sent = self.repeat(&CREATE_VOLUME, &what, async || {
                let (request, client) = (request.clone(), self.client());
                let send = async move { request.send_with(&client).await };
                self.fly(&spec.run, &CREATE_VOLUME, &what, send, |run, result| {
                    if let Some(id) = result.as_ref().ok().and_then(|volume| volume.volume_id.clone()) {
                        run.volumes.insert(id);
                    }
                    if !may_have_acted(result) || result.is_ok() {
                        run.doubtful_volume = None;
                    }
                })
                .await
            });
            match sent.await {
                Ok(volume) => break convert::id("vol", volume.volume_id.as_deref())?,
                // The token is burned: a volume of it failed, or was asked for otherwise. Never a third time.
                Err(refused) if refused.is("IdempotentParameterMismatch") && attempt == 1 => attempt += 1,
                // EC2 counts the volume that the first of two calls made against the limit of the second.
                Err(refused) if refused.is("VolumeLimitExceeded") || refused.is("MaxIOPSLimitExceeded") => {
                    match self.volume_of(&spec.run).await? {
                        Some(id) => break id,
                        None => return Err(refused.into()),
                    }
                }
                Err(refused) => return Err(refused.into()),
            }
        };
        let volume = VolumeId(volume);
        self.born(&volume.0);
        self.0.made.of(&spec.run, |run| run.volumes.insert(volume.0.clone()));
        self.created(&volume, spec).await?;
        Ok(volume)
    }

    async fn volume_of(&self, run: &RunId) -> Result<Option<String>> {
        let found = self.volumes(&run.0, &[tag_filter(tag::RUN, &run.0)]).await?;
        found.first().map(|volume| convert::id("vol", volume.volume_id.as_deref())).transpose()
    }

    /// Waits until a new volume is available.
    async fn created(&self, id: &VolumeId, spec: &VolumeSpec) -> Result<()> {
        let hint = || {
            if spec.kind.encrypted == Some(true) || spec.kind.kms_key.is_some() {
                KMS.to_owned()
            } else {
                format!("If {} or the account's default is encrypted: {KMS}", spec.snapshot)
            }
        };
        self.look_soon().await;
        let (mut seen, mut absent) = (false, 0);
        let result =
            until(&format!("the volume {id}"), &self.pace().until(self.pace().created), async || {
                let Some(volume) = self.volume(id).await? else {
                    absent += 1;
                    // It was there, and is not: EC2 takes a volume back whose key it may not use.
                    if seen && absent > 1 {
                        let text = format!("the volume {id} vanished while it was created");
                        return Err(Kind::Cloud.failure(text).hint(hint()).into());
                    }
                    return Ok(Probe::NotYet("not to be seen".to_owned()));
                };
                (seen, absent) = (true, 0);
                match volume.state {
                    Some(VolumeState::Available | VolumeState::InUse) => Ok(Probe::Ready(())),
                    Some(VolumeState::Error | VolumeState::Deleting | VolumeState::Deleted) => {
                        let text =
                            format!("EC2 could not create the volume {id}: it is {}", state_of(&volume));
                        Err(Kind::Cloud.failure(text).hint(hint()).into())
                    }
                    _ => Ok(Probe::NotYet(state_of(&volume).to_owned())),
                }
            })
            .await;
        result.with_context(|| format!("creating the volume {id} of {}", spec.snapshot))
    }

    pub(super) async fn attach_volume(&self, volume: &VolumeId) -> Result<Device> {
        let context = || format!("attaching {volume}");
        let mut again = true;
        loop {
            match self.attach_once(volume).await.with_context(context)? {
                Ok(device) => return Ok(device),
                // Stuck: a detach, and another name, once.
                Err(_) if again => self.detach_and_wait(volume).await.with_context(context)?,
                Err(stuck) => return Err(stuck.context(context())),
            }
            again = false;
        }
    }

    /// `Ok(Err(…))`: it is stuck, and another try may help.
    async fn attach_once(&self, volume: &VolumeId) -> Result<Result<Device>> {
        let instance = self.instance()?;
        let name = match self.attached_to(volume, instance).await? {
            Some(name) => name,
            None => self.send_attach(volume, instance).await?,
        };
        let deadline = Instant::now() + self.pace().attached;
        let (what, policy) = (format!("the attachment of {volume}"), self.pace().until(self.pace().attached));
        let attached = until(&what, &policy, async || {
            let Some(found) = self.volume(volume).await? else {
                return Ok(Probe::NotYet("not to be seen".to_owned()));
            };
            Ok(match attachment(&found) {
                Some(a) if a.instance != instance => Probe::Ready(Err(in_use(volume, &a))),
                Some(a) if a.state == VolumeAttachmentState::Attached => Probe::Ready(Ok(())),
                Some(a) if Instant::now() >= deadline => Probe::Ready(Err(stuck(volume, &a))),
                Some(a) => Probe::NotYet(a.state.as_str().to_owned()),
                None if Instant::now() >= deadline => {
                    let text =
                        format!("{volume} is {} again, after EC2 had begun to attach it", state_of(&found));
                    Probe::Ready(Err(Kind::Cloud.error(text)))
                }
                None => Probe::NotYet(state_of(&found).to_owned()),
            })
        });
        if let Err(stuck) = attached.await? {
            return Ok(Err(stuck));
        }
        let device = match self.device(volume, &name).await? {
            Ok(device) => device,
            Err(absent) => return Ok(Err(absent)),
        };
        self.delete_on_termination(volume, instance, &name).await?;
        Ok(Ok(device))
    }

    /// The name under which it is attached to this instance already: one that was kept.
    async fn attached_to(&self, volume: &VolumeId, instance: &str) -> Result<Option<String>> {
        if self.is_new(&volume.0) {
            return Ok(None);
        }
        let Some(found) = self.volume(volume).await? else {
            return Err(Kind::NotFound.error(format!("EC2 does not know the volume {volume}")));
        };
        match attachment(&found) {
            Some(a) if a.instance != instance => Err(in_use(volume, &a)),
            Some(a)
                if matches!(a.state, VolumeAttachmentState::Attached | VolumeAttachmentState::Attaching) =>
            {
                Ok(Some(a.device.to_owned()))
            }
            Some(_) => self.detach_and_wait(volume).await.map(|()| None),
            None => Ok(None),
        }
    }

    /// Names in use on this instance.
    async fn names_in_use(&self, instance: &str) -> Result<BTreeSet<String>> {
        let found = self.volumes(instance, &[filter("attachment.instance-id", [instance])]).await?;
        let mine = found.iter().flat_map(|volume| volume.attachments());
        let mine = mine.filter(|a| a.instance_id.as_deref() == Some(instance));
        Ok(mine.filter_map(|a| a.device.clone()).collect())
    }

    /// Sends AttachVolume until EC2 takes a name, and looks up what became of a call whose answer was lost.
    async fn send_attach(&self, volume: &VolumeId, instance: &str) -> Result<String> {
        let in_use_here = self.names_in_use(instance).await?;
        let names = self.0.names.borrow().for_volume(&volume.0, &in_use_here);
        let mut names = names.into_iter();
        let mut name = names.next().ok_or_else(|| no_name(instance))?;
        let (mut lost, mut contradicted) = (0, false);
        loop {
            let what = format!("{volume} to {instance} as {name}");
            let send = |client: &aws_sdk_ec2::Client| {
                client.attach_volume().volume_id(&volume.0).instance_id(instance).device(&name).send()
            };
            self.0.names.borrow_mut().is_used(&name);
            let refused = match self.call(&ATTACH_VOLUME, &what, send).await {
                Ok(_) => {
                    self.look_soon().await;
                    return Ok(name);
                }
                Err(refused) => refused,
            };
            let text = refused.message.to_ascii_lowercase();
            if refused.is("InvalidParameterValue")
                && (text.contains("already in use") || text.contains("unixdevice"))
            {
                self.0.names.borrow_mut().is_taken(&name);
                let next = names.next();
                if next.is_none() {
                    self.0.names.borrow_mut().forget_taken();
                }
                name = next.ok_or_else(|| no_name(instance))?;
            } else if refused.class == Class::Lost || refused.is("VolumeInUse") {
                match self.attachment_seen(volume).await? {
                    Some((to, device)) if to == instance => return Ok(device),
                    Some((to, device)) => {
                        let text = format!("{volume} is attached to {to} as {device}");
                        return Err(Kind::Cloud.error(format!("VolumeInUse: {text}")));
                    }
                    // Not attached, by several looks: the call did nothing. Sent again once it is safe: a volume that
                    // is attached after all is refused, and looked at again.
                    None if refused.class == Class::Lost && lost < 3 => lost += 1,
                    None if refused.class != Class::Lost && !contradicted => contradicted = true,
                    None => return Err(refused.into()),
                }
            } else if refused.is("AttachmentLimitExceeded") {
                let text = format!("{instance} has {} volumes attached already", in_use_here.len());
                return Err(anyhow::Error::from(refused).context(text));
            } else {
                return Err(refused.into());
            }
        }
    }

    /// Whether DescribeVolumes, whose word counts, shows an attachment: several looks.
    async fn attachment_seen(&self, volume: &VolumeId) -> Result<Option<(String, String)>> {
        let end = Instant::now() + self.pace().look * 4;
        loop {
            self.look_soon().await;
            if let Some(found) = self.volume(volume).await?
                && let Some(a) = attachment(&found)
            {
                return Ok(Some((a.instance.to_owned(), a.device.to_owned())));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
        }
    }

    /// Waits until this machine shows the volume. `Ok(Err(…))`: it does not.
    async fn device(&self, volume: &VolumeId, name: &str) -> Result<Result<Device>> {
        let deadline = Instant::now() + self.pace().device;
        // The kernel is asked, not EC2: that costs nothing.
        let policy =
            crate::cloud::wait::Policy { longest: self.pace().look, ..self.pace().until(self.pace().device) };
        let policy = crate::cloud::wait::Policy { first: self.pace().look / 10, ..policy };
        until(&format!("the device of {volume}"), &policy, async || {
            Ok(match (self.0.options.devices)(volume)? {
                Some(device) => Probe::Ready(Ok(device)),
                None if Instant::now() >= deadline => {
                    let time = humantime::format_duration(self.pace().device);
                    let text = format!("EC2 says that {volume} is attached as {name}, and this machine shows no such device after {time}");
                    let hint = "Is this the instance that it was attached to (--instance-id)? See `oven doctor`.";
                    Probe::Ready(Err(Kind::Cloud.failure(text).hint(hint).into()))
                }
                None => Probe::NotYet("not there".to_owned()),
            })
        })
        .await
    }

    /// When the instance is terminated, AWS deletes the volume with it.
    async fn delete_on_termination(&self, volume: &VolumeId, instance: &str, name: &str) -> Result<()> {
        let ebs = types::EbsInstanceBlockDeviceSpecification::builder().delete_on_termination(true);
        let ebs = ebs.volume_id(&volume.0).build();
        let mapping =
            types::InstanceBlockDeviceMappingSpecification::builder().device_name(name).ebs(ebs).build();
        let what = format!("{instance}: {name} is {volume}");
        let sent = self.call(&MODIFY_INSTANCE_ATTRIBUTE, &what, |client| {
            client
                .modify_instance_attribute()
                .instance_id(instance)
                .block_device_mappings(mapping.clone())
                .send()
        });
        sent.await.map_err(anyhow::Error::from).context("letting the volume end with the instance")?;
        Ok(())
    }

    pub(super) async fn detach(&self, volume: &VolumeId) -> Result<(), Refused> {
        done(
            self.call(&DETACH_VOLUME, &volume.0, |client| client.detach_volume().volume_id(&volume.0).send())
                .await,
        )
    }

    async fn detach_and_wait(&self, volume: &VolumeId) -> Result<()> {
        self.detach(volume).await?;
        self.look_soon().await;
        until(&format!("the release of {volume}"), &self.pace().until(self.pace().attached), async || {
            Ok(match self.volume(volume).await? {
                Some(found) if found.state == Some(VolumeState::Available) => Probe::Ready(()),
                Some(found) => {
                    let state = attachment(&found)
                        .map_or(state_of(&found).to_owned(), |a| a.state.as_str().to_owned());
                    Probe::NotYet(state)
                }
                None => Probe::NotYet("not to be seen".to_owned()),
            })
        })
        .await
    }

    pub(super) async fn keep_volumes(&self, run: &RunId) -> Result<Vec<VolumeId>> {
        self.0.made.settled(run).await;
        let mut ids: BTreeSet<String> = self.0.made.of(run, |run| run.volumes.clone());
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
        // A copy of a root disk that stays attached may be what the instance boots from next time.
        for id in &ids {
            self.detach(id).await?;
        }
        Ok(ids)
    }

    pub(super) async fn kept_volume(&self, run: &RunId) -> Result<Option<VolumeId>> {
        let filters = [tag_filter(tag::RUN, &run.0), filter("tag-key", [tag::KEPT])];
        let mut found = self.volumes(&run.0, &filters).await?;
        found.retain(|volume| matches!(volume.state, Some(VolumeState::Available | VolumeState::InUse)));
        let newest = found.into_iter().max_by_key(|volume| convert::time(volume.create_time.as_ref()));
        newest.map(|volume| convert::id("vol", volume.volume_id.as_deref()).map(VolumeId)).transpose()
    }
}

fn in_use(volume: &VolumeId, by: &Attachment<'_>) -> anyhow::Error {
    Kind::Cloud.error(format!(
        "{volume} is attached to {} as {} ({})",
        by.instance,
        by.device,
        by.state.as_str()
    ))
}

fn stuck(volume: &VolumeId, a: &Attachment<'_>) -> anyhow::Error {
    let text = format!("{volume} is stuck: it stays {} as {}", a.state.as_str(), a.device);
    Kind::Cloud.failure(text).hint("A reboot of the instance frees its device names.").into()
}

fn no_name(instance: &str) -> anyhow::Error {
    let hint = "Detach volumes from the instance.";
    Kind::Cloud.failure(format!("no device name is free on {instance}")).hint(hint).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_of_run_step_and_attempt() {
        let (a, b) = (RunId("a".into()), RunId("b".into()));
        assert_eq!(token(&a, "volume", 1).len(), 64);
        assert_eq!(token(&a, "volume", 1), token(&a, "volume", 1));
        let all: BTreeSet<String> =
            [token(&a, "volume", 1), token(&a, "volume", 2), token(&b, "volume", 1), token(&a, "image", 1)]
                .into();
        assert_eq!(all.len(), 4);
    }
}
