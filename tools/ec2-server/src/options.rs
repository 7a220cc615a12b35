//! The options of the server.

use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// What happens on the builder when a volume is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttachAs {
    /// Only the API's responses change.
    Nothing,
    /// The volume is attached as a loop device on this machine. `DIR/attached/VOLUME.json` has its name. This needs
    /// root.
    Loop,
    /// The volume is attached as an NVMe controller in the QEMU guest behind this QMP socket, on one of its ports
    /// `rp0`, `rp1` and so on.
    Qmp(PathBuf),
}

/// An instance to which volumes can be attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Builder {
    pub id: String,
    /// The zone, such as `us-east-1a`.
    pub zone: String,
    pub attach: AttachAs,
}

/// The duration of each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, rename_all = "snake_case")]
pub struct Delays {
    /// The delay of every response.
    #[serde(with = "millis")]
    pub answer: Duration,
    /// The time for which a volume is `creating`.
    #[serde(with = "millis")]
    pub creating: Duration,
    /// The time for which a volume is `attaching`.
    #[serde(with = "millis")]
    pub attaching: Duration,
    /// The time from the call until the kernel shows the device. This may be before or after the API reports
    /// `attached`.
    #[serde(with = "millis")]
    pub device: Duration,
    /// The time for which a volume is `detaching`.
    #[serde(with = "millis")]
    pub detaching: Duration,
    /// The time for which a snapshot is `pending`.
    #[serde(with = "millis")]
    pub snapshot: Duration,
    /// The time for which an image is `pending`.
    #[serde(with = "millis")]
    pub image: Duration,
    /// The time for which a deleted volume is `deleting`.
    #[serde(with = "millis")]
    pub deleting: Duration,
    /// The time from CompleteSnapshot until the snapshot is no longer `pending`.
    #[serde(with = "millis")]
    pub completing: Duration,
    /// The time for which a copy of a snapshot is `pending`.
    #[serde(with = "millis")]
    pub copying: Duration,
}

/// Durations are in milliseconds in files.
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

/// Token buckets. Each action has its own bucket. The first number is the bucket's size, and the second one is the
/// number of calls that are added per second.
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
    /// EC2's limits, from its guide to API throttling.
    pub const EC2: Self = Self { reading: (100.0, 20.0), unfiltered: (50.0, 10.0), changing: (50.0, 5.0) };
}

/// The options of the EBS direct APIs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Direct {
    /// The lifetime of a block's token.
    #[serde(with = "millis")]
    pub block_tokens: Duration,
    /// The lifetime of a page's token.
    #[serde(with = "millis")]
    pub page_tokens: Duration,
    /// The maximum number of blocks on a page, even if `MaxResults` is larger.
    pub page: Option<usize>,
    /// Before each group of this number of pages, there is an empty page with a token for the next page. With 0, there
    /// is none.
    pub empty_pages: u32,
    /// Replaces the `Timeout` of the request, which is in minutes. With zero, the request's value is used.
    #[serde(with = "millis")]
    pub timeout: Duration,
    /// The maximum number of snapshots that may be written at the same time. One more fails with
    /// `ConcurrentLimitExceededException`.
    pub pending: usize,
    /// Whether the account encrypts by default. Then an unencrypted snapshot cannot be a parent, and none can be
    /// created.
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

/// Token buckets of the EBS direct APIs. The first number is the bucket's size, and the second one is the number of
/// calls that are added per second.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DirectThrottle {
    /// GetSnapshotBlock. Each snapshot has its own bucket.
    pub gets: (f64, f64),
    /// PutSnapshotBlock. Each snapshot has its own bucket.
    pub puts: (f64, f64),
    /// ListSnapshotBlocks and ListChangedBlocks. Each action has one bucket for the account.
    pub lists: (f64, f64),
    /// StartSnapshot and CompleteSnapshot. Each action has one bucket for the account.
    pub snapshots: (f64, f64),
}

impl DirectThrottle {
    /// EBS's quotas. A bucket has room for the calls of one second.
    pub const EBS: Self =
        Self { gets: (1000.0, 1000.0), puts: (1000.0, 1000.0), lists: (50.0, 50.0), snapshots: (10.0, 10.0) };
}

/// Quotas.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    pub volumes: usize,
    pub snapshots: usize,
    pub images: usize,
    /// The maximum number of volumes on one instance, including its own. EC2 allows 28 on most Nitro types, including
    /// network interfaces.
    pub attachments: usize,
    /// The maximum number of pending snapshots of one volume.
    pub pending_snapshots: usize,
    /// The maximum number of copies of snapshots that are made at the same time.
    pub copies: usize,
    /// The minimum time between two snapshots of one volume.
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

/// All options. With the defaults, the server is strict and responds without delays.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    /// The address to listen on. Port 0 selects a free port.
    pub listen: SocketAddr,
    pub region: String,
    /// The account that owns all resources. It has twelve digits.
    pub account: String,
    /// The instance that IMDS describes.
    pub instance_id: String,
    pub zone: String,
    pub attach: AttachAs,
    /// Additional instances. Each has its own IMDS ([`crate::Server::imds_of`]).
    pub others: Vec<Builder>,
    /// The role of the instances. IMDS supplies its keys. `None` means that the instances have no role.
    pub role: Option<String>,
    pub delays: Delays,
    /// The minimum and maximum latency of each action in milliseconds, in addition to [`Delays::answer`]. The key is a
    /// pattern such as `PutSnapshotBlock`, `Describe*` or `*`. The longest matching pattern is used.
    pub latencies: BTreeMap<String, (u64, u64)>,
    pub direct: Direct,
    /// The time for which later calls do not find a new resource.
    pub visibility_lag: Duration,
    /// The time for which a free device name cannot be used again. An attachment with this name is `attaching` until
    /// then.
    pub sticky_names: Duration,
    pub throttle: Option<Throttle>,
    pub limits: Limits,
    pub faults: Vec<crate::Fault>,
    /// Actions that are not permitted, such as `CreateVolume` or `ssm:GetParameter`.
    pub denied: BTreeSet<String>,
    /// An IAM policy. Actions that it does not allow are refused.
    pub policy: Option<serde_json::Value>,
    /// KMS keys that may be used. With another key, a volume is created and then vanishes.
    pub keys: BTreeSet<String>,
    /// SSM parameters.
    pub parameters: BTreeMap<String, String>,
    /// The maximum number of results on a page. EC2 may also return fewer results than `MaxResults`.
    pub page: Option<usize>,
    /// The number of seconds by which the server's clock is ahead of this machine's clock. If it is more than five
    /// minutes, signatures are refused.
    pub clock_ahead: i64,
    /// The number of calls after which an access key expires.
    pub calls_per_key: Option<u32>,
    /// If this is not 0, every delay and lag is random, from 0 to its set value.
    pub seed: u64,
    /// Every call is appended to this file as a JSON object on one line.
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

/// Latencies and delays in milliseconds that are similar to those of AWS, in round figures. A benchmark without AWS
/// uses them. If several figures are known, the smaller one is used, because a longer wait would hide the time of the
/// program itself.
///
/// A snapshot is `pending` for most of a bake, and there is no general figure for this time. It is chosen so that it
/// reproduces the reference measurement of oven's benchmarks. There, Debian's Packer 1.6.6 installed one package with
/// its amazon-chroot builder. It took 45.2 s with its own polling interval, and 19.7 s with an interval of one second.
/// With a snapshot time of 5 s, it took 48.0 s and 19.3 s on this server. Packer's result is the same for all times
/// from 0 to 15 s with its own interval, and for all times from 5 to 6 s with one second. The middle of the shorter
/// range is used. If an image were `pending` at Packer's first poll, Packer would take 15 s longer than in the
/// measurement.
///
/// | what | time | why |
/// |---|---|---|
/// | every call that is not below | 80 to 150 | a request to EC2 within a region, without a queue |
/// | Attach-, Create- and DetachVolume, CreateSnapshot, RegisterImage | 200 to 400 | they write before they respond |
/// | a volume is `creating` | 1500 | the median that the CSI driver measured in three regions (kubernetes-sigs/aws-ebs-csi-driver#2021) |
/// | `attaching`, `detaching` | 2000 | kubernetes/kubernetes#84181 has averages of 3.7 s and 8.1 s, but a part of them is its polling interval |
/// | until the kernel shows it | 1500 | the controller appears before the API reports `attached` |
/// | a snapshot of a volume is `pending` | 5500 | see above. Longer times are also reported: "15 seconds and up to 30" (platformsh/platformsh-docs#992), 43 s with its image (log in hashicorp/packer#4704) |
/// | an image is `pending` | 0 | see above; registering copies nothing |
/// | GetSnapshotBlock, PutSnapshotBlock | 60 to 140 | AWS's guide assumes 100 ("Optimize performance for EBS direct APIs") |
/// | ListSnapshotBlocks, ListChangedBlocks | 80 to 150 | as every call |
/// | StartSnapshot, CompleteSnapshot | 200 to 400 | as CreateSnapshot |
/// | from CompleteSnapshot to `completed` | 5000 | the data are already stored; whole uploads of 2 GiB end within 10 s (NixOS/amis#123) and 16 s (awslabs/coldsnap#437) |
/// | a copy of a snapshot is `pending` | 60000 | within a region and an account; it takes longer than a snapshot, because the blocks are also read |
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
    /// Returns these options with latencies and delays that are similar to those of AWS.
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

    /// Returns the minimum and maximum latency of an action in milliseconds.
    pub fn latency(&self, action: &str) -> Option<(u64, u64)> {
        let fits = self.latencies.iter().filter(|(pattern, _)| crate::filter::matches(pattern, action));
        fits.max_by_key(|(pattern, _)| pattern.len()).map(|(_, latency)| *latency)
    }

    /// Returns all instances. The instance of `instance_id` comes first.
    pub fn builders(&self) -> Vec<Builder> {
        let first =
            Builder { id: self.instance_id.clone(), zone: self.zone.clone(), attach: self.attach.clone() };
        [first].into_iter().chain(self.others.iter().cloned()).collect()
    }

    /// Returns the account's own KMS key for volumes.
    pub fn default_key(&self) -> String {
        let Self { region, account, .. } = self;
        format!("arn:aws:kms:{region}:{account}:key/0be50be5-0be5-0be5-0be5-0be50be50be5")
    }

    /// Returns whether a KMS key may be used. `None` stands for the account's own key.
    pub fn may_use_key(&self, key: Option<&str>) -> bool {
        key.is_none_or(|key| self.keys.contains(key) || key == self.default_key())
    }

    /// Returns the zones of the region.
    pub fn zones(&self) -> [String; 2] {
        ["a", "b"].map(|letter| format!("{}{letter}", self.region))
    }
}
