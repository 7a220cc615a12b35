//! The times that a file can have if the bake created or wrote it.

use crate::image::file_version::{Nanoseconds, nanoseconds};
use anyhow::{Context, Result};
use std::ops::RangeInclusive;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const SECOND: Nanoseconds = 1_000_000_000;
/// How much later than expected a time may be. The clock for files and the other clocks are not read together.
const LATE_MAX: Nanoseconds = SECOND;

/// The moment before the first step of a bake.
pub struct BakeMoment {
    files: Nanoseconds,
    instant: Instant,
}

/// The times that the clock for files showed during the bake.
///
/// The clock may be set once during the bake. Before that, it showed the times since the bake's start. Afterwards, it
/// shows the times that end now. So there are two ranges, each as long as the bake took. Usually they are the same. There
/// is no margin before the bake's start, because files of a base image that was baked a minute ago would be in it.
pub struct BakePeriod([RangeInclusive<Nanoseconds>; 2]);

impl BakeMoment {
    pub fn now() -> Result<Self> {
        Ok(Self { files: file_clock()?, instant: Instant::now() })
    }

    /// Returns the period from this moment until now.
    pub fn until_now(&self) -> BakePeriod {
        self.until(unix_time(), self.instant.elapsed())
    }

    /// `now` is the time of the machine's clock, and `elapsed` the time since this moment.
    fn until(&self, now: Nanoseconds, elapsed: Duration) -> BakePeriod {
        let elapsed = Nanoseconds::try_from(elapsed.as_nanos()).unwrap_or(Nanoseconds::MAX / 4);
        BakePeriod([self.files..=self.files + elapsed + LATE_MAX, now - elapsed..=now + LATE_MAX])
    }
}

impl BakePeriod {
    pub fn includes(&self, time: Nanoseconds) -> bool {
        // Some file systems record only whole seconds.
        let last = if time % SECOND == 0 { time + SECOND - 1 } else { time };
        self.0.iter().any(|range| *range.start() <= last && time <= *range.end())
    }
}

/// Returns the time that a file would have that is created now. The kernel's clock for files advances only every few
/// milliseconds, so it is behind the clock that programs read.
pub(super) fn file_clock() -> Result<Nanoseconds> {
    let (pipe, _) = rustix::pipe::pipe().context("creating a pipe")?;
    let stat = rustix::fs::fstat(&pipe).context("examining a pipe")?;
    Ok(nanoseconds(stat.st_ctime, stat.st_ctime_nsec))
}

fn unix_time() -> Nanoseconds {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    nanoseconds(now.as_secs(), now.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bake of a minute that began at 1000 s.
    fn period(now: Nanoseconds) -> BakePeriod {
        let start = BakeMoment { files: 1000 * SECOND + 5, instant: Instant::now() };
        start.until(now * SECOND + 7, Duration::from_secs(60))
    }

    #[test]
    fn a_period_has_the_times_of_the_bake_even_if_the_clock_is_set() {
        let included = |now| {
            let period = period(now);
            let times = [400, 450, 462, 999, 1001, 1030, 1060, 1500, 5000, 5050, 9000];
            times.into_iter().filter(|time| period.includes(time * SECOND + 9)).collect::<Vec<_>>()
        };
        assert_eq!(included(1060), [1001, 1030, 1060]);
        assert_eq!(included(460), [400, 450, 1001, 1030, 1060], "it was set back by ten minutes");
        assert_eq!(included(5055), [1001, 1030, 1060, 5000, 5050], "it was set forward");
    }

    #[test]
    fn a_time_in_whole_seconds_may_be_before_the_start() {
        let period = period(1060);
        assert!(period.includes(1000 * SECOND) && !period.includes(1000 * SECOND + 4));
        assert!(!period.includes(999 * SECOND));
    }

    #[test]
    fn a_file_that_is_created_now_is_in_the_period() {
        let dir = tempfile::tempdir().unwrap();
        let time_of = |name: &str| {
            let path = dir.path().join(name);
            std::fs::write(&path, "").unwrap();
            let stat = rustix::fs::stat(&path).unwrap();
            nanoseconds(stat.st_mtime, stat.st_mtime_nsec)
        };
        let before = time_of("before");
        while file_clock().unwrap() <= before {}
        let start = BakeMoment::now().unwrap();
        let after = time_of("after");
        assert!(!start.until_now().includes(before) && start.until_now().includes(after));
    }
}
