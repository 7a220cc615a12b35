//! A server with a base of three blocks, and what a bake does to it by blocks.

use anyhow::Result;
use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ec2::config::{Credentials, SharedCredentialsProvider};
use oven::cloud::aws::ebs::Ebs;
use oven::cloud::aws::ec2::{Ec2, Ec2Options, Timeouts};
use oven::cloud::block_api::{BlockApi, NewSnapshot, ParentUse};
use oven::cloud::{Base, BaseRef, Cloud, ImageSpec, VolumeKind, tag};
use oven::ids::{Architecture, ImageId, RunId, SnapshotId};
use oven::ids::{BLOCK, Digest};
use oven::transfer::download::{download, verify};
use oven::transfer::readers::BlockSource;
use oven::transfer::upload::upload;
use oven::undo::UndoPolicy;
use oven_ec2_server::world::World;
use oven_ec2_server::{Direct, Entry, Server, ServerOptions};
use oven_testing::ring;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub const MILLI: Duration = Duration::from_millis(1);
/// Another account.
const VENDOR: &str = "210987654321";

pub struct EbsFixture {
    pub server: Server,
    pub base: Base,
    pub dir: tempfile::TempDir,
    _ring: ring::Shared,
}

/// `OVEN_TEST_RECORD`: a directory for what was sent, for the judges of the wire format.
fn record(name: &str) -> Option<PathBuf> {
    let dir = PathBuf::from(std::env::var_os("OVEN_TEST_RECORD")?);
    std::fs::create_dir_all(&dir).unwrap();
    Some(dir.join(format!("pure_ebs-{}-{name}.jsonl", std::process::id())))
}

/// A block of one byte.
pub fn block(byte: u8) -> Arc<[u8]> {
    vec![byte; BLOCK].into()
}

impl EbsFixture {
    /// With a base of the blocks 0, 1 and 2.
    pub async fn new(name: &str, options: ServerOptions) -> Self {
        let ring = ring::shared();
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let raw = dir.path().join("base.raw");
        let disk: Vec<u8> = [1, 2, 3].iter().flat_map(|byte| vec![*byte; BLOCK]).collect();
        std::fs::write(&raw, disk).unwrap();
        let policy = options.policy.clone();
        let options = ServerOptions { record: record(name), policy: None, ..options };
        let server = Server::start(&dir.path().join("region"), options).unwrap();
        let base = server.import(&raw, "base", Architecture::HOST).unwrap();
        let connected = ec2(&server, dir.path().join("documents"));
        let base = connected.base(&BaseRef::Id(ImageId(base))).await.unwrap();
        server.set(|options| options.policy = policy);
        server.forget_calls();
        Self { server, base, dir, _ring: ring }
    }

    pub async fn plain(name: &str) -> Self {
        Self::new(name, ServerOptions::default()).await
    }

    pub async fn with(name: &str, direct: Direct) -> Self {
        Self::new(name, ServerOptions { direct, ..ServerOptions::default() }).await
    }

    pub fn ec2(&self) -> Ec2 {
        ec2(&self.server, self.dir.path().join("documents"))
    }

    pub fn ebs(&self) -> Ebs {
        Ebs::with_config(self.ec2(), aws_sdk_ebs::config::Config::new(&shared(&self.server)))
    }

    pub fn count(&self, action: &str) -> usize {
        self.server.calls().iter().filter(|call| call.action == action).count()
    }

    /// Snapshots that were made here.
    pub fn made(&self) -> Vec<Entry> {
        let mut all = self.server.ledger().snapshots;
        all.retain(|entry| !entry.seeded);
        all
    }

    /// The base becomes somebody else's.
    pub fn given_away(&self, change: impl FnOnce(&mut oven_ec2_server::world::Snapshot)) {
        let id = &self.base.snapshot.0;
        self.server.with_world(|world: &mut World| {
            let snapshot = world.snapshots.get_mut(id).unwrap();
            snapshot.common.owner = VENDOR.to_owned();
            change(snapshot);
        });
    }
}

pub fn shared(server: &Server) -> SdkConfig {
    let keys = Credentials::new("AKIDTEST", "secret", None, None, "test");
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .endpoint_url(server.endpoint())
        .credentials_provider(SharedCredentialsProvider::new(keys))
        .build()
}

/// On no instance.
pub fn ec2(server: &Server, documents: PathBuf) -> Ec2 {
    let fast = Timeouts::default().faster(100, 5000 * MILLI);
    let options = Ec2Options {
        region: None,
        instance_id: None,
        zone: None,
        documents,
        devices: Rc::new(|_| panic!("nothing is attached")),
        timeouts: Timeouts { unreachable: 5000 * MILLI, ..fast },
    };
    Ec2::with_shared(shared(server), options).without_volumes()
}

/// Blocks that are all known.
pub struct GivenBlocks(BTreeMap<u32, Arc<[u8]>>);

impl GivenBlocks {
    pub fn new(blocks: &[(u32, u8)]) -> Arc<Self> {
        Arc::new(Self(blocks.iter().map(|(index, byte)| (*index, block(*byte))).collect()))
    }
}

impl BlockSource for GivenBlocks {
    fn indexes(&self) -> Vec<u32> {
        self.0.keys().copied().collect()
    }

    fn block(&self, index: u32) -> Result<Option<(Arc<[u8]>, Digest)>> {
        let data = self.0[&index].clone();
        let digest = Sha256::digest(&data).into();
        Ok(Some((data, digest)))
    }
}

pub fn spec(fixture: &EbsFixture, parent: Option<&SnapshotId>, run: &RunId) -> NewSnapshot {
    NewSnapshot {
        parent: parent.cloned(),
        size_gib: fixture.base.size_gib,
        description: "web".into(),
        run: run.clone(),
        tags: [("role".to_owned(), "web".to_owned())].into(),
        encrypted: false,
        kms_key: None,
    }
}

/// The first block is zero now, another one is new.
pub const CHANGES: [(u32, u8); 3] = [(0, 0), (1, 9), (77, 8)];

pub fn none() -> VolumeKind {
    VolumeKind::default()
}

/// What a bake does: it looks, reads all, writes a child, and reads that one back. The child's id.
pub async fn rebake(fixture: &EbsFixture, ebs: &Ebs, run: &RunId) -> Result<SnapshotId> {
    let base = match ebs.parent(&fixture.base.snapshot, &none()).await? {
        ParentUse::UseAsParent => fixture.base.snapshot.clone(),
        ParentUse::CopyFirst { .. } => ebs.copied(&fixture.base.snapshot, &none(), &|| ()).await?,
        other => panic!("{other:?}"),
    };
    let contents = ebs.contents(&base).await?;
    assert_eq!((contents.size_gib, contents.blocks.len()), (fixture.base.size_gib, 3));
    let sent = upload(ebs, &spec(fixture, Some(&base), run), GivenBlocks::new(&CHANGES), &|_, _| ()).await?;
    verify(ebs, &sent.snapshot, &sent.blocks, Some(&base)).await?;
    Ok(sent.snapshot)
}

/// A child has what was written, and its parent's blocks else.
pub async fn is_the_child(fixture: &EbsFixture, ebs: &Ebs, id: &SnapshotId) {
    let file = tempfile::tempfile_in(fixture.dir.path()).unwrap();
    let contents = download(ebs, id, &file).await.unwrap();
    assert_eq!(contents.blocks, [0, 1, 2, 77].into());
    let byte = |index: u64| {
        let mut one = [0];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut one, (index + 1) * BLOCK as u64 - 1).unwrap();
        one[0]
    };
    assert_eq!([0, 1, 2, 3, 77].map(byte), [0, 9, 3, 0, 8]);
    let entry = fixture.server.ledger().snapshots.into_iter().find(|entry| entry.id == id.0).unwrap();
    let data = std::fs::File::open(entry.data.unwrap()).unwrap();
    assert_eq!(data.metadata().unwrap().len(), fixture.base.size_gib << 30);
    let mut there = vec![0; BLOCK];
    std::os::unix::fs::FileExt::read_exact_at(&data, &mut there, 77 * BLOCK as u64).unwrap();
    assert!(there == vec![8; BLOCK]);
}

/// Waits until all tokens of blocks that were listed before are too old.
pub async fn are_expired(fixture: &EbsFixture, id: &SnapshotId) {
    let client = aws_sdk_ebs::Client::new(&shared(&fixture.server));
    let listed = client.list_snapshot_blocks().snapshot_id(&id.0).send().await.unwrap();
    let block = &listed.blocks()[0];
    let (index, token) = (block.block_index().unwrap(), block.block_token().unwrap());
    let begun = Instant::now();
    let get = || client.get_snapshot_block().snapshot_id(&id.0).block_index(index).block_token(token);
    while get().send().await.is_ok() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the token stays good");
        tokio::time::sleep(MILLI).await;
    }
}

/// Waits until it is so.
pub async fn wait_until(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(60), "waiting until {what}");
        tokio::time::sleep(MILLI).await;
    }
}

pub fn image(fixture: &EbsFixture, run: &RunId) -> ImageSpec {
    let tags = [(tag::CHECKSUM, "c"), (tag::FINGERPRINT, "f")];
    ImageSpec {
        name: "web-1".into(),
        description: String::new(),
        architecture: Architecture::HOST,
        root_device: "/dev/xvda".into(),
        size_gib: fixture.base.size_gib,
        attributes: fixture.base.attributes.clone(),
        tags: tags.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        run: run.clone(),
        documents: BTreeMap::new(),
    }
}

pub fn rules() -> UndoPolicy {
    UndoPolicy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) }
}
