mod blocks;
mod blocks_model;
mod mishaps;

use super::*;
use crate::cloud::{Tags, VolumeSpec, Volumes};
use crate::error::hint_of;
use crate::ids::{Architecture, RunId, VolumeId};
use crate::owner::Owner;
use crate::report::Report;
use crate::sys::lock::try_lock_until_closed;
use crate::undo;
use crate::undo::{Debt, Due};
use records::VolumeRecord;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::time::Instant;
use tempfile::TempDir;

struct Fixture {
    region: Region,
    dir: TempDir,
}

impl Fixture {
    /// The region is in memory if possible, because syncs on a busy disk can take longer than the delays of these
    /// tests.
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        Self { region: Region::open(&dir.path().join("region")).unwrap(), dir }
    }

    fn raw(&self, name: &str, byte: u8) -> PathBuf {
        let path = self.dir.path().join(name);
        let file = File::create(&path).unwrap();
        file.set_len(3 << 20).unwrap();
        file.write_all_at(&[byte; 5000], 1 << 20).unwrap();
        path
    }

    async fn import(&self, name: &str) -> Image {
        let raw = self.raw(name, 7);
        let (tags, report) = (Tags::new(), Report::silent());
        self.region.import(&raw, name, Architecture::X86_64, &tags, &report).await.unwrap()
    }

    async fn volume(&self, image: &Image, run: &RunId) -> VolumeId {
        self.region.create(&volume_of(image, run)).await.unwrap()
    }

    /// Takes a snapshot of a new volume of `image`. The volume is not deleted.
    async fn snapshot(&self, image: &Image, run: &RunId) -> SnapshotId {
        let volume = self.volume(image, run).await;
        self.region.snapshot(&volume, run, &Tags::new()).await.unwrap()
    }

    /// Waits until an image whose definition has the name `web` is registered, and returns it.
    async fn appears(&self) -> Image {
        loop {
            match self.region.images(Some("web")).await.unwrap().pop() {
                Some(image) => return image,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    fn data(&self, id: &str) -> File {
        let dir = if id.starts_with("snap") { "snapshots" } else { "volumes" };
        let path = self.region.dir().join(dir).join(format!("{id}.img"));
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn files(&self, kind: &str) -> usize {
        self.region.dir().join(kind).read_dir().unwrap().count()
    }
}

fn volume_of(image: &Image, run: &RunId) -> VolumeSpec {
    VolumeSpec {
        snapshot: image.snapshot.clone(),
        size_gib: 1,
        kind: Default::default(),
        run: run.clone(),
        tags: Tags::new(),
    }
}

fn spec(name: &str, print: &str) -> ImageSpec {
    let tags = [(tag::CHECKSUM, "c"), (tag::FINGERPRINT, print), (tag::NAME, "web")];
    ImageSpec {
        name: name.into(),
        description: String::new(),
        architecture: Architecture::X86_64,
        root_device: "/dev/xvda".into(),
        size_gib: 1,
        attributes: Default::default(),
        tags: tags.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        run: RunId::new(),
        documents: [("packages".to_owned(), "a\t1\tall\n".to_owned())].into(),
    }
}

fn key(print: Option<&str>) -> BakeKey {
    BakeKey {
        checksum: "c".into(),
        fingerprint: print.map(str::to_owned),
        architecture: Architecture::X86_64,
    }
}

fn byte(file: &File, at: u64) -> u8 {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

/// Asserts the error's kind, and that its text contains `start`.
fn refuses<T: std::fmt::Debug>(result: Result<T>, kind: Kind, start: &str) {
    let error = result.unwrap_err();
    let text = format!("{error:#}");
    assert!(text.contains(start), "{text:?} has no {start:?}");
    assert_eq!(Kind::of(&error), kind, "{text}");
}

#[tokio::test]
async fn an_imported_image_is_baked_on_and_found_again() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    assert_eq!((base.size_gib, base.state), (1, ImageState::Available));
    let found = f.region.base(&BaseRef::Name { name: "base-*".into(), owner: None }).await.unwrap();
    assert_eq!((&found.id, found.root_device.as_str()), (&base.id, "/dev/xvda"));
    assert_eq!(f.region.base(&BaseRef::Id(base.id.clone())).await.unwrap(), found);

    let run = RunId::new();
    let volume = f.volume(&base, &run).await;
    assert_eq!(byte(&f.data(&volume.0), 1 << 20), 7);
    f.data(&volume.0).write_all_at(&[9], 5 << 20).unwrap();
    let snapshot = f.region.snapshot(&volume, &run, &Tags::new()).await.unwrap();
    assert!(f.region.find(&key(Some("f"))).await.unwrap().is_none());
    let image = f.region.register(&snapshot, &spec("web-f", "f"), &Undo::default()).await.unwrap();
    assert_eq!(f.region.find(&key(Some("f"))).await.unwrap(), Some(image.clone()));
    assert_eq!(f.region.find(&key(None)).await.unwrap(), Some(image.clone()));
    assert_eq!(f.region.find(&key(Some("g"))).await.unwrap(), None);
    let other = BakeKey { architecture: Architecture::Arm64, ..key(None) };
    assert_eq!(f.region.find(&other).await.unwrap(), None);
    let (shown, documents) = f.region.image(&image.id).await.unwrap();
    assert_eq!((shown, documents["packages"].as_str()), (image.clone(), "a\t1\tall\n"));
    assert_eq!(f.region.images(Some("web")).await.unwrap(), std::slice::from_ref(&image));
    assert_eq!(f.region.images(None).await.unwrap(), [base.clone(), image.clone()]);
    assert!(f.region.images(Some("db")).await.unwrap().is_empty());

    f.region.ensure_no_volumes(&run).await.unwrap();
    f.region.ensure_no_snapshots(&run).await.unwrap();
    assert_eq!((f.files("volumes"), f.files("snapshots")), (0, 4), "an image's snapshot stays");
    assert_eq!((byte(&f.data(&snapshot.0), 5 << 20), byte(&f.data(&snapshot.0), 1 << 20)), (9, 7));
    assert_eq!(byte(&f.data(&base.snapshot.0), 5 << 20), 0);
}

#[tokio::test]
async fn violations_of_ec2s_rules_are_rejected() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    let (run, undo) = (RunId::new(), Undo::default());
    let snapshot = f.snapshot(&base, &run).await;
    let register = async |spec: ImageSpec| f.region.register(&snapshot, &spec, &undo).await;
    let image = register(spec("web-f", "f")).await.unwrap();

    let taken = format!("InvalidAMIName.Duplicate: AMI name web-f is already in use by AMI {}", image.id);
    refuses(register(spec("web-f", "g")).await, Kind::Cloud, &taken);
    refuses(register(spec("w", "f")).await, Kind::Cloud, "InvalidAMIName.Malformed");
    refuses(register(spec("web:1", "f")).await, Kind::Cloud, "InvalidAMIName.Malformed");
    let many = (0..50).map(|n| (n.to_string(), String::new())).collect();
    refuses(register(ImageSpec { tags: many, ..spec("web-g", "g") }).await, Kind::Cloud, "TagLimitExceeded");
    let long = [("k".to_owned(), "v".repeat(257))].into();
    refuses(
        register(ImageSpec { tags: long, ..spec("web-g", "g") }).await,
        Kind::Cloud,
        "InvalidParameterValue",
    );
    let small = ImageSpec { size_gib: 0, ..spec("web-g", "g") };
    refuses(register(small).await, Kind::Cloud, "InvalidBlockDeviceMapping");
    let text = ImageSpec { description: "d".repeat(256), ..spec("web-g", "g") };
    refuses(register(text).await, Kind::Cloud, "InvalidParameterValue");
    let none = SnapshotId(new_id("snap"));
    let lost = f.region.register(&none, &spec("web-g", "g"), &undo).await;
    refuses(lost, Kind::NotFound, "InvalidSnapshot.NotFound");
    assert_eq!(f.files("images"), 2, "nothing rejected was created");

    let in_use =
        format!("InvalidSnapshot.InUse: The snapshot {snapshot} is currently in use by {}", image.id);
    refuses(f.region.delete_snapshot(&snapshot).await, Kind::Cloud, &in_use);
    refuses(f.region.delete_snapshot(&none).await, Kind::NotFound, "InvalidSnapshot.NotFound");
    let create = async |size_gib, tags| {
        f.region.create(&VolumeSpec { size_gib, tags, ..volume_of(&base, &run) }).await
    };
    refuses(create(0, Tags::new()).await, Kind::Cloud, "InvalidParameterValue");
    refuses(create(16385, Tags::new()).await, Kind::Cloud, "InvalidParameterValue");
    let reserved = [("aws:x".to_owned(), String::new())].into();
    refuses(create(1, reserved).await, Kind::Cloud, "InvalidParameterValue");
    for id in ["ami-0123", "vol-0123456789abcdef0", "../../x"] {
        refuses(f.region.image(&ImageId(id.into())).await, Kind::NotFound, "InvalidAMIID.Malformed");
    }
    let unknown = ImageId(new_id("ami"));
    refuses(f.region.image(&unknown).await, Kind::NotFound, "InvalidAMIID.NotFound");
    refuses(f.region.base(&BaseRef::Id(unknown.clone())).await, Kind::NotFound, "InvalidAMIID.NotFound");
    refuses(f.region.deregister(&unknown).await, Kind::NotFound, "InvalidAMIID.NotFound");
    let volume = VolumeId(new_id("vol"));
    refuses(f.region.delete_volume(&volume).await, Kind::NotFound, "InvalidVolume.NotFound");
    refuses(f.region.attach(&volume).await, Kind::NotFound, "InvalidVolume.NotFound");
    let gone = f.region.snapshot(&volume, &run, &Tags::new()).await;
    refuses(gone, Kind::NotFound, "InvalidVolume.NotFound");

    // The name of a deregistered image is free, and its snapshot can be deleted.
    f.region.deregister(&image.id).await.unwrap();
    assert_eq!(f.files("documents"), 0);
    register(spec("web-f", "g")).await.unwrap();
    let other = f.snapshot(&base, &run).await;
    f.region.delete_snapshot(&other).await.unwrap();
}

#[tokio::test]
async fn a_locked_volume_is_in_use() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let volume = f.volume(&base, &run).await;
    // The test opens and locks the file, as a loop device does. This does not need root.
    let held = f.data(&volume.0);
    assert!(try_lock_until_closed(&held).unwrap());
    refuses(f.region.delete_volume(&volume).await, Kind::Cloud, "VolumeInUse");
    refuses(f.region.attach(&volume).await, Kind::Cloud, "VolumeInUse");
    refuses(f.region.ensure_no_volumes(&run).await, Kind::Cloud, "VolumeInUse");
    // The snapshot is a copy, so it does not contain data that are written later.
    let snapshot = f.region.snapshot(&volume, &run, &Tags::new()).await.unwrap();
    held.write_all_at(&[1], 0).unwrap();
    assert_eq!((byte(&f.data(&snapshot.0), 0), byte(&f.data(&snapshot.0), 1 << 20)), (0, 7));
    let late = async {
        tokio::time::sleep(Duration::from_millis(200)).await;
        drop(held);
    };
    let (deleted, ()) = tokio::join!(f.region.ensure_no_volumes(&run), late);
    deleted.unwrap();
    assert_eq!(f.files("volumes"), 0);
}

#[tokio::test]
async fn a_free_volume_shares_its_file_with_the_snapshot() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let volume = f.volume(&base, &run).await;
    let snapshot = f.region.snapshot(&volume, &run, &Tags::new()).await.unwrap();
    assert_eq!(f.data(&volume.0).metadata().unwrap().ino(), f.data(&snapshot.0).metadata().unwrap().ino());
    // The volume gets a separate file before it can be written to.
    let shared = f.region.lock_when_free(&volume).await.unwrap().unwrap();
    let own = f.region.own_file(&volume, shared).await.unwrap();
    assert!(f.region.lock_when_free(&volume).await.unwrap().is_none(), "still locked");
    own.write_all_at(&[1], 1 << 20).unwrap();
    assert_eq!((byte(&f.data(&snapshot.0), 1 << 20), byte(&f.data(&volume.0), 1 << 20)), (7, 1));
    assert_eq!(f.files("volumes"), 2);
}

#[tokio::test]
async fn states_pass_through_pending() {
    let f = Fixture::new();
    let (base, run, delay) = (f.import("base-1").await, RunId::new(), Duration::from_millis(1200));
    let slow = f.region.with_delays(delay);
    let start = Instant::now();
    let volume = slow.create(&volume_of(&base, &run)).await.unwrap();
    assert!(start.elapsed() >= delay);
    let snapshot = slow.snapshot(&volume, &run, &Tags::new()).await.unwrap();
    assert!(start.elapsed() >= 2 * delay);

    // A process is killed while its image is pending. The image becomes available nevertheless.
    let (web, undo) = (spec("web-f", "f"), Undo::default());
    let registered = async |images| {
        while f.region.images(None).await.unwrap().len() < images {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        _ = slow.register(&snapshot, &web, &undo) => panic!("it is not available yet"),
        () = registered(2) => {}
    }
    let [_, pending] = &f.region.images(None).await.unwrap()[..] else { panic!("two images") };
    assert_eq!(pending.state, ImageState::Pending);
    refuses(f.region.delete_snapshot(&snapshot).await, Kind::Cloud, "InvalidSnapshot.InUse");
    // The pending image has the name already, so `register` waits for it.
    refuses(
        f.region.register(&snapshot, &spec("web-f", "g"), &undo).await,
        Kind::Cloud,
        "InvalidAMIName.Duplicate",
    );
    let found = f.region.find(&key(Some("f"))).await.unwrap().unwrap();
    assert_eq!((&found.id, found.state), (&pending.id, ImageState::Available));
    assert!(start.elapsed() >= 3 * delay);
    // An available image is returned immediately, although a newer one is pending.
    let newer = spec("web-f2", "f");
    tokio::select! {
        _ = slow.register(&snapshot, &newer, &undo) => panic!("it is not available yet"),
        () = registered(3) => {}
    }
    assert_eq!(f.region.find(&key(Some("f"))).await.unwrap(), Some(found));
    let newest =
        f.region.base(&BaseRef::Name { name: "web-f2".into(), owner: Some("self".into()) }).await.unwrap();
    assert_eq!(f.region.find(&key(Some("f"))).await.unwrap().unwrap().id, newest.id);
}

#[tokio::test]
async fn the_loser_adopts_and_pays_for_its_snapshot() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    let bake = async |stop_after_register: bool| {
        let run = RunId::new();
        let snapshot = f.snapshot(&base, &run).await;
        let (region, owed) = (f.region.clone(), run.clone());
        let policy = undo::UndoPolicy {
            keep_on_failure: false,
            on_failure: Box::new(|_| ()),
            on_payment: Box::new(|_| ()),
        };
        let ended = undo::scope(policy, std::future::pending(), async |undo| {
            undo.owe(Debt {
                due: Due::OnFailure,
                what: "the snapshot".into(),
                command: String::new(),
                pay: Box::new(move || Box::pin(async move { region.ensure_no_snapshots(&owed).await })),
                keep: None,
            });
            let image = f.region.register(&snapshot, &spec("web-f", "f"), &undo).await?;
            if stop_after_register { Err(Kind::Cloud.error("late")) } else { Ok(image) }
        })
        .await;
        assert!(ended.leftovers.is_empty());
        (ended.result, snapshot)
    };
    let (winner, first) = bake(false).await;
    let (loser, second) = bake(false).await;
    let (winner, loser) = (winner.unwrap(), loser.unwrap());
    assert_eq!(winner, loser);
    assert!(f.region.store().find::<SnapshotRecord>(&first.0).unwrap().is_some());
    assert!(f.region.store().find::<SnapshotRecord>(&second.0).unwrap().is_none(), "nobody needs it");
    // The same snapshot is registered again, as if the first answer had been lost. It is not deleted, because the image
    // uses it.
    let undo = Undo::default();
    assert_eq!(f.region.register(&first, &spec("web-f", "f"), &undo).await.unwrap(), winner);

    f.region.deregister(&winner.id).await.unwrap();
    f.region.delete_snapshot(&first).await.unwrap();
    let (failed, third) = bake(true).await;
    assert!(failed.is_err());
    assert!(f.region.store().find::<SnapshotRecord>(&third.0).unwrap().is_some(), "an image uses it");
    let adopted = f.region.find(&key(Some("f"))).await.unwrap().unwrap();
    assert_eq!(adopted.snapshot, third);
}

#[tokio::test]
async fn failed_images_are_replaced_on_request() {
    let f = Fixture::new();
    let (base, run, undo) = (f.import("base-1").await, RunId::new(), Undo::default());
    let (first, second) = (f.snapshot(&base, &run).await, f.snapshot(&base, &run).await);
    let image = f.region.register(&first, &spec("web-f", "f"), &undo).await.unwrap();
    refuses(f.region.replace_failed("web-f").await, Kind::Cloud, "oven replaces only images that it created");
    refuses(
        f.region.replace_failed("base-1").await,
        Kind::Cloud,
        "oven replaces only images that it created",
    );
    assert_eq!(f.region.replace_failed("web-g").await.unwrap(), None);

    f.region.fail(&image.id, "Client.InternalError").await.unwrap();
    assert_eq!(f.region.find(&key(Some("f"))).await.unwrap(), None);
    refuses(f.region.base(&BaseRef::Id(image.id.clone())).await, Kind::NotFound, "Client.InternalError");
    let error = f.region.register(&second, &spec("web-f", "f"), &undo).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("--replace-failed"), "{error:#}");
    assert_eq!(f.region.replace_failed("web-f").await.unwrap(), Some(image.id));
    assert!(f.region.store().find::<SnapshotRecord>(&first.0).unwrap().is_none());
    f.region.register(&second, &spec("web-f", "f"), &undo).await.unwrap();
    // An image without its snapshot has failed.
    std::fs::remove_file(f.region.dir().join(format!("snapshots/{second}.img"))).unwrap();
    assert_eq!(f.region.images(Some("web")).await.unwrap()[0].state, ImageState::Failed);
}

#[tokio::test]
async fn an_image_that_fails_while_pending_is_deregistered() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let snapshot = f.snapshot(&base, &run).await;
    let slow = f.region.with_delays(Duration::from_secs(60));
    let undo = Undo::default();
    let break_it = async {
        let image = f.appears().await;
        f.region.fail(&image.id, "broken").await.unwrap();
    };
    let web = spec("web-f", "f");
    let (result, ()) = tokio::join!(slow.register(&snapshot, &web, &undo), break_it);
    refuses(result, Kind::Cloud, "failed: broken");
    assert!(f.region.images(Some("web")).await.unwrap().is_empty());
    f.region.delete_snapshot(&snapshot).await.unwrap();
}

#[tokio::test]
async fn missing_bases_are_reported() {
    let f = Fixture::new();
    let name = |name: &str, owner: Option<&str>| BaseRef::Name {
        name: name.into(),
        owner: owner.map(str::to_owned),
    };
    refuses(f.region.base(&name("debian-12", None)).await, Kind::NotFound, "is empty");
    f.import("debian-12").await;
    let newest = f.import("debian-13").await;
    assert_eq!(f.region.base(&name("debian-*", None)).await.unwrap().id, newest.id);
    let error = f.region.base(&name("debain-12", None)).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("debian-12"), "{error:#}");
    let error = f.region.base(&name("debian-*", Some("136693071363"))).await.unwrap_err();
    assert!(hint_of(&error).unwrap().contains("oven import RAW --name NAME"), "{error:#}");
    refuses(Err::<(), _>(error), Kind::NotFound, "136693071363");
    refuses(f.region.base(&BaseRef::Ssm("/aws/x".into())).await, Kind::NotFound, "/aws/x");
}

#[tokio::test]
async fn disks_are_imported_once() {
    let f = Fixture::new();
    let (tags, report) = (Tags::new(), Report::silent());
    let import = async |raw: &Path, name: &str, arch| f.region.import(raw, name, arch, &tags, &report).await;
    let raw = f.raw("disk.raw", 7);
    // Waits until the file is older than the resolution of its times.
    tokio::time::sleep(Duration::from_millis(150)).await;
    let image = import(&raw, "base-1", Architecture::X86_64).await.unwrap();
    assert_eq!(f.data(&image.snapshot.0).metadata().unwrap().len(), 1 << 30);
    assert!(f.data(&image.snapshot.0).metadata().unwrap().blocks() * 512 < 1 << 20, "sparse");
    // First, the same file is imported again. Then a copy of it is imported that has zeros at its end.
    assert_eq!(import(&raw, "base-1", Architecture::X86_64).await.unwrap(), image);
    let copy = f.raw("copy.raw", 7);
    File::options().write(true).open(&copy).unwrap().set_len(9 << 20).unwrap();
    assert_eq!(import(&copy, "base-1", Architecture::X86_64).await.unwrap(), image);
    let taken = format!("InvalidAMIName.Duplicate: AMI name base-1 is already in use by AMI {}", image.id);
    refuses(import(&raw, "base-1", Architecture::Arm64).await, Kind::Cloud, &taken);
    refuses(import(&f.raw("other.raw", 8), "base-1", Architecture::X86_64).await, Kind::Cloud, &taken);
    // The same file is changed in place. The change is found by the file's times.
    f.raw("disk.raw", 9);
    refuses(import(&raw, "base-1", Architecture::X86_64).await, Kind::Cloud, &taken);
    assert_eq!((f.files("images"), f.files("snapshots")), (1, 2));

    let bad = f.dir.path().join("bad");
    for (content, format, command) in [
        (&b"QFI\xfb\0\0\0\x03"[..], "qcow2", "qemu-img convert -O raw"),
        (b"KDMV", "VMDK", "qemu-img convert"),
        (b"conectix", "VHD", "qemu-img convert"),
        (b"\xfd7zXZ\0", "xz", "xz -dc"),
        (b"\x1f\x8b\x08", "gzip", "gzip -dc"),
        (b"\x28\xb5\x2f\xfd", "zstd", "zstd -dc"),
        (b"", "is empty", ""),
    ] {
        std::fs::write(&bad, content).unwrap();
        let error = import(&bad, "base-2", Architecture::X86_64).await.unwrap_err();
        assert!(hint_of(&error).unwrap_or_default().contains(command), "{error:#}");
        refuses(Err::<(), _>(error), Kind::Usage, format);
    }
    // A fixed VHD is a raw disk with a footer.
    let mut vhd = vec![0; 4096];
    vhd[4096 - 512..4096 - 504].copy_from_slice(b"conectix");
    std::fs::write(&bad, vhd).unwrap();
    refuses(import(&bad, "base-2", Architecture::X86_64).await, Kind::Usage, "VHD");
    refuses(import(f.dir.path(), "base-2", Architecture::X86_64).await, Kind::Usage, "neither a file");
    refuses(
        import(&f.dir.path().join("x"), "base-2", Architecture::X86_64).await,
        Kind::NotFound,
        "does not exist",
    );
    refuses(import(&raw, "b", Architecture::X86_64).await, Kind::Cloud, "InvalidAMIName.Malformed");
    assert_eq!((f.files("images"), f.files("snapshots")), (1, 2));
}

#[tokio::test]
async fn stale_runs_are_those_whose_owner_has_ended() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    let this = Owner::this();
    let dead = Owner { started: this.started + 1, ..this.clone() };
    let foreign = Owner { host: "elsewhere".into(), ..this.clone() };
    let create = async |owner: Option<&Owner>| {
        let run = RunId::new();
        let tags: Tags = owner.map(|o| (tag::OWNER.to_owned(), o.to_string())).into_iter().collect();
        let volume =
            f.region.create(&VolumeSpec { tags: tags.clone(), ..volume_of(&base, &run) }).await.unwrap();
        let snapshot = f.region.snapshot(&volume, &run, &tags).await.unwrap();
        (run, volume, snapshot)
    };
    let (alive, ..) = create(Some(&this)).await;
    let (killed, volume, snapshot) = create(Some(&dead)).await;
    let (other, ..) = create(Some(&foreign)).await;
    let (nobody, ..) = create(None).await;
    let (done, _, result) = create(Some(&dead)).await;
    f.region.register(&result, &spec("web-f", "f"), &Undo::default()).await.unwrap();
    f.region.ensure_no_volumes(&done).await.unwrap();

    f.region.tidy().await.unwrap();
    let stale = f.region.stale_runs(None).await.unwrap();
    assert_eq!(stale.len(), 1, "{stale:?}");
    assert_eq!((&stale[0].run, stale[0].kept, &stale[0].owner), (&killed, false, &dead.to_string()));
    assert_eq!(stale[0].resources, [volume.0.clone(), snapshot.0]);
    assert_eq!(f.region.stale_runs(Some(Duration::from_secs(3600))).await.unwrap(), stale);
    tokio::time::sleep(Duration::from_millis(5)).await;
    let old = f.region.stale_runs(Some(Duration::ZERO)).await.unwrap();
    let runs: std::collections::BTreeSet<_> = old.into_iter().map(|stale| stale.run).collect();
    assert_eq!(runs, [killed.clone(), other, nobody].into(), "{alive} is alive");

    assert_eq!(f.region.kept(&killed).await.unwrap(), None);
    assert_eq!(f.region.keep(&killed).await.unwrap(), std::slice::from_ref(&volume));
    assert_eq!(f.region.kept(&killed).await.unwrap(), Some(volume));
    assert!(f.region.stale_runs(None).await.unwrap()[0].kept);
    f.region.ensure_no_volumes(&killed).await.unwrap();
    f.region.ensure_no_snapshots(&killed).await.unwrap();
    assert!(f.region.stale_runs(None).await.unwrap().is_empty());
}

#[tokio::test]
async fn sweeping_removes_files_without_a_record() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let volume = f.volume(&base, &run).await;
    let dir = f.region.dir();
    let orphans = [
        format!("snapshots/{}.img", new_id("snap")),
        format!("volumes/{}.img", new_id("vol")),
        "volumes/.copy-0".to_owned(),
        "images/.copy-ami.json".to_owned(),
        format!("documents/{}.json", new_id("ami")),
    ];
    for orphan in &orphans {
        std::fs::write(dir.join(orphan), "x").unwrap();
    }
    let busy = dir.join("volumes/.copy-1");
    let writer = File::create(&busy).unwrap();
    assert!(try_lock_until_closed(&writer).unwrap());
    f.region.stale_runs(None).await.unwrap();
    assert!(orphans.iter().all(|orphan| dir.join(orphan).exists()), "that is only a look");
    f.region.tidy().await.unwrap();
    assert!(orphans.iter().all(|orphan| !dir.join(orphan).exists()));
    assert!(busy.exists());
    f.region.store().get::<VolumeRecord>(&volume.0).unwrap();
    assert_eq!((f.files("images"), f.files("snapshots"), f.files("volumes")), (1, 2, 3));
    // A volume lacks its data if a process was killed while it deleted the volume. Such a volume can still be deleted.
    std::fs::remove_file(dir.join(format!("volumes/{volume}.img"))).unwrap();
    f.region.ensure_no_volumes(&run).await.unwrap();
    assert_eq!(f.files("volumes"), 1);
}

#[test]
fn of_concurrent_registrations_one_wins_and_all_adopt_it() {
    let f = Fixture::new();
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let base = runtime().block_on(f.import("base-1"));
    let dir = f.region.dir().to_owned();
    let bake = || {
        runtime().block_on(async {
            // This region shares no state with the others, as in another process.
            let region = Region::open(&dir).unwrap().with_delays(Duration::from_millis(50));
            let (run, undo) = (RunId::new(), Undo::default());
            let volume = region.create(&volume_of(&base, &run)).await.unwrap();
            let snapshot = region.snapshot(&volume, &run, &Tags::new()).await.unwrap();
            let image = region.register(&snapshot, &spec("web-f", "f"), &undo).await.unwrap();
            region.ensure_no_volumes(&run).await.unwrap();
            region.ensure_no_snapshots(&run).await.unwrap();
            (image, snapshot)
        })
    };
    let all: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(bake)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(all.iter().all(|(image, _)| image == &all[0].0 && image.state == ImageState::Available));
    assert_eq!(all.iter().filter(|(image, snapshot)| image.snapshot == *snapshot).count(), 1);
    assert_eq!((f.files("images"), f.files("snapshots"), f.files("volumes")), (2, 4, 0));
}

#[tokio::test]
async fn a_dropped_call_leaves_nothing() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    for micros in (0..4000).step_by(250) {
        let spec = volume_of(&base, &run);
        let create = f.region.create(&spec);
        _ = tokio::time::timeout(Duration::from_micros(micros), create).await;
        // However far the dropped call got, the volume does not exist after the clean-up and does not appear later.
        f.region.ensure_no_volumes(&run).await.unwrap();
        assert_eq!(f.files("volumes"), 0, "after {micros} µs");
    }
}

#[tokio::test]
async fn a_region_of_a_newer_oven_is_rejected() {
    let f = Fixture::new();
    std::fs::write(f.region.dir().join("region.json"), r#"{"format": 99}"#).unwrap();
    refuses(Region::open(f.region.dir()), Kind::Machine, "format 99");
    assert_eq!(f.region.dir().metadata().unwrap().mode() & 0o777, 0o700);
}
