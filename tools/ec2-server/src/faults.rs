//! Faults, planned: which call, and what goes wrong with it.

use crate::options::Throttle;
use crate::refusal::{Refusal, refuse};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::Instant;

/// What goes wrong with a call. Before: nothing happened. After: it took effect, and the answer is lost.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// An error of EC2, before: `RequestLimitExceeded`; of EBS also with a reason:
    /// `ValidationException:INVALID_BLOCK_TOKEN`.
    Error(String),
    /// The same with a message of its own.
    ErrorSaying(String, String),
    /// An error of EC2, after: `InternalError`.
    ErrorAfter(String),
    /// A status of HTTP without an answer of EC2: 500, 503.
    StatusBefore(u16),
    StatusAfter(u16),
    /// The connection is closed without an answer.
    DropBefore,
    DropAfter,
    /// No answer, ever.
    HangBefore,
    HangAfter,
    /// The answer comes so many milliseconds late.
    Late(u64),
    /// The answer has the state before the last change.
    Stale,
    /// The answer of GetSnapshotBlock has a bit that is not the block's; its checksum is.
    Flipped,
    /// The answer is good, and what was made turns out badly.
    Turns(Turn),
}

/// How what was made turns out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Turn {
    /// A volume or a snapshot ends in `error`, an image in `failed`.
    Failed,
    /// It vanishes, as a volume does whose key may not be used.
    Vanishes,
    /// It stays as it is: `creating`, `attaching`, `detaching`, `pending`.
    Stuck,
    /// An attachment that stays `busy`.
    Busy,
    /// The API says `attached`, and the kernel shows nothing.
    NoDevice,
    /// It has none of the tags that it was given.
    Untagged,
    /// An image without boot mode, ENA, SR-IOV, TPM, IMDS support and further mappings.
    Plain,
    /// An image that is billed otherwise.
    Billed,
}

/// A fault, and the calls that it befalls.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    /// `CreateVolume`; `*`: any, counted over all of them.
    pub action: String,
    /// The first call of it that goes wrong, from 1 on.
    pub nth: u32,
    /// How many in a row.
    #[serde(default = "one")]
    pub count: u32,
    /// Whether calls with `DryRun` are meant; they are counted apart.
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
    /// The error of a fault that comes before.
    pub fn refusal(&self) -> Option<Refusal> {
        match self {
            Self::Error(code) => Some(refuse(code, "It was planned so.")),
            Self::ErrorSaying(code, message) => Some(refuse(code, message)),
            _ => None,
        }
    }
}

/// Counts calls, and finds the fault of each.
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

/// How full each action's bucket is.
#[derive(Debug, Default)]
pub struct Buckets(BTreeMap<String, (f64, Option<Instant>)>);

impl Buckets {
    /// Whether the call may be made now.
    pub fn take(&mut self, action: &str, throttle: &Throttle, unfiltered: bool, now: Instant) -> bool {
        let reading = is_reading(action);
        let (name, (most, per_second)) = match (reading, unfiltered) {
            (true, true) => (format!("{action} unfiltered"), throttle.unfiltered),
            (true, false) => (action.to_owned(), throttle.reading),
            (false, _) => (action.to_owned(), throttle.changing),
        };
        self.take_from(name, (most, per_second), now)
    }

    /// The same of a bucket by its name: how many calls at once, and how many more per second.
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
        // Each action has its own, and an unfiltered one another one.
        assert!(at("DescribeImages", false, 100) && at("DescribeVolumes", true, 100));
        assert!(at("CreateVolume", false, 100) && !at("CreateVolume", false, 100));
    }
}
