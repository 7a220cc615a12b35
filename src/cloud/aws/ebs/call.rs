//! One call of EBS direct: sent, classified as EC2's are, and sent again where that is right. The SDK itself sends
//! once.

use super::list::Tokens;
use super::rate_limit::{Limiter, MOST};
use super::workers::{Lane, Lanes};
use crate::cloud::aws::ec2::Pace;
use crate::cloud::aws::ec2::client::call::{Refused, jitter};
use crate::cloud::aws::ec2::client::errors::{Action, Class};
use crate::ids::SnapshotId;
use crate::trace;
use crate::trace::Track;
use anyhow::Result;
use aws_sdk_ebs::Client;
use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};

/// Puts under way: with 900 a second, each may take 70 ms. They hold 32 MiB.
const PUTS: usize = 64;
/// Reads under way where EBS takes long for each: at 100 ms, with which AWS's guide reckons, that is what it answers in a
/// second. Measured, 950 blocks of 60 to 140 ms: 1.47 s in 86 MiB, with 64 of them 1.90 s in 64.
pub const READS: usize = 96;
/// Reads under way as long as they are answered at once. Measured, 950 blocks on two cores beside the server: 0.6 s as with
/// 64 from the start, in 66 MiB instead of up to 98.
const AT_FIRST: usize = 24;
/// A read that takes longer waits for EBS, not for this machine: then more are made at a time.
const SLOW: Duration = Duration::from_millis(50);
/// What EBS takes of one kind for one snapshot: those under way when a second begins arrive in it, too.
const _: () = assert!(MOST + PUTS <= 1000 && MOST + READS <= 1000);

/// What the threads share.
pub struct Shared {
    pub lanes: Lanes,
    pub pace: Pace,
    pub gets: Semaphore,
    /// Reads that were slow, as far as they count.
    slow: AtomicUsize,
    pub puts: Semaphore,
    /// Whether EBS ever answered: an endpoint that never did is a wrong one.
    answered: AtomicBool,
    snapshots: Mutex<HashMap<SnapshotId, Arc<Snapshot>>>,
}

/// What is known of a snapshot.
pub struct Snapshot {
    pub id: SnapshotId,
    pub tokens: Tokens,
    pub gets: Limiter,
    pub puts: Limiter,
    /// When it was made, if we did: for some time it may not be known everywhere.
    born: Option<Instant>,
}

impl Shared {
    pub fn new(lanes: Lanes, pace: Pace) -> Self {
        Self {
            lanes,
            pace,
            gets: Semaphore::new(AT_FIRST),
            slow: AtomicUsize::new(0),
            puts: Semaphore::new(PUTS),
            answered: AtomicBool::new(false),
            snapshots: Mutex::default(),
        }
    }

    /// A read took so long. The first ones had to connect, and say nothing; each that is slow after them makes room for
    /// one more.
    pub fn took(&self, time: Duration) {
        let counts = |slow: usize| (slow < READS).then_some(slow + 1);
        if time > SLOW
            && let Ok(AT_FIRST..) = self.slow.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counts)
        {
            self.gets.add_permits(1);
        }
    }

    fn known(&self, id: &SnapshotId, born: Option<Instant>) -> Arc<Snapshot> {
        let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let (gets, puts) = (Limiter::until_refused(), Limiter::default());
            Arc::new(Snapshot { id: id.clone(), tokens: Tokens::default(), gets, puts, born })
        };
        snapshots.entry(id.clone()).or_insert_with(new).clone()
    }

    pub fn snapshot(&self, id: &SnapshotId) -> Arc<Snapshot> {
        self.known(id, None)
    }

    /// This one is new.
    pub fn born(&self, id: &SnapshotId) {
        self.known(id, Some(Instant::now()));
    }

    /// Calls, and calls again as the error's class says. `limiter`: what sets the pace of these calls.
    pub async fn repeat<T, F>(
        &self,
        lane: &Lane,
        action: &'static Action,
        snapshot: &Snapshot,
        limiter: Option<&Limiter>,
        mut send: impl FnMut(Client) -> F,
    ) -> Result<T, Refused>
    where
        F: Future<Output = Result<T, Refused>>,
    {
        let (start, pace) = (Instant::now(), &self.pace);
        let mut tries = 0u32;
        // Blocks are limited, and counted where they are put to use: there are thousands.
        let track = if limiter.is_some() { Track::default() } else { Track::here() };
        let mut span = track.span(trace::Lane::Ebs, action.name);
        span.tell("what", snapshot.id.0.as_str());
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
            span.tell("refused", refused.code.as_deref().unwrap_or("no answer"));
            let answered = self.answered.load(Ordering::Relaxed);
            let mut pause = jitter(pace.backoff.saturating_mul(1 << tries.min(16)).min(pace.backoff_longest));
            let patience = match refused.class {
                Class::Throttled | Class::Paced => {
                    limiter.inspect(|limiter| limiter.refused());
                    pace.throttled
                }
                // Credentials that never were there will not come.
                Class::Expired if tries < 3 && answered => {
                    lane.renew();
                    pace.throttled
                }
                Class::Lost if action.twice && answered => pace.outage,
                Class::Lost if action.twice => pace.unreachable,
                Class::NotYet if snapshot.born.is_some_and(|born| born.elapsed() < pace.visible) => {
                    pause = pause.min(pace.longest).max(pace.look);
                    pace.visible
                }
                _ if tries > 0 => return Err(refused.tried(start.elapsed())),
                _ => return Err(refused),
            };
            tries += 1;
            span.tell("tries", tries + 1);
            if start.elapsed() + pause > patience {
                return Err(refused.tried(start.elapsed()));
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
    async fn as_many_reads_as_slow_ones_ask_for_and_no_more() {
        let config = || async { Config::builder().behavior_version(BehaviorVersion::v2026_01_12()).build() };
        let shared = Shared::new(Lanes::start(config).await.unwrap(), Pace::default());
        let room = |reads: usize, time: Duration| {
            (0..reads).for_each(|_| shared.took(time));
            shared.gets.available_permits()
        };
        assert_eq!(room(1000, SLOW), AT_FIRST);
        assert_eq!(room(AT_FIRST, SLOW * 2), AT_FIRST, "they connected");
        assert_eq!(room(10, SLOW * 2), AT_FIRST + 10);
        assert_eq!(room(1000, SLOW * 2), READS);
    }
}
