//! The HTTP check: header and `GET` in one segment; the status decides.

use std::error::Error;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::time::Instant;

use http_body_util::Empty;
use hyper::Request;
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper::header::{CONNECTION, HOST, USER_AGENT};
use hyper_util::rt::TokioIo;
use tokio::time::timeout_at;

use super::{ANSWER_BYTES_MAX, Attempt, Failure, header_bytes};
use crate::address::Address;
use crate::net::check::{self, Connection};
use crate::proxy_protocol::Transport;

/// What is asked for and which status codes pass.
pub(super) struct Question<'a> {
    pub path: &'a str,
    /// `None`: the address.
    pub host: Option<&'a str>,
    /// Both ends included.
    pub expect_status: &'a [(u16, u16)],
}

/// Asks and says which status came. The rest of the answer stays in `stream`, for its close to read.
pub(super) async fn ask(
    stream: &mut Connection,
    attempt: &Attempt,
    started: Instant,
    question: &Question<'_>,
) -> Result<String, Failure> {
    let asking = async {
        let header = header_bytes(attempt, Transport::Stream, stream.ends()?);
        if !header.is_empty() {
            check::send_with_next(stream, &header)?;
        }
        status(stream, request(attempt, question)?).await
    };
    let status = timeout_at((started + attempt.timeout).into(), asking)
        .await
        .unwrap_or(Err(Failure::NoAnswer(attempt.timeout)))?;
    if question.expect_status.iter().any(|&(first, last)| (first..=last).contains(&status)) {
        return Ok(format!("status {status}"));
    }
    Err(Failure::Status { status, expected: question.expect_status.to_vec() })
}

fn request(attempt: &Attempt, question: &Question<'_>) -> Result<Request<Empty<Bytes>>, Failure> {
    let host = match (question.host, &attempt.to) {
        (Some(host), _) => host.to_owned(),
        (None, Address::Ip(address)) => address.to_string(),
        (None, Address::Unix(_)) => "localhost".to_owned(),
    };
    Request::get(question.path)
        .header(HOST, host)
        .header(USER_AGENT, concat!("preface/", env!("CARGO_PKG_VERSION")))
        .header(CONNECTION, "close")
        .body(Empty::new())
        .map_err(|error| Failure::Io(io::Error::new(io::ErrorKind::InvalidInput, error)))
}

/// Sends the request and reads the head of the answer. The connection is driven beside the question, in this task.
async fn status(stream: &mut Connection, request: Request<Empty<Bytes>>) -> Result<u16, Failure> {
    let (mut sender, mut connection) = http1::Builder::new()
        .title_case_headers(true)
        .max_buf_size(ANSWER_BYTES_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(failure)?;
    let mut answer = pin!(sender.send_request(request));
    let response = tokio::select! {
        biased;
        response = &mut answer => response,
        driven = poll_fn(|poll| connection.poll_without_shutdown(poll)) => match driven {
            Ok(()) => answer.await,
            Err(error) => Err(error),
        },
    };
    response.map(|response| response.status().as_u16()).map_err(failure)
}

fn failure(error: hyper::Error) -> Failure {
    if error.is_parse() || error.is_parse_too_large() {
        return Failure::NotHttp(error.to_string());
    }
    match error.source().and_then(|source| source.downcast_ref::<io::Error>()) {
        Some(cause) => Failure::Io(match cause.raw_os_error() {
            Some(code) => io::Error::from_raw_os_error(code),
            None => io::Error::new(cause.kind(), cause.to_string()),
        }),
        None if error.is_incomplete_message() || error.is_canceled() || error.is_closed() => Failure::Closed,
        None => Failure::NotHttp(error.to_string()),
    }
}
