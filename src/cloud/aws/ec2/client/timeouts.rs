//! How long oven waits for EC2, with the reasons.

use crate::error::Kind;
use crate::sys::poll::PollPolicy;
use std::time::Duration;

/// Pauses, deadlines and timeouts. The defaults are for EC2; tests divide all of them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timeouts {
    /// The pause before the first poll after a change, because nothing is ready sooner.
    pub first_poll: Duration,
    /// The longest pause between two polls. On average, half of a pause passes after the result is ready. But shorter
    /// pauses would need more calls: each poll costs a token of the account's bucket, which gets 20 tokens a second. So
    /// forty bakes may poll concurrently for a long time. Polls are more frequent in the first seconds of a wait. The
    /// 100 tokens of a full bucket are then enough for eight bakes.
    pub max_poll: Duration,
    /// The limit for the creation of a volume, which takes only seconds if it succeeds.
    pub created: Duration,
    /// The limit for attaching a volume. A volume that is `attaching` for longer is stuck.
    pub attached: Duration,
    /// The limit for the kernel to show an attached disk. It takes some seconds, and a minute on some hosts.
    pub device: Duration,
    /// The limit for detaching and deleting. It is shorter than the time limit of [`crate::undo`], so that the reason
    /// of a failure is reported.
    pub released: Duration,
    /// The limit for the snapshot of a small volume.
    pub snapshot: Duration,
    /// The limit for the snapshot of a large volume, for each GiB. The larger limit of the two is used.
    pub snapshot_gib: Duration,
    /// The limit for an image to become available. This takes less than a minute, but oven also waits for images of
    /// other builders.
    pub image: Duration,
    /// How long a new id may be invisible (EC2's guide to eventual consistency: up to five minutes).
    pub visible: Duration,
    /// How long oven searches for a resource that a call with a lost answer may have created. After that, oven assumes
    /// that the call created nothing.
    pub lost_answer_window: Duration,
    /// The pause before CreateSnapshot is sent again, because EC2 takes one snapshot of a volume every 15 s.
    pub rate: Duration,
    /// How long CreateSnapshot is retried for this reason.
    pub paced: Duration,
    /// The upper bound of the first pause after a throttled or lost call. The pause is random, and its bound doubles
    /// with each retry.
    pub backoff: Duration,
    /// The bound of the pause does not grow beyond this.
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
    /// Returns these values divided by `times`. The timeouts of single calls are at least `call`.
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

    /// Polls frequently, for something that the bake waits for without other work. A result is noticed at most a
    /// quarter of a second late, or a twentieth of the elapsed time if that is longer, but at most two seconds. In half
    /// a minute there are about sixty polls.
    pub(crate) fn frequent_polls(&self, deadline: Duration) -> PollPolicy {
        PollPolicy {
            first: self.first_poll / 2,
            share: 0.05,
            longest: self.max_poll,
            deadline,
            failure: Kind::Cloud,
        }
    }

    /// Polls less frequently, for something that need not be noticed immediately.
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
