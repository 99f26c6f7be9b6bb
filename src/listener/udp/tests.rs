//! What no datagram can bring about: a session table that is not as the rest believes it to be.

use std::net::UdpSocket;
use std::sync::atomic::AtomicU64;

use arc_swap::ArcSwap;
use tokio::task::{LocalSet, spawn_blocking, spawn_local};

use super::*;
use crate::config;
use crate::drain::OpenConnections;
use crate::net::datagram;
use crate::net::listen::BindOptions;
use crate::snapshot::{self, Inputs, Snapshot};

/// A UDP socket of a worker in front of this upstream, and its address.
fn udp(upstream: SocketAddr) -> (Rc<Udp>, SocketAddr) {
    let options = BindOptions { address: "127.0.0.1:0".parse().unwrap(), v6only: false, keepalive: None };
    let socket = datagram::bind(&options, 1).unwrap().remove(0);
    let bound = socket.local_addr().unwrap().as_socket().unwrap();
    let text = format!(
        "[listeners.dns]\nbind = \"{bound}\"\nprotocol = \"udp\"\npool = \"p\"\n[pools.p]\nupstreams = [\"{upstream}\"]\n"
    );
    let config = config::parse("test.toml", &text).unwrap().config;
    let mut inputs = Inputs { has_ipv6: true, connections_max: 100, ports: 100, ..Inputs::default() };
    let keys = config.listeners.values().flat_map(|listener| snapshot::socket_keys(listener, &inputs));
    inputs.slots = keys.enumerate().map(|(slot, key)| (key, slot)).collect();
    let snapshot = snapshot::build(&Snapshot::default(), &config, &mut inputs, None, Instant::now());
    let listener = Arc::clone(&snapshot.slots[&0]);
    let output = tempfile::tempfile().unwrap();
    let (log, _) = log::start(output, config.log.format, "info").unwrap();
    let open = Arc::new(OpenConnections::default());
    let control = crate::control::channel().0;
    let shared = Shared::new(Arc::new(ArcSwap::from_pointee(snapshot)), open, control, log.sender(), 0);
    (Udp::new(&shared, &Rc::default(), socket, bound, 0, listener).unwrap(), bound)
}

/// Asks until there is an answer: what was on its way in a panic is lost.
fn ask(client: &UdpSocket, to: SocketAddr) -> usize {
    client.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let mut tries = 0;
    loop {
        tries += 1;
        assert!(tries < 50, "no answer");
        client.send_to(b"question", to).unwrap();
        if client.recv(&mut [0; 16]).is_ok() {
            return tries;
        }
    }
}

#[test]
fn a_panic_costs_the_sessions_of_its_socket_and_nothing_else() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let upstream = server.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, peer)) = server.recv_from(&mut buffer) {
            let _ = server.send_to(&buffer[..length], peer);
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let run = async {
        let (udp, bound) = udp(upstream);
        let (other, other_bound) = self::udp(upstream);
        let tasks = [spawn_local(Rc::clone(&udp).run()), spawn_local(Rc::clone(&other).run())];
        let clients: Vec<UdpSocket> = (0..3).map(|_| UdpSocket::bind("127.0.0.1:0").unwrap()).collect();
        let ask_all = |clients: Vec<UdpSocket>, to| {
            spawn_blocking(move || {
                let tries = clients.iter().map(|client| ask(client, to)).sum::<usize>();
                (clients, tries)
            })
        };
        let (clients, _) = ask_all(clients, bound).await.unwrap();
        let (clients, _) = ask_all(clients, other_bound).await.unwrap();
        let open = |udp: &Udp| udp.core.borrow().listener.life.sessions.open.load(Relaxed);
        assert_eq!((open(&udp), open(&other)), (3, 3));
        // The table knows a session that is not there.
        drop(udp.core.borrow_mut().sessions[1].take());
        let (clients, tries) = ask_all(clients, bound).await.unwrap();
        assert!(tries > 3, "the second client's first try is lost in the panic");
        let ended = |udp: &Udp| {
            let counters: &[AtomicU64] = &udp.core.borrow().listener.life.sessions.ends;
            counters[Termination::Panic as usize].load(Relaxed)
        };
        assert_eq!((ended(&udp), ended(&other)), (2, 0));
        assert_eq!(udp.core.borrow().table.len(), 2, "those who asked since then");
        drop(ask_all(clients, other_bound).await.unwrap());
        assert_eq!(other.core.borrow().listener.life.sessions.begun.load(Relaxed), 3, "still their first ones");
        for udp in [udp, other] {
            udp.end(None, Termination::StopTimeout);
            udp.drain();
        }
        for task in tasks {
            task.await.unwrap();
        }
    };
    LocalSet::new().block_on(&runtime, run);
}
