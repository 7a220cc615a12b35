//! The least policy, against the EC2-shaped server that lets pass what an IAM policy allows and nothing else: all that
//! oven does in the cloud succeeds with it, nothing can be taken out of it, and what is not ours it does not touch.

use aws_config::{BehaviorVersion, Region, SdkConfig};
use aws_sdk_ec2::Client;
use aws_sdk_ec2::config::{Credentials, SharedCredentialsProvider};
use oven::cloud::aws::ec2::{Ec2, Ec2Options, Timeouts};
use oven::cloud::iam_policy::{DiskAccess, policy};
use oven::cloud::{
    Base, BaseRef, Cloud, Image, ImageSpec, PermissionVerdict, Tags, VolumeKind, VolumeSpec, Volumes, tag,
};
use oven::device::Device;
use oven::disk::attached_disk::AttachedDisks;
use oven::disk::{DiskSpec, DiskStrategy};
use oven::error::{Kind, hint_of};
use oven::ids::{Architecture, RunId, VolumeId};
use oven::undo::{UndoPolicy, scope};
use oven_ec2_server::{Fault, Server, ServerOptions, Turn, What};
use oven_testing::ring;
use serde_json::Value;
use std::cell::Cell;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

const MILLI: Duration = Duration::from_millis(1);
const PARAMETER: &str = "/aws/service/debian/release/12/latest/amd64";
const INSTANCE: &str = "i-0123456789abcdef0";

struct PolicyFixture {
    server: Server,
    dir: tempfile::TempDir,
    _ring: ring::Shared,
}

/// `OVEN_TEST_RECORD`: a directory for what was sent, for the judges of the wire format.
fn record(name: &str) -> Option<PathBuf> {
    thread_local!(static COUNT: Cell<u32> = const { Cell::new(0) });
    let dir = PathBuf::from(std::env::var_os("OVEN_TEST_RECORD")?);
    std::fs::create_dir_all(&dir).unwrap();
    let count = COUNT.replace(COUNT.get() + 1);
    Some(dir.join(format!("policy-{}-{name}-{count}.jsonl", std::process::id())))
}

impl PolicyFixture {
    fn new(name: &str, policy: Value, faults: Vec<Fault>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let raw = dir.path().join("base.raw");
        std::fs::write(&raw, vec![7; 1 << 12]).unwrap();
        let mut options =
            ServerOptions { policy: Some(policy), faults, record: record(name), ..ServerOptions::default() };
        options.limits.between_snapshots = Duration::ZERO;
        let server = Server::start(&dir.path().join("region"), options).unwrap();
        let base = server.import(&raw, "base", Architecture::HOST).unwrap();
        server.set(|options| {
            options.parameters.insert(PARAMETER.to_owned(), base);
        });
        Self { server, dir, _ring: ring::shared() }
    }

    /// On an instance that does not take part otherwise: only the first can have volumes attached.
    fn ec2_on(&self, instance: &str) -> Ec2 {
        let file = self.dir.path().join("device");
        std::fs::write(&file, "").unwrap();
        let devices = move |volume: &VolumeId| {
            let node = std::fs::File::options().read(true).write(true).open(&file)?;
            Ok(Some(Device {
                node: node.into(),
                path: file.clone(),
                rdev: 0,
                serial: volume.0.clone(),
                trimming: None,
            }))
        };
        let fast = Timeouts::default().faster(100, 2000 * MILLI);
        let options = Ec2Options {
            region: None,
            instance_id: Some(instance.into()),
            zone: Some("us-east-1a".into()),
            documents: self.dir.path().join("documents"),
            devices: Rc::new(devices),
            timeouts: Timeouts { unreachable: 5000 * MILLI, attached: 1500 * MILLI, ..fast },
        };
        Ec2::with_shared(shared(&self.server.endpoint()), options)
    }

    fn ec2(&self) -> Ec2 {
        self.ec2_on(INSTANCE)
    }

    fn client(&self) -> Client {
        Client::new(&shared(&self.server.endpoint()))
    }

    /// Removes whatever is there of any run, but for a good image.
    async fn clear(&self) {
        self.ec2().replace_failed("web-2").await.unwrap();
        let disks = AttachedDisks::new(Rc::new(self.ec2()));
        let made = self.server.ledger().made();
        for entry in made.volumes.iter().chain(&made.snapshots) {
            if let Some(run) = entry.tags.get(tag::RUN) {
                disks.forget(&RunId(run.clone())).await.unwrap();
            }
        }
    }
}

fn shared(endpoint: &str) -> SdkConfig {
    let keys = Credentials::new("AKIDTEST", "secret", None, None, "test");
    SdkConfig::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .region(Region::new("us-east-1"))
        .endpoint_url(endpoint)
        .credentials_provider(SharedCredentialsProvider::new(keys))
        .build()
}

fn rules(keep_on_failure: bool) -> UndoPolicy {
    UndoPolicy { keep_on_failure, on_failure: Box::new(|_| ()), on_payment: Box::new(|_| ()) }
}

fn of_run(run: &RunId) -> Tags {
    [(tag::RUN.to_owned(), run.0.clone())].into()
}

fn spec(base: &Base, name: &str, run: &RunId) -> ImageSpec {
    let mut tags = of_run(run);
    tags.extend([(tag::CHECKSUM, "c"), (tag::FINGERPRINT, "f")].map(|(k, v)| (k.to_owned(), v.to_owned())));
    ImageSpec {
        name: name.into(),
        description: String::new(),
        architecture: base.architecture,
        root_device: base.root_device.clone(),
        size_gib: base.size_gib,
        attributes: base.attributes.clone(),
        tags,
        run: run.clone(),
        documents: Default::default(),
    }
}

/// A bake of a base that a parameter names, and nothing left of it but its image.
async fn baked(ec2: &Ec2, name: &str) -> anyhow::Result<Image> {
    let (run, disks) = (RunId::new(), AttachedDisks::new(Rc::new(ec2.clone())));
    let ended = scope(rules(false), std::future::pending(), async |undo| {
        let base = ec2.base(&BaseRef::Ssm(PARAMETER.into())).await?;
        ec2.ensure_permitted(&base).await?;
        let disk = DiskSpec { tags: of_run(&run), ..DiskSpec::default() };
        let disk = disks.checkout(&base, &disk, &run, &undo).await?;
        let snapshot = disk.commit(&undo, &|_, _| ()).await?;
        ec2.register(&snapshot, &spec(&base, name, &run), &undo).await
    })
    .await;
    left(&ended.leftovers)?;
    ended.result
}

fn left(left: &[oven::undo::Leftover]) -> anyhow::Result<()> {
    // What could not be removed is reported with the reason, which is what a missing permission looks like here.
    match left {
        [] => Ok(()),
        [one, ..] => Err(Kind::LeftBehind.error(one)),
    }
}

/// A bake that fails preserves its disk; a shell opens it, and sweep removes it.
async fn preserve_disk(ec2: &Ec2) -> anyhow::Result<()> {
    let (run, disks) = (RunId::new(), AttachedDisks::new(Rc::new(ec2.clone())));
    let ended = scope(rules(true), std::future::pending(), async |undo| {
        let base = ec2.base(&BaseRef::Ssm(PARAMETER.into())).await?;
        let disk = DiskSpec { tags: of_run(&run), ..DiskSpec::default() };
        disks.checkout(&base, &disk, &run, &undo).await?;
        anyhow::Result::<()>::Err(Kind::Step.error("the step that fails"))
    })
    .await;
    let error = ended.result.expect_err("it fails");
    if Kind::of(&error) != Kind::Step {
        return Err(error);
    }
    left(&ended.leftovers)?;
    drop(disks.reopen(&run).await?);
    disks.forget(&run).await?;
    anyhow::ensure!(ec2.kept(&run).await?.is_none(), "the disk is there still");
    Ok(())
}

/// What an instance left that is gone.
async fn swept(fixture: &PolicyFixture, ec2: &Ec2) -> anyhow::Result<()> {
    let gone = fixture.ec2_on("i-0eeeeeeeeeeeeeeee");
    let (run, base) = (RunId::new(), gone.base(&BaseRef::Ssm(PARAMETER.into())).await?);
    let kind = VolumeKind::default();
    let spec = VolumeSpec {
        snapshot: base.snapshot,
        size_gib: base.size_gib,
        kind,
        run: run.clone(),
        tags: of_run(&run),
    };
    let volume = gone.create(&spec).await?;
    gone.snapshot(&volume, &run, &of_run(&run)).await?;
    let stale = ec2.stale_runs(None).await?;
    anyhow::ensure!(stale.len() == 1 && stale[0].run == run && stale[0].resources.len() == 2, "{stale:?}");
    AttachedDisks::new(Rc::new(ec2.clone())).forget(&run).await
}

/// All that oven does in the cloud: a bake, one whose image fails in the end, a disk that is preserved, a sweep.
async fn everything(fixture: &PolicyFixture) -> anyhow::Result<()> {
    let ec2 = fixture.ec2();
    let image = baked(&ec2, "web-1").await?;
    preserve_disk(&ec2).await?;
    match baked(&ec2, "web-2").await {
        Ok(_) => anyhow::bail!("its image should have failed"),
        Err(error) if format!("{error:#}").contains("was deregistered again") => {}
        Err(error) => return Err(error),
    }
    swept(fixture, &ec2).await?;
    let made = fixture.server.ledger().made();
    anyhow::ensure!(made.volumes.is_empty() && made.images.len() == 1, "{made:?}");
    anyhow::ensure!(made.snapshots.len() == 1 && made.snapshots[0].id == image.snapshot.0, "{made:?}");
    Ok(())
}

/// The second image fails.
fn fault() -> Vec<Fault> {
    vec![Fault::new("RegisterImage", 2, What::Turns(Turn::Failed))]
}

#[tokio::test]
async fn all_that_oven_does_is_permitted() {
    let fixture = PolicyFixture::new("all", policy(DiskAccess::Attached, None, &[]), fault());
    everything(&fixture).await.unwrap();
    let all = fixture.ec2().permissions().await.unwrap();
    assert!(all.iter().all(|permission| permission.verdict != PermissionVerdict::Missing), "{all:#?}");
    let calls = fixture.server.calls();
    let refused = calls.iter().filter(|call| !call.dry_run && call.answer == "UnauthorizedOperation");
    assert_eq!(refused.count(), 0);
    // The list is not longer than what is done, either.
    for action in oven::cloud::iam_policy::actions(DiskAccess::Attached) {
        let name = action.split(':').nth(1).unwrap();
        // Tags are set in the calls that make something, and a disk is marked as preserved.
        assert!(calls.iter().any(|call| call.action == name && !call.dry_run), "{action} is never called");
    }
}

/// The policy without an action, in this statement or (`None`) in all.
fn without(action: &str, statement: Option<usize>) -> Value {
    let mut policy = policy(DiskAccess::Attached, None, &[]);
    for (i, of) in policy["Statement"].as_array_mut().unwrap().iter_mut().enumerate() {
        if statement.is_none_or(|wanted| wanted == i) {
            of["Action"].as_array_mut().unwrap().retain(|other| other != action);
        }
    }
    policy
}

#[tokio::test]
async fn without_any_one_action_something_fails_and_says_which() {
    let full = policy(DiskAccess::Attached, None, &[]);
    let mut tried = 0;
    for (i, statement) in full["Statement"].as_array().unwrap().iter().enumerate() {
        for action in statement["Action"].as_array().unwrap() {
            let action = action.as_str().unwrap();
            let what = format!("{action} of {}", statement["Sid"]);
            let fixture = PolicyFixture::new("without", without(action, Some(i)), fault());
            let error = everything(&fixture).await.expect_err(&what);
            let text = format!("{error:#}");
            println!("{what}: {text} [{}]", hint_of(&error).unwrap_or_default());
            // Whoever makes something with tags sets tags.
            let name = action.split(':').nth(1).unwrap();
            let said = text.contains(name) || name == "CreateTags" && text.contains("CreateVolume");
            assert!(said, "{what}: {text}");
            assert!(
                ["lacks permissions", "UnauthorizedOperation", "AccessDenied"]
                    .iter()
                    .any(|code| text.contains(code)),
                "{text}"
            );
            // What AWS's support asks for.
            assert_eq!(text.contains("(request "), text.contains("UnauthorizedOperation"), "{what}: {text}");
            if Kind::of(&error) == Kind::Cloud {
                // An image that stays is worse than the reason.
                let wanted = if name == "DeregisterImage" { "deregister-image" } else { "oven policy" };
                assert!(hint_of(&error).is_some_and(|hint| hint.contains(wanted)), "{what}: {text}");
            }
            fixture.server.set(|options| options.policy = Some(full.clone()));
            fixture.clear().await;
            let made = fixture.server.ledger().made();
            assert_eq!(
                (made.volumes.len(), made.snapshots.len()),
                (0, made.images.len()),
                "{what}: {made:?}"
            );
            tried += 1;
        }
    }
    assert_eq!(tried, 22);
}

#[tokio::test]
async fn missing_and_unknown_permissions_are_reported() {
    for action in oven::cloud::iam_policy::actions(DiskAccess::Attached) {
        let fixture = PolicyFixture::new("doctor", without(&action, None), Vec::new());
        let all = fixture.ec2().permissions().await.unwrap();
        let verdict = &all.iter().find(|permission| permission.action == action).expect(&action).verdict;
        assert_ne!(*verdict, PermissionVerdict::Granted, "{action}");
        let open = ["ec2:Describe", "ec2:CreateVolume", "ec2:RegisterImage", "ssm:"];
        let plain = open.iter().any(|open| action.starts_with(open));
        assert_eq!(
            *verdict == PermissionVerdict::Missing,
            plain || action == "ec2:ModifyInstanceAttribute",
            "{action}: {verdict:?}"
        );
        let others = all.iter().filter(|permission| {
            permission.verdict == PermissionVerdict::Missing && permission.action != action
        });
        // Who may not set tags may make nothing with tags.
        let led: Vec<&str> = others.map(|permission| permission.action.as_str()).collect();
        let expected: &[&str] =
            if action == "ec2:CreateTags" { &["ec2:CreateVolume", "ec2:RegisterImage"] } else { &[] };
        assert_eq!(led, expected, "{action}");
    }
}

/// A role with this policy does nothing to what oven did not make.
#[tokio::test]
async fn what_is_not_ours_is_out_of_reach() {
    use aws_sdk_ec2::types::{Tag, VolumeType};
    let fixture = PolicyFixture::new("theirs", policy(DiskAccess::Attached, None, &[]), Vec::new());
    let (ec2, client) = (fixture.ec2(), fixture.client());
    let image = baked(&ec2, "web-1").await.unwrap();
    let run = RunId::new();
    let base = ec2.base(&BaseRef::Ssm(PARAMETER.into())).await.unwrap();
    let kind = VolumeKind::default();
    let spec = VolumeSpec {
        snapshot: base.snapshot.clone(),
        size_gib: 1,
        kind,
        run: run.clone(),
        tags: of_run(&run),
    };
    let volume = ec2.create(&spec).await.unwrap();
    // As if somebody else had made them.
    fixture.server.with_world(|world| {
        world.volumes.get_mut(&volume.0).unwrap().common.tags.clear();
        world.snapshots.get_mut(&image.snapshot.0).unwrap().common.tags.clear();
        world.images.get_mut(&image.id.0).unwrap().common.tags.clear();
    });
    let before = fixture.server.ledger().made();
    let tag = Tag::builder().key(tag::RUN).value("mine").build();
    let (volume, snapshot) = (volume.0.as_str(), image.snapshot.0.as_str());
    let mut codes = Vec::new();
    macro_rules! refused {
        ($($call:expr,)*) => { $(
            let error = $call.send().await.expect_err(stringify!($call)).into_service_error();
            codes.push((stringify!($call), error.meta().code().unwrap_or_default().to_owned()));
        )* };
    }
    refused![
        client.delete_volume().volume_id(volume),
        client.delete_snapshot().snapshot_id(snapshot),
        client.deregister_image().image_id(&image.id.0),
        client.attach_volume().volume_id(volume).instance_id(INSTANCE).device("/dev/sdf"),
        client.detach_volume().volume_id(volume),
        client.create_snapshot().volume_id(volume),
        // Whoever could tag it could then delete it.
        client.create_tags().resources(volume).tags(tag.clone()),
        client.create_tags().resources(&image.id.0).tags(tag.clone()),
        client.create_tags().resources(INSTANCE).tags(tag.clone()),
        client.delete_tags().resources(volume),
        // Without a run's tag nothing is made.
        client
            .create_volume()
            .availability_zone("us-east-1a")
            .snapshot_id(&base.snapshot.0)
            .volume_type(VolumeType::Gp3),
        client.terminate_instances().instance_ids(INSTANCE),
    ];
    for (call, code) in codes {
        assert_eq!(code, "UnauthorizedOperation", "{call}");
    }
    assert_eq!(fixture.server.ledger().made(), before);
    // And what the base is of is not touched by a sweep.
    assert_eq!(ec2.stale_runs(Some(Duration::ZERO)).await.unwrap(), []);
}
