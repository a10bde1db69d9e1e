//! What a receiver's answer means, as the specification of OTLP says.

use crate::collect::output::{REFUSED, TOO_LARGE};
use prost::Message;
use std::error::Error as _;
use std::time::Duration;
use tonic::{Code, Status};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Try again, not before this.
    Again(Duration),
    /// Try again without compression.
    Plain,
    /// These, as they are, will never be taken.
    Never(&'static str),
}

/// google.rpc.Status and google.rpc.RetryInfo, as far as they are read here.
#[derive(Clone, PartialEq, Message)]
struct Details {
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

#[derive(Clone, PartialEq, Message)]
struct RetryInfo {
    #[prost(message, optional, tag = "1")]
    retry_delay: Option<prost_types::Duration>,
}

const RETRY_INFO: &str = "type.googleapis.com/google.rpc.RetryInfo";

/// When the receiver wants to be asked again, if it says that it does.
fn retry_delay(status: &Status) -> Option<Duration> {
    let details = Details::decode(status.details()).ok()?;
    let info = details.details.iter().find(|any| any.type_url == RETRY_INFO)?;
    let delay = RetryInfo::decode(info.value.as_slice()).ok()?.retry_delay.unwrap_or_default();
    Some(Duration::try_from(delay).unwrap_or(Duration::ZERO))
}

pub fn of(status: &Status) -> Answer {
    let delay = retry_delay(status);
    let again = Answer::Again(delay.unwrap_or(Duration::ZERO));
    let says = |words: &[&str]| words.iter().any(|word| status.message().contains(word));
    // It never left this host, or the connection broke: no answer of a receiver.
    // So is one that only a proxy on the way gave.
    if status.source().is_some() || status.message().starts_with("grpc-status header missing") {
        return again;
    }
    match status.code() {
        Code::Unimplemented if says(&["compress"]) => Answer::Plain,
        // It is about who sends, not about what: the events wait for the operator.
        Code::Unauthenticated | Code::PermissionDenied | Code::Unimplemented => again,
        Code::OutOfRange if says(&["too large"]) => Answer::Never(TOO_LARGE),
        Code::Cancelled
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unavailable
        | Code::DataLoss => again,
        Code::ResourceExhausted if delay.is_some() => again,
        Code::ResourceExhausted if says(&["larger than", "too large", "exceeds"]) => Answer::Never(TOO_LARGE),
        Code::Ok
        | Code::Unknown
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Internal => Answer::Never(REFUSED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn with_delay(code: Code, delay: prost_types::Duration) -> Status {
        let info = RetryInfo { retry_delay: Some(delay) }.encode_to_vec();
        let any = prost_types::Any { type_url: RETRY_INFO.to_owned(), value: info };
        Status::with_details(code, "busy", Details { details: vec![any] }.encode_to_vec().into())
    }

    #[test]
    fn codes_mean_what_the_specification_says() {
        let again = Answer::Again(Duration::ZERO);
        for code in [1, 4, 10, 11, 14, 15].map(Code::from) {
            assert_eq!(of(&Status::new(code, "")), again, "{code:?}");
        }
        for code in [2, 3, 5, 6, 8, 9, 13].map(Code::from) {
            assert_eq!(of(&Status::new(code, "")), Answer::Never(REFUSED), "{code:?}");
        }
        for code in [7, 12, 16].map(Code::from) {
            assert_eq!(of(&Status::new(code, "")), again, "{code:?}");
        }
    }

    #[test]
    fn a_receiver_without_room_is_asked_again_only_if_it_says_so() {
        let delay = prost_types::Duration { seconds: 2, nanos: 500_000_000 };
        let status = with_delay(Code::ResourceExhausted, delay);
        assert_eq!(of(&status), Answer::Again(Duration::from_millis(2500)));
        assert_eq!(of(&with_delay(Code::Unavailable, delay)), Answer::Again(Duration::from_millis(2500)));
        let negative = prost_types::Duration { seconds: -2, nanos: 0 };
        assert_eq!(of(&with_delay(Code::ResourceExhausted, negative)), Answer::Again(Duration::ZERO));
        let too_large = Status::resource_exhausted("grpc: received message larger than max (5 vs. 4)");
        assert_eq!(of(&too_large), Answer::Never(TOO_LARGE));
        let too_large = Status::out_of_range("Error, decoded message length too large: found 5 bytes");
        assert_eq!(of(&too_large), Answer::Never(TOO_LARGE));
    }

    #[test]
    fn a_connection_that_breaks_refuses_nothing() {
        let broken = Status::from_error(Box::new(std::io::Error::other("reset")));
        assert_eq!(of(&broken), Answer::Again(Duration::ZERO));
        let proxy = Status::unknown("grpc-status header missing, mapped from HTTP status code 500");
        assert_eq!(of(&proxy), Answer::Again(Duration::ZERO));
        let plain = Status::unimplemented("Content is compressed with `gzip` which isn't supported");
        assert_eq!(of(&plain), Answer::Plain);
    }

    proptest! {
        #[test]
        fn any_details_have_an_answer(code in 0..20i32, message in any::<String>(), details in any::<Vec<u8>>()) {
            let _ = of(&Status::with_details(Code::from(code), message, details.into()));
        }
    }
}
