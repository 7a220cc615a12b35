//! Defines how long oven waits for EC2, and why.

use crate::error::Kind;
use crate::sys::poll::PollPolicy;
use std::time::Duration;

/// Pauses, deadlines and timeouts. The defaults are for EC2; tests use fractions of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timeouts {
    /// The pause between a change and the first poll. An earlier poll would be wasted, because no change is complete so
    /// soon.
    pub first_poll: Duration,
    /// The longest pause between two polls. With a longer pause, results would be noticed later. The average delay is
    /// half a pause. With a shorter pause, EC2 would throttle the account sooner. EC2 limits calls with a token bucket.
    /// Each poll takes a token from the account's bucket, and EC2 adds 20 tokens a second. So forty bakes that poll
    /// every two seconds are not throttled. In the first seconds of a wait, polls are more frequent. A full bucket has
    /// 100 tokens. This is enough for eight bakes that start to wait at the same time.
    pub max_poll: Duration,
    /// The time limit for creating a volume. A successful creation takes only seconds.
    pub created: Duration,
    /// The time limit for attaching a volume. If a volume is in the state `attaching` for longer, oven treats it as
    /// stuck.
    pub attached: Duration,
    /// How long oven waits until the kernel shows an attached disk. This usually takes some seconds, and up to a minute
    /// on some hosts.
    pub device: Duration,
    /// The time limit for detaching a volume, and for deleting a resource. It is shorter than the time limit that
    /// [`crate::undo`] sets for a clean-up action. So oven reports the reason of a failure. Otherwise it would report
    /// only that the clean-up action timed out.
    pub released: Duration,
    /// The time limit for a snapshot of a small volume. For a large volume, the limit is longer (see `snapshot_gib`).
    pub snapshot: Duration,
    /// The time limit for a snapshot of a large volume is this duration times the volume's size in GiB. It is never
    /// shorter than `snapshot`.
    pub snapshot_gib: Duration,
    /// The time limit for an image to become available. An image that this bake registered needs less than a minute.
    /// But oven also waits for images that other builders registered. These may need longer.
    pub image: Duration,
    /// How long EC2 may answer "not found" for a new id. EC2's documentation of eventual consistency mentions up to
    /// five minutes.
    pub visible: Duration,
    /// How long oven searches for a resource that a call with a lost answer may have created. After that, oven assumes
    /// that the call created nothing.
    pub lost_answer_window: Duration,
    /// The pause before CreateSnapshot is sent again after the error class `RateLimited`. EC2
    /// creates at most one snapshot of a volume in 15 s.
    pub rate: Duration,
    /// How long CreateSnapshot is retried after the error class `RateLimited`.
    pub paced: Duration,
    /// The upper bound of the pause before the first retry of a call that was throttled, or whose answer was lost. Each
    /// pause is random, and the bound doubles with each retry.
    pub backoff: Duration,
    /// The largest value of the bound that starts at `backoff`.
    pub backoff_longest: Duration,
    /// How long throttled calls are retried.
    pub throttled: Duration,
    /// How long calls are retried while the network is down, if EC2 has answered before.
    pub outage: Duration,
    /// How long calls are retried if EC2 has never answered. It is short, so that a wrong endpoint is reported soon.
    pub unreachable: Duration,
    /// The timeout of the TCP and TLS handshakes.
    pub connect: Duration,
    /// The timeout until the first byte of an answer. A large DescribeImages takes 10 s or more.
    pub read: Duration,
    /// The timeout of one request and its answer.
    pub attempt: Duration,
    /// The timeout of one request, including the time to get credentials from IMDS, STS or SSO.
    pub operation: Duration,
}

const fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            first_poll: Duration::from_millis(500),
            max_poll: secs(2),
            created: secs(300),
            attached: secs(90),
            device: secs(60),
            released: secs(280),
            snapshot: secs(3600),
            snapshot_gib: secs(120),
            image: secs(1800),
            visible: secs(300),
            lost_answer_window: secs(60),
            rate: secs(15),
            paced: secs(600),
            backoff: secs(1),
            backoff_longest: secs(20),
            throttled: secs(600),
            outage: secs(600),
            unreachable: secs(10),
            connect: secs(5),
            read: secs(25),
            attempt: secs(30),
            operation: secs(60),
        }
    }
}

impl Timeouts {
    /// Divides all values by `times`, for tests. But the timeouts of a single call are never shorter than `call`.
    pub fn faster(self, times: u32, call: Duration) -> Self {
        let Self { connect, read, attempt, operation, .. } = self;
        let timeout = |of: Duration| (of / times).max(call);
        Self {
            first_poll: self.first_poll / times,
            max_poll: self.max_poll / times,
            created: self.created / times,
            attached: self.attached / times,
            device: self.device / times,
            released: self.released / times,
            snapshot: self.snapshot / times,
            snapshot_gib: self.snapshot_gib / times,
            image: self.image / times,
            visible: self.visible / times,
            lost_answer_window: self.lost_answer_window / times,
            rate: self.rate / times,
            paced: self.paced / times,
            backoff: self.backoff / times,
            backoff_longest: self.backoff_longest / times,
            throttled: self.throttled / times,
            outage: self.outage / times,
            unreachable: self.unreachable / times,
            connect: timeout(connect),
            read: timeout(read),
            attempt: timeout(attempt),
            operation: timeout(operation),
        }
    }

    /// Returns a policy with frequent polls, for waits during which the bake has nothing else to do. With the default
    /// timeouts, the pause between polls is a twentieth of the elapsed time, but at least a quarter of a second and at
    /// most two seconds. This means about sixty polls in half a minute.
    pub(crate) fn frequent_polls(&self, deadline: Duration) -> PollPolicy {
        PollPolicy {
            first: self.first_poll / 2,
            share: 0.05,
            longest: self.max_poll,
            deadline,
            failure: Kind::Cloud,
        }
    }

    /// Returns a policy with less frequent polls, for results that need not be noticed immediately.
    pub(crate) fn until(&self, deadline: Duration) -> PollPolicy {
        PollPolicy {
            first: self.first_poll,
            share: 0.5,
            longest: self.max_poll,
            deadline,
            failure: Kind::Cloud,
        }
    }

    pub(crate) fn snapshot_of(&self, size_gib: u64) -> Duration {
        let gibs = u32::try_from(size_gib).unwrap_or(u32::MAX);
        self.snapshot.max(self.snapshot_gib.saturating_mul(gibs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_large_snapshot_gets_more_time() {
        let timeouts = Timeouts::default();
        assert_eq!(timeouts.snapshot_of(8), secs(3600));
        assert_eq!(timeouts.snapshot_of(100), secs(12_000));
    }

    #[test]
    fn releases_time_out_before_the_undo_debts_do() {
        assert!(Timeouts::default().released < secs(300));
        let fast = Timeouts::default().faster(100, secs(2));
        assert_eq!((fast.first_poll, fast.operation), (Duration::from_millis(5), secs(2)));
    }
}
