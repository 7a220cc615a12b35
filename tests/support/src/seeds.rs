//! Runs tests with many seeds.

use crate::ring;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

pub fn full() -> bool {
    std::env::var_os("OVEN_TEST_FULL").is_some()
}

/// Returns the seeds of a test. With OVEN_TEST_FULL, returns `all` seeds. Otherwise returns the first `fixed` seeds and
/// `fresh` new ones. OVEN_TEST_SEED repeats a single seed.
pub fn seeds(all: u64, fixed: u64, fresh: u64) -> Vec<u64> {
    if let Ok(one) = std::env::var("OVEN_TEST_SEED") {
        return vec![one.parse().unwrap()];
    }
    if full() {
        return (0..all).collect();
    }
    let new = (0..fresh).map(|_| {
        let digits = &oven::ids::RunId::new().0[..8];
        u64::from(u32::from_str_radix(digits, 16).unwrap())
    });
    (0..fixed).chain(new).collect()
}

/// Runs the test with each value, several at a time, because a bake waits most of its time. Runs all of them even if
/// some fail, and fails at the end.
pub fn each<T: Sync>(all: &[T], test: impl Fn(&T) + Sync) {
    let _ring = ring::shared();
    let (next, failed) = (AtomicUsize::new(0), AtomicUsize::new(0));
    std::thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if catch_unwind(AssertUnwindSafe(|| test(one))).is_err() {
                        failed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    assert_eq!(failed.into_inner(), 0, "of {} failed, as printed above", all.len());
}

const WORKERS: usize = 3;

#[allow(clippy::disallowed_methods, reason = "a test has no runtime to block")]
/// Waits for a time. To wait for a condition, use [`crate::until`].
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// A small random generator. A seed determines all of its numbers.
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self, sides: usize) -> usize {
        // Seeds are small consecutive numbers, so they are mixed (splitmix64). Otherwise their results would also be
        // similar.
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((mixed ^ (mixed >> 31)) >> 33) as usize % sides
    }

    pub fn of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.roll(all.len())]
    }
}
