//! Converts between EC2's types and oven's.

use crate::cloud::ec2_rules::is_id;
use crate::cloud::{Image, ImageState, Tags, VolumeKind, image_attributes};
use crate::error::Kind;
use crate::ids::{Architecture, ImageId, SnapshotId};
use anyhow::Result;
use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types;
use std::time::SystemTime;

pub fn filter(name: impl Into<String>, values: impl IntoIterator<Item = impl Into<String>>) -> types::Filter {
    types::Filter::builder().name(name).set_values(Some(values.into_iter().map(Into::into).collect())).build()
}

/// Makes a filter for the exact value of a tag. The characters `*`, `?` and `\` are escaped.
pub fn tag_filter(key: &str, value: &str) -> types::Filter {
    let mut exact = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, '*' | '?' | '\\') {
            exact.push('\\');
        }
        exact.push(c);
    }
    filter(format!("tag:{key}"), [exact])
}

pub fn to_tags(tags: &Tags) -> Vec<types::Tag> {
    tags.iter().map(|(key, value)| types::Tag::builder().key(key).value(value).build()).collect()
}

pub fn from_tags(tags: &[types::Tag]) -> Tags {
    let pair =
        |tag: &types::Tag| (tag.key.clone().unwrap_or_default(), tag.value.clone().unwrap_or_default());
    tags.iter().map(pair).collect()
}

pub fn tag_specification(kind: types::ResourceType, tags: &Tags) -> types::TagSpecification {
    types::TagSpecification::builder().resource_type(kind).set_tags(Some(to_tags(tags))).build()
}

pub fn time(time: Option<&DateTime>) -> Option<SystemTime> {
    time.and_then(|time| SystemTime::try_from(*time).ok())
}

/// Returns an id that EC2 sent. Fails if the id is malformed, because ids become parts of paths and filters.
pub fn id(prefix: &str, id: Option<&str>) -> Result<String> {
    match id {
        Some(id) if is_id(prefix, id) => Ok(id.to_owned()),
        _ => Err(Kind::Cloud.error(format!("EC2's response has no valid {prefix}-… id ({id:?})"))),
    }
}

pub fn architecture(image: &types::Image) -> Option<Architecture> {
    match image.architecture.as_ref()? {
        types::ArchitectureValues::X8664 => Some(Architecture::X86_64),
        types::ArchitectureValues::Arm64 => Some(Architecture::Arm64),
        _ => None,
    }
}

pub fn state(image: &types::Image) -> ImageState {
    match image.state {
        Some(types::ImageState::Available) => ImageState::Available,
        Some(types::ImageState::Pending | types::ImageState::Transient) => ImageState::Pending,
        _ => ImageState::Failed,
    }
}

/// Returns EC2's name for the image's state. If EC2 gives a reason for the state, the reason follows in brackets.
pub fn state_text(image: &types::Image) -> String {
    let state = image.state.as_ref().map_or("in no state", types::ImageState::as_str);
    match image.state_reason.as_ref().and_then(|reason| reason.message.as_deref()) {
        Some(reason) => format!("{state} ({reason})"),
        None => state.to_owned(),
    }
}

/// Returns the mapping of the root device, if the root is an EBS volume.
pub fn root_mapping(image: &types::Image) -> Option<&types::EbsBlockDevice> {
    let root = image.root_device_name.as_deref()?;
    let mapping =
        image.block_device_mappings().iter().find(|mapping| mapping.device_name.as_deref() == Some(root));
    mapping?.ebs.as_ref()
}

/// Converts an image of this account. Returns `None` if oven does not support the image's architecture. Such an image
/// was not made by oven.
pub fn image(image: &types::Image) -> Option<Image> {
    let root = root_mapping(image);
    let snapshot = root.and_then(|root| id("snap", root.snapshot_id.as_deref()).ok());
    let size = root.and_then(|root| root.volume_size);
    Some(Image {
        id: ImageId(id("ami", image.image_id.as_deref()).ok()?),
        name: image.name.clone().unwrap_or_default(),
        state: state(image),
        architecture: architecture(image)?,
        // A failed image may have no snapshot. Then the snapshot's id is empty.
        snapshot: SnapshotId(snapshot.unwrap_or_default()),
        size_gib: size.and_then(|size| u64::try_from(size).ok()).unwrap_or(0),
        created: image.creation_date.clone().unwrap_or_default(),
        description: image.description.clone().unwrap_or_default(),
        tags: from_tags(image.tags()),
    })
}

pub fn volume_kind(ebs: &types::EbsBlockDevice) -> VolumeKind {
    let volume_type = ebs.volume_type.as_ref().map(|kind| kind.as_str().to_owned());
    // EC2 reports IOPS for a gp2 volume, but does not accept them as a parameter. So a value is left out if the volume
    // type does not accept it.
    let (iops, throughput) = image_attributes::accepted_performance(volume_type.as_deref());
    VolumeKind {
        iops: ebs.iops.filter(|_| iops).and_then(|iops| u32::try_from(iops).ok()),
        throughput: ebs.throughput.filter(|_| throughput).and_then(|mibs| u32::try_from(mibs).ok()),
        volume_type,
        encrypted: ebs.encrypted,
        kms_key: ebs.kms_key_id.clone(),
    }
}

/// Converts a number for the API. A number that is too large becomes `i32::MAX`.
pub fn to_i32(n: impl TryInto<i32>) -> i32 {
    n.try_into().unwrap_or(i32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_baseline_of_a_type_without_iops_is_not_inherited() {
        let converted = |kind: &str| {
            let ebs =
                types::EbsBlockDevice::builder().volume_type(kind.into()).iops(100).throughput(125).build();
            let kind = super::volume_kind(&ebs);
            (kind.iops, kind.throughput)
        };
        assert_eq!(converted("gp2"), (None, None));
        assert_eq!(converted("io2"), (Some(100), None));
        assert_eq!(converted("gp3"), (Some(100), Some(125)));
    }
}
