//! The cloud's interface: names and traits, without an implementation.

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

/// The root device name of imported images; Debian's and Amazon's images use the same.
pub const ROOT_DEVICE: &str = "/dev/xvda";

/// The names of oven's tags.
pub mod tag {
    /// The name that GumGum's AMI Bakery uses: each finds images that the other has baked.
    pub const CHECKSUM: &str = "ami_config_checksum";
    pub const FINGERPRINT: &str = "oven:fingerprint";
    /// A short digest for each input of the fingerprint, to explain why no image was found.
    pub const INPUTS: &str = "oven:inputs";
    /// The family: the definition's `name`.
    pub const NAME: &str = "oven:name";
    /// The base image's id.
    pub const BASE: &str = "oven:base";
    /// The run that created a resource.
    pub const RUN: &str = "oven:run";
    /// The process of the run ([`crate::owner::Owner`]).
    pub const OWNER: &str = "oven:owner";
    /// Baked with `--force`.
    pub const FORCED: &str = "oven:forced";
    /// On a copy of a snapshot: the source's id, and the key that the copy is encrypted with.
    pub const COPY: &str = "oven:copy-of";
    /// On an imported image: identifies its disk, by a digest of its blocks (`transfer/raw.rs`).
    pub const SOURCE: &str = "oven:source";
    /// On a volume that `--keep-on-failure` preserved.
    pub const KEPT: &str = "oven:kept";
}

/// A definition's reference to its base image. References to other definitions are resolved before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum BaseRef {
    Id(ImageId),
    /// The newest available image whose name matches; `*` and `?` are wildcards as in EC2's filters. Without an owner,
    /// the image belongs to this account.
    Name {
        name: String,
        owner: Option<String>,
    },
    /// The newest available image that has the tag. Without an owner, the image belongs to this account.
    Tag {
        key: String,
        value: String,
        owner: Option<String>,
    },
    /// The image whose id is the value of an SSM parameter.
    Ssm(String),
    /// The given image, even if its owner deprecated it. Never nested.
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

/// A base image that was found and can be baked on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    pub id: ImageId,
    pub name: String,
    pub snapshot: SnapshotId,
    pub architecture: Architecture,
    /// Of the root volume.
    pub size_gib: u64,
    /// As registered, such as `/dev/xvda`.
    pub root_device: String,
    /// What the image is registered with in EC2; empty in a local region.
    pub attributes: Attributes,
}

/// What an image is registered with besides its root disk. It is inherited from the base, and a definition's explicit
/// settings override it. The values are EC2's (RegisterImage); `None` uses EC2's default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attributes {
    /// `legacy-bios`, `uefi` or `uefi-preferred`. If unset, EC2 uses legacy-bios on x86_64 and uefi on arm64.
    pub boot_mode: Option<String>,
    pub ena: Option<bool>,
    /// `simple`.
    pub sriov: Option<String>,
    /// `v2.0`. Needs the boot mode `uefi` (EC2 user guide, NitroTPM).
    pub tpm: Option<String>,
    /// `v2.0`: instances of the image accept only IMDSv2.
    pub imds: Option<String>,
    /// The kind of the root volume of instances.
    pub root_volume: VolumeKind,
    /// All mappings but the root's.
    pub mappings: Vec<Mapping>,
    /// How instances of the base are billed: (`PlatformDetails`, `UsageOperation`).
    pub billing: Option<(String, String)>,
}

/// A block device mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mapping {
    /// `/dev/sdb`.
    pub device: String,
    /// Instance store, such as `ephemeral0`. Then there is no volume.
    pub virtual_name: Option<String>,
    pub snapshot: Option<SnapshotId>,
    pub size_gib: Option<u64>,
    pub kind: VolumeKind,
    pub delete_on_termination: Option<bool>,
}

/// The type and encryption of a volume; `None` uses the cloud's default. The local region accepts all values and
/// ignores them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VolumeKind {
    /// `gp3`.
    pub volume_type: Option<String>,
    pub iops: Option<u32>,
    /// MiB/s.
    pub throughput: Option<u32>,
    pub encrypted: Option<bool>,
    /// An id, ARN or alias of a KMS key; only with `encrypted`.
    pub kms_key: Option<String>,
}

/// The result of checking whether an action is permitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Permission {
    /// `ec2:CreateVolume`.
    pub action: String,
    pub verdict: PermissionVerdict,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PermissionVerdict {
    Granted,
    Missing,
    /// It could not be checked, with the reason.
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
    /// Of the root volume.
    pub size_gib: u64,
    /// RFC 3339, UTC, with milliseconds: sorts as text.
    pub created: String,
    #[serde(default)]
    pub description: String,
    pub tags: Tags,
}

impl Image {
    /// Whether this run created it.
    pub fn was_created_by(&self, run: &RunId) -> bool {
        self.tags.get(tag::RUN) == Some(&run.0)
    }
}

/// The key under which a finished bake is looked up. All of it has to match.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BakeKey {
    /// `ami_config_checksum`.
    pub checksum: String,
    /// `oven:fingerprint`; `None` with `--compat gumgum`, which compares only the checksum.
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
    /// For the image; the snapshot was tagged when it was created.
    pub tags: Tags,
    pub run: RunId,
    /// Texts that are stored with the image, by name: `packages`, `inputs.json`.
    pub documents: BTreeMap<String, String>,
}

/// A run that left resources and whose process has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StaleRun {
    pub run: RunId,
    pub owner: String,
    /// Resource ids.
    pub resources: Vec<String>,
    /// Whether they were preserved on purpose by `--keep-on-failure`.
    pub kept: bool,
}

/// Operations on images: looks them up and registers them.
#[async_trait(?Send)]
pub trait Cloud {
    /// The base image that `from` names. If it is not found, the error
    /// ([`Kind::NotFound`](crate::error::Kind::NotFound)) names what was looked for.
    async fn base(&self, from: &BaseRef) -> Result<Base>;

    /// The newest available image of this account that matches the key. A `pending` one belongs to another bake that is
    /// running: it is waited for.
    async fn find(&self, key: &BakeKey) -> Result<Option<Image>>;

    /// Registers the snapshot, waits until the image is available, and verifies it. The name is the compare-and-set: if
    /// it is taken by another builder's image with the same fingerprint, that image is returned, and the debt for our
    /// own snapshot remains. Otherwise the snapshot's debt is forgiven.
    async fn register(&self, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image>;

    /// The images of oven, oldest first; with `family`, only those of one family.
    async fn images(&self, family: Option<&str>) -> Result<Vec<Image>>;

    /// One image, and the documents that were stored with it.
    async fn image(&self, id: &ImageId) -> Result<(Image, BTreeMap<String, String>)>;

    /// Deregisters the image of this name and deletes its snapshot, if it is failed or incomplete and has oven's tags;
    /// fails for any other image. `None`: there is no image of that name.
    async fn replace_failed(&self, name: &str) -> Result<Option<ImageId>>;

    /// Removes an image, and its snapshot if no other image uses it. Fails with
    /// [`Kind::Usage`](crate::error::Kind::Usage) in a cloud where that is left to the cloud's own tools.
    async fn remove(&self, id: &ImageId, snapshot: &SnapshotId) -> Result<()>;

    /// The command that removes an image by hand.
    fn removal_command(&self, id: &ImageId) -> String;

    /// Runs that left resources and whose owner has ended. An owner on another host counts as ended only if its newest
    /// resource is older than `older_than`.
    async fn stale_runs(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>>;

    /// Fails with [`Kind::Cloud`](crate::error::Kind::Cloud) if the permissions to begin or end a bake on this base are
    /// missing. It is cheap, since it runs before every bake. A local region permits everything.
    async fn ensure_permitted(&self, _: &Base) -> Result<()> {
        Ok(())
    }

    /// Checks the connection to the cloud (credentials, endpoint, clock): what was checked, with the result.
    async fn connection(&self) -> Vec<(String, Result<()>)> {
        Vec::new()
    }

    /// Checks every permission that oven needs here.
    async fn permissions(&self) -> Result<Vec<Permission>> {
        Ok(Vec::new())
    }

    /// Copies disks of this machine into images. `None`: their blocks have to be uploaded.
    fn disk_copier(&self) -> Option<&dyn DiskCopier> {
        None
    }

    /// Whether it has images that oven did not make; [`Cloud::images`] omits these.
    fn has_foreign_images(&self) -> bool {
        true
    }

    /// Whether its volumes and snapshots are files on this machine.
    fn is_on_this_machine(&self) -> bool {
        false
    }

    /// Whether this machine may have credentials for the cloud, which steps must not reach.
    fn has_credentials(&self) -> bool {
        true
    }
}

/// Copies raw disks of this machine into images, which is faster than uploading their blocks.
#[async_trait(?Send)]
pub trait DiskCopier {
    /// Copies a file or a block device. If the name is taken by an image of the same disk, returns that image; fails if
    /// its disk is another one.
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

/// Operations on volumes, for attached disks: create, attach, take a snapshot.
#[async_trait(?Send)]
pub trait Volumes {
    async fn create(&self, spec: &VolumeSpec) -> Result<VolumeId>;

    /// Attaches the volume, and verifies that the returned device is this volume. Dropping the value releases the
    /// device.
    async fn attach(&self, volume: &VolumeId) -> Result<Device>;

    /// Takes a snapshot of what was written; returns when it is complete. `tags` are set in the same call. After that,
    /// the volume need not be attached any more.
    async fn snapshot(&self, volume: &VolumeId, run: &RunId, tags: &Tags) -> Result<SnapshotId>;

    /// Tags the run's volumes as preserved, so that `sweep` does not delete them.
    async fn keep(&self, run: &RunId) -> Result<Vec<VolumeId>>;

    /// The volume that a run preserved.
    async fn kept(&self, run: &RunId) -> Result<Option<VolumeId>>;

    /// Detaches and deletes every volume of the run.
    async fn ensure_no_volumes(&self, run: &RunId) -> Result<()>;

    /// The removal as a future to run in the background; `None`: it is too fast for that to be worthwhile.
    fn removal(&self, _run: &RunId) -> Option<Payment> {
        None
    }

    /// Deletes every snapshot of the run that no image uses.
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()>;
}
