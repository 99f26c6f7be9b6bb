//! PURE. What an upstream's first bytes, or their absence, say about the header that it got, or didn't get.
//!
//! One connection proves nothing: servers answer 400 to bad clients, and close on whom they like. So an upstream is
//! accused only by several connections in a row, and an answer to any of them clears it.

use crate::termination::Termination;

/// The first bytes of an answer that are looked at.
pub const HEAD_BYTES: usize = 12;

/// So many connections in a row accuse an upstream that has never answered one with the header it gets now.
const SUSPICIOUS_NEW: u32 = 3;
/// So many accuse one that has: somebody changed what it expects, or it meets nothing but bad clients.
const SUSPICIOUS_KNOWN: u32 = 30;

/// Later ends have other reasons: a receiver looks at the header first.
const SOON_SECONDS: u64 = 5;

/// How an upstream seems to have rejected what came first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejection {
    /// A reset, and not a byte before it.
    Reset,
    /// A close, and not a byte before it.
    Closed,
    /// `HTTP/1.x 400`: it took the header for the request.
    BadRequest,
    /// A TLS alert: it took the header for the handshake.
    TlsAlert,
}

impl Rejection {
    /// In the order of their discriminants.
    pub const ALL: [Rejection; 4] = [Rejection::Reset, Rejection::Closed, Rejection::BadRequest, Rejection::TlsAlert];

    /// The word in metrics and status.
    pub fn as_str(self) -> &'static str {
        match self {
            Rejection::Reset => "reset",
            Rejection::Closed => "closed",
            Rejection::BadRequest => "http_400",
            Rejection::TlsAlert => "tls_alert",
        }
    }

    /// For a sentence: "the last 3 connections were ...".
    pub fn in_words(self) -> &'static str {
        match self {
            Rejection::Reset => "reset without an answer",
            Rejection::Closed => "closed without an answer",
            Rejection::BadRequest => "answered HTTP 400",
            Rejection::TlsAlert => "answered with a TLS alert",
        }
    }

    /// Is the beginning of an answer too short to tell?
    pub fn is_unclear(head: &[u8; HEAD_BYTES]) -> bool {
        head.starts_with(b"HTTP/1.") && head[HEAD_BYTES - 1] == 0
    }

    /// Of the first bytes of an answer.
    pub fn of_answer(head: &[u8; HEAD_BYTES]) -> Option<Rejection> {
        match head {
            [b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0' | b'1', b' ', b'4', b'0', b'0'] => {
                Some(Rejection::BadRequest)
            }
            // Record type 21 of SSL 3.0 to TLS 1.3, two bytes long (RFC 8446, section 5.1).
            [21, 3, 0..=4, 0, 2, ..] => Some(Rejection::TlsAlert),
            _ => None,
        }
    }

    /// Of an end without any answer. A client that said nothing yet may have been the reason, and a client that closed
    /// first may have wanted none.
    pub fn of_end(termination: Termination, bytes_in: u64, seconds: u64) -> Option<Rejection> {
        match termination {
            _ if bytes_in == 0 || seconds >= SOON_SECONDS => None,
            Termination::UpstreamReset => Some(Rejection::Reset),
            Termination::UpstreamClosed => Some(Rejection::Closed),
            _ => None,
        }
    }
}

/// Do so many rejections in a row accuse an upstream? `has_answered`: any connection, with the header that it gets now.
pub fn is_suspicious(in_a_row: u32, has_answered: bool) -> bool {
    in_a_row >= if has_answered { SUSPICIOUS_KNOWN } else { SUSPICIOUS_NEW }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(bytes: &[u8]) -> [u8; HEAD_BYTES] {
        let mut head = [0; HEAD_BYTES];
        head[..bytes.len()].copy_from_slice(bytes);
        head
    }

    #[test]
    fn only_a_400_and_an_alert_look_like_a_rejected_header() {
        for (bytes, expected) in [
            (&b"HTTP/1.1 400"[..], Some(Rejection::BadRequest)),
            (b"HTTP/1.0 400", Some(Rejection::BadRequest)),
            (b"HTTP/1.1 404", None),
            (b"HTTP/1.1 200", None),
            (b"HTTP/2.0 400", None),
            (b"220 mail ESM", None),
            (b"HTTP/1.1 ", None),
            (&[21, 3, 3, 0, 2, 2, 70], Some(Rejection::TlsAlert)),
            (&[22, 3, 3, 0, 90, 2, 0, 0, 86, 3, 3, 1], None),
        ] {
            assert_eq!(Rejection::of_answer(&head(bytes)), expected, "{bytes:?}");
        }
    }

    #[test]
    fn half_a_status_line_says_nothing() {
        assert!(Rejection::is_unclear(&head(b"HTTP/1.1 40")));
        assert!(!Rejection::is_unclear(&head(b"HTTP/1.1 400")) && !Rejection::is_unclear(&head(b"220 ")));
    }

    #[test]
    fn an_end_without_an_answer_counts_if_the_client_asked_and_the_upstream_ended_it_soon() {
        for (termination, bytes_in, seconds, expected) in [
            (Termination::UpstreamClosed, 5, 0, Some(Rejection::Closed)),
            (Termination::UpstreamReset, 5, 4, Some(Rejection::Reset)),
            (Termination::UpstreamClosed, 0, 0, None),
            (Termination::UpstreamReset, 5, 5, None),
            (Termination::ClientClosed, 5, 0, None),
            (Termination::ClientReset, 5, 0, None),
            (Termination::IdleTimeout, 5, 0, None),
            (Termination::Disabled, 5, 0, None),
        ] {
            assert_eq!(
                Rejection::of_end(termination, bytes_in, seconds),
                expected,
                "{termination} {bytes_in} {seconds}"
            );
        }
    }

    #[test]
    fn an_upstream_that_answered_is_believed_longer() {
        assert!(!is_suspicious(2, false) && is_suspicious(3, false));
        assert!(!is_suspicious(29, true) && is_suspicious(30, true));
    }
}
