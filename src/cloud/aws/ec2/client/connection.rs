//! Checks the connection to EC2. This includes the credentials, the endpoint and this machine's clock.

use super::errors::{DESCRIBE_IMAGES, causes};
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::images::convert::filter;
use crate::cloud::tag;
use crate::error::Kind;
use crate::sys::lock::lock_mutex;
use anyhow::Result;
use aws_sdk_ec2::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
};
use aws_sdk_ec2::config::{ConfigBag, Intercept, ProvideCredentials, RuntimeComponents};
use aws_sdk_ec2::error::BoxError;
use aws_sdk_ec2::primitives::{DateTime, DateTimeFormat};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The number of seconds by which this machine's clock may be wrong. AWS rejects a request whose time is wrong by more
/// than five minutes. The limit here is lower, because the clock may drift further during a bake.
const MAX_CLOCK_SKEW: u64 = 240;

/// Records the access key id of the last request. It also records the difference between AWS's clock and this machine's
/// clock at the last answer.
#[derive(Debug, Clone, Default)]
pub struct TrafficObserver(Arc<Mutex<Observed>>);

#[derive(Debug, Default)]
struct Observed {
    key: Option<String>,
    /// The number of seconds by which AWS's clock is ahead of this machine's.
    ahead: Option<i64>,
}

impl TrafficObserver {
    fn observed(&self) -> MutexGuard<'_, Observed> {
        lock_mutex(&self.0)
    }

    pub fn key(&self) -> Option<String> {
        self.observed().key.clone()
    }
}

impl Intercept for TrafficObserver {
    fn name(&self) -> &'static str {
        "oven::Wire"
    }

    fn read_before_transmit(
        &self,
        context: &BeforeTransmitInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        let header = context.request().headers().get("authorization");
        let key = header.and_then(|header| header.split("Credential=").nth(1)?.split('/').next());
        self.observed().key = key.map(str::to_owned);
        Ok(())
    }

    fn read_before_deserialization(
        &self,
        context: &BeforeDeserializationInterceptorContextRef<'_>,
        _: &RuntimeComponents,
        _: &mut ConfigBag,
    ) -> Result<(), BoxError> {
        if let Some(ahead) = context.response().headers().get("date").and_then(clock_offset) {
            self.observed().ahead = Some(ahead);
        }
        Ok(())
    }
}

/// Returns the number of seconds by which an HTTP date is ahead of this machine's clock.
pub fn clock_offset(date: &str) -> Option<i64> {
    let date = DateTime::from_str(date, DateTimeFormat::HttpDate).ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(date.secs() - i64::try_from(now.as_secs()).ok()?)
}

/// Returns a message and a hint if this machine's clock is wrong; `None` if it is accurate enough.
pub fn clock_problem(ahead: i64) -> Option<(String, &'static str)> {
    let off = humantime::format_duration(Duration::from_secs(ahead.unsigned_abs()));
    let word = if ahead > 0 { "behind" } else { "ahead of" };
    let text = format!("this machine's clock is {off} {word} AWS's");
    (ahead.unsigned_abs() > MAX_CLOCK_SKEW).then_some((
        text,
        "Set the clock (see `timedatectl`), because AWS rejects signatures with a wrong time.",
    ))
}

impl Ec2 {
    /// Returns the name and the result of each check. If there are no credentials, only the result for the credentials
    /// is returned, because the other checks need credentials.
    pub(crate) async fn run_connection_checks(&self) -> Vec<(String, Result<()>)> {
        let mut checks = Vec::new();
        if let Some(shared) = &self.0.shared {
            let fetched = match shared.credentials_provider() {
                Some(provider) => provider.provide_credentials().await.map_err(|error| causes(&error)),
                None => Err("none are configured".to_owned()),
            };
            match fetched {
                Ok(credentials) => {
                    checks.push((format!("credentials {}", credentials.access_key_id()), Ok(())));
                }
                Err(why) => {
                    let hint = "Give the instance a role, or set AWS_PROFILE or AWS_ACCESS_KEY_ID.";
                    let failure =
                        Kind::Machine.failure(format!("no credentials were found ({why})")).hint(hint);
                    checks.push(("credentials".to_owned(), Err(failure.into())));
                    return checks;
                }
            }
        }
        let asked = self.call(&DESCRIBE_IMAGES, "", |client| {
            let call = client.describe_images().dry_run(true).owners("self");
            call.filters(filter("tag-key", [tag::RUN])).send()
        });
        let answered = match asked.await {
            // Each of these two errors shows that EC2 can be reached. The permissions are checked separately.
            Err(refused) if refused.is("DryRunOperation") || refused.is("UnauthorizedOperation") => Ok(()),
            Err(refused) => Err(refused.into()),
            Ok(_) => Ok(()),
        };
        checks.push((format!("EC2 in {}", self.region()), answered));
        let ahead = self.0.wire.observed().ahead;
        if let Some(ahead) = ahead {
            let clock = match clock_problem(ahead) {
                Some((text, hint)) => Err(Kind::Machine.failure(text).hint(hint).into()),
                None => Ok(()),
            };
            checks.push(("clock".to_owned(), clock));
        }
        checks
    }
}
