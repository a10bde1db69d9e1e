//! What a receiver's answer means.

use hyper::StatusCode;
use std::time::Duration;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc2822;

/// What becomes of the events of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Taken,
    /// It will never take all of them: one of them is at fault.
    Refused,
    TooLarge,
    /// It may take them another time, or when somebody has corrected something.
    Retry,
}

pub fn of(status: StatusCode) -> Answer {
    match status.as_u16() {
        200..=299 => Answer::Taken,
        413 => Answer::TooLarge,
        // Bad Request, Unsupported Media Type, Unprocessable Content.
        400 | 415 | 422 => Answer::Refused,
        _ => Answer::Retry,
    }
}

/// `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date. `now`: seconds
/// since 1970.
pub fn retry_after(value: &str, now: i64) -> Option<Duration> {
    let value = value.trim();
    if let Ok(seconds) = value.parse::<u32>() {
        return Some(Duration::from_secs(seconds.into()));
    }
    let date = OffsetDateTime::parse(value, &Rfc2822).ok()?.unix_timestamp();
    Some(Duration::from_secs(u64::try_from(date.saturating_sub(now)).unwrap_or(0)))
}

/// The beginning of what a receiver says of an error, for a log.
pub fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(512)]);
    let line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    line.trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn an_answer_says_whether_to_try_again() {
        for (status, answer) in [
            (200, Answer::Taken),
            (204, Answer::Taken),
            (400, Answer::Refused),
            (413, Answer::TooLarge),
            (422, Answer::Refused),
            (301, Answer::Retry),
            (401, Answer::Retry),
            (404, Answer::Retry),
            (429, Answer::Retry),
            (500, Answer::Retry),
            (503, Answer::Retry),
        ] {
            assert_eq!(of(StatusCode::from_u16(status).unwrap()), answer, "{status}");
        }
    }

    #[test]
    fn retry_after_is_a_number_or_a_date() {
        assert_eq!(retry_after(" 120 ", 0), Some(Duration::from_secs(120)));
        let date = "Sun, 06 Nov 1994 08:49:37 GMT";
        assert_eq!(retry_after(date, 784_111_770), Some(Duration::from_secs(7)));
        assert_eq!(retry_after(date, 800_000_000), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", 0), None);
    }

    proptest! {
        #[test]
        fn whatever_a_receiver_says_is_read(value in any::<String>(), now in any::<i64>(), body in any::<Vec<u8>>()) {
            let _ = retry_after(&value, now);
            prop_assert!(!excerpt(&body).contains(char::is_control));
        }
    }
}
