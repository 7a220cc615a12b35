//! Tests how oven handles EBS direct's answers, especially errors. D1 to D8 are rows of `tests/FAULTS.md`.

mod copies;
mod snapshot_writes;

use super::fake::{Fake, Reply, ebs, refuse};
use super::*;
use crate::cloud::block_api::{BlockIndexes, SnapshotExpired};
use crate::cloud::{Tags, tag};
use crate::error::Kind;
use crate::ids::BLOCK;
use sha2::{Digest as _, Sha256};
use std::time::Duration;

const BASE: &str = "snap-0aaaaaaaaaaaaaaaa";
const RUN: &str = "0123456789abcdef0123456789abcdef";
/// Blocks in three windows of tokens. The first two blocks are in the same window.
const APART: [(u32, u8); 4] = [(0, 1), (7, 2), (1 << 14, 3), (1 << 20, 4)];

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

fn run() -> RunId {
    RunId(RUN.into())
}

fn digest(byte: u8) -> Digest {
    Sha256::digest(vec![byte; BLOCK]).into()
}

/// Reads a block on a separate thread, as a disk does.
async fn read(ebs: &Ebs, id: &SnapshotId, index: u32) -> Result<(Vec<u8>, Digest)> {
    let reader = ebs.reader(id).await.unwrap();
    tokio::task::spawn_blocking(move || reader.read(index)).await.unwrap()
}

async fn reads(ebs: &Ebs, id: &SnapshotId, blocks: &[(u32, u8)]) {
    for (index, byte) in blocks {
        let (data, received) = read(ebs, id, *index).await.unwrap();
        assert!(data == vec![*byte; BLOCK] && received == digest(*byte), "block {index}");
    }
}

fn indexes(blocks: &[(u32, u8)]) -> BlockIndexes {
    blocks.iter().map(|(index, _)| *index).collect()
}

#[tokio::test]
async fn contents_are_listed_in_pages_some_of_them_empty() {
    for (page, empty) in [(100, 0), (1, 0), (1, 2), (3, 1)] {
        let dir = dir();
        let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
        let base = fake.add(BASE, &APART, "self");
        fake.with(|world| (world.page, world.empty) = (page, empty));
        let contents = ebs.contents(&base).await.unwrap();
        assert_eq!(contents, SnapshotContents { size_gib: 8, blocks: indexes(&APART) });
        let listed = fake.count("ListSnapshotBlocks");
        reads(&ebs, &base, &APART).await;
        // The tokens were cached.
        assert_eq!(fake.count("ListSnapshotBlocks"), listed);
    }
}

#[tokio::test]
async fn a_snapshot_without_blocks_has_no_contents() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &[], "self");
    assert!(ebs.contents(&base).await.unwrap().blocks.is_empty());
    let error = format!("{:#}", read(&ebs, &base, 3).await.unwrap_err());
    assert_eq!(error, format!("reading block 3 of {BASE}: {BASE} has no block 3"));
}

/// D2, for page tokens. The listing continues after the last index that was listed.
#[tokio::test]
async fn a_page_token_that_expires_loses_no_block() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| {
        let second = request.action == "ListSnapshotBlocks" && nth == 1;
        let expired = Reply::Refuse(400, "ValidationException", "It expired", "INVALID_PAGE_TOKEN");
        if second { expired } else { Reply::Right }
    })
    .await;
    let base = fake.add(BASE, &APART, "self");
    fake.with(|world| world.page = 2);
    assert_eq!(ebs.contents(&base).await.unwrap().blocks, indexes(&APART));
    let requests = fake.of("ListSnapshotBlocks");
    let from: Vec<&str> = requests.iter().map(|request| request.get("startingBlockIndex")).collect();
    assert_eq!(from, ["0", "", "8"]);
    // A snapshot without blocks has only one page, so no page token is sent.
    let expired = |request: &super::fake::Request, _| match request.get("pageToken") {
        "" => Reply::Right,
        _ => Reply::Refuse(400, "ValidationException", "It expired", "INVALID_PAGE_TOKEN"),
    };
    let (ebs, fake) = super::fake::ebs(dir.path(), expired).await;
    let base = fake.add(BASE, &[], "self");
    fake.with(|world| (world.empty, world.page) = (3, 0));
    assert!(ebs.contents(&base).await.unwrap().blocks.is_empty());
}

#[tokio::test]
async fn a_listing_without_progress_ends() {
    let dir = dir();
    let page = r#"{"Blocks": [{"BlockIndex": 7, "BlockToken": "7-0"}], "BlockSize": 524288, "VolumeSize": 1,
                   "NextToken": "again"}"#;
    let (ebs, fake) = super::fake::ebs(dir.path(), move |_, _| Reply::Body(page.to_owned())).await;
    let base = fake.add(BASE, &APART, "self");
    let error = ebs.contents(&base).await.unwrap_err();
    assert!(format!("{error:#}").ends_with("without a new block"), "{error:#}");
}

/// D2, for block tokens.
#[tokio::test]
async fn block_tokens_that_expire_are_listed_again() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "self");
    ebs.contents(&base).await.unwrap();
    fake.with(|world| world.age = 1);
    reads(&ebs, &base, &APART).await;
    // The window of the first two blocks is listed once.
    assert_eq!(fake.count("ListSnapshotBlocks"), 1 + 3);
    assert_eq!(fake.count("GetSnapshotBlock"), APART.len() + 3);
}

#[tokio::test]
async fn blocks_can_be_read_without_listing_the_contents() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
    let base = fake.add(BASE, &APART, "self");
    reads(&ebs, &base, &[APART[3], APART[0], APART[1]]).await;
    let requests = fake.of("ListSnapshotBlocks");
    let from: Vec<&str> = requests.iter().map(|request| request.get("startingBlockIndex")).collect();
    assert_eq!(from, ["1048576", "0"]);
}

/// D3.
#[tokio::test]
async fn a_block_with_a_flipped_bit_is_read_again_and_then_reported() {
    for (flips, good) in [(3, true), (4, false)] {
        let dir = dir();
        let (ebs, fake) = ebs(dir.path(), move |request, nth| {
            let flip = request.action == "GetSnapshotBlock" && nth < flips;
            if flip { Reply::Flipped } else { Reply::Right }
        })
        .await;
        let base = fake.add(BASE, &APART, "self");
        match read(&ebs, &base, 7).await {
            Ok((data, received)) => assert!(good && data == vec![2; BLOCK] && received == digest(2)),
            Err(error) => {
                let text = "reading block 7 of snap-0aaaaaaaaaaaaaaaa: the block does not match its checksum, 4 times in a row";
                assert!(!good && format!("{error:#}") == text, "{error:#}");
                assert_eq!(Kind::of(&error), Kind::Cloud);
            }
        }
        assert_eq!(fake.count("GetSnapshotBlock"), 4);
    }
}

#[tokio::test]
async fn reads_are_retried_after_transient_errors_only() {
    let dir = dir();
    let (ebs, fake) = ebs(dir.path(), |request, nth| match (request.action.as_str(), nth) {
        ("GetSnapshotBlock", 0) => Reply::Drop,
        ("GetSnapshotBlock", 1) => Reply::Refuse(500, "InternalServerException", "", ""),
        ("GetSnapshotBlock", 2) => refuse("RequestThrottledException", "slow down"),
        ("ListSnapshotBlocks", 0) => Reply::Refuse(503, "InternalServerException", "", ""),
        _ => Reply::Right,
    })
    .await;
    let base = fake.add(BASE, &APART, "self");
    reads(&ebs, &base, &APART[..1]).await;
    assert_eq!((fake.count("GetSnapshotBlock"), fake.count("ListSnapshotBlocks")), (4, 2));
    let dir = dir_and(|action| match action {
        "GetSnapshotBlock" => Reply::Refuse(403, "AccessDeniedException", "no", "UNAUTHORIZED_ACCOUNT"),
        _ => Reply::Right,
    });
    let (ebs, fake) = dir.await;
    let base = fake.add(BASE, &APART, "self");
    let error = read(&ebs, &base, 0).await.unwrap_err();
    let text = "reading block 0 of snap-0aaaaaaaaaaaaaaaa: GetSnapshotBlock (snap-0aaaaaaaaaaaaaaaa, block 0): \
                AccessDeniedException (UNAUTHORIZED_ACCOUNT): no (request req-1)";
    assert_eq!(format!("{error:#}"), text);
    assert!(crate::error::hint_of(&error).unwrap().contains("oven policy"));
    assert_eq!(fake.count("GetSnapshotBlock"), 1);
    let absent = SnapshotId("snap-0bbbbbbbbbbbbbbbb".into());
    assert!(ebs.contents(&absent).await.is_err());
    assert_eq!(fake.count("ListSnapshotBlocks"), 2);
}

/// Starts a server whose answer depends only on the action of the call.
async fn dir_and(reply: impl Fn(&str) -> Reply + Send + 'static) -> (Ebs, Fake) {
    let dir = dir();
    ebs(dir.path(), move |request, _| reply(&request.action)).await
}

/// Reads have to work although the threads that read are blocked, and the main thread waits in the kernel.
#[test]
fn reads_need_no_other_thread() {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    // The server runs on a separate thread, as AWS does.
    std::thread::spawn(move || {
        runtime().block_on(async {
            let dir = dir();
            let (ebs, fake) = ebs(dir.path(), |_, _| Reply::Right).await;
            let base = fake.add(BASE, &APART, "self");
            sender.send(ebs.reader(&base).await.unwrap()).unwrap();
            // The server keeps running.
            tokio::time::sleep(Duration::from_secs(5)).await;
            drop(ebs);
        });
    });
    let reader = receiver.recv().unwrap();
    let threads: Vec<_> = (0..8)
        .map(|i| {
            let reader = reader.clone();
            let (index, byte) = APART[i % APART.len()];
            std::thread::spawn(move || assert_eq!(reader.read(index).unwrap().1, digest(byte)))
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}
