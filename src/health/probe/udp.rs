//! The UDP check: one datagram with header and question. Nobody accepts a datagram, so without an expected answer the
//! one thing that fails is a refusal: an ICMP error from the upstream's machine or from a router before it.

use std::io;
use std::time::Instant;

use tokio::time::timeout_at;

use super::{ANSWER_BYTES_MAX, Attempt, Failure, header_bytes};
use crate::net::check;
use crate::proxy_protocol::Transport;

/// Sends once and waits for a datagram with `expect` in it; those without are passed over, they may belong to something
/// else. An empty `expect`: any answer is one, and silence until the time-out passes too. Says what was seen:
/// "answered" or "not refused".
pub(super) async fn ask(attempt: &Attempt, started: Instant, send: &[u8], expect: &[u8]) -> Result<String, Failure> {
    // Validation keeps UNIX sockets away from udp checks.
    let to = attempt.to.ip().ok_or_else(|| Failure::Io(io::ErrorKind::Unsupported.into()))?;
    let socket = check::datagram(to, attempt.source)?;
    let mut question = header_bytes(attempt, Transport::Dgram, Some((socket.local_addr()?, to)));
    question.extend_from_slice(send);
    let mut answer = vec![0; ANSWER_BYTES_MAX];
    let mut got = None;
    let asking = async {
        socket.send(&question).await?;
        loop {
            let len = socket.recv(&mut answer).await?;
            let answer = &answer[..len];
            if expect.is_empty() || answer.windows(expect.len()).any(|window| window == expect) {
                return Ok("answered".to_owned());
            }
            got.get_or_insert_with(|| answer.to_vec());
        }
    };
    match timeout_at((started + attempt.timeout).into(), asking).await {
        Ok(result) => result,
        Err(_) if expect.is_empty() => Ok("not refused".to_owned()),
        Err(_) => Err(match got {
            None => Failure::NoAnswer(attempt.timeout),
            Some(got) => Failure::Incomplete { expected: expect.to_vec(), got, within: attempt.timeout },
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Outcome, run};
    use crate::config::{CheckCommand, CheckHeader, HeaderFormat, HealthCheck, Probe};
    use crate::health::probe::Attempt;
    use crate::health::state::Verdict;
    use crate::proxy_protocol::{Addresses, Decoded, Header, Transport, Version, decode, spp};
    use std::time::Duration;
    use tokio::net::UdpSocket;

    const HOUR: Duration = Duration::from_secs(3_600);
    const SHORT: Duration = Duration::from_millis(50);

    async fn upstream(address: &str) -> (UdpSocket, Attempt) {
        let socket = UdpSocket::bind(address).await.unwrap();
        let to = socket.local_addr().unwrap().into();
        (socket, Attempt { to, source: None, header: None, command: CheckCommand::Proxy, timeout: HOUR })
    }

    fn udp(send: &str, expect: &str) -> HealthCheck {
        HealthCheck {
            probe: Probe::Udp { send: send.into(), expect: expect.into() },
            interval: HOUR,
            timeout: HOUR,
            healthy_threshold: 2,
            unhealthy_threshold: 2,
            port: None,
            proxy_protocol: CheckHeader::Same,
            proxy_command: CheckCommand::Proxy,
        }
    }

    /// Receives one datagram and sends `answers`. Returns what came, and from where.
    async fn answer(socket: &UdpSocket, answers: &[&[u8]]) -> (Vec<u8>, std::net::SocketAddr) {
        let mut question = vec![0; 4096];
        let (len, peer) = socket.recv_from(&mut question).await.unwrap();
        question.truncate(len);
        for answer in answers {
            socket.send_to(answer, peer).await.unwrap();
        }
        (question, peer)
    }

    /// On a busy machine a check with a short time-out may come out void; then it is asked again.
    async fn asked_in_time(attempt: &Attempt, check: &HealthCheck) -> Outcome {
        loop {
            let outcome = run(attempt, check).await;
            if outcome.verdict != Verdict::Void {
                return outcome;
            }
        }
    }

    fn failed(reason: &str) -> Outcome {
        Outcome { verdict: Verdict::Failed, reason: reason.to_owned() }
    }

    #[track_caller]
    fn assert_passed(outcome: &Outcome, reason: &str) {
        assert_eq!(outcome.verdict, Verdict::Passed, "{outcome:?}");
        assert!(outcome.reason.starts_with(reason) && outcome.reason.ends_with(" ms"), "{outcome:?}");
    }

    #[tokio::test]
    async fn the_answer_is_searched_and_what_is_none_is_passed_over() {
        let (socket, attempt) = upstream("127.0.0.1:0").await;
        for answers in [&[&b"+PONG\r\n"[..]][..], &[b"", b"PON", b"G", b"xPONGx"]] {
            let check = udp("PING", "PONG");
            let (outcome, (question, _)) = tokio::join!(run(&attempt, &check), answer(&socket, answers));
            assert_passed(&outcome, "answered in ");
            assert_eq!(question, b"PING");
        }
    }

    #[tokio::test]
    async fn silence_fails_only_where_an_answer_is_expected() {
        let (_socket, mut attempt) = upstream("127.0.0.1:0").await;
        attempt.timeout = SHORT;
        assert_eq!(asked_in_time(&attempt, &udp("PING", "PONG")).await, failed("no answer within 50ms"));
        assert_passed(&asked_in_time(&attempt, &udp("PING", "")).await, "not refused in ");
        assert_passed(&asked_in_time(&attempt, &udp("", "")).await, "not refused in ");
    }

    #[tokio::test]
    async fn a_wrong_answer_is_shown() {
        let (socket, mut attempt) = upstream("127.0.0.1:0").await;
        attempt.timeout = SHORT;
        let serving = tokio::spawn(async move {
            loop {
                answer(&socket, &[b"-ERR", b"again"]).await;
            }
        });
        // Under load the answer may come later than the short time-out: then nothing came.
        let outcome = loop {
            let outcome = asked_in_time(&attempt, &udp("PING", "PONG")).await;
            if outcome != failed("no answer within 50ms") {
                break outcome;
            }
        };
        assert_eq!(outcome, failed(r#"answer does not contain "PONG" within 50ms (got "-ERR")"#));
        serving.abort();
    }

    #[tokio::test]
    async fn any_answer_will_do_where_none_is_expected_and_nothing_to_send_is_an_empty_datagram() {
        let (socket, attempt) = upstream("127.0.0.1:0").await;
        let check = udp("", "");
        let (outcome, (question, _)) = tokio::join!(run(&attempt, &check), answer(&socket, &[b""]));
        assert_passed(&outcome, "answered in ");
        assert_eq!(question, b"");
    }

    #[tokio::test]
    async fn a_closed_port_is_refused_with_and_without_an_expected_answer() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (socket, attempt) = upstream(address).await;
            drop(socket);
            for check in [udp("PING", "PONG"), udp("PING", ""), udp("", "")] {
                assert_eq!(run(&attempt, &check).await, failed("connection refused"));
            }
        }
    }

    #[tokio::test]
    async fn an_answer_from_another_port_is_none() {
        let (socket, mut attempt) = upstream("127.0.0.1:0").await;
        attempt.timeout = SHORT;
        let other = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let spoofing = tokio::spawn(async move {
            loop {
                let (_, peer) = answer(&socket, &[]).await;
                other.send_to(b"PONG", peer).await.unwrap();
            }
        });
        assert_eq!(asked_in_time(&attempt, &udp("PING", "PONG")).await, failed("no answer within 50ms"));
        spoofing.abort();
    }

    #[tokio::test]
    async fn v2_stands_before_the_question_in_one_datagram() {
        for (address, source) in [("127.0.0.1:0", "127.0.0.7"), ("[::1]:0", "::1")] {
            let (socket, mut attempt) = upstream(address).await;
            attempt.header = Some(HeaderFormat::V2);
            attempt.source = Some(source.parse().unwrap());
            for command in [CheckCommand::Proxy, CheckCommand::Local] {
                attempt.command = command;
                let check = udp("PING", "PONG");
                let (outcome, (datagram, peer)) = tokio::join!(run(&attempt, &check), answer(&socket, &[b"PONG"]));
                assert_passed(&outcome, "answered in ");
                let expected = match command {
                    CheckCommand::Proxy => Header::proxy(
                        Version::V2,
                        Addresses::inet(peer, attempt.to.ip().unwrap(), Transport::Dgram),
                        vec![],
                    ),
                    _ => Header::local(vec![]),
                };
                let Ok(Decoded::Complete { header, len }) = decode(&datagram) else { panic!("{datagram:?}") };
                assert_eq!((header, &datagram[len..]), (expected, &b"PING"[..]));
                assert_eq!(peer.ip(), attempt.source.unwrap());
            }
        }
    }

    #[tokio::test]
    async fn the_simple_proxy_protocol_names_the_checks_own_addresses() {
        let (socket, mut attempt) = upstream("127.0.0.1:0").await;
        attempt.header = Some(HeaderFormat::Spp);
        let check = udp("PING", "PONG");
        let (outcome, (datagram, peer)) = tokio::join!(run(&attempt, &check), answer(&socket, &[b"PONG"]));
        assert_passed(&outcome, "answered in ");
        let (header, payload) = datagram.split_at(spp::HEADER_BYTES);
        assert_eq!(spp::decode(header), Ok(spp::Spp { client: peer, local: attempt.to.ip().unwrap() }));
        assert_eq!(payload, b"PING");
    }

    #[tokio::test]
    async fn an_address_that_is_not_ours_says_nothing_about_the_upstream() {
        let (_socket, mut attempt) = upstream("127.0.0.1:0").await;
        // TEST-NET-2 is on no machine.
        attempt.source = Some("198.51.100.1".parse().unwrap());
        let outcome = run(&attempt, &udp("PING", "PONG")).await;
        assert_eq!(outcome.verdict, Verdict::Void);
        assert!(outcome.reason.starts_with("local_resources: "), "{outcome:?}");
    }
}
