//! One connection of an examination: a header, a question, and all that comes back until it can be judged.

use std::future::Future;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use super::judge::{End, Exchange, Talk};
use super::tries::{Question, Try, goodbye};
use crate::address::Address;
use crate::config::Tlvs;
use crate::net::check::{self, Connection};

/// Of an answer this much is looked at, and this much is read at the close.
const ANSWER_BYTES_MAX: u64 = 64 * 1024;
/// Complaints follow a greeting within this, or half of the time-out if that is shorter.
const SETTLE_MAX: Duration = Duration::from_millis(400);
/// How long a close waits for the upstream's FIN, so that what it still sends is not answered by a reset.
const CLOSE_TIME_MAX: Duration = Duration::from_millis(300);

/// What headers over a UNIX socket say: it has no addresses, and a header that names some is what is to be tried.
const STAND_INS: (SocketAddr, SocketAddr) = {
    let loopback = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 1);
    (loopback, loopback)
};

/// Whom to ask, and how long to wait.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Where it connects.
    pub to: Address,
    /// From which address; `None`: the kernel's choice.
    pub source: Option<IpAddr>,
    /// For the connect, and again for each answer.
    pub timeout: Duration,
    /// Those of the try with TLVs.
    pub tlvs: Tlvs,
}

/// Makes one connection. Whatever goes wrong is part of what comes back.
pub async fn exchange(subject: &Subject, attempt: Try, question: &Question, talk: Talk) -> Exchange {
    let started = Instant::now();
    let mut exchange = Exchange::new(attempt);
    let connecting = timeout(subject.timeout, check::connect(&subject.to, subject.source));
    match connecting.await {
        Err(_) => {
            let limit = humantime::format_duration(subject.timeout);
            exchange.end = End::NotConnected(format!("not connected within {limit}"));
        }
        Ok(Err(error)) => exchange.end = End::NotConnected(words(&error)),
        Ok(Ok(mut stream)) => {
            exchange.connect = Some(started.elapsed());
            if let Err(error) = converse(subject, question, talk, &mut stream, &mut exchange).await {
                exchange.end = ended(&error);
            }
            exchange.duration = started.elapsed();
            close(stream).await;
            return exchange;
        }
    }
    exchange.duration = started.elapsed();
    exchange
}

async fn converse(
    subject: &Subject,
    question: &Question,
    talk: Talk,
    stream: &mut Connection,
    exchange: &mut Exchange,
) -> io::Result<()> {
    let header = exchange.attempt.header(&subject.tlvs, stream.ends()?.unwrap_or(STAND_INS));
    exchange.header = header.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
    let asked = question.bytes(&subject.to);
    let settle = SETTLE_MAX.min(subject.timeout / 2);
    if talk == Talk::ClientFirst {
        // In one segment, as preface sends them when the client's bytes are already there.
        exchange.asked = true;
        stream.write_all(&[exchange.header.as_slice(), &asked].concat()).await?;
        let waits = Waits { first: subject.timeout, settle };
        let (late, after) = (&mut exchange.late, &mut exchange.answer_after);
        exchange.end = read(stream, late, after, waits, |answer| question.is_answered(answer)).await?;
        return Ok(());
    }
    stream.write_all(&exchange.header).await?;
    let listen = if talk == Talk::ServerFirst { subject.timeout } else { subject.timeout / 2 };
    let (early, after) = (&mut exchange.early, &mut exchange.answer_after);
    exchange.end = read(stream, early, after, Waits { first: listen, settle }, |_| false).await?;
    if exchange.end != End::Open {
        return Ok(());
    }
    let last = match goodbye(&exchange.early) {
        Some(goodbye) => goodbye.to_vec(),
        None if exchange.early.is_empty() && talk == Talk::Unknown => asked,
        None => return Ok(()),
    };
    if last.is_empty() {
        return Ok(());
    }
    exchange.asked = true;
    stream.write_all(&last).await?;
    let waits = Waits { first: if exchange.early.is_empty() { subject.timeout } else { settle }, settle };
    let is_enough = |answer: &[u8]| exchange.early.is_empty() && question.is_answered(answer);
    // What counts for a server that speaks first is its greeting.
    let mut goodbye_after = None;
    let after = if exchange.early.is_empty() { &mut exchange.answer_after } else { &mut goodbye_after };
    exchange.end = read(stream, &mut exchange.late, after, waits, is_enough).await?;
    Ok(())
}

/// For the first byte, and for silence after it.
#[derive(Clone, Copy)]
struct Waits {
    first: Duration,
    settle: Duration,
}

/// Reads until it is enough, the upstream falls silent or ends the connection, or the limit is reached.
async fn read(
    stream: &mut Connection,
    into: &mut Vec<u8>,
    first_after: &mut Option<Duration>,
    waits: Waits,
    is_enough: impl Fn(&[u8]) -> bool,
) -> io::Result<End> {
    let begun = Instant::now();
    while (into.len() as u64) < ANSWER_BYTES_MAX && !is_enough(into) {
        let wait = if into.is_empty() { waits.first } else { waits.settle };
        into.reserve(4096);
        match within(wait, stream.read_buf(into)).await {
            None => return Ok(End::Open),
            Some(Ok(0)) => return Ok(End::Closed),
            Some(read) => drop(read?),
        }
        if first_after.is_none() {
            *first_after = Some(begun.elapsed());
        }
    }
    Ok(End::Open)
}

async fn within<T>(limit: Duration, future: impl Future<Output = T>) -> Option<T> {
    timeout(limit, future).await.ok()
}

/// FIN, and a little time for the upstream's: a receiver that reads LOCAL and then a reset logs an error, or dies of it
/// (Postfix's smtpd).
async fn close(mut stream: Connection) {
    if stream.shutdown().await.is_ok() {
        let mut rest = stream.take(ANSWER_BYTES_MAX);
        let _ = timeout(CLOSE_TIME_MAX, tokio::io::copy(&mut rest, &mut tokio::io::sink())).await;
    }
}

fn ended(error: &io::Error) -> End {
    match error.kind() {
        // A write after the upstream's reset is told EPIPE.
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => End::Reset,
        _ => End::NotConnected(words(error)),
    }
}

/// The system's words without its number: "connection refused".
fn words(error: &io::Error) -> String {
    let text = error.to_string().to_lowercase();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
