//! Limits the number of calls a second to EBS direct's quota, and to the rate that EBS accepts at the moment.

use crate::sys::lock::lock_mutex;
use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// The maximum number of calls of one kind for one snapshot in any period of one second. EBS accepts 1000, and AWS's
/// page of EBS quotas says that this quota cannot be raised. EBS counts calls when they arrive. So it may also count
/// calls that were under way when the second began. There are at most [`MAX_READS`](super::call::MAX_READS) such calls.
/// Calls within the limit are sent without pauses. In a test with evenly spaced calls, 700 blocks took 0.8 s, although
/// EBS accepts so many calls without a delay.
pub const MAX_PER_SECOND: usize = 900;
const SECOND: Duration = Duration::from_secs(1);
/// After a refusal, calls are spaced evenly. For this purpose, a second is divided into this many equal parts, and the
/// same number of calls is permitted in each part. With more parts, each part would be too short for timers, which are
/// accurate only to a millisecond.
const PARTS: usize = 20;
/// The minimum rate, in calls a second. The rate does not fall below it, however often EBS refuses calls. With blocks
/// of 512 KiB, it is 5 MiB/s.
const MIN_RATE: f64 = 10.0;
/// Each second without a refusal raises the rate by this number. So the rate rises from half of the limit to the limit
/// in 20 s.
const RATE_STEP: f64 = 22.5;
/// Refusals within this time lower the rate only once, because EBS often refuses many calls that are under way
/// together.
const REFUSAL_WINDOW: Duration = Duration::from_secs(1);

/// A rate limiter. A caller waits for a turn, that is, for the permission to send one call. The rate has additive
/// increase and multiplicative decrease. Such limiters converge to equal shares if several bakes share an account's
/// limit.
#[derive(Debug)]
pub struct RateLimiter {
    /// The caller whose turn is next holds this lock while it waits.
    line: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Calls a second.
    rate: f64,
    /// If true, calls are not limited. The first refusal sets this to false.
    unlimited: bool,
    /// The times of the last [`MAX_PER_SECOND`] turns, in ascending order.
    turns: VecDeque<Instant>,
    last_refusal: Option<Instant>,
}

impl Default for RateLimiter {
    fn default() -> Self {
        Self::new(false)
    }
}

impl State {
    /// Returns the time of an earlier turn. `turns` is 1 for the last turn, 2 for the turn before it, and so on.
    fn turn_back(&self, turns: usize) -> Option<Instant> {
        self.turns.len().checked_sub(turns).map(|at| self.turns[at])
    }

    /// Takes a turn, or returns the time at which the next turn is free.
    fn try_take(&mut self) -> Result<(), Instant> {
        let now = Instant::now();
        // The conversion is safe, because the rate is positive and below a thousand.
        let limit = self.rate as usize;
        let mut free = self.turn_back(limit).filter(|_| !self.unlimited).map(|turn| turn + SECOND);
        if limit < MAX_PER_SECOND {
            let few = (limit / PARTS).max(1);
            let part = SECOND.mul_f64(few as f64 / limit as f64);
            free = free.max(self.turn_back(few).map(|turn| turn + part));
        }
        if let Some(free) = free.filter(|free| *free > now) {
            return Err(free);
        }
        self.turns.push_back(now);
        if self.turns.len() > MAX_PER_SECOND {
            self.turns.pop_front();
        }
        Ok(())
    }
}

impl RateLimiter {
    fn new(unlimited: bool) -> Self {
        let state =
            State { rate: MAX_PER_SECOND as f64, unlimited, turns: VecDeque::new(), last_refusal: None };
        Self { line: tokio::sync::Mutex::default(), state: Mutex::new(state) }
    }

    /// Makes a limiter for reads, which are not limited until one is refused. A refused read costs only a retry. The
    /// limit for reads depends on the account, so it is not known in advance.
    pub fn unlimited_until_refused() -> Self {
        Self::new(true)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock_mutex(&self.state)
    }

    /// Waits for a turn. Callers get their turns in the order of their calls. If the future is dropped, the caller
    /// takes no turn.
    pub async fn turn(&self) {
        let _first = self.line.lock().await;
        loop {
            let taken = self.state().try_take();
            let Err(free) = taken else { break };
            // The turn is tried again after the wait, because the rate may have fallen in the meantime.
            sleep_until(free).await;
        }
    }

    pub fn succeeded(&self) {
        let mut state = self.state();
        state.rate = (state.rate + RATE_STEP / state.rate).min(MAX_PER_SECOND as f64);
    }

    /// Records that EBS refused a call because there were too many.
    pub fn refused(&self) {
        let mut state = self.state();
        state.unlimited = false;
        if state.last_refusal.is_none_or(|last_refusal| last_refusal.elapsed() >= REFUSAL_WINDOW) {
            state.rate = (state.rate / 2.0).max(MIN_RATE);
            state.last_refusal = Some(Instant::now());
        }
    }

    #[cfg(test)]
    fn rate(&self) -> f64 {
        self.state().rate
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;
    use tokio::time::sleep;

    const MS: Duration = Duration::from_millis(1);

    /// Asserts that no period of length `within` has more than `limit` turns.
    fn assert_at_most(limit: usize, within: Duration, turns: &[Instant]) {
        assert!(turns.is_sorted());
        for (n, both) in turns.windows(limit + 1).enumerate() {
            let took = both[limit] - both[0];
            assert!(took >= within, "{} turns in {took:?}, from the {n}th of {}", limit + 1, turns.len());
        }
    }

    /// Takes `n` turns concurrently, and returns the time of each.
    async fn take_turns(limiter: &RateLimiter, n: usize) -> Vec<Instant> {
        let turns = RefCell::new(Vec::new());
        let one = || async {
            limiter.turn().await;
            turns.borrow_mut().push(Instant::now());
        };
        let mut all: Vec<_> = (0..n).map(|_| Box::pin(one())).collect();
        poll_fn(|cx| {
            all.retain_mut(|one| one.as_mut().poll(cx).is_pending());
            if all.is_empty() { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        drop(all);
        turns.into_inner()
    }

    fn random(below: u64) -> u64 {
        let mut bytes = [0; 8];
        rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
        u64::from_ne_bytes(bytes) % below
    }

    #[tokio::test(start_paused = true)]
    async fn reads_are_not_limited_until_one_is_refused() {
        let limiter = RateLimiter::unlimited_until_refused();
        let begun = Instant::now();
        take_turns(&limiter, 5 * MAX_PER_SECOND).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        limiter.refused();
        assert_eq!(limiter.rate(), MAX_PER_SECOND as f64 / 2.0);
        assert_at_most(MAX_PER_SECOND / 2, SECOND, &take_turns(&limiter, 2 * MAX_PER_SECOND).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_seconds_turns_are_taken_at_once_and_no_second_has_more() {
        let limiter = RateLimiter::default();
        let begun = Instant::now();
        let mut all = take_turns(&limiter, MAX_PER_SECOND).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        all.extend(take_turns(&limiter, 2 * MAX_PER_SECOND).await);
        // The turns take at least two seconds, and hardly more.
        assert!((2 * SECOND..2 * SECOND + 10 * MS).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        // After a pause, the turns of one second are available, but no more.
        for pause in [500, 999, 1000, 60_000] {
            sleep(pause * MS).await;
            all.extend(take_turns(&limiter, MAX_PER_SECOND + MAX_PER_SECOND / 2).await);
        }
        assert_at_most(MAX_PER_SECOND, SECOND, &all);
    }

    /// Takes bursts of random sizes at random times, for some seconds.
    #[tokio::test(start_paused = true)]
    async fn no_second_has_more_at_random_times() {
        for _ in 0..20 {
            let (limiter, mut all) = (RateLimiter::default(), Vec::new());
            for _ in 0..40 {
                all.extend(take_turns(&limiter, random(400) as usize).await);
                sleep(random(300) as u32 * MS).await;
            }
            assert_at_most(MAX_PER_SECOND, SECOND, &all);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_refusal_the_rate_is_half_and_even() {
        let (half, few) = (MAX_PER_SECOND / 2, MAX_PER_SECOND / 2 / PARTS);
        for pause in [0, 300, 999, 5000] {
            let limiter = RateLimiter::default();
            let mut all = take_turns(&limiter, MAX_PER_SECOND).await;
            let begun = Instant::now();
            sleep(pause * MS).await;
            limiter.refused();
            let after = take_turns(&limiter, 3 * half).await;
            // Turns that were taken before the refusal also count, because EBS has to process their calls.
            assert!(after[0] >= begun + SECOND, "after {pause} ms: {:?}", after[0] - begun);
            assert_at_most(half, SECOND, &after);
            // Calls are spaced evenly from the beginning.
            assert_at_most(few, SECOND * few as u32 / half as u32 - MS, &after);
            let took = after[3 * half - 1] - after[0];
            assert!((2900 * MS..3300 * MS).contains(&took), "{took:?}");
            all.extend(after);
            assert_at_most(MAX_PER_SECOND, SECOND, &all);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_slows_waiting_callers_down() {
        let limiter = RateLimiter::default();
        take_turns(&limiter, MAX_PER_SECOND).await;
        let begun = Instant::now();
        let refusal = async {
            sleep(500 * MS).await;
            limiter.refused();
        };
        let (waited, ()) = tokio::join!(take_turns(&limiter, MAX_PER_SECOND), refusal);
        assert_at_most(MAX_PER_SECOND / 2, SECOND, &waited);
        assert!(begun.elapsed() >= 2900 * MS, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_caller_takes_no_turn() {
        let limiter = RateLimiter::default();
        take_turns(&limiter, MAX_PER_SECOND).await;
        for _ in 0..5 * MAX_PER_SECOND {
            let mut given_up = pin!(limiter.turn());
            let polled = poll_fn(|cx| Poll::Ready(given_up.as_mut().poll(cx).is_pending())).await;
            assert!(polled);
        }
        let begun = Instant::now();
        take_turns(&limiter, MAX_PER_SECOND).await;
        assert!(begun.elapsed() < SECOND + 10 * MS, "{:?}", begun.elapsed());
    }

    /// The limit also holds while the rate changes continually.
    #[tokio::test(start_paused = true)]
    async fn refusals_and_successes_let_no_second_have_more() {
        for _ in 0..20 {
            let (limiter, mut all) = (RateLimiter::default(), Vec::new());
            for _ in 0..60 {
                let turns = take_turns(&limiter, random(200) as usize).await;
                turns.iter().for_each(|_| limiter.succeeded());
                all.extend(turns);
                if random(10) == 0 {
                    limiter.refused();
                }
                sleep(random(100) as u32 * MS).await;
            }
            assert_at_most(MAX_PER_SECOND, SECOND, &all);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_halve_the_rate_and_successes_raise_it_again() {
        let (limiter, limit) = (RateLimiter::default(), MAX_PER_SECOND as f64);
        for _ in 0..64 {
            limiter.refused();
        }
        assert_eq!(limiter.rate(), limit / 2.0);
        sleep(REFUSAL_WINDOW).await;
        limiter.refused();
        assert_eq!(limiter.rate(), limit / 4.0);
        for _ in 0..100 {
            sleep(REFUSAL_WINDOW).await;
            limiter.refused();
        }
        assert_eq!(limiter.rate(), MIN_RATE);
        // Calls are still sent, and they are spaced evenly.
        let begun = Instant::now();
        let few = take_turns(&limiter, 3 * MIN_RATE as usize).await;
        assert_at_most(1, SECOND / MIN_RATE as u32, &few);
        assert!(begun.elapsed() <= 3100 * MS, "{:?}", begun.elapsed());
        let begun = Instant::now();
        while limiter.rate() < limit {
            limiter.turn().await;
            limiter.succeeded();
        }
        let took = begun.elapsed().as_secs();
        assert!((30..60).contains(&took), "{took} s");
        sleep(SECOND).await;
        let begun = Instant::now();
        take_turns(&limiter, MAX_PER_SECOND).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
