//! Limits for everything that oven reads from an image.
//!
//! The disk limits the size of an image's data. But an image can contain more than its disk stores: holes, compressed
//! data, hard links, and symlinks to one large file. So oven counts everything that it reads, and fails at a limit. A
//! [`ReadMeter`] also ends a read when a signal asks this process to end.

use crate::error::Kind;
use crate::sys::lock::lock_mutex;
use crate::sys::signals;
use crate::text::escape_name;
use anyhow::Result;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The maximum size in bytes of the paths that a visitor of a walk stores. 10,000 usual paths have about 1 MiB.
const STORED_MAX: usize = 16 << 20;

/// The limits for the reads of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReadLimits {
    /// The time that all reads may take. The other limits end a hostile image within seconds, so this limit is only a
    /// safeguard. The longest read is the search for secrets. It reads only files that the bake wrote, and a volume of
    /// EBS reads 125 MB/s or more, so 30 minutes are enough for 200 GiB of new files.
    pub time: Duration,
    /// The number of objects that may be listed or examined. An image may have more objects than this. Then the limit
    /// is eight times the number of its inodes, because several searches of a bake examine the same objects.
    pub objects: u64,
    /// The size in bytes of all files that are read into memory, such as `/etc/passwd`. They have a few MiB together.
    pub content: u64,
    /// The size in bytes of all initramfs files after decompression. One initramfs has at most about 400 MiB, and a bake
    /// reads only new ones.
    pub unpacked: u64,
    /// The memory in bytes for the names and the path that oven stores while it lists, walks or empties directories: the
    /// names in the current directory and in those above it. A directory with a million names of usual lengths needs
    /// about 60 MiB.
    pub names: usize,
    /// The length in bytes of a path. The kernel permits 4096 bytes in a call, but a tree can be deeper.
    pub path: usize,
}

impl Default for ReadLimits {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(30 * 60),
            objects: 10_000_000,
            content: 256 << 20,
            unpacked: 4 << 30,
            names: 96 << 20,
            path: 4 << 20,
        }
    }
}

/// Counts what oven reads from an image.
#[derive(Debug)]
pub struct ReadMeter {
    limits: ReadLimits,
    is_stop_requested: fn() -> bool,
    objects: AtomicU64,
    content: AtomicU64,
    unpacked: AtomicU64,
    /// Whether a step ran in the image. Before the first step, everything in the image is from the base.
    step_ran: AtomicBool,
    clock: Mutex<ReadClock>,
}

/// Measures the time of reads. Reads may be nested.
#[derive(Debug, Default)]
struct ReadClock {
    running: u32,
    since: Option<Instant>,
    before: Duration,
}

impl ReadClock {
    fn total(&self) -> Duration {
        self.before + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

/// The time until this value is dropped counts as time of reads.
#[derive(Debug)]
#[must_use]
pub struct ReadTimer<'m>(&'m ReadMeter);

impl Drop for ReadTimer<'_> {
    fn drop(&mut self) {
        let mut clock = lock_mutex(&self.0.clock);
        clock.running -= 1;
        if clock.running == 0 {
            clock.before = clock.total();
            clock.since = None;
        }
    }
}

impl Default for ReadMeter {
    fn default() -> Self {
        Self::new(ReadLimits::default(), signals::is_stop_requested)
    }
}

impl ReadMeter {
    /// `is_stop_requested` returns whether a signal asked this process to end.
    pub fn new(limits: ReadLimits, is_stop_requested: fn() -> bool) -> Self {
        let (objects, content, unpacked) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let (step_ran, clock) = (AtomicBool::new(false), Mutex::default());
        Self { limits, is_stop_requested, objects, content, unpacked, step_ran, clock }
    }

    pub fn limits(&self) -> &ReadLimits {
        &self.limits
    }

    /// Records that a step is about to run. From now on, the step may have caused what exceeds a limit.
    pub fn note_step(&self) {
        self.step_ran.store(true, Ordering::Relaxed);
    }

    /// Starts to measure the time of a read.
    pub fn start(&self) -> ReadTimer<'_> {
        let mut clock = lock_mutex(&self.clock);
        clock.running += 1;
        if clock.since.is_none() {
            clock.since = Some(Instant::now());
        }
        ReadTimer(self)
    }

    /// Call this at least once for every few MiB that are read.
    ///
    /// Errors: `Interrupted` if a signal asked this process to end; the error of [`Self::exceeded`] if all reads took
    /// too long.
    pub fn check(&self) -> Result<()> {
        signals::interrupt_if((self.is_stop_requested)())?;
        let limit = self.limits.time;
        if lock_mutex(&self.clock).total() > limit {
            let limit = humantime::format_duration(limit);
            return Err(self.exceeded(format!("reading the image's files took longer than {limit}")));
        }
        Ok(())
    }

    /// Counts an object that is listed or examined. `inodes` returns the number of inodes that the image uses.
    pub fn count_object(&self, inodes: impl FnOnce() -> u64) -> Result<()> {
        let objects = self.objects.fetch_add(1, Ordering::Relaxed);
        if objects >= self.limits.objects && objects >= inodes().saturating_mul(8) {
            let limit = self.limits.objects;
            return Err(self.exceeded(format!(
                "the image has too many files, directories or links: oven examined more than {limit} of them"
            )));
        }
        self.check()
    }

    /// Counts bytes of files that are read into memory.
    pub fn count_content(&self, bytes: u64) -> Result<()> {
        let what = "the files of the image that oven reads";
        self.count_bytes(&self.content, bytes, self.limits.content, what)
    }

    /// Counts bytes of an initramfs, both packed and unpacked.
    pub fn count_unpacked(&self, bytes: u64) -> Result<()> {
        let what = "the image's initramfs files after decompression";
        self.count_bytes(&self.unpacked, bytes, self.limits.unpacked, what)
    }

    fn count_bytes(&self, counter: &AtomicU64, bytes: u64, limit: u64, what: &str) -> Result<()> {
        let before = counter.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) > limit {
            return Err(self.exceeded(format!("{what} have more than {} MiB together", limit >> 20)));
        }
        self.check()
    }

    /// Returns the error for an image that exceeds a limit. Before the first step, the base image is wrong
    /// (`Definition`). Afterwards, the bake may have added what exceeds the limit (`Step`).
    pub fn exceeded(&self, what: impl std::fmt::Display) -> anyhow::Error {
        if self.step_ran.load(Ordering::Relaxed) {
            let hint =
                "A package or a script of this bake, or the base image, made it. Remove it in a script.";
            return Kind::Step.failure(what).hint(hint).into();
        }
        let hint = "The base image is damaged, or was made to harm the builder. Bake on another image.";
        Kind::Definition.failure(what).hint(hint).into()
    }
}

/// Limits the memory for the paths that the visitor of a walk stores. A path may be much longer than the kernel permits.
#[derive(Debug)]
pub struct StoredPaths<'a> {
    meter: &'a ReadMeter,
    /// The directory that is walked, for the error message.
    top: &'a str,
    size: usize,
}

impl<'a> StoredPaths<'a> {
    pub fn new(meter: &'a ReadMeter, top: &'a str) -> Self {
        Self { meter, top, size: 0 }
    }

    /// Counts a path that is stored. Fails if all paths together have more than 16 MiB.
    pub fn count(&mut self, path: &str) -> Result<()> {
        self.size = self.size.saturating_add(path.len());
        if self.size > STORED_MAX {
            let (top, max) = (escape_name(self.top), STORED_MAX >> 20);
            let what = format!("the paths below {top} in the image have more than {max} MiB together");
            return Err(self.meter.exceeded(what));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEVER: fn() -> bool = || false;

    fn meter(change: impl FnOnce(&mut ReadLimits)) -> ReadMeter {
        let mut limits = ReadLimits::default();
        change(&mut limits);
        ReadMeter::new(limits, NEVER)
    }

    #[test]
    fn each_limit_is_an_error_with_the_kind_of_who_is_at_fault() {
        let objects = meter(|limits| limits.objects = 2);
        let content = meter(|limits| limits.content = 2);
        let unpacked = meter(|limits| limits.unpacked = 2);
        let counts: [(&ReadMeter, &dyn Fn() -> Result<()>); 3] = [
            (&objects, &|| objects.count_object(|| 0)),
            (&content, &|| content.count_content(1)),
            (&unpacked, &|| unpacked.count_unpacked(1)),
        ];
        for (meter, count) in counts {
            count().unwrap();
            count().unwrap();
            assert_eq!(Kind::of(&count().unwrap_err()), Kind::Definition);
            meter.note_step();
            assert_eq!(Kind::of(&count().unwrap_err()), Kind::Step);
        }
        assert!(content.count_content(u64::MAX).is_err(), "the sum overflows");
    }

    #[test]
    fn stored_paths_have_a_limit_in_bytes() {
        let meter = meter(|_| ());
        let mut stored = StoredPaths::new(&meter, "/a\nb");
        let path = "x".repeat(STORED_MAX / 4);
        (0..4).for_each(|_| stored.count(&path).unwrap());
        let error = stored.count("x").unwrap_err();
        assert_eq!(error.to_string(), "the paths below /a\\nb in the image have more than 16 MiB together");
        assert_eq!(Kind::of(&error), Kind::Definition);
    }

    #[test]
    fn an_image_with_many_inodes_may_have_many_objects() {
        let objects = meter(|limits| limits.objects = 2);
        // The clean-up, the lint and the search for secrets examine some objects five times or more.
        (0..80).for_each(|_| objects.count_object(|| 10).unwrap());
        assert!(objects.count_object(|| 10).is_err());
    }

    #[test]
    fn only_the_time_of_reads_counts() {
        let meter = meter(|limits| limits.time = Duration::ZERO);
        meter.check().unwrap();
        let outer = meter.start();
        drop(meter.start());
        // The clock of the machine may be coarse.
        while lock_mutex(&meter.clock).total() == Duration::ZERO {}
        let error = meter.check().unwrap_err();
        assert!(error.to_string().starts_with("reading the image's files took longer than 0s"), "{error}");
        drop(outer);
        let total = lock_mutex(&meter.clock).total();
        std::thread::yield_now();
        assert_eq!(lock_mutex(&meter.clock).total(), total);
    }

    #[test]
    fn a_stop_ends_every_count() {
        let meter = ReadMeter::new(ReadLimits::default(), || true);
        for ended in
            [meter.count_object(|| 0), meter.count_content(1), meter.count_unpacked(1), meter.check()]
        {
            assert_eq!(Kind::of(&ended.unwrap_err()), Kind::Interrupted);
        }
    }
}
