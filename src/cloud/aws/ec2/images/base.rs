//! Finds the base image that a definition names, and checks whether it can be used as a base.

use super::convert;
use super::convert::{filter, tag_filter};
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::client::call::ApiError;
use crate::cloud::aws::ec2::client::errors::{DESCRIBE_IMAGES, GET_PARAMETER};
use crate::cloud::ec2_rules::is_id;
use crate::cloud::{Attributes, Base, BaseRef, ImageState, Mapping};
use crate::error::{Failure, Kind};
use crate::ids::{Architecture, ImageId, SnapshotId};
use crate::sys::poll::{PollAnswer, poll_until};
use anyhow::{Context, Error, Result};
use aws_sdk_ec2::operation::describe_images::builders::DescribeImagesFluentBuilder;
use aws_sdk_ec2::types;
use std::time::SystemTime;

/// The owners that DescribeImages accepts in addition to account numbers.
const ALIASES: &[&str] = &["self", "amazon", "aws-marketplace", "aws-backup-vault"];

fn not_found(from: &BaseRef, why: &str) -> Failure {
    Kind::NotFound.failure(format!("{from} was not found or is not available: {why}"))
}

fn unusable(from: &BaseRef, image: &types::Image, why: &str) -> Failure {
    let id = image.image_id.as_deref().unwrap_or("?");
    let found = if from.to_string().starts_with(id) { String::new() } else { format!(" ({from})") };
    Kind::Definition.failure(format!("{id}{found} cannot be used as a base: {why}"))
}

fn check_owner(owner: &str) -> Result<()> {
    if ALIASES.contains(&owner) || owner.len() == 12 && owner.bytes().all(|b| b.is_ascii_digit()) {
        return Ok(());
    }
    let text = format!("{owner:?} is not a valid owner of an image");
    let hint = format!("Use an account number of 12 digits, or one of {}.", ALIASES.join(", "));
    Err(Kind::Definition.failure(text).hint(hint).into())
}

impl Ec2 {
    pub(crate) async fn find_base(&self, from: &BaseRef) -> Result<Base> {
        let (from, deprecated) = match from {
            BaseRef::Deprecated(from) => (&**from, true),
            from => (from, false),
        };
        let image = match from {
            BaseRef::Id(id) => self.find_by_id(from, &id.0).await?,
            BaseRef::Ssm(parameter) => {
                let id = self.parameter(from, parameter).await?;
                self.find_by_id(from, &id).await?
            }
            BaseRef::Name { name, owner } => {
                let Some(owner) = owner else {
                    let text = format!("the base image {name:?} needs an `owner`");
                    let hint = "Anybody can publish an image under any name. Add owner = \"self\" or the owner's account \
                                number.";
                    return Err(Kind::Definition.failure(text).hint(hint).into());
                };
                self.find_newest(from, owner, filter("name", [name.as_str()]), deprecated).await?
            }
            BaseRef::Tag { key, value, owner } => {
                let owner = owner.as_deref().unwrap_or("self");
                self.find_newest(from, owner, tag_filter(key, value), deprecated).await?
            }
            BaseRef::Deprecated(_) => unreachable!("never nested"),
        };
        let image = self.wait_for_base(from, image).await?;
        check_base(from, &image, deprecated, Architecture::runs_here, SystemTime::now())
    }

    async fn find_by_id(&self, from: &BaseRef, id: &str) -> Result<types::Image> {
        if !is_id("ami", id) {
            return Err(not_found(from, &format!("{id:?} is not an image id")).into());
        }
        let described =
            self.describe(id, |call| call.image_ids(id).include_deprecated(true).include_disabled(true));
        let absent = |why: &str| {
            let hint = format!(
                "Check that the image is in the region {} and is shared with this account.",
                self.region()
            );
            Error::from(not_found(from, why).hint(hint))
        };
        match described.await {
            Ok(images) => images.into_iter().next().ok_or_else(|| absent("EC2 does not know this id")),
            // EC2 returns this error for an image that is not shared with this account.
            Err(refused)
                if refused.is("AuthFailure") && refused.message.contains("Not authorized for image") =>
            {
                Err(absent(&refused.to_string()))
            }
            Err(refused) if refused.code.as_deref().is_some_and(|code| code.starts_with("InvalidAMIID")) => {
                Err(absent(&refused.to_string()))
            }
            Err(refused) => Err(refused.into()),
        }
    }

    async fn describe(
        &self,
        what: &str,
        build: impl Fn(DescribeImagesFluentBuilder) -> DescribeImagesFluentBuilder,
    ) -> Result<Vec<types::Image>, ApiError> {
        self.describe_images(&DESCRIBE_IMAGES, what, build).await
    }

    /// Returns the best image that matches. Images of this machine's architecture are better than others. If the
    /// architecture does not decide, available images are better than pending ones. If the state does not decide
    /// either, the newest image is the best.
    async fn find_newest(
        &self,
        from: &BaseRef,
        owner: &str,
        wanted: types::Filter,
        deprecated: bool,
    ) -> Result<types::Image> {
        check_owner(owner)?;
        let what = from.to_string();
        let described =
            self.describe(&what, |call| call.owners(owner).filters(wanted.clone()).include_deprecated(true));
        let mut found = described.await?;
        let all = found.len();
        let now = SystemTime::now();
        found.retain(|image| convert::state(image) != ImageState::Failed);
        let usable = found.len();
        found.retain(|image| deprecated || !is_deprecated(image, now));
        let why = match (all, usable, found.len()) {
            (0, ..) => format!("the owner {owner} has no matching image in {}", self.region()),
            (_, 0, _) => format!("none of the {all} matching images is available"),
            (.., 0) => "all matching images are deprecated".to_owned(),
            _ => String::new(),
        };
        let rank = |image: &types::Image| {
            let here = convert::architecture(image) == Some(Architecture::HOST);
            let available = convert::state(image) == ImageState::Available;
            (here, available, image.creation_date.clone())
        };
        found.into_iter().max_by_key(rank).ok_or_else(|| {
            let hint = match usable {
                0 => "Check the owner and the region. An image that is not public must be shared with this account.",
                _ => "Use another image, or add `deprecated = true` to `from`.",
            };
            not_found(from, &why).hint(hint).into()
        })
    }

    /// Returns the image id in an SSM parameter. The parameter's value is the id, or a JSON object with the key
    /// `image_id`.
    async fn parameter(&self, from: &BaseRef, name: &str) -> Result<String> {
        self.ssm().context("SSM is not configured")?;
        let send = async || {
            let client = self.ssm().expect("it is configured");
            let sent = client.get_parameter().name(name).send().await;
            sent.map_err(|error| ApiError::of(&GET_PARAMETER, name, error))
        };
        let answer = match self.repeat(&GET_PARAMETER, name, send).await {
            Ok(answer) => answer,
            Err(refused)
                if refused.code.as_deref().is_some_and(|code| code.starts_with("ParameterNotFound")) =>
            {
                let hint = format!(
                    "Check the parameter with `aws ssm get-parameter --region {} --name {name}`.",
                    self.region()
                );
                return Err(not_found(from, "the parameter does not exist").hint(hint).into());
            }
            Err(refused) => return Err(refused.into()),
        };
        let value = answer.parameter.and_then(|parameter| parameter.value).unwrap_or_default();
        let json = serde_json::from_str::<serde_json::Value>(&value).ok();
        let inner = json.as_ref().and_then(|json| json.get("image_id")?.as_str());
        let id = inner.unwrap_or(value.trim());
        if is_id("ami", id) {
            return Ok(id.to_owned());
        }
        let shown: String = value.chars().take(60).collect();
        Err(not_found(from, &format!("the parameter's value is {shown:?}, not an image id")).into())
    }

    /// Waits while the base image is pending.
    async fn wait_for_base(&self, from: &BaseRef, image: types::Image) -> Result<types::Image> {
        if convert::state(&image) != ImageState::Pending {
            return Ok(image);
        }
        let id = convert::id("ami", image.image_id.as_deref())?;
        self.wait_before_first_poll().await;
        poll_until(
            &format!("the base image {id}"),
            &self.timeouts().until(self.timeouts().image),
            async || {
                let image = self.find_by_id(from, &id).await?;
                Ok(match convert::state(&image) {
                    ImageState::Pending => PollAnswer::NotYet(convert::state_text(&image)),
                    _ => PollAnswer::Ready(image),
                })
            },
        )
        .await
    }
}

fn is_deprecated(image: &types::Image, now: SystemTime) -> bool {
    let time = image.deprecation_time.as_deref().and_then(|time| humantime::parse_rfc3339_weak(time).ok());
    time.is_some_and(|time| time <= now)
}

/// Checks whether an image can be used as a base, and returns the properties that a bake inherits from it.
fn check_base(
    from: &BaseRef,
    image: &types::Image,
    deprecated: bool,
    runs_here: impl Fn(Architecture) -> bool,
    now: SystemTime,
) -> Result<Base> {
    let id = ImageId(convert::id("ami", image.image_id.as_deref())?);
    let reject = |why: &str, hint: &str| Err(unusable(from, image, why).hint(hint).into());
    match convert::state(image) {
        ImageState::Available => {}
        _ => {
            let hint = if image.state == Some(types::ImageState::Disabled) {
                "The image's owner can enable it again with `aws ec2 enable-image`."
            } else {
                "Use another base image."
            };
            return Err(not_found(from, &format!("it is {}", convert::state_text(image))).hint(hint).into());
        }
    }
    if image.image_allowed == Some(false) {
        return reject(
            "the account's Allowed AMIs setting excludes it",
            "Allow the image's owner in this setting of EC2.",
        );
    }
    if is_deprecated(image, now) && !deprecated {
        let when = image.deprecation_time.as_deref().unwrap_or("now");
        return reject(
            &format!("its owner deprecated it ({when})"),
            &format!("Use a newer image, or permit this one: from = {{ id = \"{id}\", deprecated = true }}."),
        );
    }
    if image.root_device_type == Some(types::DeviceType::InstanceStore) {
        return reject(
            "its root is on instance store, so it has no snapshot",
            "Use an image whose root is on EBS.",
        );
    }
    if image.virtualization_type == Some(types::VirtualizationType::Paravirtual) {
        return reject("it is a paravirtual image", "Use an HVM image.");
    }
    if image.platform == Some(types::PlatformValues::Windows) {
        return reject("it is a Windows image", "Use a Linux image.");
    }
    let Some(architecture) = convert::architecture(image) else {
        let name = image.architecture.as_ref().map_or("unknown", types::ArchitectureValues::as_str);
        return reject(&format!("its architecture is {name}"), "Use an x86_64 or arm64 image.");
    };
    if !runs_here(architecture) {
        let why = format!("its architecture is {architecture}, but this builder's is {}", Architecture::HOST);
        return reject(
            &why,
            "Bake on a machine with the image's architecture, because oven runs the image's programs.",
        );
    }
    if !image.product_codes().is_empty() {
        let codes: Vec<&str> =
            image.product_codes().iter().filter_map(|code| code.product_code_id.as_deref()).collect();
        let why = format!("it has the Marketplace product code {}", codes.join(", "));
        let hint = "EC2 attaches a volume with a product code only to a stopped instance. Use another image.";
        return reject(&why, hint);
    }
    let root_device = image.root_device_name.clone().unwrap_or_default();
    let is_root =
        |mapping: &&types::BlockDeviceMapping| mapping.device_name.as_deref() == Some(&*root_device);
    if image.block_device_mappings().iter().filter(is_root).count() > 1 {
        let why = format!("it has several mappings for its root device {root_device:?}");
        return reject(&why, "Use another base image.");
    }
    let Some(root) = convert::root_mapping(image) else {
        let why = format!("it has no mapping for its root device {root_device:?}");
        return reject(&why, "Use another base image.");
    };
    let Some(snapshot) = root.snapshot_id.as_deref() else {
        return reject("its root volume has no snapshot", "Use another base image.");
    };
    Ok(Base {
        id,
        name: image.name.clone().unwrap_or_default(),
        snapshot: SnapshotId(convert::id("snap", Some(snapshot))?),
        architecture,
        size_gib: root
            .volume_size
            .and_then(|size| u64::try_from(size).ok())
            .filter(|size| *size > 0)
            .ok_or_else(|| {
                Error::from(unusable(from, image, "EC2 does not report the size of its root volume"))
            })?,
        attributes: attributes(image, root, &root_device),
        root_device,
    })
}

fn attributes(image: &types::Image, root: &types::EbsBlockDevice, root_device: &str) -> Attributes {
    let others =
        image.block_device_mappings().iter().filter(|m| m.device_name.as_deref() != Some(root_device));
    Attributes {
        boot_mode: image.boot_mode.as_ref().map(|mode| mode.as_str().to_owned()),
        ena: image.ena_support,
        sriov: image.sriov_net_support.clone().filter(|sriov| !sriov.is_empty()),
        tpm: image.tpm_support.as_ref().map(|tpm| tpm.as_str().to_owned()),
        imds: image.imds_support.as_ref().map(|imds| imds.as_str().to_owned()),
        root_volume: convert::volume_kind(root),
        mappings: others.filter_map(mapping).collect(),
        billing: image.platform_details.clone().zip(image.usage_operation.clone()),
    }
}

/// Converts the mapping of a device that is not the root device. Returns `None` if the mapping has neither an EBS
/// volume nor a virtual name. Such a mapping says that the instance has no such device.
fn mapping(mapping: &types::BlockDeviceMapping) -> Option<Mapping> {
    let device = mapping.device_name.clone()?;
    if let Some(ebs) = &mapping.ebs {
        return Some(Mapping {
            device,
            virtual_name: None,
            snapshot: ebs.snapshot_id.clone().map(SnapshotId),
            size_gib: ebs.volume_size.and_then(|size| u64::try_from(size).ok()),
            kind: convert::volume_kind(ebs),
            delete_on_termination: ebs.delete_on_termination,
        });
    }
    let virtual_name = mapping.virtual_name.clone()?;
    Some(Mapping { device, virtual_name: Some(virtual_name), ..Mapping::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::hint_of;
    use aws_sdk_ec2::types::builders::ImageBuilder;
    use std::time::{Duration, UNIX_EPOCH};

    const ID: &str = "ami-0123456789abcdef0";
    const SNAPSHOT: &str = "snap-0123456789abcdef0";

    fn swap() -> types::BlockDeviceMapping {
        types::BlockDeviceMapping::builder().device_name("/dev/sdb").virtual_name("ephemeral0").build()
    }

    fn good() -> ImageBuilder {
        let root = types::EbsBlockDevice::builder()
            .snapshot_id(SNAPSHOT)
            .volume_size(8)
            .volume_type(types::VolumeType::Gp3)
            .iops(3000)
            .encrypted(false);
        let mapping = types::BlockDeviceMapping::builder().device_name("/dev/xvda").ebs(root.build()).build();
        types::Image::builder()
            .image_id(ID)
            .name("debian")
            .state(types::ImageState::Available)
            .architecture(types::ArchitectureValues::X8664)
            .virtualization_type(types::VirtualizationType::Hvm)
            .root_device_type(types::DeviceType::Ebs)
            .root_device_name("/dev/xvda")
            .block_device_mappings(mapping)
            .block_device_mappings(swap())
            .boot_mode(types::BootModeValues::UefiPreferred)
            .ena_support(true)
            .sriov_net_support("simple")
            .imds_support(types::ImdsSupportValues::V20)
            .platform_details("Linux/UNIX")
            .usage_operation("RunInstances")
    }

    fn now() -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    fn check_at_test_time(image: ImageBuilder, deprecated: bool) -> Result<Base> {
        let from = BaseRef::Id(ImageId(ID.into()));
        check_base(
            &from,
            &image.build(),
            deprecated,
            |architecture| architecture == Architecture::X86_64,
            now(),
        )
    }

    #[test]
    fn attributes_are_inherited_from_a_good_base() {
        let base = check_at_test_time(good(), false).unwrap();
        assert_eq!(
            (base.snapshot.0.as_str(), base.size_gib, base.root_device.as_str()),
            (SNAPSHOT, 8, "/dev/xvda")
        );
        let attributes = base.attributes;
        assert_eq!(attributes.boot_mode.as_deref(), Some("uefi-preferred"));
        assert_eq!((attributes.ena, attributes.sriov.as_deref()), (Some(true), Some("simple")));
        assert_eq!((attributes.imds.as_deref(), attributes.tpm), (Some("v2.0"), None));
        assert_eq!(attributes.root_volume.volume_type.as_deref(), Some("gp3"));
        assert_eq!(attributes.root_volume.iops, Some(3000));
        assert_eq!(attributes.mappings.len(), 1);
        assert_eq!(attributes.mappings[0].virtual_name.as_deref(), Some("ephemeral0"));
        assert_eq!(attributes.billing, Some(("Linux/UNIX".into(), "RunInstances".into())));
    }

    #[test]
    fn each_unfit_base_is_rejected_with_its_reason() {
        use types::{ArchitectureValues, DeviceType, ImageState, PlatformValues, VirtualizationType};
        let code = types::ProductCode::builder().product_code_id("abc123").build();
        for (image, kind, text) in [
            (good().state(ImageState::Disabled), Kind::NotFound, "it is disabled"),
            (good().state(ImageState::Deregistered), Kind::NotFound, "it is deregistered"),
            (good().state(ImageState::Failed), Kind::NotFound, "it is failed"),
            (good().root_device_type(DeviceType::InstanceStore), Kind::Definition, "instance store"),
            (good().virtualization_type(VirtualizationType::Paravirtual), Kind::Definition, "paravirtual"),
            (good().platform(PlatformValues::Windows), Kind::Definition, "Windows"),
            (
                good().architecture(ArchitectureValues::Arm64),
                Kind::Definition,
                "is arm64, but this builder's is",
            ),
            (good().architecture(ArchitectureValues::I386), Kind::Definition, "architecture is i386"),
            (good().product_codes(code), Kind::Definition, "product code abc123"),
            (good().root_device_name("/dev/sda1"), Kind::Definition, "no mapping for its root device"),
            (
                good().root_device_name("/dev/sdb").block_device_mappings(swap()),
                Kind::Definition,
                "has several mappings",
            ),
            (good().set_block_device_mappings(None), Kind::Definition, "has no mapping"),
            (good().image_allowed(false), Kind::Definition, "Allowed AMIs"),
            (good().deprecation_time("2026-01-01T00:00:00.000Z"), Kind::Definition, "deprecated it"),
        ] {
            let error = check_at_test_time(image, false).unwrap_err();
            assert!(error.to_string().contains(text), "{error}");
            assert_eq!(Kind::of(&error), kind, "{error}");
            assert!(hint_of(&error).is_some(), "{error}");
        }
        check_at_test_time(good().deprecation_time("2026-01-01T00:00:00.000Z"), true).unwrap();
        check_at_test_time(good().deprecation_time("2030-01-01T00:00:00.000Z"), false).unwrap();
    }

    #[test]
    fn owners() {
        for good in ["self", "amazon", "136693071363"] {
            check_owner(good).unwrap();
        }
        for bad in ["", "debian", "13669307136", "13669307136x"] {
            assert_eq!(Kind::of(&check_owner(bad).unwrap_err()), Kind::Definition, "{bad}");
        }
    }

    #[test]
    fn our_own_images_are_converted() {
        let image = convert::image(&good().build()).unwrap();
        assert_eq!((image.id.0.as_str(), image.snapshot.0.as_str(), image.size_gib), (ID, SNAPSHOT, 8));
    }
}
