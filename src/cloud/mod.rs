//! What oven needs of a cloud: names and traits. No implementation.

pub mod aws;
pub mod block_api;
pub(crate) mod ec2_rules;
pub mod iam_policy;
pub mod image_attributes;
pub mod local;
pub mod name_conflict;

use crate::device::Device;
use crate::ids::{Architecture, ImageId, RunId, SnapshotId, VolumeId};
use crate::undo::{Payment, Undo};
use anyhow::Result;
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

pub type Tags = BTreeMap<String, String>;

/// What an imported image is registered with, as Debian's and Amazon's own are.
pub const ROOT_DEVICE: &str = "/dev/xvda";

/// The names of oven's tags.
pub mod tag {
    /// GumGum's AMI Bakery calls it so: an image baked by either is found by the other.
    pub const CHECKSUM: &str = "ami_config_checksum";
    pub const FINGERPRINT: &str = "oven:fingerprint";
    /// A short digest for each input of the fingerprint, so that a miss can be explained.
    pub const INPUTS: &str = "oven:inputs";
    /// The family: the definition's `name`.
    pub const NAME: &str = "oven:name";
    /// The base image's id.
    pub const BASE: &str = "oven:base";
    /// The run that made a resource.
    pub const RUN: &str = "oven:run";
    /// The process that the run is ([`crate::owner::Owner`]).
    pub const OWNER: &str = "oven:owner";
    /// Baked with `--force`.
    pub const FORCED: &str = "oven:forced";
    /// The snapshot that one is a copy of, and the key that it was copied under.
    pub const COPY: &str = "oven:copy-of";
    /// Of an image that was imported: what tells its disk from others ([`crate::transfer::raw::digest`]).
    pub const SOURCE: &str = "oven:source";
    /// A volume that `--keep-on-failure` kept.
    pub const KEPT: &str = "oven:kept";
}

/// How a definition names its base image, once a parent definition has become an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum BaseRef {
    Id(ImageId),
    /// The newest available image whose name matches; `*` and `?` match as EC2's filters do.
    /// Without an owner: one of our own.
    Name {
        name: String,
        owner: Option<String>,
    },
    /// The newest available image that carries the tag. Without an owner: one of our own.
    Tag {
        key: String,
        value: String,
        owner: Option<String>,
    },
    /// The id that an SSM parameter holds.
    Ssm(String),
    /// That one, even if its owner deprecated it. Never nested.
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

/// A base image, found and fit to bake on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    pub id: ImageId,
    pub name: String,
    pub snapshot: SnapshotId,
    pub architecture: Architecture,
    /// The root volume's.
    pub size_gib: u64,
    /// As registered: `/dev/xvda`.
    pub root_device: String,
    /// The cloud's own; nothing in a local region.
    pub attributes: Attributes,
}

/// What an image is registered with beside its root disk. It is inherited from the base, and a definition's explicit
/// settings win. Words are EC2's own (RegisterImage): `None` leaves it to EC2.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Attributes {
    /// `legacy-bios`, `uefi` or `uefi-preferred`. Unset, EC2 takes legacy-bios on x86_64 and uefi on arm64.
    pub boot_mode: Option<String>,
    pub ena: Option<bool>,
    /// `simple`.
    pub sriov: Option<String>,
    /// `v2.0`. Needs the boot mode `uefi` (EC2 user guide, NitroTPM).
    pub tpm: Option<String>,
    /// `v2.0`: instances of the image take IMDSv2 alone.
    pub imds: Option<String>,
    /// Of the root volume of instances of the image.
    pub root_volume: VolumeKind,
    /// All mappings but the root's.
    pub mappings: Vec<Mapping>,
    /// What instances of the base are billed as: (`PlatformDetails`, `UsageOperation`).
    pub billing: Option<(String, String)>,
}

/// A block device mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mapping {
    /// `/dev/sdb`.
    pub device: String,
    /// Instance store: `ephemeral0`. Then there is no volume.
    pub virtual_name: Option<String>,
    pub snapshot: Option<SnapshotId>,
    pub size_gib: Option<u64>,
    pub kind: VolumeKind,
    pub delete_on_termination: Option<bool>,
}

/// What kind of volume; `None` leaves it to the cloud. The local region has one kind and refuses nothing.
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

/// Whether an action is permitted to us, as a DryRun told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Permission {
    /// `ec2:CreateVolume`.
    pub action: String,
    pub verdict: Verdict,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Granted,
    Missing,
    /// It could not be judged, and why.
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
    /// The root volume's.
    pub size_gib: u64,
    /// RFC 3339, UTC, with milliseconds: sorts as text.
    pub created: String,
    #[serde(default)]
    pub description: String,
    pub tags: Tags,
}

impl Image {
    /// Whether it is the result of this run.
    pub fn made_by(&self, run: &RunId) -> bool {
        self.tags.get(tag::RUN) == Some(&run.0)
    }
}

/// What a look-up of a finished bake compares. All of it has to agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    /// `ami_config_checksum`.
    pub checksum: String,
    /// `oven:fingerprint`; `None` with `--compat gumgum`, which looks at the checksum alone.
    pub fingerprint: Option<String>,
    pub architecture: Architecture,
}

/// What is registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageSpec {
    pub name: String,
    pub description: String,
    pub architecture: Architecture,
    pub root_device: String,
    pub size_gib: u64,
    pub attributes: Attributes,
    /// For the image; the snapshot was given its own when it was made.
    pub tags: Tags,
    pub run: RunId,
    /// Texts that are kept with the image, by name: `packages`, `inputs.json`.
    pub documents: BTreeMap<String, String>,
}

/// A run of which something is still there, and whose process is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StaleRun {
    pub run: RunId,
    pub owner: String,
    /// Resource ids.
    pub resources: Vec<String>,
    /// Kept on purpose by `--keep-on-failure`.
    pub kept: bool,
}

/// Images: looked up, found again, registered.
#[async_trait(?Send)]
pub trait Cloud {
    /// The base image that `from` names. `NotFound` names what was looked for.
    async fn base(&self, from: &BaseRef) -> Result<Base>;

    /// The newest image that fits the key, ours and available. One that is `pending` is another bake at work: it is
    /// waited for.
    async fn find(&self, key: &Key) -> Result<Option<Image>>;

    /// Registers the snapshot and answers when the image is available and was read back. The name is the
    /// compare-and-set: if another builder's image of the same fingerprint holds it, that image is adopted and
    /// answered, and our own snapshot stays owed. Otherwise the snapshot's debt is forgiven.
    async fn register(&self, snapshot: &SnapshotId, spec: &ImageSpec, undo: &Undo) -> Result<Image>;

    /// Our images, oldest first; those of one family if it is named.
    async fn images(&self, family: Option<&str>) -> Result<Vec<Image>>;

    /// One image, and the documents that were kept with it.
    async fn image(&self, id: &ImageId) -> Result<(Image, BTreeMap<String, String>)>;

    /// Deregisters the image of this name, and deletes its snapshot, if it is a failed or incomplete one that carries
    /// our tags; any other is refused. Nothing of that name: `None`.
    async fn replace_failed(&self, name: &str) -> Result<Option<ImageId>>;

    /// Runs that left something behind and whose owner is gone. An owner of another host counts as gone only when
    /// what it left is older than `older_than`.
    async fn stale_runs(&self, older_than: Option<Duration>) -> Result<Vec<StaleRun>>;

    /// Fails, with [`Kind::Cloud`](crate::error::Kind::Cloud), where a bake on this base could not even begin, or not
    /// end, for want of permission. Cheap: asked before every bake that is a miss. A local region permits everything.
    async fn ensure_permitted(&self, _: &Base) -> Result<()> {
        Ok(())
    }

    /// What was looked at of the way to the cloud (credentials, endpoint, clock), and what is wrong with it.
    async fn connection(&self) -> Vec<(String, Result<()>)> {
        Vec::new()
    }

    /// Every permission that oven needs here, judged.
    async fn permissions(&self) -> Result<Vec<Permission>> {
        Ok(Vec::new())
    }
}

/// A volume to create.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeSpec {
    pub snapshot: SnapshotId,
    pub size_gib: u64,
    pub kind: VolumeKind,
    pub run: RunId,
    pub tags: Tags,
}

/// Volumes, for strategy (a): create, attach, snapshot.
#[async_trait(?Send)]
pub trait Volumes {
    async fn create(&self, spec: &VolumeSpec) -> Result<VolumeId>;

    /// Attaches, and answers with the device verified to be this volume. It is released when the value is dropped.
    async fn attach(&self, volume: &VolumeId) -> Result<Device>;

    /// A snapshot of what was written; answers when it is complete. `tags` are set in the same call. From then on the
    /// volume need not be attached any more.
    async fn snapshot(&self, volume: &VolumeId, run: &RunId, tags: &Tags) -> Result<SnapshotId>;

    /// Tags the run's volumes as kept, so that `sweep` passes them over.
    async fn keep(&self, run: &RunId) -> Result<Vec<VolumeId>>;

    /// The volume that a run kept.
    async fn kept(&self, run: &RunId) -> Result<Option<VolumeId>>;

    /// Detaches and deletes every volume of the run.
    async fn ensure_no_volumes(&self, run: &RunId) -> Result<()>;

    /// The same, to be done beside something else. `None`: it takes no time that would be worth it.
    fn removal(&self, _run: &RunId) -> Option<Payment> {
        None
    }

    /// Deletes every snapshot of the run that no image uses.
    async fn ensure_no_snapshots(&self, run: &RunId) -> Result<()>;
}
