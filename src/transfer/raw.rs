//! Reads a raw disk image block by block. Holes are not read, zeros are not uploaded, and concurrent changes are
//! detected.

use super::readers;
use super::readers::BlockSource;
use crate::error::Kind;
use crate::ids::digest_of;
use crate::ids::{BLOCK, Digest};
use crate::sys::sparse_copy::{data_after, disk_name, length};
use anyhow::{Context, Result};
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The resolution of file times. Two changes of a file within this time can give it the same times.
const TIME_RESOLUTION: Duration = Duration::from_millis(100);
/// How many times to wait for a file that keeps changing. If the file still changes afterwards, `ensure_unchanged`
/// detects that.
const MAX_WAITS: u32 = 3;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// A raw disk: a file or a block device.
#[derive(Debug)]
pub struct RawDisk {
    file: File,
    /// The name, for messages.
    name: PathBuf,
    length: u64,
    /// Ranges of blocks with data.
    ranges: Vec<Range<u32>>,
    /// The file's metadata. `None` for a block device, whose times do not show changes of its content.
    stamp: Option<Stamp>,
}

/// The metadata of a file. By comparing them, oven finds out whether the file's content was changed.
#[derive(Debug, PartialEq, Eq)]
struct Stamp {
    place: (u64, u64),
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl RawDisk {
    /// If the file was changed very recently, this function blocks its thread for up to 0.3 s. So do not call it on the
    /// runtime's thread.
    #[allow(clippy::disallowed_methods)]
    pub fn new(file: File, name: &Path) -> Result<Self> {
        let context = || format!("inspecting {}", disk_name(name));
        let mut stamp = stamp(&file).with_context(context)?;
        for _ in 0..MAX_WAITS {
            if stamp.as_ref().is_none_or(is_settled) {
                break;
            }
            sleep(TIME_RESOLUTION);
            stamp = self::stamp(&file).with_context(context)?;
        }
        let length = length(&file).with_context(context)?;
        let ranges = data_ranges(&file, length).with_context(context)?;
        Ok(Self { file, name: name.to_owned(), length, ranges, stamp })
    }

    /// Returns the size of a disk that can hold the image.
    pub fn size_gib(&self) -> u64 {
        self.length.div_ceil(1 << 30)
    }

    fn changed_error(&self) -> anyhow::Error {
        Kind::Usage
            .failure(format!("{} was changed while it was read", disk_name(&self.name)))
            .hint("Try again when no program writes to it.")
            .into()
    }
}

fn stamp(file: &File) -> Result<Option<Stamp>> {
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then(|| Stamp {
        place: (metadata.dev(), metadata.ino()),
        length: metadata.len(),
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    }))
}

/// Returns whether the file's times will show every later change. Returns false if the file was changed within the last
/// [`TIME_RESOLUTION`].
fn is_settled(stamp: &Stamp) -> bool {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let changed = Duration::new(stamp.changed.0.max(0) as u64, stamp.changed.1 as u32);
    now.checked_sub(changed).is_some_and(|age| age > TIME_RESOLUTION)
}

/// Returns the ranges of blocks with data, as far as the file system knows.
fn data_ranges(file: &File, length: u64) -> Result<Vec<Range<u32>>> {
    let size = BLOCK as u64;
    let last = u32::try_from(length.div_ceil(size)).context("counting the disk's blocks")?;
    let (mut ranges, mut next) = (Vec::new(), 0);
    while next < last
        && let Some((from, to)) = data_after(file.as_fd(), u64::from(next) * size, length)?
    {
        // `last` fits into 32 bits, and these values are not larger.
        let (from, to) = ((from / size) as u32, (to.div_ceil(size) as u32).min(last));
        ranges.push(from.max(next)..to);
        next = to;
    }
    Ok(ranges)
}

impl BlockSource for RawDisk {
    fn indexes(&self) -> Vec<u32> {
        self.ranges.iter().cloned().flatten().collect()
    }

    fn block(&self, index: u32) -> Result<Option<(Arc<[u8]>, Digest)>> {
        let start = u64::from(index) * BLOCK as u64;
        let want = self.length.saturating_sub(start).min(BLOCK as u64) as usize;
        // The data are read directly into the `Arc`. Converting a vector would need the memory twice.
        let mut data: Arc<[u8]> = Arc::from(&ZEROS[..]);
        let buffer = Arc::get_mut(&mut data).expect("the new Arc has one owner");
        self.file.read_exact_at(&mut buffer[..want], start).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => self.changed_error(),
            _ => anyhow::Error::from(e).context(format!("reading {}", disk_name(&self.name))),
        })?;
        if data[..] == ZEROS {
            return Ok(None);
        }
        let digest = digest_of(&data);
        Ok(Some((data, digest)))
    }

    /// Compares a file's times with its earlier times. The times of a block device do not show changes of its content,
    /// so its blocks are read again.
    fn ensure_unchanged(&self, sent: &BTreeMap<u32, Digest>) -> Result<()> {
        if let Some(before) = &self.stamp {
            let after = stamp(&self.file)?;
            return if after.as_ref() == Some(before) { Ok(()) } else { Err(self.changed_error()) };
        }
        let (indexes, next) = (self.indexes(), AtomicUsize::new(0));
        readers::run_in_threads(readers::reader_count(), || {
            while let Some(index) = indexes.get(next.fetch_add(1, Ordering::Relaxed)) {
                let now = self.block(*index)?.map(|(_, digest)| digest);
                if now.as_ref() != sent.get(index) {
                    return Err(self.changed_error());
                }
            }
            Ok(())
        })
    }
}

/// Returns a value that identifies a disk's content: the SHA256 over the index and digest of each non-zero block, in
/// hex.
pub fn digest(blocks: &BTreeMap<u32, Digest>) -> String {
    let mut all = Sha256::new();
    for (index, digest) in blocks {
        all.update(index.to_le_bytes());
        all.update(digest);
    }
    all.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::upload::digests;

    fn raw(file: &File) -> RawDisk {
        RawDisk::new(file.try_clone().unwrap(), Path::new("disk.raw")).unwrap()
    }

    #[test]
    fn holes_are_not_read_zeros_not_uploaded_and_the_last_block_is_padded() {
        let file = tempfile::tempfile().unwrap();
        let block = BLOCK as u64;
        // A hole of a tebibyte, with data in three places.
        file.set_len((1 << 40) + 1000).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        file.write_all_at(&[0; 5000], 7 * block - 2500).unwrap();
        file.write_all_at(b"last", (1 << 40) + 990).unwrap();
        let raw = raw(&file);
        assert_eq!(raw.size_gib(), 1025);
        assert_eq!(raw.indexes(), [0, 6, 7, 1 << 21]);
        assert!(raw.block(6).unwrap().is_none() && raw.block(7).unwrap().is_none());
        let (data, digest) = raw.block(1 << 21).unwrap().unwrap();
        assert_eq!((data.len(), digest), (BLOCK, digest_of(&data)));
        assert_eq!(&data[990..994], b"last");
        assert!(data[994..].iter().all(|byte| *byte == 0));
        raw.ensure_unchanged(&BTreeMap::new()).unwrap();
    }

    #[test]
    fn every_change_is_detected_even_right_after_another() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BLOCK as u64).unwrap();
        for change in [
            |file: &File| file.write_all_at(b"x", 9),
            |file: &File| file.set_len(10),
            |file: &File| file.set_len(BLOCK as u64),
        ] {
            let raw = raw(&file);
            raw.ensure_unchanged(&BTreeMap::new()).unwrap();
            change(&file).unwrap();
            let error = raw.ensure_unchanged(&BTreeMap::new()).unwrap_err();
            assert_eq!(error.to_string(), "disk.raw was changed while it was read");
        }
        let raw = raw(&file);
        file.set_len(0).unwrap();
        assert!(raw.block(0).unwrap_err().to_string().contains("changed"), "it became shorter");
    }

    #[tokio::test]
    async fn the_digest_depends_on_contents_and_positions_but_not_on_holes() {
        let of = async |blocks: &[(u64, &[u8])]| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4 * BLOCK as u64).unwrap();
            blocks.iter().for_each(|(at, data)| file.write_all_at(data, at * BLOCK as u64).unwrap());
            digest(&digests(Arc::new(raw(&file))).await.unwrap())
        };
        let (one, zeros) = (vec![7; BLOCK], vec![0; BLOCK]);
        let here = of(&[(1, &one)]).await;
        assert_eq!(here, of(&[(0, &zeros), (1, &one), (3, &zeros)]).await);
        assert_ne!(here, of(&[(2, &one)]).await);
        assert_eq!(here.len(), 64);
    }
}
