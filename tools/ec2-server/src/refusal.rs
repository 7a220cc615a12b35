//! The errors that EC2 returns.

use std::fmt::Display;

/// An error response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The HTTP status.
    pub status: u16,
    /// The code, such as `InvalidVolume.NotFound`.
    pub code: String,
    pub message: String,
    /// The reason in errors of EBS, such as `INVALID_BLOCK_TOKEN`.
    pub reason: Option<String>,
}

pub type Result<T> = std::result::Result<T, Refusal>;

/// Returns a refusal with the HTTP status of its code. `code` may contain a reason: `CODE:REASON`.
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

/// Returns from the function with a refusal. An example is `no!("InvalidZone.NotFound", "The zone '{}' does not
/// exist.", zone)`.
macro_rules! no {
    ($code:expr, $($text:tt)+) => {
        return Err($crate::refusal::refuse($code, format!($($text)+)))
    };
}
pub(crate) use no;
