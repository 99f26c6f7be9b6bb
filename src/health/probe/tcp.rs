//! The TCP check: header and question in one write, then, if one is expected, the answer.

use std::time::Instant;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout_at;

use super::{ANSWER_BYTES_MAX, Attempt, Failure, header_bytes};
use crate::net::check::Connection;
use crate::proxy_protocol::Transport;

/// Sends what there is to send and reads until `expect` was seen. Says what was done: "connected" or "answered".
pub(super) async fn ask(
    stream: &mut Connection,
    attempt: &Attempt,
    started: Instant,
    send: &[u8],
    expect: &[u8],
) -> Result<String, Failure> {
    let mut answer = Vec::new();
    let asking = async {
        let mut question = header_bytes(attempt, Transport::Stream, stream.ends()?);
        question.extend_from_slice(send);
        stream.write_all(&question).await?;
        if expect.is_empty() {
            return Ok("connected".to_owned());
        }
        while answer.len() < ANSWER_BYTES_MAX {
            let searched = answer.len().saturating_sub(expect.len() - 1);
            answer.reserve(4096);
            if stream.read_buf(&mut answer).await? == 0 {
                break;
            }
            if answer[searched..].windows(expect.len()).any(|window| window == expect) {
                return Ok("answered".to_owned());
            }
        }
        match answer.is_empty() {
            true => Err(Failure::Closed),
            false => Err(Failure::Unexpected { expected: expect.to_vec(), got: answer.clone() }),
        }
    };
    match timeout_at((started + attempt.timeout).into(), asking).await {
        Ok(result) => result,
        Err(_) if answer.is_empty() => Err(Failure::NoAnswer(attempt.timeout)),
        Err(_) => Err(Failure::Incomplete { expected: expect.to_vec(), got: answer, within: attempt.timeout }),
    }
}
