use super::*;
use crate::cloud::block_api::SnapshotContents;
use crate::device::Trim;
use crate::disk::direct::block_map;
use crate::disk::direct::block_map::TrimmingByte;
use std::sync::atomic::{AtomicU32, Ordering};

/// A base whose block n is filled with the byte n. It counts the reads.
#[derive(Default)]
struct Base {
    reads: AtomicU32,
    fails: bool,
    failed: Mutex<Vec<Option<i32>>>,
}
impl BaseBlocks for std::sync::Arc<Base> {
    fn read(&self, index: u32, _: usize, buffer: &mut [u8]) -> io::Result<()> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        if self.fails {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        buffer.fill(index as u8);
        Ok(())
    }
    fn report_io_error(&self, error: &io::Error) {
        lock_mutex(&self.failed).push(error.raw_os_error());
    }
}

const BLOCKS: u32 = 8;

struct Ground {
    base: std::sync::Arc<Base>,
    overlay: Overlay<std::sync::Arc<Base>>,
    upper: File,
    marks: File,
}

impl Ground {
    /// The base has six blocks, but only 1, 3 and 5 have data. The disk has two more blocks.
    fn new() -> Self {
        Self::of(Base::default())
    }

    fn of(base: Base) -> Self {
        let (upper, marks) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        upper.set_len(offset_of(BLOCKS, 0)).unwrap();
        let contents = SnapshotContents { size_gib: 1, blocks: [1, 3, 5].into() };
        block_map::create(&marks, BLOCKS, &contents).unwrap();
        let base = std::sync::Arc::new(base);
        let clone = |file: &File| file.try_clone().unwrap();
        let overlay = Overlay::new(base.clone(), clone(&upper), BlockMap::open(clone(&marks)).unwrap());
        Self { base, overlay, upper, marks }
    }

    fn reads(&self) -> u32 {
        self.base.reads.load(Ordering::SeqCst)
    }

    fn written(&self) -> Vec<u32> {
        block_map::written_blocks(&self.marks).unwrap().into_iter().map(|(index, _)| index).collect()
    }

    fn all(&self) -> Vec<u8> {
        let mut all = vec![9; self.overlay.size() as usize];
        self.overlay.read(0, &mut all).unwrap();
        all
    }

    /// Returns the content that an upload would create: the base with the written blocks over it.
    fn sent(&self) -> Vec<u8> {
        let mut all = plain();
        for index in self.written() {
            let at = index as usize * BLOCK;
            self.upper.read_exact_at(&mut all[at..at + BLOCK], at as u64).unwrap();
        }
        all
    }
}

fn plain() -> Vec<u8> {
    let mut all = vec![0; BLOCKS as usize * BLOCK];
    for index in [1, 3, 5] {
        all[index * BLOCK..][..BLOCK].fill(index as u8);
    }
    all
}

fn at(index: u64) -> u64 {
    index * BLOCK as u64
}

#[test]
fn unwritten_blocks_are_the_bases() {
    let ground = Ground::new();
    assert_eq!(ground.reads(), 0);
    assert!(ground.all() == plain());
    assert_eq!(ground.reads(), 3, "blocks that the base lacks are not read");
    assert!(ground.written().is_empty());
}

#[test]
fn partial_writes_copy_the_block_and_whole_ones_do_not() {
    let ground = Ground::new();
    ground.overlay.write(at(2) + 7, &[2]).unwrap();
    ground.overlay.write(at(3), &vec![0; BLOCK]).unwrap();
    assert_eq!(ground.reads(), 0);
    ground.overlay.write(at(5) + 10, &[0; 10]).unwrap();
    assert_eq!(ground.reads(), 1);
    let mut expected = plain();
    expected[2 * BLOCK + 7] = 2;
    expected[3 * BLOCK..][..BLOCK].fill(0);
    expected[5 * BLOCK + 10..][..10].fill(0);
    assert!(ground.all() == expected && ground.sent() == expected);
    assert_eq!(block_map::written_blocks(&ground.marks).unwrap(), [(2, false), (3, true), (5, true)]);
}

#[test]
fn zeroed_ranges_read_as_zeros() {
    let ground = Ground::new();
    ground.overlay.zero(at(1) + 10, at(3) - at(1)).unwrap();
    let mut expected = plain();
    expected[BLOCK + 10..3 * BLOCK + 10].fill(0);
    assert!(ground.all() == expected && ground.sent() == expected);
    assert_eq!(ground.written(), [1, 3], "2 is zeros already");
    // The block is zeroed completely, so nothing is read.
    let ground = Ground::new();
    ground.overlay.zero(at(5), at(1)).unwrap();
    assert_eq!((ground.reads(), ground.written()), (0, vec![5]));
    let mut all = plain();
    all[5 * BLOCK..][..BLOCK].fill(0);
    assert!(ground.all() == all && ground.sent() == all);
}

#[test]
fn trimming_keeps_the_bases_blocks_and_frees_whole_written_ones() {
    let ground = Ground::new();
    for index in [2, 3, 5] {
        ground.overlay.write(at(index), &vec![8; BLOCK]).unwrap();
    }
    let trimming = TrimmingByte::of(ground.marks.try_clone().unwrap());
    let trim = Trim::begin(trimming).unwrap();
    ground.overlay.zero(0, at(5) + 512).unwrap();
    drop(trim);
    assert_eq!(ground.written(), [5], "of 5 a part is in use");
    let mut expected = plain();
    expected[5 * BLOCK..][..512].fill(0);
    expected[5 * BLOCK + 512..][..BLOCK - 512].fill(8);
    assert!(ground.all() == expected && ground.sent() == expected);
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&ground.upper.metadata().unwrap()) / 8, 128);
    // The discarded block 3 is unwritten again, so a write to a part of it copies the base's block.
    ground.overlay.write(at(3) + 1, &[9]).unwrap();
    ground.overlay.zero(at(1), at(1)).unwrap();
    expected[3 * BLOCK + 1] = 9;
    expected[BLOCK..][..BLOCK].fill(0);
    assert!(ground.all() == expected && ground.sent() == expected);
}

#[test]
fn random_writes_have_the_same_result_as_on_a_file() {
    for seed in 0..20u64 {
        let (ground, mut model) = (Ground::new(), plain());
        let mut state = seed;
        let mut roll = |sides: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % sides
        };
        for _ in 0..60 {
            let at = roll(ground.overlay.size() / 512) * 512;
            let length = ((roll(2600) + 1) * 512).min(ground.overlay.size() - at);
            let (from, to, byte) = (at as usize, (at + length) as usize, roll(3) as u8);
            match roll(3) {
                0 => {
                    ground.overlay.write(at, &vec![byte; length as usize]).unwrap();
                    model[from..to].fill(byte);
                }
                1 => {
                    ground.overlay.zero(at, length).unwrap();
                    model[from..to].fill(0);
                }
                _ => {
                    let mut read = vec![9; length as usize];
                    ground.overlay.read(at, &mut read).unwrap();
                    assert!(read == model[from..to], "seed {seed}");
                }
            }
        }
        assert!(ground.all() == model && ground.sent() == model, "seed {seed}");
    }
}

#[test]
fn writers_of_one_block_do_not_lose_each_others_parts() {
    for round in 0..20 {
        let ground = Ground::new();
        std::thread::scope(|scope| {
            for part in 0..16u64 {
                let overlay = &ground.overlay;
                scope.spawn(move || {
                    for index in [1, 2, 3] {
                        overlay.write(at(index) + part * 4096, &[part as u8 + 100; 4096]).unwrap();
                    }
                });
            }
        });
        let mut expected = plain();
        for index in [1, 2, 3] {
            for part in 0..16 {
                expected[index * BLOCK + part * 4096..][..4096].fill(part as u8 + 100);
            }
        }
        assert!(ground.all() == expected && ground.sent() == expected, "round {round}");
    }
}

#[test]
fn an_unreadable_block_is_not_written_partially() {
    let ground = Ground::of(Base { fails: true, ..Base::default() });
    assert!(ground.overlay.read(at(1), &mut [0; 512]).is_err());
    assert!(ground.overlay.write(at(1), &[1; 512]).is_err(), "the rest of the block cannot be read");
    assert!(ground.overlay.zero(at(1), 512).is_err());
    assert!(ground.written().is_empty());
    ground.overlay.write(at(1), &vec![1; BLOCK]).unwrap();
    assert!(ground.overlay.read(ground.overlay.size(), &mut [0; 1]).is_err());
    assert!(ground.overlay.write(ground.overlay.size() - 1, &[0; 2]).is_err());
    assert!(ground.overlay.zero(u64::MAX, 2).is_err());
    assert_eq!(*lock_mutex(&ground.base.failed), [], "an unreadable base is no failed write");
}

#[test]
fn a_failed_write_is_reported() {
    let mut ground = Ground::new();
    ground.overlay.upper = File::options().write(true).open("/dev/full").unwrap();
    assert!(ground.overlay.write(at(2), &[1; 512]).is_err());
    assert_eq!(*lock_mutex(&ground.base.failed), [Some(libc::ENOSPC)]);
    assert!(ground.written().is_empty(), "it is not marked");
}
