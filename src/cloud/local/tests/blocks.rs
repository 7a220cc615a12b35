//! Tests snapshots that are written block by block.

use super::*;
use crate::cloud::block_api::{BlockApi, NewSnapshot, ParentUse, SnapshotExpired};
use crate::cloud::local::pending_snapshot::{PutBlocks, SnapshotState};
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::sys::temp_file;
use std::sync::Arc;
use std::time::SystemTime;

pub fn new(parent: Option<&SnapshotId>, run: &RunId) -> NewSnapshot {
    NewSnapshot {
        parent: parent.cloned(),
        size_gib: 1,
        description: "by its blocks".into(),
        run: run.clone(),
        tags: Tags::new(),
        encrypted: false,
        kms_key: None,
    }
}

pub fn block(byte: u8) -> (Arc<[u8]>, Digest) {
    let data: Arc<[u8]> = vec![byte; BLOCK].into();
    let digest = digest_of(&data);
    (data, digest)
}

/// The checksum that a snapshot is completed with.
pub fn linear(digests: &[Digest]) -> Digest {
    digest_of(&digests.concat())
}

/// Sets the time of the last put to `ago` before the current time.
pub fn age(region: &Region, id: &SnapshotId, ago: Duration) {
    let put = region.store().part::<SnapshotRecord>(&id.0, records::PUT);
    File::options().write(true).open(put).unwrap().set_modified(SystemTime::now() - ago).unwrap();
}

impl Fixture {
    async fn put(&self, id: &SnapshotId, index: u32, byte: u8) -> Digest {
        let (data, digest) = block(byte);
        self.region.put(id, index, data, digest).await.unwrap();
        digest
    }

    fn names(&self, id: &SnapshotId) -> Vec<String> {
        let all = self.region.dir().join("snapshots").read_dir().unwrap();
        let all = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut endings: Vec<_> =
            all.filter_map(|name| Some(name.strip_prefix(&format!("{id}."))?.to_owned())).collect();
        endings.sort();
        endings
    }
}

/// The index of the block at the start of the second MiB, where the fixture's raw disk has data.
const BASE_BLOCK: u32 = 2;

#[tokio::test]
async fn a_child_has_its_parents_data_and_what_was_put() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let of_base = f.region.contents(&base.snapshot).await.unwrap();
    assert_eq!((of_base.size_gib, of_base.blocks), (1, [BASE_BLOCK].into()));
    assert_eq!(f.region.parent(&base.snapshot, &Default::default()).await.unwrap(), ParentUse::UseAsParent);

    let id = f.region.start(&NewSnapshot { size_gib: 2, ..new(Some(&base.snapshot), &run) }).await.unwrap();
    assert_eq!(f.region.snapshot_state(&id).unwrap(), SnapshotState::Pending);
    // Puts the last block of the disk, zeros to a block without data, and one block twice.
    let last = (2 << 30) / BLOCK as u32 - 1;
    f.put(&id, last, 9).await;
    f.put(&id, 7, 1).await;
    let (seven, zeros, end) = (f.put(&id, 7, 8).await, f.put(&id, 5, 0).await, block(9).1);
    assert_eq!(f.region.put_blocks(&id).unwrap(), [(5, zeros), (7, seven), (last, end)].into());
    let checksum = linear(&[zeros, seven, end]);
    f.region.complete(&id, 3, checksum).await.unwrap();
    assert_eq!(f.region.snapshot_state(&id).unwrap(), SnapshotState::Completed);
    assert_eq!(f.names(&id), ["img", "json", "put"]);
    // The snapshot is completed a second time, as by a caller that did not receive the first answer.
    f.region.complete(&id, 3, checksum).await.unwrap();
    refuses(
        f.region.complete(&id, 2, checksum).await,
        Kind::Cloud,
        "ValidationException: INVALID_SNAPSHOT_ID",
    );

    let contents = f.region.contents(&id).await.unwrap();
    assert_eq!((contents.size_gib, contents.blocks), (2, [BASE_BLOCK, 5, 7, last].into()));
    let (reader, of_base) =
        (f.region.reader(&id).await.unwrap(), f.region.reader(&base.snapshot).await.unwrap());
    assert_eq!(reader.read(BASE_BLOCK).unwrap(), of_base.read(BASE_BLOCK).unwrap());
    for (index, byte) in [(5, 0), (7, 8), (last, 9)] {
        assert_eq!(reader.read(index).unwrap(), (vec![byte; BLOCK], block(byte).1), "block {index}");
    }
    refuses(reader.read(6), Kind::Cloud, "ValidationException: INVALID_BLOCK");
    refuses(reader.read(last + 1), Kind::Cloud, "ValidationException: INVALID_BLOCK");

    // A block of the parent is overwritten with zeros. Then the parent and the grandparent are deleted before the
    // snapshot is complete.
    let zeroed = f.region.start(&NewSnapshot { size_gib: 2, ..new(Some(&id), &run) }).await.unwrap();
    f.put(&zeroed, BASE_BLOCK, 0).await;
    f.region.deregister(&base.id).await.unwrap();
    f.region.delete_snapshot(&base.snapshot).await.unwrap();
    f.region.delete_snapshot(&id).await.unwrap();
    refuses(reader.read(7), Kind::NotFound, "ResourceNotFoundException");
    f.region.complete(&zeroed, 1, linear(&[zeros])).await.unwrap();
    let data = f.data(&zeroed.0);
    assert_eq!(data.metadata().unwrap().len(), 2 << 30);
    let at = |index: u32| byte(&data, u64::from(index) * BLOCK as u64);
    assert_eq!([at(BASE_BLOCK), at(5), at(6), at(7), at(last)], [0, 0, 0, 8, 9]);
    assert_eq!(f.region.contents(&zeroed).await.unwrap().blocks, [BASE_BLOCK, 7, last].into());
    // The snapshot can be used like any other: an image is registered, and a volume is created.
    let two = ImageSpec { size_gib: 2, ..spec("web-f", "f") };
    f.region.register(&zeroed, &two, &Undo::default()).await.unwrap();
    let of_it = VolumeSpec {
        snapshot: zeroed.clone(),
        size_gib: 2,
        kind: Default::default(),
        run: run.clone(),
        tags: Tags::new(),
    };
    let volume = f.region.create(&of_it).await.unwrap();
    assert_eq!(byte(&f.data(&volume.0), 7 * BLOCK as u64), 8);
    f.region.ensure_no_snapshots(&run).await.unwrap();
    assert_eq!(f.names(&zeroed), ["img", "json", "put"], "an image's");
}

#[tokio::test]
async fn violations_of_ebs_rules_are_rejected() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let refuse = async |spec: NewSnapshot, text: &str| {
        let kind = if text.starts_with("Resource") { Kind::NotFound } else { Kind::Cloud };
        refuses(f.region.start(&spec).await, kind, text);
    };
    let child = new(Some(&base.snapshot), &run);
    refuse(NewSnapshot { encrypted: true, ..child.clone() }, "ValidationException: INVALID_PARAMETER").await;
    refuse(NewSnapshot { kms_key: Some("k".into()), ..new(None, &run) }, "INVALID_PARAMETER_VALUE").await;
    for size_gib in [0, 16385] {
        refuse(NewSnapshot { size_gib, ..new(None, &run) }, "ValidationException: INVALID_VOLUME_SIZE").await;
    }
    refuse(NewSnapshot { description: "d".repeat(256), ..new(None, &run) }, "InvalidParameterValue").await;
    let many = (0..50).map(|n| (n.to_string(), String::new())).collect();
    refuse(NewSnapshot { tags: many, ..new(None, &run) }, "TagLimitExceeded").await;
    let none = SnapshotId(new_id("snap"));
    refuse(new(Some(&none), &run), "ResourceNotFoundException: DEPENDENCY_RESOURCE_NOT_FOUND").await;
    let large = f.region.start(&NewSnapshot { size_gib: 2, ..new(None, &run) }).await.unwrap();
    refuse(new(Some(&large), &run), "ValidationException: INVALID_DEPENDENCY_REQUEST").await;
    f.region.complete(&large, 0, linear(&[])).await.unwrap();
    refuse(new(Some(&large), &run), "ValidationException: INVALID_VOLUME_SIZE").await;

    let id = f.region.start(&child).await.unwrap();
    let (data, digest) = block(3);
    let invalid = "ValidationException: INVALID_BLOCK";
    let put = async |index, data: &[u8], digest| f.region.put(&id, index, data.into(), digest).await;
    refuses(put(0, &data[1..], digest_of(&data[1..])).await, Kind::Cloud, invalid);
    refuses(put(0, &data, block(4).1).await, Kind::Cloud, invalid);
    refuses(put(2048, &data, digest).await, Kind::Cloud, invalid);
    refuses(put(u32::MAX, &data, digest).await, Kind::Cloud, invalid);
    assert!(f.region.put_blocks(&id).unwrap().is_empty());
    assert_eq!(f.data(&id.0).metadata().unwrap().len(), 1 << 30);
    let unknown = f.region.put(&none, 0, data.clone(), digest).await;
    refuses(unknown, Kind::NotFound, "ResourceNotFoundException");
    let foreign = f.region.put(&base.snapshot, 0, data.clone(), digest).await;
    refuses(foreign, Kind::Cloud, "ValidationException: INVALID_SNAPSHOT_ID");
    refuses(f.region.complete(&base.snapshot, 0, linear(&[])).await, Kind::Cloud, "INVALID_SNAPSHOT_ID");

    put(2047, &data, digest).await.unwrap();
    put(1, &data, digest).await.unwrap();
    let complete = async |count, checksum| f.region.complete(&id, count, checksum).await;
    let right = linear(&[digest, digest]);
    refuses(complete(1, right).await, Kind::Cloud, "ValidationException: INVALID_PARAMETER_VALUE");
    refuses(
        complete(2, linear(&[digest])).await,
        Kind::Cloud,
        "ValidationException: INVALID_PARAMETER_VALUE",
    );
    assert_eq!(f.region.snapshot_state(&id).unwrap(), SnapshotState::Pending);
    complete(2, right).await.unwrap();
    refuses(put(1, &data, digest).await, Kind::Cloud, "ValidationException: INVALID_SNAPSHOT_ID");
    assert_eq!(
        byte(&f.data(&id.0), u64::from(BASE_BLOCK) * BLOCK as u64),
        7,
        "filled in after refusals, too"
    );
    // Data that were changed without a put are not returned.
    f.data(&id.0).write_all_at(&[4], BLOCK as u64 + 100).unwrap();
    refuses(f.region.reader(&id).await.unwrap().read(1), Kind::Cloud, "differs from the block that was put");
}

/// Asserts that a snapshot in this state cannot be used.
async fn is_of_no_use(f: &Fixture, base: &Image, id: &SnapshotId, state: &str) {
    let of_state = format!("IncorrectState: {id} is in invalid state - {state}");
    let registered = f.region.register(id, &spec("web-f", "f"), &Undo::default()).await;
    refuses(registered, Kind::Cloud, &of_state);
    let of_it = VolumeSpec { snapshot: id.clone(), ..volume_of(base, &RunId::new()) };
    refuses(f.region.create(&of_it).await, Kind::Cloud, &of_state);
    refuses(f.region.contents(id).await, Kind::Cloud, &of_state);
    refuses(f.region.reader(id).await.map(drop), Kind::Cloud, &of_state);
    refuses(f.region.parent(id, &Default::default()).await, Kind::Cloud, &of_state);
    refuses(f.region.copied(id, &Default::default(), &|| ()).await, Kind::Cloud, &of_state);
    refuses(f.region.start(&new(Some(id), &RunId::new())).await, Kind::Cloud, &of_state);
    assert_eq!((f.files("images"), f.files("volumes")), (1, 0));
}

#[tokio::test]
async fn incomplete_snapshots_cannot_be_used_and_are_swept() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let mut owner = Owner::this();
    owner.started += 1;
    let tags = Tags::from([(tag::OWNER.to_owned(), owner.to_string())]);
    let spec = NewSnapshot { tags, ..new(Some(&base.snapshot), &run) };
    let (pending, expired) = (f.region.start(&spec).await.unwrap(), f.region.start(&spec).await.unwrap());
    let digest = f.put(&expired, 0, 1).await;
    is_of_no_use(&f, &base, &pending, "pending").await;
    age(&f.region, &expired, WRITE_TIMEOUT - Duration::from_secs(60));
    is_of_no_use(&f, &base, &expired, "pending").await;
    age(&f.region, &expired, WRITE_TIMEOUT + Duration::from_secs(60));
    is_of_no_use(&f, &base, &expired, "error").await;

    // Nothing can be put any more, and the error shows that the snapshot expired.
    let late = f.region.put(&expired, 0, block(1).0, digest).await.unwrap_err();
    let completed = f.region.complete(&expired, 1, linear(&[digest])).await.unwrap_err();
    for error in [late, completed] {
        assert!(error.chain().any(|cause| cause.is::<SnapshotExpired>()), "{error:#}");
        assert_eq!(Kind::of(&error), Kind::Cloud, "{error:#}");
    }
    let state = f.region.snapshot_state(&expired).unwrap();
    assert_eq!(state, SnapshotState::Error("no block was written for 21600 seconds".into()));

    f.region.tidy().await.unwrap();
    let stale = f.region.stale_runs(None).await.unwrap();
    assert_eq!((stale.len(), &stale[0].run, stale[0].resources.len()), (1, &run, 2));
    f.region.ensure_no_snapshots(&stale[0].run).await.unwrap();
    assert_eq!(f.files("snapshots"), 2, "the base's alone");
    assert!(f.region.stale_runs(None).await.unwrap().is_empty());
}

#[tokio::test]
async fn each_block_restarts_the_timeout() {
    let f = Fixture::new();
    let minutes = |n: u64| Duration::from_secs(n * 60);
    let short = f.region.with_write_timeout(minutes(10));
    let id = short.start(&new(None, &RunId::new())).await.unwrap();
    for _ in 0..3 {
        age(&f.region, &id, minutes(9));
        assert_eq!(f.region.snapshot_state(&id).unwrap(), SnapshotState::Pending);
        f.put(&id, 1, 1).await;
        let put = f.region.store().part::<SnapshotRecord>(&id.0, records::PUT);
        assert!(put.metadata().unwrap().modified().unwrap().elapsed().unwrap_or_default() < minutes(1));
    }
    age(&f.region, &id, minutes(11));
    assert!(matches!(f.region.snapshot_state(&id).unwrap(), SnapshotState::Error(_)));
}

#[tokio::test]
async fn blocks_from_before_a_reboot_are_not_trusted() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let id = f.region.start(&new(Some(&base.snapshot), &run)).await.unwrap();
    let digest = f.put(&id, 0, 1).await;
    let record = f.region.dir().join(format!("snapshots/{id}.json"));
    let text = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, text.replace(&Owner::this().boot, "another")).unwrap();
    let error = f.region.complete(&id, 1, linear(&[digest])).await.unwrap_err();
    assert!(error.chain().any(|cause| cause.is::<SnapshotExpired>()), "{error:#}");
    is_of_no_use(&f, &base, &id, "error").await;
}

#[tokio::test]
async fn another_process_continues_and_a_torn_block_is_restored() {
    let f = Fixture::new();
    let (base, run) = (f.import("base-1").await, RunId::new());
    let id = f.region.start(&new(Some(&base.snapshot), &run)).await.unwrap();
    let digest = f.put(&id, 4, 1).await;
    // The process is killed during two puts: one to a block that the parent has, and one to a block that it lacks.
    let put = PutBlocks::open(f.region.store(), &id).unwrap().unwrap();
    for index in [BASE_BLOCK, 6] {
        put.begin(index).unwrap();
        f.data(&id.0).write_all_at(&[5; 1000], u64::from(index) * BLOCK as u64).unwrap();
    }
    // The base is deleted before another process completes the snapshot.
    f.region.deregister(&base.id).await.unwrap();
    f.region.delete_snapshot(&base.snapshot).await.unwrap();
    let other = Region::open(f.region.dir()).unwrap();
    other.complete(&id, 1, linear(&[digest])).await.unwrap();
    let data = f.data(&id.0);
    let at = |index: u32, within: u64| byte(&data, u64::from(index) * BLOCK as u64 + within);
    assert_eq!([at(BASE_BLOCK, 0), at(BASE_BLOCK, 4999), at(BASE_BLOCK, 5000)], [7, 7, 0]);
    assert_eq!([at(4, 0), at(6, 0)], [1, 0]);
    assert_eq!(f.region.contents(&id).await.unwrap().blocks, [BASE_BLOCK, 4].into());
    // If the process is killed between the last two steps, a sweep removes the link to the parent's data.
    std::fs::write(f.region.dir().join(format!("snapshots/{id}.parent")), "x").unwrap();
    std::fs::write(f.region.dir().join(format!("snapshots/{}.put", new_id("snap"))), "x").unwrap();
    f.region.tidy().await.unwrap();
    f.region.stale_runs(None).await.unwrap();
    assert_eq!((f.names(&id), f.files("snapshots")), (vec!["img".into(), "json".into(), "put".into()], 3));
}

#[tokio::test]
async fn concurrent_puts_also_of_the_same_block_are_whole() {
    let f = Fixture::new();
    let raw = f.dir.path().join("large");
    let file = File::create(&raw).unwrap();
    file.write_all_at(&vec![7; 64 * BLOCK], 0).unwrap();
    file.set_len(1 << 30).unwrap();
    let (tags, report) = (Tags::new(), Report::silent());
    let base = f.region.import(&raw, "large", Architecture::X86_64, &tags, &report).await.unwrap();
    let other = Region::open(f.region.dir()).unwrap();
    let id = f.region.start(&new(Some(&base.snapshot), &RunId::new())).await.unwrap();
    // After two concurrent puts to the same block, the block has the complete data of one of them.
    let (one, two) = (block(1), block(2));
    let put = async |region: &Region, index, (data, digest): &(Arc<[u8]>, Digest)| {
        region.put(&id, index, data.clone(), *digest).await.unwrap();
    };
    let tasks = (0..128u32).flat_map(|n| [(&f.region, n / 2 * 2, &one), (&other, n / 2 * 2, &two)]);
    let mut running: Vec<_> = tasks.map(|(region, n, block)| Box::pin(put(region, n, block))).collect();
    for task in &mut running {
        // Each put is started, and the test does not wait for it.
        std::future::poll_fn(|context| {
            _ = task.as_mut().poll(context);
            std::task::Poll::Ready(())
        })
        .await;
    }
    drop(running);
    let mut digests = f.region.put_blocks(&id).unwrap();
    // After its future was dropped, a put is either completed or it never begins. So all blocks are put again.
    for index in (0..128).step_by(2) {
        put(&f.region, index, &two).await;
        digests.insert(index, two.1);
    }
    assert_eq!(f.region.put_blocks(&id).unwrap().len(), 64);
    let digests: Vec<_> = f.region.put_blocks(&id).unwrap().into_values().collect();
    f.region.complete(&id, 64, linear(&digests)).await.unwrap();
    let (data, mut found) = (f.data(&id.0), vec![0; 128 * BLOCK]);
    data.read_exact_at(&mut found, 0).unwrap();
    for (index, block) in found.chunks(BLOCK).enumerate() {
        let digest = digest_of(block);
        let expected = match index {
            n if n % 2 == 0 => digests[n / 2],
            n if n < 64 => digest_of(&[7; BLOCK]),
            _ => digest_of(&[0; BLOCK]),
        };
        assert_eq!(digest, expected, "block {index}");
    }
}

/// Returns the number of copies without a record. They are open files without a name or, if the file system does not
/// support these, temporary files.
fn nameless(f: &Fixture) -> usize {
    let dir = f.region.dir().join("snapshots");
    let open = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let paths = open.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    let open =
        paths.filter(|path| path.starts_with(&dir) && path.to_string_lossy().ends_with("(deleted)")).count();
    let names = std::fs::read_dir(&dir).unwrap().flatten();
    let is_temporary = |name: &std::ffi::OsString| name.to_string_lossy().starts_with(temp_file::TEMP_PREFIX);
    open + names.filter(|entry| is_temporary(&entry.file_name())).count()
}

#[tokio::test]
async fn each_child_is_written_over_its_own_copy() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    // The test starts more children than the maximum number of concurrent copies.
    let runs: Vec<_> = (0..9).map(|_| RunId::new()).collect();
    let child = async |n: usize| {
        let spec = NewSnapshot { size_gib: 3, ..new(Some(&base.snapshot), &runs[n]) };
        let id = f.region.start(&spec).await.unwrap();
        assert_eq!(byte(&f.data(&id.0), 1 << 20), 7, "there from the start");
        let digest = f.put(&id, 0, n as u8 + 1).await;
        f.region.complete(&id, 1, linear(&[digest])).await.unwrap();
        let data = f.data(&id.0);
        assert_eq!([byte(&data, 0), byte(&data, 1 << 20), byte(&data, (3 << 30) - 1)], [n as u8 + 1, 7, 0]);
        assert_eq!(data.metadata().unwrap().nlink(), 1, "its own");
    };
    let (a, b, c) = (child(0), child(1), child(2));
    let (d, e, g) = (child(3), child(4), child(5));
    tokio::join!(a, b, c, d, e, g, child(6), child(7), child(8));
    assert_eq!(byte(&f.data(&base.snapshot.0), 0), 0);
    for run in &runs {
        f.region.ensure_no_snapshots(run).await.unwrap();
    }
    assert_eq!((f.files("snapshots"), nameless(&f)), (2, 0), "the base's alone");
}

#[tokio::test]
async fn a_cancelled_start_leaves_nothing() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    let run = RunId::new();
    let deadline = std::time::Instant::now() + Duration::from_secs(60);
    for polls in 0..8 {
        let spec = new(Some(&base.snapshot), &run);
        let mut start = Box::pin(f.region.start(&spec));
        for _ in 0..polls {
            if tokio::time::timeout(Duration::from_millis(1), &mut start).await.is_ok() {
                break;
            }
        }
        drop(start);
        // If `start` finished before it was dropped, the run's clean-up removes the snapshot.
        while nameless(&f) != 0 {
            assert!(std::time::Instant::now() < deadline, "{} copies", nameless(&f));
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        f.region.ensure_no_snapshots(&run).await.unwrap();
        assert_eq!(f.files("snapshots"), 2, "the base's alone");
    }
}

#[tokio::test]
async fn no_child_is_started_from_a_deleted_parent() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    let (run, other) = (RunId::new(), RunId::new());
    let child = f.region.start(&new(Some(&base.snapshot), &run)).await.unwrap();
    let digest = f.put(&child, 0, 1).await;
    f.region.complete(&child, 1, linear(&[digest])).await.unwrap();
    let spec = new(Some(&child), &other);
    // The parent is deleted during the copy, before it, or after it.
    let (started, deleted) = tokio::join!(f.region.start(&spec), f.region.delete_snapshot(&child));
    deleted.unwrap();
    if started.is_err() {
        assert_eq!((f.files("snapshots"), nameless(&f)), (2, 0), "the base's alone");
    }
    f.region.ensure_no_snapshots(&other).await.unwrap();
    let error = f.region.start(&spec).await.unwrap_err();
    assert!(format!("{error:#}").contains("DEPENDENCY_RESOURCE_NOT_FOUND"), "{error:#}");
    assert_eq!((f.files("snapshots"), nameless(&f)), (2, 0), "the base's alone");
}

#[tokio::test]
async fn a_record_without_these_fields_is_a_volumes_snapshot() {
    let f = Fixture::new();
    let base = f.import("base-1").await;
    let path = f.region.dir().join(format!("snapshots/{}.json", base.snapshot));
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains("written") && !text.contains("description"), "{text}");
    assert_eq!(f.region.snapshot_state(&base.snapshot).unwrap(), SnapshotState::Completed);
    assert!(f.region.put_blocks(&base.snapshot).unwrap().is_empty());
}
