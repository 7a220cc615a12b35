//! One call of EBS direct: it is sent, its error is classified as EC2's are, and it is retried where that is right. The
//! SDK itself does not retry.

use super::rate_limit::{MAX_PER_SECOND, RateLimiter};
use super::tokens::BlockTokens;
use super::workers::{Worker, Workers};
use crate::cloud::aws::ec2::Timeouts;
use crate::cloud::aws::ec2::client::call::{ApiError, Circumstances, Retries};
use crate::cloud::aws::ec2::client::errors::{Action, ErrorClass};
use crate::ids::SnapshotId;
use crate::sys::lock::lock_mutex;
use crate::trace;
use crate::trace::Track;
use anyhow::Result;
use aws_sdk_ebs::Client;
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

/// Concurrent puts: at 900 a second, each may take 70 ms. They hold 32 MiB.
const MAX_PUTS: usize = 64;
/// Concurrent reads if EBS is slow: at 100 ms each, the figure of AWS's guide, that is EBS's limit for one second.
/// Measured with 950 blocks of 60 to 140 ms: 1.47 s and 86 MiB; with 64 reads, 1.90 s and 64 MiB.
pub const MAX_READS: usize = 96;
/// Concurrent reads as long as EBS answers at once. Measured with 950 blocks on two cores, shared with the server: 0.6
/// s, as with 64 from the start, in 66 MiB instead of up to 98.
const INITIAL_READS: usize = 24;
/// A read that takes longer waits for EBS and not for this machine: then more are sent concurrently.
const SLOW_READ: Duration = Duration::from_millis(50);
/// EBS's limit for calls of one kind for one snapshot: calls under way when a second begins arrive in that second, too.
const _: () = assert!(MAX_PER_SECOND + MAX_PUTS <= 1000 && MAX_PER_SECOND + MAX_READS <= 1000);

/// State that all threads share.
pub struct EbsState {
    pub lanes: Workers,
    pub timeouts: Timeouts,
    pub gets: Semaphore,
    /// The number of slow reads, up to the limit.
    slow_reads: AtomicUsize,
    pub puts: Semaphore,
    /// Whether EBS ever answered: an endpoint that never did is probably wrong.
    answered: AtomicBool,
    snapshots: Mutex<HashMap<SnapshotId, Arc<KnownSnapshot>>>,
}

/// What this process knows of a snapshot.
pub struct KnownSnapshot {
    pub id: SnapshotId,
    pub tokens: BlockTokens,
    pub gets: RateLimiter,
    pub puts: RateLimiter,
    /// When this process created it, if it did: for some time it may not be visible everywhere.
    born: Option<Instant>,
}

impl EbsState {
    pub fn new(lanes: Workers, timeouts: Timeouts) -> Self {
        Self {
            lanes,
            timeouts,
            gets: Semaphore::new(INITIAL_READS),
            slow_reads: AtomicUsize::new(0),
            puts: Semaphore::new(MAX_PUTS),
            answered: AtomicBool::new(false),
            snapshots: Mutex::default(),
        }
    }

    /// Records how long a read took. The first reads had to connect and do not count; each slow one after them allows
    /// one more concurrent read.
    pub fn took(&self, time: Duration) {
        let increment = |slow_reads: usize| (slow_reads < MAX_READS).then_some(slow_reads + 1);
        if time > SLOW_READ
            && let Ok(INITIAL_READS..) =
                self.slow_reads.fetch_update(Ordering::Relaxed, Ordering::Relaxed, increment)
        {
            self.gets.add_permits(1);
        }
    }

    fn entry(&self, id: &SnapshotId, born: Option<Instant>) -> Arc<KnownSnapshot> {
        let mut snapshots = lock_mutex(&self.snapshots);
        let new = || {
            let (gets, puts) = (RateLimiter::unlimited_until_refused(), RateLimiter::default());
            Arc::new(KnownSnapshot { id: id.clone(), tokens: BlockTokens::default(), gets, puts, born })
        };
        snapshots.entry(id.clone()).or_insert_with(new).clone()
    }

    pub fn snapshot(&self, id: &SnapshotId) -> Arc<KnownSnapshot> {
        self.entry(id, None)
    }

    /// Records that this process has just created a snapshot.
    pub fn born(&self, id: &SnapshotId) {
        self.entry(id, Some(Instant::now()));
    }

    /// Sends a call and retries it as the error's class demands. `limiter` sets the rate of these calls.
    pub async fn repeat<T, F>(
        &self,
        lane: &Worker,
        action: &'static Action,
        snapshot: &KnownSnapshot,
        limiter: Option<&RateLimiter>,
        mut send: impl FnMut(Client) -> F,
    ) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, ApiError>>,
    {
        // Calls for blocks are not traced here: there are thousands, and their callers count them.
        let track = if limiter.is_some() { Track::default() } else { Track::here() };
        let mut span = track.span(trace::Lane::Ebs, action.name);
        span.tell("what", snapshot.id.0.as_str());
        let mut retries = Retries::new(action, &self.timeouts, span);
        loop {
            if let Some(limiter) = limiter {
                limiter.turn().await;
            }
            let refused = match send(lane.client()).await {
                Ok(answer) => {
                    self.answered.store(true, Ordering::Relaxed);
                    limiter.inspect(|limiter| limiter.succeeded());
                    return Ok(answer);
                }
                Err(refused) => refused,
            };
            if refused.code.is_some() {
                self.answered.store(true, Ordering::Relaxed);
            }
            if matches!(refused.class, ErrorClass::Throttled | ErrorClass::Paced) {
                limiter.inspect(|limiter| limiter.refused());
            }
            let expired = refused.class == ErrorClass::Expired;
            let answered = self.answered.load(Ordering::Relaxed);
            let circumstances = Circumstances {
                answered,
                renewable: answered,
                may_be_new: snapshot.born.is_some_and(|born| born.elapsed() < self.timeouts.visible),
                rate_limited: true,
            };
            let pause = retries.pause_after(refused, &circumstances)?;
            if expired {
                lane.renew();
            }
            sleep(pause).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_ebs::config::{BehaviorVersion, Config};

    #[tokio::test]
    async fn slow_reads_raise_the_concurrency_up_to_its_limit() {
        let config = || async { Config::builder().behavior_version(BehaviorVersion::v2026_01_12()).build() };
        let shared = EbsState::new(Workers::start(config).await.unwrap(), Timeouts::default());
        let permits_after = |reads: usize, time: Duration| {
            (0..reads).for_each(|_| shared.took(time));
            shared.gets.available_permits()
        };
        assert_eq!(permits_after(1000, SLOW_READ), INITIAL_READS);
        assert_eq!(permits_after(INITIAL_READS, SLOW_READ * 2), INITIAL_READS, "the first reads connect");
        assert_eq!(permits_after(10, SLOW_READ * 2), INITIAL_READS + 10);
        assert_eq!(permits_after(1000, SLOW_READ * 2), MAX_READS);
    }
}
