//! How far a step is. A step reports only numbers and a name. This module derives the rate and the remaining time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The rate is the average over this time.
const WINDOW: Duration = Duration::from_secs(10);
/// Samples of the rate are at least this far apart.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(200);
/// A step has no rate before it has reported its progress for this time.
const MIN_TIME: Duration = Duration::from_secs(1);

/// A part of a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    pub done: u64,
    /// The total, if it is known.
    pub of: Option<u64>,
}

/// How far a step is. A step sets the fields that it knows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    /// Items that are done, such as packages.
    pub items: Option<Amount>,
    /// The name of the items, in the plural.
    pub unit: String,
    pub bytes: Option<Amount>,
    pub percent: Option<u64>,
    /// The item that is in progress.
    pub name: String,
}

impl Progress {
    pub fn of_bytes(done: u64, of: Option<u64>) -> Self {
        Self { bytes: Some(Amount { done, of }), ..Self::default() }
    }

    pub fn of_items(done: u64, of: u64, unit: &str) -> Self {
        let items = Some(Amount { done, of: Some(of) });
        Self { items, unit: unit.to_owned(), ..Self::default() }
    }

    /// Whether everything is done.
    pub fn is_complete(&self) -> bool {
        let mut amounts = [self.bytes, self.items].into_iter().flatten().peekable();
        amounts.peek().is_some() && amounts.all(|amount| amount.of == Some(amount.done))
    }

    /// The amount that the rate measures.
    fn measured(&self) -> Option<Amount> {
        self.bytes.or(self.items).or(self.percent.map(|done| Amount { done, of: Some(100) }))
    }
}

/// The progress of a step, and how fast it grows.
#[derive(Debug, Default)]
pub struct Meter {
    pub progress: Progress,
    /// The measured amount at earlier times. The first sample is about [`WINDOW`] old, or the first of the step.
    samples: VecDeque<(Instant, u64)>,
    /// How often the measured amount changed.
    changes: usize,
}

impl Meter {
    pub fn set(&mut self, progress: Progress, now: Instant) {
        let amount = progress.measured().map(|amount| amount.done);
        if amount.is_some() && amount != self.progress.measured().map(|amount| amount.done) {
            self.changes = self.changes.wrapping_add(1);
        }
        self.progress = progress;
        let Some(done) = amount else { return };
        if self.samples.back().is_some_and(|(_, before)| *before > done) {
            self.samples.clear(); // the step began again
        }
        let is_new = self.samples.back().is_none_or(|(at, _)| now.duration_since(*at) >= SAMPLE_INTERVAL);
        if is_new {
            self.samples.push_back((now, done));
        }
        while self.samples.get(1).is_some_and(|(at, _)| now.duration_since(*at) >= WINDOW) {
            self.samples.pop_front();
        }
    }

    /// How often the measured amount changed. `None` if the step measures nothing.
    pub fn turns(&self) -> Option<usize> {
        self.progress.measured().map(|_| self.changes)
    }

    /// The growth of the measured amount in a second.
    fn rate(&self, now: Instant) -> Option<f64> {
        let (first, before) = self.samples.front()?;
        let time = now.duration_since(*first);
        let done = self.progress.measured()?.done;
        (time >= MIN_TIME).then(|| done.saturating_sub(*before) as f64 / time.as_secs_f64())
    }

    /// The rate in bytes a second, if the step reports bytes and they grow.
    pub fn bytes_per_second(&self, now: Instant) -> Option<f64> {
        self.progress.bytes?;
        self.rate(now).filter(|rate| *rate >= 1.0)
    }

    /// The estimated time until the step is done.
    pub fn remaining(&self, now: Instant) -> Option<Duration> {
        let Amount { done, of } = self.progress.measured()?;
        let (missing, rate) = (of?.saturating_sub(done), self.rate(now)?);
        (missing > 0 && rate > 0.0).then(|| Duration::try_from_secs_f64(missing as f64 / rate).ok())?
    }
}

/// Formats an amount of bytes, such as `88/143 MB`.
pub fn bytes_text(amount: Amount) -> String {
    let (unit, name, decimals) = match amount.of.unwrap_or(amount.done) {
        0..1_000_000 => (1e3, "kB", 0),
        1_000_000..10_000_000_000 => (1e6, "MB", 0),
        _ => (1e9, "GB", 2),
    };
    let number = |bytes: u64| format!("{:.decimals$}", bytes as f64 / unit);
    match amount.of {
        Some(of) => format!("{}/{} {name}", number(amount.done.min(of)), number(of)),
        None => format!("{} {name}", number(amount.done)),
    }
}

/// Formats a rate, such as `1.4 MB/s`.
pub fn rate_text(bytes_per_second: f64) -> String {
    match bytes_per_second {
        rate if rate < 1e6 => format!("{:.0} kB/s", rate / 1e3),
        rate if rate < 1e8 => format!("{:.1} MB/s", rate / 1e6),
        rate => format!("{:.0} MB/s", rate / 1e6),
    }
}

/// Formats a time, such as `38 s`, `4 min` or `2 h`.
pub fn time_text(time: Duration) -> String {
    match time.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds.div_ceil(60)),
        seconds => format!("{} h", seconds.div_ceil(3600)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        let after = |seconds: f64| start + Duration::from_secs_f64(seconds);
        meter.set(Progress::of_bytes(0, Some(100_000_000)), start);
        assert_eq!(meter.bytes_per_second(after(0.5)), None, "too early");
        for tenth in 1..=200 {
            // 5 MB/s for ten seconds, then 1 MB/s
            let at = f64::from(tenth) / 10.0;
            let bytes = if at <= 10.0 { at * 5e6 } else { 50e6 + (at - 10.0) * 1e6 };
            meter.set(Progress::of_bytes(bytes as u64, Some(100_000_000)), after(at));
        }
        let rate = meter.bytes_per_second(after(20.0)).unwrap();
        assert!((0.9e6..1.3e6).contains(&rate), "{rate}");
        let left = meter.remaining(after(20.0)).unwrap().as_secs();
        assert!((30..=45).contains(&left), "{left}");
        let stalled = meter.bytes_per_second(after(60.0)).unwrap();
        assert!(stalled < rate / 4.0, "{stalled}");
    }

    #[test]
    fn a_step_that_begins_again_has_no_negative_rate() {
        let (mut meter, start) = (Meter::default(), Instant::now());
        meter.set(Progress::of_items(60, 64, "packages"), start);
        meter.set(Progress::of_items(0, 64, "packages"), start + Duration::from_secs(5));
        let now = start + Duration::from_secs(7);
        assert_eq!((meter.remaining(now), meter.bytes_per_second(now)), (None, None));
        meter.set(Progress::of_items(8, 64, "packages"), start + Duration::from_secs(9));
        assert_eq!(meter.remaining(start + Duration::from_secs(9)), Some(Duration::from_secs(28)));
    }

    #[test]
    fn numbers_are_short() {
        let text = |done, of| bytes_text(Amount { done, of });
        assert_eq!(text(88_100_000, Some(143_000_000)), "88/143 MB");
        assert_eq!(text(700_000, Some(900_000)), "700/900 kB");
        assert_eq!(text(1_500_000_000, Some(20_000_000_000)), "1.50/20.00 GB");
        assert_eq!(text(5_000_000, None), "5 MB");
        assert_eq!(text(200, Some(100)), "0/0 kB", "never more than everything");
        assert_eq!([1.4e6, 900e3, 250e6].map(rate_text), ["1.4 MB/s", "900 kB/s", "250 MB/s"]);
        assert_eq!(
            [5, 119, 125, 8000].map(|s| time_text(Duration::from_secs(s))),
            ["5 s", "119 s", "3 min", "3 h"]
        );
    }

    #[test]
    fn a_progress_is_complete_if_each_of_its_amounts_is() {
        let both = |items, bytes| Progress {
            bytes: Some(Amount { done: bytes, of: Some(9) }),
            ..Progress::of_items(items, 2, "files")
        };
        assert!(both(2, 9).is_complete());
        assert!(!both(1, 9).is_complete() && !both(2, 8).is_complete());
        assert!(!Progress::default().is_complete() && !Progress::of_bytes(9, None).is_complete());
    }
}
