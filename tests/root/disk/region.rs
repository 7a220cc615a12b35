//! Volumes of a local region as real loop devices: attached, written to, killed.

use oven::cloud::local::Region;
use oven::cloud::{BaseRef, Cloud, Image, ImageSpec, Tags, VolumeSpec, Volumes, tag};
use oven::device::Device;
use oven::disk::attached_disk::AttachedDisks;
use oven::disk::{DiskSpec, DiskStrategy};
use oven::error::Kind;
use oven::ids::{Architecture, RunId, VolumeId};
use oven::report::Report;
use oven::sys::loop_device;
use oven::sys::namespaces::private_mounts;
use oven::undo::Undo;
use oven_testing::programs::own_test;
use oven_testing::{pause, ring};
use std::fs::{self, File};
use std::io::BufRead;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};
use sys_mount::Mount;
use tempfile::TempDir;

struct RegionFixture {
    region: Region,
    base: Image,
    dir: TempDir,
    _ring: ring::Shared,
}

fn tempdir() -> TempDir {
    assert!(rustix::process::geteuid().is_root(), "the root ring needs root: scripts/test says how");
    tempfile::Builder::new().prefix("oven-test.").tempdir().unwrap()
}

async fn import(region: &Region, dir: &Path) -> anyhow::Result<Image> {
    let raw = dir.join("base.raw");
    let file = File::create(&raw).unwrap();
    file.set_len(64 << 20).unwrap();
    file.write_all_at(&vec![7; 6 << 20], 4 << 20).unwrap();
    region.import(&raw, "base-1", Architecture::X86_64, &Tags::new(), &Report::silent()).await
}

async fn world() -> RegionFixture {
    let ring = ring::shared();
    let dir = tempdir();
    let region = Region::open(&dir.path().join("region")).unwrap();
    let base = import(&region, dir.path()).await.unwrap();
    RegionFixture { region, base, dir, _ring: ring }
}

impl RegionFixture {
    fn volume_of(&self, run: &RunId) -> VolumeSpec {
        VolumeSpec {
            snapshot: self.base.snapshot.clone(),
            size_gib: 1,
            kind: Default::default(),
            run: run.clone(),
            tags: Tags::new(),
        }
    }

    async fn volume(&self, run: &RunId) -> VolumeId {
        self.region.create(&self.volume_of(run)).await.unwrap()
    }

    fn files(&self, kind: &str) -> usize {
        self.region.dir().join(kind).read_dir().unwrap().count()
    }
}

/// Loop devices on files below this directory.
fn loops(dir: &Path) -> Vec<String> {
    let below = |name: &String| {
        let file = fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).unwrap_or_default();
        file.contains(dir.to_str().unwrap())
    };
    let devices = fs::read_dir("/sys/block").unwrap().flatten();
    devices.map(|entry| entry.file_name().to_string_lossy().into_owned()).filter(below).collect()
}

/// The kernel lets go of what died, soon.
fn assert_no_loops(dir: &Path) {
    let start = Instant::now();
    while !loops(dir).is_empty() {
        assert!(start.elapsed() < Duration::from_secs(20), "left: {:?}", loops(dir));
        pause(Duration::from_millis(5));
    }
}

fn node(device: &Device) -> File {
    File::from(device.node.try_clone().unwrap())
}

fn byte(device: &Device, at: u64) -> u8 {
    let mut byte = [0];
    node(device).read_exact_at(&mut byte, at).unwrap();
    byte[0]
}

fn refuses<T>(result: anyhow::Result<T>, kind: Kind, part: &str) {
    let Err(error) = result else { panic!("not refused: {part}") };
    let text = format!("{error:#}");
    assert!(text.contains(part), "{text:?} has no {part:?}");
    assert_eq!(Kind::of(&error), kind, "{text}");
}

#[tokio::test]
async fn attached_is_what_the_kernel_says() {
    let w = world().await;
    let run = RunId::new();
    let volume = w.volume(&run).await;
    let device = w.region.attach(&volume).await.unwrap();
    assert_eq!(device.serial, volume.0);
    let metadata = node(&device).metadata().unwrap();
    assert!(metadata.file_type().is_block_device());
    assert_eq!(metadata.rdev(), device.rdev);
    assert_eq!((byte(&device, 4 << 20), byte(&device, 0), byte(&device, (1 << 30) - 1)), (7, 0, 0));
    let sys = format!("/sys/dev/block/{}:{}", device.rdev >> 8, device.rdev & 0xff);
    let attribute = |name: &str| fs::read_to_string(format!("{sys}/{name}")).unwrap().trim().to_owned();
    assert_eq!((attribute("loop/autoclear"), attribute("loop/partscan")), ("1".into(), "1".into()));
    assert_eq!((attribute("loop/dio"), attribute("queue/logical_block_size")), ("1".into(), "512".into()));

    let name = device.path.display().to_string();
    refuses(w.region.attach(&volume).await, Kind::Cloud, &name);
    refuses(w.region.delete_volume(&volume).await, Kind::Cloud, "VolumeInUse");
    // Another handle, as another process has.
    let other = Region::open(w.region.dir()).unwrap();
    refuses(other.attach(&volume).await, Kind::Cloud, "VolumeInUse");
    w.region.tidy().await.unwrap();
    assert_eq!(w.files("volumes"), 2);

    loop_device::release(device).await.unwrap();
    assert!(loops(w.dir.path()).is_empty());
    let device = w.region.attach(&volume).await.unwrap();
    let held = node(&device);
    let started = Instant::now();
    // Somebody else's descriptor keeps it bound, and releasing says so.
    refuses(loop_device::release(device).await, Kind::Machine, "release of /dev/loop");
    // The product gives up after five seconds.
    assert!(started.elapsed() < Duration::from_secs(20));
    drop(held);
    w.region.delete_volume(&volume).await.unwrap();
    assert_eq!(w.files("volumes"), 0);
    assert_no_loops(w.dir.path());
}

#[tokio::test]
async fn a_disk_becomes_a_snapshot_and_an_image() {
    let w = world().await;
    let (run, undo) = (RunId::new(), Undo::default());
    let disks = AttachedDisks::new(Rc::new(w.region.clone()));
    let base = w.region.base(&BaseRef::Id(w.base.id.clone())).await.unwrap();
    let small = DiskSpec { size_gib: Some(0), ..DiskSpec::default() };
    refuses(disks.checkout(&base, &small, &run, &undo).await, Kind::Definition, "size_gib = 0");
    let larger = DiskSpec {
        size_gib: Some(2),
        kind: Default::default(),
        tags: [("role".to_owned(), "web".to_owned())].into(),
        verify: false,
        will_commit: true,
    };
    let disk = disks.checkout(&base, &larger, &run, &undo).await.unwrap();
    assert_eq!(byte(disk.device(), (2 << 30) - 1), 0);
    node(disk.device()).write_all_at(&[9; 4096], 40 << 20).unwrap();
    let snapshot = disk.commit(&undo, &|_, _| ()).await.unwrap();
    assert!(loops(w.dir.path()).is_empty(), "committed is released");
    let volumes = w.region.dir().join("volumes").read_dir().unwrap().flatten();
    let data = volumes.map(|e| e.path()).find(|path| path.extension().is_some_and(|e| e == "img")).unwrap();
    let shared = w.region.dir().join(format!("snapshots/{snapshot}.img"));
    assert_eq!(data.metadata().unwrap().ino(), shared.metadata().unwrap().ino(), "no copy was made");

    // The volume again: what is written to it now is not in the snapshot.
    w.region.keep(&run).await.unwrap();
    let again = disks.reopen(&run).await.unwrap();
    assert_eq!((byte(again.device(), 40 << 20), byte(again.device(), 4 << 20)), (9, 7));
    node(again.device()).write_all_at(&[1; 4096], 40 << 20).unwrap();
    node(again.device()).sync_all().unwrap();
    // Written before the call, and in the snapshot; attached all the while.
    let volume = VolumeId(again.device().serial.clone());
    let while_attached = w.region.snapshot(&volume, &run, &Tags::new()).await.unwrap();
    drop(again);
    for (id, expected) in [(&snapshot, 9), (&while_attached, 1)] {
        let file = File::open(w.region.dir().join(format!("snapshots/{id}.img"))).unwrap();
        let mut found = [0];
        file.read_exact_at(&mut found, 40 << 20).unwrap();
        assert_eq!(found, [expected], "{id}");
    }

    let spec = ImageSpec {
        name: "web-1".into(),
        description: String::new(),
        architecture: base.architecture,
        root_device: base.root_device,
        size_gib: 2,
        attributes: Default::default(),
        tags: Tags::from([(tag::FINGERPRINT.to_owned(), "f".to_owned())]),
        run: run.clone(),
        documents: Default::default(),
    };
    let image = w.region.register(&snapshot, &spec, &undo).await.unwrap();
    disks.forget(&run).await.unwrap();
    assert_eq!((w.files("volumes"), w.files("snapshots")), (0, 4), "the base's, and the image's");
    assert_eq!(image.snapshot, snapshot);
    refuses(disks.reopen(&run).await, Kind::NotFound, "has no preserved volume");
    assert_no_loops(w.dir.path());
}

#[tokio::test]
async fn more_than_eight_and_all_at_once() {
    let _ring = ring::shared();
    let dir = tempdir();
    let attach = |name: String| {
        let path = dir.path().join(name);
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        loop_device::attach(&file, "x").unwrap()
    };
    // Every one is verified to be bound to its own file.
    let devices: Vec<Device> = std::thread::scope(|scope| {
        let attach = &attach;
        let threads: Vec<_> = (0..4)
            .map(|t| scope.spawn(move || (0..4).map(|n| attach(format!("{t}-{n}"))).collect::<Vec<_>>()))
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let mut numbers: Vec<u64> = devices.iter().map(|device| device.rdev).collect();
    numbers.sort_unstable();
    numbers.dedup();
    assert_eq!((numbers.len(), loops(dir.path()).len()), (16, 16));
    drop(devices);
    assert_no_loops(dir.path());
}

/// What a container often is: a `/dev` without loop devices.
#[test]
fn without_nodes_in_dev() {
    // It looks for nodes that anybody made in /tmp.
    let _ring = ring::exclusive();
    let dir = tempdir();
    let file = File::options().read(true).write(true).create_new(true).open(dir.path().join("f")).unwrap();
    file.set_len(1 << 20).unwrap();
    let before = fs::read_dir(std::env::temp_dir()).unwrap().flatten().filter(is_oven_node).count();
    let inside = std::thread::spawn(move || {
        private_mounts().unwrap();
        mount_tmpfs(Path::new("/dev"), "1m");
        assert!(!Path::new("/dev/loop-control").exists());
        loop_device::attach(&file, "x").unwrap()
    });
    let device = inside.join().unwrap();
    node(&device).write_all_at(&[3; 512], 0).unwrap();
    node(&device).sync_all().unwrap();
    assert_eq!(fs::read(dir.path().join("f")).unwrap()[0], 3);
    assert_eq!(fs::read_dir(std::env::temp_dir()).unwrap().flatten().filter(is_oven_node).count(), before);
    drop(device);
    assert_no_loops(dir.path());
}

fn is_oven_node(entry: &fs::DirEntry) -> bool {
    let kind = entry.file_type().unwrap();
    entry.file_name().to_string_lossy().starts_with(".oven-")
        && (kind.is_block_device() || kind.is_char_device())
}

fn mount_tmpfs(path: &Path, size: &str) {
    Mount::builder().fstype("tmpfs").data(&format!("size={size}")).mount("tmpfs", path).unwrap();
}

#[test]
fn a_full_disk_is_named_and_nothing_is_left_on_it() {
    let _ring = ring::shared();
    let dir = tempdir();
    let path = dir.path().to_owned();
    let inside = std::thread::spawn(move || {
        private_mounts().unwrap();
        fs::create_dir(path.join("small")).unwrap();
        mount_tmpfs(&path.join("small"), "2m");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let region = Region::open(&path.join("small/region")).unwrap();
            let error = import(&region, &path).await.unwrap_err();
            let text = format!("{error:#}");
            assert!(text.contains("/small/region/snapshots: 6 MiB are needed, and 1 MiB is free"), "{text}");
            assert_eq!(Kind::of(&error), Kind::Machine);
            for kind in ["images", "snapshots"] {
                assert_eq!(region.dir().join(kind).read_dir().unwrap().count(), 0);
            }
        });
    });
    inside.join().unwrap();
}

/// In the child: a region's directory.
const CHILD: &str = "OVEN_TEST_CHILD";

#[tokio::test]
async fn killed_with_a_volume_attached() {
    if let Some(dir) = std::env::var_os(CHILD) {
        // The child: a bake that gets as far as a second disk, and hangs.
        let region = Region::open(Path::new(&dir)).unwrap();
        let base = region.base(&BaseRef::Name { name: "base-*".into(), owner: None }).await.unwrap();
        let (disks, run, undo) = (AttachedDisks::new(Rc::new(region)), RunId::new(), Undo::default());
        let first = disks.checkout(&base, &DiskSpec::default(), &run, &undo).await.unwrap();
        first.commit(&undo, &|_, _| ()).await.unwrap();
        let second = disks.checkout(&base, &DiskSpec::default(), &run, &undo).await.unwrap();
        println!("\nready {run} {}", second.device().path.display());
        std::future::pending::<()>().await;
    }
    let w = world().await;
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(own_test(module_path!(), "killed_with_a_volume_attached"))
        .env(CHILD, w.region.dir())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = std::io::BufReader::new(child.stdout.take().unwrap()).lines();
    let ready = lines.map_while(Result::ok).find_map(|line| line.strip_prefix("ready ").map(str::to_owned));
    let ready = ready.expect("the child is ready");
    let run = RunId(ready.split(' ').next().unwrap().to_owned());
    assert_eq!(loops(w.dir.path()).len(), 1);
    assert!(w.region.stale_runs(None).await.unwrap().is_empty(), "it is alive");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_no_loops(w.dir.path());

    let stale = w.region.stale_runs(None).await.unwrap();
    assert_eq!((stale.len(), &stale[0].run, stale[0].kept), (1, &run, false));
    assert_eq!(stale[0].resources.len(), 3, "two volumes and a snapshot: {stale:?}");
    let disks = AttachedDisks::new(Rc::new(w.region.clone()));
    disks.forget(&run).await.unwrap();
    assert!(w.region.stale_runs(None).await.unwrap().is_empty());
    assert_eq!((w.files("volumes"), w.files("snapshots"), w.files("images")), (0, 2, 1));
}
