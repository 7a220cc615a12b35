//! Checks the connection: credentials, the endpoint, this machine's clock.

use super::errors::DESCRIBE_IMAGES;
use crate::cloud::aws::ec2::Ec2;
use crate::cloud::aws::ec2::images::convert::filter;
use crate::cloud::tag;
use crate::error::Kind;
use anyhow::Result;
use aws_sdk_ec2::config::interceptors::{
    BeforeDeserializationInterceptorContextRef, BeforeTransmitInterceptorContextRef,
};
use aws_sdk_ec2::config::{ConfigBag, Intercept, ProvideCredentials, RuntimeComponents};
use aws_sdk_ec2::error::BoxError;
use aws_sdk_ec2::primitives::{DateTime, DateTimeFormat};
use std::error::Error;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Seconds by which the clock may be off: signatures are valid for five minutes, and a clock that drifts goes on
/// drifting.
const MAX_CLOCK_SKEW: u64 = 240;

/// Records from the traffic the access key id of each signed request, and the date of each answer.
#[derive(Debug, Clone, Default)]
pub struct TrafficObserver(Arc<Mutex<Observed>>);

#[derive(Debug, Default)]
struct Observed {
    key: Option<String>,
    /// By how many seconds AWS's clock is ahead of ours.
    ahead: Option<i64>,
}

impl TrafficObserver {
    fn observed(&self) -> MutexGuard<'_, Observed> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
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

/// By how many seconds an HTTP date is ahead of this machine's clock.
pub fn clock_offset(date: &str) -> Option<i64> {
    let date = DateTime::from_str(date, DateTimeFormat::HttpDate).ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    Some(date.secs() - i64::try_from(now.as_secs()).ok()?)
}

/// What is wrong with this machine's clock and what to do about it; `None` if it is accurate enough.
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
    /// The checks run one after the other: each is meaningful only if the one before succeeded.
    pub(crate) async fn run_connection_checks(&self) -> Vec<(String, Result<()>)> {
        let mut found = Vec::new();
        if let Some(shared) = &self.0.shared {
            let fetched = match shared.credentials_provider() {
                Some(provider) => provider.provide_credentials().await.map_err(|error| causes(&error)),
                None => Err("none are configured".to_owned()),
            };
            match fetched {
                Ok(credentials) => {
                    found.push((format!("credentials {}", credentials.access_key_id()), Ok(())));
                }
                Err(why) => {
                    let hint = "Give the instance a role, or set AWS_PROFILE or AWS_ACCESS_KEY_ID.";
                    let failure =
                        Kind::Machine.failure(format!("no credentials were found ({why})")).hint(hint);
                    found.push(("credentials".to_owned(), Err(failure.into())));
                    return found;
                }
            }
        }
        let asked = self.call(&DESCRIBE_IMAGES, "", |client| {
            let call = client.describe_images().dry_run(true).owners("self");
            call.filters(filter("tag-key", [tag::RUN])).send()
        });
        let answered = match asked.await {
            // The permissions are checked separately.
            Err(refused) if refused.is("DryRunOperation") || refused.is("UnauthorizedOperation") => Ok(()),
            Err(refused) => Err(refused.into()),
            Ok(_) => Ok(()),
        };
        found.push((format!("EC2 in {}", self.region()), answered));
        let ahead = self.0.wire.observed().ahead;
        if let Some(ahead) = ahead {
            let clock = match clock_problem(ahead) {
                Some((text, hint)) => Err(Kind::Machine.failure(text).hint(hint).into()),
                None => Ok(()),
            };
            found.push(("clock".to_owned(), clock));
        }
        found
    }
}

/// An error and its causes in one line.
fn causes(error: &dyn Error) -> String {
    let mut texts = vec![error.to_string()];
    let mut cause = error.source();
    while let Some(deeper) = cause {
        texts.push(deeper.to_string());
        cause = deeper.source();
    }
    texts.dedup();
    texts.join(": ")
}
