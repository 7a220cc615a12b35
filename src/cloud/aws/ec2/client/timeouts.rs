//! How long oven waits for EC2, and why so long.

use crate::sys::poll::Policy;
use std::time::Duration;

/// Pauses, deadlines and timeouts. The default is for EC2; tests divide all of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pace {
    /// Before the first look after a change: nothing is ready sooner. Twice the pause after that.
    pub look: Duration,
    /// No pause between two looks is longer: half of it is waited in vain. A describe costs a
    /// token of the account's bucket, which refills with 20 a second: forty bakes may wait for long at once. (Of the first
    /// seconds, when looks are close, the bucket itself bears eight: it holds 100.)
    pub longest: Duration,
    /// A volume leaves `creating` within seconds, or never.
    pub created: Duration,
    /// A volume that is `attaching` for longer is stuck, and stays so.
    pub attached: Duration,
    /// The kernel shows an attached disk within some seconds; some hosts need a minute.
    pub device: Duration,
    /// Detaching and deleting: shorter than the patience of [`crate::undo`], so that the reason is told.
    pub released: Duration,
    /// The least that a snapshot gets; a large volume gets more.
    pub snapshot: Duration,
    /// And so much for each GiB.
    pub snapshot_gib: Duration,
    /// An image of a complete snapshot is available within a minute; another builder's may have begun later.
    pub image: Duration,
    /// How long a new id may be invisible (EC2's guide to eventual consistency: up to five minutes).
    pub visible: Duration,
    /// How long, after a lost answer, what the call may have made is looked for before it is taken for absent.
    pub lost: Duration,
    /// Between snapshots of one volume: EC2 takes one every 15 s.
    pub rate: Duration,
    /// How long that is borne.
    pub paced: Duration,
    /// The first pause after a throttled or lost call is random, up to this. It doubles with each.
    pub backoff: Duration,
    /// No such pause is longer.
    pub backoff_longest: Duration,
    /// How long throttling is borne.
    pub throttled: Duration,
    /// How long the network may be away, once EC2 has answered.
    pub outage: Duration,
    /// And before it has: a wrong endpoint should show soon.
    pub unreachable: Duration,
    /// For the TCP and TLS handshakes.
    pub connect: Duration,
    /// Until the first byte of an answer: a large DescribeImages takes 10 s and more.
    pub read: Duration,
    /// For one request and its answer.
    pub attempt: Duration,
    /// The same, with what it takes to get credentials: IMDS, STS, SSO.
    pub operation: Duration,
}

const fn seconds(n: u64) -> Duration {
    Duration::from_secs(n)
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            look: Duration::from_millis(500),
            longest: seconds(2),
            created: seconds(300),
            attached: seconds(90),
            device: seconds(60),
            released: seconds(280),
            snapshot: seconds(3600),
            snapshot_gib: seconds(120),
            image: seconds(1800),
            visible: seconds(300),
            lost: seconds(60),
            rate: seconds(15),
            paced: seconds(600),
            backoff: seconds(1),
            backoff_longest: seconds(20),
            throttled: seconds(600),
            outage: seconds(600),
            unreachable: seconds(10),
            connect: seconds(5),
            read: seconds(25),
            attempt: seconds(30),
            operation: seconds(60),
        }
    }
}

impl Pace {
    /// The same so many times as fast; timeouts of single calls stay at least `call`.
    pub fn faster(self, times: u32, call: Duration) -> Self {
        let Self { connect, read, attempt, operation, .. } = self;
        let timeout = |of: Duration| (of / times).max(call);
        Self {
            look: self.look / times,
            longest: self.longest / times,
            created: self.created / times,
            attached: self.attached / times,
            device: self.device / times,
            released: self.released / times,
            snapshot: self.snapshot / times,
            snapshot_gib: self.snapshot_gib / times,
            image: self.image / times,
            visible: self.visible / times,
            lost: self.lost / times,
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

    /// Looks at what a bake does nothing but wait for. Each comes a quarter of a second late at most, or a twentieth of
    /// the wait, and every two seconds in a long one: sixty for one of half a minute.
    pub(crate) fn closely(&self, deadline: Duration) -> Policy {
        Policy { first: self.look / 2, share: 0.05, longest: self.longest, deadline }
    }

    /// Looks that are made until a deadline, at what need not be known at once.
    pub(crate) fn until(&self, deadline: Duration) -> Policy {
        Policy { first: self.look, share: 0.5, longest: self.longest, deadline }
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
        let pace = Pace::default();
        assert_eq!(pace.snapshot_of(8), seconds(3600));
        assert_eq!(pace.snapshot_of(100), seconds(12_000));
    }

    #[test]
    fn what_waits_for_a_release_ends_before_the_debts_do() {
        assert!(Pace::default().released < seconds(300));
        let fast = Pace::default().faster(100, seconds(2));
        assert_eq!((fast.look, fast.operation), (Duration::from_millis(5), seconds(2)));
    }
}
