//! Why TLS failed, in words for the log of one end.

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible};
use std::io;

/// At a sensor: what it makes of the collector, or the collector of it.
pub(crate) fn of_collector(error: &io::Error) -> Option<String> {
    Some(match tls(error)? {
        Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA => {
                "the collector refused this sensor's certificate: it is not from a CA that the collector trusts"
                    .to_owned()
            }
            AlertDescription::CertificateExpired => {
                "the collector refused this sensor's certificate: it has expired or is not valid yet \
                 (or the clock of one of the two hosts is wrong)"
                    .to_owned()
            }
            AlertDescription::CertificateRequired => {
                "the collector asks for a certificate, and got none".to_owned()
            }
            AlertDescription::ProtocolVersion => "the collector does not speak TLS 1.3".to_owned(),
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied
            | AlertDescription::DecryptError => {
                format!("the collector refused this sensor's certificate ({alert:?}); its log says more")
            }
            other => format!("the collector ended TLS: {other:?}"),
        },
        Error::InvalidCertificate(why) => format!("the collector's certificate was refused: {}", flaw(why)),
        Error::InvalidMessage(_) => {
            "the collector does not speak TLS; does it run with --tls-cert?".to_owned()
        }
        Error::PeerIncompatible(_) => "the collector does not speak TLS 1.3".to_owned(),
        other => format!("TLS with the collector failed: {other}"),
    })
}

/// At an output: what it makes of its receiver, or the receiver of it.
pub(crate) fn of_receiver(error: &io::Error) -> Option<String> {
    Some(match tls(error)? {
        Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "the receiver asks for a certificate, and got none: give `cert` and `key`".to_owned()
        }
        Error::AlertReceived(AlertDescription::UnknownCA) => {
            "the receiver refused our certificate: it is not from a CA that it trusts".to_owned()
        }
        Error::AlertReceived(alert) => format!("the receiver ended TLS: {alert:?}"),
        Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "the receiver's certificate was refused: it is not from a CA in `ca`".to_owned()
        }
        Error::InvalidCertificate(why) => format!("the receiver's certificate was refused: {}", flaw(why)),
        Error::InvalidMessage(_) => "the receiver does not speak TLS".to_owned(),
        other => format!("TLS with the receiver failed: {other}"),
    })
}

/// At a collector: why it refused a client.
pub(crate) fn of_client(error: &io::Error) -> String {
    let Some(tls) = tls(error) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => "it closed the connection before TLS was done".to_owned(),
            _ => error.to_string(),
        };
    };
    match tls {
        Error::NoCertificatesPresented => "it has no certificate".to_owned(),
        Error::InvalidCertificate(why) => format!("its certificate was refused: {}", flaw(why)),
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "it does not speak TLS: a sensor needs --collector https://…".to_owned()
        }
        Error::PeerIncompatible(
            PeerIncompatible::Tls13RequiredForQuic
            | PeerIncompatible::SupportedVersionsExtensionRequired
            | PeerIncompatible::Tls12NotOfferedOrEnabled
            | PeerIncompatible::Tls12NotOffered,
        ) => "it does not speak TLS 1.3".to_owned(),
        Error::AlertReceived(AlertDescription::UnknownCA) => {
            "it refused this collector's certificate: not from a CA that it trusts".to_owned()
        }
        Error::AlertReceived(AlertDescription::BadCertificate) => {
            "it refused this collector's certificate: not for the name that it connects to?".to_owned()
        }
        Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "it refused this collector's certificate: expired or not valid yet by its clock".to_owned()
        }
        Error::AlertReceived(alert) => format!("it ended TLS: {alert:?}"),
        other => other.to_string(),
    }
}

fn tls(error: &io::Error) -> Option<&Error> {
    error.get_ref()?.downcast_ref()
}

fn flaw(why: &CertificateError) -> String {
    match why {
        CertificateError::UnknownIssuer => "it is not from the CA in --tls-ca".to_owned(),
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => "it has expired".to_owned(),
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "it is not valid yet; is the clock right?".to_owned()
        }
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "it is for another purpose (a sensor's is for clients, a collector's for servers)".to_owned()
        }
        CertificateError::NotValidForNameContext { expected, presented } => {
            format!("it is for {}, not for {}", presented.join(", "), expected.to_str())
        }
        CertificateError::BadSignature => "its signature is not good".to_owned(),
        other => other.to_string(),
    }
}
