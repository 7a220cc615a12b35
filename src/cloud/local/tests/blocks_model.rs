//! Random block-level operations on snapshots, compared with a model of their contents.

use super::blocks::{age, block, linear, new};
use super::*;
use crate::cloud::block_api::{BlockApi, BlockIndexes, NewSnapshot};
use crate::cloud::local::pending_snapshot::SnapshotState;
use crate::ids::{BLOCK, Digest};
use std::collections::BTreeSet;
use std::sync::Arc;

/// The number of random sequences with fixed seeds is `SAMPLE`, or `FIXED` if `OVEN_TEST_FULL` is set. `FRESH` more
/// sequences have new seeds. Every tenth sequence runs on a disk. The others run in memory, which is faster.
const FIXED: u64 = 180;
const SAMPLE: u64 = 40;
const FRESH: u64 = 20;
const STEPS: usize = 30;

/// The random number generator SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }

    fn of<'a, T>(&mut self, all: &'a [T]) -> Option<&'a T> {
        if all.is_empty() { None } else { all.get(self.below(all.len() as u64) as usize) }
    }
}

#[derive(Clone, Default)]
struct Model {
    size_gib: u64,
    /// The parent's blocks. The values are indexes into [`kinds`]. Blocks of zeros are left out.
    parent: BTreeMap<u32, usize>,
    put: BTreeMap<u32, usize>,
    state: State,
}

#[derive(Clone, Copy, Default, PartialEq)]
enum State {
    #[default]
    Pending,
    Expired,
    Completed,
}

impl Model {
    fn holds(&self) -> BTreeMap<u32, usize> {
        let mut all = self.parent.clone();
        all.extend(&self.put);
        all.retain(|_, what| *what != 0);
        all
    }
}

/// Returns the blocks that are put: zeros, full blocks, and a block that is mostly zeros.
fn kinds() -> Vec<(Arc<[u8]>, Digest)> {
    let mut sparse = vec![0; BLOCK];
    sparse[300_000..300_100].fill(4);
    let sparse: Arc<[u8]> = sparse.into();
    let digest = crate::ids::digest_of(&sparse);
    vec![block(0), block(1), block(2), block(3), (sparse, digest)]
}

struct Run {
    f: Fixture,
    kinds: Vec<(Arc<[u8]>, Digest)>,
    known: BTreeMap<SnapshotId, Model>,
    run: RunId,
}

impl Run {
    async fn begin(on_disk: bool) -> Self {
        let memory = std::path::Path::new("/dev/shm");
        let dir =
            if on_disk || !memory.is_dir() { tempfile::tempdir() } else { tempfile::tempdir_in(memory) };
        let dir = dir.unwrap();
        let region = Region::open(&dir.path().join("region")).unwrap();
        let (f, run) = (Fixture { region, dir }, RunId::new());
        let kinds = kinds();
        let first = f.region.start(&new(None, &run)).await.unwrap();
        let mut model = Model { size_gib: 1, state: State::Completed, ..Model::default() };
        for (index, what) in [(0, 1), (1, 4), (2, 2), (9, 3)] {
            let (data, digest) = kinds[what].clone();
            f.region.put(&first, index, data, digest).await.unwrap();
            model.put.insert(index, what);
        }
        let all = Self { f, kinds, known: BTreeMap::from([(first.clone(), model)]), run };
        let (count, checksum) = all.seal(&first);
        all.f.region.complete(&first, count, checksum).await.unwrap();
        all.check(&first).await;
        all
    }

    /// The values that a snapshot has to be completed with.
    fn seal(&self, id: &SnapshotId) -> (u32, Digest) {
        let digests: Vec<_> = self.known[id].put.values().map(|what| self.kinds[*what].1).collect();
        (digests.len() as u32, linear(&digests))
    }

    fn in_state(&self, wanted: &[State]) -> Vec<SnapshotId> {
        let fits = self.known.iter().filter(|(_, model)| wanted.contains(&model.state));
        fits.map(|(id, _)| id.clone()).collect()
    }

    async fn step(&mut self, random: &mut Random) {
        let any = self.in_state(&[State::Pending, State::Expired, State::Completed]);
        let pending = self.in_state(&[State::Pending]);
        let region = self.f.region.clone();
        match random.below(20) {
            0..3 => self.start(random).await,
            3..11 => {
                let chosen = if random.below(8) == 0 { random.of(&any) } else { random.of(&pending) };
                let Some(id) = chosen else { return };
                let index = [0, 1, 2, 3, 4, 9, 2047, 2048][random.below(8) as usize];
                let what = random.below(5) as usize;
                let (data, mut digest) = self.kinds[what].clone();
                let wrong = random.below(10) == 0;
                digest[0] ^= u8::from(wrong);
                let put = region.put(id, index, data, digest).await;
                let model = self.known.get_mut(id).unwrap();
                let inside = u64::from(index) < model.size_gib * 2048;
                assert_eq!(put.is_ok(), model.state == State::Pending && inside && !wrong, "{put:?}");
                if put.is_ok() {
                    model.put.insert(index, what);
                }
            }
            11..15 => {
                let chosen = if random.below(4) == 0 { random.of(&any) } else { random.of(&pending) };
                let Some(id) = chosen else { return };
                let (mut count, mut checksum) = self.seal(id);
                let wrong = random.below(5);
                count += u32::from(wrong == 0);
                checksum[31] ^= u8::from(wrong == 1);
                let completed = region.complete(id, count, checksum).await;
                let model = self.known.get_mut(id).unwrap();
                assert_eq!(completed.is_ok(), model.state != State::Expired && wrong > 1, "{completed:?}");
                if completed.is_ok() {
                    model.state = State::Completed;
                    self.check(id).await;
                }
            }
            15 => {
                let Some(id) = random.of(&pending) else { return };
                age(&region, id, 2 * WRITE_TIMEOUT);
                self.known.get_mut(id).unwrap().state = State::Expired;
            }
            16 => {
                let Some(id) = random.of(&any).filter(|_| any.len() > 1) else { return };
                region.delete_snapshot(id).await.unwrap();
                self.known.remove(id);
                refuses(region.snapshot_state(id), Kind::NotFound, "InvalidSnapshot.NotFound");
            }
            // Opens the region again, as another process would.
            17 => self.f.region = Region::open(region.dir()).unwrap(),
            18 => {
                let Some(id) = random.of(&any) else { return };
                let model = &self.known[id];
                let volume = VolumeSpec {
                    snapshot: id.clone(),
                    size_gib: 2,
                    kind: Default::default(),
                    run: RunId::new(),
                    tags: Tags::new(),
                };
                let created = region.create(&volume).await;
                assert_eq!(created.is_ok(), model.state == State::Completed, "{created:?}");
                region.ensure_no_volumes(&volume.run).await.unwrap();
            }
            _ => {
                let Some(id) = random.of(&any) else { return };
                self.check(id).await;
            }
        }
    }

    async fn start(&mut self, random: &mut Random) {
        let any = self.in_state(&[State::Pending, State::Expired, State::Completed]);
        let parent = if random.below(4) == 0 { None } else { random.of(&any).cloned() };
        let size_gib = 1 + random.below(2);
        let spec = NewSnapshot { size_gib, ..new(parent.as_ref(), &self.run) };
        if let Some(parent) = parent.as_ref().filter(|_| random.below(2) == 0) {
            // This is what a bake does before it starts a snapshot.
            let asked = self.f.region.parent(parent, &Default::default()).await;
            assert_eq!(asked.is_ok(), self.known[parent].state == State::Completed, "{asked:?}");
        }
        let started = self.f.region.start(&spec).await;
        let below = parent.map_or_else(Model::default, |id| self.known[&id].clone());
        let allowed = spec.parent.is_none() || below.state == State::Completed && below.size_gib <= size_gib;
        assert_eq!(started.is_ok(), allowed, "{started:?}");
        if let Ok(id) = started {
            let model = Model { size_gib, parent: below.holds(), ..Model::default() };
            self.known.insert(id, model);
        }
    }

    /// Compares a snapshot with the model.
    async fn check(&self, id: &SnapshotId) {
        let (region, model) = (&self.f.region, &self.known[id]);
        let state = region.snapshot_state(id).unwrap();
        let expected = match state {
            SnapshotState::Pending => State::Pending,
            SnapshotState::Error(_) => State::Expired,
            SnapshotState::Completed => State::Completed,
        };
        assert!(model.state == expected, "{id}: {state:?}");
        let put: BTreeMap<_, _> =
            model.put.iter().map(|(index, what)| (*index, self.kinds[*what].1)).collect();
        assert_eq!(region.put_blocks(id).unwrap(), put);
        if model.state != State::Completed {
            assert!(region.contents(id).await.is_err());
            return;
        }
        let holds = model.holds();
        let contents = region.contents(id).await.unwrap();
        let blocks: BlockIndexes = holds.keys().chain(model.put.keys()).copied().collect();
        assert_eq!((contents.size_gib, &contents.blocks), (model.size_gib, &blocks));
        let (reader, data) = (region.reader(id).await.unwrap(), self.f.data(&id.0));
        assert_eq!(data.metadata().unwrap().len(), model.size_gib << 30);
        let mut found = vec![0; BLOCK];
        for index in [0, 1, 2, 3, 4, 9, 10, 2047].into_iter().chain(blocks.iter()) {
            let (expected, digest) = &self.kinds[holds.get(&index).copied().unwrap_or(0)];
            data.read_exact_at(&mut found, u64::from(index) * BLOCK as u64).unwrap();
            assert!(found[..] == expected[..], "block {index} of {id}");
            let read = reader.read(index);
            assert_eq!(read.is_ok(), blocks.contains(index), "block {index} of {id}");
            assert!(read.is_err() || read.unwrap() == (expected.to_vec(), *digest), "block {index} of {id}");
        }
    }

    /// Asserts that only known resources exist, and that nothing remains after the run's clean-up.
    async fn end(self) {
        let snapshots = self.f.region.dir().join("snapshots");
        self.f.region.stale_runs(None).await.unwrap();
        let mut expected = BTreeSet::new();
        for (id, model) in &self.known {
            self.check(id).await;
            expected.extend(["img", "json", "put"].map(|ending| format!("{id}.{ending}")));
            let parent = format!("{id}.parent");
            if model.state != State::Completed && snapshots.join(&parent).exists() {
                expected.insert(parent);
            }
        }
        let names = snapshots.read_dir().unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        assert_eq!(names.collect::<BTreeSet<_>>(), expected);
        self.f.region.ensure_no_snapshots(&self.run).await.unwrap();
        assert_eq!((self.f.files("snapshots"), self.f.files("volumes")), (0, 0));
    }
}

#[test]
fn random_operations_do_what_the_model_says() {
    let fresh = Random(now()).below(u64::MAX - FRESH);
    let fixed = if std::env::var_os("OVEN_TEST_FULL").is_some() { FIXED } else { SAMPLE };
    let seeds: Vec<u64> = match std::env::var("OVEN_TEST_SEED") {
        Ok(one) => vec![one.parse().unwrap()],
        Err(_) => (0..fixed).chain(fresh..fresh + FRESH).collect(),
    };
    for seed in seeds {
        eprintln!("OVEN_TEST_SEED={seed}");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (mut run, mut random) = (Run::begin(seed % 10 == 0).await, Random(seed));
            for _ in 0..STEPS {
                run.step(&mut random).await;
            }
            run.end().await;
        });
    }
}
