//! The server's clock, which may differ from this machine's clock. It determines the date of responses, and the age of
//! signatures.

use crate::options::ServerOptions;
use crate::world::now;
use std::time::{Duration, UNIX_EPOCH};

/// The maximum difference in seconds between a signature's time and the server's clock.
pub const TOLERANCE: u64 = 300;

/// Returns the seconds since 1970 by the server's clock.
pub fn seconds(options: &ServerOptions) -> i64 {
    (now() / 1000) as i64 + options.clock_ahead
}

/// Formats a time such as `Fri, 20 Nov 2026 14:10:55 GMT`.
pub fn http_date(seconds: i64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let seconds = seconds.max(0) as u64;
    // 1970-01-01 was a Thursday.
    let weekday = DAYS[(seconds / 86400 % 7) as usize];
    let text = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string();
    let month: usize = text[5..7].parse().unwrap_or(1);
    format!("{weekday}, {} {} {} {} GMT", &text[8..10], MONTHS[month - 1], &text[..4], &text[11..19])
}

/// Parses a time such as `20261120T141055Z`. Returns the seconds since 1970.
pub fn signed_at(text: &str) -> Option<i64> {
    let part = |from: usize, to: usize| text.get(from..to);
    let spelt = format!(
        "{}-{}-{}T{}:{}:{}Z",
        part(0, 4)?,
        part(4, 6)?,
        part(6, 8)?,
        part(9, 11)?,
        part(11, 13)?,
        part(13, 15)?
    );
    let time = humantime::parse_rfc3339(&spelt).ok()?.duration_since(UNIX_EPOCH).ok()?;
    i64::try_from(time.as_secs()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(signed_at("19941106T084937Z"), Some(784_111_777));
        assert_eq!(signed_at("1994"), None);
    }
}
