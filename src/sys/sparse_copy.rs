//! Copies of disks in files: reflinks where the file system has them, else sparse copies. A copy has no name until it
//! is whole.

use super::space::{free_space, full, no_space};
use super::tasks::Cancelled;
use super::temp_file::Temp;
use anyhow::{Context, Result};
use rustix::fs::{OFlags, SeekFrom};
use rustix::io::Errno;
use sha2::{Digest, Sha256};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

/// Zeros in runs of this length become holes, and digests see blocks of it. EBS direct would do with 512 KiB; smaller
/// ones keep a trimmed file system sparse, and comparing costs next to nothing.
const BLOCK: usize = 64 << 10;
/// Read and written at once: large enough that O_DIRECT runs at the disk's speed, small enough to be stopped soon.
const CHUNK: usize = 4 << 20;
/// What O_DIRECT wants of addresses, lengths and offsets, on every disk there is.
const ALIGN: usize = 4096;

static ZEROS: [u8; BLOCK] = [0; BLOCK];

/// How many bytes a file or a block device holds.
pub fn length(file: &File) -> Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// A copy of `source` in a nameless file of `dir`, `size` bytes long (at least the source's length): what is beyond
/// the source is zero, and zeros are holes. The data is on its way to the disk, or there: `fdatasync` makes sure.
pub fn copy(source: &File, size: u64, dir: &Path, cancelled: &Cancelled) -> Result<Temp> {
    let target = Temp::new(dir)?;
    let full = |error| full(error, dir, allocated(source));
    if !reflink(source, target.file()) {
        ensure_room(source, dir)?;
        copy_data(source, target.file(), cancelled).map_err(full)?;
    }
    // A last block was written whole.
    target.file().set_len(size).map_err(|e| full(e.into()))?;
    Ok(target)
}

/// Makes an empty file share all data of another one, where the file system can do that: nothing is copied then.
fn reflink(source: &File, target: &File) -> bool {
    rustix::fs::ioctl_ficlone(target, source).is_ok()
}

/// Fails where a copy of `source` would not fit into `dir`.
fn ensure_room(source: &File, dir: &Path) -> Result<()> {
    match (needed(source), free_space(dir)) {
        (Ok(needed), Some(free)) if needed > free => Err(no_space(dir, needed)),
        _ => Ok(()),
    }
}

/// Past the page cache: what is written is on the disk then, so that the first flush of a loop device on the copy
/// does not have to wait for all of it. Measured, 265 MiB on ext4: 0.11 s; copy_file_range 0.08 s and 0.07 s for the
/// first flush, with twice the memory, and 0.8 s for the copy when that memory had to be found.
fn copy_data(source: &File, target: &File, cancelled: &Cancelled) -> Result<()> {
    let mut writer = Writer { target, direct: set_direct(target, true) };
    let result = blocks(source, cancelled, &mut |offset, data| writer.write(offset, data));
    set_direct(target, false);
    result
}

struct Writer<'a> {
    target: &'a File,
    direct: bool,
}

impl Writer<'_> {
    fn write(&mut self, mut offset: u64, mut data: &[u8]) -> Result<()> {
        while !data.is_empty() {
            match self.target.write_at(data, offset) {
                Ok(0) => return Err(Errno::NOSPC.into()),
                Ok(n) => {
                    (offset, data) = (offset + n as u64, &data[n..]);
                    if self.direct && n % ALIGN != 0 {
                        self.direct = set_direct(self.target, false);
                    }
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                // A file system that takes the flag and not the write.
                Err(e) if self.direct && e.raw_os_error() == Some(libc::EINVAL) => {
                    self.direct = set_direct(self.target, false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }
}

/// Whether O_DIRECT is set now.
fn set_direct(file: &File, on: bool) -> bool {
    let Ok(flags) = rustix::fs::fcntl_getfl(file) else { return false };
    let wanted = if on { flags | OFlags::DIRECT } else { flags - OFlags::DIRECT };
    rustix::fs::fcntl_setfl(file, wanted).is_ok() && on
}

/// SHA-256 of a disk's content, as lower-case hex: of each block that is not zero, and its offset. It does not depend
/// on where holes are, nor on zeros at the end.
pub fn digest(source: &File, cancelled: &Cancelled) -> Result<String> {
    let mut hash = Sha256::new();
    blocks(source, cancelled, &mut |offset, data| {
        for (block, n) in data.chunks(BLOCK).zip(0u64..) {
            hash.update((offset + n * BLOCK as u64).to_le_bytes());
            hash.update(block);
            // The last block of a source that ends within it.
            hash.update(&ZEROS[block.len()..]);
        }
        Ok(())
    })?;
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Calls `take` for runs of blocks that are not zero, in order: an offset (of whole blocks), and the data, in memory
/// aligned to 4096 bytes and a multiple of it long (a source's end is filled up with zeros).
pub fn blocks(
    source: &File,
    cancelled: &Cancelled,
    take: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let end = length(source)?;
    let mut memory = vec![0u8; CHUNK + ALIGN];
    let start = memory.as_ptr().align_offset(ALIGN);
    let buffer = &mut memory[start..start + CHUNK];
    let mut at = 0u64;
    while at < end {
        cancelled.check()?;
        let Some((from, to)) = data_after(source.as_fd(), at, end)? else { break };
        // To whole blocks, but never back to what was taken already.
        at = at.max(from - from % BLOCK as u64);
        let to = to.next_multiple_of(BLOCK as u64).min(end);
        while at < to {
            cancelled.check()?;
            let want = ((to - at) as usize).min(CHUNK);
            source.read_exact_at(&mut buffer[..want], at).context("reading")?;
            let filled = want.next_multiple_of(ALIGN);
            buffer[want..filled].fill(0);
            not_zero(&buffer[..filled], &mut |n, data| take(at + n as u64, data))?;
            at += want as u64;
        }
        // Where the end of the source is no multiple of a block.
        at = at.next_multiple_of(BLOCK as u64);
    }
    Ok(())
}

/// Runs of blocks that are not zero.
pub(crate) fn not_zero(data: &[u8], take: &mut dyn FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
    let mut run = 0..0;
    for start in (0..data.len()).step_by(BLOCK) {
        let end = (start + BLOCK).min(data.len());
        if data[start..end] == ZEROS[..end - start] {
            continue;
        }
        if run.end != start {
            if !run.is_empty() {
                take(run.start, &data[run.clone()])?;
            }
            run.start = start;
        }
        run.end = end;
    }
    if run.is_empty() { Ok(()) } else { take(run.start, &data[run.clone()]) }
}

/// The next range that holds data, as far as the file system knows.
pub(crate) fn data_after(source: BorrowedFd<'_>, at: u64, end: u64) -> Result<Option<(u64, u64)>> {
    let from = match rustix::fs::seek(source, SeekFrom::Data(at)) {
        Ok(from) => from,
        Err(Errno::NXIO) => return Ok(None),
        // A block device, or a file system that does not know holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, end))),
        Err(e) => return Err(e).context("looking for data"),
    };
    let to = rustix::fs::seek(source, SeekFrom::Hole(from)).context("looking for the end of data")?;
    Ok(Some((from, to.clamp(from + 1, end.max(from + 1)))))
}

/// What a full copy takes at least, where that is known.
fn needed(source: &File) -> Result<u64> {
    let metadata = source.metadata()?;
    // Most of a device may be zeros: nobody knows before it was read.
    Ok(if metadata.file_type().is_block_device() { 0 } else { allocated(source) })
}

/// What the data of a file takes on its disk, in bytes.
pub fn allocated(source: &File) -> u64 {
    source.metadata().map_or(0, |m| if m.is_file() { m.blocks() * 512 } else { length(source).unwrap_or(0) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    fn random(bytes: &mut [u8]) {
        rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
    }

    fn number(below: u64) -> u64 {
        let mut bytes = [0; 8];
        random(&mut bytes);
        u64::from_le_bytes(bytes) % below
    }

    /// A file with data, written zeros and holes at random places.
    fn sparse_file(dir: &Path, length: u64) -> File {
        let file =
            File::options().read(true).write(true).create(true).truncate(true).open(dir.join("s")).unwrap();
        file.set_len(length).unwrap();
        for _ in 0..number(6) {
            let mut data = vec![0; 1 + number(200_000.min(length)) as usize];
            if number(3) > 0 {
                random(&mut data);
            }
            file.write_all_at(&data, number(length - data.len() as u64 + 1)).unwrap();
        }
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut data = vec![0; length(file).unwrap() as usize];
        file.read_exact_at(&mut data, 0).unwrap();
        data
    }

    #[test]
    fn copies_are_equal_and_digests_see_content_alone() {
        let dir = tempfile::tempdir().unwrap();
        for round in 0..60 {
            let length = 1 + number(if round % 5 == 0 { 9 << 20 } else { 700_000 });
            let source = sparse_file(dir.path(), length);
            let size = length + number(3) * number(300_000);
            let cancelled = Cancelled::default();
            let copied = copy(&source, size, dir.path(), &cancelled).unwrap();
            let mut expected = content(&source);
            expected.resize(size as usize, 0);
            assert!(content(copied.file()) == expected, "length {length}, size {size}");
            let of_source = digest(&source, &cancelled).unwrap();
            assert_eq!(of_source, digest(copied.file(), &cancelled).unwrap(), "length {length}, size {size}");
            // All data, no hole: the same digest.
            std::fs::write(dir.path().join("full"), &expected).unwrap();
            let full = File::open(dir.path().join("full")).unwrap();
            assert_eq!(of_source, digest(&full, &cancelled).unwrap());
            // One byte else: another one.
            let at = number(length);
            expected[at as usize] ^= 1;
            std::fs::write(dir.path().join("full"), &expected).unwrap();
            assert_ne!(of_source, digest(&File::open(dir.path().join("full")).unwrap(), &cancelled).unwrap());
        }
        let names: Vec<_> = dir.path().read_dir().unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "a copy has no name: {names:?}");
    }

    #[test]
    fn holes_stay_holes_and_zeros_become_holes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let source = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        source.set_len(1 << 30).unwrap();
        for at in [0, 100 << 20, (1 << 30) - 4096] {
            source.write_all_at(&[7; 4096], at).unwrap();
        }
        source.write_all_at(&vec![0; 8 << 20], 200 << 20).unwrap();
        source.sync_all().unwrap();
        let copied = copy(&source, 2 << 30, dir.path(), &Cancelled::default()).unwrap();
        copied.file().sync_all().unwrap();
        let metadata = copied.file().metadata().unwrap();
        assert_eq!(metadata.len(), 2 << 30);
        assert!(metadata.blocks() * 512 <= 4 * BLOCK as u64, "{} bytes", metadata.blocks() * 512);
        let mut byte = [0];
        for at in [0, 100 << 20, (1 << 30) - 1] {
            copied.file().read_exact_at(&mut byte, at).unwrap();
            assert_eq!(byte, [7], "at {at}");
        }
    }

    #[test]
    fn names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x");
        let temp = Temp::new(dir.path()).unwrap();
        temp.file().write_all_at(b"one", 0).unwrap();
        temp.link(&path).unwrap();
        assert!(Temp::new(dir.path()).unwrap().link(&path).is_err(), "the name is taken");
        let temp = Temp::named(dir.path()).unwrap();
        assert!(temp.link(&path).is_err(), "the name is taken");
        let temp = Temp::named(dir.path()).unwrap();
        temp.file().write_all_at(b"two", 0).unwrap();
        temp.replace(&path).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"two");
        drop(Temp::named(dir.path()).unwrap());
        std::fs::create_dir(dir.path().join("y")).unwrap();
        for temp in [Temp::new(dir.path()), Temp::named(dir.path())] {
            assert!(temp.unwrap().replace(&dir.path().join("y")).is_err(), "that is a directory");
        }
        assert_eq!(dir.path().read_dir().unwrap().count(), 2, "x and y");
    }

    #[tokio::test]
    async fn dropping_the_future_stops_the_work() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let work = blocking(move |cancelled| {
            while cancelled.check().is_ok() {
                std::thread::yield_now();
            }
            sender.send(()).unwrap();
            Ok(())
        });
        assert!(tokio::time::timeout(std::time::Duration::from_millis(20), work).await.is_err());
        receiver.recv_timeout(std::time::Duration::from_secs(10)).expect("the work goes on");
    }

    #[test]
    fn no_space_says_where_and_how_much() {
        let error = no_space(Path::new("/"), 5 << 20);
        let text = format!("{error:#}");
        assert!(
            text.starts_with("no space left in /: 5 MiB are needed, ") && text.ends_with(" is free"),
            "{text}"
        );
        assert_eq!(Kind::of(&error), Kind::Machine);
    }
}
