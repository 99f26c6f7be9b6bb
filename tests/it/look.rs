//! Single connections, looked at from outside: open ones, the last ones with their header's bytes, the end of one, one
//! followed in the log; and what is said of an upstream that rejects its header.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;

use preface::proxy_protocol::explain::hex;

use crate::support::datagrams::{self, DatagramServer};
use crate::support::receiver::{echo, say_who};
use crate::support::{Arrival, Balancer, DEADLINE, Receiver, eventually, http, peers, preface};

fn config(header: &str, upstream: &str, more: &str) -> String {
    format!(
        "[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"{header}\"\nupstreams = [\"{upstream}\"]\n{more}"
    )
}

/// Sends a request, and takes whatever comes.
fn get(lb: &Balancer) -> Option<u16> {
    let mut client = lb.connect("web");
    client.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    http::get(&mut client, "/").ok().map(|answer| answer.status)
}

fn suspicion(lb: &Balancer) -> serde_json::Value {
    lb.status()["pools"]["p"]["upstreams"][0]["header_rejected"].clone()
}

/// How many connections to the only upstream looked rejected; all of those so far have ended.
fn rejections(lb: &Balancer, ended: f64) -> f64 {
    eventually("the connections have ended", || {
        (lb.metric("preface_connections_ended_total", &[]) >= ended).then_some(())
    });
    lb.metric("preface_headers_rejected_total", &[])
}

fn accusations(lb: &Balancer) -> usize {
    lb.log().lines().iter().filter(|line| line.contains("event=header_rejected")).count()
}

#[test]
fn nginx_that_expects_no_header_is_accused_once_and_cleared_by_the_change() {
    let nginx = peers::nginx();
    let address = format!("127.0.0.1:{}", nginx.plain);
    let mut lb = preface(&config("v1", &address, ""));
    for _ in 0..3 {
        assert_eq!(get(&lb), Some(400));
    }
    let suspicion_now = eventually("it is accused", || Some(suspicion(&lb)).filter(|value| !value.is_null()));
    let text = |key: &str| suspicion_now[key].as_str().expect("text").replace(&address, "ADDRESS");
    insta::assert_snapshot!(format!("{}\n{}\n{}", text("how"), text("reason"), text("change")), @r#"
    http_400
    the last 3 connections were answered HTTP 400, right after the v1 header: it probably does not expect a header
    in [pools.p]: proxy_protocol = "off"; or let it take the header there (nginx: listen ... proxy_protocol); `preface doctor ADDRESS` finds out which
    "#);
    for _ in 0..5 {
        assert_eq!(get(&lb), Some(400));
    }
    assert_eq!(rejections(&lb, 8.0), 8.0);
    assert_eq!(lb.metric("preface_upstream_header_rejected", &[("pool", "p")]), 1.0);
    assert_eq!(accusations(&lb), 1, "{}", lb.log().text());
    let reason = lb.status()["pools"]["p"]["upstreams"][0]["health_reason"].to_string();
    assert!(reason.contains("header rejected?"), "{reason}");

    lb.apply(&config("off", &address, ""));
    assert!(suspicion(&lb).is_null());
    for _ in 0..5 {
        assert_eq!(get(&lb), Some(200));
    }
    assert_eq!(rejections(&lb, 13.0), 8.0);
    assert!(suspicion(&lb).is_null());
    assert_eq!(accusations(&lb), 1);
}

#[test]
fn nginx_that_misses_a_header_is_accused_too() {
    let nginx = peers::nginx();
    let lb = preface(&config("off", &format!("127.0.0.1:{}", nginx.headers), ""));
    for _ in 0..3 {
        assert_eq!(get(&lb), None);
    }
    let suspicion = eventually("it is accused", || Some(suspicion(&lb)).filter(|value| !value.is_null()));
    assert!(
        suspicion["reason"].as_str().is_some_and(|reason| reason.contains("probably requires a header")),
        "{suspicion}"
    );
    assert!(
        suspicion["change"].as_str().is_some_and(|change| change.contains("proxy_protocol = \"v2\"")),
        "{suspicion}"
    );
}

/// Answers 400 to a request that begins with "BAD".
fn picky(mut stream: TcpStream, arrival: &Arrival) -> io::Result<()> {
    let mut request = arrival.behind.clone();
    while request.len() < 3 {
        let mut more = [0; 64];
        let count = stream.read(&mut more)?;
        if count == 0 {
            return Ok(());
        }
        request.extend_from_slice(&more[..count]);
    }
    let status = if request.starts_with(b"BAD") { "400 Bad Request" } else { "200 OK" };
    let answer = format!("HTTP/1.1 {status}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    stream.write_all(answer.as_bytes())?;
    stream.shutdown(Shutdown::Both)
}

fn ask(lb: &Balancer, request: &[u8]) {
    let mut client = lb.connect("web");
    client.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    client.write_all(request).expect("it is sent");
    let _ = client.read_to_end(&mut Vec::new());
}

/// Takes what the client says until it says no more, and closes without a word.
fn take_only(mut stream: TcpStream, arrival: &Arrival) -> io::Result<()> {
    let mut message = arrival.behind.clone();
    while !message.ends_with(b"\n") {
        let mut more = [0; 64];
        match stream.read(&mut more)? {
            0 => break,
            count => message.extend_from_slice(&more[..count]),
        }
    }
    stream.shutdown(Shutdown::Both)
}

#[test]
fn an_upstream_that_only_takes_messages_is_no_certain_case() {
    let receiver = Receiver::with_header(take_only);
    let lb = preface(&config("v2", &receiver.address.to_string(), ""));
    for _ in 0..3 {
        ask(&lb, b"a message\n");
    }
    let said = eventually("it is said", || Some(suspicion(&lb)).filter(|value| !value.is_null()));
    assert_eq!(said["certain"], false);
    let text = |key: &str| said[key].as_str().expect("text").replace(&receiver.address.to_string(), "ADDRESS");
    insta::assert_snapshot!(format!("{}\n{}\n{}", text("how"), text("reason"), text("change")), @r#"
    closed
    the last 3 connections were closed without an answer, right after the v2 header: it probably does not expect a header, or not this version, or takes what clients say and never answers
    if its clients wait for answers: in [pools.p]: proxy_protocol = "off"; or let it take the header there (nginx: listen ... proxy_protocol); `preface doctor ADDRESS` finds out which
    "#);
    assert_eq!(lb.metric("preface_upstream_header_rejected", &[("pool", "p")]), 0.0, "nobody is paged");
    assert_eq!(lb.metric("preface_upstream_never_answers", &[("pool", "p")]), 1.0);
    let problems = lb.status()["problems"].clone();
    assert_eq!(
        (&problems[0]["kind"], &problems[0]["severity"]),
        (&"never_answers".into(), &"warn".into()),
        "{problems}"
    );
    assert_eq!(accusations(&lb), 0, "{}", lb.log().text());
    assert!(lb.log().text().contains("event=never_answers"), "{}", lb.log().text());
}

#[test]
fn bad_clients_do_not_accuse_an_upstream_that_answers_others() {
    let receiver = Receiver::with_header(picky);
    let lb = preface(&config("v2", &receiver.address.to_string(), ""));
    for _ in 0..2 {
        ask(&lb, b"BAD /\r\n\r\n");
    }
    ask(&lb, b"GET /\r\n\r\n");
    for _ in 0..20 {
        ask(&lb, b"BAD /\r\n\r\n");
    }
    assert_eq!(rejections(&lb, 23.0), 22.0, "they are counted");
    assert!(suspicion(&lb).is_null());
    for _ in 0..10 {
        ask(&lb, b"BAD /\r\n\r\n");
    }
    rejections(&lb, 33.0);
    assert!(!suspicion(&lb).is_null(), "30 in a row are too many, whoever they are");
    ask(&lb, b"GET /\r\n\r\n");
    eventually("an answer clears it", || suspicion(&lb).is_null().then_some(()));
    assert_eq!(accusations(&lb), 1);
}

/// Closes at once, without a byte.
fn leave(stream: TcpStream, _: &Arrival) -> io::Result<()> {
    stream.shutdown(Shutdown::Both)
}

/// Reads to the end and says nothing.
fn swallow(mut stream: TcpStream, _: &Arrival) -> io::Result<()> {
    io::copy(&mut stream, &mut io::sink())?;
    stream.shutdown(Shutdown::Both)
}

#[test]
fn a_close_is_no_accusation_where_the_client_said_nothing_or_closed_first() {
    let (leaving, sink) = (Receiver::with_header(leave), Receiver::with_header(swallow));
    let lb = preface(&config("v2", &leaving.address.to_string(), ""));
    for _ in 0..5 {
        ask(&lb, b"");
    }
    assert_eq!(rejections(&lb, 5.0), 0.0);
    let lb = preface(&config("v2", &sink.address.to_string(), ""));
    for _ in 0..5 {
        let mut client = lb.connect("web");
        client.write_all(b"a line of a log\n").expect("it is sent");
        client.shutdown(Shutdown::Write).expect("it is closed");
        client.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        let _ = client.read_to_end(&mut Vec::new());
    }
    assert_eq!(rejections(&lb, 5.0), 0.0);
    assert!(suspicion(&lb).is_null());
}

#[test]
fn a_check_that_passes_with_the_same_header_speaks_for_the_upstream() {
    let receiver = Receiver::with_header(picky);
    let check = "[pools.p.health_check]\nprotocol = \"http\"\n";
    let lb = preface(&config("v2", &receiver.address.to_string(), check));
    lb.wait_health("p", receiver.address, "healthy");
    for _ in 0..5 {
        ask(&lb, b"BAD /\r\n\r\n");
    }
    assert_eq!(rejections(&lb, 5.0), 5.0);
    assert!(suspicion(&lb).is_null());
}

#[test]
fn open_connections_are_shown_and_one_is_ended() {
    let receiver = Receiver::with_header(echo);
    let lb = preface(&config("v2", &receiver.address.to_string(), ""));
    let mut clients: Vec<TcpStream> = (0..3).map(|_| lb.connect("web")).collect();
    for client in &mut clients {
        client.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        client.write_all(b"hello").expect("it is sent");
        client.read_exact(&mut [0; 5]).expect("an echo");
    }
    let list = |query: &str| lb.ask("GET", &format!("/connections{query}")).json();
    let all = list("");
    assert_eq!((&all["open"], all["connections"].as_array().map(Vec::len)), (&3.into(), Some(3)), "{all}");
    let own = clients[1].local_addr().expect("an address").to_string();
    let second = all["connections"].as_array().expect("a list").iter().find(|one| one["client"] == own.as_str());
    let second = second.unwrap_or_else(|| panic!("{own} is not in {all}"));
    assert_eq!((&second["bytes_in"], &second["bytes_out"], &second["pool"]), (&5.into(), &5.into(), &"p".into()));
    assert!(second["age_ms"].as_f64() > Some(0.0) && second["end"].is_null(), "{second}");
    for (query, count) in
        [("?client=127.0.0.0/8", 3), ("?client=127.0.0.2", 0), ("?pool=p", 3), ("?listener=web&limit=2", 2)]
    {
        assert_eq!(list(query)["connections"].as_array().map(Vec::len), Some(count), "{query}");
    }
    assert_eq!(lb.ask("GET", "/connections?client=here").status, 400);

    let id = second["id"].as_str().expect("an id");
    assert_eq!(lb.ask("DELETE", &format!("/connections/{id}")).status, 200);
    assert!(clients[1].read(&mut [0; 5]).is_err(), "it was reset");
    lb.log().wait_for("its end", |line| line.contains(id) && line.contains("end=preface.relay.ended"));
    assert_eq!(lb.ask("DELETE", &format!("/connections/{id}")).status, 404);
    clients[0].write_all(b"again").expect("it is sent");
    clients[0].read_exact(&mut [0; 5]).expect("the others stay");
}

#[test]
fn the_tap_shows_the_bytes_that_the_upstream_got() {
    let receiver = Receiver::with_header(say_who);
    let tlvs = "[pools.p.tlvs]\ncrc32c = true\nunique_id = true\nvpce_id = \"vpce-08d2bf15fac5001c9\"\n";
    let lb = preface(&config("v2", &receiver.address.to_string(), tlvs));
    ask(&lb, b"");
    let arrival = receiver.wait_for(1).remove(0);
    let tapped = eventually("it has ended", || {
        let tapped = lb.ask("GET", "/tap?pool=p&client=127.0.0.1").json()["connections"][0].clone();
        (!tapped["end"].is_null()).then_some(tapped)
    });
    let header = &tapped["header"];
    assert_eq!(header["hex"], hex(&arrival.raw, ""));
    assert_eq!((&header["version"], &header["bytes"]), (&"v2".into(), &arrival.raw.len().into()));
    let fields = header["fields"].as_array().expect("fields");
    let bytes: String = fields.iter().map(|field| field["hex"].as_str().expect("hex").replace(' ', "")).collect();
    assert_eq!(bytes, hex(&arrival.raw, ""), "each byte is in one field");
    assert!(fields.iter().any(|field| field["meaning"] == "AWS VPC endpoint vpce-08d2bf15fac5001c9"), "{header}");
    assert_eq!(tapped["client"], arrival.client().to_string());
}

#[test]
fn the_tap_follows_new_connections() {
    let receiver = Receiver::with_header(say_who);
    let lb = preface(&config("v1", &receiver.address.to_string(), ""));
    for (accept, prefix) in [("*/*", "{"), ("text/event-stream", "data: {")] {
        let mut stream = UnixStream::connect(lb.admin_socket()).expect("the admin socket");
        stream.set_read_timeout(Some(DEADLINE)).expect("a time limit");
        http::send(&mut stream, "GET", "/tap?follow=1&listener=web", &[("Accept", accept)]).expect("it is sent");
        let mut lines = BufReader::new(stream).lines();
        assert_eq!(lines.next().expect("a line").expect("text"), "HTTP/1.1 200 OK");
        // It reaches the workers by the same inbox, behind the order to follow.
        eventually("the workers follow", || (lb.status()["workers"].as_u64() > Some(0)).then_some(()));
        ask(&lb, b"");
        let line = lines.map(|line| line.expect("text")).find(|line| line.starts_with(prefix)).expect("a connection");
        let tapped: serde_json::Value = serde_json::from_str(line.trim_start_matches("data: ")).expect("JSON");
        assert_eq!(tapped["header"]["version"], "v1", "{tapped}");
        let raw = &receiver.arrivals().pop().expect("an arrival").raw;
        assert_eq!(tapped["header"]["hex"], hex(raw, ""));
    }
}

#[test]
fn one_connection_is_followed_by_its_id_once_the_level_is_debug() {
    let receiver = Receiver::with_header(say_who);
    let text = config("v2", &receiver.address.to_string(), "");
    let mut lb = preface(&text);
    ask(&lb, b"");
    lb.log().wait_for("the line", |line| line.contains("event=connection "));
    assert!(!lb.log().text().contains("level=debug"), "{}", lb.log().text());

    assert_eq!(lb.ask("POST", "/log?level=info,preface=loud").status, 400);
    assert_eq!(lb.ask("POST", "/log?level=debug").status, 200);
    ask(&lb, b"");
    let end = lb.log().wait_for("the end", |line| line.contains("event=end "));
    let id = end.split(' ').find(|field| field.starts_with("id=")).expect("an id").to_owned();
    assert_eq!(events(&lb, &id), ["accept", "attempt", "introduced", "connection", "end"]);

    // A reload that says nothing new about it leaves it; one that does doesn't.
    lb.apply(&text.replace("[pools.p]\n", "[pools.p]\nretries = 1\n"));
    assert_eq!(lb.status()["log"]["level"], "debug");
    assert_eq!(lb.status()["log"]["by"], "admin api");
    lb.apply(&format!("{text}\n[log]\nlevel = \"warn\"\n"));
    assert_eq!((&lb.status()["log"]["level"], &lb.status()["log"]["by"]), (&"warn".into(), &"configuration".into()));
}

#[test]
fn a_misspelt_level_is_refused_and_each_change_of_the_level_is_logged() {
    let receiver = Receiver::with_header(say_who);
    let lb = preface(&config("v2", &receiver.address.to_string(), ""));
    for (level, advice) in [
        ("debgu", "did you mean \\\"debug\\\"?"),
        ("info%0a", "did you mean \\\"info\\\"?"),
        ("info,preface::heatlh", "levels: "),
    ] {
        let response = lb.ask("POST", &format!("/log?level={level}"));
        assert_eq!(response.status, 400, "{level}: {}", response.text());
        assert!(response.text().contains(advice), "{level}: {}", response.text());
    }
    assert_eq!(lb.status()["log"]["level"], "info");

    for level in ["warn", "error", "off", "info"] {
        assert_eq!(lb.ask("POST", &format!("/log?level={level}")).status, 200);
        let line = lb.log().wait_for("the change", |line| line.contains(&format!(" level={level} by=")));
        assert!(line.contains("by=\"admin api\""), "{line}");
    }
    ask(&lb, b"");
    lb.log().wait_for("it still logs", |line| line.contains("event=connection "));
}

/// The events of the lines that have this in them, in their order; without the orders to the admin API.
fn events(lb: &Balancer, id: &str) -> Vec<String> {
    let lines = lb.log().lines();
    let of_it = lines.iter().filter(|line| line.contains(id));
    let of_it = of_it.filter(|line| !line.contains("event=admin "));
    of_it.filter_map(|line| Some(line.split(' ').find_map(|field| field.strip_prefix("event="))?.to_owned())).collect()
}

#[test]
fn one_session_is_followed_by_its_id_too_without_a_line_for_a_datagram() {
    let server = DatagramServer::start(datagrams::echo);
    let config = |upstream: &str| {
        format!(
            "[log]\nlevel = \"debug\"\n[listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n\
             [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\n\
             [pools.p.health_check]\nprotocol = \"tcp\"\n"
        )
    };
    let mut lb = preface(&config(&server.address.to_string()));
    // Nobody accepts there.
    lb.log().wait_for("a check", |line| {
        line.contains("level=debug event=health_check ") && line.contains("outcome=failed")
    });
    let client = datagrams::client();
    for number in 0..20_u8 {
        assert_eq!(datagrams::ask(&client, lb.ipv4("dns"), &[number]).0, [number]);
    }
    let own = format!("client={}", client.local_addr().expect("an address"));
    let accepted = lb.log().wait_for("the session", |line| line.contains("event=accept ") && line.contains(&own));
    let id = accepted.split(' ').find(|field| field.starts_with("id=")).expect("an id").to_owned();
    eventually("what it is introduced with", || (events(&lb, &id).len() == 3).then_some(()));
    // Another upstream, and the end by an order.
    let other = DatagramServer::start(datagrams::echo);
    lb.apply(&config(&other.address.to_string()));
    assert_eq!(datagrams::ask(&client, lb.ipv4("dns"), b"again").0, b"again");
    lb.log().wait_for("the move", |line| line.contains(&id) && line.ends_with(" attempt=2 moved=removed"));
    assert_eq!(lb.ask("DELETE", &format!("/connections/{}", &id[3..])).status, 200);
    lb.log().wait_for("the end", |line| line.contains("event=end ") && line.contains(&id));
    assert_eq!(events(&lb, &id), ["accept", "attempt", "introduced", "attempt", "introduced", "session", "end"]);
}

#[test]
fn a_listener_or_pool_that_there_is_not_is_an_error_that_names_those_there_are() {
    let receiver = Receiver::with_header(say_who);
    let lb = preface(&config("v2", &receiver.address.to_string(), ""));
    for path in ["/connections", "/tap"] {
        for (query, error) in [
            ("pool=nosuch", "no pool named \"nosuch\"; pools: p"),
            ("listener=nosuch&follow=1", "no listener named \"nosuch\"; listeners: web"),
        ] {
            let response = lb.ask("GET", &format!("{path}?{query}"));
            assert_eq!((response.status, &response.json()["error"]), (404, &error.into()), "{path}?{query}");
        }
        assert_eq!(lb.ask("GET", &format!("{path}?listener=web&pool=p")).status, 200);
    }
}
