//! Records as XML.

use crate::options::ServerOptions;
use crate::world::{
    Attachment, Image, Instance, Kind, Mapping, Snapshot, Tags, Time, Volume, World, rfc3339,
};
use crate::xml::Xml;

pub fn tags(xml: &mut Xml, tags: &Tags) {
    xml.list("tagSet", tags, |tag, (key, value)| {
        tag.text("key", key);
        tag.text("value", value);
    });
}

fn product_codes(xml: &mut Xml, codes: &[String]) {
    xml.list("productCodes", codes, |xml, code| {
        xml.text("productCode", code);
        xml.text("type", "marketplace");
    });
}

fn kind(xml: &mut Xml, kind: &Kind) {
    xml.text("encrypted", kind.encrypted);
    xml.some("kmsKeyId", kind.key.as_ref());
    xml.text("volumeType", &kind.volume_type);
    xml.some("iops", kind.iops);
    xml.some("throughput", kind.throughput);
}

pub fn attachment(xml: &mut Xml, volume: &str, attachment: &Attachment) {
    xml.text("volumeId", volume);
    xml.text("instanceId", &attachment.instance);
    xml.text("device", &attachment.device);
    xml.text("status", attachment.phase.as_str());
    xml.text("attachTime", rfc3339(attachment.since));
    xml.text("deleteOnTermination", attachment.delete_on_termination);
}

pub fn volume(xml: &mut Xml, volume: &Volume, now: Time) {
    xml.text("volumeId", &volume.common.id);
    xml.text("size", volume.size);
    xml.text("snapshotId", &volume.snapshot);
    xml.text("availabilityZone", &volume.zone);
    xml.text("status", volume.state(now));
    xml.text("createTime", rfc3339(volume.common.created));
    xml.list("attachmentSet", &volume.attachment, |xml, a| attachment(xml, &volume.common.id, a));
    kind(xml, &volume.kind);
    xml.text("multiAttachEnabled", false);
    tags(xml, &volume.common.tags);
}

pub fn progress(snapshot: &Snapshot, now: Time) -> &'static str {
    let stuck = snapshot.common.turn == Some(crate::faults::Turn::Stuck);
    match snapshot.state(now) {
        "completed" => "100%",
        _ if stuck => "99%",
        _ => "",
    }
}

pub fn snapshot(xml: &mut Xml, snapshot: &Snapshot, now: Time) {
    let state = snapshot.state(now);
    xml.text("snapshotId", &snapshot.common.id);
    xml.text("volumeId", &snapshot.volume);
    xml.text("status", state);
    let given_up = snapshot.written.as_ref().is_some_and(|w| w.sealed.is_none());
    let why = if given_up { "The snapshot was not completed in time." } else { "It was planned so." };
    xml.some("statusMessage", (state == "error").then_some(why));
    xml.text("startTime", rfc3339(snapshot.common.created));
    xml.text("progress", progress(snapshot, now));
    xml.text("ownerId", &snapshot.common.owner);
    xml.text("volumeSize", snapshot.size);
    xml.text("description", &snapshot.description);
    xml.text("encrypted", snapshot.encrypted);
    xml.some("kmsKeyId", snapshot.key.as_ref());
    tags(xml, &snapshot.common.tags);
    xml.text("storageTier", "standard");
}

fn mapping(xml: &mut Xml, mapping: &Mapping) {
    xml.text("deviceName", &mapping.device);
    xml.some("virtualName", mapping.virtual_name.as_ref());
    if mapping.virtual_name.is_none() {
        xml.nest("ebs", |xml| {
            xml.some("snapshotId", mapping.snapshot.as_ref());
            xml.some("volumeSize", mapping.size);
            xml.text("deleteOnTermination", mapping.delete_on_termination);
            kind(xml, &mapping.kind);
        });
    }
}

pub fn mappings(xml: &mut Xml, mappings: &[Mapping]) {
    xml.list("blockDeviceMapping", mappings, mapping);
}

pub fn image(xml: &mut Xml, image: &Image, now: Time) {
    let state = image.state(now);
    xml.text("imageId", &image.common.id);
    xml.text("imageLocation", format_args!("{}/{}", image.common.owner, image.name));
    xml.text("imageState", state);
    xml.text("imageOwnerId", &image.common.owner);
    xml.text("creationDate", rfc3339(image.common.created));
    xml.text("isPublic", image.public);
    product_codes(xml, &image.product_codes);
    xml.text("architecture", &image.architecture);
    xml.text("imageType", "machine");
    xml.text("platformDetails", &image.platform_details);
    xml.text("usageOperation", &image.usage_operation);
    xml.some("imageOwnerAlias", image.owner_alias.as_ref());
    xml.text("name", &image.name);
    xml.some("description", image.description.as_ref());
    xml.text("rootDeviceType", &image.root_device_type);
    xml.text("rootDeviceName", &image.root_device);
    mappings(xml, &image.mappings);
    xml.text("virtualizationType", &image.virtualization);
    tags(xml, &image.common.tags);
    xml.text("hypervisor", "xen");
    xml.some("enaSupport", image.ena);
    xml.some("sriovNetSupport", image.sriov.as_ref());
    xml.some("bootMode", image.boot_mode.as_ref());
    xml.some("tpmSupport", image.tpm.as_ref());
    xml.some("imdsSupport", image.imds.as_ref());
    xml.some("deprecationTime", image.deprecation.as_ref());
    if state == "failed" {
        xml.nest("stateReason", |xml| {
            xml.text("code", "Server.InternalError");
            xml.text("message", "Server.InternalError: It was planned so.");
        });
    }
}

pub fn instance_mappings(xml: &mut Xml, instance: &Instance, world: &World) {
    let own = instance
        .devices
        .iter()
        .map(|(device, volume)| (device, volume, "attached", instance.common.created, true));
    let attached = world.attached_to(&instance.common.id);
    let attached =
        attached.map(|(v, a)| (&a.device, &v.common.id, a.phase.as_str(), a.since, a.delete_on_termination));
    // EC2 does not define an order, so they are sorted by device.
    let mut all: Vec<_> = own.chain(attached).collect();
    all.sort();
    xml.list("blockDeviceMapping", all, |xml, (device, volume, status, since, delete)| {
        xml.text("deviceName", device);
        xml.nest("ebs", |xml| {
            xml.text("volumeId", volume);
            xml.text("status", status);
            xml.text("attachTime", rfc3339(since));
            xml.text("deleteOnTermination", delete);
        });
    });
}

pub fn instance(xml: &mut Xml, instance: &Instance, world: &World, options: &ServerOptions) {
    let code = match instance.state.as_str() {
        "pending" => 0,
        "running" => 16,
        "shutting-down" => 32,
        "terminated" => 48,
        "stopping" => 64,
        _ => 80,
    };
    xml.text("instanceId", &instance.common.id);
    xml.text("imageId", "ami-0123456789abcdef0");
    xml.nest("instanceState", |xml| {
        xml.text("code", code);
        xml.text("name", &instance.state);
    });
    xml.text("instanceType", "m5.large");
    xml.text("launchTime", rfc3339(instance.common.created));
    xml.nest("placement", |xml| {
        xml.text("availabilityZone", &instance.zone);
        xml.text("tenancy", "default");
    });
    xml.text("architecture", "x86_64");
    xml.text("rootDeviceType", "ebs");
    xml.text("rootDeviceName", "/dev/xvda");
    instance_mappings(xml, instance, world);
    xml.text("virtualizationType", "hvm");
    tags(xml, &instance.common.tags);
    xml.text("hypervisor", "xen");
    xml.text("enaSupport", true);
    if let Some(role) = &options.role {
        xml.nest("iamInstanceProfile", |xml| {
            xml.text("arn", format_args!("arn:aws:iam::{}:instance-profile/{role}", options.account));
            xml.text("id", "AIPA0123456789EXAMPLE");
        });
    }
}
