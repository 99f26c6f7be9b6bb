//! Datagrams that are empty, too long, forged or far too many, and upstreams that refuse: other clients are served, and
//! nothing comes back to anybody who did not ask.

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, UdpSocket};
use std::time::Duration;

use rustix::process::Signal;
use socket2::{Domain, Protocol, Socket, Type};

use crate::hostile::resident_bytes;
use crate::support::client::loopback;
use crate::support::datagrams::{Datagram, DatagramServer, client, echo, nothing};
use crate::support::dns::udp_client;
use crate::support::ports::free_port;
use crate::support::receiver::say_who;
use crate::support::{Balancer, DEADLINE, Receiver, eventually, preface, skip};

/// Largest payload of an IPv4 datagram, and bytes of the header of an IPv4 client.
const PAYLOAD_BYTES_MAX: usize = 65_507;
const HEADER_BYTES: usize = 28;

fn config(upstream: &DatagramServer, listener: &str) -> String {
    format!(
        "[runtime]\nworkers = 2\n\
         [listeners.l]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n{listener}\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        upstream.address
    )
}

fn client_of(lb: &Balancer) -> UdpSocket {
    udp_client(Ipv4Addr::LOCALHOST.into(), lb.ipv4("l"))
}

#[track_caller]
fn assert_echoed(client: &UdpSocket, payload: &[u8]) {
    client.send(payload).expect("a datagram is sent");
    let mut answer = vec![0; 65_536];
    let len = client.recv(&mut answer).unwrap_or_else(|error| panic!("{} bytes: {error}", payload.len()));
    assert!(&answer[..len] == payload, "{len} bytes came back of {}", payload.len());
}

fn dropped(lb: &Balancer, reason: &str) -> f64 {
    lb.metric("preface_datagrams_dropped_total", &[("reason", reason)])
}

#[test]
fn an_empty_datagram_is_one_both_ways() {
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, ""));
    let client = client_of(&lb);
    for payload in [&b""[..], b"x", b"", b""] {
        assert_echoed(&client, payload);
    }
    assert_eq!(upstream.datagrams().iter().filter(|got| got.payload.is_empty()).count(), 3);
}

#[test]
fn the_largest_payload_passes_and_a_larger_one_is_counted_and_harms_nobody() {
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, ""));
    let (client, other) = (client_of(&lb), client_of(&lb));
    let largest: Vec<u8> = (0..PAYLOAD_BYTES_MAX - HEADER_BYTES).map(|at| at as u8).collect();
    assert_echoed(&client, &largest);
    for _ in 0..3 {
        client.send(&vec![7; PAYLOAD_BYTES_MAX]).expect("a datagram is sent");
    }
    eventually("datagrams that are too big are counted", || (dropped(&lb, "too_big") == 3.0).then_some(()));
    assert_echoed(&client, b"after");
    assert_echoed(&other, b"other");
    assert_echoed(&client, &largest);
}

#[test]
fn where_the_header_comes_once_nothing_comes_before_it() {
    for mode in ["first_datagram", "first_alone"] {
        let upstream = DatagramServer::start(nothing);
        let pool = format!("proxy_protocol = \"v2\"\nudp_header = \"{mode}\"");
        let lb = preface(&config(&upstream, "").replace("proxy_protocol = \"v2\"", &pool));
        let client = client_of(&lb);
        let forged = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\x0a\0\0\x01\x0a\0\0\x02\0\x01\0\x02root";
        // With the header this one is longer than any datagram.
        client.send(&vec![7; PAYLOAD_BYTES_MAX]).expect("a datagram is sent");
        client.send(forged).expect("a datagram is sent");
        let first = upstream.wait(1).remove(0);
        assert_eq!(first.ends, Some((client.local_addr().unwrap(), lb.ipv4("l"))), "{mode}");
        let sent = || lb.metric("preface_headers_sent_total", &[("version", "v2")]);
        eventually("one header is counted", || (sent() == 1.0).then_some(()));
        let dropped_of_it = if mode == "first_datagram" { 1.0 } else { 0.0 };
        assert_eq!(dropped(&lb, "too_big"), dropped_of_it, "{mode}");
    }
}

#[test]
fn a_flood_of_datagrams_leaves_tcp_and_other_listeners_their_places() {
    let upstream = DatagramServer::start(nothing);
    let receiver = Receiver::with_header(say_who);
    let more = format!(
        "[listeners.other]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n\
         [listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"web\"\n[pools.web]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        receiver.address
    );
    let limited = config(&upstream, "").replace("[runtime]", "[runtime]\nmax_connections = 120");
    let lb = preface(&(limited + &more));
    let clients: Vec<UdpSocket> = (0..150).map(|_| client_of(&lb)).collect();
    for client in &clients {
        client.send(b"message").expect("a datagram is sent");
    }
    let begun = || lb.metric("preface_sessions_begun_total", &[("listener", "l")]);
    eventually("the listener has as many sessions as it may", || (begun() >= 30.0).then_some(()));
    let mut tcp = lb.connect("web");
    tcp.write_all(b"hello").and_then(|()| tcp.shutdown(Shutdown::Write)).expect("it is sent");
    let mut said = String::new();
    tcp.read_to_string(&mut said).expect("TCP's clients are served");
    assert!(said.contains(&tcp.local_addr().unwrap().to_string()), "{said}");
    let other = client();
    other.send_to(b"to the other one", lb.ipv4("other")).expect("a datagram is sent");
    eventually("the other listener serves", || {
        upstream.datagrams().iter().any(|one| one.payload == b"to the other one").then_some(())
    });
}

#[test]
fn a_forged_header_is_payload() {
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, ""));
    let client = client_of(&lb);
    let forged = b"\r\n\r\n\0\r\nQUIT\n\x21\x12\0\x0c\x0a\0\0\x01\x0a\0\0\x02\0\x01\0\x02root";
    assert_echoed(&client, forged);
    let got = upstream.datagrams().remove(0);
    assert_eq!(got.ends, Some((client.local_addr().unwrap(), lb.ipv4("l"))));
    assert_eq!(got.payload, forged);
}

#[test]
fn a_stranger_who_writes_to_a_sessions_socket_is_not_heard() {
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, ""));
    let client = client_of(&lb);
    assert_echoed(&client, b"first");
    let session = upstream.wait(1).remove(0).peer;
    for source in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)] {
        let stranger = UdpSocket::bind((source, 0)).expect("a port");
        for _ in 0..10 {
            stranger.send_to(b"forged answer", session).expect("a datagram is sent");
        }
    }
    // What follows in order shows that nothing came before it.
    assert_echoed(&client, b"second");
}

#[test]
fn the_reply_comes_from_the_address_that_was_asked() {
    let upstream = DatagramServer::start(echo);
    let config = config(&upstream, "").replace("127.0.0.1:0", ":0");
    let lb = preface(&config);
    for ip in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 5), Ipv4Addr::new(127, 9, 9, 9)] {
        let to = SocketAddr::new(ip.into(), lb.port("l"));
        // A connected socket takes nothing from another address.
        let client = udp_client(Ipv4Addr::new(127, 0, 0, 3).into(), to);
        assert_echoed(&client, b"to whom?");
        let got = upstream.datagrams().pop().unwrap();
        assert_eq!(got.ends, Some((client.local_addr().unwrap(), to)));
    }
    let to = lb.ipv6("l");
    let client = udp_client("::1".parse().unwrap(), to);
    assert_echoed(&client, b"to whom?");
    assert_eq!(upstream.datagrams().pop().unwrap().ends.unwrap().1, to);
}

#[test]
fn one_client_socket_that_asks_two_addresses_has_two_sessions() {
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, "").replace("127.0.0.1:0", ":0"));
    let client = UdpSocket::bind("127.0.0.1:0").unwrap();
    client.set_read_timeout(Some(DEADLINE)).unwrap();
    for last in [5, 6, 5, 6] {
        let to = SocketAddr::new(Ipv4Addr::new(127, 0, 0, last).into(), lb.port("l"));
        client.send_to(&[last], to).unwrap();
        let mut answer = [0; 16];
        assert_eq!(client.recv_from(&mut answer).unwrap(), (1, to));
        assert_eq!(answer[0], last);
        assert_eq!(upstream.datagrams().pop().unwrap().ends.unwrap().1, to);
    }
}

#[test]
fn clients_that_are_gone_before_the_answer_harm_nobody() {
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, ""));
    let stays = client_of(&lb);
    assert_echoed(&stays, b"before");
    for index in 0..200 {
        // Its port is closed at once: the answer is refused by ICMP, at the balancer's listening socket.
        drop(udp_client(loopback(index), lb.ipv4("l")).send(b"gone"));
        if index % 20 == 0 {
            assert_echoed(&stays, b"meanwhile");
        }
    }
    upstream.wait(211);
    assert_echoed(&stays, b"after");
}

#[test]
fn an_upstream_that_refuses_is_used_again_when_it_is_back() {
    let upstream = DatagramServer::at(&format!("127.0.0.1:{}", free_port()), echo);
    let lb = preface(&config(&upstream, ""));
    let client = client_of(&lb);
    assert_echoed(&client, b"before");
    let address = upstream.address;
    drop(upstream);
    client.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    for _ in 0..20 {
        client.send(b"nobody").expect("the client is not refused");
        let error = client.recv(&mut [0; 16]).expect_err("nobody answers");
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "silence, not a refusal: {error}");
    }
    let upstream = DatagramServer::at(&address.to_string(), echo);
    eventually("the upstream answers again", || {
        client.send(b"again").ok()?;
        client.recv(&mut [0; 16]).ok()
    });
    assert_eq!(upstream.datagrams()[0].ends.unwrap().0, client.local_addr().unwrap());
}

#[test]
fn a_flood_of_new_clients_leaves_those_alone_who_have_an_answer() {
    const SESSIONS: usize = 50;
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, &format!("max_sessions = {SESSIONS}")));
    let regulars: Vec<UdpSocket> = (0..SESSIONS).map(|index| udp_client(loopback(index), lb.ipv4("l"))).collect();
    regulars.iter().for_each(|client| assert_echoed(client, b"first"));
    let before = resident_bytes(lb.id());
    for index in 0..5_000 {
        let client = UdpSocket::bind((loopback(SESSIONS + index), 0)).unwrap();
        client.send_to(b"flood", lb.ipv4("l")).unwrap();
        if index % 500 == 0 {
            regulars.iter().for_each(|client| assert_echoed(client, b"meanwhile"));
        }
    }
    regulars.iter().for_each(|client| assert_echoed(client, b"after"));
    let peers: BTreeSet<SocketAddr> =
        upstream.datagrams().iter().filter(|got| got.payload != b"flood").map(|got| got.peer).collect();
    assert_eq!(peers.len(), SESSIONS, "each regular kept its session");
    assert!(dropped(&lb, "sessions_full") > 0.0);
    assert!(resident_bytes(lb.id()) < before + 16 * 1024 * 1024);
}

/// Most questions of DNS have one client socket each; and a server answers forged ones, too.
#[test]
fn clients_of_one_question_do_not_lock_out_the_next_ones() {
    const SESSIONS: usize = 20;
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, &format!("max_sessions = {SESSIONS}")));
    let regulars: Vec<UdpSocket> = (0..5).map(|index| udp_client(loopback(index), lb.ipv4("l"))).collect();
    for client in &regulars {
        assert_echoed(client, b"first");
        assert_echoed(client, b"second");
    }
    (5..SESSIONS).for_each(|index| assert_echoed(&udp_client(loopback(index), lb.ipv4("l")), b"once"));
    let late = udp_client(loopback(SESSIONS), lb.ipv4("l"));
    late.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
    eventually("a new client has an answer", || {
        late.send(b"late").ok()?;
        late.recv(&mut [0; 16]).ok()
    });
    regulars.iter().for_each(|client| assert_echoed(client, b"third"));
    let regular = |datagram: &&Datagram| [&b"first"[..], b"second", b"third"].contains(&&datagram.payload[..]);
    let peers: BTreeSet<SocketAddr> = upstream.datagrams().iter().filter(regular).map(|got| got.peer).collect();
    assert_eq!(peers.len(), regulars.len(), "who sent again kept his session");
}

/// Without the balancer's help one datagram would go round for ever: the answer to it is a question.
#[test]
fn a_datagram_that_claims_to_come_from_a_listener_goes_nowhere() {
    let upstream = DatagramServer::start(echo);
    let listener =
        |name: &str, bind: &str| format!("[listeners.{name}]\nbind = \"{bind}:0\"\nprotocol = \"udp\"\npool = \"p\"\n");
    let others = listener("other", "127.0.0.1") + &listener("every", "");
    let lb = preface(&(config(&upstream, "") + &others));
    let own = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 5), lb.port("every")));
    for from in [lb.ipv4("l"), lb.ipv4("other"), lb.ipv4("every"), own] {
        for to in [lb.ipv4("l"), lb.ipv4("other"), lb.ipv4("every"), own] {
            if let Err(error) = send_spoofed(from, to, b"round and round") {
                return skip("a_datagram_that_claims_to_come_from_a_listener_goes_nowhere", &error.to_string());
            }
        }
    }
    let counted = || (dropped(&lb, "own_address") == 16.0).then_some(());
    eventually("every forged datagram is counted", counted);
    assert_echoed(&client_of(&lb), b"an ordinary client");
    assert_eq!(upstream.count(), 1);
}

#[test]
fn a_datagram_from_port_0_cannot_be_answered_and_harms_nobody() {
    let upstream = DatagramServer::start(echo);
    let lb = preface(&config(&upstream, ""));
    let nobody = SocketAddr::from((Ipv4Addr::new(127, 0, 0, 9), 0));
    if let Err(error) = send_spoofed(nobody, lb.ipv4("l"), b"from port 0") {
        return skip("a_datagram_from_port_0_cannot_be_answered_and_harms_nobody", &error.to_string());
    }
    let client = client_of(&lb);
    for _ in 0..10 {
        assert_echoed(&client, b"an ordinary client");
    }
}

/// One datagram with a source that is not ours, which needs CAP_NET_RAW.
fn send_spoofed(from: SocketAddr, to: SocketAddr, payload: &[u8]) -> std::io::Result<()> {
    let (IpAddr::V4(source), IpAddr::V4(destination)) = (from.ip(), to.ip()) else { panic!("IPv4 alone") };
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc_ipproto_raw())))?;
    let udp_len = u16::try_from(8 + payload.len()).expect("short");
    let mut packet = vec![0x45, 0];
    packet.extend((20 + udp_len).to_be_bytes());
    packet.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    packet.extend(source.octets());
    packet.extend(destination.octets());
    // A checksum of 0 says that there is none.
    for field in [from.port(), to.port(), udp_len, 0] {
        packet.extend(field.to_be_bytes());
    }
    packet.extend(payload);
    socket.send_to(&packet, &SocketAddr::new(to.ip(), 0).into())?;
    Ok(())
}

/// IPPROTO_RAW: the packet comes with its IP header.
fn libc_ipproto_raw() -> i32 {
    255
}

#[test]
fn a_reload_moves_no_session_and_loses_no_datagram() {
    let upstream = DatagramServer::start(echo);
    let text = config(&upstream, "");
    let mut lb = preface(&text);
    let clients: Vec<UdpSocket> = (0..20).map(|index| udp_client(loopback(index), lb.ipv4("l"))).collect();
    for round in 0..10 {
        clients.iter().for_each(|client| assert_echoed(client, &[round]));
        lb.apply(&format!("{text}max_connections = {}\n", 1_000 + usize::from(round)));
    }
    let peers: BTreeSet<SocketAddr> = upstream.datagrams().iter().map(|got| got.peer).collect();
    assert_eq!(peers.len(), clients.len(), "one socket a client over all reloads");
}

#[test]
fn a_stop_ends_the_process_with_sessions_open() {
    let upstream = DatagramServer::start(echo);
    let mut lb = preface(&config(&upstream, "").replace("workers = 2", "workers = 2\nstop_timeout = \"100ms\""));
    let client = client_of(&lb);
    assert_echoed(&client, b"before");
    lb.signal(Signal::TERM);
    assert!(lb.wait_exit().success());
}
