//! How long oven waits for EC2, with the reasons.

use crate::error::Kind;
use crate::sys::poll::PollPolicy;
use std::time::Duration;

/// Pauses, deadlines and timeouts. The defaults are for EC2; tests divide all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timeouts {
    /// The pause before the first poll after a change: nothing is ready sooner. The pause after it is half as long.
    pub first_poll: Duration,
    /// The longest pause between two polls: on average, half of it is waited in vain. A describe costs a token of the
    /// account's bucket, which refills with 20 a second: forty bakes may wait for a long time at once. (In the first
    /// seconds, when polls are frequent, the bucket allows eight bakes: it has 100 tokens.)
    pub max_poll: Duration,
    /// A volume leaves `creating` within seconds, or never.
    pub created: Duration,
    /// A volume that is `attaching` for longer is stuck and remains so.
    pub attached: Duration,
    /// The kernel shows an attached disk within some seconds; some hosts need a minute.
    pub device: Duration,
    /// For detaching and deleting: shorter than the time limit of [`crate::undo`], so that the reason is reported.
    pub released: Duration,
    /// The minimum for a snapshot; a large volume gets more.
    pub snapshot: Duration,
    /// The additional time for each GiB.
    pub snapshot_gib: Duration,
    /// The image of a complete snapshot is available within a minute; another builder's may have begun later.
    pub image: Duration,
    /// How long a new id may be invisible (EC2's guide to eventual consistency: up to five minutes).
    pub visible: Duration,
    /// After a lost answer: how long to look for what the call may have created before it is assumed not to exist.
    pub lost_answer_window: Duration,
    /// Between snapshots of one volume: EC2 takes one every 15 s.
    pub rate: Duration,
    /// How long calls are retried for that reason.
    pub paced: Duration,
    /// The first pause after a throttled or lost call is random, up to this; the limit doubles with each retry.
    pub backoff: Duration,
    /// The upper bound for that pause.
    pub backoff_longest: Duration,
    /// How long throttled calls are retried.
    pub throttled: Duration,
    /// How long calls are retried while the network is down, once EC2 has answered.
    pub outage: Duration,
    /// The same before EC2 has answered: a wrong endpoint should be reported soon.
    pub unreachable: Duration,
    /// For the TCP and TLS handshakes.
    pub connect: Duration,
    /// Until the first byte of an answer: a large DescribeImages takes 10 s and more.
    pub read: Duration,
    /// For one request and its answer.
    pub attempt: Duration,
    /// For one request, including the time to get credentials: IMDS, STS, SSO.
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
    /// The same values divided by `times`; timeouts of single calls remain at least `call`.
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

    /// Frequent polls, for something that the bake does nothing but wait for. The result is noticed a quarter of a
    /// second late at most, or a twentieth of the wait, and every two seconds in a long one: sixty polls for half a
    /// minute.
    pub(crate) fn frequent_polls(&self, deadline: Duration) -> PollPolicy {
        PollPolicy {
            first: self.first_poll / 2,
            share: 0.05,
            longest: self.max_poll,
            deadline,
            failure: Kind::Cloud,
        }
    }

    /// Polls until a deadline, for something that need not be known at once.
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
