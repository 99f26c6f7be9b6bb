//! One question to the name servers: one after the other, over UDP, and over TCP where the answer is too long for that.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use rustix::rand::{GetRandomFlags, getrandom};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::{Instant, timeout, timeout_at};

use super::message::{self, Question, Record, Reply};
use super::resolv::Resolv;
use crate::control::lookups::{LookupError, Outcome};

/// Longest datagram that is taken.
const DATAGRAM_BYTES_MAX: usize = 4_096;
/// A try over TCP has this many times the time of one over UDP: it takes a connection and perhaps many packets.
const TCP_TIMES: u32 = 2;

/// What a server that knows says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Known {
    /// The name exists, and has these records, perhaps none.
    Records(Vec<Record>, Duration),
    /// The name does not exist.
    Nxdomain,
}

/// Asks each server until one knows. A server that cannot tell, or says nothing, is passed over, as in glibc.
pub async fn ask(resolv: &Resolv, question: &Question) -> Result<Known, LookupError> {
    let mut failure: Option<LookupError> = None;
    for _ in 0..resolv.attempts {
        for server in &resolv.servers {
            let error = match ask_server(resolv, *server, question).await {
                Ok(Reply::Records(records, ttl)) => return Ok(Known::Records(records, ttl)),
                Ok(Reply::Nxdomain) => return Ok(Known::Nxdomain),
                Ok(Reply::Truncated) => error(Outcome::Error, question, *server, "a truncated answer over TCP"),
                Ok(Reply::Failed(word)) => match word.as_str() {
                    "SERVFAIL" => error(Outcome::Servfail, question, *server, "SERVFAIL"),
                    word => error(Outcome::Error, question, *server, word),
                },
                Err(reason) => {
                    let timed_out = reason.kind() == io::ErrorKind::TimedOut;
                    let outcome = if timed_out { Outcome::Timeout } else { Outcome::Error };
                    error(outcome, question, *server, &reason.to_string())
                }
            };
            // What a server said is worth more than that another one said nothing.
            if failure.as_ref().is_none_or(|before| before.outcome == Outcome::Timeout) {
                failure = Some(error);
            }
        }
    }
    Err(failure.expect("there is at least one server and one attempt"))
}

fn error(outcome: Outcome, question: &Question, server: SocketAddr, said: &str) -> LookupError {
    let Question { name, kind } = question;
    LookupError { outcome, message: format!("{} of {name} from {}: {said}", kind.as_str(), server.ip()) }
}

async fn ask_server(resolv: &Resolv, server: SocketAddr, question: &Question) -> io::Result<Reply> {
    if !resolv.use_vc {
        let reply = by_udp(resolv, server, question).await?;
        if reply != Reply::Truncated {
            return Ok(reply);
        }
    }
    let by_tcp = timeout(resolv.timeout * TCP_TIMES, by_tcp(server, question)).await;
    let reply = by_tcp.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    reply.map_err(|error| match error.kind() {
        _ if resolv.use_vc => error,
        kind => io::Error::new(kind, format!("too long for UDP, and over TCP: {error}")),
    })
}

async fn by_udp(resolv: &Resolv, server: SocketAddr, question: &Question) -> io::Result<Reply> {
    let deadline = Instant::now() + resolv.timeout;
    let any: SocketAddr = match server.is_ipv4() {
        true => (Ipv4Addr::UNSPECIFIED, 0).into(),
        false => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    // A port of the kernel's choice and a random id for each question, and a connected socket: answers of others must
    // guess all three.
    let socket = UdpSocket::bind(any).await?;
    socket.connect(server).await?;
    let id = random_id()?;
    socket.send(&encode(question, id, resolv.edns)?).await?;
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    loop {
        let received = timeout_at(deadline, socket.recv(&mut buffer)).await;
        let length = received.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        if let Some(reply) = message::decode(&buffer[..length], question, id) {
            return Ok(reply);
        }
    }
}

/// RFC 1035, section 4.2.2: "The message is prefixed with a two byte length field".
async fn by_tcp(server: SocketAddr, question: &Question) -> io::Result<Reply> {
    let mut stream = TcpStream::connect(server).await?;
    let id = random_id()?;
    let message = encode(question, id, false)?;
    let mut framed = (message.len() as u16).to_be_bytes().to_vec();
    framed.extend(message);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    let no_answer = || io::Error::other("an answer to another question");
    message::decode(&answer, question, id).ok_or_else(no_answer)
}

fn encode(question: &Question, id: u16, edns: bool) -> io::Result<Vec<u8>> {
    message::encode(question, id, edns).map_err(io::Error::other)
}

fn random_id() -> io::Result<u16> {
    let mut bytes = [0; 2];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(u16::from_ne_bytes(bytes))
}
