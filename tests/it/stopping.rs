//! How the process ends: in good order, with a limit, or at once; and signals that do not end it.

use std::io::{ErrorKind, Read};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use rustix::process::Signal;
use socket2::{Domain, Socket, Type};

use crate::load::{Budget, Echo, Transfer, connect_and_exchange, exchange};
use crate::reload::list;
use crate::support::ports::free_port;
use crate::support::receiver::echo;
use crate::support::{Balancer, DEADLINE, Receiver, client, eventually, preface};

fn config(port: u16, runtime: &str, pool: &str, upstreams: &[SocketAddr]) -> String {
    let upstreams = list(upstreams.iter().copied());
    format!(
        "[runtime]\n{runtime}\n[listeners.web]\nbind = \"127.0.0.1:{port}\"\npool = \"web\"\n\
         [pools.web]\nproxy_protocol = \"v2\"\nupstreams = {upstreams}\n{pool}\n"
    )
}

fn loopback(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A connection through which something was said.
#[track_caller]
fn open(port: u16) -> TcpStream {
    let mut stream = client::connect(loopback(port)).unwrap();
    exchange(&mut stream, 1, 100).unwrap();
    stream
}

#[track_caller]
fn assert_was_reset(balancer: &Balancer, stream: &mut TcpStream) {
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    assert_stop_timeout(balancer, stream);
}

#[track_caller]
fn assert_stop_timeout(balancer: &Balancer, stream: &TcpStream) {
    let client = format!("client={} ", stream.local_addr().unwrap());
    let line = balancer.log().wait_for("the end", |line| line.contains(&client));
    assert!(line.ends_with("end=preface.stop.stop_timeout"), "{line}");
}

/// Takes a signal, or two, and is gone with exit status 0.
#[track_caller]
fn assert_ended(balancer: &mut Balancer, port: u16) {
    assert_eq!(balancer.wait_exit().code(), Some(0));
    assert_eq!(client::connect(loopback(port)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(!balancer.admin_socket().exists(), "the admin socket is removed");
    let log = balancer.log().wait_for_end();
    assert!(log.last().unwrap().contains("event=stop"), "{log:#?}");
}

fn stops_in_good_order(signal: Signal) {
    let (port, upstream) = (free_port(), Echo::start());
    let mut balancer = preface(&config(port, "stop_delay = \"2s\"", "", &[upstream.address]));
    let chunks = [Budget::default(), Budget::default(), Budget::default()];
    let transfers = [0, 1, 2].map(|index| Transfer::start(loopback(port), index as u64, &chunks[index]));
    chunks.iter().for_each(|chunks| chunks.release(10));
    transfers.iter().for_each(|transfer| transfer.wait_for_chunks(5));
    balancer.signal(signal);
    // Not ready at once, alive throughout, and whoever comes until the delay is over is served.
    eventually("not ready", || (balancer.ask("GET", "/readyz").status == 503).then_some(()));
    let mut late = open(port);
    assert_eq!(balancer.status()["state"], "stopping");
    assert_eq!(balancer.ask("GET", "/livez").status, 200);
    let mut served = 0;
    let refusal = eventually("nobody listens any more", || match client::connect(loopback(port)) {
        Err(error) => Some(error),
        Ok(mut stream) => {
            exchange(&mut stream, 2, 1_000).expect("who could connect is served");
            served += 1;
            None
        }
    });
    assert_eq!(refusal.kind(), ErrorKind::ConnectionRefused);
    assert!(served > 0, "connections were accepted during stop_delay");
    // What is open goes on for as long as it takes.
    assert_eq!(balancer.ask("GET", "/livez").status, 200);
    assert_eq!(balancer.ask("GET", "/readyz").status, 503);
    exchange(&mut late, 3, 100_000).unwrap();
    chunks.iter().for_each(|chunks| chunks.release(20));
    transfers.iter().for_each(|transfer| transfer.wait_for_chunks(15));
    assert!(balancer.is_running());
    drop(late);
    let carried: u64 = transfers.into_iter().map(Transfer::finish).sum();
    assert!(carried > 3 * 48 * 1024, "{carried}");
    assert_ended(&mut balancer, port);
    assert!(balancer.log().lines().iter().all(|line| !line.contains("end=preface.")), "nobody was reset");
    assert!(upstream.errors().is_empty(), "{:?}", upstream.errors());
}

#[test]
fn sigterm_stops_in_good_order() {
    stops_in_good_order(Signal::TERM);
}

#[test]
fn sigint_stops_in_good_order() {
    stops_in_good_order(Signal::INT);
}

#[test]
fn what_is_open_after_stop_timeout_is_reset() {
    let (port, receiver) = (free_port(), Receiver::with_header(echo));
    let mut balancer = preface(&config(port, "stop_timeout = \"300ms\"", "", &[receiver.address]));
    let mut streams = [open(port), open(port)];
    balancer.signal(Signal::TERM);
    streams.iter_mut().for_each(|stream| assert_was_reset(&balancer, stream));
    assert_ended(&mut balancer, port);
}

#[test]
fn a_second_signal_stops_at_once() {
    for (runtime, second) in [
        ("stop_delay = \"1h\"", Signal::TERM),
        ("stop_delay = \"1h\"", Signal::INT),
        ("stop_timeout = \"1h\"", Signal::TERM),
    ] {
        let (port, receiver) = (free_port(), Receiver::with_header(echo));
        let mut balancer = preface(&config(port, runtime, "", &[receiver.address]));
        let mut stream = open(port);
        balancer.signal(Signal::TERM);
        eventually("not ready", || (balancer.ask("GET", "/readyz").status == 503).then_some(()));
        exchange(&mut stream, 2, 100).expect("the first signal resets nobody");
        balancer.signal(second);
        assert_was_reset(&balancer, &mut stream);
        assert_ended(&mut balancer, port);
    }
}

#[test]
fn an_idle_balancer_stops_without_waiting() {
    let (port, receiver) = (free_port(), Receiver::with_header(echo));
    let mut balancer = preface(&config(port, "stop_timeout = \"1h\"", "", &[receiver.address]));
    drop(open(port));
    balancer.signal(Signal::TERM);
    assert_ended(&mut balancer, port);
}

#[test]
fn sighup_reloads() {
    let (port, receiver) = (free_port(), Receiver::with_header(echo));
    let text = config(port, "", "", &[receiver.address]);
    let mut balancer = preface(&text);
    let mut stream = open(port);
    balancer.signal(Signal::HUP);
    balancer.log().wait_for("a reload", |line| line.contains("trigger=signal outcome=unchanged"));
    // Whether the signal or the file comes first, the change is in force once.
    balancer.rewrite_config(&(text.clone() + "retries = 7\n"));
    balancer.signal(Signal::HUP);
    let applied = |line: &str| line.contains("outcome=applied") && line.contains("retries 2 -> 7");
    balancer.log().wait_for("the change", applied);
    balancer.rewrite_config("nonsense");
    balancer.signal(Signal::HUP);
    balancer.log().wait_for("a refusal", |line| line.contains("outcome=refused") && line.contains("nonsense"));
    assert_eq!(balancer.log().lines().iter().filter(|line| applied(line)).count(), 1);
    exchange(&mut stream, 2, 100).unwrap();
    connect_and_exchange(loopback(port), 3).unwrap();
}

/// An address that answers no handshake: its queue is full.
struct Blackhole {
    address: SocketAddr,
    _listener: Socket,
    _queued: Vec<TcpStream>,
}

impl Blackhole {
    fn new() -> Blackhole {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener.bind(&loopback(0).into()).unwrap();
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let mut queued = Vec::new();
        while let Ok(stream) = TcpStream::connect_timeout(&address, Duration::from_millis(50)) {
            queued.push(stream);
        }
        Blackhole { address, _listener: listener, _queued: queued }
    }
}

#[track_caller]
fn wait_for_open(balancer: &Balancer, upstream: SocketAddr) {
    let labels = upstream.to_string();
    eventually("a connection is under way", || {
        let open = balancer.metric("preface_upstream_connections_open", &[("upstream", labels.as_str())]);
        (open >= 1.0).then_some(())
    });
}

#[test]
fn a_connection_that_never_reached_its_upstream_ends_with_the_stop_too() {
    let (port, nowhere) = (free_port(), Blackhole::new());
    let pool = "connect_timeout = \"30s\"\nconnect_deadline = \"30s\"";
    let mut balancer = preface(&config(port, "stop_timeout = \"100ms\"", pool, &[nowhere.address]));
    let mut stream = client::connect(loopback(port)).unwrap();
    wait_for_open(&balancer, nowhere.address);
    balancer.signal(Signal::TERM);
    assert_was_reset(&balancer, &mut stream);
    assert_ended(&mut balancer, port);
}

#[test]
fn who_is_connecting_to_a_disabled_upstream_gets_another() {
    let (port, nowhere, receiver) = (free_port(), Blackhole::new(), Receiver::with_header(echo));
    let pool = "connect_timeout = \"30s\"\nconnect_deadline = \"30s\"";
    let balancer = preface(&config(port, "", pool, &[nowhere.address, receiver.address]));
    let mut streams = [client::connect(loopback(port)).unwrap(), client::connect(loopback(port)).unwrap()];
    wait_for_open(&balancer, nowhere.address);
    wait_for_open(&balancer, receiver.address);
    let response = balancer.ask("POST", &format!("/pools/web/upstreams/{}/disable", nowhere.address));
    assert_eq!(response.status, 200, "{}", response.text());
    for stream in &mut streams {
        exchange(stream, 1, 1_000).expect("both are served, at once");
    }
    assert_eq!(receiver.wait_for(2).len(), 2);
}

#[test]
fn who_is_connecting_to_the_only_upstream_ends_when_it_is_disabled() {
    let (port, nowhere) = (free_port(), Blackhole::new());
    let pool = "connect_timeout = \"30s\"\nconnect_deadline = \"30s\"";
    let balancer = preface(&config(port, "", pool, &[nowhere.address]));
    let mut stream = client::connect(loopback(port)).unwrap();
    wait_for_open(&balancer, nowhere.address);
    assert_eq!(balancer.ask("POST", &format!("/pools/web/upstreams/{}/disable", nowhere.address)).status, 200);
    assert_eq!(stream.read(&mut [0; 1]).unwrap_err().kind(), ErrorKind::ConnectionReset);
    balancer.log().wait_for("its end", |line| line.ends_with("end=preface.relay.disabled"));
}

/// The order comes while nothing is tried: 100 ms lie between the second attempt and the third.
#[test]
fn an_order_about_one_upstream_does_not_end_the_attempt_at_another() {
    // Nobody is served before they listen.
    let sockets = [(); 2].map(|()| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&loopback(0).into()).unwrap();
        socket.set_read_timeout(Some(DEADLINE)).unwrap();
        socket
    });
    let addresses = sockets.each_ref().map(|socket| socket.local_addr().unwrap().as_socket().unwrap());
    let port = free_port();
    let balancer = preface(&config(port, "", "retries = 3\n[log]\nlevel = \"debug\"", &addresses));
    let mut stream = client::connect(loopback(port)).unwrap();
    let line = balancer
        .log()
        .wait_for("the second attempt", |line| line.contains("event=attempt ") && line.ends_with(" attempt=2"));
    let second = addresses.iter().position(|address| line.contains(&format!("upstream={address} "))).unwrap();
    sockets[1 - second].listen(1).unwrap();
    let order = format!("/pools/web/upstreams/{}/disable", addresses[second]);
    assert_eq!(balancer.ask("POST", &order).status, 200);
    let (upstream, _) = sockets[1 - second].accept().expect("the other one has the connection");
    upstream.send(b"served").unwrap();
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"served");
}
