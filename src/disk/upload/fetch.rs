//! Snapshots read: compared with what was sent, or written to a file.

use super::feed::{beside_until_dropped, each_of};
use crate::cloud::SnapshotId;
use crate::cloud::blocks::{BLOCK, Blocks, Contents, Digest, Reader};
use crate::disk::cache::digest_of;
use crate::disk::copy::not_zero;
use crate::error::Kind;
use anyhow::{Context, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Reads at a time, each with a block in memory: 32 MiB. EBS direct answers 1000 a second for one snapshot, and takes
/// some ten milliseconds for each.
const READERS: usize = 64;

/// Calls with each of some blocks, from several threads, until one fails.
async fn each<T: Send + Sync + 'static>(
    all: Vec<T>,
    work: impl Fn(&T) -> Result<()> + Send + Sync + 'static,
) -> Result<()> {
    beside_until_dropped(move |dropped| {
        let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
        each_of(READERS.min(all.len()), || {
            while !dropped.load(Ordering::Relaxed) && !failed.load(Ordering::Relaxed) {
                let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) else { break };
                work(one).inspect_err(|_| failed.store(true, Ordering::Relaxed))?;
            }
            Ok(())
        })
    })
    .await
}

fn read(reader: &dyn Reader, snapshot: &SnapshotId, index: u32) -> Result<(Vec<u8>, Digest)> {
    let (data, digest) =
        reader.read(index).with_context(|| format!("reading block {index} of {snapshot}"))?;
    if data.len() != BLOCK {
        let text = format!("block {index} of {snapshot} has {} bytes, and not {BLOCK}", data.len());
        return Err(Kind::Cloud.error(text));
    }
    Ok((data, digest))
}

/// What a block has to be.
enum Expected {
    Sent(Digest),
    Parents,
}

/// Reads a snapshot back, and fails with the block and the snapshot where it is not what was sent, or, elsewhere, what
/// its parent has.
pub async fn verify(
    blocks: &dyn Blocks,
    snapshot: &SnapshotId,
    sent: &BTreeMap<u32, Digest>,
    parent: Option<&SnapshotId>,
) -> Result<()> {
    let context = || format!("reading {snapshot} back");
    let there = blocks.contents(snapshot).await.with_context(context)?.blocks;
    let reader = blocks.reader(snapshot).await.with_context(context)?;
    let mut expected: Vec<(u32, Expected)> =
        sent.iter().map(|(index, digest)| (*index, Expected::Sent(*digest))).collect();
    let mut parents = None;
    if let Some(parent) = parent {
        let context = || format!("reading {parent}, which is the parent of {snapshot}");
        let below = blocks.contents(parent).await.with_context(context)?.blocks;
        let others = below.iter().filter(|index| !sent.contains_key(index));
        expected.extend(others.map(|index| (*index, Expected::Parents)));
        parents = Some((parent.clone(), blocks.reader(parent).await.with_context(context)?, below));
    }
    let known = |index: &u32| {
        sent.contains_key(index) || parents.as_ref().is_some_and(|(.., below)| below.contains(index))
    };
    if let Some(index) = there.iter().find(|index| !known(index)) {
        return Err(Kind::Cloud.error(format!("block {index} of {snapshot} was never written, and is there")));
    }
    let parents = parents.map(|(parent, reader, _)| (parent, reader));
    let (snapshot, zeros) = (snapshot.clone(), digest_of(&[0; BLOCK]));
    each(expected, move |(index, expected)| {
        let (expected, what) = match (expected, &parents) {
            (Expected::Sent(digest), _) => (*digest, "what was sent".to_owned()),
            (Expected::Parents, Some((parent, reader))) => {
                (read(&**reader, parent, *index)?.1, format!("that of its parent {parent}"))
            }
            (Expected::Parents, None) => unreachable!("without a parent all was sent"),
        };
        // What is not there is zeros.
        let is = if there.contains(index) { read(&*reader, &snapshot, *index)?.1 } else { zeros };
        if is == expected {
            return Ok(());
        }
        let absent = if there.contains(index) { "" } else { ": it is not there" };
        Err(Kind::Cloud.error(format!("block {index} of {snapshot} is not {what}{absent}")))
    })
    .await
}

/// Writes a snapshot to a file, which loses what it held, and is sparse where the snapshot has zeros. Each block was
/// verified against its digest.
pub async fn download(blocks: &dyn Blocks, snapshot: &SnapshotId, into: &File) -> Result<Contents> {
    let contents = blocks.contents(snapshot).await.with_context(|| format!("listing {snapshot}"))?;
    let reader: Arc<dyn Reader> =
        blocks.reader(snapshot).await.with_context(|| format!("reading {snapshot}"))?;
    let size = contents.size_gib << 30;
    if contents.blocks.last().is_some_and(|last| (u64::from(*last) + 1) * BLOCK as u64 > size) {
        let text = format!("{snapshot} has blocks beyond its {} GiB", contents.size_gib);
        return Err(Kind::Cloud.error(text));
    }
    into.set_len(0).and_then(|()| into.set_len(size)).context("making room for the snapshot")?;
    let file = into.try_clone().context("duplicating a descriptor")?;
    let (all, snapshot) = (contents.blocks.iter().copied().collect(), snapshot.clone());
    each(all, move |index| {
        let (data, _) = read(&*reader, &snapshot, *index)?;
        let start = u64::from(*index) * BLOCK as u64;
        not_zero(&data, &mut |at, data| Ok(file.write_all_at(data, start + at as u64)?))
            .with_context(|| format!("writing block {index}"))
    })
    .await?;
    Ok(contents)
}
