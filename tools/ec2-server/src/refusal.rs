//! What EC2 says no with.

use std::fmt::Display;

/// An error answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Of HTTP.
    pub status: u16,
    /// `InvalidVolume.NotFound`.
    pub code: String,
    pub message: String,
    /// Of EBS: `INVALID_BLOCK_TOKEN`.
    pub reason: Option<String>,
}

pub type Result<T> = std::result::Result<T, Refusal>;

/// A refusal with the status that its code has.
pub fn refuse(code: &str, message: impl Display) -> Refusal {
    let (code, reason) =
        code.split_once(':').map_or((code, None), |(code, reason)| (code, Some(reason.into())));
    let status = match code {
        "RequestLimitExceeded" | "EC2ThrottledException" | "Unavailable" | "ServiceUnavailable" => 503,
        "InternalError" | "InternalFailure" => 500,
        "UnauthorizedOperation" | "AccessDenied" => 403,
        "DryRunOperation" => 412,
        "AuthFailure" => 401,
        _ => 400,
    };
    Refusal { status, code: code.to_owned(), message: message.to_string(), reason }
}

/// `no("InvalidZone.NotFound", "The zone '{}' does not exist.", zone)`: returns with a refusal.
macro_rules! no {
    ($code:expr, $($text:tt)+) => {
        return Err($crate::refusal::refuse($code, format!($($text)+)))
    };
}
pub(crate) use no;
