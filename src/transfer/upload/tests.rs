use super::*;
use crate::cloud::Tags;
use crate::error::Kind;
use crate::ids::RunId;
use crate::ids::digest_of;
use crate::transfer::download::{download, verify};
use crate::transfer::fake::Fake;
use crate::transfer::raw::RawDisk;
use std::cell::RefCell;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, Weak};
use std::time::{Duration, Instant};

fn spec(parent: Option<&SnapshotId>) -> NewSnapshot {
    NewSnapshot {
        parent: parent.cloned(),
        size_gib: 1,
        description: "a test".into(),
        run: RunId("the run".into()),
        tags: Tags::new(),
        encrypted: false,
        kms_key: None,
    }
}

fn filled(byte: u8) -> Vec<u8> {
    vec![byte; BLOCK]
}

/// A source whose blocks contain their index. Every seventh block is not to be uploaded. The source counts how many of
/// its blocks are in memory.
#[derive(Default)]
struct Numbers {
    count: u32,
    read: AtomicU32,
    alive: Mutex<(Vec<Weak<[u8]>>, usize)>,
    /// Reading this block fails. If `panics` is true, it panics instead.
    broken: Option<u32>,
    panics: bool,
    changed: bool,
}

impl Numbers {
    fn of(count: u32) -> Self {
        Self { count, ..Self::default() }
    }

    fn content(index: u32) -> Vec<u8> {
        let mut data = vec![1; BLOCK];
        data[1000..1004].copy_from_slice(&index.to_le_bytes());
        data
    }

    fn is_sent(index: u32) -> bool {
        !index.is_multiple_of(7)
    }
}

impl BlockSource for Numbers {
    fn indexes(&self) -> Vec<u32> {
        (0..self.count).collect()
    }

    fn block(&self, index: u32) -> Result<Option<(Arc<[u8]>, Digest)>> {
        self.read.fetch_add(1, Ordering::SeqCst);
        if self.broken == Some(index) {
            assert!(!self.panics, "as a test asked for");
            anyhow::bail!("the disk is broken");
        }
        if !Self::is_sent(index) {
            return Ok(None);
        }
        let data: Arc<[u8]> = Self::content(index).into();
        {
            let mut alive = self.alive.lock().unwrap();
            alive.0.retain(|block| block.strong_count() > 0);
            alive.0.push(Arc::downgrade(&data));
            alive.1 = alive.1.max(alive.0.len());
        }
        let digest = digest_of(&data);
        Ok(Some((data, digest)))
    }

    fn ensure_unchanged(&self, sent: &BTreeMap<u32, Digest>) -> Result<()> {
        assert_eq!(sent.len(), (0..self.count).filter(|index| Self::is_sent(*index)).count());
        anyhow::ensure!(!self.changed, "it was changed");
        Ok(())
    }
}

async fn send(fake: &Fake, source: &Arc<Numbers>) -> Result<UploadedSnapshot> {
    upload(fake, &spec(None), source.clone(), &|_, _| ()).await
}

/// Waits until no thread uses the source any more.
fn ensure_free(source: &Arc<Numbers>) {
    let end = Instant::now() + Duration::from_secs(30);
    while Arc::strong_count(source) > 1 {
        assert!(Instant::now() < end, "the threads did not end");
        std::thread::yield_now();
    }
}

#[tokio::test]
async fn all_blocks_are_uploaded_concurrently_in_little_memory() {
    let (fake, source) = (Fake::default(), Arc::new(Numbers::of(700)));
    // The delay is longer than it takes to read and hash some dozen blocks, even on a busy machine.
    let delay = Duration::from_millis(150);
    (fake.state().delay, fake.state().forgetful) = (delay, true);
    let told = RefCell::new(Vec::new());
    let started = Instant::now();
    let sent = upload(&fake, &spec(None), source.clone(), &|done, all| told.borrow_mut().push((done, all)))
        .await
        .unwrap();
    let time = started.elapsed();
    let expected: BTreeMap<_, _> = (0..700)
        .filter(|index| Numbers::is_sent(*index))
        .map(|index| (index, digest_of(&Numbers::content(index))))
        .collect();
    assert_eq!(sent.blocks, expected);
    let state = fake.state();
    assert!(state.snapshots[&sent.snapshot].complete && state.snapshots.len() == 1);
    assert!((9..=MAX_BLOCKS_IN_MEMORY).contains(&state.most), "{} puts at a time", state.most);
    let alive = source.alive.lock().unwrap().1;
    assert!(alive <= MAX_BLOCKS_IN_MEMORY, "{alive} blocks in memory");
    assert!(time < delay * 600, "{time:?}: one after another it takes {:?}", delay * 600);
    // The blocks of zeros count as done, although they are not uploaded.
    let (told, all) = (told.borrow(), 700 * BLOCK as u64);
    assert_eq!((told.len(), told.last()), (600, Some(&(all, Some(all)))));
    assert!(told.is_sorted() && told.iter().all(|(done, of)| *done <= all && *of == Some(all)));
    drop(state);
    ensure_free(&source);
}

#[tokio::test]
async fn an_empty_source_becomes_a_snapshot_too() {
    let (fake, source) = (Fake::default(), Arc::new(Numbers::of(1)));
    let sent = send(&fake, &source).await.unwrap();
    assert!(sent.blocks.is_empty() && fake.state().snapshots[&sent.snapshot].complete);
    verify(&fake, &sent.snapshot, &sent.blocks, None).await.unwrap();
}

/// Returns the error of a failing upload. Checks how many blocks were read, and that the clean-up action removes all
/// snapshots.
async fn failing(change: impl FnOnce(&Fake, &mut Numbers)) -> String {
    let (fake, mut source) = (Fake::default(), Numbers::of(3000));
    fake.state().forgetful = true;
    change(&fake, &mut source);
    let source = Arc::new(source);
    let error = send(&fake, &source).await.unwrap_err();
    ensure_free(&source);
    assert!(fake.state().snapshots.values().all(|snapshot| !snapshot.complete), "{error:#}");
    assert_eq!(fake.state().now, 0);
    fake.ensure_no_snapshots(&RunId("the run".into())).await.unwrap();
    assert!(fake.state().snapshots.is_empty());
    let read = source.read.load(Ordering::SeqCst);
    // A source that changes is read completely before the change is detected.
    assert!(source.changed || read < 1000, "{read} blocks were read");
    format!("{error:#}")
}

#[tokio::test]
async fn a_block_that_fails_ends_the_upload_and_is_named() {
    let text = failing(|fake, _| fake.state().refused = Some(32)).await;
    assert_eq!(text, "writing block 32 of snap-1: AccessDeniedException");
    let text = failing(|_, source| source.broken = Some(41)).await;
    assert_eq!(text, "reading block 41: the disk is broken");
    let text = failing(|_, source| (source.broken, source.panics) = (Some(41), true)).await;
    assert_eq!(text, "a thread that reads blocks panicked");
}

#[tokio::test]
async fn a_changed_source_is_never_sealed() {
    let (fake, source) = (Fake::default(), Arc::new(Numbers { changed: true, ..Numbers::of(20) }));
    let error = send(&fake, &source).await.unwrap_err();
    assert_eq!(error.to_string(), "it was changed");
    assert!(!fake.state().snapshots[&SnapshotId("snap-1".into())].complete);
}

#[tokio::test]
async fn an_expired_snapshot_is_deleted_and_uploaded_again() {
    for at in [None, Some(11)] {
        let (fake, source) = (Fake::default(), Arc::new(Numbers::of(20)));
        (fake.state().expiring, fake.state().expiring_at) = (1, at);
        let sent = send(&fake, &source).await.unwrap();
        let state = fake.state();
        assert_eq!((state.started, sent.snapshot.0.as_str()), (2, "snap-2"));
        assert_eq!(state.snapshots.keys().collect::<Vec<_>>(), [&sent.snapshot], "the first is gone");
        assert!(state.snapshots[&sent.snapshot].complete);
        assert_eq!(sent.blocks.len(), 17);
    }
    let (fake, source) = (Fake::default(), Arc::new(Numbers::of(20)));
    fake.state().expiring = 9;
    let error = send(&fake, &source).await.unwrap_err();
    assert!(error.chain().any(|cause| cause.is::<SnapshotExpired>()), "{error:#}");
    assert_eq!(fake.state().started, 2);
}

#[tokio::test]
async fn dropping_the_upload_stops_the_threads() {
    let (fake, source) = (Fake::default(), Arc::new(Numbers::of(100_000)));
    (fake.state().delay, fake.state().forgetful) = (Duration::from_millis(5), true);
    let some = async {
        while source.read.load(Ordering::SeqCst) < 50 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        _ = send(&fake, &source) => panic!("it was not dropped"),
        () = some => {}
    }
    ensure_free(&source);
    assert_eq!(fake.state().now, 0);
    let sent = source.read.load(Ordering::SeqCst);
    assert!((50..5000).contains(&sent), "{sent}");
}

#[tokio::test]
async fn the_snapshot_is_compared_with_what_was_uploaded_and_the_parent() {
    let fake = Fake::default();
    let parent = fake.with("snap-parent", 1, &[(0, &filled(1)), (1, &filled(2)), (2, &filled(0))]);
    let child = |blocks: &[(u32, &[u8])]| fake.with("snap-child", 1, blocks);
    let sent = BTreeMap::from([(1, digest_of(&filled(0))), (9, digest_of(&filled(9)))]);
    let good: &[(u32, &[u8])] = &[(0, &filled(1)), (1, &filled(0)), (2, &filled(0)), (9, &filled(9))];
    let check = async |blocks: &[(u32, &[u8])], broken: Option<u32>| {
        let child = child(blocks);
        if let Some(broken) = broken {
            fake.corrupt(&child, broken);
        }
        let error = verify(&fake, &child, &sent, Some(&parent)).await.err();
        error.map(|error| (Kind::of(&error), format!("{error:#}")).1).unwrap_or_default()
    };
    assert_eq!(check(good, None).await, "");
    // Missing blocks are zeros.
    assert_eq!(check(&[good[0], good[3]], None).await, "");
    assert_eq!(check(good, Some(9)).await, "block 9 of snap-child differs from the uploaded block");
    assert_eq!(check(good, Some(1)).await, "block 1 of snap-child differs from the uploaded block");
    assert_eq!(
        check(good, Some(0)).await,
        "block 0 of snap-child differs from the block of its parent snap-parent"
    );
    assert_eq!(
        check(&good[..3], None).await,
        "block 9 of snap-child differs from the uploaded block, because it is missing"
    );
    assert_eq!(
        check(&good[1..], None).await,
        "block 0 of snap-child differs from the block of its parent snap-parent, because it is missing"
    );
    let zeros = filled(0);
    let more = [good, &[(10, &zeros[..])]].concat();
    assert_eq!(check(&more, None).await, "");
    assert_eq!(
        check(&more, Some(10)).await,
        "block 10 of snap-child differs from zeros, although oven never wrote it"
    );
    let alone = verify(&fake, &child(good), &sent, None).await.unwrap_err();
    assert_eq!(alone.to_string(), "block 0 of snap-child differs from zeros, although oven never wrote it");
}

fn raw(file: &File) -> Arc<RawDisk> {
    Arc::new(RawDisk::new(file.try_clone().unwrap(), Path::new("disk.raw")).unwrap())
}

#[tokio::test]
async fn upload_and_download_give_the_same_sparse_file() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(1 << 29).unwrap();
    for index in [0u32, 3, 4, 500, 1023] {
        file.write_all_at(&Numbers::content(index), u64::from(index) * BLOCK as u64).unwrap();
    }
    // Writes one block of a file system in the middle of a hole.
    file.write_all_at(&[7; 4096], 100 * BLOCK as u64 + 8192).unwrap();
    let fake = Fake::default();
    let sent = upload(&fake, &spec(None), raw(&file), &|_, _| ()).await.unwrap();
    assert_eq!(sent.blocks.keys().copied().collect::<Vec<_>>(), [0, 3, 4, 100, 500, 1023]);
    verify(&fake, &sent.snapshot, &sent.blocks, None).await.unwrap();
    let down = tempfile::tempfile().unwrap();
    down.write_all_at(b"what was there before", 9 << 20).unwrap();
    let contents = download(&fake, &sent.snapshot, &down).await.unwrap();
    assert_eq!((contents.size_gib, contents.blocks.len()), (1, 6));
    assert_eq!(down.metadata().unwrap().len(), 1 << 30);
    assert_eq!(digests(raw(&down)).await.unwrap(), sent.blocks);
    let allocated = down.metadata().unwrap().blocks() * 512;
    assert!(allocated <= 5 * BLOCK as u64 + (128 << 10), "{allocated} bytes on the disk");
}

#[tokio::test]
async fn a_download_reads_concurrently_and_ends_at_the_first_error() {
    let (fake, file) = (Fake::default(), tempfile::tempfile().unwrap());
    let data = filled(1);
    let all: Vec<(u32, &[u8])> = (0..640).map(|index| (index, &data[..])).collect();
    let snapshot = fake.with("snap-1", 1, &all);
    // The delay is long enough that even a busy machine starts many reads in that time.
    fake.state().delay = Duration::from_millis(150);
    download(&fake, &snapshot, &file).await.unwrap();
    let most = fake.state().most_reads;
    assert!((16..=96).contains(&most), "{most} reads at a time");
    // The digest does not match the data, as if the response had been damaged in transit.
    fake.state().snapshots.get_mut(&snapshot).unwrap().blocks.get_mut(&5).unwrap().1 = [0; 32];
    let error = download(&fake, &snapshot, &file).await.unwrap_err();
    let text = "reading block 5 of snap-1: it does not match its checksum";
    assert_eq!(format!("{error:#}"), text);
    let small = fake.with("snap-2", 1, &[(2048, &data)]);
    let error = download(&fake, &small, &file).await.unwrap_err();
    assert_eq!(error.to_string(), "snap-2 has blocks beyond its size of 1 GiB");
}
