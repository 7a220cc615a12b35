//! A local region that several processes use, and in which they are killed.

use oven::cloud::block_api::{BlockApi, NewSnapshot, ParentUse};
use oven::cloud::local::Region;
use oven::cloud::{Cloud, ImageSpec, Tags, VolumeSpec, Volumes, tag};
use oven::ids::digest_of;
use oven::ids::{Architecture, RunId, SnapshotId};
use oven::ids::{BLOCK, Digest};
use oven::owner::Owner;
use oven::report::Report;
use oven::undo::Undo;
use oven_testing::programs::own_test;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// In a child: the region's directory.
const CHILD: &str = "OVEN_TEST_CHILD";

fn count(region: &Region, kind: &str) -> usize {
    region.dir().join(kind).read_dir().unwrap().count()
}

async fn region(dir: &Path) -> Region {
    let raw = dir.join("base.raw");
    let file = File::create(&raw).unwrap();
    file.set_len(64 << 20).unwrap();
    // Some work for a copy: blocks 8 to 55.
    file.write_all_at(&vec![7; 24 << 20], 4 << 20).unwrap();
    let region = Region::open(&dir.join("region")).unwrap();
    region.import(&raw, "base-1", Architecture::X86_64, &Tags::new(), &Report::silent()).await.unwrap();
    region
}

fn child(test: &str, region: &Region) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(own_test(module_path!(), test)).env(CHILD, region.dir());
    command.stdout(Stdio::piped()).spawn().unwrap()
}

/// All that a bake asks of a region, but for attaching: prints the image that it got.
async fn bake(dir: &Path, name: &str) {
    let region = Region::open(dir).unwrap().with_delays(Duration::from_millis(20));
    let base = region.images(None).await.unwrap().remove(0).snapshot;
    let (run, tags) = (RunId::new(), owned());
    let volume = VolumeSpec {
        snapshot: base,
        size_gib: 1,
        kind: Default::default(),
        run: run.clone(),
        tags: tags.clone(),
    };
    let volume = region.create(&volume).await.unwrap();
    let snapshot: SnapshotId = region.snapshot(&volume, &run, &tags).await.unwrap();
    register(&region, snapshot, name, &run).await;
}

/// The same by blocks: every other one of the base's, and one of zeros.
async fn bake_blocks(dir: &Path) {
    let region = Region::open(dir).unwrap();
    let base = region.images(None).await.unwrap().remove(0).snapshot;
    assert_eq!(region.parent(&base, &Default::default()).await.unwrap(), ParentUse::UseAsParent);
    let run = RunId::new();
    let spec = NewSnapshot {
        parent: Some(base),
        size_gib: 1,
        description: String::new(),
        run,
        tags: owned(),
        encrypted: false,
        kms_key: None,
    };
    let snapshot = region.start(&spec).await.unwrap();
    let mut digests: Vec<Digest> = Vec::new();
    for index in (8..56).step_by(2) {
        let data = vec![if index == ZEROED { 0 } else { 9 }; BLOCK];
        digests.push(digest_of(&data));
        region.put(&snapshot, index, data.into(), digests[digests.len() - 1]).await.unwrap();
    }
    let checksum = digest_of(&digests.concat());
    region.complete(&snapshot, digests.len() as u32, checksum).await.unwrap();
    register(&region, snapshot, "web-1", &spec.run).await;
}

const ZEROED: u32 = 20;

fn owned() -> Tags {
    Tags::from([(tag::OWNER.to_owned(), Owner::this().to_string())])
}

async fn register(region: &Region, snapshot: SnapshotId, name: &str, run: &RunId) {
    let marks = [(tag::CHECKSUM, "c"), (tag::FINGERPRINT, "f")].map(|(k, v)| (k.to_owned(), v.to_owned()));
    let spec = ImageSpec {
        name: name.to_owned(),
        description: String::new(),
        architecture: Architecture::X86_64,
        root_device: "/dev/xvda".into(),
        size_gib: 1,
        attributes: Default::default(),
        tags: owned().into_iter().chain(marks).collect(),
        run: run.clone(),
        documents: [("packages".to_owned(), "a".repeat(10_000))].into(),
    };
    let image = region.register(&snapshot, &spec, &Undo::default()).await.unwrap();
    region.ensure_no_volumes(run).await.unwrap();
    region.ensure_no_snapshots(run).await.unwrap();
    println!("\nimage {}", image.id);
}

#[tokio::test]
async fn of_eight_processes_one_wins() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return bake(Path::new(&dir), "web-1").await;
    }
    let dir = tempfile::tempdir().unwrap();
    let region = region(dir.path()).await;
    let children: Vec<Child> = (0..8).map(|_| child("of_eight_processes_one_wins", &region)).collect();
    let ids: Vec<String> = children
        .into_iter()
        .map(|child| {
            let output = child.wait_with_output().unwrap();
            assert!(output.status.success());
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().find_map(|line| line.strip_prefix("image ")).unwrap().to_owned()
        })
        .collect();
    assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
    assert_eq!((count(&region, "images"), count(&region, "documents")), (2, 1));
    assert_eq!((count(&region, "snapshots"), count(&region, "volumes")), (4, 0));
}

#[tokio::test]
async fn killed_at_any_time_nothing_is_left_that_is_not_swept() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return bake(Path::new(&dir), "web-1").await;
    }
    let name = "killed_at_any_time_nothing_is_left_that_is_not_swept";
    let dir = tempfile::tempdir().unwrap();
    let region = region(dir.path()).await;
    let mut whole = Duration::ZERO;
    let (mut swept, mut baked) = (0, 0);
    for round in 0..=40 {
        let (mut child, started) = (child(name, &region), Instant::now());
        if round == 0 {
            // How long it takes when nobody kills it, so that the times fit every machine.
            assert!(child.wait().unwrap().success());
            whole = started.elapsed();
        } else {
            tokio::time::sleep(whole * round / 36).await;
            child.kill().unwrap();
            child.wait().unwrap();
        }
        region.tidy().await.unwrap();
        for stale in region.stale_runs(None).await.unwrap() {
            swept += stale.resources.len();
            region.ensure_no_volumes(&stale.run).await.unwrap();
            region.ensure_no_snapshots(&stale.run).await.unwrap();
        }
        // The image is there as a whole, or not at all.
        let images = region.images(None).await.unwrap();
        for image in &images[1..] {
            let (_, documents) = region.image(&image.id).await.unwrap();
            assert_eq!(documents["packages"].len(), 10_000);
            region.deregister(&image.id).await.unwrap();
            region.delete_snapshot(&image.snapshot).await.unwrap();
            baked += 1;
        }
        assert_eq!((count(&region, "images"), count(&region, "documents")), (1, 0), "round {round}");
        assert_eq!((count(&region, "snapshots"), count(&region, "volumes")), (2, 0), "round {round}");
    }
    assert!(swept > 0 && baked > 0, "{swept} swept, {baked} baked");
}

#[tokio::test]
async fn killed_while_it_writes_blocks_nothing_is_left_and_an_image_is_whole() {
    if let Some(dir) = std::env::var_os(CHILD) {
        return bake_blocks(Path::new(&dir)).await;
    }
    let name = "killed_while_it_writes_blocks_nothing_is_left_and_an_image_is_whole";
    let dir = tempfile::tempdir().unwrap();
    let region = region(dir.path()).await;
    // How long it takes when nobody kills it, so that the times fit every machine; and it is whole.
    let started = Instant::now();
    assert!(child(name, &region).wait_with_output().unwrap().status.success());
    let whole = started.elapsed();
    let (mut swept, mut baked) = (0, 0);
    for round in 0..=25 {
        if round > 0 {
            let mut child = child(name, &region);
            tokio::time::sleep(whole * round / 24).await;
            child.kill().unwrap();
            child.wait().unwrap();
        }
        region.tidy().await.unwrap();
        for stale in region.stale_runs(None).await.unwrap() {
            swept += stale.resources.len();
            region.ensure_no_snapshots(&stale.run).await.unwrap();
        }
        let images = region.images(None).await.unwrap();
        for image in &images[1..] {
            let data = region.dir().join(format!("snapshots/{}.img", image.snapshot));
            let mut found = vec![0; 64 * BLOCK];
            File::open(data).unwrap().read_exact_at(&mut found, 0).unwrap();
            for (index, block) in (0u32..).zip(found.chunks(BLOCK)) {
                let expected = match index {
                    ZEROED => 0,
                    8..56 if index % 2 == 0 => 9,
                    8..56 => 7,
                    _ => 0,
                };
                assert!(block.iter().all(|byte| *byte == expected), "block {index}, round {round}");
            }
            region.deregister(&image.id).await.unwrap();
            region.delete_snapshot(&image.snapshot).await.unwrap();
            baked += 1;
        }
        assert_eq!((count(&region, "images"), count(&region, "documents")), (1, 0), "round {round}");
        assert_eq!((count(&region, "snapshots"), count(&region, "volumes")), (2, 0), "round {round}");
    }
    assert!(swept > 0 && baked > 0, "{swept} swept, {baked} baked");
}
