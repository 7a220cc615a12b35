use super::*;
use crate::cloud::SnapshotId;
use crate::disk::cache::Cache;
use std::sync::atomic::AtomicU32;

/// A base whose block n is full of n, and counts what is read of it.
struct Base {
    reads: AtomicU32,
    fails: bool,
}
impl Reader for Base {
    fn read(&self, index: u32) -> Result<(Vec<u8>, Digest)> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        anyhow::ensure!(!self.fails, "the network is away");
        let data = vec![index as u8; BLOCK];
        let digest = digest_of(&data);
        Ok((data, digest))
    }
}

struct Ground {
    dir: tempfile::TempDir,
    base: Arc<Base>,
}

const BLOCKS: u64 = 8;

impl Ground {
    fn new() -> Self {
        let base = Arc::new(Base { reads: AtomicU32::new(0), fails: false });
        Self { dir: tempfile::tempdir().unwrap(), base }
    }

    /// The base has the blocks 1, 3 and 5 of six; the disk is larger by two.
    fn overlay(&self) -> Overlay {
        let contents = Contents { size_gib: 1, blocks: [1, 3, 5].into() };
        let cached = Cache::new(self.dir.path(), u64::MAX).of(&SnapshotId("snap-1".into())).unwrap();
        let lower = Arc::new(Lower::new(&contents, self.base.clone(), cached));
        Overlay::new(BLOCKS * BLOCK as u64, lower, tempfile::tempfile().unwrap()).unwrap()
    }

    fn reads(&self) -> u32 {
        self.base.reads.load(Ordering::SeqCst)
    }
}

fn plain() -> Vec<u8> {
    let mut all = vec![0; BLOCKS as usize * BLOCK];
    for index in [1, 3, 5] {
        all[index * BLOCK..][..BLOCK].fill(index as u8);
    }
    all
}

fn all(overlay: &Overlay) -> Vec<u8> {
    let mut all = vec![9; overlay.size() as usize];
    overlay.read(0, &mut all).unwrap();
    all
}

#[test]
fn what_was_never_written_is_the_base_and_is_read_once() {
    let ground = Ground::new();
    let overlay = ground.overlay();
    assert_eq!(ground.reads(), 0);
    assert!(all(&overlay) == plain());
    assert!(all(&overlay) == plain());
    assert_eq!(ground.reads(), 3);
    assert_eq!(overlay.lower().used(), [1, 3, 5]);
    assert!(overlay.written().is_empty());
    // The next bake finds them in the cache.
    assert!(all(&ground.overlay()) == plain());
    assert_eq!(ground.reads(), 3);
}

#[test]
fn only_blocks_that_differ_are_changed() {
    let ground = Ground::new();
    let overlay = ground.overlay();
    let at = |index: u64| index * BLOCK as u64;
    overlay.write(at(0), &[0; 4096]).unwrap(); //                           zeros over zeros
    overlay.write(at(1) + 100, &[1; 100]).unwrap(); //                     what was there already
    overlay.write(at(2) + 7, &[2]).unwrap(); //                            new
    overlay.write(at(3), &vec![0; BLOCK]).unwrap(); //                     zeros over something, whole
    overlay.write(at(5) + 10, &[0; 10]).unwrap(); //                       a part
    assert_eq!(overlay.written(), [0, 1, 2, 3, 5]);
    let changed: Vec<_> = overlay.written().into_iter().filter_map(|i| overlay.changed(i).unwrap()).collect();
    assert_eq!(changed.iter().map(|c| c.index).collect::<Vec<_>>(), [2, 3, 5]);
    assert!(changed[1].data.iter().all(|byte| *byte == 0), "a block that became zero is one that changed");
    assert_eq!((changed[2].data[9], changed[2].data[10], changed[2].data[20]), (5, 0, 5));
    assert!(changed.iter().all(|c| c.digest == digest_of(&c.data)));
    assert_eq!(ground.reads(), 2, "block 3 was overwritten unread");
}

#[test]
fn zeroing_is_exact_and_trimming_leaves_the_base_alone() {
    let ground = Ground::new();
    let at = |index: u64| index * BLOCK as u64;
    let overlay = ground.overlay();
    overlay.write(at(5), &vec![8; BLOCK]).unwrap();
    overlay.trimming(true);
    overlay.zero(0, overlay.size()).unwrap();
    overlay.trimming(false);
    assert_eq!(overlay.written(), [5]);
    let mut expected = plain();
    expected[5 * BLOCK..][..BLOCK].fill(0);
    assert!(all(&overlay) == expected);

    let overlay = ground.overlay();
    overlay.zero(at(1) + 10, at(3) - at(1)).unwrap();
    let mut expected = plain();
    expected[BLOCK + 10..3 * BLOCK + 10].fill(0);
    assert!(all(&overlay) == expected);
    assert_eq!(overlay.written(), [1, 3]);
}

#[test]
fn random_writes_make_what_they_make_of_a_file() {
    for seed in 0..20u64 {
        let ground = Ground::new();
        let (overlay, mut model) = (ground.overlay(), plain());
        let mut state = seed;
        let mut roll = |sides: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % sides
        };
        for _ in 0..60 {
            let at = roll(overlay.size() / 512) * 512;
            let length = ((roll(2600) + 1) * 512).min(overlay.size() - at);
            let (from, to, byte) = (at as usize, (at + length) as usize, roll(3) as u8);
            match roll(3) {
                0 => {
                    overlay.write(at, &vec![byte; length as usize]).unwrap();
                    model[from..to].fill(byte);
                }
                1 => {
                    overlay.zero(at, length).unwrap();
                    model[from..to].fill(0);
                }
                _ => {
                    let mut read = vec![9; length as usize];
                    overlay.read(at, &mut read).unwrap();
                    assert!(read == model[from..to], "seed {seed}");
                }
            }
        }
        assert!(all(&overlay) == model, "seed {seed}");
        // The base with what is sent is the disk.
        let mut sent = plain();
        for index in overlay.written() {
            if let Some(changed) = overlay.changed(index).unwrap() {
                let place = index as usize * BLOCK;
                let known = overlay.lower().digest(index).is_some() || !overlay.lower().has(index);
                assert!(!known || sent[place..place + BLOCK] != changed.data[..], "seed {seed}: {index}");
                sent[place..place + BLOCK].copy_from_slice(&changed.data);
            }
        }
        assert!(sent == model, "seed {seed}");
    }
}

#[test]
fn what_cannot_be_read_is_an_error_with_its_reason() {
    let mut ground = Ground::new();
    ground.base = Arc::new(Base { reads: AtomicU32::new(0), fails: true });
    let overlay = ground.overlay();
    assert!(overlay.read(BLOCK as u64, &mut [0; 512]).is_err());
    assert!(overlay.write(BLOCK as u64, &[1; 512]).is_err(), "half of the block is not known");
    let trouble = format!("{:#}", overlay.lower().trouble().unwrap());
    assert_eq!(trouble, "reading block 1 of the base: the network is away");
    overlay.write(BLOCK as u64, &vec![1; BLOCK]).unwrap();
    assert!(overlay.read(overlay.size(), &mut [0; 1]).is_err());
    assert!(overlay.write(overlay.size() - 1, &[0; 2]).is_err());
}
