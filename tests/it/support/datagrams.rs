//! The upstream of UDP tests: decodes the header of each datagram, keeps what arrived, answers as it is told.

use std::io::ErrorKind;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use preface::proxy_protocol::{Addresses, Command, Decoded, Transport, decode, spp};

use super::DEADLINE;

/// One datagram at the upstream.
#[derive(Clone, Debug)]
pub struct Datagram {
    /// From where it came: preface's socket.
    pub peer: SocketAddr,
    /// Client and destination as the header says; `None`: it had no header.
    pub ends: Option<(SocketAddr, SocketAddr)>,
    /// What followed the header.
    pub payload: Vec<u8>,
}

/// A UDP server on a thread of its own; it ends when this is dropped.
pub struct DatagramServer {
    /// Where it receives.
    pub address: SocketAddr,
    kept: Arc<Mutex<Vec<Datagram>>>,
    count: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// The replies to one datagram.
pub type Answer = fn(&Datagram) -> Vec<Vec<u8>>;

/// One reply: the same bytes.
pub fn echo(datagram: &Datagram) -> Vec<Vec<u8>> {
    vec![datagram.payload.clone()]
}

/// One reply: whom the header names, and where that one wrote to.
pub fn say_ends(datagram: &Datagram) -> Vec<Vec<u8>> {
    vec![match datagram.ends {
        Some((client, local)) => format!("{client} {local}").into_bytes(),
        None => b"no header".to_vec(),
    }]
}

/// No reply: a log server.
pub fn nothing(_: &Datagram) -> Vec<Vec<u8>> {
    Vec::new()
}

impl DatagramServer {
    /// Receives at this address.
    #[track_caller]
    pub fn at(address: &str, answer: Answer) -> DatagramServer {
        let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
        DatagramServer::on(socket, answer)
    }

    /// Receives on a free port of 127.0.0.1.
    #[track_caller]
    pub fn start(answer: Answer) -> DatagramServer {
        DatagramServer::at("127.0.0.1:0", answer)
    }

    /// Receives on this socket.
    #[track_caller]
    pub fn on(socket: UdpSocket, answer: Answer) -> DatagramServer {
        let address = socket.local_addr().expect("a bound socket has an address");
        // A queue as long as the machine allows: what is lost here is not preface's fault.
        let _ = socket2::SockRef::from(&socket).set_recv_buffer_size(8 << 20);
        socket.set_read_timeout(Some(Duration::from_millis(20))).expect("a time limit");
        let (kept, count) = (Arc::<Mutex<Vec<Datagram>>>::default(), Arc::<AtomicUsize>::default());
        let stop = Arc::<AtomicBool>::default();
        let thread = std::thread::spawn({
            let (kept, count, stop) = (Arc::clone(&kept), Arc::clone(&count), Arc::clone(&stop));
            move || {
                let mut buffer = vec![0; 1 << 16];
                while !stop.load(Ordering::Relaxed) {
                    let (length, peer) = match socket.recv_from(&mut buffer) {
                        Ok(received) => received,
                        Err(error) if [ErrorKind::WouldBlock, ErrorKind::TimedOut].contains(&error.kind()) => continue,
                        // The echo of an ICMP error.
                        Err(_) => continue,
                    };
                    let datagram = read(&buffer[..length], peer);
                    let replies = answer(&datagram);
                    // Kept before it is answered: who has the answer finds it here.
                    lock(&kept).push(datagram);
                    count.fetch_add(1, Ordering::Relaxed);
                    for reply in replies {
                        let _ = socket.send_to(&reply, peer);
                    }
                }
            }
        });
        DatagramServer { address, kept, count, stop, thread: Some(thread) }
    }

    /// Everything that has arrived so far.
    pub fn datagrams(&self) -> Vec<Datagram> {
        lock(&self.kept).clone()
    }

    /// How many have arrived.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Waits until so many have arrived.
    #[track_caller]
    pub fn wait(&self, count: usize) -> Vec<Datagram> {
        super::eventually(&format!("{count} datagrams at {}", self.address), || (self.count() >= count).then_some(()));
        self.datagrams()
    }
}

impl Drop for DatagramServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn lock(kept: &Mutex<Vec<Datagram>>) -> MutexGuard<'_, Vec<Datagram>> {
    kept.lock().unwrap_or_else(PoisonError::into_inner)
}

fn read(bytes: &[u8], peer: SocketAddr) -> Datagram {
    if let Ok(header) = spp::decode(bytes) {
        let ends = Some((header.client, header.local));
        return Datagram { peer, ends, payload: bytes[spp::HEADER_BYTES..].to_vec() };
    }
    match decode(bytes) {
        Ok(Decoded::Complete { header, len }) if header.command == Command::Proxy => {
            let dgram = matches!(header.addresses, Addresses::Inet { transport: Transport::Dgram, .. });
            assert!(dgram, "{header:?}");
            Datagram { peer, ends: header.addresses.ends(), payload: bytes[len..].to_vec() }
        }
        _ => Datagram { peer, ends: None, payload: bytes.to_vec() },
    }
}

/// A client's socket on a free port of 127.0.0.1.
#[track_caller]
pub fn client() -> UdpSocket {
    client_at("127.0.0.1:0")
}

/// A client's socket at this address.
#[track_caller]
pub fn client_at(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).unwrap_or_else(|error| panic!("{address}: {error}"));
    socket.set_read_timeout(Some(DEADLINE)).expect("a time limit");
    socket
}

/// Sends this and waits for one reply, and from where it came.
#[track_caller]
pub fn ask(client: &UdpSocket, to: SocketAddr, payload: &[u8]) -> (Vec<u8>, SocketAddr) {
    client.send_to(payload, to).expect("a datagram is sent");
    receive(client)
}

/// The next reply, and from where it came.
#[track_caller]
pub fn receive(client: &UdpSocket) -> (Vec<u8>, SocketAddr) {
    let mut buffer = vec![0; 1 << 16];
    let (length, from) = client.recv_from(&mut buffer).expect("a reply");
    buffer.truncate(length);
    (buffer, from)
}
