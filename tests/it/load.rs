//! Clients that notice everything: connections one after the other, and transfers whose every byte is known.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use preface::proxy_protocol::{self, Decoded};
use rustix::net::Shutdown;

use crate::support::client::{self, connect_from, loopback};
use crate::support::{DEADLINE, eventually};

/// What one connection of `Clients` carries each way.
const MESSAGE_BYTES: usize = 4_000;
/// What a transfer sends before it looks whether it has come back.
const CHUNK_BYTES: usize = 48 * 1024;

/// Bytes that no other transfer sends, and that tell a byte lost, doubled or moved at once.
struct Pattern(u64);

impl Pattern {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            // xorshift: https://www.jstatsoft.org/article/view/v008i14
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }

    fn starting_with(seed: u64) -> Pattern {
        Pattern(seed.wrapping_mul(2).wrapping_add(0x9E37_79B9_7F4A_7C15))
    }
}

/// Sends `length` bytes and takes them back, as an echo gives them; says what differs.
pub fn exchange(stream: &mut TcpStream, seed: u64, length: usize) -> io::Result<()> {
    let mut sent = vec![0; length];
    Pattern::starting_with(seed).fill(&mut sent);
    stream.write_all(&sent)?;
    let mut received = vec![0; length];
    stream.read_exact(&mut received)?;
    match sent.iter().zip(&received).position(|(sent, received)| sent != received) {
        None => Ok(()),
        Some(at) => Err(io::Error::other(format!("byte {at} of {length} is wrong"))),
    }
}

/// One whole connection to an echo: connect, exchange, close, and wait for the other side's close.
pub fn connect_and_exchange(to: SocketAddr, seed: u64) -> io::Result<()> {
    exchange_and_close(client::connect(to)?, seed)
}

fn exchange_and_close(mut stream: TcpStream, seed: u64) -> io::Result<()> {
    exchange(&mut stream, seed, MESSAGE_BYTES)?;
    stream.shutdown(std::net::Shutdown::Write)?;
    match stream.read(&mut [0; 1])? {
        0 => Ok(()),
        _ => Err(io::Error::other("a byte too many")),
    }
}

/// An upstream for any number of connections: it remembers none of them, only headers that it could not read.
pub struct Echo {
    /// Where it listens.
    pub address: SocketAddr,
    listener: Arc<TcpListener>,
    errors: Arc<Mutex<Vec<String>>>,
    acceptor: Option<JoinHandle<()>>,
}

impl Echo {
    /// Expects a header on each connection, and sends back what follows.
    pub fn start() -> Echo {
        let listener = Arc::new(TcpListener::bind("127.0.0.1:0").expect("a free port"));
        let address = listener.local_addr().expect("a listener has an address");
        let errors = Arc::new(Mutex::new(Vec::new()));
        let (accepting, shared) = (listener.clone(), errors.clone());
        let acceptor = std::thread::spawn(move || {
            while let Ok((stream, peer)) = accepting.accept() {
                let errors = shared.clone();
                std::thread::spawn(move || {
                    if let Err(error) = echo(stream) {
                        errors.lock().expect("no connection panics").push(format!("{peer}: {error}"));
                    }
                });
            }
        });
        Echo { address, listener, errors, acceptor: Some(acceptor) }
    }

    /// Headers that were wrong, and connections that were reset.
    pub fn errors(&self) -> Vec<String> {
        self.errors.lock().expect("no connection panics").clone()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    // A connection may be idle while others are tested.
    stream.set_read_timeout(Some(DEADLINE * 6))?;
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    let behind = loop {
        let count = stream.read(&mut chunk)?;
        bytes.extend_from_slice(&chunk[..count]);
        match proxy_protocol::decode(&bytes).map_err(io::Error::other)? {
            Decoded::Complete { len, .. } => break &bytes[len..],
            Decoded::Incomplete { .. } if count == 0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            Decoded::Incomplete { .. } => {}
        }
    };
    stream.write_all(behind)?;
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    stream.shutdown(std::net::Shutdown::Write)
}

/// How much may be done: what traffic waits for, so that it neither starves what it runs beside nor ever ends first.
#[derive(Clone, Default)]
pub struct Budget {
    shared: Arc<(Mutex<u64>, Condvar)>,
}

impl Budget {
    /// Without end.
    pub fn unlimited() -> Budget {
        let budget = Budget::default();
        budget.release(u64::MAX / 2);
        budget
    }

    /// So much more.
    pub fn release(&self, count: u64) {
        *self.shared.0.lock().expect("nobody panics under this lock") += count;
        self.shared.1.notify_all();
    }

    /// Waits for one to be left, or for the end.
    fn take(&self, stop: &AtomicBool) {
        let left = self.shared.0.lock().expect("nobody panics under this lock");
        let waits = |left: &mut u64| *left == 0 && !stop.load(Relaxed);
        let mut left = self.shared.1.wait_while(left, waits).expect("nobody panics under this lock");
        *left = left.saturating_sub(1);
    }
}

/// Threads that connect to echoes again and again.
pub struct Clients {
    shared: Arc<Shared>,
    budget: Budget,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    served: AtomicU64,
    refused: AtomicU64,
    failures: Mutex<Vec<String>>,
}

/// What becomes of a connection that is refused.
#[derive(Clone, Copy, PartialEq)]
pub enum Refused {
    /// It has failed like any other.
    IsFailure,
    /// Nobody promised to listen; once connected, it must be served.
    IsFine,
}

impl Clients {
    /// One thread for each address, which comes from an address of its own, so that ports last.
    pub fn start(addresses: &[SocketAddr], refused: Refused, budget: &Budget) -> Clients {
        let shared = Arc::new(Shared::default());
        let threads = addresses.iter().enumerate().map(|(index, address)| {
            let (shared, address, budget) = (shared.clone(), *address, budget.clone());
            std::thread::spawn(move || {
                while !shared.stop.load(Relaxed) {
                    budget.take(&shared.stop);
                    shared.connect_once(index, address, refused);
                }
            })
        });
        Clients { threads: threads.collect(), shared, budget: budget.clone() }
    }

    /// Connections served so far.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Relaxed)
    }

    /// Connections refused so far.
    pub fn refused(&self) -> u64 {
        self.shared.refused.load(Relaxed)
    }

    /// Waits until `count` more connections were served.
    #[track_caller]
    pub fn wait_for_more(&self, count: u64) {
        let wanted = self.served() + count;
        eventually("clients are served", || {
            let failures = self.shared.failures.lock().expect("no client panics");
            (self.served() >= wanted || !failures.is_empty()).then_some(())
        });
    }

    /// Ends the threads; how many connections were served. Fails if any was not.
    #[track_caller]
    pub fn stop(self) -> u64 {
        self.shared.stop.store(true, Relaxed);
        self.budget.release(1);
        for thread in self.threads {
            thread.join().expect("no client panics");
        }
        let failures = self.shared.failures.lock().expect("no client panics");
        let served = self.shared.served.load(Relaxed);
        assert!(failures.is_empty(), "{} of {served} connections failed: {failures:#?}", failures.len());
        served
    }
}

impl Shared {
    fn connect_once(&self, index: usize, address: SocketAddr, refused: Refused) {
        let seed = self.served.load(Relaxed) << 8 | index as u64;
        let outcome = match connect_from(loopback(index), address) {
            Err(_) if refused == Refused::IsFine => {
                self.refused.fetch_add(1, Relaxed);
                return;
            }
            Err(error) => Err(io::Error::new(error.kind(), format!("connect: {error}"))),
            Ok(stream) => exchange_and_close(stream, seed),
        };
        match outcome {
            Ok(()) => drop(self.served.fetch_add(1, Relaxed)),
            Err(error) => self.failures.lock().expect("no client panics").push(format!("{address}: {error}")),
        }
    }
}

/// A long connection to an echo that checks every byte, sending and receiving at once.
pub struct Transfer {
    stop: Arc<AtomicBool>,
    carried: Arc<AtomicU64>,
    budget: Budget,
    thread: JoinHandle<io::Result<u64>>,
}

impl Transfer {
    /// Connects and begins.
    #[track_caller]
    pub fn start(to: SocketAddr, seed: u64, budget: &Budget) -> Transfer {
        let stream = client::connect(to).expect("a transfer connects");
        let (stop, carried) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count, chunks) = (stop.clone(), carried.clone(), budget.clone());
        let thread = std::thread::spawn(move || transfer(stream, seed, &stopped, &count, &chunks));
        Transfer { stop, carried, budget: budget.clone(), thread }
    }

    /// Waits until so many chunks have come back.
    #[track_caller]
    pub fn wait_for_chunks(&self, count: u64) {
        let wanted = count * CHUNK_BYTES as u64;
        eventually("a transfer goes on", || {
            (self.carried.load(Relaxed) >= wanted || self.thread.is_finished()).then_some(())
        });
    }

    /// Lets it come to its regular end; how many bytes came back, all of them right.
    #[track_caller]
    pub fn finish(self) -> u64 {
        self.stop.store(true, Relaxed);
        self.budget.release(1);
        let bytes = self.thread.join().expect("no transfer panics");
        bytes.unwrap_or_else(|error| panic!("a transfer failed after {} bytes: {error}", self.carried.load(Relaxed)))
    }
}

/// Sends chunk after chunk while the previous one comes back.
fn transfer(
    mut stream: TcpStream,
    seed: u64,
    stop: &AtomicBool,
    carried: &AtomicU64,
    budget: &Budget,
) -> io::Result<u64> {
    let (mut sending, mut expecting) = (Pattern::starting_with(seed), Pattern::starting_with(seed));
    let (mut sent, mut expected, mut received) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut total = 0;
    let mut send = |stream: &mut TcpStream| {
        sending.fill(&mut sent);
        stream.write_all(&sent)
    };
    send(&mut stream)?;
    loop {
        budget.take(stop);
        let last = stop.load(Relaxed);
        if last {
            stream.shutdown(std::net::Shutdown::Write)?;
        } else {
            send(&mut stream)?;
        }
        stream.read_exact(&mut received)?;
        expecting.fill(&mut expected);
        if expected != received {
            return Err(io::Error::other(format!("wrong bytes between {total} and {}", total + CHUNK_BYTES as u64)));
        }
        total += CHUNK_BYTES as u64;
        carried.store(total, Relaxed);
        if last {
            return match stream.read(&mut received)? {
                0 => Ok(total),
                more => Err(io::Error::other(format!("{more} bytes too many"))),
            };
        }
    }
}
