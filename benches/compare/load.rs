//! The load generator: one thread, a fixed amount of work a run, every connection from an address of its own.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::measure::{Gauge, Usage};
use super::wire::{self, AddressBook, CHUNK_BYTES, Poller, REQUEST_BYTES, Request, STALL_MAX};

/// Addresses that are tried for one connection: those of earlier ones may still be in TIME_WAIT.
const BINDS_MAX: usize = 4096;

/// Something to be done at a moment of a run.
pub type Order<'a> = (Duration, Box<dyn FnMut() -> io::Result<()> + 'a>);

/// Nanoseconds.
pub type Latencies = Vec<u64>;

/// Which way the bytes of a bulk run go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Client to upstream.
    Up,
    /// Upstream to client.
    Down,
}

/// Makes connections to one target at a time.
pub struct Generator {
    book: Arc<AddressBook>,
    next: usize,
    buffer: Vec<u8>,
}

/// One client.
pub struct Client {
    fd: OwnedFd,
}

impl Generator {
    /// Its clients are entered into this book.
    pub fn new(book: Arc<AddressBook>) -> Generator {
        // Not always the same addresses: those of a run just before may still be in TIME_WAIT.
        let next = std::process::id() as usize * 7919;
        Generator { book, next, buffer: vec![b'x'; CHUNK_BYTES] }
    }

    fn bound(&mut self) -> io::Result<Socket> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
        socket.set_tcp_nodelay(true)?;
        for _ in 0..BINDS_MAX {
            let address = AddressBook::address(self.next);
            self.next = self.next.wrapping_add(1);
            match socket.bind(&address.into()) {
                Ok(()) => {
                    self.book.enter(address);
                    return Ok(socket);
                }
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other("no free client address"))
    }

    /// Opens connections one after the other; each has its request acknowledged.
    pub fn open(&mut self, target: SocketAddr, count: usize, request: Request) -> io::Result<Vec<Client>> {
        let mut clients = Vec::with_capacity(count);
        for _ in 0..count {
            let socket = self.bound()?;
            socket.connect_timeout(&target.into(), STALL_MAX)?;
            socket.set_read_timeout(Some(STALL_MAX))?;
            wire::send(&socket, &request.encode())?;
            let mut answer = [0; REQUEST_BYTES];
            let mut stream = std::net::TcpStream::from(socket);
            io::Read::read_exact(&mut stream, &mut answer).map_err(|error| match error.kind() {
                io::ErrorKind::WouldBlock => io::Error::other(format!("no answer for {} s", STALL_MAX.as_secs())),
                _ => error,
            })?;
            if answer != request.encode() {
                return Err(io::Error::other("the request did not come back as it was"));
            }
            clients.push(Client { fd: OwnedFd::from(stream) });
        }
        Ok(clients)
    }

    /// So many bytes over all connections together.
    pub fn bulk(
        &mut self,
        target: SocketAddr,
        connections: usize,
        way: Way,
        bytes: u64,
        gauge: &Gauge,
    ) -> io::Result<Usage> {
        let each = bytes / connections as u64;
        let request = if way == Way::Up { Request::Sink(each) } else { Request::Source(each) };
        let clients = self.open(target, connections, request)?;
        let mut poller = Poller::new()?;
        let mut left = vec![each; connections];
        for (token, client) in clients.iter().enumerate() {
            poller.add(&client.fd, token as u64, way == Way::Up)?;
        }
        let meter = gauge.start()?;
        if way == Way::Down {
            clients.iter().try_for_each(|client| wire::send(&client.fd, b"!").map(drop))?;
        }
        let (mut open, mut tokens) = (connections, Vec::new());
        while open > 0 {
            wait(&mut poller, &mut tokens)?;
            for &token in &tokens {
                let (fd, left) = (&clients[token as usize].fd, &mut left[token as usize]);
                if way == Way::Up && *left > 0 {
                    let chunk = CHUNK_BYTES.min(usize::try_from(*left).unwrap_or(CHUNK_BYTES));
                    *left -= wire::send(fd, &self.buffer[..chunk])? as u64;
                    if *left == 0 {
                        poller.change(fd, token, false)?;
                    }
                    continue;
                }
                match wire::discard(fd, &mut self.buffer)? {
                    None => continue,
                    Some(0) => return Err(ended_early()),
                    Some(count) if way == Way::Down => *left = left.saturating_sub(count as u64),
                    Some(_) => {}
                }
                open -= usize::from(*left == 0);
            }
        }
        meter.stop()
    }

    /// So many messages there and back over all connections together, one at a time on each.
    pub fn ping_pong(
        &mut self,
        target: SocketAddr,
        connections: usize,
        size: usize,
        round_trips: u64,
        gauge: &Gauge,
    ) -> io::Result<(Usage, Latencies)> {
        let clients = self.open(target, connections, Request::Echo)?;
        let mut poller = Poller::new()?;
        let mut latencies = Vec::with_capacity(round_trips as usize);
        let each = (round_trips / connections as u64).max(1);
        // Round trips left, bytes of the present one received, when it was sent.
        let mut turns = vec![(each, 0, Instant::now()); connections];
        let message = vec![b'x'; size];
        let meter = gauge.start()?;
        for (token, (client, turn)) in clients.iter().zip(&mut turns).enumerate() {
            poller.add(&client.fd, token as u64, false)?;
            turn.2 = Instant::now();
            wire::send(&client.fd, &message)?;
        }
        let (mut open, mut tokens) = (connections, Vec::new());
        while open > 0 {
            wait(&mut poller, &mut tokens)?;
            for &token in &tokens {
                let (fd, turn) = (&clients[token as usize].fd, &mut turns[token as usize]);
                match wire::receive(fd, &mut self.buffer)? {
                    None => continue,
                    Some(0) => return Err(ended_early()),
                    Some(count) => turn.1 += count,
                }
                if turn.1 < size {
                    continue;
                }
                let now = Instant::now();
                latencies.push((now - turn.2).as_nanos() as u64);
                *turn = (turn.0 - 1, 0, now);
                if turn.0 == 0 {
                    open -= 1;
                } else if wire::send(fd, &message)? != size {
                    return Err(io::Error::other("a message did not fit into an empty socket"));
                }
            }
        }
        Ok((meter.stop()?, latencies))
    }

    /// So many connections, some at a time: each asks, is answered, and is closed by the backend.
    pub fn short(
        &mut self,
        target: SocketAddr,
        at_a_time: usize,
        count: u64,
        gauge: &Gauge,
    ) -> io::Result<(Usage, Latencies)> {
        let mut attempts = Attempts::new(target)?;
        let mut latencies = Vec::with_capacity(count as usize);
        let (mut begun, mut tokens) = (0, Vec::new());
        let meter = gauge.start()?;
        while begun < count.min(at_a_time as u64) {
            attempts.begin(self)?;
            begun += 1;
        }
        while latencies.len() < count as usize {
            wait(&mut attempts.poller, &mut tokens)?;
            for &token in &tokens {
                let Some(ended) = attempts.advance(token as usize, &mut self.buffer) else { continue };
                latencies.push(ended.outcome?.as_nanos() as u64);
                if begun < count {
                    attempts.begin(self)?;
                    begun += 1;
                }
            }
        }
        Ok((meter.stop()?, latencies))
    }

    /// New connections at a steady rate whatever becomes of them, and what is to be done at its moment between them.
    pub fn steady(
        &mut self,
        target: SocketAddr,
        per_second: u32,
        duration: Duration,
        mut orders: Vec<Order<'_>>,
    ) -> io::Result<Vec<Ended>> {
        let mut attempts = Attempts::new(target)?;
        let (mut done, mut tokens) = (Vec::new(), Vec::new());
        let between = Duration::from_secs(1) / per_second;
        let start = Instant::now();
        attempts.epoch = start;
        let mut due = Duration::ZERO;
        while due < duration || attempts.open > 0 {
            let now = start.elapsed();
            if now > duration + ATTEMPT_MAX {
                break;
            }
            while orders.first().is_some_and(|(at, _)| *at <= now) {
                orders.remove(0).1()?;
            }
            while due < duration && due <= now {
                if let Err(error) = attempts.begin(self) {
                    done.push(Ended { begun: now, outcome: Err(error) });
                }
                due += between;
            }
            let patience = if due < duration { due.saturating_sub(start.elapsed()) } else { between };
            attempts.poller.wait(patience, &mut tokens)?;
            done.extend(tokens.iter().filter_map(|&token| attempts.advance(token as usize, &mut self.buffer)));
        }
        done.extend(attempts.given_up());
        Ok(done)
    }
}

/// A connection of `steady` that took longer has failed.
const ATTEMPT_MAX: Duration = Duration::from_secs(5);

fn wait(poller: &mut Poller, tokens: &mut Vec<u64>) -> io::Result<()> {
    poller.wait(STALL_MAX, tokens)?;
    if tokens.is_empty() {
        return Err(io::Error::other(format!("nothing moved for {} s", STALL_MAX.as_secs())));
    }
    Ok(())
}

fn ended_early() -> io::Error {
    io::Error::other("a connection ended before its work was done")
}

/// One short connection that is over.
pub struct Ended {
    /// Since the start of the run.
    pub begun: Duration,
    /// From connect to the first byte of the answer.
    pub outcome: io::Result<Duration>,
}

struct Attempt {
    fd: OwnedFd,
    begun: Instant,
    sent: bool,
    answered: Option<Duration>,
    received: usize,
}

/// Short connections under way.
struct Attempts {
    target: SocketAddr,
    poller: Poller,
    slots: Vec<Option<Attempt>>,
    free: Vec<usize>,
    open: usize,
    epoch: Instant,
}

impl Attempts {
    fn new(target: SocketAddr) -> io::Result<Attempts> {
        let (slots, free) = (Vec::new(), Vec::new());
        Ok(Attempts { target, poller: Poller::new()?, slots, free, open: 0, epoch: Instant::now() })
    }

    fn begin(&mut self, generator: &mut Generator) -> io::Result<()> {
        let socket = generator.bound()?;
        socket.set_nonblocking(true)?;
        let begun = Instant::now();
        // On loopback the handshake is most often over when the call returns.
        let sent = match socket.connect(&self.target.into()) {
            Ok(()) => wire::send(&socket, &Request::Short.encode())? > 0,
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => false,
            Err(error) => return Err(error),
        };
        let index = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        let fd = OwnedFd::from(socket);
        self.poller.add(&fd, index as u64, !sent)?;
        self.slots[index] = Some(Attempt { fd, begun, sent, answered: None, received: 0 });
        self.open += 1;
        Ok(())
    }

    /// Looks at what is ready; tells when the connection is over.
    fn advance(&mut self, index: usize, buffer: &mut [u8]) -> Option<Ended> {
        let attempt = self.slots[index].as_mut()?;
        let outcome = attempt.advance(&self.poller, index, buffer).transpose()?;
        let begun = attempt.begun.saturating_duration_since(self.epoch);
        self.slots[index] = None;
        self.free.push(index);
        self.open -= 1;
        Some(Ended { begun, outcome })
    }

    fn given_up(&mut self) -> Vec<Ended> {
        let left = std::mem::take(&mut self.slots).into_iter().flatten();
        let given_up = |attempt: Attempt| Ended {
            begun: attempt.begun.saturating_duration_since(self.epoch),
            outcome: Err(io::ErrorKind::TimedOut.into()),
        };
        left.map(given_up).collect()
    }
}

impl Attempt {
    fn advance(&mut self, poller: &Poller, index: usize, buffer: &mut [u8]) -> io::Result<Option<Duration>> {
        if !self.sent {
            wire::send(&self.fd, &Request::Short.encode())?;
            self.sent = true;
            poller.change(&self.fd, index as u64, false)?;
            return Ok(None);
        }
        match wire::receive(&self.fd, buffer)? {
            None => Ok(None),
            Some(0) if self.received == REQUEST_BYTES => Ok(self.answered),
            Some(0) => Err(ended_early()),
            Some(count) => {
                self.answered = self.answered.or_else(|| Some(self.begun.elapsed()));
                self.received += count;
                Ok(None)
            }
        }
    }
}
