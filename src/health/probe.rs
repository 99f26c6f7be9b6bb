//! One check: from the connect to a verdict with its reason, and a close that no upstream logs as an error.

mod http;
mod tcp;
mod udp;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{timeout, timeout_at};

use super::state::{Verdict, is_late};
use crate::address::Address;
use crate::config::{CheckCommand, HeaderFormat, HealthCheck, Probe};
use crate::net::check::{self, Connection, Touch};
use crate::proxy_protocol::{Addresses, Command, Header, Transport, Version, spp};

/// Of an answer this much is looked at, and this much is read before a close.
pub const ANSWER_BYTES_MAX: usize = 64 * 1024;

/// How long a close waits for the upstream's FIN, so that what it still sends is not answered by a reset.
pub const CLOSE_TIME_MAX: Duration = Duration::from_secs(1);

/// What one check needs to know beside what it asks.
#[derive(Clone, Debug)]
pub struct Attempt {
    /// Where it connects.
    pub to: Address,
    /// From which address; `None`: the kernel's choice.
    pub source: Option<IpAddr>,
    /// Which header it sends first.
    pub header: Option<HeaderFormat>,
    /// What that header says.
    pub command: CheckCommand,
    /// Connect, ask and answer together.
    pub timeout: Duration,
}

/// What came of one check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What it says about the upstream.
    pub verdict: Verdict,
    /// Why, in a few words.
    pub reason: String,
}

/// Why a check did not pass.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("{}", check::words(.0))]
    Io(#[from] io::Error),
    #[error("not connected within {}", humantime::format_duration(*.0))]
    NotConnected(Duration),
    #[error("no answer within {}", humantime::format_duration(*.0))]
    NoAnswer(Duration),
    #[error("closed before an answer")]
    Closed,
    #[error("answer does not contain {} (got {})", excerpt(expected), excerpt(got))]
    Unexpected { expected: Vec<u8>, got: Vec<u8> },
    #[error("answer does not contain {} within {} (got {})",
        excerpt(expected), humantime::format_duration(*within), excerpt(got))]
    Incomplete { expected: Vec<u8>, got: Vec<u8>, within: Duration },
    #[error("status {status}, expected {}", ranges(expected))]
    Status { status: u16, expected: Vec<(u16, u16)> },
    #[error("not an HTTP answer: {0}")]
    NotHttp(String),
}

/// Checks once. Dropping the future gives the check up.
pub async fn run(attempt: &Attempt, check: &HealthCheck) -> Outcome {
    let started = Instant::now();
    let result = ask(attempt, started, &check.probe).await;
    let elapsed = started.elapsed();
    let (verdict, reason) = match result {
        Ok(done) => (Verdict::Passed, format!("{done} in {:.1} ms", elapsed.as_secs_f64() * 1000.0)),
        Err(Failure::Io(error)) if check::is_local(&error) => {
            (Verdict::Void, format!("local_resources: {}", check::words(&error)))
        }
        Err(failure) if is_late(elapsed, attempt.timeout) => {
            let late_ms = (elapsed - attempt.timeout).as_millis();
            (Verdict::Void, format!("seen {late_ms} ms late: {failure}"))
        }
        Err(failure) => (Verdict::Failed, failure.to_string()),
    };
    Outcome { verdict, reason }
}

/// Connects where there is something to connect, sends, perhaps reads; the verdict does not wait for the close.
async fn ask(attempt: &Attempt, started: Instant, probe: &Probe) -> Result<String, Failure> {
    match probe {
        Probe::Tcp { send, expect } if attempt.header.is_none() && send.is_empty() && expect.is_empty() => {
            touch(attempt, started).await
        }
        Probe::Tcp { send, expect } => {
            let mut stream = connected(attempt, started).await?;
            let result = tcp::ask(&mut stream, attempt, started, send, expect).await;
            tokio::spawn(close(stream, Remaining::Nothing));
            result
        }
        Probe::Http { path, host, expect_status } => {
            let mut stream = connected(attempt, started).await?;
            let question = http::Question { path, host: host.as_deref(), expect_status };
            let result = http::ask(&mut stream, attempt, started, &question).await;
            let remaining = match &result {
                Ok(_) | Err(Failure::Status { .. }) => Remaining::Body,
                Err(_) => Remaining::Nothing,
            };
            tokio::spawn(close(stream, remaining));
            result
        }
        Probe::Udp { send, expect } => udp::ask(attempt, started, send, expect).await,
    }
}

async fn connected(attempt: &Attempt, started: Instant) -> Result<Connection, Failure> {
    let connecting = timeout_at((started + attempt.timeout).into(), check::connect(&attempt.to, attempt.source));
    Ok(connecting.await.map_err(|_| Failure::NotConnected(attempt.timeout))??)
}

/// Connects and sends nothing at all, if possible without a trace at the upstream.
async fn touch(attempt: &Attempt, started: Instant) -> Result<String, Failure> {
    let touching = timeout_at((started + attempt.timeout).into(), check::touch(&attempt.to, attempt.source));
    match touching.await.map_err(|_| Failure::NotConnected(attempt.timeout))?? {
        Touch::NoTrace => {}
        Touch::Seen(stream) => drop(tokio::spawn(close(stream, Remaining::Nothing))),
    }
    Ok("connected".to_owned())
}

/// The header that goes before everything else of this check; empty without one. Never TLVs, never PROXY with UNSPEC:
/// half of the receivers refuse that, and LOCAL with addresses too. A UNIX socket has no addresses that could be told:
/// v2 says LOCAL there, v1 UNKNOWN, whatever the command.
fn header_bytes(attempt: &Attempt, transport: Transport, ends: Option<(SocketAddr, SocketAddr)>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let version = match (attempt.header, ends) {
        (None, _) | (Some(HeaderFormat::Spp), None) => return bytes,
        (Some(HeaderFormat::Spp), Some((local, peer))) => {
            spp::encode(&mut bytes, local, peer);
            return bytes;
        }
        (Some(HeaderFormat::V1), _) => Version::V1,
        (Some(HeaderFormat::V2), _) => Version::V2,
    };
    let (command, own) = match ends {
        Some((local, peer)) => (attempt.command, Addresses::inet(local, peer, transport)),
        None => (CheckCommand::Unknown, Addresses::Unknown),
    };
    header(version, command, own).encode(&mut bytes).expect("neither TLVs nor LOCAL with v1");
    bytes
}

fn header(version: Version, command: CheckCommand, own: Addresses) -> Header {
    let (command, addresses) = match (version, command) {
        (Version::V1, CheckCommand::Unknown) => (Command::Proxy, Addresses::Unknown),
        (Version::V1, CheckCommand::Local | CheckCommand::Proxy) => (Command::Proxy, own),
        (Version::V2, CheckCommand::Local | CheckCommand::Unknown) => (Command::Local, Addresses::Unknown),
        (Version::V2, CheckCommand::Proxy) => (Command::Proxy, own),
    };
    Header { version, command, addresses, tlvs: vec![] }
}

/// What the upstream still sends of its own accord.
#[derive(Clone, Copy, PartialEq)]
enum Remaining {
    /// Nothing that a FIN could cut short.
    Nothing,
    /// The body of an answer that it ends with its own FIN: one from us in between reads as a client that gave up.
    Body,
}

/// Sends FIN and waits a little for the upstream's: a receiver that reads LOCAL and then a reset logs an error, or dies
/// of it (Postfix's smtpd). What goes wrong here is of no interest, the verdict is given.
async fn close(mut stream: Connection, remaining: Remaining) {
    if remaining == Remaining::Body {
        read_to_end(&mut stream).await;
    }
    if stream.shutdown().await.is_ok() {
        read_to_end(&mut stream).await;
    }
}

/// Reads until the upstream closes, or one of the limits is reached.
async fn read_to_end(stream: &mut Connection) {
    let reading = async {
        let mut rest = stream.take(ANSWER_BYTES_MAX as u64);
        let _ = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await;
    };
    let _ = timeout(CLOSE_TIME_MAX, reading).await;
}

/// Bytes for people: quoted, escaped, and not more than a line takes.
fn excerpt(bytes: &[u8]) -> String {
    const BYTES_MAX: usize = 64;
    let shown = &bytes[..bytes.len().min(BYTES_MAX)];
    let more = if bytes.len() > BYTES_MAX { "..." } else { "" };
    format!("\"{}\"{more}", shown.escape_ascii())
}

fn ranges(expected: &[(u16, u16)]) -> String {
    let range = |&(first, last): &(u16, u16)| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    expected.iter().map(range).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::CheckHeader;
    use tokio::net::TcpListener;

    const LOCAL_V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

    async fn listening() -> (TcpListener, Attempt) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let to = Address::Ip(listener.local_addr().unwrap());
        let timeout = Duration::from_secs(60);
        (listener, Attempt { to, source: None, header: None, command: CheckCommand::Local, timeout })
    }

    fn check(probe: Probe) -> HealthCheck {
        HealthCheck {
            probe,
            interval: Duration::from_secs(5),
            timeout: Duration::from_secs(60),
            healthy_threshold: 2,
            unhealthy_threshold: 2,
            port: None,
            proxy_protocol: CheckHeader::Off,
            proxy_command: CheckCommand::Local,
        }
    }

    fn tcp(send: &str, expect: &str) -> HealthCheck {
        check(Probe::Tcp { send: send.into(), expect: expect.into() })
    }

    fn http() -> HealthCheck {
        check(Probe::Http { path: "/live?x=1".into(), host: None, expect_status: vec![(200, 399)] })
    }

    /// Accepts once, writes `answer` (in two parts) after the first bytes came, and closes its side unless it is to
    /// stay `open`. Returns the first read, and how all of the rest ended.
    async fn answer(listener: &TcpListener, answer: &[u8], open: bool) -> (Vec<u8>, io::Result<usize>) {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let mut first = vec![0; 4096];
        let read = stream.read(&mut first).await.unwrap();
        first.truncate(read);
        let (early, late) = answer.split_at(answer.len() / 2);
        let _ = stream.write_all(early).await;
        tokio::task::yield_now().await;
        let _ = stream.write_all(late).await;
        if !open {
            let _ = stream.shutdown().await;
        }
        (first, stream.read_to_end(&mut Vec::new()).await)
    }

    async fn asked(attempt: &Attempt, check: HealthCheck) -> Outcome {
        run(attempt, &check).await
    }

    /// On a busy machine a check with a short time-out may come out void; then it is asked again.
    async fn asked_in_time(attempt: &Attempt, check: HealthCheck) -> Outcome {
        loop {
            let outcome = run(attempt, &check).await;
            if outcome.verdict != Verdict::Void {
                return outcome;
            }
        }
    }

    fn failed(reason: &str) -> Outcome {
        Outcome { verdict: Verdict::Failed, reason: reason.to_owned() }
    }

    fn assert_passed(outcome: &Outcome, reason: &str) {
        assert_eq!(outcome.verdict, Verdict::Passed, "{outcome:?}");
        assert!(outcome.reason.starts_with(reason) && outcome.reason.ends_with(" ms"), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_tcp_check_without_anything_to_send_is_never_accepted() {
        let (listener, attempt) = listening().await;
        let listener = listener.into_std().unwrap();
        for _ in 0..100 {
            assert_passed(&run(&attempt, &tcp("", "")).await, "connected in ");
            assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[tokio::test]
    async fn a_header_alone_is_closed_by_fin_even_when_a_banner_comes() {
        let (listener, mut attempt) = listening().await;
        attempt.header = Some(HeaderFormat::V2);
        for banner in [&b""[..], b"220 mail ESMTP\r\n"] {
            let (outcome, (seen, end)) = tokio::join!(asked(&attempt, tcp("", "")), answer(&listener, banner, false));
            assert_passed(&outcome, "connected in ");
            assert_eq!(seen, LOCAL_V2);
            assert_eq!(end.unwrap(), 0, "a FIN, not a reset, and nothing more");
        }
    }

    #[tokio::test]
    async fn v1_names_the_address_that_the_upstream_sees() {
        let (listener, mut attempt) = listening().await;
        attempt.header = Some(HeaderFormat::V1);
        attempt.source = Some("127.0.0.7".parse().unwrap());
        let upstream = async {
            let (mut stream, peer) = listener.accept().await.unwrap();
            let mut seen = String::new();
            stream.read_to_string(&mut seen).await.unwrap();
            let to = attempt.to.ip().unwrap();
            assert_eq!(seen, format!("PROXY TCP4 127.0.0.7 {} {} {}\r\n", to.ip(), peer.port(), to.port()));
        };
        let (outcome, ()) = tokio::join!(asked(&attempt, tcp("", "")), upstream);
        assert_passed(&outcome, "connected in ");
    }

    #[tokio::test]
    async fn header_and_question_are_one_segment_and_the_answer_is_searched() {
        let (listener, mut attempt) = listening().await;
        attempt.header = Some(HeaderFormat::V2);
        let question = [LOCAL_V2, b"PING\r\n"].concat();
        let long = vec![b'x'; 2 * ANSWER_BYTES_MAX];
        for (reply, open, expected) in [
            (&b"+PONG\r\n"[..], true, None),
            (b"+PONG\r\n", false, None),
            (b"-ERR\r\n", false, Some(r#"answer does not contain "PONG" (got "-ERR\r\n")"#)),
            (b"", false, Some("closed before an answer")),
        ] {
            let check = tcp("PING\r\n", "PONG");
            let (outcome, (seen, end)) = tokio::join!(run(&attempt, &check), answer(&listener, reply, open));
            match expected {
                None => assert_passed(&outcome, "answered in "),
                Some(reason) => assert_eq!(outcome, failed(reason)),
            }
            assert_eq!(seen, question);
            assert_eq!(end.unwrap(), 0, "a FIN");
        }
        let check = tcp("PING\r\n", "PONG");
        let (outcome, _) = tokio::join!(run(&attempt, &check), answer(&listener, &long, true));
        assert!(outcome.reason.starts_with(r#"answer does not contain "PONG" (got "xxx"#), "{outcome:?}");
    }

    #[tokio::test]
    async fn a_banner_is_expected_without_a_question() {
        let (listener, attempt) = listening().await;
        let upstream = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"220 mail ESMTP\r\n").await.unwrap();
            stream.read_to_end(&mut Vec::new()).await
        };
        let (outcome, end) = tokio::join!(asked(&attempt, tcp("", "220 ")), upstream);
        assert_passed(&outcome, "answered in ");
        assert_eq!(end.unwrap(), 0);
    }

    #[tokio::test]
    async fn silence_is_told_apart_by_how_far_it_came() {
        let (listener, mut attempt) = listening().await;
        attempt.timeout = Duration::from_millis(50);
        assert_eq!(asked_in_time(&attempt, tcp("PING", "PONG")).await, failed("no answer within 50ms"));
        assert_eq!(asked_in_time(&attempt, http()).await, failed("no answer within 50ms"));
        drop(listener);
        let (listener, attempt) = listening().await;
        let attempt = Attempt { timeout: Duration::from_secs(1), ..attempt };
        let (outcome, _) = tokio::join!(asked(&attempt, tcp("PING", "PONG")), answer(&listener, b"PON", true));
        assert_eq!(outcome, failed(r#"answer does not contain "PONG" within 1s (got "PON")"#));
    }

    #[tokio::test]
    async fn a_connect_that_is_not_answered_or_refused_fails() {
        let (listener, mut attempt) = listening().await;
        drop(listener);
        for check in [tcp("", ""), tcp("x", ""), http()] {
            assert_eq!(run(&attempt, &check).await, failed("connection refused"));
        }
        // A full accept queue: the kernel drops further SYNs.
        let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        full.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        full.listen(0).unwrap();
        let address = full.local_addr().unwrap().as_socket().unwrap();
        attempt.to = Address::Ip(address);
        attempt.timeout = Duration::from_millis(50);
        let _queued = std::net::TcpStream::connect(address).unwrap();
        for check in [tcp("", ""), tcp("x", ""), http()] {
            assert_eq!(asked_in_time(&attempt, check).await, failed("not connected within 50ms"));
        }
    }

    #[tokio::test]
    async fn what_is_our_own_fault_is_void() {
        let (_listener, mut attempt) = listening().await;
        let starved = Attempt { timeout: Duration::from_millis(20), ..attempt.clone() };
        let check = tcp("PING", "PONG");
        // SLEEP: whatever else this thread does takes longer than the check's time.
        let blocks = async { std::thread::sleep(Duration::from_millis(100)) };
        let (outcome, ()) = tokio::join!(run(&starved, &check), blocks);
        assert_eq!(outcome.verdict, Verdict::Void);
        assert!(outcome.reason.ends_with(" ms late: no answer within 20ms"), "{outcome:?}");
        // TEST-NET-2 is on no machine.
        attempt.source = Some("198.51.100.1".parse().unwrap());
        for check in [tcp("", ""), tcp("x", ""), http()] {
            let outcome = run(&attempt, &check).await;
            assert_eq!(outcome.verdict, Verdict::Void);
            assert_eq!(outcome.reason, "local_resources: cannot assign requested address");
        }
    }

    #[tokio::test]
    async fn an_http_check_is_one_segment_and_judges_the_status() {
        let (listener, mut attempt) = listening().await;
        let request = format!(
            "GET /live?x=1 HTTP/1.1\r\nHost: {}\r\nUser-Agent: preface/{}\r\nConnection: close\r\n\r\n",
            attempt.to,
            env!("CARGO_PKG_VERSION")
        );
        for (header, prefix) in [(None, &b""[..]), (Some(HeaderFormat::V2), LOCAL_V2)] {
            attempt.header = header;
            for (reply, expected) in [
                (&b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"[..], None),
                (b"HTTP/1.0 204 No Content\r\n\r\n", None),
                (b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n\r\n", Some("status 503, expected 200-399")),
                (b"", Some("closed before an answer")),
                (b"HTTP/1.1 20", Some("closed before an answer")),
                (b"SSH-2.0-OpenSSH_9.2\r\n", Some("not an HTTP answer: invalid HTTP version parsed")),
            ] {
                let check = http();
                let (outcome, (seen, end)) = tokio::join!(run(&attempt, &check), answer(&listener, reply, false));
                match expected {
                    None => assert_passed(&outcome, "status 20"),
                    Some(reason) => assert_eq!(outcome, failed(reason)),
                }
                let wanted = [prefix, request.as_bytes()].concat();
                assert_eq!(seen.escape_ascii().to_string(), wanted.escape_ascii().to_string());
                assert_eq!(end.unwrap(), 0, "a FIN");
            }
        }
    }

    #[tokio::test]
    async fn a_body_is_read_before_the_fin() {
        let (listener, attempt) = listening().await;
        let check = http();
        let upstream = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 40000\r\n\r\n").await.unwrap();
            stream.write_all(&[b'x'; 20_000]).await.unwrap();
            tokio::task::yield_now().await;
            stream.write_all(&[b'x'; 20_000]).await.unwrap();
            stream.shutdown().await.unwrap();
            stream.read_to_end(&mut Vec::new()).await
        };
        let (outcome, end) = tokio::join!(run(&attempt, &check), upstream);
        assert_passed(&outcome, "status 200 in ");
        assert_eq!(end.unwrap(), 0, "a FIN");
    }

    #[tokio::test]
    async fn a_reset_is_called_one() {
        let (listener, mut attempt) = listening().await;
        attempt.header = Some(HeaderFormat::V1);
        for check in [tcp("PING", "PONG"), http()] {
            let upstream = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)).unwrap();
            };
            let (outcome, ()) = tokio::join!(run(&attempt, &check), upstream);
            assert_eq!(outcome, failed("connection reset by peer"));
        }
    }

    #[test]
    fn the_header_of_a_check_names_the_check_or_nobody() {
        let local = "192.0.2.1:40000".parse().unwrap();
        let peer = "192.0.2.2:80".parse().unwrap();
        let own_v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\x9c\x40\0\x50";
        for (version, command, expected) in [
            (Version::V1, CheckCommand::Local, b"PROXY TCP4 192.0.2.1 192.0.2.2 40000 80\r\n".as_slice()),
            (Version::V1, CheckCommand::Proxy, b"PROXY TCP4 192.0.2.1 192.0.2.2 40000 80\r\n"),
            (Version::V1, CheckCommand::Unknown, b"PROXY UNKNOWN\r\n"),
            (Version::V2, CheckCommand::Local, LOCAL_V2),
            (Version::V2, CheckCommand::Proxy, own_v2),
            // PROXY + UNSPEC is refused by half of the receivers; LOCAL means the same.
            (Version::V2, CheckCommand::Unknown, LOCAL_V2),
        ] {
            let mut bytes = Vec::new();
            let own = Addresses::inet(local, peer, Transport::Stream);
            header(version, command, own).encode(&mut bytes).unwrap();
            assert_eq!(
                bytes.escape_ascii().to_string(),
                expected.escape_ascii().to_string(),
                "{version:?} {command:?}"
            );
        }
    }

    #[test]
    fn reasons_are_short_and_exact() {
        let within = Duration::from_millis(1500);
        let (expected, got) = (b"PONG".to_vec(), b"-ERR \"x\"\r\n".to_vec());
        for (failure, reason) in [
            (Failure::Io(io::Error::from_raw_os_error(111)), "connection refused"),
            (Failure::Io(io::Error::from_raw_os_error(113)), "no route to host"),
            (Failure::NotConnected(within), "not connected within 1s 500ms"),
            (Failure::NoAnswer(Duration::from_secs(2)), "no answer within 2s"),
            (Failure::Closed, "closed before an answer"),
            (
                Failure::Unexpected { expected: expected.clone(), got: got.clone() },
                r#"answer does not contain "PONG" (got "-ERR \"x\"\r\n")"#,
            ),
            (
                Failure::Incomplete { expected, got, within },
                r#"answer does not contain "PONG" within 1s 500ms (got "-ERR \"x\"\r\n")"#,
            ),
            (Failure::Status { status: 503, expected: vec![(200, 399)] }, "status 503, expected 200-399"),
            (
                Failure::Status { status: 204, expected: vec![(200, 200), (301, 302)] },
                "status 204, expected 200, 301-302",
            ),
        ] {
            assert_eq!(failure.to_string(), reason);
        }
        assert_eq!(excerpt(&[b'a'; 65]), format!("\"{}\"...", "a".repeat(64)));
    }
}
