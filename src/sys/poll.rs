//! Polls until something is ready, or a deadline has passed.

use crate::error::Kind;
use crate::trace::{Lane, Track};
use anyhow::Result;
use std::future::Future;
use std::time::Duration;
use tokio::time::Instant;

/// The pauses between polls, and the time limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PollPolicy {
    /// The first pause. A pause is the time from the start of one poll to the start of the next. If a poll takes long,
    /// oven still waits for at least half a pause after its end.
    pub first: Duration,
    /// Each later pause is this fraction of the time since the first poll began, but at least `first`.
    pub share: f64,
    /// The longest pause.
    pub longest: Duration,
    /// The time limit. The last poll is made at the deadline. If it is not successful, waiting fails.
    pub deadline: Duration,
    /// The kind of the failure at the deadline. It tells the user which of the two was too slow: this machine or the
    /// cloud.
    pub failure: Kind,
}

impl PollPolicy {
    /// Returns the policy for waits on this machine, which usually take milliseconds.
    pub const fn local(deadline: Duration) -> Self {
        let (first, longest) = (Duration::from_millis(1), Duration::from_millis(50));
        Self { first, share: 0.5, longest, deadline, failure: Kind::Machine }
    }

    /// Returns the same policy for a resource of a local region. With this policy, a timeout is reported as a failure
    /// of the cloud.
    pub const fn of_region(self) -> Self {
        Self { failure: Kind::Cloud, ..self }
    }
}

/// The result of a poll.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PollAnswer<T> {
    Ready(T),
    /// Not ready yet. The text is the current state, such as `pending`. Messages put it after "it is".
    NotYet(String),
}

/// Polls until `probe` returns [`PollAnswer::Ready`]. The first poll is made immediately, and an error of `probe` is
/// returned immediately. After the deadline, returns the error "waiting for `what`" with the last state.
pub async fn poll_until<T>(
    what: &str,
    policy: &PollPolicy,
    mut probe: impl AsyncFnMut() -> Result<PollAnswer<T>>,
) -> Result<T> {
    let start = Instant::now();
    let end = start + policy.deadline;
    let _span = Track::here().span(Lane::Waits, what);
    loop {
        // Only a poll that began at or after the deadline is the last one. So the clock is read before the poll.
        let begun = Instant::now();
        let last = begun >= end;
        match probe().await? {
            PollAnswer::Ready(value) => return Ok(value),
            PollAnswer::NotYet(state) if last => {
                let time = humantime::format_duration(policy.deadline);
                return Err(policy
                    .failure
                    .error(format!("waiting for {what}: after {time} it is still {state}")));
            }
            PollAnswer::NotYet(_) => {}
        }
        let pause = (begun - start).mul_f64(policy.share).max(policy.first).min(policy.longest);
        // A cloud that responds slowly is polled less often.
        tokio::time::sleep_until((begun + pause).max(Instant::now() + pause / 2).min(end)).await;
    }
}

/// Waits for `awaited`, and runs `other` meanwhile. If `awaited` is ready before `other`, drops `other` unfinished.
pub async fn wait_with_background<T>(awaited: impl Future<Output = T>, other: impl Future<Output = ()>) -> T {
    let (mut awaited, other) = (std::pin::pin!(awaited), std::pin::pin!(other));
    tokio::select! {
        biased;
        result = &mut awaited => return result,
        () = other => {}
    }
    awaited.await
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const POLICY: PollPolicy = PollPolicy {
        first: Duration::from_secs(1),
        share: 1.0,
        longest: Duration::from_secs(4),
        deadline: Duration::from_secs(10),
        failure: Kind::Cloud,
    };

    #[tokio::test(start_paused = true)]
    async fn a_wait_fails_with_the_kind_of_its_policy() {
        let never = async || Ok(PollAnswer::<()>::NotYet("busy".into()));
        let local = PollPolicy::local(Duration::from_secs(1));
        for (policy, kind) in
            [(local, Kind::Machine), (local.of_region(), Kind::Cloud), (POLICY, Kind::Cloud)]
        {
            let error = poll_until("it", &policy, never).await.unwrap_err();
            assert_eq!(Kind::of(&error), kind, "{error:#}");
        }
    }

    async fn ready_after(seconds: u64) -> (Result<u64>, Vec<u64>) {
        let (start, times) = (Instant::now(), std::cell::RefCell::new(Vec::new()));
        let result = poll_until("it", &POLICY, async || {
            let now = start.elapsed().as_secs();
            times.borrow_mut().push(now);
            Ok(if now >= seconds { PollAnswer::Ready(now) } else { PollAnswer::NotYet("pending".into()) })
        })
        .await;
        (result, times.into_inner())
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_and_end_at_the_deadline() {
        assert_eq!(ready_after(0).await.1, [0]);
        assert_eq!(ready_after(6).await.1, [0, 1, 2, 4, 8]);
        let (result, times) = ready_after(10).await;
        assert_eq!((result.unwrap(), times), (10, vec![0, 1, 2, 4, 8, 10]));
        let error = ready_after(11).await.0.unwrap_err();
        assert_eq!(error.to_string(), "waiting for it: after 10s it is still pending");
        assert_eq!(Kind::of(&error), Kind::Cloud);
    }

    #[tokio::test(start_paused = true)]
    async fn a_polls_time_is_part_of_the_pause() {
        for (takes, expected) in [(100, [0, 1000, 2000]), (500, [0, 1000, 2000]), (1500, [0, 2000, 4500])] {
            let (start, times) = (Instant::now(), std::cell::RefCell::new(Vec::new()));
            let result = poll_until("it", &POLICY, async || {
                times.borrow_mut().push(start.elapsed().as_millis());
                tokio::time::sleep(Duration::from_millis(takes)).await;
                let many = times.borrow().len();
                Ok(if many == 3 { PollAnswer::Ready(()) } else { PollAnswer::NotYet("pending".into()) })
            });
            result.await.unwrap();
            assert_eq!(times.into_inner(), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_other_future_is_not_waited_for() {
        let (start, seconds) = (Instant::now(), |n| tokio::time::sleep(Duration::from_secs(n)));
        for (awaited, other, is_over) in [(2, 1, true), (1, 5, false)] {
            let over = Cell::new(false);
            let result = wait_with_background(
                async {
                    seconds(awaited).await;
                    awaited
                },
                async {
                    seconds(other).await;
                    over.set(true)
                },
            );
            assert_eq!((result.await, over.get()), (awaited, is_over));
        }
        assert_eq!(start.elapsed().as_secs(), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_of_the_probe_is_returned_at_once() {
        let probes = Cell::new(0);
        let result: Result<()> = poll_until("it", &POLICY, async || {
            probes.set(probes.get() + 1);
            anyhow::bail!("no")
        })
        .await;
        assert_eq!((result.unwrap_err().to_string().as_str(), probes.get()), ("no", 1));
    }
}
