//! A server with a base image, strangers' things that nobody may touch, and the cloud's part of a bake on it.

use oven::cloud::aws::ec2::{Ec2, Ec2Options, Timeouts};
use oven::cloud::{BakeKey, Base, BaseRef, Cloud, Image, ImageSpec, Tags, tag};
use oven::device::Device;
use oven::disk::attached_disk::AttachedDisks;
use oven::disk::{DiskSpec, DiskStrategy};
use oven::ids::{Architecture, ImageId, RunId, SnapshotId, VolumeId};
use oven::undo::{Ended, Undo, UndoPolicy, scope};
use oven_ec2_server::world::{Common, Snapshot, Volume, World};
use oven_ec2_server::{Builder, Entry, Fault, Ledger, Server, ServerOptions, What};
use oven_testing::ring;
use std::future::{Future, pending};
use std::rc::Rc;
use std::time::Duration;

pub const MILLI: Duration = Duration::from_millis(1);
pub const INSTANCE: &str = "i-0123456789abcdef0";
/// Another instance of the account, in the same zone.
pub const OTHER_INSTANCE: &str = "i-0aaaaaaaaaaaaaaaa";
/// Longer than any deadline of [`timeouts`], on a busy machine too: whoever takes longer hangs.
const HANG: Duration = Duration::from_secs(120);

pub struct Ec2Fixture {
    pub server: Server,
    pub base: BaseRef,
    pub dir: tempfile::TempDir,
    strangers: Vec<Entry>,
    /// Whether it leaves calls without an answer.
    hangs: bool,
    _ring: ring::Shared,
}

/// What must never change: a volume, a snapshot and a tagged one that are not of any run of ours.
fn strangers(world: &mut World) {
    let account = ServerOptions::default().account;
    for (n, tags) in
        [(1, vec![]), (2, vec![(tag::RUN, "of-somebody-else"), (tag::OWNER, "i-0ccccccccccccccccc/b/1/1")])]
    {
        let tags: Tags = tags.into_iter().map(|(k, v): (&str, &str)| (k.to_owned(), v.to_owned())).collect();
        let common = |prefix: &str| Common {
            id: format!("{prefix}-{n:0>17}"),
            owner: account.clone(),
            tags: tags.clone(),
            seeded: true,
            ..Common::default()
        };
        let volume =
            Volume { common: common("vol"), size: 1, zone: "us-east-1a".into(), ..Volume::default() };
        let snapshot = Snapshot {
            common: common("snap"),
            size: 1,
            volume: volume.common.id.clone(),
            ..Snapshot::default()
        };
        world.snapshots.insert(snapshot.common.id.clone(), snapshot);
        world.volumes.insert(volume.common.id.clone(), volume);
    }
}

impl Ec2Fixture {
    pub fn new(mut options: ServerOptions) -> Self {
        let ring = ring::shared();
        // In memory, where there is a place for it: a region writes to the disk what must survive a crash, and this
        // need not.
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let raw = dir.path().join("base.raw");
        std::fs::write(&raw, vec![7; 1 << 12]).unwrap();
        let hangs = options.faults.iter().any(|f| matches!(f.what, What::HangBefore | What::HangAfter));
        let attach = options.attach.clone();
        options.others.push(Builder { id: OTHER_INSTANCE.into(), zone: options.zone.clone(), attach });
        let server = Server::start(&dir.path().join("region"), options).unwrap();
        let base = server.import(&raw, "base", Architecture::HOST).unwrap();
        server.with_world(strangers);
        let strangers = seeded(&server);
        Self { server, base: BaseRef::Id(ImageId(base)), dir, strangers, hangs, _ring: ring }
    }

    pub fn with(faults: &[Fault]) -> Self {
        Self::new(options(faults.to_vec()))
    }

    pub fn ec2(&self) -> Ec2 {
        self.ec2_with(|_| ())
    }

    pub fn ec2_with(&self, change: impl FnOnce(&mut Ec2Options)) -> Ec2 {
        Ec2::with_config(config(&self.server.endpoint()), self.options(change))
    }

    pub fn options(&self, change: impl FnOnce(&mut Ec2Options)) -> Ec2Options {
        let mut options = Ec2Options {
            region: None,
            instance_id: Some(INSTANCE.into()),
            zone: Some("us-east-1a".into()),
            documents: self.dir.path().join("documents"),
            devices: Rc::new(self.devices()),
            timeouts: if self.hangs { faster(2000 * MILLI) } else { timeouts() },
        };
        change(&mut options);
        options
    }

    /// A device for each volume, at once.
    pub fn devices(&self) -> impl Fn(&VolumeId) -> anyhow::Result<Option<Device>> + use<> {
        let file = self.dir.path().join("device");
        std::fs::write(&file, "").unwrap();
        move |volume: &VolumeId| {
            let node = std::fs::File::options().read(true).write(true).open(&file)?;
            Ok(Some(Device {
                node: node.into(),
                path: file.clone(),
                rdev: 0,
                serial: volume.0.clone(),
                trimming: None,
            }))
        }
    }

    pub async fn bake(&self) -> (Ended<Image>, RunId) {
        let run = RunId::new();
        (self.bake_by(&self.ec2(), &run).await, run)
    }

    pub async fn bake_by(&self, ec2: &Ec2, run: &RunId) -> Ended<Image> {
        self.bake_until(ec2, run, pending()).await
    }

    /// The cloud's part of a bake.
    pub async fn bake_until(&self, ec2: &Ec2, run: &RunId, stop: impl Future<Output = ()>) -> Ended<Image> {
        let disks = AttachedDisks::new(Rc::new(ec2.clone()));
        let bake = scope(policy(), stop, async |undo| {
            let base = ec2.base(&self.base).await?;
            ec2.ensure_permitted(&base).await?;
            let disk = disks.checkout(&base, &disk_spec(), run, &undo).await?;
            let snapshot = disk.commit(&undo, &|_, _| ()).await?;
            self.register(ec2, &base, &snapshot, run, &undo).await
        });
        tokio::time::timeout(HANG, bake)
            .await
            .unwrap_or_else(|_| panic!("it hangs: {}", self.calls().join(" ")))
    }

    pub async fn register(
        &self,
        ec2: &Ec2,
        base: &Base,
        snapshot: &SnapshotId,
        run: &RunId,
        undo: &Undo,
    ) -> anyhow::Result<Image> {
        ec2.register(snapshot, &image_spec(base, run), undo).await
    }

    /// The names of all calls of EC2, oldest first.
    pub fn calls(&self) -> Vec<String> {
        self.server.ec2_calls().into_iter().map(|call| call.action).collect()
    }

    /// How many calls of an action came in.
    pub fn count(&self, action: &str) -> usize {
        self.calls().iter().filter(|call| *call == action).count()
    }

    /// The values of a parameter in all calls of an action.
    pub fn sent(&self, action: &str, parameter: &str) -> Vec<String> {
        let calls = self.server.ec2_calls().into_iter().filter(|call| call.action == action);
        calls.filter_map(|call| call.params.get(parameter).cloned()).collect()
    }

    /// How many volumes, snapshots and images calls made, those that are gone included.
    pub fn ever(&self) -> (usize, usize, usize) {
        self.server.with_world(|world| {
            let volumes = world.volumes.values().filter(|v| !v.common.seeded).count();
            let snapshots = world.snapshots.values().filter(|s| !s.common.seeded).count();
            (volumes, snapshots, world.images.values().filter(|i| !i.common.seeded).count())
        })
    }

    /// What calls made, and is there.
    pub fn made(&self) -> Ledger {
        let mut made = self.server.ledger().made();
        // Deleted; EC2 shows it for a while.
        made.volumes.retain(|volume| volume.state != "deleting");
        made
    }

    /// Exactly one image with its snapshot, and nothing else; all of it tagged.
    pub fn holds_one(&self, image: &Image, what: &str) {
        let what = format!("{what}\n{}", self.calls().join(" "));
        let made = self.made();
        assert_eq!(made.volumes, [], "{what}");
        let images: Vec<(&str, &str)> =
            made.images.iter().map(|i| (i.id.as_str(), i.state.as_str())).collect();
        assert_eq!(images, [(image.id.0.as_str(), "available")], "{what}");
        let snapshots: Vec<(&str, &str)> =
            made.snapshots.iter().map(|s| (s.id.as_str(), s.state.as_str())).collect();
        assert_eq!(snapshots, [(image.snapshot.0.as_str(), "completed")], "{what}");
        assert_eq!(made.images[0].of, image.snapshot.0, "{what}");
        for (key, value) in &image_tags() {
            assert_eq!(made.images[0].tags.get(key), Some(value), "{what}");
            assert_eq!(image.tags.get(key), Some(value), "{what}");
        }
        self.is_clean(&what);
    }

    pub fn holds_nothing(&self, what: &str) {
        let what = format!("{what}\n{}", self.calls().join(" "));
        let made = self.made();
        let none = made.volumes.is_empty() && made.snapshots.is_empty() && made.images.is_empty();
        assert!(none, "{what}: {made:#?}");
        self.is_clean(&what);
    }

    /// Everything that was ever made has our tags, and only what was made was changed or removed.
    pub fn is_clean(&self, what: &str) {
        assert_eq!(seeded(&self.server), self.strangers, "strangers: {what}");
        let mut ours = Vec::new();
        self.server.with_world(|world| {
            let volumes = world.volumes.values().map(|v| &v.common);
            let all = volumes.chain(world.snapshots.values().map(|s| &s.common));
            for thing in all.chain(world.images.values().map(|i| &i.common)).filter(|thing| !thing.seeded) {
                let tagged = [tag::RUN, tag::OWNER].iter().all(|key| thing.tags.contains_key(*key));
                assert!(tagged || thing.turn == Some(oven_ec2_server::Turn::Untagged), "{thing:?}: {what}");
                ours.push(thing.id.clone());
            }
        });
        let changing = [
            "DeleteVolume",
            "DeleteSnapshot",
            "DeregisterImage",
            "DetachVolume",
            "AttachVolume",
            "CreateTags",
        ];
        for call in self.server.ec2_calls().iter().filter(|call| changing.contains(&call.action.as_str())) {
            let names = ["VolumeId", "SnapshotId", "ImageId", "ResourceId.1"];
            let id =
                names.iter().find_map(|name| call.params.get(*name)).expect("every change names something");
            assert!(ours.contains(id), "{} of {id}, which is not ours: {what}", call.action);
            assert!(!call.params.contains_key("Force"), "by force: {what}");
        }
    }
}

/// Those that were there without a call; the base may be changed by a test.
fn seeded(server: &Server) -> Vec<Entry> {
    let ledger = server.ledger();
    ledger.volumes.into_iter().chain(ledger.snapshots).filter(|entry| entry.seeded).collect()
}

pub fn policy() -> UndoPolicy {
    UndoPolicy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) }
}

fn tags(pairs: &[(&str, &str)]) -> Tags {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

pub fn image_tags() -> Tags {
    tags(&[(tag::CHECKSUM, "c"), (tag::FINGERPRINT, "f"), (tag::NAME, "web"), ("role", "web")])
}

pub fn disk_spec() -> DiskSpec {
    DiskSpec { tags: tags(&[(tag::NAME, "web"), ("role", "web")]), ..DiskSpec::default() }
}

pub fn image_spec(base: &Base, run: &RunId) -> ImageSpec {
    ImageSpec {
        name: "web-1".into(),
        description: "a web server".into(),
        architecture: base.architecture,
        root_device: base.root_device.clone(),
        size_gib: base.size_gib,
        attributes: base.attributes.clone(),
        tags: image_tags(),
        run: run.clone(),
        documents: Default::default(),
    }
}

pub fn key() -> BakeKey {
    BakeKey { checksum: "c".into(), fingerprint: Some("f".into()), architecture: Architecture::HOST }
}

/// A hundred times as fast as for EC2; what waits for one call waits long enough for a busy machine.
pub fn timeouts() -> Timeouts {
    faster(4000 * MILLI)
}

/// `call`: how long a call may take; some are never answered.
fn faster(call: Duration) -> Timeouts {
    let fast = Timeouts::default().faster(100, call);
    // What ends a bake where a busy machine is slow, and that hardly any test waits for.
    let (released, lost) = (8000 * MILLI, 30_000 * MILLI);
    Timeouts { released, unreachable: lost, outage: lost, attached: 1500 * MILLI, ..fast }
}

pub fn config(endpoint: &str) -> aws_sdk_ec2::Config {
    use aws_sdk_ec2::config::{BehaviorVersion, Credentials, Region};
    aws_sdk_ec2::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .credentials_provider(Credentials::new("AKIDTEST", "secret", None, None, "test"))
        .build()
}

pub fn options(faults: Vec<Fault>) -> ServerOptions {
    let mut options = ServerOptions { faults, ..ServerOptions::default() };
    options.limits.between_snapshots = 20 * MILLI;
    options
}
