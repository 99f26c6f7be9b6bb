//! In front of the distribution's DNS servers, which take a header before each question: what they say who asked, and
//! the checks that ask them.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;

use preface::proxy_protocol::Transport;

use crate::support::client::{connect_from, loopback};
use crate::support::dns::{
    Server, assert_answers, dnsdist, in_who, query, receive_tcp, recursor, send_tcp, udp_client, unbound,
};
use crate::support::{Balancer, Process, preface, program};

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

/// Many clients at once, each from an address or at least a port of its own; each gets the answers to its own questions.
fn ask_from_many(transport: Transport, to: SocketAddr) -> BTreeSet<SocketAddr> {
    let source = |index| if to.is_ipv4() { loopback(index) } else { IpAddr::V6(Ipv6Addr::LOCALHOST) };
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
            let clients = ask_from_many(transport, to);
            let asked = server.wait_for(logged + CLIENTS * usize::from(QUESTIONS)).split_off(logged);
            logged += asked.len();
            assert_eq!(asked.len(), CLIENTS * usize::from(QUESTIONS));
            for asked in &asked {
                assert_eq!(asked.name, in_who(&label(asked.client)));
                assert!(asked.to.is_none_or(|asked| asked == (to, transport)), "{asked:?} to {to}");
            }
            assert_eq!(asked.into_iter().map(|asked| asked.client).collect::<BTreeSet<_>>(), clients);
        }
    }
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

/// Debian's `dig`; the answer as text.
fn dig(lb: &Balancer, source: IpAddr, extra: &[&str]) -> String {
    let to = if source.is_ipv4() { lb.ipv4("to4") } else { lb.ipv6("to4") };
    let mut dig = Command::new(program("dig"));
    dig.arg("-r").arg("-b").arg(source.to_string()).arg("-p").arg(to.port().to_string()).arg(format!("@{}", to.ip()));
    dig.args(["dig.who", "TXT", "+short", "+tries=1", "+time=20"]).args(extra);
    let (status, output) = Process::run(&mut dig);
    assert!(status.success(), "{output}");
    output.trim_matches('"').to_owned()
}

#[test]
fn dig_is_told_its_own_address_by_the_powerdns_recursor() {
    let recursor = recursor();
    let lb = preface(&every_family(&recursor));
    for source in ["127.0.0.9", "127.0.0.10", "::1"] {
        let source: IpAddr = source.parse().unwrap();
        for (extra, transport) in [("+notcp", "udp"), ("+tcp", "tcp")] {
            let answer = dig(&lb, source, &[extra]);
            let [client, to, over]: [&str; 3] = answer.split(' ').collect::<Vec<_>>().try_into().unwrap();
            let client: SocketAddr = client.parse().unwrap();
            let listener = if source.is_ipv4() { lb.ipv4("to4") } else { lb.ipv6("to4") };
            assert_eq!((client.ip(), to.parse(), over), (source, Ok(listener), transport), "{answer}");
        }
    }
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
