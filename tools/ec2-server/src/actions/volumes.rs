//! Volumes: created, attached, detached, deleted.

use super::{Ask, Ctx, internal, shapes, tag_specifications};
use crate::faults::Turn;
use crate::iam::Target;
use crate::refusal::{Result, no};
use crate::world::{Attachment, Kind, Phase, Tags, Token, Volume, now};
use crate::{attach as devices, xml::Xml};
use oven::cloud::{VolumeKind, VolumeSpec, Volumes};
use oven::ids::{RunId, SnapshotId, VolumeId};
use std::rc::Rc;

/// Fills in the defaults of a volume type, and refuses parameters that the type does not have.
pub fn check_kind(kind: &mut Kind, size: u32) -> Result<()> {
    let name = kind.volume_type.clone();
    let not = |parameter: &str| {
        crate::refusal::refuse(
            "InvalidParameterCombination",
            format!("The parameter {parameter} is not supported for {name} volumes."),
        )
    };
    let within = |parameter: &str, value: Option<u32>, least: u32, most: u32| {
        if value.is_some_and(|value| !(least..=most).contains(&value)) {
            no!(
                "InvalidParameterValue",
                "Volume {parameter} must be between {least} and {most} for {name} volumes"
            );
        }
        Ok(())
    };
    if kind.throughput.is_some() && name != "gp3" {
        return Err(not("throughput"));
    }
    match name.as_str() {
        "gp3" => {
            within("iops", kind.iops, 3000, 80_000)?;
            within("throughput", kind.throughput, 125, 2000)?;
            let iops = *kind.iops.get_or_insert(3000);
            let throughput = *kind.throughput.get_or_insert(125);
            if iops > 3000 && iops > size.saturating_mul(500) {
                no!(
                    "InvalidParameterValue",
                    "Iops to volume size ratio of {iops}:{size} is too high; maximum is 500:1"
                );
            }
            if throughput * 4 > iops {
                no!(
                    "InvalidParameterValue",
                    "Throughput (MiBps) to iops ratio of {throughput}:{iops} is too high; maximum is 0.25 MiBps per iops"
                );
            }
        }
        "io1" | "io2" => {
            if kind.iops.is_none() {
                no!("MissingParameter", "The parameter iops must be specified for {name} volumes.");
            }
            within("iops", kind.iops, 100, 256_000)?;
        }
        "gp2" | "standard" | "sc1" | "st1" => {
            if kind.iops.is_some() {
                return Err(not("iops"));
            }
            if name == "gp2" {
                kind.iops = Some((size * 3).clamp(100, 16_000));
            }
            let least = if name.ends_with('1') { 125 } else { 1 };
            within("size", Some(size), least, 16_384)?;
        }
        _ => no!("UnknownVolumeType", "Unsupported volume type '{name}' for volume creation."),
    }
    within("size", Some(size), 1, 16_384)
}

/// The parameters that may differ when a client token is used again.
const NOT_OF_TOKEN: [&str; 3] = ["ClientToken", "AvailabilityZone", "AvailabilityZoneId"];

pub async fn create(ctx: &Ctx, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let mut given = p.fields().clone();
    given.retain(|name, _| !NOT_OF_TOKEN.contains(&name.as_str()));
    let (token, zone) = (p.text("ClientToken"), p.required("AvailabilityZone")?);
    let (snapshot, size) = (p.text("SnapshotId"), p.integer("Size")?);
    let encrypted = p.boolean("Encrypted")?;
    let mut kind = Kind {
        volume_type: p.text("VolumeType").unwrap_or_else(|| "gp2".into()),
        iops: p.integer("Iops")?,
        throughput: p.integer("Throughput")?,
        encrypted: encrypted.unwrap_or(false),
        key: p.text("KmsKeyId"),
    };
    if p.boolean("MultiAttachEnabled")? == Some(true) {
        no!("InvalidParameterCombination", "Multi-Attach is not supported by this server.");
    }
    let tags = tag_specifications(p, "volume")?;
    if token.as_ref().is_some_and(|token| token.len() > 64 || !token.is_ascii()) {
        no!("InvalidParameterValue", "A client token has at most 64 ASCII characters");
    }
    if kind.key.is_some() && encrypted != Some(true) {
        no!(
            "InvalidParameterDependency",
            "The parameter KmsKeyId requires the parameter Encrypted to be set."
        );
    }
    if snapshot.is_none() && ask.dry_run {
        // EC2 creates empty volumes. This server only checks the permission for them.
        ask.permitted(&ctx.state(), &[Target::made("volume", &tags)])?;
        ask.really()?;
    }
    let Some(snapshot) = snapshot else {
        if ask.dry_run {
            ask.permitted(&ctx.state(), &[Target::made("volume", &tags)])?;
            ask.really()?;
        }
        no!(
            "InvalidParameterCombination",
            "This server makes volumes of snapshots alone: SnapshotId is missing."
        )
    };
    let (size, product_codes) = {
        let (state, now, none) = (ctx.state(), now(), Tags::new());
        let base = state.world.snapshot(&snapshot, now);
        let tags_of = base.as_ref().map_or(&none, |s| &s.common.tags);
        ask.permitted(&state, &[Target::made("volume", &tags), Target::new(&snapshot, tags_of)])?;
        if let Some(used) = token.as_ref().and_then(|token| state.world.tokens.get(token)) {
            let volume = state.world.volumes.get(&used.id);
            // If the volume failed, its token cannot be used again.
            let burnt = volume.is_none_or(|v| {
                now >= v.common.ready_at && matches!(v.common.turn, Some(Turn::Failed | Turn::Vanishes))
            });
            match volume {
                Some(volume) if used.params == given && !burnt => {
                    ask.really()?;
                    let mut xml = Xml::default();
                    shapes::volume(&mut xml, volume, now);
                    return Ok(xml);
                }
                _ => no!(
                    "IdempotentParameterMismatch",
                    "The client token you have provided is associated with a resource that is already deleted or has \
                     other parameters. Use a different client token."
                ),
            }
        }
        if !state.options.zones().contains(&zone) {
            no!("InvalidZone.NotFound", "The zone '{zone}' does not exist.");
        }
        let base = base?;
        if !base.is_usable(&state.options.account) {
            no!("InvalidSnapshot.NotFound", "The snapshot '{snapshot}' does not exist.");
        }
        if base.state(now) != "completed" {
            no!("IncorrectState", "Snapshot is in invalid state - {}", base.state(now));
        }
        let size = size.unwrap_or(base.size);
        if size < base.size {
            no!(
                "InvalidParameterValue",
                "The volume size is invalid: {size} GiB is smaller than snapshot {snapshot}, expect size >= {} GiB",
                base.size
            );
        }
        kind.encrypted |= base.encrypted;
        if kind.encrypted && kind.key.is_none() {
            kind.key = Some(base.key.clone().unwrap_or_else(|| "alias/aws/ebs".into()));
        }
        check_kind(&mut kind, size)?;
        let live = state.world.volumes.values().filter(|v| !v.common.is_gone(now)).count();
        if live >= state.options.limits.volumes {
            no!("VolumeLimitExceeded", "Maximum number of volumes, {live}, exceeded.");
        }
        ask.really()?;
        (size, base.product_codes.clone())
    };
    let spec = VolumeSpec {
        snapshot: SnapshotId(snapshot.clone()),
        size_gib: size.into(),
        kind: VolumeKind::default(),
        run: RunId("ec2-server".into()),
        tags: Default::default(),
    };
    let id = ctx.region.create(&spec).await.map_err(internal)?.0;
    let mut state = ctx.state();
    let key = kind.key.as_ref().filter(|_| kind.encrypted);
    let turn =
        ask.turn.or_else(|| key.is_some_and(|k| !state.options.keys.contains(k)).then_some(Turn::Vanishes));
    let delay = state.options.delays.creating;
    let common = state.common(&id, tags, delay, turn);
    let volume = Volume {
        common,
        size,
        snapshot,
        zone,
        kind,
        product_codes,
        attachment: None,
        snapshots_at: Vec::new(),
    };
    state.change(|world| {
        if let Some(token) = token {
            world.tokens.insert(token, Token { params: given, id: id.clone() });
        }
        world.volumes.insert(id.clone(), volume.clone());
    });
    let mut xml = Xml::default();
    // EC2 responds with `creating`, even if the volume is ready immediately.
    shapes::volume(&mut xml, &volume, volume.common.created.saturating_sub(1));
    Ok(xml)
}

fn is_device_name(name: &str) -> bool {
    let name = name.strip_prefix("/dev/").unwrap_or(name);
    let letter = |b: u8| b.is_ascii_lowercase();
    match (name.strip_prefix("sd"), name.strip_prefix("xvd")) {
        (Some(rest), _) => rest.len() == 1 && rest.bytes().all(letter),
        (_, Some(rest)) => match rest.as_bytes() {
            [one] => letter(*one),
            // The last name that EC2 accepts is xvddx.
            [first, second] => {
                (b'a'..=b'd').contains(first) && letter(*second) && (*first, *second) <= (b'd', b'x')
            }
            _ => false,
        },
        _ => false,
    }
}

pub async fn attach(ctx: &Rc<Ctx>, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (id, on, device) = (p.required("VolumeId")?, p.required("InstanceId")?, p.required("Device")?);
    let attachment = {
        let (mut state, now, none) = (ctx.state(), now(), Tags::new());
        let (volume, instance) = (state.world.volume(&id, now), state.world.instance(&on, now));
        let of = volume.as_ref().map_or(&none, |v| &v.common.tags);
        let its = instance.as_ref().map_or(&none, |i| &i.common.tags);
        ask.permitted(&state, &[Target::new(&id, of), Target::new(&on, its)])?;
        let (volume, instance) = (volume?, instance?);
        if !is_device_name(&device) {
            no!(
                "InvalidParameterValue",
                "Value ({device}) for parameter device is invalid. {device} is not a valid EBS device name."
            );
        }
        if instance.state != "running" {
            no!("IncorrectState", "Instance '{on}' is not 'running'.");
        }
        if volume.attachment.is_some() {
            no!("VolumeInUse", "{id} is already attached to an instance");
        }
        if volume.state(now) != "available" {
            no!("IncorrectState", "{id} is not 'available'.");
        }
        if volume.zone != instance.zone {
            no!(
                "InvalidVolume.ZoneMismatch",
                "The volume '{id}' is not in the same availability zone as instance '{on}'"
            );
        }
        if !volume.product_codes.is_empty() {
            no!(
                "OperationNotPermitted",
                "'{id}' with Marketplace codes may not be attached as a secondary device."
            );
        }
        if state.world.holder(instance, &device).is_some() {
            no!(
                "InvalidParameterValue",
                "Invalid value '{device}' for unixDevice. Attachment point {device} is already in use"
            );
        }
        let taken = instance.devices.len() + state.world.attached_to(&on).count();
        if taken >= state.options.limits.attachments {
            no!("AttachmentLimitExceeded", "Volume attachment limit of {taken} exceeded for instance {on}.");
        }
        ask.really()?;
        let sticky = state.options.sticky_names.as_millis() as u64;
        let stuck = instance.freed.get(&device).is_some_and(|freed| now < freed + sticky);
        let turn = ask.turn.or(stuck.then_some(Turn::Stuck));
        state.change(|world| {
            world.attachments += 1;
            let attachment = Attachment {
                instance: on.clone(),
                device: device.clone(),
                since: now,
                phase: Phase::Attaching,
                delete_on_termination: false,
                turn,
                number: world.attachments,
            };
            if let Some(volume) = world.volumes.get_mut(&id) {
                volume.attachment = Some(attachment.clone());
            }
            attachment
        })
    };
    let mut xml = Xml::default();
    shapes::attachment(&mut xml, &id, &attachment);
    devices::attach(ctx, &id, attachment).await?;
    Ok(xml)
}

pub async fn detach(ctx: &Rc<Ctx>, mut ask: Ask) -> Result<Xml> {
    let p = &mut ask.params;
    let (id, from, device) = (p.required("VolumeId")?, p.text("InstanceId"), p.text("Device"));
    let force = p.boolean("Force")?.unwrap_or(false);
    let attachment = {
        let (mut state, now, none) = (ctx.state(), now(), Tags::new());
        let volume = state.world.volume(&id, now);
        let mut targets = vec![Target::new(&id, volume.as_ref().map_or(&none, |v| &v.common.tags))];
        let on =
            volume.as_ref().ok().and_then(|v| state.world.instances.get(&v.attachment.as_ref()?.instance));
        targets.extend(on.map(|instance| Target::new(&instance.common.id, &instance.common.tags)));
        ask.permitted(&state, &targets)?;
        let volume = volume?;
        let Some(attachment) = volume.attachment.clone() else {
            no!("IncorrectState", "Volume '{id}' is in the '{}' state.", volume.state(now))
        };
        let other = |given: &Option<String>, is: &str| given.as_ref().is_some_and(|given| given != is);
        if other(&from, &attachment.instance) || other(&device, &attachment.device) {
            no!(
                "InvalidAttachment.NotFound",
                "The volume '{id}' is not attached to instance '{}' as device '{}'.",
                from.unwrap_or_default(),
                device.unwrap_or_default()
            );
        }
        ask.really()?;
        if matches!(attachment.phase, Phase::Detaching | Phase::Busy) && !force {
            // The client repeats the call, but EC2 is already detaching the volume.
            let mut xml = Xml::default();
            shapes::attachment(&mut xml, &id, &attachment);
            return Ok(xml);
        }
        let attachment = Attachment { phase: Phase::Detaching, turn: ask.turn, ..attachment };
        state.change(|world| {
            if let Some(volume) = world.volumes.get_mut(&id) {
                volume.attachment = Some(attachment.clone());
            }
        });
        attachment
    };
    let mut xml = Xml::default();
    shapes::attachment(&mut xml, &id, &attachment);
    devices::detach(ctx, &id, attachment, force).await;
    Ok(xml)
}

pub async fn delete(ctx: &Ctx, mut ask: Ask) -> Result<Xml> {
    let id = ask.params.required("VolumeId")?;
    {
        let (state, now, none) = (ctx.state(), now(), Tags::new());
        let volume = state.world.volume(&id, now);
        ask.permitted(&state, &[Target::new(&id, volume.as_ref().map_or(&none, |v| &v.common.tags))])?;
        let volume = volume?;
        if let Some(attachment) = &volume.attachment {
            no!("VolumeInUse", "Volume {id} is currently attached to {}", attachment.instance);
        }
        // A volume that never becomes ready can also be deleted.
        if volume.state(now) == "creating" && volume.common.turn != Some(Turn::Stuck) {
            no!("IncorrectState", "The volume '{id}' is 'creating'");
        }
        ask.really()?;
    }
    remove(ctx, &id).await?;
    let mut xml = Xml::default();
    xml.text("return", true);
    Ok(xml)
}

/// Deletes a volume and its data.
pub async fn remove(ctx: &Ctx, id: &str) -> Result<()> {
    let deleted = ctx.state().world.volumes.get(id).is_none_or(|v| v.common.gone_at.is_some());
    if deleted {
        return Ok(());
    }
    ctx.region.delete_volume(&VolumeId(id.to_owned())).await.map_err(internal)?;
    let mut state = ctx.state();
    let delay = state.options.delays.deleting;
    let gone = now() + state.drawn(delay);
    state.change(|world| {
        if let Some(volume) = world.volumes.get_mut(id) {
            volume.common.gone_at = Some(gone);
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names() {
        for good in ["/dev/sdf", "sdf", "/dev/xvdf", "/dev/xvdaa", "/dev/xvdbz", "/dev/xvddx"] {
            assert!(is_device_name(good), "{good}");
        }
        for bad in
            ["/dev/sdf1", "/dev/xvddy", "/dev/xvdea", "/dev/nvme1n1", "/dev/hda", "", "/dev/sd", "/dev/sdA"]
        {
            assert!(!is_device_name(bad), "{bad}");
        }
    }

    #[test]
    fn kinds() {
        let kind = |volume_type: &str, iops, throughput| Kind {
            volume_type: volume_type.into(),
            iops,
            throughput,
            ..Kind::default()
        };
        let code =
            |mut kind: Kind, size| check_kind(&mut kind, size).map_or_else(|e| e.code, |()| String::new());
        assert_eq!(code(kind("gp3", None, None), 8), "");
        assert_eq!(code(kind("gp3", Some(4000), Some(1000)), 8), "");
        assert_eq!(code(kind("gp3", Some(2999), None), 8), "InvalidParameterValue");
        assert_eq!(code(kind("gp3", Some(4001), None), 8), "InvalidParameterValue");
        assert_eq!(code(kind("gp3", None, Some(751)), 8), "InvalidParameterValue");
        assert_eq!(code(kind("gp2", Some(3000), None), 8), "InvalidParameterCombination");
        assert_eq!(code(kind("gp2", None, Some(125)), 8), "InvalidParameterCombination");
        assert_eq!(code(kind("io1", None, None), 8), "MissingParameter");
        assert_eq!(code(kind("st1", None, None), 8), "InvalidParameterValue");
        assert_eq!(code(kind("gp9", None, None), 8), "UnknownVolumeType");
        assert_eq!(code(kind("gp3", None, None), 0), "InvalidParameterValue");
    }
}
