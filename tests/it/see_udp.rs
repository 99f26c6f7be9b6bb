//! What an operator sees of UDP: how long clients wait, open sessions and the end of one, the headers that were sent, and
//! the last ten minutes.

use std::io::{BufRead, BufReader, ErrorKind};
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use preface::proxy_protocol::explain::hex;
use preface::proxy_protocol::{Addresses, Header, Transport, spp};
use serde_json::Value;

use crate::support::datagrams::{DatagramServer, ask, client, client_at, echo, nothing, receive};
use crate::support::dns::{assert_answers, query, udp_client, unbound};
use crate::support::{Balancer, DEADLINE, Receiver, eventually, http, preface};

fn config(upstream: SocketAddr, listener: &str, pool: &str) -> String {
    format!(
        "[listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n{listener}\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\n{pool}\n"
    )
}

/// Percentiles since the start, of the pool and of its only upstream; both once so many were measured.
#[track_caller]
fn measured(lb: &Balancer, kind: &str, count: u64) -> [Value; 2] {
    eventually(&format!("{count} of {kind} are measured"), || {
        let pool = lb.status()["pools"]["p"].clone();
        let both = [&pool["latency"], &pool["upstreams"][0]["latency"]].map(|of| of[kind]["since_start"].clone());
        (both.iter().all(|one| one["count"] == count)).then_some(both)
    })
}

fn connections(lb: &Balancer, query: &str) -> Vec<Value> {
    let answer: Value = lb.ask("GET", &format!("/connections{query}")).json();
    answer["connections"].as_array().expect("a list").clone()
}

fn tapped(lb: &Balancer, query: &str) -> Vec<Value> {
    let answer: Value = lb.ask("GET", &format!("/tap{query}")).json();
    answer["connections"].as_array().expect("a list").clone()
}

#[test]
fn a_wait_lasts_from_the_first_datagram_without_a_reply_to_the_next_reply() {
    let server = UdpSocket::bind("127.0.0.1:0").expect("a port");
    server.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    let lb = preface(&config(server.local_addr().expect("an address"), "", ""));
    let client = client();
    let mut buffer = [0; 512];
    let begun = Instant::now();
    client.send_to(b"lost?", lb.ipv4("dns")).expect("a datagram is sent");
    server.recv_from(&mut buffer).expect("a question");
    // The client waits for nothing, and asks again.
    client.set_read_timeout(Some(Duration::from_millis(60))).expect("a time limit");
    assert_eq!(client.recv(&mut buffer).expect_err("nobody answers").kind(), ErrorKind::WouldBlock);
    client.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    client.send_to(b"lost?", lb.ipv4("dns")).expect("a datagram is sent");
    let (_, peer) = server.recv_from(&mut buffer).expect("the question again");
    server.send_to(b"here", peer).expect("a reply is sent");
    receive(&client);
    let took = begun.elapsed().as_secs_f64() * 1000.0;
    // A second reply answers nothing, and no datagram is left without one.
    server.send_to(b"more", peer).expect("a reply is sent");
    receive(&client);
    for one in measured(&lb, "round_trip_ms", 1) {
        let longest = one["max"].as_f64().expect("a number");
        assert!((59.0..=took).contains(&longest), "{longest} of {took} ms");
    }
    assert!(lb.status()["pools"]["p"]["latency"]["session_ms"]["since_start"].is_null(), "it is open");
    let id = connections(&lb, "")[0]["id"].as_str().expect("an id").to_owned();
    assert_eq!(lb.ask("DELETE", &format!("/connections/{id}")).status, 200);
    for one in measured(&lb, "session_ms", 1) {
        assert!(one["max"].as_f64() >= Some(59.0), "{one}");
    }
}

#[test]
fn one_way_traffic_has_no_round_trips() {
    let server = DatagramServer::start(nothing);
    let lb = preface(&config(server.address, "idle_timeout = \"100ms\"", ""));
    let client = client();
    for count in 1..=3 {
        client.send_to(b"a line of a log", lb.ipv4("dns")).expect("a datagram is sent");
        server.wait(count);
    }
    measured(&lb, "session_ms", 1);
    assert!(lb.status()["pools"]["p"]["latency"]["round_trip_ms"]["since_start"].is_null());
    assert_eq!(lb.metric("preface_pool_round_trip_seconds_count", &[("pool", "p")]), 0.0);
    assert_eq!(lb.metric("preface_upstream_datagrams_total", &[("pool", "p"), ("direction", "in")]), 3.0);
    assert_eq!(lb.metric("preface_upstream_datagrams_total", &[("direction", "out")]), 0.0);
}

#[test]
fn each_answer_of_unbound_is_a_round_trip() {
    const CLIENTS: u64 = 20;
    let unbound = unbound();
    let address = SocketAddr::from(([127, 0, 0, 1], unbound.port));
    let lb = preface(&config(address, "responses = 1", ""));
    for id in 0..CLIENTS as u16 {
        let client = udp_client([127, 0, 0, 1].into(), lb.ipv4("dns"));
        let question = query(id, "trip");
        client.send(&question).expect("a question is sent");
        let mut answer = [0; 512];
        let length = client.recv(&mut answer).expect("an answer");
        assert_answers(&answer[..length], &question);
    }
    let [pool, upstream] = measured(&lb, "round_trip_ms", CLIENTS);
    assert!(pool["p50"].as_f64() > Some(0.0) && pool["p50"].as_f64() <= pool["max"].as_f64(), "{pool}");
    assert_eq!(pool["max"].as_f64().map(f64::round), upstream["max"].as_f64().map(f64::round));
    measured(&lb, "session_ms", CLIENTS);
    for (family, labels) in [
        ("preface_pool_round_trip_seconds", &[("pool", "p")][..]),
        ("preface_upstream_round_trip_seconds", &[("pool", "p"), ("upstream", &address.to_string())]),
        ("preface_pool_session_seconds", &[("pool", "p")]),
        ("preface_upstream_session_seconds", &[]),
    ] {
        assert_eq!(lb.metric(&format!("{family}_count"), labels), CLIENTS as f64, "{family}");
        let up_to_all = [labels, &[("le", "+Inf")]].concat();
        assert_eq!(lb.metric(&format!("{family}_bucket"), &up_to_all), CLIENTS as f64, "{family}");
    }
    assert!(lb.metric("preface_pool_connect_seconds_count", &[]) == 0.0, "no connection was made");
}

#[test]
fn open_sessions_are_shown_and_one_is_ended() {
    let server = DatagramServer::start(echo);
    let tcp = Receiver::with_header(crate::support::receiver::echo);
    let more = format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"q\"\n[pools.q]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        tcp.address
    );
    let lb = preface(&config(server.address, "", &more));
    let clients: Vec<UdpSocket> = (1..=3).map(|last| client_at(&format!("127.0.0.{last}:0"))).collect();
    for client in &clients {
        ask(client, lb.ipv4("dns"), b"hello");
    }
    let connection = lb.connect("web");
    eventually("the connection is shown", || (connections(&lb, "?pool=q").len() == 1).then_some(()));
    let all = connections(&lb, "");
    assert_eq!(all.iter().filter(|one| one["protocol"] == "udp").count(), 3, "{all:?}");
    assert_eq!(all.iter().filter(|one| one["protocol"] == "tcp").count(), 1, "{all:?}");
    assert!(all.is_sorted_by_key(|one| one["accepted"].to_string()), "the oldest first: {all:?}");
    let ids: Vec<String> = connections(&lb, "?limit=2").iter().map(|one| one["id"].to_string()).collect();
    assert_eq!(ids, [all[0]["id"].to_string(), all[1]["id"].to_string()]);

    let second = &connections(&lb, "?client=127.0.0.2")[0];
    let text = |key: &str| second[key].as_str().unwrap_or_default();
    assert_eq!(text("client"), clients[1].local_addr().expect("an address").to_string());
    assert_eq!((text("local"), text("upstream")), (&*lb.ipv4("dns").to_string(), &*server.address.to_string()));
    assert_eq!((text("listener"), text("pool")), ("dns", "p"));
    for (key, expected) in [("bytes_in", 5), ("bytes_out", 5), ("datagrams_in", 1), ("datagrams_out", 1)] {
        assert_eq!(second[key], expected, "{key}");
    }
    assert!(second["age_ms"].as_f64() > Some(0.0) && second["first_byte_ms"].as_f64() > Some(0.0), "{second}");
    assert!(second["end"].is_null(), "{second}");

    let id = text("id").to_owned();
    assert_eq!(lb.ask("DELETE", &format!("/connections/{id}")).status, 200);
    lb.log().wait_for("its end", |line| {
        line.contains("event=session") && line.contains(&id) && line.ends_with("end=preface.relay.ended")
    });
    assert_eq!(lb.metric("preface_sessions_ended_total", &[("why", "ended")]), 1.0);
    assert_eq!(lb.ask("DELETE", &format!("/connections/{id}")).status, 404);
    assert_eq!(connections(&lb, "?listener=dns").len(), 2);
    ask(&clients[1], lb.ipv4("dns"), b"again");
    assert_ne!(connections(&lb, "?client=127.0.0.2")[0]["id"], id.as_str(), "another session");
    drop(connection);
}

#[test]
fn the_tap_shows_the_header_of_a_sessions_first_datagram_once() {
    let server = DatagramServer::start(echo);
    let lb = preface(&config(server.address, "idle_timeout = \"300ms\"", "[pools.p.tlvs]\ncrc32c = true\n"));
    let (one, other) = (client_at("127.0.0.1:0"), client_at("127.0.0.2:0"));
    for _ in 0..3 {
        ask(&one, lb.ipv4("dns"), b"question");
        ask(&other, lb.ipv4("dns"), b"question");
    }
    assert_eq!(tapped(&lb, "?pool=p").len(), 2, "one for each session");
    let shown = tapped(&lb, "?client=127.0.0.2").remove(0);
    assert_eq!((&shown["protocol"], &shown["datagrams_in"]), (&"udp".into(), &3.into()));
    assert_eq!(shown["client"], other.local_addr().expect("an address").to_string());
    assert!(shown["end"].is_null(), "{shown}");
    let ended = eventually("the end is shown, too", || {
        let shown = tapped(&lb, "?client=127.0.0.2").remove(0);
        (!shown["end"].is_null()).then_some(shown)
    });
    assert_eq!((&ended["end"], &ended["datagrams_out"]), (&"preface.relay.idle_timeout".into(), &3.into()));
    assert_eq!(ended["header"], shown["header"]);
}

/// The bytes themselves, as a plain server gets them.
#[test]
fn the_tap_shows_the_bytes_that_the_upstream_got() {
    for format in ["v2", "spp", "off"] {
        let server = UdpSocket::bind("127.0.0.1:0").expect("a port");
        server.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        let text = config(server.local_addr().expect("an address"), "", "").replace("\"v2\"", &format!("\"{format}\""));
        let lb = preface(&text);
        let client = client();
        client.send_to(b"payload", lb.ipv4("dns")).expect("a datagram is sent");
        let mut buffer = [0; 512];
        let length = server.recv(&mut buffer).expect("a datagram");
        let raw = &buffer[..length - b"payload".len()];
        let own = client.local_addr().expect("an address");
        let mut expected = Vec::new();
        match format {
            "v2" => {
                let addresses = Addresses::inet(own, lb.ipv4("dns"), Transport::Dgram);
                Header::proxy(preface::proxy_protocol::Version::V2, addresses, vec![])
                    .encode(&mut expected)
                    .expect("a header");
            }
            "spp" => spp::encode(&mut expected, own, lb.ipv4("dns")),
            _ => {}
        }
        assert_eq!(hex(raw, " "), hex(&expected, " "), "{format}");
        let header = tapped(&lb, "")[0]["header"].clone();
        if format == "off" {
            assert!(header.is_null(), "{header}");
            continue;
        }
        assert_eq!((&header["version"], &header["hex"]), (&format.into(), &hex(raw, "").into()));
        let fields = header["fields"].as_array().expect("fields");
        let bytes: String = fields.iter().map(|field| field["hex"].as_str().expect("hex").replace(' ', "")).collect();
        assert_eq!(bytes, hex(raw, ""), "each byte is in one field");
        let facts = header["facts"].to_string();
        assert!(facts.contains(&own.to_string()), "{facts}");
    }
}

#[test]
fn a_session_that_moves_is_tapped_with_the_header_of_each_upstream() {
    let (server, nobody) = (DatagramServer::start(echo), UdpSocket::bind("127.0.0.1:0").expect("a port"));
    let refusing = nobody.local_addr().expect("an address");
    drop(nobody);
    let text = config(refusing, "", "").replace(
        &format!("upstreams = [\"{refusing}\"]"),
        &format!("unhealthy_after_failed_connects = 0\nupstreams = [\"{}\", {{ address = \"{}\", backup = true, proxy_protocol = \"spp\" }}]", refusing, server.address),
    );
    // A backup serves where no other is healthy: here it is the one that is left to try.
    let lb = preface(&text);
    assert_eq!(ask(&client(), lb.ipv4("dns"), b"hello").0, b"hello");
    let versions: Vec<String> = tapped(&lb, "").iter().map(|one| one["header"]["version"].to_string()).collect();
    assert_eq!(versions, ["\"spp\"", "\"v2\""], "the newest first");
}

#[test]
fn the_tap_follows_new_sessions_by_their_client() {
    let server = DatagramServer::start(echo);
    let lb = preface(&config(server.address, "", ""));
    let mut stream = UnixStream::connect(lb.admin_socket()).expect("the admin socket");
    stream.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    http::send(&mut stream, "GET", "/tap?follow=1&pool=p&client=127.0.0.2", &[]).expect("it is sent");
    let mut lines = BufReader::new(stream).lines();
    assert_eq!(lines.next().expect("a line").expect("text"), "HTTP/1.1 200 OK");
    // It reaches the workers by the same inbox, behind the order to follow.
    eventually("the workers follow", || (lb.status()["workers"].as_u64() > Some(0)).then_some(()));
    for last in [1, 2] {
        ask(&client_at(&format!("127.0.0.{last}:0")), lb.ipv4("dns"), b"hello");
    }
    let line = lines.map(|line| line.expect("text")).find(|line| line.starts_with('{')).expect("a session");
    let followed: Value = serde_json::from_str(&line).expect("JSON");
    assert!(followed["client"].as_str().is_some_and(|client| client.starts_with("127.0.0.2:")), "{followed}");
    assert_eq!((&followed["protocol"], &followed["header"]["version"]), (&"udp".into(), &"v2".into()));
}

#[test]
fn the_history_has_sessions_datagrams_and_drops() {
    let server = DatagramServer::start(echo);
    let lb = preface(&config(server.address, "deny = [\"127.0.0.3\"]", ""));
    for _ in 0..10 {
        ask(&client(), lb.ipv4("dns"), b"hello");
    }
    client_at("127.0.0.3:0").send_to(b"let me in", lb.ipv4("dns")).expect("a datagram is sent");
    let history = eventually("they are in a point", || {
        let history: Value = lb.ask("GET", "/history").json();
        history["listeners"]["dns"]["sessions"]["dropped_per_s"]["denied"].is_array().then_some(history)
    });
    let has = |path: &str| {
        let column = history.pointer(path).and_then(Value::as_array).unwrap_or_else(|| panic!("no {path}: {history}"));
        assert_eq!(column.len(), history["times"].as_array().expect("times").len(), "{path}");
        assert!(column.iter().any(|value| value.as_f64() > Some(0.0)), "{path}: {column:?}");
    };
    let upstream = format!("/pools/p/upstreams/{}", server.address);
    for of in ["/process", "/listeners/dns", "/pools/p", &upstream] {
        for column in ["open", "connections_per_s", "bytes_in_per_s", "datagrams_in_per_s", "datagrams_out_per_s"] {
            has(&format!("{of}/{column}"));
        }
    }
    for path in ["open", "begun_per_s", "dropped_per_s/denied"] {
        has(&format!("/listeners/dns/sessions/{path}"));
    }
    has("/pools/p/round_trip_ms/p99");
    has(&format!("{upstream}/round_trip_ms/max"));
    let sessions = lb.status()["listeners"]["dns"]["sessions"].clone();
    assert_eq!((&sessions["dropped_10m"]["denied"], &sessions["begun"]), (&1.into(), &10.into()), "{sessions}");
}

/// Datagrams of one length that are there at once leave as one send.
#[test]
fn segments_are_counted_apart_by_direction() {
    let server = DatagramServer::start(nothing);
    let lb = preface(&config(server.address, "", ""));
    let client = client();
    eventually("some left together", || {
        for _ in 0..40 {
            client.send_to(&[7; 100], lb.ipv4("dns")).expect("a datagram is sent");
        }
        (lb.metric("preface_datagrams_segmented_total", &[("direction", "in")]) >= 2.0).then_some(())
    });
    let passed = lb.metric("preface_datagrams_total", &[("direction", "in")]);
    let segmented = lb.metric("preface_datagrams_segmented_total", &[("direction", "in")]);
    assert!(segmented <= passed, "{segmented} of {passed}");
    assert_eq!(lb.metric("preface_datagrams_segmented_total", &[("direction", "out")]), 0.0);
}
