//! One call of EC2's API: it is sent, its error is classified, and it is retried where that is right. The SDK itself
//! does not retry.

use super::connection::{clock_offset, clock_problem};
use super::errors::{Action, ErrorClass, classify, hint_for_code};
use crate::cloud::aws::ec2::Ec2;
use crate::error::Kind;
use crate::trace::{Lane, Track};
use anyhow::Error;
use aws_sdk_ec2::Client;
use aws_sdk_ec2::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::operation::RequestId;
use std::fmt;
use std::future::Future;
use std::ops::Deref;
use std::time::Duration;
use tokio::time::{Instant, sleep};

/// An error of a call.
#[derive(Debug, Clone)]
pub struct ApiError {
    pub action: &'static str,
    pub class: ErrorClass,
    /// For how long it was retried.
    tried: Duration,
    answer: Box<ApiErrorDetails>,
}

/// What EC2 answered, or what happened instead of an answer.
#[derive(Debug, Clone)]
pub struct ApiErrorDetails {
    /// What the call was about: ids, names.
    what: String,
    pub code: Option<String>,
    pub message: String,
    /// The reason that EBS direct gives in addition to the code: `INVALID_BLOCK_TOKEN`.
    pub reason: Option<String>,
    /// EC2's id of the request, which its support asks for.
    request: Option<String>,
    /// By how many seconds EC2's clock is ahead of ours.
    ahead: Option<i64>,
}
impl Deref for ApiError {
    type Target = ApiErrorDetails;
    fn deref(&self) -> &ApiErrorDetails {
        &self.answer
    }
}

impl ApiError {
    pub fn of<E>(action: &Action, what: &str, error: SdkError<E>) -> Self
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        let status = error.raw_response().map(|answer| answer.status().as_u16());
        let ahead =
            error.raw_response().and_then(|answer| answer.headers().get("date")).and_then(clock_offset);
        let meta = error.as_service_error().map(|error| error.meta());
        let code = meta.and_then(|meta| meta.code()).map(str::to_owned);
        // A proxy's answer, or an empty one, may still have EC2's header; the Query API sends the id in the body.
        let header = error.raw_response().and_then(|answer| answer.headers().get("x-amzn-requestid"));
        let body = error.raw_response().and_then(|answer| std::str::from_utf8(answer.body().bytes()?).ok());
        let from_body = body.and_then(|body| Some(body.split_once("<RequestID>")?.1.split_once('<')?.0));
        let request = meta.and_then(|meta| meta.request_id()).or(header).or(from_body).map(str::to_owned);
        let message = match meta.and_then(|meta| meta.message()) {
            // An authorization failure ends in a kilobyte that only `aws sts decode-authorization-message` can read.
            Some(message) => {
                message.split(" Encoded authorization failure message").next().unwrap_or("").to_owned()
            }
            // The answer of a proxy, or half of one.
            None if status.is_some() => {
                format!("a response with HTTP status {}: {}", status.unwrap_or(0), causes(&error))
            }
            None => causes(&error),
        };
        let reason = error.raw_response().and_then(|answer| reason(answer.body().bytes()?));
        let class = match &error {
            // Only without any answer: EC2's own errors mention credentials and identities, too.
            _ if status.is_none() && has_no_credentials(&error) => ErrorClass::Expired,
            // Not sent: a parameter is wrong.
            SdkError::ConstructionFailure(_) => ErrorClass::Terminal,
            SdkError::DispatchFailure(failure) if failure.is_user() => ErrorClass::Terminal,
            _ => {
                let full_message = reason.as_ref().map(|reason| format!("{message} {reason}"));
                classify(action.name, code.as_deref(), full_message.as_ref().unwrap_or(&message), status)
            }
        };
        let answer =
            Box::new(ApiErrorDetails { what: what.to_owned(), code, message, reason, request, ahead });
        Self { action: action.name, class, tried: Duration::ZERO, answer }
    }

    /// An error of an answer that began well and was incomplete or invalid.
    pub fn broken(action: &Action, what: &str, message: String, class: ErrorClass) -> Self {
        let (what, request) = (what.to_owned(), None);
        let answer =
            Box::new(ApiErrorDetails { what, code: None, message, reason: None, request, ahead: None });
        Self { action: action.name, class, tried: Duration::ZERO, answer }
    }

    pub fn tried(self, tried: Duration) -> Self {
        Self { tried, ..self }
    }

    pub fn is(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }

    /// Whether the error is about something's state, which implies that it exists; otherwise it says that it does not
    /// exist.
    fn is_state_error(&self) -> bool {
        !self.code.as_deref().is_some_and(|code| code.contains("NotFound") || code == "InvalidID")
    }

    fn hint(&self) -> Option<String> {
        let Some(code) = &self.code else {
            if self.class == ErrorClass::Expired {
                let hint = "Give the instance a role, or set AWS_PROFILE or AWS_ACCESS_KEY_ID. \
                            Check with `aws sts get-caller-identity`.";
                return Some(hint.to_owned());
            }
            return (self.class == ErrorClass::Lost)
                .then(|| "Check the network, and the endpoint (--region, AWS_ENDPOINT_URL).".to_owned());
        };
        let clock = matches!(code.as_str(), "RequestExpired" | "AuthFailure" | "SignatureDoesNotMatch");
        match self.ahead.filter(|_| clock).and_then(clock_problem) {
            Some((text, hint)) => Some(format!("Perhaps {text}. {hint}")),
            None => {
                let full_message = format!("{} {}", self.message, self.reason.as_deref().unwrap_or_default());
                hint_for_code(code, &full_message).map(str::to_owned)
            }
        }
    }
}

/// The reason in the body of an error of EBS direct.
fn reason(body: &[u8]) -> Option<String> {
    let refusal: serde_json::Value = serde_json::from_slice(body).ok()?;
    refusal.get("Reason").or(refusal.get("reason"))?.as_str().map(str::to_owned)
}

/// Texts of the SDK that say only that something went wrong.
const UNINFORMATIVE: [&str; 5] =
    ["dispatch failure", "io error", "other", "service error", "unhandled error"];

/// The chain of causes as readable text, without the SDK's types.
fn causes(error: &dyn std::error::Error) -> String {
    let mut causes: Vec<String> = Vec::new();
    let mut cause = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        // Some errors already include the text of their cause.
        if !UNINFORMATIVE.contains(&text.as_str()) && !causes.last().is_some_and(|last| last.contains(&text))
        {
            causes.push(text);
        }
        cause = error.source();
    }
    if causes.is_empty() { error.to_string() } else { causes.join(": ") }
}

/// Whether no credentials were found, or they could not be fetched. The SDK reports it as a connection error.
fn has_no_credentials<E: std::error::Error + 'static>(error: &SdkError<E>) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if text.contains("credential") || text.contains("identity") {
            return true;
        }
        cause = error.source();
    }
    false
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.action)?;
        if !self.what.is_empty() {
            write!(f, " ({})", self.what)?;
        }
        if let Some(code) = &self.code {
            write!(f, ": {code}")?;
        }
        if let Some(reason) = &self.reason {
            write!(f, " ({reason})")?;
        }
        write!(f, ": {}", self.message)?;
        if !self.tried.is_zero() {
            let tried = Duration::from_millis(self.tried.as_millis() as u64);
            write!(f, "; tried for {}", humantime::format_duration(tried))?;
        }
        if let Some(request) = &self.request {
            write!(f, " (request {request})")?;
        }
        Ok(())
    }
}

impl From<ApiError> for Error {
    fn from(refused: ApiError) -> Self {
        let failure = Kind::Cloud.failure(&refused);
        match refused.hint() {
            Some(hint) => failure.hint(hint).into(),
            None => failure.into(),
        }
    }
}

/// A random part of a pause: callers that were throttled together do not retry together.
pub fn jitter(max: Duration) -> Duration {
    let mut bytes = [0u8; 4];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .expect("getrandom never returns fewer than 4 bytes (getrandom(2))");
    max.mul_f64(f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX))
}

impl Ec2 {
    /// Sends a call and retries it as the error's class demands. `what` names the objects: if this process has just
    /// created one of them, "not found" may mean that it is not visible yet.
    pub(crate) async fn call<T, E, F>(
        &self,
        action: &'static Action,
        what: &str,
        mut send: impl FnMut(&Client) -> F,
    ) -> Result<T, ApiError>
    where
        F: Future<Output = Result<T, SdkError<E>>>,
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        self.repeat(action, what, async || {
            send(&self.client()).await.map_err(|e| ApiError::of(action, what, e))
        })
        .await
    }

    /// Like [`Self::call`], for any way to send.
    pub(crate) async fn repeat<T>(
        &self,
        action: &'static Action,
        what: &str,
        mut send: impl AsyncFnMut() -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let (start, timeouts) = (Instant::now(), self.timeouts());
        let mut tries = 0u32;
        let mut span = Track::here().span(Lane::Ec2, action.name);
        span.tell("what", what);
        loop {
            let refused = match send().await {
                Ok(answer) => {
                    self.answered();
                    return Ok(answer);
                }
                Err(refused) => refused,
            };
            if refused.code.is_some() {
                self.answered();
            }
            span.tell("refused", refused.code.as_deref().unwrap_or("no answer"));
            let mut pause =
                jitter(timeouts.backoff.saturating_mul(1 << tries.min(16)).min(timeouts.backoff_longest));
            let patience = match refused.class {
                ErrorClass::Throttled => timeouts.throttled,
                ErrorClass::Paced => {
                    pause += timeouts.rate;
                    timeouts.paced
                }
                // Credentials that never were there will not come. An instance's come from its metadata service, for
                // which the SDK waits one second, and does not retry: a busy machine's answer takes longer.
                ErrorClass::Expired
                    if tries < 3 && (self.has_answered() || self.0.options.instance_id.is_some()) =>
                {
                    self.renew();
                    timeouts.throttled
                }
                ErrorClass::Lost if action.twice && self.has_answered() => timeouts.outage,
                ErrorClass::Lost if action.twice => timeouts.unreachable,
                // A dry run names nothing: then there is nothing to wait for.
                ErrorClass::NotYet if !what.is_empty() && (refused.is_state_error() || self.is_new(what)) => {
                    pause = pause.min(timeouts.max_poll).max(timeouts.first_poll);
                    timeouts.visible
                }
                _ => {
                    return Err(ApiError {
                        tried: if tries > 0 { start.elapsed() } else { Duration::ZERO },
                        ..refused
                    });
                }
            };
            tries += 1;
            span.tell("tries", tries + 1);
            if start.elapsed() + pause > patience {
                return Err(ApiError { tried: start.elapsed(), ..refused });
            }
            sleep(pause).await;
        }
    }
}

/// Treats "it is so already" as success, for a call that brings about a state.
pub fn ok_if_already_done<T>(result: Result<T, ApiError>) -> Result<(), ApiError> {
    match result {
        Err(refused) if refused.class != ErrorClass::Done => Err(refused),
        _ => Ok(()),
    }
}
