//! UDP: sessions, headers on datagrams, the way back, ends, reloads.

use std::net::{SocketAddr, UdpSocket};

use crate::support::datagrams::{DatagramServer, ask, client, client_at, echo, nothing, receive, say_ends};
use crate::support::{Balancer, eventually, preface};

/// One listener on 127.0.0.1 with further keys of listener and pool.
fn balancer(upstreams: &[SocketAddr], listener: &str, pool: &str) -> Balancer {
    preface(&config(upstreams, listener, pool))
}

fn config(upstreams: &[SocketAddr], listener: &str, pool: &str) -> String {
    let upstreams: Vec<String> = upstreams.iter().map(|address| format!("{address:?}")).collect();
    format!(
        "[listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n{listener}\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [{}]\n{pool}\n",
        upstreams.iter().map(|address| format!("\"{address}\"")).collect::<Vec<_>>().join(", ")
    )
}

#[test]
fn every_datagram_carries_the_header_and_its_reply_none() {
    let server = DatagramServer::start(say_ends);
    let lb = balancer(&[server.address], "", "");
    let client = client();
    let local = lb.ipv4("dns");
    let ends = format!("{} {local}", client.local_addr().unwrap());
    for count in 1..=3 {
        let (reply, from) = ask(&client, local, format!("question {count}").as_bytes());
        assert_eq!((String::from_utf8(reply).unwrap(), from), (ends.clone(), local));
    }
    let arrived = server.wait(3);
    assert!(arrived.iter().all(|datagram| datagram.peer == arrived[0].peer), "one socket a session");
    assert_eq!(arrived[2].payload, b"question 3");
}
