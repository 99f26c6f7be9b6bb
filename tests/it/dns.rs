//! In front of the distribution's DNS servers, which take a header before each question: what they say who asked, and
//! the checks that ask them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;

use preface::proxy_protocol::Transport;

use crate::support::client::{connect_from, loopback};
use crate::support::dns::{
    Asked, Server, assert_answers, dnsdist, in_who, query, receive_tcp, recursor, send_tcp, udp_client, unbound,
};
use crate::support::netns::Namespace;
use crate::support::ports::free_port;
use crate::support::{Process, preface, program, skip};

const CLIENTS: usize = 100;
/// Each client asks more than once: the header must be on every datagram, and once on a connection.
const QUESTIONS: u16 = 3;

/// Listeners `to4` and `to6`, each on IPv4 and IPv6, over UDP and TCP, in front of one server's port.
fn every_family(server: &Server) -> String {
    let listener = |name: &str, upstream: &str| {
        format!(
            "[listeners.{name}]\nbind = [\"127.0.0.1:0\", \"[::1]:0\"]\nprotocol = [\"tcp\", \"udp\"]\npool = \"{name}\"\n\
             [pools.{name}]\nproxy_protocol = \"v2\"\nupstreams = [\"{upstream}:{}\"]\n",
            server.port
        )
    };
    listener("to4", "127.0.0.1") + &listener("to6", "[::1]")
}

/// A client of one transport.
enum Client {
    Udp(UdpSocket),
    Tcp(TcpStream),
}

impl Client {
    #[track_caller]
    fn new(transport: Transport, source: IpAddr, to: SocketAddr) -> Client {
        match transport {
            Transport::Dgram => Client::Udp(udp_client(source, to)),
            Transport::Stream => Client::Tcp(connect_from(source, to).expect("a client connects")),
        }
    }

    fn address(&self) -> SocketAddr {
        match self {
            Client::Udp(socket) => socket.local_addr(),
            Client::Tcp(stream) => stream.local_addr(),
        }
        .expect("a client has an address")
    }

    /// Its own address as a name, so that a line of the server's log can be held against itself.
    fn label(&self) -> String {
        label(self.address())
    }

    #[track_caller]
    fn ask(&mut self, id: u16) {
        let query = query(id, &self.label());
        match self {
            Client::Udp(socket) => drop(socket.send(&query).expect("a client asks")),
            Client::Tcp(stream) => send_tcp(stream, &query).expect("a client asks"),
        }
    }

    #[track_caller]
    fn expect_answer(&mut self, id: u16) {
        let mut answer = vec![0; 4096];
        let read = match self {
            Client::Udp(socket) => socket.recv(&mut answer).map(|len| answer[..len].to_vec()),
            Client::Tcp(stream) => receive_tcp(stream),
        };
        let answer = read.unwrap_or_else(|error| panic!("client {}, question {id}: {error}", self.address()));
        assert_answers(&answer, &query(id, &self.label()));
    }
}

fn label(address: SocketAddr) -> String {
    address.to_string().replace(['.', ':', '[', ']'], "-")
}

/// Many clients at once, each from the source of its number; each gets the answers to its own questions.
fn ask_from_many(transport: Transport, to: SocketAddr, source: impl Fn(usize) -> IpAddr) -> BTreeSet<SocketAddr> {
    let mut clients: Vec<Client> = (0..CLIENTS).map(|index| Client::new(transport, source(index), to)).collect();
    for id in 0..QUESTIONS {
        clients.iter_mut().for_each(|client| client.ask(id));
        clients.iter_mut().for_each(|client| client.expect_answer(id));
    }
    clients.iter().map(Client::address).collect()
}

fn assert_names_every_client(server: &Server, transport: Transport) {
    let lb = preface(&every_family(server));
    let mut logged = 0;
    for listener in ["to4", "to6"] {
        for to in [lb.ipv4(listener), lb.ipv6(listener)] {
            // There is one ::1: those clients have at least ports of their own.
            let source = |index| if to.is_ipv4() { loopback(index) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) };
            assert_names_each(server, transport, to, source, &mut logged);
        }
    }
}

/// Each question that the server has logged since then names the client that asked it, and no client is missing.
fn assert_names_each(
    server: &Server,
    transport: Transport,
    to: SocketAddr,
    source: impl Fn(usize) -> IpAddr,
    logged: &mut usize,
) {
    let clients = ask_from_many(transport, to, source);
    let asked = server.wait_for(*logged + CLIENTS * usize::from(QUESTIONS)).split_off(*logged);
    *logged += asked.len();
    assert_eq!(asked.len(), CLIENTS * usize::from(QUESTIONS));
    for asked in &asked {
        assert_eq!(asked.name, in_who(&label(asked.client)));
        assert!(asked.to.is_none_or(|asked| asked == (to, transport)), "{asked:?} to {to}");
    }
    assert_eq!(asked.into_iter().map(|asked| asked.client).collect::<BTreeSet<_>>(), clients);
}

#[test]
fn unbound_names_every_client_over_tcp() {
    assert_names_every_client(&unbound(), Transport::Stream);
}

#[test]
fn unbound_names_every_client_over_udp() {
    assert_names_every_client(&unbound(), Transport::Dgram);
}

#[test]
fn the_powerdns_recursor_names_every_client_over_tcp() {
    assert_names_every_client(&recursor(), Transport::Stream);
}

#[test]
fn the_powerdns_recursor_names_every_client_over_udp() {
    assert_names_every_client(&recursor(), Transport::Dgram);
}

#[test]
fn dnsdist_names_every_client_over_tcp() {
    assert_names_every_client(&dnsdist(), Transport::Stream);
}

#[test]
fn dnsdist_names_every_client_over_udp() {
    assert_names_every_client(&dnsdist(), Transport::Dgram);
}

/// A hundred IPv6 addresses: each is one of a prefix that the machine takes for its own.
fn assert_names_every_ipv6_address(test: &str, start: fn() -> Server) {
    let namespace = match Namespace::new() {
        Ok(namespace) => namespace,
        Err(why) => return skip(&format!("dns::{test}"), &why),
    };
    namespace.run("ip -6 route add local fd00:53::/64 dev lo");
    let source = |index| IpAddr::V6(Ipv6Addr::new(0xfd00, 0x53, 0, 0, 0xa, 0xb, 0xc, index as u16 + 1));
    // What a thread inside starts is inside, too.
    namespace.inside(|| {
        std::fs::write("/proc/sys/net/ipv6/ip_nonlocal_bind", "1").expect("a setting of this namespace alone");
        let server = start();
        let lb = preface(&every_family(&server));
        let mut logged = 0;
        for transport in [Transport::Dgram, Transport::Stream] {
            // Over IPv4 to the server, and over IPv6.
            for listener in ["to4", "to6"] {
                assert_names_each(&server, transport, lb.ipv6(listener), source, &mut logged);
            }
        }
        let addresses: BTreeSet<IpAddr> = server.asked().iter().map(|asked| asked.client.ip()).collect();
        assert_eq!(addresses, (0..CLIENTS).map(source).collect());
    });
}

#[test]
fn unbound_names_a_hundred_ipv6_addresses() {
    assert_names_every_ipv6_address("unbound_names_a_hundred_ipv6_addresses", unbound);
}

#[test]
fn the_powerdns_recursor_names_a_hundred_ipv6_addresses() {
    assert_names_every_ipv6_address("the_powerdns_recursor_names_a_hundred_ipv6_addresses", recursor);
}

#[test]
fn dnsdist_names_a_hundred_ipv6_addresses() {
    assert_names_every_ipv6_address("dnsdist_names_a_hundred_ipv6_addresses", dnsdist);
}

/// Debian's `dig`, which asks from this address and port; the status and the TXT record of the answer.
#[track_caller]
fn dig(source: SocketAddr, to: SocketAddr, transport: Transport, name: &str) -> (String, Option<String>) {
    let mut dig = Command::new(program("dig"));
    dig.arg("-r").arg("-b").arg(format!("{}#{}", source.ip(), source.port()));
    dig.arg("-p").arg(to.port().to_string()).arg(format!("@{}", to.ip()));
    dig.arg(if transport == Transport::Stream { "+tcp" } else { "+notcp" });
    dig.args(["-q", name, "-t", "TXT", "+tries=1", "+time=20"]);
    let (status, output) = Process::run(&mut dig);
    assert!(status.success(), "{output}");
    let status =
        output.split_once("status: ").and_then(|(_, rest)| rest.split_once(',')).expect("it says the status").0;
    let is_answer = |line: &&str| line.starts_with(name) && line.contains("\tTXT\t");
    let record = output.lines().find(is_answer).and_then(|line| line.split('"').nth(1));
    (status.to_owned(), record.map(str::to_owned))
}

/// `dig` asks over UDP and TCP, IPv4 and IPv6, from a port that it was told; the server has the very address from the header.
fn assert_dig_is_named(start: fn() -> Server, answer: impl Fn(&Asked) -> (String, Option<String>)) {
    let server = start();
    let lb = preface(&every_family(&server));
    let mut logged = 0;
    for listener in ["to4", "to6"] {
        for (ip, to) in [("127.0.0.9", lb.ipv4(listener)), ("::1", lb.ipv6(listener))] {
            for transport in [Transport::Dgram, Transport::Stream] {
                let source = SocketAddr::new(ip.parse().expect("an address"), free_port());
                let name = in_who(&label(source));
                let got = dig(source, to, transport, &name);
                let asked = server.wait_for(logged + 1).split_off(logged);
                logged += 1;
                let [asked] = asked.as_slice() else { panic!("one question, and the server had {asked:?}") };
                assert_eq!((asked.client, &asked.name), (source, &name));
                assert!(asked.to.is_none_or(|asked| asked == (to, transport)), "{asked:?} to {to}");
                assert_eq!(got, answer(asked), "{source} over {transport:?}");
            }
        }
    }
}

#[test]
fn dig_asks_unbound_from_its_own_address() {
    assert_dig_is_named(unbound, |_| ("NOERROR".to_owned(), Some("answered".to_owned())));
}

#[test]
fn dig_is_told_its_own_address_by_the_powerdns_recursor() {
    assert_dig_is_named(recursor, |asked| {
        let (to, transport) = asked.to.expect("this server logs it");
        let over = if transport == Transport::Stream { "tcp" } else { "udp" };
        ("NOERROR".to_owned(), Some(format!("{} {to} {over}", asked.client)))
    });
}

#[test]
fn dig_asks_dnsdist_from_its_own_address() {
    assert_dig_is_named(dnsdist, |_| ("NXDOMAIN".to_owned(), None));
}

/// A question as a check's `send`, and what the answer to it contains.
const QUESTION: &str = r#"send = "\u0012\u0034\u0001\u0000\u0000\u0001\u0000\u0000\u0000\u0000\u0000\u0000\u0005check\u0003who\u0000\u0000\u0010\u0000\u0001", expect = "\u0005check\u0003who""#;

fn checked(name: &str, server: SocketAddr, keys: &str) -> String {
    format!(
        "[listeners.{name}]\nbind = \"127.0.0.1:0\"\npool = \"{name}\"\n\
         [pools.{name}]\nproxy_protocol = \"v2\"\nupstreams = [\"{server}\"]\n\
         health_check = {{ protocol = \"udp\", interval = \"100ms\", timeout = \"100ms\", {QUESTION}{keys} }}\n"
    )
}

/// A check by UDP with the question of a client: behind PROXY, behind LOCAL, and without the header it needs.
fn assert_checks(server: &Server) {
    for ip in ["127.0.0.1", "::1"] {
        let address = SocketAddr::new(ip.parse().unwrap(), server.port);
        let before = server.asked().len();
        let config = checked("proxy", address, ", proxy_protocol = \"same\"");
        let lb = preface(&config);
        let upstream = lb.wait_health("proxy", address, "healthy");
        let reason = upstream["health_reason"].as_str().unwrap();
        assert!(reason.starts_with("answered in "), "{reason}");
        drop(lb);
        let asked = server.asked().split_off(before);
        assert!(asked.iter().all(|asked| asked.name == "check.who" && asked.client.ip() == address.ip()), "{asked:?}");

        let lb = preface(&checked("local", address, ", proxy_command = \"local\""));
        lb.wait_health("local", address, "healthy");
        drop(lb);

        let lb = preface(&checked("bare", address, ", proxy_protocol = \"off\""));
        let upstream = lb.wait_health("bare", address, "unhealthy");
        assert_eq!(upstream["health_reason"], "no answer within 100ms");
    }
}

#[test]
fn unbound_is_checked_by_a_question() {
    assert_checks(&unbound());
}

#[test]
fn the_powerdns_recursor_is_checked_by_a_question() {
    assert_checks(&recursor());
}

#[test]
fn dnsdist_is_checked_by_a_question() {
    assert_checks(&dnsdist());
}
