//! The server behind all candidates: one thread that checks the header of every connection and then does what the
//! client asks for.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use preface::proxy_protocol::{Decoded, Header, Version, decode};
use rustix::net::SocketFlags;

use super::wire::{self, AddressBook, CHUNK_BYTES, Poller, REQUEST_BYTES, Request};

const LISTENER: u64 = u64::MAX;
/// How long it takes to see an order when there is no traffic.
const TURN_MAX: Duration = Duration::from_millis(50);
/// Faults that are kept; one is enough to fail a run.
const FAULTS_MAX: usize = 10;

/// What the generator sees of the backend.
pub struct Backend {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<io::Result<()>>>,
}

struct Shared {
    book: Arc<AddressBook>,
    /// 0: no header (the direct run), 1: v1, 2: v2.
    version: AtomicUsize,
    /// The port that clients connect to: what headers must name as the destination.
    port: AtomicUsize,
    served: AtomicU64,
    faults: Mutex<Vec<String>>,
    open: AtomicUsize,
    hang_up: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    fn fault(&self, text: String) {
        let mut faults = self.faults.lock().unwrap_or_else(PoisonError::into_inner);
        if faults.len() < FAULTS_MAX {
            faults.push(text);
        }
    }

    /// What is wrong with this header, if anything.
    fn complaint(&self, header: &Header) -> Option<String> {
        let expected = if self.version.load(Ordering::Acquire) == 1 { Version::V1 } else { Version::V2 };
        if header.version != expected {
            return Some(format!("the header is {}, not {}", header.version.as_str(), expected.as_str()));
        }
        let Some((source, destination)) = header.addresses.ends() else {
            return Some("the header names no addresses".to_owned());
        };
        if usize::from(destination.port()) != self.port.load(Ordering::Acquire) {
            return Some(format!(
                "the header names {destination} as the destination, which the client did not connect to"
            ));
        }
        (!self.book.take(source)).then(|| format!("the header names {source}, which no client used just now"))
    }
}

impl Backend {
    /// Starts it on these processors.
    pub fn start(book: Arc<AddressBook>, cpus: Vec<usize>) -> io::Result<Backend> {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
        socket.set_tcp_nodelay(true)?;
        socket.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into())?;
        socket.listen(16_384)?;
        socket.set_nonblocking(true)?;
        let listener = TcpListener::from(socket);
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            book,
            version: AtomicUsize::new(2),
            port: AtomicUsize::new(0),
            served: AtomicU64::new(0),
            faults: Mutex::default(),
            open: AtomicUsize::new(0),
            hang_up: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let server = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("backend".to_owned()).spawn(move || {
            super::measure::pin(&cpus);
            let outcome = Server::new(&server, listener).and_then(|mut backend| backend.run());
            if let Err(error) = &outcome {
                server.fault(format!("the backend ended: {error}"));
            }
            outcome
        })?;
        Ok(Backend { address, shared, thread: Some(thread) })
    }

    /// From now on every connection must have this header, with this port as its destination.
    pub fn expect(&self, version: Option<Version>, port: u16) {
        let number = version.map_or(0, |version| version as usize + 1);
        self.shared.version.store(number, Ordering::Release);
        self.shared.port.store(usize::from(port), Ordering::Release);
        self.faults();
    }

    /// Connections whose header was right, since the start.
    pub fn served(&self) -> u64 {
        self.shared.served.load(Ordering::Acquire)
    }

    /// Closes every connection, and waits until it is done. The backend goes first, so that it is not the candidate's
    /// ports that stay in TIME_WAIT.
    pub fn hang_up(&self) {
        self.shared.hang_up.store(true, Ordering::Release);
        let end = Instant::now() + wire::STALL_MAX;
        while self.shared.open.load(Ordering::Acquire) > 0 && Instant::now() < end {
            // SLEEP: only polling can show it, and nothing is being measured.
            std::thread::sleep(Duration::from_millis(2));
        }
        self.shared.hang_up.store(false, Ordering::Release);
    }

    /// What was wrong since the last call.
    pub fn faults(&self) -> Vec<String> {
        std::mem::take(&mut *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// How far a connection has come.
enum State {
    /// Header and request are still to come; what there is of them.
    Opening(Vec<u8>),
    Echo,
    Sink(u64),
    /// Waits for the client's word.
    Armed(u64),
    Source(u64),
}

struct Connection {
    fd: OwnedFd,
    state: State,
    /// An echo that did not fit.
    rest: Vec<u8>,
}

/// What is to become of a connection.
#[derive(PartialEq, Eq)]
enum Next {
    Keep,
    Close,
}

struct Server<'a> {
    shared: &'a Shared,
    listener: TcpListener,
    poller: Poller,
    connections: Vec<Option<Connection>>,
    free: Vec<usize>,
    buffer: Vec<u8>,
}

impl<'a> Server<'a> {
    fn new(shared: &'a Shared, listener: TcpListener) -> io::Result<Server<'a>> {
        let poller = Poller::new()?;
        poller.add(&listener, LISTENER, false)?;
        Ok(Server { shared, listener, poller, connections: vec![], free: vec![], buffer: vec![b'x'; CHUNK_BYTES] })
    }

    fn run(&mut self) -> io::Result<()> {
        let mut tokens = Vec::new();
        while !self.shared.stop.load(Ordering::Acquire) {
            self.poller.wait(TURN_MAX, &mut tokens)?;
            for &token in &tokens {
                if token == LISTENER {
                    self.accept()?;
                    continue;
                }
                let index = token as usize;
                // A closed one may be told of once more: a candidate that is being started has all descriptors for a moment.
                let Some(connection) = self.connections.get_mut(index).and_then(Option::as_mut) else { continue };
                // An error is the other side's reset: the generator says what it missed.
                let next = serve(self.shared, &self.poller, connection, token, &mut self.buffer);
                if next.unwrap_or(Next::Close) == Next::Close {
                    self.connections[index] = None;
                    self.free.push(index);
                }
            }
            if self.shared.hang_up.load(Ordering::Acquire) {
                self.connections.clear();
                self.free.clear();
            }
            self.shared.open.store(self.connections.len() - self.free.len(), Ordering::Release);
        }
        Ok(())
    }

    fn accept(&mut self) -> io::Result<()> {
        loop {
            let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
            let fd = match rustix::net::accept_with(&self.listener, flags) {
                Ok(fd) => fd,
                Err(rustix::io::Errno::AGAIN) => return Ok(()),
                Err(rustix::io::Errno::CONNABORTED | rustix::io::Errno::INTR) => continue,
                Err(error @ (rustix::io::Errno::MFILE | rustix::io::Errno::NFILE)) => {
                    // This run fails; those after it are none the worse.
                    self.shared.fault(format!("the backend cannot accept: {error}"));
                    return Ok(());
                }
                Err(error) => return Err(error.into()),
            };
            let index = self.free.pop().unwrap_or_else(|| {
                self.connections.push(None);
                self.connections.len() - 1
            });
            self.poller.add(&fd, index as u64, false)?;
            self.connections[index] = Some(Connection { fd, state: State::Opening(vec![]), rest: vec![] });
        }
    }
}

fn serve(
    shared: &Shared,
    poller: &Poller,
    connection: &mut Connection,
    token: u64,
    buffer: &mut [u8],
) -> io::Result<Next> {
    match &mut connection.state {
        State::Opening(_) => open(shared, connection, buffer),
        State::Echo if !connection.rest.is_empty() => {
            let count = wire::send(&connection.fd, &connection.rest)?;
            connection.rest.drain(..count);
            if connection.rest.is_empty() {
                poller.change(&connection.fd, token, false)?;
            }
            Ok(Next::Keep)
        }
        State::Echo => {
            let Some(count) = wire::receive(&connection.fd, buffer)? else { return Ok(Next::Keep) };
            if count == 0 {
                return Ok(Next::Close);
            }
            let sent = wire::send(&connection.fd, &buffer[..count])?;
            if sent < count {
                connection.rest.extend_from_slice(&buffer[sent..count]);
                poller.change(&connection.fd, token, true)?;
            }
            Ok(Next::Keep)
        }
        State::Sink(left) => {
            let Some(count) = wire::discard(&connection.fd, buffer)? else { return Ok(Next::Keep) };
            if count == 0 {
                return Ok(Next::Close);
            }
            *left = left.saturating_sub(count as u64);
            if *left == 0 {
                wire::send(&connection.fd, b"!")?;
                connection.state = State::Echo;
            }
            Ok(Next::Keep)
        }
        State::Armed(count) => {
            let count = *count;
            if wire::receive(&connection.fd, &mut buffer[..1])? != Some(1) {
                return Ok(Next::Close);
            }
            connection.state = State::Source(count);
            poller.change(&connection.fd, token, true)?;
            Ok(Next::Keep)
        }
        State::Source(left) => {
            let chunk = CHUNK_BYTES.min(usize::try_from(*left).unwrap_or(CHUNK_BYTES));
            *left -= wire::send(&connection.fd, &buffer[..chunk])? as u64;
            if *left == 0 {
                connection.state = State::Echo;
                poller.change(&connection.fd, token, false)?;
            }
            Ok(Next::Keep)
        }
    }
}

/// Header and request; answers the request.
fn open(shared: &Shared, connection: &mut Connection, buffer: &mut [u8]) -> io::Result<Next> {
    let State::Opening(seen) = &mut connection.state else { return Ok(Next::Keep) };
    let Some(count) = wire::receive(&connection.fd, buffer)? else { return Ok(Next::Keep) };
    if count == 0 {
        return Ok(Next::Close);
    }
    seen.extend_from_slice(&buffer[..count]);
    let expects_header = shared.version.load(Ordering::Acquire) != 0;
    let header = if expects_header {
        match decode(seen) {
            Ok(Decoded::Incomplete { .. }) => return Ok(Next::Keep),
            Ok(Decoded::Complete { header, len }) => Some((header, len)),
            Err(error) => {
                shared.fault(format!("no valid header: {error}"));
                return Ok(Next::Close);
            }
        }
    } else {
        None
    };
    let start = header.as_ref().map_or(0, |(_, len)| *len);
    let Some(request) = seen[start..].first_chunk() else { return Ok(Next::Keep) };
    if seen.len() != start + REQUEST_BYTES {
        shared.fault(format!("{} bytes where a request of {REQUEST_BYTES} was due", seen.len() - start));
        return Ok(Next::Close);
    }
    if let Some(complaint) = header.and_then(|(header, _)| shared.complaint(&header)) {
        shared.fault(complaint);
        return Ok(Next::Close);
    }
    let Some(decoded) = Request::decode(request) else {
        shared.fault(format!("no request: {:02x?}", &request[..9]));
        return Ok(Next::Close);
    };
    shared.served.fetch_add(1, Ordering::AcqRel);
    wire::send(&connection.fd, request)?;
    connection.state = match decoded {
        Request::Echo => State::Echo,
        Request::Sink(count) => State::Sink(count),
        Request::Source(count) => State::Armed(count),
        Request::Short => return Ok(Next::Close),
    };
    Ok(Next::Keep)
}
