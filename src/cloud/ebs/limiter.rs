//! How many calls a second: under EBS direct's limit, and under what it takes just now.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Calls a second of one kind for one snapshot: EBS takes 1000, which cannot be raised (EBS quotas).
pub const MOST: f64 = 900.0;
/// However often EBS refuses, some calls are tried: 5 MiB/s.
const LEAST: f64 = 10.0;
/// Each second without a refusal raises the rate by so much: from half of the limit it is back after 20 s.
const STEP: f64 = 22.5;
/// Calls that were under way together are refused together: that is one refusal.
const TOGETHER: Duration = Duration::from_secs(1);

/// Additive increase, multiplicative decrease: bakes that share an account's limit come to share it evenly.
#[derive(Debug)]
pub struct Limiter(Mutex<State>);

#[derive(Debug)]
struct State {
    rate: f64,
    /// The next call's turn.
    next: Option<Instant>,
    cut: Option<Instant>,
}

impl Default for Limiter {
    fn default() -> Self {
        Self(Mutex::new(State { rate: MOST, next: None, cut: None }))
    }
}

impl Limiter {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn. Turns that were not taken are lost: there are no bursts.
    pub async fn turn(&self) {
        let at = {
            let mut state = self.state();
            let now = Instant::now();
            let at = state.next.map_or(now, |next| next.max(now));
            state.next = Some(at + Duration::from_secs_f64(1.0 / state.rate));
            at
        };
        sleep_until(at).await;
    }

    pub fn succeeded(&self) {
        let mut state = self.state();
        state.rate = (state.rate + STEP / state.rate).min(MOST);
    }

    /// There were too many.
    pub fn refused(&self) {
        let mut state = self.state();
        if state.cut.is_none_or(|cut| cut.elapsed() >= TOGETHER) {
            state.rate = (state.rate / 2.0).max(LEAST);
            state.cut = Some(Instant::now());
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

    /// Turns of one second.
    async fn second(limiter: &Limiter) -> u32 {
        let (begun, mut turns) = (Instant::now(), 0);
        while begun.elapsed() < Duration::from_secs(1) {
            limiter.turn().await;
            limiter.succeeded();
            turns += 1;
        }
        turns
    }

    #[tokio::test(start_paused = true)]
    async fn no_second_has_more_turns_than_the_limit() {
        let limiter = Limiter::default();
        for _ in 0..3 {
            let turns = second(&limiter).await;
            assert!((850..=902).contains(&turns), "{turns}");
        }
        // Nor does the one after a pause.
        tokio::time::sleep(Duration::from_secs(60)).await;
        let turns = second(&limiter).await;
        assert!(turns <= 902, "{turns}");
    }

    #[tokio::test(start_paused = true)]
    async fn callers_side_by_side_share_it() {
        let limiter = Limiter::default();
        let begun = Instant::now();
        futures(1800, || limiter.turn()).await;
        let took = begun.elapsed();
        assert!(took >= Duration::from_millis(1990), "{took:?}");
    }

    /// So many at once.
    async fn futures<F: Future<Output = ()>>(n: usize, of: impl Fn() -> F) {
        let mut all: Vec<_> = (0..n).map(|_| Box::pin(of())).collect();
        std::future::poll_fn(|cx| {
            all.retain_mut(|one| one.as_mut().poll(cx).is_pending());
            if all.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_halve_the_rate_and_successes_raise_it_again() {
        let limiter = Limiter::default();
        for _ in 0..64 {
            limiter.refused();
        }
        assert_eq!(limiter.rate(), MOST / 2.0);
        tokio::time::sleep(TOGETHER).await;
        limiter.refused();
        assert_eq!(limiter.rate(), MOST / 4.0);
        for _ in 0..100 {
            tokio::time::sleep(TOGETHER).await;
            limiter.refused();
        }
        assert_eq!(limiter.rate(), LEAST);
        let begun = Instant::now();
        while limiter.rate() < MOST {
            second(&limiter).await;
        }
        let took = begun.elapsed().as_secs();
        assert!((30..60).contains(&took), "{took} s");
    }
}
