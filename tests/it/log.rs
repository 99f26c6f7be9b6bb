//! The lines of `log.connections = "start_and_end"`: one when a connection or a session begins, one when it has ended,
//! both with the same id.

use std::io::{Read, Write};

use preface::proxy_protocol::Tlv;

use crate::support::datagrams::{DatagramServer, ask, client, echo};
use crate::support::{Balancer, preface};
use crate::traffic::{accept, listen};

/// The fields of a text line that have no spaces in their values, which these lines do not.
fn field<'a>(line: &'a str, key: &str) -> &'a str {
    let found = line.split(' ').find_map(|field| field.strip_prefix(key)?.strip_prefix('='));
    found.unwrap_or_else(|| panic!("no {key} in {line}"))
}

/// Waits for the line of this event, the only one.
#[track_caller]
fn the_line(lb: &Balancer, event: &str) -> String {
    let is_its = |line: &str| line.split(' ').any(|field| field.strip_prefix("event=") == Some(event));
    let line = lb.log().wait_for(event, is_its);
    assert_eq!(lb.log().lines().iter().filter(|line| is_its(line)).count(), 1, "{}", lb.log().text());
    line
}

/// The line of a begin: all that is known of it then.
#[track_caller]
fn assert_begins(line: &str, event: &str, listener: &str, client: &str) {
    let keys: Vec<&str> = line.split(' ').filter_map(|field| field.split('=').next()).collect();
    assert_eq!(keys, ["time", "level", "event", "id", "listener", "client"], "{line}");
    let values = ["level", "event", "listener", "client"].map(|key| field(line, key));
    assert_eq!(values, ["info", event, listener, client]);
    assert_eq!(field(line, "id").len(), 26, "a ULID: {line}");
}

#[test]
fn a_connection_has_a_line_at_its_start_and_one_at_its_end_with_the_same_id() {
    let upstream = listen();
    let lb = preface(&format!(
        "[log]\nconnections = \"start_and_end\"\n[listeners.web]\nbind = \"127.0.0.1:0\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"v2\"\ntlvs = {{ unique_id = true }}\nupstreams = [\"{}\"]\n",
        upstream.local_addr().expect("a bound socket has an address")
    ));
    let mut client = lb.connect("web");
    let own = client.local_addr().expect("an address").to_string();
    let (mut server, header) = accept(&upstream);
    // It is open, and nobody has said anything yet.
    let start = the_line(&lb, "connection_start");
    assert_begins(&start, "connection_start", "web", &own);
    assert!(!lb.log().text().contains("event=connection "), "{}", lb.log().text());
    let id = field(&start, "id");
    let in_header = header.tlvs.iter().find_map(|tlv| match tlv {
        Tlv::UniqueId(id) => Some(id.as_slice()),
        _ => None,
    });
    assert_eq!(in_header, Some(id.as_bytes()), "{header:?}");

    client.write_all(b"hello").expect("it is sent");
    drop(client);
    server.read_to_end(&mut Vec::new()).expect("the client has closed");
    drop(server);
    let end = the_line(&lb, "connection");
    // A regular end has its line, too.
    assert_eq!([field(&end, "end"), field(&end, "id"), field(&end, "client")], ["client.relay.closed", id, &own]);
    let lines = lb.log().lines();
    let at = |line: &String| lines.iter().position(|one| one == line);
    assert!(at(&start) < at(&end), "{lines:#?}");
}

#[test]
fn a_session_has_a_line_at_its_start_and_one_at_its_end_with_the_same_id() {
    let server = DatagramServer::start(echo);
    let lb = preface(&format!(
        "[log]\nconnections = \"start_and_end\"\n\
         [listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
        server.address
    ));
    let client = client();
    let own = client.local_addr().expect("an address").to_string();
    ask(&client, lb.ipv4("dns"), b"hello");
    let start = the_line(&lb, "session_start");
    assert_begins(&start, "session_start", "dns", &own);
    assert!(!lb.log().text().contains("event=session "), "{}", lb.log().text());
    let id = field(&start, "id");
    let open = lb.ask("GET", "/connections").json();
    let path = format!("/connections/{id}");
    assert!(open.to_string().contains(id), "the admin API has it under the same id: {open}");
    assert_eq!(lb.ask("DELETE", &path).status, 200);
    let end = the_line(&lb, "session");
    assert_eq!([field(&end, "end"), field(&end, "id"), field(&end, "client")], ["preface.relay.ended", id, &own]);
    // Another session of the same client is another pair of lines.
    ask(&client, lb.ipv4("dns"), b"again");
    let starts = lb.log().wait_for_count("starts", 2, |line| line.contains("event=session_start"));
    assert_ne!(field(&starts[1], "id"), id);
}
