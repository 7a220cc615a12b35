//! Compares a registered image with its specification, field by field.

use super::convert;
use super::convert::from_tags;
use crate::cloud::{Attributes, ImageSpec, Mapping, Tags};
use crate::ids::SnapshotId;
use aws_sdk_ec2::types;

/// Returns the IOPS and the throughput to request. A value is `None` if the volume type does not accept it. A base
/// image's mapping can contain such a value, because EC2 reports it.
fn performance(kind: &crate::cloud::VolumeKind) -> (Option<i32>, Option<i32>) {
    let of = |types: &[&str]| kind.volume_type.as_deref().is_some_and(|kind| types.contains(&kind));
    let iops = kind.iops.filter(|_| of(&["gp3", "io1", "io2"])).map(convert::to_i32);
    (iops, kind.throughput.filter(|_| of(&["gp3"])).map(convert::to_i32))
}

fn ebs(kind: &crate::cloud::VolumeKind) -> types::builders::EbsBlockDeviceBuilder {
    let (iops, throughput) = performance(kind);
    types::EbsBlockDevice::builder()
        .set_volume_type(kind.volume_type.as_deref().map(types::VolumeType::from))
        .set_iops(iops)
        .set_throughput(throughput)
}

/// Returns the mappings to register. The root's mapping comes first.
pub fn mappings(spec: &ImageSpec, snapshot: &SnapshotId) -> Vec<types::BlockDeviceMapping> {
    let root = ebs(&spec.attributes.root_volume)
        .snapshot_id(&snapshot.0)
        .volume_size(convert::to_i32(spec.size_gib))
        .delete_on_termination(true);
    let root = types::BlockDeviceMapping::builder().device_name(&spec.root_device).ebs(root.build()).build();
    std::iter::once(root).chain(spec.attributes.mappings.iter().map(other_mapping)).collect()
}

fn other_mapping(mapping: &Mapping) -> types::BlockDeviceMapping {
    let device = types::BlockDeviceMapping::builder().device_name(&mapping.device);
    if let Some(name) = &mapping.virtual_name {
        return device.virtual_name(name).build();
    }
    let mut ebs = ebs(&mapping.kind)
        .set_snapshot_id(mapping.snapshot.as_ref().map(|snapshot| snapshot.0.clone()))
        .set_volume_size(mapping.size_gib.map(convert::to_i32))
        .set_delete_on_termination(mapping.delete_on_termination);
    // If the mapping has a snapshot, the snapshot determines the encryption, and EC2 rejects parameters for it.
    if mapping.snapshot.is_none() {
        ebs = ebs.set_encrypted(mapping.kind.encrypted).set_kms_key_id(mapping.kind.kms_key.clone());
    }
    device.ebs(ebs.build()).build()
}

/// Returns one text for each difference between an image and its specification. Tags are not compared here, because
/// missing tags can be set again.
pub fn differences(image: &types::Image, spec: &ImageSpec, snapshot: &SnapshotId) -> Vec<String> {
    let mut all = Vec::new();
    let mut same = |what: &str, wanted: Option<&str>, found: Option<&str>| {
        if wanted.is_some() && wanted != found {
            all.push(format!("{what} is {}, not {}", found.unwrap_or("not set"), wanted.unwrap_or("")));
        }
    };
    let Attributes { boot_mode, ena, sriov, tpm, imds, .. } = &spec.attributes;
    let text = |flag: Option<bool>| flag.map(|flag| if flag { "on" } else { "off" });
    let virtualization = image.virtualization_type.as_ref().map(types::VirtualizationType::as_str);
    let description = Some(spec.description.as_str()).filter(|text| !text.is_empty());
    same("the name", Some(&spec.name), image.name.as_deref());
    same("the description", description, image.description.as_deref());
    same(
        "the architecture",
        Some(spec.architecture.as_str()),
        image.architecture.as_ref().map(|a| a.as_str()),
    );
    same("the virtualization", Some("hvm"), virtualization);
    same("the root device", Some(&spec.root_device), image.root_device_name.as_deref());
    same("the boot mode", boot_mode.as_deref(), image.boot_mode.as_ref().map(|mode| mode.as_str()));
    same("ENA support", text(*ena), text(Some(image.ena_support.unwrap_or(false))));
    same("SR-IOV support", sriov.as_deref(), image.sriov_net_support.as_deref());
    same("TPM support", tpm.as_deref(), image.tpm_support.as_ref().map(|tpm| tpm.as_str()));
    same("IMDS support", imds.as_deref(), image.imds_support.as_ref().map(|imds| imds.as_str()));
    for wanted in mappings(spec, snapshot) {
        let device = wanted.device_name.as_deref().unwrap_or_default();
        let found =
            image.block_device_mappings().iter().find(|found| found.device_name.as_deref() == Some(device));
        let Some(found) = found else {
            // EC2 can leave out the mapping of an instance store. So only EBS mappings are required.
            if wanted.ebs.is_some() {
                all.push(format!("{device} is not mapped"));
            }
            continue;
        };
        let Some(ebs) = &wanted.ebs else { continue };
        let theirs = found.ebs.as_ref();
        let mut same = |what: &str, wanted: Option<String>, found: Option<String>| {
            if wanted.is_some() && wanted != found {
                let (wanted, found) =
                    (wanted.unwrap_or_default(), found.unwrap_or_else(|| "not set".to_owned()));
                all.push(format!("the {what} of {device} is {found}, not {wanted}"));
            }
        };
        let number = |n: Option<i32>| n.map(|n| n.to_string());
        let of = |get: fn(&types::EbsBlockDevice) -> Option<i32>| number(theirs.and_then(get));
        let kind =
            |ebs: &types::EbsBlockDevice| ebs.volume_type.as_ref().map(|kind| kind.as_str().to_owned());
        let end = |ebs: &types::EbsBlockDevice| ebs.delete_on_termination.map(|flag| flag.to_string());
        same("snapshot", ebs.snapshot_id.clone(), theirs.and_then(|ebs| ebs.snapshot_id.clone()));
        same("size", number(ebs.volume_size), of(|ebs| ebs.volume_size));
        same("type", kind(ebs), theirs.and_then(kind));
        same("IOPS", number(ebs.iops), of(|ebs| ebs.iops));
        same("throughput", number(ebs.throughput), of(|ebs| ebs.throughput));
        same("deletion at termination", end(ebs), theirs.and_then(end));
    }
    all
}

/// Returns a text if EC2 bills the image differently from its base. A different billing means that a licence was lost
/// or added.
pub fn billing_difference(image: &types::Image, spec: &ImageSpec) -> Option<String> {
    let (details, usage) = spec.attributes.billing.as_ref()?;
    let found = (image.platform_details.as_deref(), image.usage_operation.as_deref());
    let same = found == (Some(details), Some(usage));
    // If EC2 does not report how the image is billed, the image counts as plain Linux.
    let plain = found == (None, None) && usage == "RunInstances";
    let (other_details, other_usage) = (found.0.unwrap_or("nothing"), found.1.unwrap_or("nothing"));
    (!same && !plain).then(|| {
        format!(
            "it is billed as {other_details} ({other_usage}), but its base is billed as {details} ({usage})"
        )
    })
}

/// Returns each wanted tag that the image lacks, or that has another value on the image.
pub fn missing_tags(image: &types::Image, wanted: &Tags) -> Tags {
    let found = from_tags(image.tags());
    wanted
        .iter()
        .filter(|(key, value)| found.get(*key) != Some(value))
        .map(|(k, v)| (k.clone(), v.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cloud::VolumeKind;
    use crate::ids::{Architecture, RunId};
    use aws_sdk_ec2::types::builders::ImageBuilder;

    fn snapshot() -> SnapshotId {
        SnapshotId("snap-0123456789abcdef0".into())
    }

    fn spec() -> ImageSpec {
        let gp3 = VolumeKind {
            volume_type: Some("gp3".into()),
            iops: Some(3000),
            throughput: Some(125),
            encrypted: Some(true),
            kms_key: None,
        };
        ImageSpec {
            name: "web-1".into(),
            description: "a web server".into(),
            architecture: Architecture::X86_64,
            root_device: "/dev/xvda".into(),
            size_gib: 8,
            attributes: Attributes {
                boot_mode: Some("uefi".into()),
                ena: Some(true),
                tpm: Some("v2.0".into()),
                root_volume: gp3,
                mappings: vec![
                    Mapping {
                        device: "/dev/sdb".into(),
                        virtual_name: Some("ephemeral0".into()),
                        ..Default::default()
                    },
                    Mapping {
                        device: "/dev/sdc".into(),
                        size_gib: Some(1),
                        kind: VolumeKind {
                            volume_type: Some("gp2".into()),
                            iops: Some(100),
                            encrypted: Some(true),
                            ..Default::default()
                        },
                        ..Default::default()
                    },
                ],
                billing: Some(("Linux/UNIX".into(), "RunInstances".into())),
                ..Default::default()
            },
            tags: [("a".to_owned(), "b".to_owned())].into(),
            run: RunId("r".into()),
            documents: Default::default(),
        }
    }

    fn registered() -> ImageBuilder {
        let spec = spec();
        types::Image::builder()
            .name("web-1")
            .description("a web server")
            .architecture(types::ArchitectureValues::X8664)
            .virtualization_type(types::VirtualizationType::Hvm)
            .root_device_name("/dev/xvda")
            .boot_mode(types::BootModeValues::Uefi)
            .ena_support(true)
            .tpm_support(types::TpmSupportValues::V20)
            .set_block_device_mappings(Some(mappings(&spec, &snapshot())))
            .platform_details("Linux/UNIX")
            .usage_operation("RunInstances")
            .tags(types::Tag::builder().key("a").value("b").build())
    }

    #[test]
    fn mappings_have_only_accepted_parameters() {
        let all = mappings(&spec(), &snapshot());
        let root = all[0].ebs.as_ref().unwrap();
        assert_eq!((root.iops, root.throughput, root.encrypted), (Some(3000), Some(125), None));
        assert_eq!(root.delete_on_termination, Some(true));
        assert_eq!(all[1].virtual_name.as_deref(), Some("ephemeral0"));
        let blank = all[2].ebs.as_ref().unwrap();
        assert_eq!((blank.iops, blank.encrypted), (None, Some(true)));
    }

    #[test]
    fn every_field_is_compared() {
        let differ = |image: ImageBuilder| differences(&image.build(), &spec(), &snapshot());
        assert_eq!(differ(registered()), Vec::<String>::new());
        let other = types::BlockDeviceMapping::builder().device_name("/dev/xvda");
        let root = types::EbsBlockDevice::builder().snapshot_id("snap-2").volume_size(9).build();
        for (image, count, text) in [
            (registered().name("x"), 1, "the name is x, not web-1"),
            (registered().description("x"), 1, "the description"),
            (registered().architecture(types::ArchitectureValues::Arm64), 1, "the architecture is arm64"),
            (
                registered().virtualization_type(types::VirtualizationType::Paravirtual),
                1,
                "the virtualization",
            ),
            (registered().root_device_name("/dev/sda1"), 1, "the root device"),
            (registered().set_boot_mode(None), 1, "the boot mode is not set, not uefi"),
            (registered().ena_support(false), 1, "ENA support is off, not on"),
            (registered().set_tpm_support(None), 1, "TPM support"),
            (registered().set_block_device_mappings(None), 2, "/dev/xvda is not mapped"),
            (
                registered().set_block_device_mappings(Some(vec![other.ebs(root).build()])),
                7,
                "the snapshot of /dev/xvda is snap-2, not snap-0123456789abcdef0",
            ),
        ] {
            let all = differ(image);
            assert_eq!(all.len(), count, "{all:?}");
            assert!(all.iter().any(|difference| difference.contains(text)), "{all:?}");
        }
    }

    #[test]
    fn billing_and_tags() {
        let rhel = |spec: &mut ImageSpec| {
            spec.attributes.billing = Some(("Red Hat Enterprise Linux".into(), "RunInstances:0010".into()));
        };
        assert_eq!(billing_difference(&registered().build(), &spec()), None);
        let mut red = spec();
        rhel(&mut red);
        assert!(billing_difference(&registered().build(), &red).unwrap().contains("RunInstances:0010"));
        let silent = registered().set_platform_details(None).set_usage_operation(None).build();
        assert_eq!(billing_difference(&silent, &spec()), None);
        assert!(billing_difference(&silent, &red).is_some());
        assert!(missing_tags(&registered().build(), &spec().tags).is_empty());
        assert_eq!(missing_tags(&registered().set_tags(None).build(), &spec().tags), spec().tags);
    }
}
