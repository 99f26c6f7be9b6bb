//! UDP under load: many sessions at once, an upstream that dies, a flood of sources.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::support::datagrams::{DatagramServer, ask, client, client_at, echo, receive};
use crate::support::ports::free_port;
use crate::support::{Balancer, eventually, preface};

fn balancer(upstreams: &[SocketAddr], listener: &str) -> Balancer {
    let upstreams: Vec<String> = upstreams.iter().map(|address| format!("\"{address}\"")).collect();
    preface(&format!(
        "[runtime]\nmax_connections = 15000\n[log]\nconnections = \"off\"\n[listeners.dns]\nbind = \"127.0.0.1:0\"\nprotocol = \"udp\"\npool = \"p\"\n{listener}\n\
         [pools.p]\nproxy_protocol = \"v2\"\nupstreams = [{}]\n",
        upstreams.join(", ")
    ))
}

/// Bytes that no other client and no other round has.
fn payload(client: usize, round: usize, length: usize) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..length).map(|at| (at * 31 + client * 7 + round) as u8).collect();
    let mark = [client as u32, round as u32].map(u32::to_be_bytes).concat();
    let marked = length.min(mark.len());
    bytes[..marked].copy_from_slice(&mark[..marked]);
    bytes
}

/// Lengths from 0 to 60,000, small ones more often.
fn length(client: usize, round: usize) -> usize {
    match (client * 3 + round) % 50 {
        0 => 0,
        1 => 60_000,
        2 => 9_000,
        3 => 1_473,
        4 => 1_444,
        other => other * 13,
    }
}

#[test]
fn ten_thousand_sessions_get_their_own_replies_and_lose_none() {
    const SESSIONS: usize = 10_000;
    const ROUNDS: usize = 3;
    /// Questions under way at once: what the queues between all of them hold.
    const UNDER_WAY: usize = 32;
    let server = DatagramServer::start(echo);
    let lb = balancer(&[server.address], "max_sessions = 12000");
    let local = lb.ipv4("dns");
    raise_descriptor_limit();
    // Distinct ports of 127.0.0.x: each address has a range of its own.
    let clients: Vec<UdpSocket> = (0..SESSIONS)
        .map(|number| {
            let socket = UdpSocket::bind((Ipv4Addr::new(127, 0, 1, (number / 5_000) as u8 + 1), 0)).expect("a port");
            socket.connect(local).expect("a connected socket");
            socket.set_read_timeout(Some(Duration::from_secs(10))).expect("a time limit");
            socket
        })
        .collect();
    let mut buffer = vec![0; 1 << 16];
    for round in 0..ROUNDS {
        // Interleaved: neighbours in time are far from each other, and the order differs from round to round.
        let order: Vec<usize> = (0..SESSIONS).map(|at| (at * 7_919 + round * 13) % SESSIONS).collect();
        for some in order.chunks(UNDER_WAY) {
            for number in some {
                let bytes = payload(*number, round, length(*number, round));
                clients[*number].send(&bytes).expect("a datagram is sent");
            }
            for number in some {
                let expected = payload(*number, round, length(*number, round));
                let length = clients[*number].recv(&mut buffer).unwrap_or_else(|error| {
                    panic!("client {number}, round {round}, {} bytes: {error}; {}", expected.len(), lb.metrics())
                });
                assert_eq!(buffer[..length], expected, "client {number}, round {round}");
            }
        }
        if round == 0 {
            assert_eq!(lb.metric("preface_sessions_open", &[]), SESSIONS as f64);
        }
    }
    assert_eq!(lb.metric("preface_datagrams_dropped_total", &[]), 0.0);
    assert_eq!(lb.metric("preface_sessions_begun_total", &[]), SESSIONS as f64);
    for direction in ["in", "out"] {
        let total = lb.metric("preface_datagrams_total", &[("direction", direction)]);
        assert_eq!(total, (SESSIONS * ROUNDS) as f64, "{direction}");
    }
    // Nothing more comes to anybody.
    for client in clients.iter().step_by(997) {
        client.set_nonblocking(true).expect("a mode");
        assert_eq!(client.recv(&mut buffer).expect_err("nothing").kind(), ErrorKind::WouldBlock);
    }
    // Whom the headers named is who asked.
    let asked: HashMap<SocketAddr, usize> =
        clients.iter().enumerate().map(|(number, client)| (client.local_addr().expect("an address"), number)).collect();
    for datagram in server.datagrams() {
        let (client, destination) = datagram.ends.expect("a header");
        assert_eq!(destination, local);
        if let Some(mark) = datagram.payload.first_chunk::<4>() {
            assert_eq!(asked[&client], u32::from_be_bytes(*mark) as usize);
        }
    }
}

/// The tests' process needs a descriptor for each client.
fn raise_descriptor_limit() {
    preface::net::limits::raise_descriptor_limit();
}

#[test]
fn sessions_move_when_their_upstream_dies_and_come_to_it_again_when_it_is_back() {
    // It comes back to its port: nobody's outgoing socket may have that one in between.
    let one = DatagramServer::at(&format!("127.0.0.1:{}", free_port()), echo);
    let two = DatagramServer::start(echo);
    let lb = balancer(&[one.address, two.address], "");
    let local = lb.ipv4("dns");
    let dead = one.address;
    let load = Load::start(local);
    load.wait_answers(500);
    drop(one);
    eventually("its sessions have moved", || (lb.metric("preface_sessions_moved_total", &[]) >= 20.0).then_some(()));
    load.wait_answers(500);
    assert_eq!(lb.metric("preface_sessions_begun_total", &[]), 40.0, "they are the same sessions");
    let back = DatagramServer::at(&dead.to_string(), echo);
    // Failed sessions took it out; in a pool without checks it is tried again after 10 s.
    eventually("it has new sessions", || {
        ask(&client(), local, b"new");
        (back.count() > 0).then_some(())
    });
}

/// 40 clients that ask one question after the other, until this is dropped.
struct Load {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicUsize>,
}

impl Load {
    fn start(local: SocketAddr) -> Load {
        let load = Load { stop: Arc::default(), answered: Arc::default() };
        for _ in 0..4 {
            let (stop, answered) = (Arc::clone(&load.stop), Arc::clone(&load.answered));
            std::thread::spawn(move || {
                let clients: Vec<UdpSocket> = (0..10).map(|_| client()).collect();
                let mut buffer = [0; 100];
                for socket in clients.iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    socket.set_read_timeout(Some(Duration::from_millis(200))).expect("a time limit");
                    let sent = socket.send_to(b"question", local);
                    // One that was on its way when the upstream died is lost, as UDP is.
                    if sent.is_ok() && socket.recv_from(&mut buffer).is_ok() {
                        answered.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
        load
    }

    #[track_caller]
    fn wait_answers(&self, more: usize) {
        let goal = self.answered.load(Ordering::Relaxed) + more;
        eventually("answers", || (self.answered.load(Ordering::Relaxed) >= goal).then_some(()));
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_flood_of_sources_is_bounded_and_locks_nobody_out() {
    const MAX: usize = 2_000;
    const SOURCES: usize = 100_000;
    let server = DatagramServer::start(|datagram| match &datagram.payload[..] {
        b"flood" => Vec::new(),
        honest => vec![honest.to_vec()],
    });
    let lb = balancer(&[server.address], &format!("max_sessions = {MAX}"));
    let local = lb.ipv4("dns");
    let established: Vec<UdpSocket> = (0..100).map(|_| client()).collect();
    for client in &established {
        ask(client, local, b"before");
    }
    let before = resident(lb.id());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..SOURCES {
                let host = Ipv4Addr::new(127, 1, (number >> 8) as u8, number as u8);
                let port = 20_000 + (number >> 16) as u16;
                let Ok(socket) = UdpSocket::bind((host, port)) else { continue };
                socket.send_to(b"flood", local).expect("a datagram is sent");
            }
            done.store(true, Ordering::Relaxed);
        });
        let mut rounds = 0;
        while !done.load(Ordering::Relaxed) {
            ask_until_answered(&established[rounds % established.len()], local, b"established");
            ask_until_answered(&client_at("127.0.0.3:0"), local, b"new");
            assert!(lb.metric("preface_sessions_open", &[]) <= MAX as f64);
            rounds += 1;
        }
        assert!(rounds > 0);
    });
    for client in &established {
        ask_until_answered(client, local, b"after");
    }
    let grown = resident(lb.id()).saturating_sub(before);
    assert!(grown < 32 << 20, "{grown} bytes more for {MAX} sessions");
    assert!(lb.metric("preface_sessions_ended_total", &[("why", "displaced")]) > 0.0, "this proves nothing");
    // None of the established ones was displaced: each still has its one session.
    let peers = |client: &UdpSocket| {
        let own = client.local_addr().expect("an address");
        let mut peers: Vec<SocketAddr> = server
            .datagrams()
            .iter()
            .filter(|one| one.ends.is_some_and(|(client, _)| client == own))
            .map(|one| one.peer)
            .collect();
        peers.dedup();
        peers.len()
    };
    assert!(established.iter().step_by(10).all(|client| peers(client) == 1));
}

/// Asks, again and again as resolvers do, since a flooded queue of the kernel's loses datagrams of
/// anybody; an answer must come within 2 s.
#[track_caller]
fn ask_until_answered(client: &UdpSocket, to: SocketAddr, question: &[u8]) {
    let begun = Instant::now();
    client.set_read_timeout(Some(Duration::from_millis(100))).expect("a time limit");
    let mut buffer = [0; 100];
    loop {
        // A late answer to an earlier question may still lie there.
        if client.send_to(question, to).is_ok()
            && std::iter::from_fn(|| client.recv(&mut buffer).ok().map(|length| buffer[..length] == *question))
                .any(|answered| answered)
        {
            break;
        }
        assert!(begun.elapsed() < Duration::from_secs(2), "locked out: {}", question.escape_ascii());
    }
    assert!(begun.elapsed() < Duration::from_secs(2), "waited {:?}: {}", begun.elapsed(), question.escape_ascii());
}

/// Bytes of memory that a process has.
fn resident(process: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("the process is there");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("VmRSS");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<usize>().ok()).expect("a number") << 10
}

#[test]
fn bursts_of_one_client_come_whole_and_in_order_both_ways() {
    const COUNT: usize = 200;
    let server = DatagramServer::start(echo);
    let lb = balancer(&[server.address], "");
    let client = client();
    let _ = socket2::SockRef::from(&client).set_recv_buffer_size(8 << 20);
    for length in [0, 1, 100, 1_200, 1_472, 8_000] {
        for round in 0..COUNT {
            client.send_to(&payload(length, round, length), lb.ipv4("dns")).expect("a datagram is sent");
            // The upstream answers one by one: no more under way than its queue holds.
            if round % 10 == 9 {
                for earlier in round - 9..=round {
                    assert_eq!(receive(&client).0, payload(length, earlier, length), "{length} bytes, {earlier}");
                }
            }
        }
    }
    assert_eq!(lb.metric("preface_datagrams_dropped_total", &[]), 0.0);
}

#[test]
fn without_a_descriptor_new_clients_are_dropped_and_the_others_served() {
    let server = DatagramServer::start(echo);
    let lb = balancer(&[server.address], "");
    let local = lb.ipv4("dns");
    let served: Vec<UdpSocket> = (0..10).map(|_| client()).collect();
    served.iter().for_each(|client| drop(ask(client, local, b"before")));
    let set = |current: u64| {
        let id = Pid::from_raw(lb.id() as i32);
        let maximum = getrlimit(Resource::Nofile).maximum;
        let before = prlimit(id, Resource::Nofile, Rlimit { current: Some(current), maximum });
        before.expect("a child's limit may be lowered and raised").current.expect("a limit")
    };
    let open = std::fs::read_dir(format!("/proc/{}/fd", lb.id())).expect("its descriptors").count() as u64;
    let before = set(open);
    let others: Vec<UdpSocket> = (0..10).map(|_| client()).collect();
    for other in &others {
        other.send_to(b"one more", local).expect("a datagram is sent");
    }
    lb.log().wait_for("the shortage", |line| line.contains("reason=local_resources"));
    served.iter().for_each(|client| drop(ask(client, local, b"after")));
    set(before);
    assert_eq!(ask(&client(), local, b"again").0, b"again");
    assert!(lb.metric("preface_datagrams_dropped_total", &[("reason", "local_resources")]) > 0.0);
    assert_eq!(lb.metric("preface_upstream_connect_failures_total", &[]), 0.0);
}
