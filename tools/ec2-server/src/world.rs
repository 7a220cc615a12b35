//! The resources as plain records, and their states at a given time.

use crate::faults::Turn;
use crate::refusal::{Result, no};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub type Tags = BTreeMap<String, String>;
/// Milliseconds since 1970.
pub type Time = u64;

/// A time that never comes.
pub const NEVER: Time = Time::MAX;

pub fn now() -> Time {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis() as Time)
}

/// Formats a time as EC2 does.
pub fn rfc3339(time: Time) -> String {
    humantime::format_rfc3339_millis(UNIX_EPOCH + Duration::from_millis(time)).to_string()
}

/// The properties that all resources have.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Common {
    pub id: String,
    pub owner: String,
    pub tags: Tags,
    pub created: Time,
    /// No call finds the resource before this time.
    pub visible_at: Time,
    /// Before this time, the state is `creating` or `pending`.
    pub ready_at: Time,
    /// From this time on, the resource does not exist.
    pub gone_at: Option<Time>,
    pub turn: Option<Turn>,
    /// Whether the resource exists without a call that created it.
    pub seeded: bool,
}

impl Common {
    /// Returns whether a call at this time finds the resource.
    pub fn is_visible(&self, now: Time) -> bool {
        now >= self.visible_at && !self.is_gone(now)
    }

    pub fn is_gone(&self, now: Time) -> bool {
        let vanished = self.turn == Some(Turn::Vanishes) && now >= self.ready_at;
        vanished || self.gone_at.is_some_and(|gone| now >= gone)
    }

    pub fn is_pending(&self, now: Time) -> bool {
        now < self.ready_at || self.turn == Some(Turn::Stuck)
    }

    fn state(
        &self,
        now: Time,
        pending: &'static str,
        ready: &'static str,
        failed: &'static str,
    ) -> &'static str {
        match self.turn {
            _ if self.is_pending(now) => pending,
            Some(Turn::Failed) => failed,
            _ => ready,
        }
    }
}

/// The type of a volume. Values that the request omits are empty.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Kind {
    pub volume_type: String,
    pub iops: Option<u32>,
    pub throughput: Option<u32>,
    pub encrypted: bool,
    pub key: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    #[serde(flatten)]
    pub common: Common,
    pub size: u32,
    pub snapshot: String,
    pub zone: String,
    pub kind: Kind,
    pub product_codes: Vec<String>,
    pub attachment: Option<Attachment>,
    /// The times at which snapshots of the volume were requested.
    pub snapshots_at: Vec<Time>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Attaching,
    Attached,
    Detaching,
    Busy,
}

impl Phase {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
            Self::Busy => "busy",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    pub instance: String,
    /// The device name, such as `/dev/sdf`.
    pub device: String,
    pub since: Time,
    pub phase: Phase,
    pub delete_on_termination: bool,
    pub turn: Option<Turn>,
    /// Identifies the attachment. A later attachment of the same volume has another number.
    pub number: u64,
}

impl Volume {
    pub fn state(&self, now: Time) -> &'static str {
        match &self.attachment {
            _ if self.common.gone_at.is_some() => "deleting",
            Some(_) => "in-use",
            None => self.common.state(now, "creating", "available", "error"),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    #[serde(flatten)]
    pub common: Common,
    pub volume: String,
    pub size: u32,
    pub description: String,
    pub encrypted: bool,
    pub key: Option<String>,
    pub product_codes: Vec<String>,
    pub public: bool,
    /// Whether the account may use this snapshot although it is another account's and not public.
    #[serde(default)]
    pub shared: bool,
    /// Set for a snapshot that was started by StartSnapshot.
    #[serde(default)]
    pub written: Option<Written>,
    /// Whether it is a copy of another snapshot.
    #[serde(default)]
    pub copy: bool,
}

/// The state of a snapshot that is written block by block.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Written {
    pub parent: Option<String>,
    /// The snapshot is given up after this number of milliseconds without a call.
    pub timeout: Time,
    /// The time of the last call.
    pub touched: Time,
    /// The number of blocks and the checksum from CompleteSnapshot.
    pub sealed: Option<(u32, String)>,
}

impl Snapshot {
    pub fn state(&self, now: Time) -> &'static str {
        match &self.written {
            Some(Written { sealed: None, timeout, touched, .. }) => {
                let given_up = now >= touched.saturating_add(*timeout);
                if given_up || self.common.turn == Some(Turn::Failed) { "error" } else { "pending" }
            }
            _ => self.common.state(now, "pending", "completed", "error"),
        }
    }

    /// Returns whether the account may use the snapshot's data.
    pub fn is_usable(&self, account: &str) -> bool {
        self.common.owner == account || self.public || self.shared
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Mapping {
    pub device: String,
    /// The name of an instance store volume, such as `ephemeral0`.
    pub virtual_name: Option<String>,
    pub snapshot: Option<String>,
    pub size: Option<u32>,
    pub delete_on_termination: bool,
    pub kind: Kind,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Image {
    #[serde(flatten)]
    pub common: Common,
    pub name: String,
    pub description: Option<String>,
    /// For example `amazon`.
    pub owner_alias: Option<String>,
    pub public: bool,
    /// Whether the account may use this image although it is another account's and not public.
    pub shared: bool,
    /// Whether the image is disabled, so that only its owner may use it.
    pub disabled: bool,
    pub architecture: String,
    pub virtualization: String,
    /// `ebs` or `instance-store`.
    pub root_device_type: String,
    pub root_device: String,
    pub mappings: Vec<Mapping>,
    pub boot_mode: Option<String>,
    pub ena: Option<bool>,
    pub sriov: Option<String>,
    pub tpm: Option<String>,
    pub imds: Option<String>,
    pub uefi_data: Option<String>,
    pub product_codes: Vec<String>,
    pub platform_details: String,
    pub usage_operation: String,
    /// The time of deprecation (RFC 3339).
    pub deprecation: Option<String>,
}

impl Image {
    pub fn state(&self, now: Time) -> &'static str {
        if self.disabled { "disabled" } else { self.common.state(now, "pending", "available", "failed") }
    }

    /// Returns the root volume's snapshot.
    pub fn root_snapshot(&self) -> Option<&str> {
        self.mappings.iter().find(|m| m.device == self.root_device)?.snapshot.as_deref()
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    #[serde(flatten)]
    pub common: Common,
    pub zone: String,
    /// The state, such as `running`.
    pub state: String,
    /// The instance's own devices with their volumes. `/dev/xvda` is its root.
    pub devices: BTreeMap<String, String>,
    /// The times at which device names became free.
    pub freed: BTreeMap<String, Time>,
}

/// The call in which a client token was used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    pub params: BTreeMap<String, String>,
    pub id: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct World {
    pub volumes: BTreeMap<String, Volume>,
    pub snapshots: BTreeMap<String, Snapshot>,
    pub images: BTreeMap<String, Image>,
    pub instances: BTreeMap<String, Instance>,
    pub tokens: BTreeMap<String, Token>,
    pub attachments: u64,
}

/// Fails if an id has a wrong form.
pub fn check_id(id: &str, prefix: &str, invalid: &str) -> Result<()> {
    let digits = id.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('-'));
    let hex = |digits: &str| digits.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !digits.is_some_and(|digits| (digits.len() == 17 || digits.len() == 8) && hex(digits)) {
        no!(&format!("{invalid}.Malformed"), "Invalid id: \"{id}\" (expecting \"{prefix}-...\")");
    }
    Ok(())
}

macro_rules! find {
    ($find:ident, $find_mut:ident, $all:ident, $kind:ty, $prefix:literal, $malformed:literal, $missing:literal, $text:literal) => {
        impl World {
            pub fn $find(&self, id: &str, now: Time) -> Result<&$kind> {
                check_id(id, $prefix, $malformed)?;
                match self.$all.get(id).filter(|thing| thing.common.is_visible(now)) {
                    Some(thing) => Ok(thing),
                    None => no!($missing, $text, id),
                }
            }

            pub fn $find_mut(&mut self, id: &str, now: Time) -> Result<&mut $kind> {
                self.$find(id, now)?;
                match self.$all.get_mut(id) {
                    Some(thing) => Ok(thing),
                    None => no!($missing, $text, id),
                }
            }
        }
    };
}
find!(
    volume,
    volume_mut,
    volumes,
    Volume,
    "vol",
    "InvalidVolumeID",
    "InvalidVolume.NotFound",
    "The volume '{}' does not exist."
);
find!(
    snapshot,
    snapshot_mut,
    snapshots,
    Snapshot,
    "snap",
    "InvalidSnapshotID",
    "InvalidSnapshot.NotFound",
    "The snapshot '{}' does not exist."
);
find!(
    image,
    image_mut,
    images,
    Image,
    "ami",
    "InvalidAMIID",
    "InvalidAMIID.NotFound",
    "The image id '[{}]' does not exist"
);
find!(
    instance,
    instance_mut,
    instances,
    Instance,
    "i",
    "InvalidInstanceID",
    "InvalidInstanceID.NotFound",
    "The instance ID '{}' does not exist"
);

impl World {
    /// Returns the images that use a snapshot.
    pub fn using(&self, snapshot: &str, now: Time) -> impl Iterator<Item = &Image> {
        let uses = move |image: &&Image| {
            !image.common.is_gone(now)
                && image.mappings.iter().any(|m| m.snapshot.as_deref() == Some(snapshot))
        };
        self.images.values().filter(uses)
    }

    /// Returns the volume that has a device name of an instance.
    pub fn holder(&self, instance: &Instance, device: &str) -> Option<String> {
        let own = instance.devices.get(device).cloned();
        own.or_else(|| {
            let mut attached =
                self.volumes.values().filter_map(|v| Some((&v.common.id, v.attachment.as_ref()?)));
            let held = |a: &Attachment| a.instance == instance.common.id && a.device == device;
            attached.find(|(_, a)| held(a)).map(|(id, _)| id.clone())
        })
    }

    pub fn attached_to(&self, instance: &str) -> impl Iterator<Item = (&Volume, &Attachment)> {
        let with = self.volumes.values().filter_map(|v| Some((v, v.attachment.as_ref()?)));
        with.filter(move |(_, attachment)| attachment.instance == instance)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        for good in ["vol-01234567", "vol-0123456789abcdef0"] {
            check_id(good, "vol", "V").unwrap();
        }
        for bad in [
            "vol",
            "vol-",
            "vol-0",
            "vol-0123456789ABCDEF0",
            "snap-01234567",
            "vol0123456789abcdef0",
            "vol-../4567",
        ] {
            assert_eq!(check_id(bad, "vol", "V").unwrap_err().code, "V.Malformed", "{bad}");
        }
    }

    #[test]
    fn things_become_visible_ready_and_gone() {
        let common = Common { visible_at: 10, ready_at: 20, ..Common::default() };
        let mut volume = Volume { common, ..Volume::default() };
        assert!(!volume.common.is_visible(9) && volume.common.is_visible(10));
        assert_eq!((volume.state(19), volume.state(20)), ("creating", "available"));
        volume.common.turn = Some(Turn::Failed);
        assert_eq!((volume.state(19), volume.state(20)), ("creating", "error"));
        volume.common.turn = Some(Turn::Vanishes);
        assert!(volume.common.is_visible(19) && !volume.common.is_visible(20));
        volume.common.turn = Some(Turn::Stuck);
        assert_eq!(volume.state(NEVER - 1), "creating");
        volume.common.turn = None;
        volume.common.gone_at = Some(30);
        assert_eq!((volume.state(25), volume.common.is_visible(30)), ("deleting", false));
    }

    #[test]
    fn a_world_is_a_file() {
        let mut world = World::default();
        world.volumes.insert("vol-1".into(), Volume { size: 1, ..Volume::default() });
        let text = serde_json::to_string(&world).unwrap();
        assert_eq!(serde_json::from_str::<World>(&text).unwrap().volumes, world.volumes);
    }

    #[test]
    fn times() {
        assert_eq!(rfc3339(1_700_000_000_123), "2023-11-14T22:13:20.123Z");
    }
}
