//! UDP: sessions, headers on datagrams, the way back, ends, reloads.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::support::datagrams::{DatagramServer, ask, client, client_at, echo, nothing, receive, say_ends};
use crate::support::ports::free_port;
use crate::support::{Balancer, DEADLINE, Receiver, eventually, preface};

/// One listener on 127.0.0.1 with further keys of listener and pool.
fn balancer(upstreams: &[SocketAddr], listener: &str, pool: &str) -> Balancer {
    preface(&config(upstreams, listener, pool))
}

fn config(upstreams: &[SocketAddr], listener: &str, pool: &str) -> String {
    let upstreams: Vec<String> = upstreams.iter().map(|address| format!("\"{address}\"")).collect();
    let upstreams = upstreams.join(", ");
    format!(
        "[listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n{listener}\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [{upstreams}]\n{pool}\n"
    )
}

/// Sessions that have ended so.
fn ended(lb: &Balancer, why: &str) -> f64 {
    lb.metric("preface_sessions_ended_total", &[("listener", "dns"), ("why", why)])
}

fn wait_open(lb: &Balancer, count: usize) {
    eventually(&format!("{count} sessions are open"), || {
        (lb.metric("preface_sessions_open", &[]) == count as f64).then_some(())
    });
}

fn text(reply: (Vec<u8>, SocketAddr)) -> String {
    String::from_utf8(reply.0).expect("text")
}

#[test]
fn every_datagram_carries_the_header_and_its_reply_none() {
    let server = DatagramServer::start(say_ends);
    let lb = balancer(&[server.address], "", "");
    let client = client();
    let local = lb.ipv4("dns");
    let ends = format!("{} {local}", client.local_addr().expect("an address"));
    for count in 1..=3 {
        let (reply, from) = ask(&client, local, format!("question {count}").as_bytes());
        assert_eq!((String::from_utf8(reply).expect("text"), from), (ends.clone(), local));
    }
    let arrived = server.wait(3);
    assert!(arrived.iter().all(|datagram| datagram.peer == arrived[0].peer), "one socket a session");
    assert_eq!(arrived[2].payload, b"question 3");
}

#[test]
fn the_header_stands_where_udp_header_says() {
    for (mode, expected) in [
        ("every_datagram", [true, true, true].as_slice()),
        ("first_datagram", &[true, false, false]),
        ("first_alone", &[true, false, false, false]),
    ] {
        let server = DatagramServer::start(nothing);
        let lb = balancer(&[server.address], "", &format!("udp_header = \"{mode}\""));
        let client = client();
        for payload in ["a", "bc", ""] {
            client.send_to(payload.as_bytes(), lb.ipv4("dns")).expect("a datagram is sent");
        }
        let arrived = server.wait(expected.len());
        let headers: Vec<bool> = arrived.iter().map(|datagram| datagram.ends.is_some()).collect();
        assert_eq!(headers, expected, "{mode}");
        let payloads: Vec<&[u8]> = arrived.iter().map(|datagram| &datagram.payload[..]).collect();
        let alone: &[&[u8]] = if mode == "first_alone" { &[b""] } else { &[] };
        assert_eq!(payloads, [alone, &[b"a", b"bc", b""]].concat(), "{mode}");
        let sent = lb.metric("preface_headers_sent_total", &[("version", "v2")]);
        assert_eq!(sent as usize, headers.iter().filter(|header| **header).count(), "{mode}");
    }
}

#[test]
fn simple_proxy_protocol_and_no_header() {
    let server = DatagramServer::start(say_ends);
    let lb = balancer(&[server.address], "", "");
    drop(lb);
    for (format, expects_header) in [("spp", true), ("off", false)] {
        let text_of = config(&[server.address], "", "").replace("\"v2\"", &format!("\"{format}\""));
        let lb = preface(&text_of);
        let client = client();
        let said = text(ask(&client, lb.ipv4("dns"), b"who?"));
        let ends = format!("{} {}", client.local_addr().expect("an address"), lb.ipv4("dns"));
        assert_eq!(said, if expects_header { ends } else { "no header".to_owned() });
    }
}

#[test]
fn a_wildcard_listener_answers_from_the_address_that_was_written_to() {
    let server = DatagramServer::start(say_ends);
    for bind in ["\":0\"", "\"0.0.0.0:0\"", "[\"[::]:0\", \"127.0.0.9:0\"]"] {
        let lb = preface(&config(&[server.address], "", "").replace("\"127.0.0.1:0\"", bind));
        let port = lb.port("dns");
        let mut locals = vec![SocketAddr::from(([127, 0, 0, 9], port))];
        if !bind.contains("::") {
            locals.push(SocketAddr::from(([127, 0, 0, 1], port)));
            locals.push(SocketAddr::from(([127, 3, 2, 1], port)));
        }
        if !bind.contains("0.0.0.0") {
            locals.push(lb.ipv6("dns"));
        }
        let (v4, v6) = (client_at("0.0.0.0:0"), client_at("[::]:0"));
        for local in locals {
            let (client, source) =
                if local.is_ipv4() { (&v4, local.ip()) } else { (&v6, std::net::Ipv6Addr::LOCALHOST.into()) };
            let (said, from) = ask(client, local, b"who?");
            assert_eq!(from, local, "{bind}");
            let said = String::from_utf8(said).expect("text");
            let (_, destination) = said.split_once(' ').expect("two addresses");
            assert_eq!(destination, local.to_string(), "{bind}");
            assert!(source.is_loopback());
        }
    }
}

#[test]
fn a_listener_serves_tcp_and_udp_on_one_port() {
    // One port for both: the kernel would choose one that is free for UDP alone.
    let server = DatagramServer::at(&format!("127.0.0.1:{}", free_port()), echo);
    let tcp = Receiver::at(&server.address.to_string(), true, |mut stream, _| {
        std::io::Write::write_all(&mut stream, b"over tcp")
    });
    let lb = preface(&config(&[server.address], "", "").replace("\"udp\"", "[\"tcp\", \"udp\"]"));
    assert_eq!(text(ask(&client(), lb.ipv4("dns"), b"over udp")), "over udp");
    let mut answer = [0; 8];
    std::io::Read::read_exact(&mut lb.connect("dns"), &mut answer).expect("an answer");
    assert_eq!(&answer, b"over tcp");
    assert_eq!(tcp.arrivals().len(), 1);
}

#[test]
fn a_session_ends_after_its_idle_timeout_and_leaves_one_line() {
    let server = DatagramServer::start(echo);
    let lb = balancer(&[server.address], "idle_timeout = \"300ms\"", "");
    let client = client();
    ask(&client, lb.ipv4("dns"), b"12345");
    ask(&client, lb.ipv4("dns"), b"123");
    wait_open(&lb, 0);
    assert_eq!(ended(&lb, "idle_timeout"), 1.0);
    let line = lb.log().wait_for("the line of the session", |line| line.contains("event=session"));
    for field in [
        format!("client={} local={}", client.local_addr().expect("an address"), lb.ipv4("dns")),
        format!("pool=p upstream={} header=v2 bytes_in=8 bytes_out=8 datagrams_in=2 datagrams_out=2", server.address),
        "attempts=1 end=preface.relay.idle_timeout".to_owned(),
    ] {
        assert!(line.contains(&field), "{field} in {line}");
    }
    // The same client begins another one.
    ask(&client, lb.ipv4("dns"), b"again");
    let arrived = server.datagrams();
    assert_ne!(arrived[0].peer, arrived[2].peer);
}

#[test]
fn a_session_ends_when_each_question_has_its_answers() {
    let server = DatagramServer::start(|datagram| vec![datagram.payload.clone(), b"and more".to_vec()]);
    let lb = balancer(&[server.address], "responses = 2", "");
    let client = client();
    assert_eq!(text(ask(&client, lb.ipv4("dns"), b"A?")), "A?");
    assert_eq!(text(receive(&client)), "and more");
    wait_open(&lb, 0);
    // Two questions from one port at once have all four answers.
    for question in [b"A?", b"B?"] {
        client.send_to(question, lb.ipv4("dns")).expect("a datagram is sent");
    }
    let answers: Vec<String> = (0..4).map(|_| text(receive(&client))).collect();
    assert_eq!(answers, ["A?", "and more", "B?", "and more"]);
    wait_open(&lb, 0);
    assert_eq!(ended(&lb, "responses"), lb.metric("preface_sessions_begun_total", &[]));
}

#[test]
fn a_refused_first_datagram_is_sent_to_another_upstream() {
    let server = DatagramServer::start(echo);
    let nobody = UdpSocket::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let lb = balancer(&[nobody, server.address], "", "unhealthy_after_failed_connects = 0");
    for _ in 0..4 {
        assert_eq!(text(ask(&client(), lb.ipv4("dns"), b"hello")), "hello");
    }
    assert_eq!(server.count(), 4);
    let moved = lb.metric("preface_sessions_moved_total", &[("reason", "refused")]);
    assert!(moved >= 2.0, "every second one at least was for nobody, but {moved} were moved");
    assert_eq!(lb.metric("preface_upstream_connect_failures_total", &[]), moved);
}

#[test]
fn where_nobody_listens_the_session_says_so_at_its_end() {
    let nobody = UdpSocket::bind("127.0.0.1:0").expect("a port").local_addr().expect("an address");
    let lb = balancer(&[nobody], "idle_timeout = \"400ms\"", "");
    let client = client();
    for _ in 0..3 {
        client.send_to(b"hello", lb.ipv4("dns")).expect("a datagram is sent");
    }
    wait_open(&lb, 1);
    wait_open(&lb, 0);
    assert_eq!(ended(&lb, "refused"), 1.0);
    assert!(lb.metric("preface_datagrams_dropped_total", &[("reason", "refused")]) >= 1.0);
    assert!(
        lb.log()
            .wait_for("the line of the session", |line| line.contains("event=session"))
            .contains("end=upstream.connect.refused")
    );
}

#[test]
fn denied_clients_are_dropped_and_counted() {
    let server = DatagramServer::start(echo);
    let lb = balancer(&[server.address], "deny = [\"127.0.0.2\"]", "");
    for _ in 0..5 {
        client_at("127.0.0.2:0").send_to(b"let me in", lb.ipv4("dns")).expect("a datagram is sent");
    }
    ask(&client(), lb.ipv4("dns"), b"hello");
    eventually("five drops", || {
        (lb.metric("preface_datagrams_dropped_total", &[("reason", "denied")]) == 5.0).then_some(())
    });
    assert_eq!(server.count(), 1);
    lb.log().wait_for("that datagrams are dropped", |line| line.contains("datagrams_dropped"));
    let lines = lb.log().lines().into_iter().filter(|line| line.contains("datagrams_dropped")).count();
    assert!((1..=2).contains(&lines), "{lines} lines: one for each worker at most");
}

#[test]
fn two_unequal_weights_share_new_sessions() {
    let (heavy, light) = (DatagramServer::start(echo), DatagramServer::start(echo));
    let text = config(&[], "", "").replace("upstreams = []", "");
    let upstream = |address, weight| format!("[[pools.p.upstreams]]\naddress = \"{address}\"\nweight = {weight}\n");
    let lb = preface(&(text + &upstream(heavy.address, 3) + &upstream(light.address, 1)));
    for _ in 0..40 {
        let client = client();
        ask(&client, lb.ipv4("dns"), b"one");
        ask(&client, lb.ipv4("dns"), b"two");
    }
    assert_eq!((heavy.count(), light.count()), (60, 20));
}

#[test]
fn a_reload_keeps_the_sessions_whose_listener_and_upstream_stay() {
    let (stays, goes) = (DatagramServer::start(echo), DatagramServer::start(echo));
    let mut lb = balancer(&[stays.address, goes.address], "", "");
    let clients: Vec<UdpSocket> = (0..10).map(|_| client()).collect();
    for client in &clients {
        ask(client, lb.ipv4("dns"), b"before");
    }
    let peers: Vec<SocketAddr> = stays.datagrams().iter().map(|datagram| datagram.peer).collect();
    lb.apply(&config(&[stays.address], "responses = 0\nmax_sessions = 500", "retries = 1"));
    for client in &clients {
        ask(client, lb.ipv4("dns"), b"after");
    }
    let after = stays.datagrams();
    let after: Vec<SocketAddr> = after.iter().filter(|one| one.payload == b"after").map(|one| one.peer).collect();
    assert_eq!(after.len(), 10);
    assert!(peers.iter().all(|peer| after.contains(peer)), "their sockets are the same");
    assert_eq!(lb.metric("preface_sessions_moved_total", &[("reason", "removed")]), 5.0);
    assert_eq!(lb.metric("preface_sessions_begun_total", &[]), 10.0);
    assert_eq!(goes.count(), 5);
}

#[test]
fn an_address_that_left_answers_what_is_under_way_and_can_come_back() {
    let server = DatagramServer::start(echo);
    let mut lb = balancer(&[server.address], "", "");
    let both = config(&[server.address], "", "");
    let client = client();
    ask(&client, lb.ipv4("dns"), b"hello");
    let other = both.replace("listeners.dns", "listeners.other");
    let begun = Instant::now();
    lb.apply(&other);
    lb.log().wait_for("the old one's session has ended", |line| line.contains("end=preface.relay.listener_removed"));
    assert_eq!(text(ask(&client, lb.ipv4("other"), b"new")), "new");
    lb.apply(&both);
    lb.apply(&other);
    lb.apply(&both);
    assert_eq!(text(ask(&client, lb.ipv4("dns"), b"back")), "back");
    assert!(begun.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_disabled_upstream_loses_its_sessions_and_a_draining_one_keeps_them() {
    let (one, two) = (DatagramServer::start(echo), DatagramServer::start(echo));
    let lb = balancer(&[one.address, two.address], "", "");
    let clients: Vec<UdpSocket> = (0..4).map(|_| client()).collect();
    let ask_all = || clients.iter().for_each(|client| drop(ask(client, lb.ipv4("dns"), b"x")));
    ask_all();
    assert_eq!((one.count(), two.count()), (2, 2));
    let order = |what: &str| {
        let address = one.address.to_string().replace(':', "%3A");
        assert_eq!(lb.ask("POST", &format!("/pools/p/upstreams/{address}/{what}")).status, 200);
    };
    order("drain");
    ask_all();
    assert_eq!((one.count(), two.count()), (4, 4), "open ones stay");
    ask(&client(), lb.ipv4("dns"), b"x");
    assert_eq!((one.count(), two.count()), (4, 5), "a new one goes elsewhere");
    order("disable");
    eventually("two sessions were ended", || (ended(&lb, "disabled") == 2.0).then_some(()));
    ask_all();
    assert_eq!((one.count(), two.count()), (4, 9));
}

#[test]
fn sessions_leave_an_upstream_that_turned_unhealthy() {
    let (one, two) = (DatagramServer::at("127.0.0.1:0", echo), DatagramServer::at("127.0.0.2:0", echo));
    let port = free_port();
    let [health, other] =
        ["127.0.0.1", "127.0.0.2"].map(|ip| Receiver::at(&format!("{ip}:{port}"), false, |_, _| Ok(())));
    let check = format!("[pools.p.health_check]\nport = {port}\ninterval = \"50ms\"\nunhealthy_threshold = 1\n");
    let lb = balancer(&[one.address, two.address], "", &check);
    lb.wait_health("p", one.address, "healthy");
    lb.wait_health("p", two.address, "healthy");
    let clients: Vec<UdpSocket> = (0..4).map(|_| client()).collect();
    let ask_all = || clients.iter().for_each(|client| drop(ask(client, lb.ipv4("dns"), b"x")));
    ask_all();
    drop(health);
    lb.wait_health("p", one.address, "unhealthy");
    ask_all();
    assert_eq!((one.count(), two.count()), (2, 6));
    assert_eq!(lb.metric("preface_sessions_moved_total", &[("reason", "unhealthy")]), 2.0);
    drop(other);
    lb.wait_health("p", two.address, "unhealthy");
    // None is better now: everybody stays where he is.
    ask_all();
    assert_eq!((one.count(), two.count()), (2, 10));
    assert_eq!(lb.metric("preface_sessions_moved_total", &[]), 2.0);
}

#[test]
fn a_stop_waits_for_sessions_and_serves_no_new_client() {
    let server = DatagramServer::start(echo);
    let mut lb = balancer(&[server.address], "idle_timeout = \"700ms\"", "");
    let client = client();
    ask(&client, lb.ipv4("dns"), b"before");
    lb.signal(Signal::TERM);
    lb.log().wait_for("it stops", |line| line.contains("event=stop"));
    assert_eq!(text(ask(&client, lb.ipv4("dns"), b"after")), "after");
    assert!(lb.wait_exit().success());
    let line = lb.log().wait_for("the line of the session", |line| line.contains("event=session"));
    assert!(line.contains("datagrams_in=2") && line.contains("end=preface.relay.idle_timeout"), "{line}");
}

/// As it is by default, where a session lasts for two minutes of silence and the stop for 80 s.
#[test]
fn a_stop_does_not_wait_for_clients_who_have_their_answers() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("a port");
    server.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    let mut lb = balancer(&[server.local_addr().expect("an address")], "", "");
    let (answered, waiting) = (client(), client());
    let mut buffer = [0; 512];
    let mut question = |client: &UdpSocket| {
        client.send_to(b"question", lb.ipv4("dns")).expect("a datagram is sent");
        server.recv_from(&mut buffer).expect("the question").1
    };
    let peer = question(&answered);
    server.send_to(b"answer", peer).expect("a reply is sent");
    receive(&answered);
    let late = question(&waiting);
    lb.signal(Signal::TERM);
    let begun = Instant::now();
    let own = format!("client={} ", answered.local_addr().expect("an address"));
    let line = lb.log().wait_for("the end of the one", |line| line.contains("event=session") && line.contains(&own));
    assert!(line.ends_with("end=preface.relay.idle_timeout"), "{line}");
    assert!(begun.elapsed() > Duration::from_millis(500), "it might have asked once more");
    assert!(lb.is_running(), "the other one waits for an answer");
    server.send_to(b"late", late).expect("a reply is sent");
    assert_eq!(text(receive(&waiting)), "late");
    assert!(lb.wait_exit().success());
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
}

#[test]
fn what_no_datagram_can_carry_is_counted_and_nothing_else_suffers() {
    let server = DatagramServer::start(|datagram| vec![datagram.payload.len().to_string().into_bytes()]);
    let lb = balancer(&[server.address], "", "");
    let client = client();
    for length in [0, 1, 1_472, 9_000, 60_000, 65_507 - 28] {
        assert_eq!(text(ask(&client, lb.ipv4("dns"), &vec![7; length])), length.to_string());
    }
    client.send_to(&vec![7; 65_507 - 27], lb.ipv4("dns")).expect("a datagram is sent");
    assert_eq!(text(ask(&client, lb.ipv4("dns"), b"still there")), "11");
    assert_eq!(lb.metric("preface_datagrams_dropped_total", &[("reason", "too_big")]), 1.0);
    assert_eq!(lb.metric("preface_datagrams_total", &[("direction", "in")]), 7.0);
    assert_eq!(
        lb.metric("preface_datagram_bytes_total", &[("direction", "in")]),
        f64::from(1 + 1_472 + 9_000 + 60_000 + 65_479 + 11)
    );
}
