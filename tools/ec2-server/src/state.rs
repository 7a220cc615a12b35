//! The server's state.

use crate::faults::{Buckets, Plan, Turn};
use crate::options::ServerOptions;
use crate::world::{Common, NEVER, Tags, Time, World, now};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

/// A call, and its result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// `ec2`, `ebs`, `ssm`, `sts` or `imds`.
    pub service: String,
    /// The action, such as `CreateVolume`. For IMDS, the method and the path.
    pub action: String,
    /// The parameters as in the request, such as `Filter.1.Value.1`. For EBS, the names are those of its API, and a
    /// block's data are omitted.
    pub params: BTreeMap<String, String>,
    pub dry_run: bool,
    /// The HTTP status or the error code. If there was a fault, the fault is included.
    pub answer: String,
    /// The id of the created resource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<String>,
    /// Milliseconds since 1970.
    pub at: Time,
}

pub struct State {
    pub options: ServerOptions,
    pub world: World,
    /// The world before the last change, and the time of that change. A stale read returns this world.
    pub before: (World, Time),
    pub plan: Plan,
    pub buckets: Buckets,
    pub calls: Vec<Call>,
    /// The number of calls that each access key has signed.
    pub signed: BTreeMap<String, u32>,
    /// The number of calls that are being processed.
    pub at_work: usize,
    random: u64,
    jitter: u64,
}

/// xorshift64*: returns the next number of a state that is not 0. The number is below 2^53.
fn next(state: &mut u64) -> u64 {
    *state ^= *state >> 12;
    *state ^= *state << 25;
    *state ^= *state >> 27;
    state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 11
}

impl State {
    pub fn new(options: ServerOptions, world: World) -> Self {
        let random = options.seed;
        let before = (world.clone(), now());
        let (plan, buckets) = (Plan::default(), Buckets::default());
        let (calls, signed) = (Vec::new(), BTreeMap::new());
        Self { options, world, before, plan, buckets, calls, signed, at_work: 0, random, jitter: random | 1 }
    }

    /// Changes the world, and stores the old world for stale reads.
    pub fn change<T>(&mut self, change: impl FnOnce(&mut World) -> T) -> T {
        self.before = (self.world.clone(), now());
        change(&mut self.world)
    }

    /// Returns the given time, or a random time up to it if a seed is set.
    pub fn drawn(&mut self, time: Duration) -> Time {
        let most = time.as_millis() as Time;
        if self.options.seed == 0 || most == 0 {
            return most;
        }
        next(&mut self.random) % (most + 1)
    }

    /// Returns the time after which this call is answered.
    pub fn latency(&mut self, action: &str) -> Duration {
        let (least, most) = self.options.latency(action).unwrap_or_default();
        let drawn = least + next(&mut self.jitter) % (most.saturating_sub(least) + 1);
        self.options.delays.answer + Duration::from_millis(drawn)
    }

    /// Returns the properties of a new resource of the account. It is ready after `delay`.
    pub fn common(&mut self, id: &str, tags: Tags, delay: Duration, turn: Option<Turn>) -> Common {
        let (now, lag) = (now(), self.options.visibility_lag);
        let ready_at = if turn == Some(Turn::Stuck) { NEVER } else { now + self.drawn(delay) };
        Common {
            id: id.to_owned(),
            owner: self.options.account.clone(),
            tags: if turn == Some(Turn::Untagged) { Tags::new() } else { tags },
            created: now,
            visible_at: now + self.drawn(lag),
            ready_at,
            turn,
            ..Common::default()
        }
    }

    pub fn record(&mut self, call: Call) {
        if let Some(path) = &self.options.record {
            let written = serde_json::to_string(&call).map_err(std::io::Error::from).and_then(|line| {
                let mut file = std::fs::File::options().append(true).create(true).open(path)?;
                file.write_all(format!("{line}\n").as_bytes())
            });
            if let Err(error) = written {
                eprintln!("recording in {}: {error}", path.display());
            }
        }
        self.calls.push(call);
    }
}
