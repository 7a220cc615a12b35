//! Sends a call to EBS direct. If it fails, classifies the error by the same table as EC2's errors, and retries the
//! call if the error's class permits a retry. The SDK itself does not retry.

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

/// The maximum number of concurrent puts. With this number, 900 puts a second are possible if each takes 70 ms. The
/// blocks of these puts take 32 MiB of memory.
const MAX_PUTS: usize = 64;
/// The maximum number of concurrent reads. It is reached only if EBS is slow. If a read takes 100 ms, which is the time
/// in AWS's guide, this number permits about as many reads a second as EBS accepts. In a measurement, 950 reads of 60
/// to 140 ms each took 1.47 s, and oven needed 86 MiB of memory. With at most 64 concurrent reads, they took 1.90 s,
/// and oven needed 64 MiB.
pub const MAX_READS: usize = 96;
/// The number of concurrent reads as long as EBS answers fast. With this number, reading 950 blocks took 0.6 s and
/// needed 66 MiB of memory, on two cores that oven shared with a server that simulates EBS. With 64 concurrent reads
/// from the start, it took the same time and needed up to 98 MiB.
const INITIAL_READS: usize = 24;
/// If a read takes longer, the reason is EBS and not this machine. Such reads raise the number of concurrent reads (see
/// [`EbsState::took`]).
const SLOW_READ: Duration = Duration::from_millis(50);
/// EBS accepts 1000 calls of one kind for one snapshot in a second. EBS may also count calls that were under way when
/// the second began, so the sum of the permitted calls and the calls under way must not exceed 1000.
const _: () = assert!(MAX_PER_SECOND + MAX_PUTS <= 1000 && MAX_PER_SECOND + MAX_READS <= 1000);

/// State that all threads share.
pub struct EbsState {
    pub workers: Workers,
    pub timeouts: Timeouts,
    pub gets: Semaphore,
    /// The number of slow reads so far, up to [`MAX_READS`].
    slow_reads: AtomicUsize,
    pub puts: Semaphore,
    /// Whether EBS has answered this process. An endpoint that has never answered is probably wrong, so calls to it are
    /// retried only for a short time.
    answered: AtomicBool,
    snapshots: Mutex<HashMap<SnapshotId, Arc<KnownSnapshot>>>,
}

/// The block tokens and rate limits of a snapshot.
pub struct KnownSnapshot {
    pub id: SnapshotId,
    pub tokens: BlockTokens,
    pub gets: RateLimiter,
    pub puts: RateLimiter,
    /// The time at which this process created the snapshot. `None` if this process did not create it. It takes some
    /// time until all servers of EBS know a new snapshot.
    born: Option<Instant>,
}

impl EbsState {
    pub fn new(workers: Workers, timeouts: Timeouts) -> Self {
        Self {
            workers,
            timeouts,
            gets: Semaphore::new(INITIAL_READS),
            slow_reads: AtomicUsize::new(0),
            puts: Semaphore::new(MAX_PUTS),
            answered: AtomicBool::new(false),
            snapshots: Mutex::default(),
        }
    }

    /// Records how long a read took. The first [`INITIAL_READS`] slow reads do not count, because their time includes
    /// the time to connect. Each later slow read permits one more concurrent read.
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

    /// Sends a call, and retries it if the error's class permits a retry. `limiter` limits the rate of the calls.
    pub async fn repeat<T, F>(
        &self,
        worker: &Worker,
        action: &'static Action,
        snapshot: &KnownSnapshot,
        limiter: Option<&RateLimiter>,
        mut send: impl FnMut(Client) -> F,
    ) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, ApiError>>,
    {
        // Calls for blocks have a limiter. They are not traced here, because there are thousands of them. The callers
        // count them instead.
        let track = if limiter.is_some() { Track::default() } else { Track::here() };
        let mut span = track.span(trace::Lane::Ebs, action.name);
        span.add_arg("what", snapshot.id.0.as_str());
        let mut retries = Retries::new(action, &self.timeouts, span);
        loop {
            if let Some(limiter) = limiter {
                limiter.turn().await;
            }
            let refused = match send(worker.client()).await {
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
            if matches!(refused.class, ErrorClass::Throttled | ErrorClass::RateLimited) {
                limiter.inspect(|limiter| limiter.refused());
            }
            let expired = refused.class == ErrorClass::CredentialsExpired;
            let answered = self.answered.load(Ordering::Relaxed);
            let circumstances = Circumstances {
                answered,
                renewable: answered,
                may_be_new: snapshot.born.is_some_and(|born| born.elapsed() < self.timeouts.visible),
                rate_limited: true,
            };
            let pause = retries.pause_after(refused, &circumstances)?;
            if expired {
                worker.renew();
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
