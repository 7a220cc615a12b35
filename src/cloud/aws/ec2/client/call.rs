//! Sends one call to EC2's API, classifies its error, and retries the call if the error's class permits it. The SDK
//! itself does not retry.

use super::connection::{clock_offset, clock_problem};
use super::errors::{Action, ErrorClass, causes, classify, hint_for_code};
use crate::cloud::aws::ec2::{Ec2, Timeouts};
use crate::error::Kind;
use crate::trace::{Lane, Span, Track};
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
    /// The time for which the call was retried.
    tried: Duration,
    details: Box<ApiErrorDetails>,
}

/// The error that EC2 returned, or the reason why there was no answer.
#[derive(Debug, Clone)]
pub struct ApiErrorDetails {
    /// The ids or names of the objects that the call is about.
    what: String,
    pub code: Option<String>,
    pub message: String,
    /// The reason that EBS direct (the API for blocks of snapshots) returns in addition to the code, such as
    /// `INVALID_BLOCK_TOKEN`.
    pub reason: Option<String>,
    /// The id that EC2 assigned to the request. AWS Support asks for this id.
    request: Option<String>,
    /// The number of seconds by which EC2's clock is ahead of this machine's.
    ahead: Option<i64>,
}
impl Deref for ApiError {
    type Target = ApiErrorDetails;
    fn deref(&self) -> &ApiErrorDetails {
        &self.details
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
        // If the SDK finds no request id, the id is read from the answer's headers. An answer can have this header even
        // if its body is empty. If the header is missing, the id is read from the body, because EC2's Query API puts it
        // there.
        let header = error.raw_response().and_then(|answer| answer.headers().get("x-amzn-requestid"));
        let body = error.raw_response().and_then(|answer| std::str::from_utf8(answer.body().bytes()?).ok());
        let from_body = body.and_then(|body| Some(body.split_once("<RequestID>")?.1.split_once('<')?.0));
        let request = meta.and_then(|meta| meta.request_id()).or(header).or(from_body).map(str::to_owned);
        let message = match meta.and_then(|meta| meta.message()) {
            // The message of an authorization failure ends with a kilobyte of encoded text. This text is removed,
            // because only `aws sts decode-authorization-message` can decode it.
            Some(message) => {
                message.split(" Encoded authorization failure message").next().unwrap_or("").to_owned()
            }
            // An answer without a message came from a proxy, or was cut off.
            None if status.is_some() => {
                format!("a response with HTTP status {}: {}", status.unwrap_or(0), causes(&error))
            }
            None => causes(&error),
        };
        let reason = error.raw_response().and_then(|answer| reason(answer.body().bytes()?));
        let class = match &error {
            // `has_no_credentials` searches the error's text for words. Errors that EC2 returns may contain these
            // words, too. So `has_no_credentials` is called only if there was no answer.
            _ if status.is_none() && has_no_credentials(&error) => ErrorClass::CredentialsExpired,
            // The request was not sent, because a parameter is wrong.
            SdkError::ConstructionFailure(_) => ErrorClass::Fatal,
            SdkError::DispatchFailure(failure) if failure.is_user() => ErrorClass::Fatal,
            _ => {
                let full_message = reason.as_ref().map(|reason| format!("{message} {reason}"));
                classify(action.name, code.as_deref(), full_message.as_ref().unwrap_or(&message), status)
            }
        };
        let details =
            Box::new(ApiErrorDetails { what: what.to_owned(), code, message, reason, request, ahead });
        Self { action: action.name, class, tried: Duration::ZERO, details }
    }

    /// Makes an error for an answer that reported success, but is incomplete or invalid.
    pub fn broken(action: &Action, what: &str, message: String, class: ErrorClass) -> Self {
        let (what, request) = (what.to_owned(), None);
        let details =
            Box::new(ApiErrorDetails { what, code: None, message, reason: None, request, ahead: None });
        Self { action: action.name, class, tried: Duration::ZERO, details }
    }

    pub fn tried(self, tried: Duration) -> Self {
        Self { tried, ..self }
    }

    pub fn is(&self, code: &str) -> bool {
        self.code.as_deref() == Some(code)
    }

    /// Returns false if the error says that an object does not exist. Any other error is treated as an error about the
    /// state of an existing object.
    fn is_state_error(&self) -> bool {
        !self.code.as_deref().is_some_and(|code| code.contains("NotFound") || code == "InvalidID")
    }

    fn hint(&self) -> Option<String> {
        let Some(code) = &self.code else {
            if self.class == ErrorClass::CredentialsExpired {
                let hint = "Give the instance a role, or set AWS_PROFILE or AWS_ACCESS_KEY_ID. \
                            Check with `aws sts get-caller-identity`.";
                return Some(hint.to_owned());
            }
            return (self.class == ErrorClass::Ambiguous)
                .then(|| "Check the network and the endpoint (--region, AWS_ENDPOINT_URL).".to_owned());
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

/// Returns the reason in the body of an error of EBS direct.
fn reason(body: &[u8]) -> Option<String> {
    let error: serde_json::Value = serde_json::from_slice(body).ok()?;
    error.get("Reason").or(error.get("reason"))?.as_str().map(str::to_owned)
}

/// Returns whether the SDK found no credentials, or could not fetch them. The SDK reports both cases as a connection
/// error, so this function searches the text of the error.
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
    fn from(error: ApiError) -> Self {
        let failure = Kind::Cloud.failure(&error);
        match error.hint() {
            Some(hint) => failure.hint(hint).into(),
            None => failure.into(),
        }
    }
}

/// Returns a random duration of at most `max`. Because pauses are random, callers that were throttled at the same time
/// retry at different times.
fn jitter(max: Duration) -> Duration {
    let mut bytes = [0u8; 4];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())
        .expect("getrandom never returns fewer than 4 bytes (getrandom(2))");
    max.mul_f64(f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX))
}

impl Ec2 {
    /// Sends a call, and retries it if the error's class permits it. `what` names the objects of the call. If this
    /// process has just created one of them, the error "not found" is retried, because the object may not be visible
    /// yet.
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

    /// Like [`Self::call`], but `send` chooses the client.
    pub(crate) async fn repeat<T>(
        &self,
        action: &'static Action,
        what: &str,
        mut send: impl AsyncFnMut() -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let mut span = Track::here().span(Lane::Ec2, action.name);
        span.add_arg("what", what);
        let mut retries = Retries::new(action, self.timeouts(), span);
        loop {
            let error = match send().await {
                Ok(answer) => {
                    self.answered();
                    return Ok(answer);
                }
                Err(error) => error,
            };
            if error.code.is_some() {
                self.answered();
            }
            let expired = error.class == ErrorClass::CredentialsExpired;
            let circumstances = Circumstances {
                answered: self.has_answered(),
                // Credentials are loaded again only if EC2 has answered before, or if oven runs on an instance. An
                // instance's credentials come from its metadata service. If the machine is busy, this service may need
                // longer than one second. But the SDK waits only for one second, and does not retry.
                renewable: self.has_answered() || self.0.options.instance_id.is_some(),
                // If `what` is empty, the call names no object that could become visible later. So
                // [`ErrorClass::NotVisibleYet`] is not retried.
                may_be_new: !what.is_empty() && (error.is_state_error() || self.is_new(what)),
                rate_limited: false,
            };
            let pause = retries.pause_after(error, &circumstances)?;
            if expired {
                self.renew();
            }
            sleep(pause).await;
        }
    }
}

/// Facts that determine, together with the error, whether a call is retried.
#[derive(Debug, Clone, Copy)]
pub struct Circumstances {
    /// Whether the service has ever answered this process. If not, the endpoint is probably wrong.
    pub answered: bool,
    /// Whether the credentials may be valid after they are loaded again.
    pub renewable: bool,
    /// Whether `NotVisibleYet` is retried. For EC2, this is so if the error is about the state of an existing object,
    /// or if this process has just created the object. For EBS direct, only if this process has just created the
    /// snapshot.
    pub may_be_new: bool,
    /// Whether a rate limiter in this process delays the retry. If it does, no pause of [`Timeouts::rate`] is added
    /// after [`ErrorClass::RateLimited`].
    pub rate_limited: bool,
}

/// The retries of one call.
pub struct Retries<'t> {
    action: &'static Action,
    timeouts: &'t Timeouts,
    start: Instant,
    tries: u32,
    span: Span,
}

impl<'t> Retries<'t> {
    /// `span` is the call's span in the trace.
    pub fn new(action: &'static Action, timeouts: &'t Timeouts, span: Span) -> Self {
        Self { action, timeouts, start: Instant::now(), tries: 0, span }
    }

    /// Returns the pause before the next attempt. The length of the pause depends on the error's class. Returns the
    /// error if another attempt would not help, or if the pause would end after the time limit of the class. After
    /// [`ErrorClass::CredentialsExpired`], the caller has to renew the credentials before the next attempt.
    pub fn pause_after(
        &mut self,
        refused: ApiError,
        circumstances: &Circumstances,
    ) -> Result<Duration, ApiError> {
        let (timeouts, tries) = (self.timeouts, self.tries);
        self.span.add_arg("refused", refused.code.as_deref().unwrap_or("no answer"));
        let Circumstances { answered, renewable, may_be_new, rate_limited } = *circumstances;
        let mut pause =
            jitter(timeouts.backoff.saturating_mul(1 << tries.min(16)).min(timeouts.backoff_longest));
        let patience = match refused.class {
            ErrorClass::RateLimited if !rate_limited => {
                pause += timeouts.rate;
                timeouts.paced
            }
            ErrorClass::Throttled | ErrorClass::RateLimited => timeouts.throttled,
            ErrorClass::CredentialsExpired if tries < 3 && renewable => timeouts.throttled,
            ErrorClass::Ambiguous if self.action.idempotent && answered => timeouts.outage,
            ErrorClass::Ambiguous if self.action.idempotent => timeouts.unreachable,
            ErrorClass::NotVisibleYet if may_be_new => {
                pause = pause.min(timeouts.max_poll).max(timeouts.first_poll);
                timeouts.visible
            }
            _ if tries > 0 => return Err(refused.tried(self.start.elapsed())),
            _ => return Err(refused),
        };
        self.tries += 1;
        self.span.add_arg("tries", self.tries + 1);
        if self.start.elapsed() + pause > patience {
            return Err(refused.tried(self.start.elapsed()));
        }
        Ok(pause)
    }
}

/// Turns the error [`ErrorClass::AlreadyDone`] into success. Returns other errors unchanged.
pub fn ok_if_already_done<T>(result: Result<T, ApiError>) -> Result<(), ApiError> {
    match result {
        Err(error) if error.class != ErrorClass::AlreadyDone => Err(error),
        _ => Ok(()),
    }
}
