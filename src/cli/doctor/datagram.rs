//! One question over UDP: a header and a question in one datagram, and the first answer.

use std::io;
use std::time::{Duration, Instant};

use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::exchange::{Subject, words};
use super::judge::{End, Exchange};
use super::tries::{Question, Try};
use crate::net::check;
use crate::proxy_protocol::Transport;

/// No answer is longer.
const ANSWER_BYTES_MAX: usize = 65_535;
/// A datagram may be lost: it is sent this often, in equal parts of the time.
const SENT_MAX: u32 = 2;

/// Asks once. Whatever goes wrong is part of what comes back.
pub async fn exchange(subject: &Subject, attempt: Try, question: &Question) -> Exchange {
    let started = Instant::now();
    let mut exchange = Exchange { is_datagram: true, asked: true, ..Exchange::new(attempt) };
    if let Err(error) = ask(subject, question, &mut exchange).await {
        exchange.end = End::NotConnected(words(&error));
    }
    exchange.duration = started.elapsed();
    exchange
}

async fn ask(subject: &Subject, question: &Question, exchange: &mut Exchange) -> io::Result<()> {
    let no_ip = || io::Error::new(io::ErrorKind::InvalidInput, "a UNIX socket takes no datagrams here");
    let to = subject.to.ip().ok_or_else(no_ip)?;
    let socket = check::datagram(to, subject.source)?;
    let header = exchange.attempt.header(&subject.tlvs, (socket.local_addr()?, to), Transport::Dgram);
    exchange.header = header.map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error.to_string()))?;
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    for _ in 0..SENT_MAX {
        send(subject, question, exchange, &socket).await?;
        let asked = Instant::now();
        if let Ok(length) = timeout(subject.timeout / SENT_MAX, socket.recv(&mut answer)).await {
            let length = length?;
            exchange.late = answer[..length].to_vec();
            (exchange.connect, exchange.answer_after) = (Some(Duration::ZERO), Some(asked.elapsed()));
            break;
        }
    }
    Ok(())
}

async fn send(subject: &Subject, question: &Question, exchange: &Exchange, socket: &UdpSocket) -> io::Result<()> {
    let question = question.datagram();
    if subject.header_alone && !exchange.header.is_empty() {
        socket.send(&exchange.header).await?;
        return socket.send(&question).await.map(drop);
    }
    socket.send(&[exchange.header.as_slice(), &question].concat()).await.map(drop)
}
