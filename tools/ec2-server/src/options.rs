//! How the server is to behave.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// What happens on the builder when a volume is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachAs {
    /// Nothing: only the answers change.
    Nothing,
    /// A loop device on this machine, told in `DIR/attached/VOLUME.json`. Needs root.
    Loop,
    /// An NVMe controller in the QEMU guest behind this QMP socket, on one of its ports `rp0`, `rp1`, …
    Qmp(PathBuf),
}

/// An instance that may have volumes attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Builder {
    pub id: String,
    /// `us-east-1a`.
    pub zone: String,
    pub attach: AttachAs,
}

/// How long things take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "snake_case")]
pub struct Delays {
    /// Every answer.
    #[serde(with = "millis")]
    pub answer: Duration,
    /// A volume is `creating`.
    #[serde(with = "millis")]
    pub creating: Duration,
    /// A volume is `attaching`.
    #[serde(with = "millis")]
    pub attaching: Duration,
    /// Until the kernel shows it, from the call on: before or after the API says `attached`.
    #[serde(with = "millis")]
    pub device: Duration,
    /// A volume is `detaching`.
    #[serde(with = "millis")]
    pub detaching: Duration,
    /// A snapshot is `pending`.
    #[serde(with = "millis")]
    pub snapshot: Duration,
    /// An image is `pending`.
    #[serde(with = "millis")]
    pub image: Duration,
    /// A deleted volume is `deleting`.
    #[serde(with = "millis")]
    pub deleting: Duration,
    /// A snapshot written by its blocks is `pending` from CompleteSnapshot on.
    #[serde(with = "millis")]
    pub completing: Duration,
    /// A copy of a snapshot is `pending`.
    #[serde(with = "millis")]
    pub copying: Duration,
}

/// Milliseconds, in files.
mod millis {
    use serde::{Deserialize, Deserializer, Serializer};
    use std::time::Duration;

    pub fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(time.as_millis() as u64)
    }
    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_millis)
    }
}

/// Token buckets, one for each action: how many calls at once, and how many more per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Throttle {
    /// Calls that change nothing.
    pub reading: (f64, f64),
    /// Describe calls with neither filter, ids nor pagination.
    pub unfiltered: (f64, f64),
    /// Calls that change something.
    pub changing: (f64, f64),
}

impl Throttle {
    /// EC2's own, of its guide to API throttling.
    pub const EC2: Self = Self { reading: (100.0, 20.0), unfiltered: (50.0, 10.0), changing: (50.0, 5.0) };
}

/// How the EBS direct APIs behave.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Direct {
    /// A block's token is good for so long.
    #[serde(with = "millis")]
    pub block_tokens: Duration,
    /// A page's token is good for so long.
    #[serde(with = "millis")]
    pub page_tokens: Duration,
    /// A page holds no more blocks than so many, whatever `MaxResults` says.
    pub page: Option<usize>,
    /// Before every so many pages comes an empty one with a next token. 0: none does.
    pub empty_pages: u32,
    /// Instead of the `Timeout` that was asked for, which is in minutes. Zero: as it was asked for.
    #[serde(with = "millis")]
    pub timeout: Duration,
    /// Snapshots that are being written at once; one more is a `ConcurrentLimitExceededException`.
    pub pending: usize,
    /// The account encrypts by default: an unencrypted snapshot is no parent, and none is made.
    pub encrypts: bool,
    pub throttle: Option<DirectThrottle>,
}

impl Default for Direct {
    fn default() -> Self {
        Self {
            block_tokens: Duration::from_secs(7 * 24 * 3600),
            page_tokens: Duration::from_secs(3600),
            page: None,
            empty_pages: 0,
            timeout: Duration::ZERO,
            pending: 100,
            encrypts: false,
            throttle: None,
        }
    }
}

/// Token buckets of the EBS direct APIs: how many calls at once, and how many more per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DirectThrottle {
    /// GetSnapshotBlock, of each snapshot.
    pub gets: (f64, f64),
    /// PutSnapshotBlock, of each snapshot.
    pub puts: (f64, f64),
    /// ListSnapshotBlocks and ListChangedBlocks, each, of the account.
    pub lists: (f64, f64),
    /// StartSnapshot and CompleteSnapshot, each, of the account.
    pub snapshots: (f64, f64),
}

impl DirectThrottle {
    /// EBS's own quotas, with a second's worth at once.
    pub const EBS: Self =
        Self { gets: (1000.0, 1000.0), puts: (1000.0, 1000.0), lists: (50.0, 50.0), snapshots: (10.0, 10.0) };
}

/// Quotas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub volumes: usize,
    pub snapshots: usize,
    pub images: usize,
    /// Volumes on one instance, its own included. EC2: 28 on most Nitro types, with the network interfaces.
    pub attachments: usize,
    /// Of one volume at a time.
    pub pending_snapshots: usize,
    /// Copies of snapshots that are made at once.
    pub copies: usize,
    /// Between two snapshots of one volume.
    pub between_snapshots: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            volumes: 5000,
            snapshots: 100_000,
            images: 50_000,
            attachments: 27,
            pending_snapshots: 5,
            copies: 20,
            between_snapshots: Duration::from_secs(15),
        }
    }
}

/// All that can be set. The default answers at once, and is strict.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// Where to listen; port 0 takes a free one.
    pub listen: SocketAddr,
    pub region: String,
    /// Twelve digits: whose everything is.
    pub account: String,
    /// The instance that IMDS speaks of.
    pub instance_id: String,
    pub zone: String,
    pub attach: AttachAs,
    /// More instances: each has an IMDS of its own ([`crate::Server::imds_of`]).
    pub others: Vec<Builder>,
    /// Of the instances, and whose keys IMDS gives out. `None`: they have none.
    pub role: Option<String>,
    pub delays: Delays,
    /// How long the answers of an action take, beside [`Delays::answer`]: from so many milliseconds to so many. The
    /// longest pattern that fits decides: `PutSnapshotBlock`, `Describe*`, `*`.
    pub latencies: BTreeMap<String, (u64, u64)>,
    pub direct: Direct,
    /// For so long a new id is not known to the calls after the one that made it.
    pub visibility_lag: Duration,
    /// A name is free again for so long before it can be taken: until then an attachment under it stays `attaching`.
    pub sticky_names: Duration,
    pub throttle: Option<Throttle>,
    pub limits: Limits,
    pub faults: Vec<crate::Fault>,
    /// Actions that are not permitted: `CreateVolume`, `ssm:GetParameter`.
    pub denied: BTreeSet<String>,
    /// An IAM policy: what it does not allow is not permitted.
    pub policy: Option<serde_json::Value>,
    /// KMS keys that may be used. With any other a volume is created, and vanishes.
    pub keys: BTreeSet<String>,
    /// SSM parameters.
    pub parameters: BTreeMap<String, String>,
    /// A page that was asked for holds no more than so many; EC2 may give less than `MaxResults`, too.
    pub page: Option<usize>,
    /// The server's clock is ahead of ours by so many seconds: by more than five minutes, signatures are refused.
    pub clock_ahead: i64,
    /// An access key is good for so many calls, and then too old.
    pub calls_per_key: Option<u32>,
    /// Not 0: every delay and lag is drawn from 0 to what is set.
    pub seed: u64,
    /// Every call is appended to this file, a JSON object on each line.
    pub record: Option<PathBuf>,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            listen: (Ipv4Addr::LOCALHOST, 0).into(),
            region: "us-east-1".into(),
            account: "123456789012".into(),
            instance_id: "i-0123456789abcdef0".into(),
            zone: "us-east-1a".into(),
            attach: AttachAs::Nothing,
            others: Vec::new(),
            role: Some("oven-builder".into()),
            delays: Delays::default(),
            latencies: BTreeMap::new(),
            direct: Direct::default(),
            visibility_lag: Duration::ZERO,
            sticky_names: Duration::ZERO,
            throttle: None,
            limits: Limits::default(),
            faults: Vec::new(),
            denied: BTreeSet::new(),
            policy: None,
            keys: ["alias/aws/ebs".to_owned()].into(),
            parameters: BTreeMap::new(),
            clock_ahead: 0,
            page: None,
            calls_per_key: None,
            seed: 0,
            record: None,
        }
    }
}

/// Latencies and delays as they are on AWS, in round figures: what a bench without AWS is measured with. Where a figure
/// is known that says more, the smaller one is here: a wait hides what a program does itself. Milliseconds.
///
/// How long a snapshot is `pending` is what nobody can tell in general, and most of a bake. Here it is so long that the
/// reference measurement of oven's bars comes out: Debian's Packer 1.6.6 with its amazon-chroot builder, which installs
/// one package, took 45.2 s at its own polling and 19.7 s at one second. With 5 s it took 48.0 s and 19.3 s here. By its
/// looks, anything from 0 to 15 s is the same at its own polling, and anything from 5 to 6 s at one second: the middle of
/// that is taken. An image that was `pending` at the first look would cost it 15 s more than were measured.
///
/// | what | time | why |
/// |---|---|---|
/// | every call that is not below | 80 to 150 | one request to EC2 within a region: what it does itself, and no queue |
/// | Attach-, Create- and DetachVolume, CreateSnapshot, RegisterImage | 200 to 400 | they write before they answer |
/// | a volume is `creating` | 1500 | the median that the CSI driver measured in three regions (kubernetes-sigs/aws-ebs-csi-driver#2021) |
/// | `attaching`, `detaching` | 2000 | of the averages of 3.7 s and 8.1 s in kubernetes/kubernetes#84181 a part is its polling |
/// | until the kernel shows it | 1500 | the controller is there before the API says `attached` |
/// | a snapshot of a volume is `pending` | 5500 | see above. Longer ones are told of, too: "15 seconds and up to 30" (platformsh/platformsh-docs#992), 43 s with its image (log in hashicorp/packer#4704) |
/// | an image is `pending` | 0 | see above; registering copies nothing |
/// | GetSnapshotBlock, PutSnapshotBlock | 60 to 140 | 100 is what AWS's guide reckons with ("Optimize performance for EBS direct APIs") |
/// | ListSnapshotBlocks, ListChangedBlocks | 80 to 150 | as every call |
/// | StartSnapshot, CompleteSnapshot | 200 to 400 | as CreateSnapshot |
/// | from CompleteSnapshot to `completed` | 5000 | the data is there already; whole uploads of 2 GiB end within 10 s (NixOS/amis#123) and 16 s (awslabs/coldsnap#437) |
/// | a copy of a snapshot is `pending` | 60000 | within a region and an account: longer than a snapshot, for its blocks are read, too |
const PLAUSIBLE: [(&str, u64, u64); 10] = [
    ("*", 80, 150),
    ("AttachVolume", 200, 400),
    ("CompleteSnapshot", 200, 400),
    ("CreateSnapshot", 200, 400),
    ("CreateVolume", 200, 400),
    ("DetachVolume", 200, 400),
    ("GetSnapshotBlock", 60, 140),
    ("PutSnapshotBlock", 60, 140),
    ("RegisterImage", 200, 400),
    ("StartSnapshot", 200, 400),
];

impl ServerOptions {
    /// The same, as slow as AWS.
    pub fn plausible(self) -> Self {
        let ms = Duration::from_millis;
        let delays = Delays {
            answer: Duration::ZERO,
            creating: ms(1500),
            attaching: ms(2000),
            device: ms(1500),
            detaching: ms(2000),
            snapshot: ms(5500),
            image: Duration::ZERO,
            deleting: ms(1000),
            completing: ms(5000),
            copying: ms(60_000),
        };
        let latencies = PLAUSIBLE.iter().map(|(action, least, most)| ((*action).to_owned(), (*least, *most)));
        Self { delays, latencies: latencies.collect(), ..self }
    }

    /// How long the answers of an action take, in milliseconds.
    pub fn latency(&self, action: &str) -> Option<(u64, u64)> {
        let fits = self.latencies.iter().filter(|(pattern, _)| crate::filter::matches(pattern, action));
        fits.max_by_key(|(pattern, _)| pattern.len()).map(|(_, latency)| *latency)
    }

    /// All instances, the first one first.
    pub fn builders(&self) -> Vec<Builder> {
        let first =
            Builder { id: self.instance_id.clone(), zone: self.zone.clone(), attach: self.attach.clone() };
        [first].into_iter().chain(self.others.iter().cloned()).collect()
    }

    /// The account's own KMS key for volumes.
    pub fn default_key(&self) -> String {
        let Self { region, account, .. } = self;
        format!("arn:aws:kms:{region}:{account}:key/0be50be5-0be5-0be5-0be5-0be50be50be5")
    }

    /// Whether a KMS key may be used. `None`: the account's own.
    pub fn may_use_key(&self, key: Option<&str>) -> bool {
        key.is_none_or(|key| self.keys.contains(key) || key == self.default_key())
    }

    /// The region's zones.
    pub fn zones(&self) -> [String; 2] {
        ["a", "b"].map(|letter| format!("{}{letter}", self.region))
    }
}
