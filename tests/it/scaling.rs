//! More than one preface in front of the same upstreams: what `source_hash` has them agree on, what happens when an upstream
//! or a replica goes, and a client on the same host as its upstream.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;

use rustix::process::Signal;
use tempfile::TempDir;

use crate::support::client::{connect, connect_from, loopback};
use crate::support::datagrams::{Datagram, DatagramServer, ask, client_at, echo, say_ends};
use crate::support::netns::{Namespace, Pair};
use crate::support::ports::free_port;
use crate::support::zone::Network;
use crate::support::{Balancer, Process, eventually, http, preface, preface_in, program, skip, template};

/// An nginx that can be stopped, and started again where it was; see `tests/peers/nginx-where.conf`.
pub struct Nginx<'a> {
    namespace: Option<&'a Namespace>,
    listens: Vec<SocketAddr>,
    directory: TempDir,
    process: Option<Process>,
}

/// How nginx saw a request.
#[derive(Debug)]
pub struct Seen {
    /// Where it came in.
    pub server: SocketAddr,
    /// Which machine it came from.
    pub peer: IpAddr,
    /// Who the header said the client is.
    pub client: SocketAddr,
}

impl<'a> Nginx<'a> {
    /// Starts it where `namespace` is, and waits until it listens.
    #[track_caller]
    pub fn start(namespace: Option<&'a Namespace>, listens: &[SocketAddr]) -> Nginx<'a> {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let mut nginx = Nginx { namespace, listens: listens.to_vec(), directory, process: None };
        let dir = nginx.directory.path().display().to_string();
        // Workers of a master that root started would otherwise belong to a user who cannot enter the directory.
        let user = if rustix::process::geteuid().is_root() { "user root;" } else { "" };
        let listen: Vec<String> = listens.iter().map(|address| format!("listen {address} proxy_protocol;")).collect();
        let config = template("nginx-where.conf", &[("dir", &dir), ("user", user), ("listen", &listen.join(" "))]);
        std::fs::write(nginx.directory.path().join("nginx.conf"), config).expect("the configuration is written");
        nginx.start_again();
        nginx
    }

    #[track_caller]
    fn start_again(&mut self) {
        let mut command = match self.namespace {
            Some(namespace) => namespace.command("nginx"),
            None => Command::new(program("nginx")),
        };
        let dir = self.directory.path();
        command.arg("-p").arg(dir).arg("-c").arg(dir.join("nginx.conf")).arg("-e").arg(dir.join("error.log"));
        self.process = Some(Process::start(&mut command));
        let listens = || self.listens.iter().all(|address| connect(*address).is_ok());
        let listens = || self.namespace.map_or_else(listens, |namespace| namespace.inside(listens));
        eventually("nginx listens", || listens().then_some(()));
    }

    fn stop(&mut self) {
        self.process = None;
    }
}

/// Asks what nginx saw of this connection; it must be the truth.
#[track_caller]
fn ask_where(stream: TcpStream) -> Seen {
    try_where(stream).expect("an answer")
}

/// The same, where there may be no answer.
#[track_caller]
pub fn try_where(mut stream: TcpStream) -> io::Result<Seen> {
    let own = stream.local_addr().expect("a client has an address");
    let answer = http::get(&mut stream, "/")?.text();
    let fields: Vec<&str> = answer.split(' ').collect();
    let &[server_ip, server_port, peer, client_ip, client_port] = &fields[..] else { panic!("nginx said {answer:?}") };
    let address = |ip: &str, port: &str| format!("{ip}:{port}").parse().expect("nginx says addresses");
    let (server, client) = (address(server_ip, server_port), address(client_ip, client_port));
    assert_eq!(client, own, "the header names the client");
    Ok(Seen { server, peer: peer.parse().expect("nginx says addresses"), client })
}

/// `source_hash` before these upstreams, in this order, on TCP and UDP of one port.
fn replica(upstreams: &[SocketAddr]) -> String {
    let upstreams: Vec<String> = upstreams.iter().map(|address| format!("{:?}", address.to_string())).collect();
    format!(
        "[runtime]\nworkers = 2\n[listeners.web]\nbind = \"127.0.0.1:0\"\nprotocol = [\"tcp\", \"udp\"]\npool = \"p\"\n\
         [pools.p]\nbalance = \"source_hash\"\nproxy_protocol = \"v2\"\nupstreams = [{}]\n\
         [pools.p.health_check]\nprotocol = \"http\"\ninterval = \"100ms\"\n",
        upstreams.join(", ")
    )
}

const CLIENTS: usize = 200;

/// Where each of the clients gets through this replica, by TCP. What the header says of it is the truth.
#[track_caller]
fn upstreams_by_tcp(replica: &Balancer) -> Vec<SocketAddr> {
    let of_client = |index| {
        let stream = connect_from(loopback(index), replica.ipv4("web")).expect("a client connects");
        ask_where(stream).server
    };
    (0..CLIENTS).map(of_client).collect()
}

/// And by UDP.
#[track_caller]
fn upstreams_by_udp(replica: &Balancer, servers: &[DatagramServer]) -> Vec<SocketAddr> {
    let of_client = |index| {
        let client = client_at(&SocketAddr::new(loopback(index), 0).to_string());
        assert_eq!(ask(&client, replica.ipv4("web"), b"who has me?").0, b"who has me?");
        upstream_of(&client, servers)
    };
    (0..CLIENTS).map(of_client).collect()
}

/// Who got the last datagram of this client, as the header names it.
#[track_caller]
fn upstream_of(client: &UdpSocket, servers: &[DatagramServer]) -> SocketAddr {
    let own = client.local_addr().expect("a client has an address");
    let is_its = |datagram: &Datagram| datagram.ends.is_some_and(|(client, _)| client == own);
    let servers: Vec<_> = servers.iter().filter(|server| server.datagrams().iter().any(is_its)).collect();
    assert_eq!(servers.len(), 1, "all of them at one upstream");
    servers[0].address
}

#[test]
fn replicas_send_a_client_to_the_same_upstream_without_a_word() {
    let addresses: [SocketAddr; 3] = std::array::from_fn(|_| SocketAddr::from(([127, 0, 0, 1], free_port())));
    let mut web = addresses.map(|address| Nginx::start(None, &[address]));
    // Whose UDP port is the same one.
    let mut datagrams = Vec::from(addresses.map(|address| DatagramServer::at(&address.to_string(), echo)));
    let [a, b, c] = addresses;
    let replicas = [preface(&replica(&[a, b, c])), preface(&replica(&[c, a, b]))];
    let wait_health =
        |address, health| replicas.iter().for_each(|replica| drop(replica.wait_health("p", address, health)));
    addresses.iter().for_each(|address| wait_health(*address, "healthy"));
    let agreed = |datagrams: &[DatagramServer]| {
        let first = upstreams_by_tcp(&replicas[0]);
        assert_eq!(first, upstreams_by_tcp(&replicas[1]), "both replicas");
        replicas.iter().for_each(|replica| assert_eq!(first, upstreams_by_udp(replica, datagrams), "TCP and UDP"));
        first
    };
    let before = agreed(&datagrams);
    let count = |upstreams: &[SocketAddr], address| upstreams.iter().filter(|one| **one == address).count();
    assert!(addresses.iter().all(|address| count(&before, *address) > CLIENTS / 5), "{before:?}");

    web[1].stop();
    datagrams.remove(1);
    wait_health(b, "unhealthy");
    let without = agreed(&datagrams);
    for (before, now) in before.iter().zip(&without) {
        assert!(if *before == b { *now != b } else { now == before }, "only its clients move: {before} {now}");
    }
    assert!([a, c].iter().all(|address| count(&without, *address) > count(&before, *address) + 10), "over both");

    web[1].start_again();
    datagrams.insert(1, DatagramServer::at(&b.to_string(), echo));
    wait_health(b, "healthy");
    assert_eq!(agreed(&datagrams), before, "they come back");
}

/// Two hosts with a preface each, both with the address 10.232.9.9, which their clients' host reaches by two routes of equal
/// cost; behind them a host with three upstreams.
pub struct Anycast {
    /// Where the clients are: 10.232.100.1 to 10.232.100.254.
    pub clients: Namespace,
    /// The two hosts, each with its own /etc.
    pub hosts: [Network; 2],
    /// Where the upstreams are: 10.232.5.1 to 10.232.5.254.
    pub upstreams: Namespace,
}

/// What the hosts are in the clients' routes, and to the upstreams.
pub const WAYS: [(&str, &str); 2] = [("10.232.1.2", "10.232.3.2"), ("10.232.2.2", "10.232.4.2")];

impl Anycast {
    /// Without a route to 10.232.9.9 yet; or why this machine has none of it.
    pub fn new() -> Result<Anycast, String> {
        let hosts = [Network::new()?, Network::new()?];
        let anycast = Anycast { clients: Namespace::new()?, hosts, upstreams: Namespace::new()? };
        let Anycast { clients, hosts: [Network { namespace: one, .. }, Network { namespace: two, .. }], upstreams } =
            &anycast;
        clients.cable("10.232.1.1/24", one, "10.232.1.2/24");
        clients.cable("10.232.2.1/24", two, "10.232.2.2/24");
        upstreams.cable("10.232.3.1/24", one, "10.232.3.2/24");
        upstreams.cable("10.232.4.1/24", two, "10.232.4.2/24");
        // Every address of the network is the clients' host's.
        clients.run("ip route add local 10.232.100.0/24 dev lo");
        // By addresses and ports, so that connections of one client take both ways.
        clients.run("sysctl -w net.ipv4.fib_multipath_hash_policy=1");
        upstreams.run("ip route add local 10.232.5.0/24 dev lo");
        for (host, others) in [(one, ["10.232.1.1", "10.232.3.1"]), (two, ["10.232.2.1", "10.232.4.1"])] {
            host.run("ip addr add 10.232.9.9/32 dev lo");
            host.run(&format!("ip route add 10.232.100.0/24 via {}", others[0]));
            host.run(&format!("ip route add 10.232.5.0/24 via {}", others[1]));
        }
        Ok(anycast)
    }

    /// Clients reach 10.232.9.9 by these hosts from now on.
    fn route_to(&self, hosts: &[usize]) {
        let ways: Vec<String> = hosts.iter().map(|host| format!(" nexthop via {}", WAYS[*host].0)).collect();
        self.clients.run(&format!("ip route replace 10.232.9.9/32{}", ways.concat()));
    }

    #[track_caller]
    fn connect(&self, client: u8, port: u16) -> TcpStream {
        let to = SocketAddr::from(([10, 232, 9, 9], port));
        self.clients.inside(|| connect_from([10, 232, 100, client].into(), to)).expect("a client connects")
    }

    /// A socket for datagrams of this client.
    fn datagrams(&self, client: u8) -> UdpSocket {
        self.clients.inside(|| client_at(&format!("10.232.100.{client}:0")))
    }

    /// Several connections of each of many clients, one after the other: all succeed, and a client's are at one upstream.
    /// Returns where each client was, and which hosts took part.
    #[track_caller]
    fn visit(&self, port: u16) -> (Vec<SocketAddr>, Vec<usize>) {
        let (mut upstreams, mut hosts) = (Vec::new(), Vec::new());
        for client in 1..=20 {
            let visits: Vec<Seen> = (0..6).map(|_| ask_where(self.connect(client, port))).collect();
            assert!(visits.iter().all(|seen| seen.server == visits[0].server), "{visits:?}");
            assert!(visits.iter().all(|seen| seen.client.ip() == IpAddr::from([10, 232, 100, client])));
            upstreams.push(visits[0].server);
            let host = |seen: &Seen| WAYS.iter().position(|(_, to_upstreams)| seen.peer.to_string() == *to_upstreams);
            hosts.extend(visits.iter().map(|seen| host(seen).expect("one of the hosts")));
        }
        hosts.sort_unstable();
        hosts.dedup();
        (upstreams, hosts)
    }
}

/// Sends half a request, and nothing of it is answered yet.
#[track_caller]
fn begin(mut stream: TcpStream) -> TcpStream {
    stream.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n").expect("half a request is sent");
    stream
}

/// Sends the other half and reads the answer; `None`: the connection was reset.
#[track_caller]
fn finish(mut stream: TcpStream) -> Option<String> {
    stream.write_all(b"Connection: close\r\n\r\n").ok()?;
    let mut answer = String::new();
    let read = stream.read_to_string(&mut answer);
    if let Err(error) = &read {
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
    read.ok().map(|_| answer)
}

#[test]
fn a_replica_behind_equal_cost_routes_is_taken_out_without_a_failed_client() {
    let test = "scaling::a_replica_behind_equal_cost_routes_is_taken_out_without_a_failed_client";
    let anycast = match Anycast::new() {
        Ok(anycast) => anycast,
        Err(why) => return skip(test, &why),
    };
    let upstreams: [SocketAddr; 3] = std::array::from_fn(|index| SocketAddr::from(([10, 232, 5, index as u8 + 1], 80)));
    let _nginx = Nginx::start(Some(&anycast.upstreams), &upstreams);
    let servers = anycast.upstreams.inside(|| upstreams.map(|address| DatagramServer::at(&address.to_string(), echo)));
    let port = free_port();
    let [a, b, c] = upstreams;
    let config = |[a, b, c]: [SocketAddr; 3]| {
        format!(
            "[runtime]\nstop_delay = \"1h\"\n\
             [listeners.web]\nbind = \"10.232.9.9:{port}\"\nprotocol = [\"tcp\", \"udp\"]\npool = \"p\"\n\
             [pools.p]\nbalance = \"source_hash\"\nproxy_protocol = \"v2\"\nupstreams = [\"{a}\", \"{b}\", \"{c}\"]\n"
        )
    };
    let start = |host: usize, order| preface_in(&anycast.hosts[host].namespace, &config(order));
    let mut replicas = [start(0, [a, b, c]), start(1, [c, b, a])];
    anycast.route_to(&[0, 1]);
    let (before, hosts) = anycast.visit(port);
    assert_eq!(hosts, [0, 1]);
    assert!(upstreams.iter().all(|upstream| before.contains(upstream)), "{before:?}");

    // Open while the route changes: by which host, their logs say.
    let open: Vec<TcpStream> = (1..=20).map(|client| begin(anycast.connect(client, port))).collect();
    let of_host = |replica: &Balancer| replica.metric("preface_connections_open", &[]);
    eventually("all are open", || (of_host(&replicas[0]) + of_host(&replicas[1]) == 20.0).then_some(()));
    let by_first = of_host(&replicas[0]) as usize;
    assert!(by_first > 0 && by_first < 20, "this proves nothing: {by_first}");

    let talk = |client: &UdpSocket| {
        assert_eq!(ask(client, SocketAddr::from(([10, 232, 9, 9], port)), b"there?").0, b"there?");
        upstream_of(client, &servers)
    };
    let sessions: Vec<UdpSocket> = (1..=20).map(|client| anycast.datagrams(client)).collect();
    let at: Vec<SocketAddr> = sessions.iter().map(talk).collect();
    assert_eq!(at, before, "as by TCP");
    let begun = |replica: &Balancer| replica.metric("preface_sessions_begun_total", &[]);
    assert!(replicas.iter().all(|replica| begun(replica) > 0.0), "this proves nothing");

    replicas[0].signal(Signal::TERM);
    // What a route daemon's health check, or a Service, sees.
    eventually("not ready", || (replicas[0].ask("GET", "/readyz").status == 503).then_some(()));
    assert_eq!(anycast.visit(port), (before.clone(), vec![0, 1]), "until the route is gone, it serves");
    anycast.route_to(&[1]);
    assert_eq!(anycast.visit(port), (before.clone(), vec![1]), "and nobody's upstream is another one");
    assert_eq!(sessions.iter().map(talk).collect::<Vec<_>>(), at, "sessions go on by the other one");
    assert_eq!(begun(&replicas[1]), 20.0);

    // Routes know no connections: those that were open by the first host now come to the second, which resets them. So it
    // is with any balancer behind such routes, and the README says so.
    let finished: Vec<String> = open.into_iter().filter_map(finish).collect();
    assert_eq!(finished.len(), 20 - by_first);
    assert!(finished.iter().all(|answer| answer.starts_with("HTTP/1.1 200 ")), "{finished:?}");

    replicas[0].signal(Signal::TERM);
    assert_eq!(replicas[0].wait_exit().code(), Some(0));
    replicas[0] = start(0, [b, a, c]);
    anycast.route_to(&[0, 1]);
    assert_eq!(anycast.visit(port), (before, vec![0, 1]), "back");
}

#[test]
fn a_client_on_its_upstreams_host_is_served_through_another_host() {
    let pair = match Pair::new() {
        Ok(pair) => pair,
        Err(why) => return skip("scaling::a_client_on_its_upstreams_host_is_served_through_another_host", &why),
    };
    let upstream = SocketAddr::from(([10, 231, 0, 1], free_port()));
    let _nginx = Nginx::start(Some(&pair.left), &[upstream]);
    let _datagrams = pair.left.inside(|| DatagramServer::at(&upstream.to_string(), say_ends));
    let lb = preface_in(&pair.right, &replica(&[upstream]).replace("127.0.0.1:0", "10.231.0.2:0"));
    lb.wait_health("p", upstream, "healthy");
    let local = SocketAddr::from(([10, 231, 0, 2], lb.port("web")));
    let seen = ask_where(pair.left.inside(|| connect(local)).expect("a client connects"));
    assert_eq!((seen.server, seen.peer, seen.client.ip()), (upstream, local.ip(), upstream.ip()));
    let client = pair.left.inside(|| client_at("10.231.0.1:0"));
    let ends = format!("{} {local}", client.local_addr().expect("a client has an address"));
    assert_eq!(String::from_utf8(ask(&client, local, b"who am I?").0).expect("text"), ends);
}
