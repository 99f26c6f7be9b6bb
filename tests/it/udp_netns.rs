//! UDP on a network of its own: an MTU of 1500, several addresses, and go-mmproxy, which answers from spoofed addresses.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use crate::support::client::connect;
use crate::support::datagrams::{Datagram, DatagramServer, ask, client_at, echo, nothing, receive, say_ends};
use crate::support::netns::{Namespace, Pair};
use crate::support::ports::free_port;
use crate::support::{Balancer, Process, eventually, peers_directory, preface, preface_in, program, skip};

fn namespaces(test: &str) -> Option<Pair> {
    Pair::new().map_err(|why| skip(&format!("udp_netns::{test}"), &why)).ok()
}

/// preface in the left namespace, its clients in the right one.
fn balancer(pair: &Pair, bind: &str, upstream: SocketAddr) -> Balancer {
    preface_in(
        &pair.left,
        &format!(
            "[runtime]\nworkers = 1\n[listeners.dns]\nbind = \"{bind}\"\nprotocol = \"udp\"\npool = \"p\"\n\
             [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}\"]\n"
        ),
    )
}

#[test]
fn datagrams_around_an_mtu_of_1500_arrive_both_ways() {
    let Some(pair) = namespaces("datagrams_around_an_mtu_of_1500_arrive_both_ways") else { return };
    for (own, other, client) in
        [("10.231.0.1", "10.231.0.2:0", "10.231.0.2:0"), ("[fd00:231::1]", "[fd00:231::2]:0", "[fd00:231::2]:0")]
    {
        let server = pair.right.inside(|| DatagramServer::at(other, echo));
        let lb = balancer(&pair, &format!("{own}:0"), server.address);
        let local: SocketAddr = format!("{own}:{}", lb.port("dns")).parse().expect("an address");
        let client = pair.right.inside(|| client_at(client));
        let _ = socket2::SockRef::from(&client).set_recv_buffer_size(4 << 20);
        let mut sent = 0;
        // In bursts, so that those of one length leave as segments: on the way to the upstream with the header, on the
        // way back without; what is longer than a packet with it must not.
        for length in [1_400, 1_420, 1_444, 1_445, 1_472, 1_480, 3_000, 1_400] {
            for round in 0..20_u8 {
                client.send_to(&vec![round; length], local).expect("a datagram is sent");
                sent += 1;
            }
            let rounds: BTreeSet<u8> = (0..20)
                .map(|_| {
                    let (reply, from) = receive(&client);
                    assert_eq!((reply.len(), from), (length, local));
                    reply[0]
                })
                .collect();
            assert_eq!(rounds.len(), 20, "{length} bytes");
        }
        assert_eq!(lb.metric("preface_datagrams_dropped_total", &[]), 0.0);
        // The longest that there is leaves no room for a header.
        client.send_to(&vec![0; 65_507], local).expect("a datagram is sent");
        assert_eq!(ask(&client, local, b"and on").0, b"and on");
        assert_eq!(lb.metric("preface_datagrams_dropped_total", &[("reason", "too_big")]), 1.0);
        assert_eq!(lb.metric("preface_datagrams_total", &[("direction", "in")]), f64::from(sent + 1));
    }
}

#[test]
fn a_datagram_that_is_longer_than_what_is_received_at_once_is_dropped_and_counted() {
    let test = "a_datagram_that_is_longer_than_what_is_received_at_once_is_dropped_and_counted";
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(why) => return skip(&format!("udp_netns::{test}"), &why),
    };
    // Only a jumbogram is, and only a link with such an MTU carries one.
    namespace.run("ip link set lo mtu 100000");
    namespace.inside(|| {
        let server = DatagramServer::at("[::1]:0", echo);
        let lb = preface(&format!(
            "[listeners.dns]\nbind = \"[::1]:0\"\nprotocol = \"udp\"\npool = \"p\"\n\
             [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"{}\"]\n",
            server.address
        ));
        let send = |to: SocketAddr, length: usize| {
            let mut python = Command::new(program("python3"));
            python.arg(peers_directory().join("jumbogram.py")).args([to.port().to_string(), length.to_string()]);
            let (status, output) = Process::run(&mut python);
            assert!(status.success(), "{output}");
        };
        // The kernel delivers them whole.
        let plain = client_at("[::1]:0");
        send(plain.local_addr().expect("an address"), 70_000);
        let mut buffer = vec![0; 80_000];
        assert_eq!(plain.recv(&mut buffer).expect("a jumbogram"), 70_000);

        let dropped = || lb.metric("preface_datagrams_dropped_total", &[("listener", "dns"), ("reason", "truncated")]);
        // 65,536 bytes are whole, but leave no room for a header.
        send(lb.ipv6("dns"), 65_536);
        eventually("one is too big", || {
            (lb.metric("preface_datagrams_dropped_total", &[("reason", "too_big")]) == 1.0).then_some(())
        });
        assert_eq!(dropped(), 0.0);
        for length in [65_537, 70_000] {
            send(lb.ipv6("dns"), length);
        }
        eventually("both are counted", || (dropped() == 2.0).then_some(()));
        lb.log().wait_for("why", |line| line.contains("event=datagrams_dropped") && line.contains("reason=truncated"));
        assert_eq!(ask(&client_at("[::1]:0"), lb.ipv6("dns"), b"and on").0, b"and on");
        assert_eq!(server.count(), 1, "nothing was passed on in part");
    });
}

#[test]
fn a_wildcard_listener_on_several_addresses_is_the_one_that_was_asked() {
    let Some(pair) = namespaces("a_wildcard_listener_on_several_addresses_is_the_one_that_was_asked") else { return };
    for last in [11, 12] {
        pair.left.run(&format!("ip addr add 10.231.0.{last}/24 dev cable"));
        pair.left.run(&format!("ip addr add fd00:231::{last}/64 dev cable nodad"));
    }
    let server = pair.left.inside(|| DatagramServer::start(say_ends));
    let lb = balancer(&pair, ":0", server.address);
    let port = lb.port("dns");
    for (client, locals) in [
        ("10.231.0.2:0", ["10.231.0.1", "10.231.0.11", "10.231.0.12"]),
        ("[fd00:231::2]:0", ["[fd00:231::1]", "[fd00:231::11]", "[fd00:231::12]"]),
    ] {
        let client = pair.right.inside(|| client_at(client));
        for local in locals {
            let local: SocketAddr = format!("{local}:{port}").parse().expect("an address");
            let (said, from) = ask(&client, local, b"who?");
            assert_eq!(from, local);
            let ends = format!("{} {local}", client.local_addr().expect("an address"));
            assert_eq!(String::from_utf8(said).expect("text"), ends);
        }
    }
    assert_eq!(lb.metric("preface_sessions_begun_total", &[]), 6.0, "one for each address");
}

#[test]
fn what_the_own_firewall_stops_is_not_held_against_the_upstream() {
    let Some(pair) = namespaces("what_the_own_firewall_stops_is_not_held_against_the_upstream") else { return };
    let server = pair.left.inside(|| DatagramServer::start(echo));
    let lb = balancer(&pair, "10.231.0.1:0", server.address);
    let local = SocketAddr::from(([10, 231, 0, 1], lb.port("dns")));
    let client = pair.right.inside(|| client_at("10.231.0.2:0"));
    assert_eq!(ask(&client, local, b"before").0, b"before");
    let nft = |line: &str| {
        let (status, output) = Process::run(pair.left.command("nft").arg(line));
        assert!(status.success(), "{line}: {output}");
    };
    nft("add table inet own");
    nft("add chain inet own output { type filter hook output priority 0; }");
    nft(&format!("add rule inet own output udp dport {} drop", server.address.port()));
    for count in 1..=5 {
        client.send_to(b"stopped", local).expect("a datagram is sent");
        let dropped = || lb.metric("preface_datagrams_dropped_total", &[("reason", "forbidden")]);
        eventually("it is counted", || (dropped() == f64::from(count)).then_some(()));
    }
    lb.log().wait_for("why", |line| line.contains("event=datagrams_dropped") && line.contains("reason=forbidden"));
    nft("delete table inet own");
    assert_eq!(ask(&client, local, b"after").0, b"after");
    assert_eq!(lb.metric("preface_upstream_connect_failures_total", &[]), 0.0);
    assert_eq!(lb.metric("preface_sessions_moved_total", &[]), 0.0);
    assert_eq!(lb.metric("preface_sessions_begun_total", &[]), 1.0);
    assert_eq!(lb.upstream("p", server.address)["health"], "healthy");
}

#[test]
fn a_header_that_comes_once_and_was_stopped_comes_with_the_next_datagram() {
    for mode in ["first_datagram", "first_alone"] {
        let test = "a_header_that_comes_once_and_was_stopped_comes_with_the_next_datagram";
        let Some(pair) = namespaces(test) else { return };
        let server = pair.left.inside(|| DatagramServer::start(nothing));
        let text = format!(
            "[listeners.dns]\nbind = \"10.231.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n\
             [pools.p]\nproxy_protocol = \"v2\"\nudp_header = \"{mode}\"\nupstreams = [\"{}\"]\n",
            server.address
        );
        let lb = preface_in(&pair.left, &text);
        let local = SocketAddr::from(([10, 231, 0, 1], lb.port("dns")));
        let client = pair.right.inside(|| client_at("10.231.0.2:0"));
        let nft = |line: &str| drop(pair.left.run(&format!("nft {line}")));
        nft("add table inet own");
        nft("add chain inet own output { type filter hook output priority 0; }");
        nft(&format!("add rule inet own output udp dport {} drop", server.address.port()));
        client.send_to(b"stopped", local).expect("a datagram is sent");
        let dropped = || lb.metric("preface_datagrams_dropped_total", &[("reason", "forbidden")]);
        eventually("it is counted", || (dropped() == 1.0).then_some(()));
        nft("delete table inet own");
        client.send_to(b"passed on", local).expect("a datagram is sent");
        let first = server.wait(1).remove(0);
        assert_eq!(first.ends, Some((client.local_addr().unwrap(), local)), "{mode}");
        let last = server.wait(if mode == "first_alone" { 2 } else { 1 }).pop().expect("the datagram");
        assert_eq!(last.payload, b"passed on", "{mode}");
    }
}

#[test]
fn a_client_from_a_listeners_port_is_served_where_foreign_addresses_can_be_bound() {
    let test = "a_client_from_a_listeners_port_is_served_where_foreign_addresses_can_be_bound";
    let Some(pair) = namespaces(test) else { return };
    pair.left.run("sysctl -qw net.ipv4.ip_nonlocal_bind=1 net.ipv6.ip_nonlocal_bind=1");
    let server = pair.left.inside(|| DatagramServer::start(echo));
    let lb = balancer(&pair, ":0", server.address);
    let local = SocketAddr::from(([10, 231, 0, 1], lb.port("dns")));
    let client = pair.right.inside(|| client_at(&format!("10.231.0.2:{}", lb.port("dns"))));
    assert_eq!(ask(&client, local, b"from port to port").0, b"from port to port");
    assert_eq!(lb.metric("preface_datagrams_dropped_total", &[("reason", "own_address")]), 0.0);
}

/// The kernel says EACCES to a connect, of TCP and of UDP.
#[test]
fn a_route_that_prohibits_is_not_held_against_the_upstream() {
    let Some(pair) = namespaces("a_route_that_prohibits_is_not_held_against_the_upstream") else { return };
    pair.left.run("ip route add prohibit 192.0.2.1");
    let text = "[listeners.dns]\nbind = \"10.231.0.1:0\"\nprotocol = [\"tcp\", \"udp\"]\npool = \"p\"\n\
                [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [\"192.0.2.1:53\"]\n";
    let lb = preface_in(&pair.left, text);
    let local = SocketAddr::from(([10, 231, 0, 1], lb.port("dns")));
    pair.right.inside(|| client_at("10.231.0.2:0")).send_to(b"question", local).expect("a datagram is sent");
    let dropped = || lb.metric("preface_datagrams_dropped_total", &[("reason", "forbidden")]);
    eventually("it is counted", || (dropped() == 1.0).then_some(()));
    let mut client = pair.right.inside(|| connect(local)).expect("a client connects");
    client.read(&mut [0; 1]).expect_err("it is reset");
    lb.log().wait_for("why", |line| line.ends_with("end=preface.connect.local_resources"));
    assert_eq!(lb.metric("preface_upstream_connect_failures_total", &[]), 0.0);
}

#[test]
fn without_a_local_port_new_clients_are_dropped_and_the_others_served() {
    let Some(pair) = namespaces("without_a_local_port_new_clients_are_dropped_and_the_others_served") else { return };
    let server = pair.left.inside(|| DatagramServer::start(echo));
    let local_port_range = ["sysctl", "-w", "net.ipv4.ip_local_port_range=50000 50015"];
    let (status, output) = Process::run(pair.left.command(local_port_range[0]).args(&local_port_range[1..]));
    assert!(status.success(), "{output}");
    let lb = balancer(&pair, "10.231.0.1:0\"\nmax_sessions = 100\nidle_timeout = \"2s", server.address);
    let local = SocketAddr::from(([10, 231, 0, 1], lb.port("dns")));
    let client = || pair.right.inside(|| client_at("10.231.0.2:0"));
    let served: Vec<_> = (0..8).map(|_| client()).collect();
    served.iter().for_each(|client| drop(ask(client, local, b"before")));
    let drops = || lb.metric("preface_datagrams_dropped_total", &[("reason", "local_resources")]);
    let others: Vec<_> = (0..30).map(|_| client()).collect();
    for other in &others {
        other.send_to(b"one more", local).expect("a datagram is sent");
    }
    eventually("ports are short", || (drops() >= 14.0).then_some(()));
    served.iter().for_each(|client| drop(ask(client, local, b"after")));
    assert_eq!(lb.metric("preface_upstream_connect_failures_total", &[]), 0.0, "it is not the upstream's fault");
    let said = lb.log().lines().into_iter().filter(|line| line.contains("reason=local_resources")).count();
    assert_eq!(said, 1);
    // It recovers by itself.
    eventually("sessions have ended", || (lb.metric("preface_sessions_open", &[]) == 0.0).then_some(()));
    assert_eq!(ask(&others[29], local, b"again").0, b"again");
}

/// What a server without any idea of headers sees as its peer.
fn say_peer(datagram: &Datagram) -> Vec<Vec<u8>> {
    vec![datagram.peer.to_string().into_bytes()]
}

#[test]
fn a_plain_server_behind_go_mmproxy_sees_the_client() {
    let Some(pair) = namespaces("a_plain_server_behind_go_mmproxy_sees_the_client") else { return };
    // What comes back from the server to a spoofed address must stay here; see go-mmproxy's README.
    for line in ["ip rule add from 127.0.0.1/8 iif lo table 123", "ip route add local 0.0.0.0/0 dev lo table 123"] {
        pair.left.run(line);
    }
    let server = pair.left.inside(|| DatagramServer::start(say_peer));
    let directory = tempfile::tempdir().expect("a temporary directory");
    let allowed = directory.path().join("allowed");
    std::fs::write(&allowed, "127.0.0.1/32\n").expect("the file is written");
    let port = free_port();
    let mut command = pair.left.command("go-mmproxy");
    command.args(["-p", "udp", "-l", &format!("127.0.0.1:{port}"), "-4", &server.address.to_string(), "-v", "2"]);
    let _mmproxy = Process::start(command.arg("-allowed-subnets").arg(&allowed));
    let lb = balancer(&pair, "10.231.0.1:0", SocketAddr::from(([127, 0, 0, 1], port)));
    let local = SocketAddr::from(([10, 231, 0, 1], lb.port("dns")));
    for _ in 0..5 {
        let client = pair.right.inside(|| client_at("10.231.0.2:0"));
        client.set_read_timeout(Some(Duration::from_millis(200))).expect("a time limit");
        let own = client.local_addr().expect("an address").to_string();
        // The first ones may come before go-mmproxy is there.
        let said = eventually("an answer", || {
            client.send_to(b"who am I?", local).expect("a datagram is sent");
            let mut buffer = [0; 100];
            client.recv(&mut buffer).ok().map(|length| String::from_utf8_lossy(&buffer[..length]).into_owned())
        });
        assert_eq!(said, own);
    }
}
