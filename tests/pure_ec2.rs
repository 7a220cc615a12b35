//! EC2, as far as it goes without a device: the cloud's part of a bake against the EC2-shaped server, with a fault in
//! every call. What counts is the server's ledger.

use oven::cloud::ec2::{Ec2, Options, Pace};
use oven::cloud::{Architecture, BaseRef, Cloud, Image, ImageId, ImageSpec, RunId, Tags, VolumeId, tag};
use oven::disk::attached::Attached;
use oven::disk::{Device, DiskSpec, Disks};
use oven::undo::{Ended, Policy, scope};
use oven_ec2_server::{Fault, Server, ServerOptions, Throttle, Turn, What};
use std::rc::Rc;
use std::time::Duration;

const MILLI: Duration = Duration::from_millis(1);

struct Ground {
    server: Server,
    base: BaseRef,
    dir: tempfile::TempDir,
}

impl Ground {
    fn new(options: ServerOptions) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("base.raw");
        std::fs::write(&raw, vec![7; 1 << 12]).unwrap();
        let server = Server::start(&dir.path().join("region"), options).unwrap();
        let base = server.import(&raw, "base", Architecture::HOST).unwrap();
        Self { server, base: BaseRef::Id(ImageId(base)), dir }
    }

    fn ec2(&self) -> Ec2 {
        let file = self.dir.path().join("device");
        std::fs::write(&file, "").unwrap();
        let devices = move |volume: &VolumeId| {
            let node = std::fs::File::options().read(true).write(true).open(&file)?;
            Ok(Some(Device { node: node.into(), path: file.clone(), rdev: 0, serial: volume.0.clone() }))
        };
        let options = Options {
            region: None,
            instance_id: Some("i-0123456789abcdef0".into()),
            zone: Some("us-east-1a".into()),
            documents: self.dir.path().join("documents"),
            devices: Rc::new(devices),
            pace: pace(),
        };
        Ec2::with_config(config(&self.server.endpoint()), options)
    }

    /// The cloud's part of a bake.
    async fn bake(&self, ec2: &Ec2, run: &RunId) -> Ended<Image> {
        let disks = Attached::new(Rc::new(ec2.clone()));
        let policy =
            Policy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) };
        scope(policy, std::future::pending(), async |undo| {
            let base = ec2.base(&self.base).await?;
            ec2.ensure_permitted(&base).await?;
            let disk = disks.checkout(&base, &DiskSpec::default(), run, &undo).await?;
            let snapshot = disk.commit(&undo).await?;
            let spec = ImageSpec {
                name: "web-1".into(),
                description: "a web server".into(),
                architecture: base.architecture,
                root_device: base.root_device.clone(),
                size_gib: base.size_gib,
                attributes: base.attributes.clone(),
                tags: tags(),
                run: run.clone(),
                documents: Default::default(),
            };
            ec2.register(&snapshot, &spec, &undo).await
        })
        .await
    }

    /// Exactly one image with its snapshot, and nothing else; all of it tagged.
    fn holds_one(&self, image: &Image, what: &str) {
        let made = self.server.ledger().made();
        assert_eq!(made.volumes, [], "{what}");
        let images: Vec<(&str, &str)> =
            made.images.iter().map(|image| (image.id.as_str(), image.state.as_str())).collect();
        assert_eq!(images, [(image.id.0.as_str(), "available")], "{what}");
        let snapshots: Vec<&str> = made.snapshots.iter().map(|snapshot| snapshot.id.as_str()).collect();
        assert_eq!(snapshots, [image.snapshot.0.as_str()], "{what}");
        for key in [tag::RUN, tag::OWNER] {
            assert!(
                made.images[0].tags.contains_key(key) && made.snapshots[0].tags.contains_key(key),
                "{what}"
            );
        }
        assert_eq!(made.images[0].tags.get(tag::FINGERPRINT).map(String::as_str), Some("f"), "{what}");
    }

    fn holds_nothing(&self, what: &str) {
        let made = self.server.ledger().made();
        assert!(
            made.volumes.is_empty() && made.snapshots.is_empty() && made.images.is_empty(),
            "{what}: {made:#?}"
        );
    }
}

fn tags() -> Tags {
    [(tag::CHECKSUM, "c"), (tag::FINGERPRINT, "f")].map(|(k, v)| (k.to_owned(), v.to_owned())).into()
}

/// A hundred times as fast as for EC2; what waits for one call waits long enough for a busy machine.
fn pace() -> Pace {
    let fast = Pace::default().faster(100, 400 * MILLI);
    Pace { unreachable: 5000 * MILLI, attached: 1500 * MILLI, ..fast }
}

fn config(endpoint: &str) -> aws_sdk_ec2::Config {
    use aws_sdk_ec2::config::{BehaviorVersion, Credentials, Region};
    aws_sdk_ec2::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .credentials_provider(Credentials::new("AKIDTEST", "secret", None, None, "test"))
        .build()
}

fn options(faults: Vec<Fault>) -> ServerOptions {
    let mut options = ServerOptions { faults, ..ServerOptions::default() };
    options.limits.between_snapshots = 20 * MILLI;
    options
}

#[tokio::test]
async fn a_happy_bake_and_a_hit_make_few_calls() {
    let ground = Ground::new(options(Vec::new()));
    let (ec2, run) = (ground.ec2(), RunId::new());
    let ended = ground.bake(&ec2, &run).await;
    assert_eq!(ended.left, []);
    let image = ended.result.unwrap();
    ground.holds_one(&image, "happy");
    let calls: Vec<String> = ground.server.ec2_calls().iter().map(|call| call.action.clone()).collect();
    println!("{} calls: {}", calls.len(), calls.join(" "));
    assert!(calls.len() <= 25, "{calls:?}");
    ground.server.forget_calls();
    let key = oven::cloud::Key {
        checksum: "c".into(),
        fingerprint: Some("f".into()),
        architecture: Architecture::HOST,
    };
    ec2.base(&ground.base).await.unwrap();
    assert_eq!(ec2.find(&key).await.unwrap().map(|found| found.id), Some(image.id));
    assert_eq!(ground.server.ec2_calls().len(), 2);
}

const ACTIONS: [&str; 11] = [
    "DescribeImages",
    "CreateVolume",
    "DescribeVolumes",
    "AttachVolume",
    "ModifyInstanceAttribute",
    "CreateSnapshot",
    "DescribeSnapshots",
    "RegisterImage",
    "DetachVolume",
    "DeleteVolume",
    "DeleteSnapshot",
];

fn faults() -> Vec<What> {
    vec![
        What::StatusBefore(500),
        What::StatusAfter(500),
        What::StatusBefore(503),
        What::StatusAfter(503),
        What::DropBefore,
        What::DropAfter,
        What::HangBefore,
        What::HangAfter,
        What::Late(50),
        What::Stale,
        What::Error("RequestLimitExceeded".into()),
        What::Error("InternalError".into()),
        What::Error("ExpiredToken".into()),
    ]
}

async fn survives(faults: Vec<Fault>) {
    let what = format!("{faults:?}");
    let ground = Ground::new(options(faults));
    let (ec2, run) = (ground.ec2(), RunId::new());
    let ended = ground.bake(&ec2, &run).await;
    let calls =
        || ground.server.ec2_calls().iter().map(|call| call.action.clone()).collect::<Vec<_>>().join(" ");
    let image = ended.result.unwrap_or_else(|error| panic!("{what}: {error:#}\n{}", calls()));
    assert_eq!(ended.left, [], "{what}");
    assert!(image.made_by(&run), "{what}");
    ground.holds_one(&image, &format!("{what}\n{}", calls()));
}

async fn each_fault_of(action: &str) {
    for what in faults() {
        for nth in [1, 2] {
            survives(vec![Fault::new(action, nth, what.clone())]).await;
        }
    }
}

macro_rules! each {
    ($($name:ident $at:literal,)*) => { $(
        #[tokio::test]
        async fn $name() {
            each_fault_of(ACTIONS[$at]).await;
        }
    )* };
}
each! {
    faults_of_describe_images 0,
    faults_of_create_volume 1,
    faults_of_describe_volumes 2,
    faults_of_attach_volume 3,
    faults_of_modify_instance_attribute 4,
    faults_of_create_snapshot 5,
    faults_of_describe_snapshots 6,
    faults_of_register_image 7,
    faults_of_detach_volume 8,
    faults_of_delete_volume 9,
}

/// What heals, and what must fail with nothing left.
#[tokio::test]
async fn turns() {
    for (action, turn, count, heals) in [
        ("CreateVolume", Turn::Failed, 1, false),
        ("CreateVolume", Turn::Vanishes, 1, false),
        ("AttachVolume", Turn::Stuck, 1, true),
        ("AttachVolume", Turn::Stuck, 9, false),
        ("CreateSnapshot", Turn::Failed, 1, true),
        ("CreateSnapshot", Turn::Failed, 9, false),
        ("RegisterImage", Turn::Failed, 1, false),
        ("RegisterImage", Turn::Untagged, 1, true),
        ("RegisterImage", Turn::Billed, 1, false),
    ] {
        let fault = Fault::new(action, 1, What::Turns(turn)).times(count);
        if heals {
            survives(vec![fault]).await;
            continue;
        }
        let ground = Ground::new(options(vec![fault.clone()]));
        let ended = ground.bake(&ground.ec2(), &RunId::new()).await;
        let error = format!("{:#}", ended.result.expect_err(&format!("{fault:?}")));
        assert_eq!(ended.left, [], "{fault:?}: {error}");
        println!("{action} {turn:?}: {error}");
        ground.holds_nothing(&format!("{fault:?}: {error}"));
    }
}

#[tokio::test]
async fn codes_end_a_bake_or_are_waited_out() {
    for (action, code, heals) in [
        ("CreateVolume", "IdempotentParameterMismatch", true),
        ("CreateVolume", "VolumeLimitExceeded", false),
        ("CreateVolume", "InsufficientVolumeCapacity", false),
        ("CreateVolume", "UnauthorizedOperation", false),
        ("AttachVolume", "AttachmentLimitExceeded", false),
        ("AttachVolume", "InvalidVolume.NotFound", true),
        ("CreateSnapshot", "SnapshotCreationPerVolumeRateExceeded", true),
        ("CreateSnapshot", "ConcurrentSnapshotLimitExceeded", true),
        ("CreateSnapshot", "SnapshotLimitExceeded", false),
        ("CreateSnapshot", "InvalidVolume.NotFound", true),
        ("RegisterImage", "InvalidSnapshot.NotFound", true),
        ("RegisterImage", "UnauthorizedOperation", false),
        ("DetachVolume", "InvalidAttachment.NotFound", true),
        ("DescribeImages", "OptInRequired", false),
    ] {
        let fault = Fault::new(action, 1, What::Error(code.into()));
        if heals {
            survives(vec![fault]).await;
            continue;
        }
        let ground = Ground::new(options(vec![fault]));
        let ended = ground.bake(&ground.ec2(), &RunId::new()).await;
        let error = format!("{:#}", ended.result.expect_err(code));
        assert!(error.contains(code), "{error}");
        assert_eq!(ended.left, []);
        ground.holds_nothing(&error);
    }
}

#[tokio::test]
async fn a_new_thing_may_be_invisible() {
    let mut lagging = options(Vec::new());
    lagging.visibility_lag = 300 * MILLI;
    let ground = Ground::new(lagging);
    let ended = ground.bake(&ground.ec2(), &RunId::new()).await;
    assert_eq!(ended.left, []);
    ground.holds_one(&ended.result.unwrap(), "lag");
}

#[tokio::test]
async fn throttled_a_bake_takes_longer_and_ends_well() {
    let mut busy = options(Vec::new());
    busy.throttle = Some(Throttle { reading: (1.0, 20.0), unfiltered: (1.0, 1.0), changing: (1.0, 10.0) });
    let ground = Ground::new(busy);
    let ended = ground.bake(&ground.ec2(), &RunId::new()).await;
    assert_eq!(ended.left, []);
    ground.holds_one(&ended.result.unwrap(), "throttled");
}

#[tokio::test]
async fn of_two_builders_one_wins_and_both_answer_with_its_image() {
    for _ in 0..10 {
        let ground = Ground::new(options(Vec::new()));
        let (one, two) = (ground.ec2(), ground.ec2());
        let (a, b) = (RunId::new(), RunId::new());
        let (first, second) = tokio::join!(ground.bake(&one, &a), ground.bake(&two, &b));
        let (first, second) = (first.result.unwrap(), second.result.unwrap());
        assert_eq!(first.id, second.id);
        ground.holds_one(&first, "two");
    }
}

/// A small generator, so that a seed tells a plan.
struct Dice(u64);
impl Dice {
    fn roll(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % sides
    }
}

/// `OVEN_SEEDS=0..1000` runs more of them.
#[tokio::test]
async fn random_plans() {
    let seeds = std::env::var("OVEN_SEEDS").unwrap_or_else(|_| "0..20".to_owned());
    let (from, to) = seeds.split_once("..").expect("A..B");
    let all = faults();
    for seed in from.parse::<u64>().unwrap()..to.parse().unwrap() {
        let mut dice = Dice(seed);
        let plan: Vec<Fault> = (0..1 + dice.roll(5))
            .map(|_| {
                let (action, what) = (ACTIONS[dice.roll(ACTIONS.len())], all[dice.roll(all.len())].clone());
                Fault::new(action, 1 + dice.roll(4) as u32, what)
            })
            .collect();
        let mut options = options(plan.clone());
        options.visibility_lag = MILLI * dice.roll(60) as u32;
        options.delays.creating = MILLI * dice.roll(30) as u32;
        options.delays.attaching = MILLI * dice.roll(30) as u32;
        options.delays.detaching = MILLI * dice.roll(30) as u32;
        options.delays.snapshot = MILLI * dice.roll(30) as u32;
        options.delays.image = MILLI * dice.roll(30) as u32;
        options.seed = seed;
        let what = format!("seed {seed}: {plan:?}");
        let ground = Ground::new(options);
        let ended = ground.bake(&ground.ec2(), &RunId::new()).await;
        assert_eq!(ended.left, [], "{what}");
        match ended.result {
            Ok(image) => ground.holds_one(&image, &what),
            Err(error) => {
                let calls = ground.server.ec2_calls();
                let calls: Vec<&str> = calls.iter().map(|call| call.action.as_str()).collect();
                panic!("{what}: {error:#}\n{}", calls.join(" "));
            }
        }
    }
}

/// Stopped anywhere: nothing is left, or an image that the next bake finds.
#[tokio::test]
async fn stopped_anywhere_nothing_is_left() {
    for n in 0..40u32 {
        let ground = Ground::new(options(Vec::new()));
        let (ec2, run) = (ground.ec2(), RunId::new());
        let stopped = stopped_bake(&ground, &ec2, &run, MILLI * 3 * n).await;
        assert_eq!(stopped.left, [], "after {} ms", 3 * n);
        let made = ground.server.ledger().made();
        assert_eq!(made.volumes, [], "after {} ms", 3 * n);
        assert_eq!(made.snapshots.len(), made.images.len(), "after {} ms: {made:#?}", 3 * n);
    }
}

async fn stopped_bake(ground: &Ground, ec2: &Ec2, run: &RunId, after: Duration) -> Ended<()> {
    let policy =
        Policy { keep_on_failure: false, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) };
    let disks = Attached::new(Rc::new(ec2.clone()));
    scope(policy, tokio::time::sleep(after), async |undo| {
        let base = ec2.base(&ground.base).await?;
        let disk = disks.checkout(&base, &DiskSpec::default(), run, &undo).await?;
        let snapshot = disk.commit(&undo).await?;
        let spec = ImageSpec {
            name: "web-1".into(),
            description: String::new(),
            architecture: base.architecture,
            root_device: base.root_device.clone(),
            size_gib: base.size_gib,
            attributes: base.attributes.clone(),
            tags: tags(),
            run: run.clone(),
            documents: Default::default(),
        };
        ec2.register(&snapshot, &spec, &undo).await.map(drop)
    })
    .await
}
