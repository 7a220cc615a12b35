//! Attaches volumes. AttachVolume needs a device name, but the kernel chooses the device's real name. So the device is
//! found by the volume's id.

use super::{Attachment, current_attachment, state_text};
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::call::ApiError;
use crate::cloud::aws::ec2::client::call::ok_if_already_done;
use crate::cloud::aws::ec2::client::errors::{
    ATTACH_VOLUME, DETACH_VOLUME, ErrorClass, MODIFY_INSTANCE_ATTRIBUTE,
};
use crate::cloud::aws::ec2::images::convert::filter;
use crate::cloud::aws::nvme;
use crate::device::Device;
use crate::error::Kind;
use crate::ids::VolumeId;
use crate::sys::poll::{PollAnswer, PollPolicy, poll_until};
use anyhow::{Context, Result};
use aws_sdk_ec2::types::{self, VolumeAttachmentState, VolumeState};
use std::collections::BTreeSet;
use std::path::Path;
use tokio::time::Instant;

impl Ec2 {
    pub(crate) async fn attach_volume(&self, volume: &VolumeId) -> Result<Device> {
        let context = || format!("attaching {volume}");
        let mut retry = true;
        loop {
            match self.attach_once(volume).await.with_context(context)? {
                Ok(device) => return Ok(device),
                // The volume is stuck. It is detached and attached again under another name, but only once.
                Err(_) if retry => self.detach_and_wait(volume).await.with_context(context)?,
                Err(stuck) => return Err(stuck.context(context())),
            }
            retry = false;
        }
    }

    /// Attaches the volume in one attempt. `Ok(Err(…))` means that the volume is stuck, and that another attempt may
    /// succeed.
    async fn attach_once(&self, volume: &VolumeId) -> Result<Result<Device>> {
        let instance = self.instance()?;
        let name = match self.attached_to(volume, instance).await? {
            Some(name) => name,
            None => self.send_attach(volume, instance).await?,
        };
        let deadline = Instant::now() + self.timeouts().attached;
        let (what, policy) =
            (format!("the attachment of {volume}"), self.timeouts().frequent_polls(self.timeouts().attached));
        let attached = poll_until(&what, &policy, async || {
            let Some(found) = self.volume(volume).await? else {
                return Ok(PollAnswer::NotYet("not visible".to_owned()));
            };
            Ok(match current_attachment(&found) {
                Some(a) if a.instance != instance => PollAnswer::Ready(Err(in_use_error(volume, &a))),
                Some(a) if a.state == VolumeAttachmentState::Attached => PollAnswer::Ready(Ok(())),
                Some(a) if Instant::now() >= deadline => PollAnswer::Ready(Err(stuck(volume, &a))),
                Some(a) => PollAnswer::NotYet(a.state.as_str().to_owned()),
                None if Instant::now() >= deadline => {
                    let text = format!(
                        "{volume} is {} again, although EC2 had begun to attach it",
                        state_text(&found)
                    );
                    PollAnswer::Ready(Err(Kind::Cloud.error(text)))
                }
                None => PollAnswer::NotYet(state_text(&found).to_owned()),
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

    /// Returns the device name if the volume is already attached to this instance. Only a volume that
    /// `--keep-on-failure` preserved can be attached already.
    async fn attached_to(&self, volume: &VolumeId, instance: &str) -> Result<Option<String>> {
        if self.is_new(&volume.0) {
            return Ok(None);
        }
        let Some(found) = self.volume(volume).await? else {
            return Err(Kind::NotFound.error(format!("EC2 does not know the volume {volume}")));
        };
        match current_attachment(&found) {
            Some(a) if a.instance != instance => Err(in_use_error(volume, &a)),
            Some(a)
                if matches!(a.state, VolumeAttachmentState::Attached | VolumeAttachmentState::Attaching) =>
            {
                Ok(Some(a.device.to_owned()))
            }
            Some(_) => self.detach_and_wait(volume).await.map(|()| None),
            None => Ok(None),
        }
    }

    /// Returns the device names in use on this instance.
    async fn names_in_use(&self, instance: &str) -> Result<BTreeSet<String>> {
        let found = self.volumes(instance, &[filter("attachment.instance-id", [instance])]).await?;
        let mine = found.iter().flat_map(|volume| volume.attachments());
        let mine = mine.filter(|a| a.instance_id.as_deref() == Some(instance));
        Ok(mine.filter_map(|a| a.device.clone()).collect())
    }

    /// Looks up the device names that are in use. To save time, this is done while `volume` is being created. If it
    /// fails, the names are looked up again when they are needed.
    pub(crate) async fn look_up_names(&self, volume: &VolumeId) {
        if let Ok(instance) = self.instance()
            && let Ok(names) = self.names_in_use(instance).await
        {
            self.0.names.borrow_mut().seen = Some((volume.clone(), names));
        }
    }

    /// Sends AttachVolume with one name after the other until EC2 accepts one. If an answer is lost, looks up the
    /// outcome of that call.
    async fn send_attach(&self, volume: &VolumeId, instance: &str) -> Result<String> {
        let seen = self.0.names.borrow_mut().seen.take();
        let in_use_here = match seen.filter(|(of, _)| of == volume) {
            // If a name was taken in the meantime, EC2 refuses it and the next one is tried.
            Some((_, names)) => names,
            None => self.names_in_use(instance).await?,
        };
        let names = self.0.names.borrow().for_volume(&volume.0, &in_use_here);
        let mut names = names.into_iter();
        let mut name = names.next().ok_or_else(|| no_name_error(instance))?;
        let (mut lost, mut retried_in_use) = (0, false);
        loop {
            let what = format!("{volume} to {instance} as {name}");
            let send = |client: &aws_sdk_ec2::Client| {
                client.attach_volume().volume_id(&volume.0).instance_id(instance).device(&name).send()
            };
            self.0.names.borrow_mut().mark_used(&name);
            let refused = match self.call(&ATTACH_VOLUME, &what, send).await {
                Ok(_) => {
                    self.wait_before_first_poll().await;
                    return Ok(name);
                }
                Err(refused) => refused,
            };
            let text = refused.message.to_ascii_lowercase();
            if refused.is("InvalidParameterValue")
                && (text.contains("already in use") || text.contains("unixdevice"))
            {
                self.0.names.borrow_mut().mark_taken(&name);
                let next = names.next();
                if next.is_none() {
                    self.0.names.borrow_mut().forget_taken();
                }
                name = next.ok_or_else(|| no_name_error(instance))?;
            } else if refused.class == ErrorClass::Ambiguous || refused.is("VolumeInUse") {
                match self.find_attachment(volume).await? {
                    Some((to, device)) if to == instance => return Ok(device),
                    Some((to, device)) => {
                        let text = format!("{volume} is attached to {to} as {device}");
                        return Err(anyhow::Error::from(refused).context(text));
                    }
                    // Several polls showed no attachment, so the call probably had no effect. It is sent again. If the
                    // volume is attached after all, EC2 refuses the second call, and the attachment is looked up again.
                    None if refused.class == ErrorClass::Ambiguous && lost < 3 => lost += 1,
                    None if refused.class != ErrorClass::Ambiguous && !retried_in_use => {
                        retried_in_use = true
                    }
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

    /// Polls DescribeVolumes several times for an attachment of the volume. DescribeVolumes shows an attachment earlier
    /// than DescribeInstances.
    async fn find_attachment(&self, volume: &VolumeId) -> Result<Option<(String, String)>> {
        let end = Instant::now() + self.timeouts().first_poll * 4;
        loop {
            self.wait_before_first_poll().await;
            if let Some(found) = self.volume(volume).await?
                && let Some(a) = current_attachment(&found)
            {
                return Ok(Some((a.instance.to_owned(), a.device.to_owned())));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
        }
    }

    /// Waits until this machine's kernel shows the volume's device. `Ok(Err(…))` means that the device did not appear
    /// in time.
    async fn device(&self, volume: &VolumeId, name: &str) -> Result<Result<Device>> {
        let deadline = Instant::now() + self.timeouts().device;
        // The pauses are short, because this polls only the kernel, not EC2.
        let pause = self.timeouts().first_poll;
        let policy =
            PollPolicy { first: pause / 10, longest: pause, ..self.timeouts().until(self.timeouts().device) };
        poll_until(&format!("the device of {volume}"), &policy, async || {
            Ok(match (self.0.options.devices)(volume)? {
                Some(device) => PollAnswer::Ready(Ok(device)),
                None if Instant::now() >= deadline => {
                    let time = humantime::format_duration(self.timeouts().device);
                    let shown = match nvme::list(Path::new("/sys")) {
                        Ok(disks) if disks.is_empty() => "the machine has no NVMe disks".to_owned(),
                        Ok(disks) => format!("the machine's NVMe disks are {}", disks.join("; ")),
                        Err(error) => format!("the machine's NVMe disks cannot be listed: {error:#}"),
                    };
                    let text = format!(
                        "EC2 says that {volume} is attached as {name}, but this machine does not show it after {time}: \
                         {shown}"
                    );
                    let hint = "Check that --instance-id names this machine, and run `oven doctor`.";
                    PollAnswer::Ready(Err(Kind::Cloud.failure(text).hint(hint).into()))
                }
                None => PollAnswer::NotYet("not visible".to_owned()),
            })
        })
        .await
    }

    /// Requests that EC2 deletes the volume when the instance is terminated.
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
        sent.await.map_err(anyhow::Error::from).context("setting DeleteOnTermination of the volume")?;
        Ok(())
    }

    pub(crate) async fn detach(&self, volume: &VolumeId) -> Result<(), ApiError> {
        ok_if_already_done(
            self.call(&DETACH_VOLUME, &volume.0, |client| client.detach_volume().volume_id(&volume.0).send())
                .await,
        )
    }

    async fn detach_and_wait(&self, volume: &VolumeId) -> Result<()> {
        self.detach(volume).await?;
        self.wait_before_first_poll().await;
        poll_until(
            &format!("the release of {volume}"),
            &self.timeouts().until(self.timeouts().attached),
            async || {
                Ok(match self.volume(volume).await? {
                    Some(found) if found.state == Some(VolumeState::Available) => PollAnswer::Ready(()),
                    Some(found) => {
                        let state = current_attachment(&found)
                            .map_or(state_text(&found).to_owned(), |a| a.state.as_str().to_owned());
                        PollAnswer::NotYet(state)
                    }
                    None => PollAnswer::NotYet("not visible".to_owned()),
                })
            },
        )
        .await
    }
}

fn in_use_error(volume: &VolumeId, by: &Attachment<'_>) -> anyhow::Error {
    Kind::Cloud.error(format!(
        "{volume} is attached to {} as {} ({})",
        by.instance,
        by.device,
        by.state.as_str()
    ))
}

fn stuck(volume: &VolumeId, a: &Attachment<'_>) -> anyhow::Error {
    let text = format!(
        "{volume} is stuck: its attachment as {} remains in the state `{}`",
        a.device,
        a.state.as_str()
    );
    Kind::Cloud.failure(text).hint("Reboot the instance to free its device names.").into()
}

fn no_name_error(instance: &str) -> anyhow::Error {
    let hint = "Detach a volume from the instance.";
    Kind::Cloud.failure(format!("no device name is free on {instance}")).hint(hint).into()
}
