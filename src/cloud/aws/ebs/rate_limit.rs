//! How many calls a second: under EBS direct's limit, and under what it takes just now.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::time::{Instant, sleep_until};

/// Calls of one kind for one snapshot in any one second, wherever it begins: EBS takes 1000, which cannot be raised (EBS
/// quotas). It counts them as they arrive: those that were sent in that second, and those that were under way when it
/// began, of which there are no more than [`crate::cloud::aws::ebs::call::READS`]. So they may go as fast as they are answered until
/// these are spent; spaced evenly, 700 blocks took 0.8 s where EBS takes them at once.
pub const MOST: usize = 900;
const SECOND: Duration = Duration::from_secs(1);
/// While it takes fewer, they go evenly: in this part of a second no more than its part of them. Timers are good for a
/// millisecond.
const PARTS: usize = 20;
/// However often EBS refuses, some calls are tried: 5 MiB/s.
const LEAST: f64 = 10.0;
/// Each second without a refusal raises the rate by so much: from half of the limit it is back after 20 s.
const STEP: f64 = 22.5;
/// Calls that were under way together are refused together: that is one refusal.
const TOGETHER: Duration = Duration::from_secs(1);

/// Additive increase, multiplicative decrease: bakes that share an account's limit come to share it evenly.
#[derive(Debug)]
pub struct Limiter {
    /// Whose turn is next has it, and waits.
    line: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Calls a second.
    rate: f64,
    /// None was refused yet, and there is no limit that is known before.
    open: bool,
    /// When the last turns were taken, ascending: those that count.
    turns: VecDeque<Instant>,
    cut: Option<Instant>,
}

impl Default for Limiter {
    fn default() -> Self {
        Self::new(false)
    }
}

impl State {
    /// The one so many turns ago.
    fn before(&self, turns: usize) -> Option<Instant> {
        self.turns.len().checked_sub(turns).map(|at| self.turns[at])
    }

    /// Takes a turn, or tells before when there is none.
    fn take(&mut self) -> Result<(), Instant> {
        let now = Instant::now();
        // It is a positive number below a thousand.
        let most = self.rate as usize;
        let mut free = self.before(most).filter(|_| !self.open).map(|turn| turn + SECOND);
        if most < MOST {
            let few = (most / PARTS).max(1);
            let part = SECOND.mul_f64(few as f64 / most as f64);
            free = free.max(self.before(few).map(|turn| turn + part));
        }
        if let Some(free) = free.filter(|free| *free > now) {
            return Err(free);
        }
        self.turns.push_back(now);
        if self.turns.len() > MOST {
            self.turns.pop_front();
        }
        Ok(())
    }
}

impl Limiter {
    fn new(open: bool) -> Self {
        let state = State { rate: MOST as f64, open, turns: VecDeque::new(), cut: None };
        Self { line: tokio::sync::Mutex::default(), state: Mutex::new(state) }
    }

    /// Of reads: what is refused costs nothing but itself, and how many an account may make is set apart from how many are
    /// written to a snapshot. So they go as they are answered until one is refused, and by the limit from then on.
    pub fn until_refused() -> Self {
        Self::new(true)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a turn, behind those who wait already. Who waits no longer takes none.
    pub async fn turn(&self) {
        let _first = self.line.lock().await;
        loop {
            let taken = self.state().take();
            let Err(free) = taken else { break };
            // By then it may be fewer.
            sleep_until(free).await;
        }
    }

    pub fn succeeded(&self) {
        let mut state = self.state();
        state.rate = (state.rate + STEP / state.rate).min(MOST as f64);
    }

    /// There were too many.
    pub fn refused(&self) {
        let mut state = self.state();
        state.open = false;
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
    use std::cell::RefCell;
    use std::future::poll_fn;
    use std::pin::pin;
    use std::task::Poll;
    use tokio::time::sleep;

    const MS: Duration = Duration::from_millis(1);

    /// No time so long has more of them, wherever it begins.
    fn assert_at_most(most: usize, within: Duration, turns: &[Instant]) {
        assert!(turns.is_sorted());
        for (n, both) in turns.windows(most + 1).enumerate() {
            let took = both[most] - both[0];
            assert!(took >= within, "{} turns in {took:?}, from the {n}th of {}", most + 1, turns.len());
        }
    }

    /// When so many turns are taken that are waited for side by side.
    async fn taken(limiter: &Limiter, n: usize) -> Vec<Instant> {
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
    async fn reads_go_as_they_are_answered_until_one_is_refused() {
        let limiter = Limiter::until_refused();
        let begun = Instant::now();
        taken(&limiter, 5 * MOST).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        limiter.refused();
        assert_eq!(limiter.rate(), MOST as f64 / 2.0);
        assert_at_most(MOST / 2, SECOND, &taken(&limiter, 2 * MOST).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_seconds_turns_go_at_once_and_no_second_has_more() {
        let limiter = Limiter::default();
        let begun = Instant::now();
        let mut all = taken(&limiter, MOST).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        all.extend(taken(&limiter, 2 * MOST).await);
        // No faster, and not much slower either.
        assert!((2 * SECOND..2 * SECOND + 10 * MS).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        // A pause, too, brings those of one second back, and no more.
        for pause in [500, 999, 1000, 60_000] {
            sleep(pause * MS).await;
            all.extend(taken(&limiter, MOST + MOST / 2).await);
        }
        assert_at_most(MOST, SECOND, &all);
    }

    /// Callers that come and go as they like, for some seconds.
    #[tokio::test(start_paused = true)]
    async fn no_second_has_more_however_they_come() {
        for _ in 0..20 {
            let (limiter, mut all) = (Limiter::default(), Vec::new());
            for _ in 0..40 {
                all.extend(taken(&limiter, random(400) as usize).await);
                sleep(random(300) as u32 * MS).await;
            }
            assert_at_most(MOST, SECOND, &all);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn after_a_refusal_there_are_half_as_many_and_evenly() {
        let (half, few) = (MOST / 2, MOST / 2 / PARTS);
        for pause in [0, 300, 999, 5000] {
            let limiter = Limiter::default();
            let mut all = taken(&limiter, MOST).await;
            let begun = Instant::now();
            sleep(pause * MS).await;
            limiter.refused();
            let after = taken(&limiter, 3 * half).await;
            // What went before counts as well: the service is full of it.
            assert!(after[0] >= begun + SECOND, "after {pause} ms: {:?}", after[0] - begun);
            assert_at_most(half, SECOND, &after);
            // Evenly from the first moment on.
            assert_at_most(few, SECOND * few as u32 / half as u32 - MS, &after);
            let took = after[3 * half - 1] - after[0];
            assert!((2900 * MS..3300 * MS).contains(&took), "{took:?}");
            all.extend(after);
            assert_at_most(MOST, SECOND, &all);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_slows_those_down_that_wait_already() {
        let limiter = Limiter::default();
        taken(&limiter, MOST).await;
        let begun = Instant::now();
        let refusal = async {
            sleep(500 * MS).await;
            limiter.refused();
        };
        let (waited, ()) = tokio::join!(taken(&limiter, MOST), refusal);
        assert_at_most(MOST / 2, SECOND, &waited);
        assert!(begun.elapsed() >= 2900 * MS, "{:?}", begun.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_no_longer_takes_no_turn() {
        let limiter = Limiter::default();
        taken(&limiter, MOST).await;
        for _ in 0..5 * MOST {
            let mut given_up = pin!(limiter.turn());
            let polled = poll_fn(|cx| Poll::Ready(given_up.as_mut().poll(cx).is_pending())).await;
            assert!(polled);
        }
        let begun = Instant::now();
        taken(&limiter, MOST).await;
        assert!(begun.elapsed() < SECOND + 10 * MS, "{:?}", begun.elapsed());
    }

    /// Also while the rate changes all the time.
    #[tokio::test(start_paused = true)]
    async fn refusals_and_successes_let_no_second_have_more() {
        for _ in 0..20 {
            let (limiter, mut all) = (Limiter::default(), Vec::new());
            for _ in 0..60 {
                let turns = taken(&limiter, random(200) as usize).await;
                turns.iter().for_each(|_| limiter.succeeded());
                all.extend(turns);
                if random(10) == 0 {
                    limiter.refused();
                }
                sleep(random(100) as u32 * MS).await;
            }
            assert_at_most(MOST, SECOND, &all);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_halve_the_rate_and_successes_raise_it_again() {
        let (limiter, most) = (Limiter::default(), MOST as f64);
        for _ in 0..64 {
            limiter.refused();
        }
        assert_eq!(limiter.rate(), most / 2.0);
        sleep(TOGETHER).await;
        limiter.refused();
        assert_eq!(limiter.rate(), most / 4.0);
        for _ in 0..100 {
            sleep(TOGETHER).await;
            limiter.refused();
        }
        assert_eq!(limiter.rate(), LEAST);
        // It goes on, and is even here.
        let begun = Instant::now();
        let few = taken(&limiter, 3 * LEAST as usize).await;
        assert_at_most(1, SECOND / LEAST as u32, &few);
        assert!(begun.elapsed() <= 3100 * MS, "{:?}", begun.elapsed());
        let begun = Instant::now();
        while limiter.rate() < most {
            limiter.turn().await;
            limiter.succeeded();
        }
        let took = begun.elapsed().as_secs();
        assert!((30..60).contains(&took), "{took} s");
        sleep(SECOND).await;
        let begun = Instant::now();
        taken(&limiter, MOST).await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }
}
