//! A distro that wants a shell script to run, and nothing else: bakes of a few milliseconds.

use oven_distro::{Claim, Claims, Distro, Job, OsRelease, Phase, Plan, Refused, Shim, Step};
use std::collections::BTreeMap;

pub struct Nothing;

impl Distro for Nothing {
    fn id(&self) -> &str {
        "nothing"
    }
    fn claims(&self, os: &OsRelease) -> Claims {
        let claim = if os.id() == "nothing" { Claim::Exact } else { Claim::No };
        Claims { claim, ..Claims::default() }
    }
    fn plan(&self, _: &Job) -> Result<Plan, Refused> {
        let step = |phase, why: &str, script: &str| Step {
            phase,
            why: why.into(),
            argv: vec!["/bin/sh".into(), "-c".into(), script.into()],
            env: BTreeMap::new(),
            retries: 0,
            before_retry: Vec::new(),
            also_good: Vec::new(),
            once: false,
            network: phase == Phase::Fetch,
            timeout: 60,
        };
        let steps = vec![
            step(Phase::Fetch, "looking at certificates", "cat ${SSL_CERT_FILE:-/dev/null}; busybox env"),
            step(
                Phase::Install,
                "writing a file",
                "echo baked > /etc/baked; mkdir -p /var/lib/x; busybox env",
            ),
        ];
        let shim = Shim {
            path: "/usr/sbin/policy-rc.d".into(),
            content: "#!/bin/sh\nexit 101\n".into(),
            mode: 0o755,
        };
        Ok(Plan { shims: vec![shim], steps, ..Plan::default() })
    }
}
