//! Planned faults: the affected calls, and the kind of the fault.

use crate::options::Throttle;
use crate::refusal::{Refusal, refuse};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// A fault. "Before" means that the call has no effect. "After" means that the call takes effect, but its response is
/// lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// An error before: for EC2 a code such as `RequestLimitExceeded`, and for EBS also with a reason, such as
    /// `ValidationException:INVALID_BLOCK_TOKEN`.
    Error(String),
    /// An error before, with a code and a message.
    ErrorSaying(String, String),
    /// An error after, with a code such as `InternalError`.
    ErrorAfter(String),
    /// An HTTP status such as 500 or 503, without a body of EC2.
    StatusBefore(u16),
    StatusAfter(u16),
    /// The connection is closed without a response.
    DropBefore,
    DropAfter,
    /// The server never responds.
    HangBefore,
    HangAfter,
    /// The response is delayed by this number of milliseconds.
    Late(u64),
    /// The response shows the resources before the last change.
    Stale,
    /// The block in the response of GetSnapshotBlock has a wrong bit, but the checksum is the right block's.
    Flipped,
    /// The call succeeds, but the created resource gets this defect.
    Turns(Turn),
}

/// A defect of a created resource.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Turn {
    /// A volume or a snapshot ends in the state `error`, an image in `failed`.
    Failed,
    /// The resource vanishes, as a volume does whose key may not be used.
    Vanishes,
    /// The state never changes: `creating`, `attaching`, `detaching`, `pending`.
    Stuck,
    /// An attachment is always `busy`.
    Busy,
    /// The API reports `attached`, but the kernel shows no device.
    NoDevice,
    /// The resource does not get its tags.
    Untagged,
    /// An image lacks boot mode, ENA, SR-IOV, TPM, IMDS support and further mappings.
    Plain,
    /// An image has another billing code.
    Billed,
}

/// A fault, and the calls that have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// The action, such as `CreateVolume`. `*` stands for all actions, which are counted together.
    pub action: String,
    /// The number of the first call with the fault, from 1.
    pub nth: u32,
    /// The number of consecutive calls with the fault.
    #[serde(default = "one")]
    pub count: u32,
    /// Whether the fault is for calls with `DryRun`. These calls are counted separately.
    #[serde(default)]
    pub dry_run: bool,
    pub what: What,
}

fn one() -> u32 {
    1
}

impl Fault {
    pub fn new(action: &str, nth: u32, what: What) -> Self {
        Self { action: action.to_owned(), nth, count: 1, dry_run: false, what }
    }

    pub fn times(self, count: u32) -> Self {
        Self { count, ..self }
    }

    pub fn dry(self) -> Self {
        Self { dry_run: true, ..self }
    }
}

impl What {
    /// Returns the error of a fault that comes before.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Error(code) => Some(refuse(code, "It was planned so.")),
            Self::ErrorSaying(code, message) => Some(refuse(code, message)),
            _ => None,
        }
    }
}

/// Counts calls, and returns the fault of each call.
#[derive(Debug, Default)]
pub struct Plan {
    counts: BTreeMap<(String, bool), u32>,
}

impl Plan {
    pub fn next(&mut self, faults: &[Fault], action: &str, dry_run: bool) -> Option<What> {
        let mut count = |name: &str| {
            let count = self.counts.entry((name.to_owned(), dry_run)).or_default();
            *count += 1;
            *count
        };
        let (own, all) = (count(action), count("*"));
        let hit = |fault: &&Fault| {
            let n = if fault.action == "*" { all } else { own };
            (fault.action == "*" || fault.action == action)
                && fault.dry_run == dry_run
                && (fault.nth..fault.nth.saturating_add(fault.count)).contains(&n)
        };
        faults.iter().find(hit).map(|fault| fault.what.clone())
    }
}

/// The level of each action's bucket.
#[derive(Debug, Default)]
pub struct Buckets(BTreeMap<String, (f64, Option<Instant>)>);

impl Buckets {
    /// Takes a call from its action's bucket. Returns false if the bucket is empty.
    pub fn take(&mut self, action: &str, throttle: &Throttle, unfiltered: bool, now: Instant) -> bool {
        let reading = is_reading(action);
        let (name, (most, per_second)) = match (reading, unfiltered) {
            (true, true) => (format!("{action} unfiltered"), throttle.unfiltered),
            (true, false) => (action.to_owned(), throttle.reading),
            (false, _) => (action.to_owned(), throttle.changing),
        };
        self.take_from(name, (most, per_second), now)
    }

    /// Takes a call from the bucket with this name. Returns false if the bucket is empty. `most` is the bucket's size.
    pub fn take_from(&mut self, name: String, (most, per_second): (f64, f64), now: Instant) -> bool {
        let (left, at) = self.0.entry(name).or_insert((most, None));
        let passed = at.map_or(0.0, |at| now.duration_since(at).as_secs_f64());
        *left = (*left + passed * per_second).min(most);
        *at = Some(now);
        let may = *left >= 1.0;
        if may {
            *left -= 1.0;
        }
        may
    }
}

pub fn is_reading(action: &str) -> bool {
    ["Describe", "Get", "List"].iter().any(|verb| action.starts_with(verb))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_fault_befalls_the_calls_that_it_names() {
        let faults = [
            Fault::new("A", 2, What::DropAfter).times(2),
            Fault::new("A", 1, What::HangBefore).dry(),
            Fault::new("*", 6, What::Stale),
        ];
        let mut plan = Plan::default();
        let mut next = |action: &str, dry| plan.next(&faults, action, dry);
        assert_eq!(next("A", false), None);
        assert_eq!(next("A", true), Some(What::HangBefore));
        assert_eq!(next("A", false), Some(What::DropAfter));
        assert_eq!(next("B", false), None);
        assert_eq!(next("A", false), Some(What::DropAfter));
        assert_eq!(next("A", false), None);
        assert_eq!(next("B", false), Some(What::Stale));
        assert_eq!(next("B", false), None);
    }

    #[test]
    fn a_plan_is_a_file() {
        let text = r#"[{"action": "CreateVolume", "nth": 1, "what": {"error": "InternalError"}},
            {"action": "*", "nth": 3, "count": 2, "what": "drop_after"},
            {"action": "RegisterImage", "nth": 1, "what": {"turns": "failed"}}]"#;
        let faults: Vec<Fault> = serde_json::from_str(text).unwrap();
        assert_eq!(faults[0], Fault::new("CreateVolume", 1, What::Error("InternalError".into())));
        assert_eq!(faults[1], Fault::new("*", 3, What::DropAfter).times(2));
        assert_eq!(faults[2].what, What::Turns(Turn::Failed));
        assert!(
            serde_json::from_str::<Fault>(r#"{"action": "A", "nth": 1, "what": "stale", "x": 1}"#).is_err()
        );
    }

    #[test]
    fn a_bucket_empties_and_fills() {
        let throttle = Throttle { reading: (2.0, 10.0), unfiltered: (1.0, 1.0), changing: (1.0, 1.0) };
        let (mut buckets, start) = (Buckets::default(), Instant::now());
        let mut at = |action: &str, unfiltered, ms| {
            buckets.take(action, &throttle, unfiltered, start + Duration::from_millis(ms))
        };
        assert!(at("DescribeVolumes", false, 0) && at("DescribeVolumes", false, 0));
        assert!(!at("DescribeVolumes", false, 50) && at("DescribeVolumes", false, 100));
        // Each action has its own bucket, and unfiltered calls have another one.
        assert!(at("DescribeImages", false, 100) && at("DescribeVolumes", true, 100));
        assert!(at("CreateVolume", false, 100) && !at("CreateVolume", false, 100));
    }
}
