//! The interface to a cloud: its types and traits. The modules [`aws`] and [`local`] implement the traits.

pub mod aws;
pub mod block_api;
pub(crate) mod ec2_rules;
pub mod iam_policy;
pub mod image_attributes;
pub mod local;
pub mod name_conflict;

use crate::device::Device;
use crate::ids::{Architecture, ImageId, RunId, SnapshotId, VolumeId};
use crate::report::Report;
use crate::undo::{Payment, Undo};
use anyhow::Result;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::time::Duration;

pub type Tags = BTreeMap<String, String>;

/// The root device name of imported images. Debian's and Amazon's images use the same name.
pub const ROOT_DEVICE: &str = "/dev/xvda";

/// The names of oven's tags.
pub mod tag {
    /// The checksum of the image's configuration. GumGum's AMI Bakery uses the same tag, so AMI Bakery finds oven's
    /// images. oven finds images of AMI Bakery only with `--compat gumgum`.
    pub const CHECKSUM: &str = "ami_config_checksum";
    pub const FINGERPRINT: &str = "oven:fingerprint";
    /// A short digest of each input of the fingerprint. `oven plan` compares these digests to show which inputs
    /// changed.
    pub const INPUTS: &str = "oven:inputs";
    /// The definition's `name`. Images with the same `name` form a family.
    pub const NAME: &str = "oven:name";
    /// The base image's id.
    pub const BASE: &str = "oven:base";
    /// The id of the run that created a resource. A run is the work for one image in one execution of oven.
    pub const RUN: &str = "oven:run";
    /// The process that executes the run ([`crate::owner::Owner`]).
    pub const OWNER: &str = "oven:owner";
    /// Set on images that were baked with `--force`.
    pub const FORCED: &str = "oven:forced";
    /// Set on a copy of a snapshot. The value is the id of the source and the requested encryption.
    pub const COPY: &str = "oven:copy-of";
    /// Set on an imported image. The value identifies the imported disk by a digest of its blocks (`transfer/raw.rs`).
    pub const SOURCE: &str = "oven:source";
    /// Set on a volume that `--keep-on-failure` preserved.
    pub const KEPT: &str = "oven:kept";
}

/// A definition's reference to its base image. A reference to another definition is never a `BaseRef`, because it is
/// resolved earlier.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum BaseRef {
    Id(ImageId),
    /// The newest available image whose name matches; `*` and `?` are wildcards as in EC2's filters. On EC2, the owner
    /// is required. In a local region, the owner is unset or `self`.
    Name {
        name: String,
        owner: Option<String>,
    },
    /// The newest available image that has the tag. Without an owner, only images of this account are searched.
    Tag {
        key: String,
        value: String,
        owner: Option<String>,
    },
    /// The image whose id is the value of an SSM parameter.
    Ssm(String),
    /// The referenced image, even if its owner deprecated it. The inner reference is never `Deprecated`.
    Deprecated(Box<BaseRef>),
}
impl fmt::Display for BaseRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name { name, owner: None } => write!(f, "the image named {name}"),
            Self::Name { name, owner: Some(owner) } => write!(f, "the image named {name} of owner {owner}"),
            Self::Tag { key, value, owner: None } => write!(f, "the image tagged {key} = {value}"),
            Self::Tag { key, value, owner: Some(owner) } => {
                write!(f, "the image tagged {key} = {value} of owner {owner}")
            }
            Self::Deprecated(from) => write!(f, "{from} (deprecated or not)"),
            Self::Ssm(name) => write!(f, "the image in the SSM parameter {name}"),
        }
    }
}

/// An existing image that can be used as a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    pub id: ImageId,
    pub name: String,
    pub snapshot: SnapshotId,
    pub architecture: Architecture,
    /// The size of the root volume.
    pub size_gib: u64,
    /// The name of the root device, such as `/dev/xvda`.
    pub root_device: String,
    /// The attributes of the image in EC2. They are empty in a local region.
    pub attributes: Attributes,
}

/// The attributes with which an image is registered, apart from its root disk. They are inherited from the base, and
/// the settings of a definition override them. The values are those of EC2's RegisterImage; `None` means EC2's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attributes {
    /// `legacy-bios`, `uefi` or `uefi-preferred`. If unset, EC2 uses legacy-bios on x86_64 and uefi on arm64.
    pub boot_mode: Option<String>,
    pub ena: Option<bool>,
    /// The only known value is `simple`.
    pub sriov: Option<String>,
    /// `v2.0`. Needs the boot mode `uefi` (EC2 user guide, NitroTPM).
    pub tpm: Option<String>,
    /// With `v2.0`, instances of the image accept only IMDSv2.
    pub imds: Option<String>,
    /// The type and encryption of the root volume of new instances.
    pub root_volume: VolumeKind,
    /// All block device mappings except the one of the root device.
    pub mappings: Vec<Mapping>,
    /// How instances of the base are billed, as (`PlatformDetails`, `UsageOperation`).
    pub billing: Option<(String, String)>,
}

/// A block device mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mapping {
    /// For example `/dev/sdb`.
    pub device: String,
    /// The name of an instance store volume, such as `ephemeral0`. If it is set, the mapping has no EBS volume.
    pub virtual_name: Option<String>,
    pub snapshot: Option<SnapshotId>,
    pub size_gib: Option<u64>,
    pub kind: VolumeKind,
    pub delete_on_termination: Option<bool>,
}

/// The type and encryption of a volume. `None` means the cloud's default. The local region accepts all values and
/// ignores them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeKind {
    /// For example `gp3`.
    pub volume_type: Option<String>,
    pub iops: Option<u32>,
    /// The throughput in MiB/s.
    pub throughput: Option<u32>,
    pub encrypted: Option<bool>,
    /// The id, ARN or alias of a KMS key. It may be set only if `encrypted` is true.
    pub kms_key: Option<String>,
}

/// The result of checking whether an action is permitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Permission {
    /// For example `ec2:CreateVolume`.
    pub action: String,
    pub verdict: PermissionVerdict,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PermissionVerdict {
    Granted,
    Missing,
    /// The permission could not be checked. The text is the reason.
    Unknown(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageState {
    Pending,
    Available,
    Failed,
}

/// A registered image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub id: ImageId,
    pub name: String,
    pub state: ImageState,
    pub architecture: Architecture,
    pub snapshot: SnapshotId,
    /// The size of the root volume.
    pub size_gib: u64,
    /// The creation time in RFC 3339, in UTC and with milliseconds. Such times can be sorted as text.
    pub created: String,
    #[serde(default)]
    pub description: String,
    pub tags: Tags,
}

impl Image {
    /// Returns whether `run` created this image.
    pub fn was_created_by(&self, run: &RunId) -> bool {
        self.tags.get(tag::RUN) == Some(&run.0)
    }
}

/// The key by which the image of a finished bake is found. All fields have to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BakeKey {
    /// The value of the tag `ami_config_checksum`.
    pub checksum: String,
    /// The value of the tag `oven:fingerprint`. `None` with `--compat gumgum`, which compares only the checksum.
    pub fingerprint: Option<String>,
    pub architecture: Architecture,
}

/// Describes an image to register.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSpec {
    pub name: String,
    pub description: String,
    pub architecture: Architecture,
    pub root_device: String,
    pub size_gib: u64,
    pub attributes: Attributes,
    /// The tags of the image. The snapshot was tagged when it was created.
    pub tags: Tags,
    pub run: RunId,
    /// The documents of the image. A document is a text that is stored with the image, such as the list of its
    /// packages. The key is the document's name: `packages`, `inputs.json`.
    pub documents: BTreeMap<String, String>,
}

/// A run whose process has ended without removing all of the run's resources.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StaleRun {
    pub run: RunId,
    pub owner: String,
    /// Resource ids.
    pub resources: Vec<String>,
    /// Whether `--keep-on-failure` preserved the resources.
    pub kept: bool,
}

/// Operations on images. The most important ones find and register images.
#[async_trait(?Send)]
pub trait Cloud {
    /// Returns the base image that `from` refers to. If there is no such image, the error is of
    /// [`Kind::NotFound`](crate::error::Kind::NotFound) and contains the reference.
    async fn base(&self, from: &BaseRef) -> Result<Base>;

    /// Returns the newest available image of this account that matches the key. If all matching images are pending,
    /// other bakes are registering them, and this function waits until one is available.
    async fn find(&self, key: &BakeKey) -> Result<Option<Image>>;

    /// Registers an image of the snapshot, waits until it is available, and verifies it. If several builders register
    /// the same name, only one of them succeeds. If another builder has registered an image with the same fingerprint
    /// under this name, this function returns that image, and the clean-up action in `undo` deletes this run's
    /// snapshot. If this run registers the image, the clean-up action is cancelled, because the image uses the
    /// snapshot.
    async fn register(&self, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image>;

    /// Returns the images that oven baked or imported, oldest first. With `family`, returns only the images whose
    /// definition has this `name`.
    async fn images(&self, family: Option<&str>) -> Result<Vec<Image>>;

    /// Returns one image, and the documents that were stored with it.
    async fn image(&self, id: &ImageId) -> Result<(Image, BTreeMap<String, String>)>;

    /// Deregisters the image that has this name, and deletes its snapshot. The image must have been created by oven,
    /// and it must have failed or be incomplete. Otherwise, this function fails. Returns `None` if no image has the
    /// name.
    async fn replace_failed(&self, name: &str) -> Result<Option<ImageId>>;

    /// Removes an image, and its snapshot if no other image uses it. oven does not remove images in AWS. There, this
    /// function fails with [`Kind::Usage`](crate::error::Kind::Usage).
    async fn remove(&self, id: &ImageId, snapshot: &SnapshotId) -> Result<()>;

    /// Returns the command with which a user can remove the image.
    fn removal_command(&self, id: &ImageId) -> String;

    /// Returns the runs whose process has ended without removing all of the run's resources. If oven cannot know
    /// whether the process has ended, for example because it ran on another host, the run is returned only if its
    /// newest resource is older than `older_than`.
    async fn stale_runs(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>>;

    /// Removes files that killed runs left and that belong to no resource. Only a local region has such files.
    async fn tidy(&self) -> Result<()> {
        Ok(())
    }

    /// Fails with [`Kind::Cloud`](crate::error::Kind::Cloud) if oven lacks a permission that a bake on this base needs
    /// at its beginning or at its end. The check has to be fast, because it runs before every bake. A local region
    /// permits everything.
    async fn ensure_permitted(&self, _: &Base) -> Result<()> {
        Ok(())
    }

    /// Checks the connection to the cloud: credentials, endpoint and clock. Returns the name and the result of each
    /// check.
    async fn connection(&self) -> Vec<(String, Result<()>)> {
        Vec::new()
    }

    /// Checks every permission that oven needs in this cloud.
    async fn permissions(&self) -> Result<Vec<Permission>> {
        Ok(Vec::new())
    }

    /// Returns an object that copies disks of this machine into images. `None` means that the disks' blocks have to be
    /// uploaded.
    fn disk_copier(&self) -> Option<&dyn DiskCopier> {
        None
    }

    /// Returns whether the cloud can have images that oven did not create. [`Cloud::images`] omits such images.
    fn has_foreign_images(&self) -> bool {
        true
    }

    /// Returns whether the cloud's volumes and snapshots are files on this machine.
    fn is_on_this_machine(&self) -> bool {
        false
    }

    /// Returns whether this machine may have credentials for the cloud. If so, steps must not be able to reach them.
    fn has_credentials(&self) -> bool {
        true
    }
}

/// Copies raw disks of this machine into images, which is faster than uploading their blocks.
#[async_trait(?Send)]
pub trait DiskCopier {
    /// Copies a file or a block device. If an image with this name exists and is a copy of the same disk, returns that
    /// image. Fails if the image with this name is a copy of another disk.
    async fn copy_disk(
        &self,
        raw: &Path,
        name: &str,
        architecture: Architecture,
        report: &Report,
    ) -> Result<Image>;
}

/// Describes a volume to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    pub snapshot: SnapshotId,
    pub size_gib: u64,
    pub kind: VolumeKind,
    pub run: RunId,
    pub tags: Tags,
}

/// Operations on volumes. Bakes with attached disks use them.
#[async_trait(?Send)]
pub trait Volumes {
    /// Returns the directory of this machine in which the volumes are, or `None` if they are not on this machine. If its
    /// disk is full, a write to a volume fails with an I/O error, which does not mention the reason.
    fn directory(&self) -> Option<&Path> {
        None
    }

    async fn create(&self, spec: &VolumeSpec) -> Result<VolumeId>;

    /// Attaches the volume, and verifies that the returned device is this volume. Dropping the returned value releases
    /// the device.
    async fn attach(&self, volume: &VolumeId) -> Result<Device>;

    /// Takes a snapshot of the volume, and returns when the snapshot is complete. The call that creates the snapshot
    /// also sets `tags`. After that, the snapshot no longer depends on the volume, so the volume may be detached.
    async fn snapshot(&self, volume: &VolumeId, run: &RunId, tags: &Tags) -> Result<SnapshotId>;

    /// Tags the run's volumes as preserved, so that `sweep` does not delete them.
    async fn keep(&self, run: &RunId) -> Result<Vec<VolumeId>>;

    /// Returns the volume that the run preserved with [`Self::keep`], if there is one.
    async fn kept(&self, run: &RunId) -> Result<Option<VolumeId>>;

    /// Detaches and deletes every volume of the run.
    async fn ensure_no_volumes(&self, run: &RunId) -> Result<()>;

    /// Returns [`Self::ensure_no_volumes`] as a future that can run in the background. `None` means that the removal is
    /// too fast to be worth running in the background.
    fn removal(&self, _run: &RunId) -> Option<Payment> {
        None
    }

    /// Deletes every snapshot of the run that no image uses.
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()>;
}
