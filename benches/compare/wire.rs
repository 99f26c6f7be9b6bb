//! What generator and backend have in common: the request that opens every connection, the book of client addresses,
//! and the few non-blocking calls.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

/// The first bytes of every connection, and the length of every acknowledgement.
pub const REQUEST_BYTES: usize = 64;
/// What one call reads or writes at most.
pub const CHUNK_BYTES: usize = 256 * 1024;
/// Nothing moved for this long: the run has failed.
pub const STALL_MAX: Duration = Duration::from_secs(10);

/// What the client asks of the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The request comes back, then everything else, too.
    Echo,
    /// The request comes back; so many bytes are read, then one byte comes back.
    Sink(u64),
    /// The request comes back; after one more byte of the client so many bytes follow.
    Source(u64),
    /// The request comes back, and the backend closes.
    Short,
}

impl Request {
    /// As sent.
    pub fn encode(self) -> [u8; REQUEST_BYTES] {
        let (kind, count) = match self {
            Request::Echo => (b'E', 0),
            Request::Sink(count) => (b'U', count),
            Request::Source(count) => (b'D', count),
            Request::Short => (b'S', 0),
        };
        let mut bytes = [b'.'; REQUEST_BYTES];
        bytes[0] = kind;
        bytes[1..9].copy_from_slice(&count.to_be_bytes());
        bytes
    }

    /// As received; `None` if these bytes are no request.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Request> {
        let mut count = [0; 8];
        count.copy_from_slice(&bytes[1..9]);
        let count = u64::from_be_bytes(count);
        match bytes[0] {
            b'E' => Some(Request::Echo),
            b'U' => Some(Request::Sink(count)),
            b'D' => Some(Request::Source(count)),
            b'S' => Some(Request::Short),
            _ => None,
        }
    }
}

/// Clients come from 127.0.0.2 to 127.0.0.17, and from these ports.
pub const CLIENT_IPS: u8 = 16;
const CLIENT_IP_FIRST: u8 = 2;
const PORT_FIRST: u16 = 33_000;
const PORTS: usize = 32_000;

/// Which addresses clients use now and no header has named yet: a header that isn't exactly one client's is found out.
pub struct AddressBook {
    bits: Vec<AtomicU64>,
}

impl Default for AddressBook {
    fn default() -> AddressBook {
        AddressBook { bits: (0..(CLIENT_IPS as usize * PORTS).div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }
}

impl AddressBook {
    /// The address with this number; numbers go round.
    pub fn address(number: usize) -> SocketAddr {
        let ip = CLIENT_IP_FIRST + (number % CLIENT_IPS as usize) as u8;
        let port = PORT_FIRST + (number / CLIENT_IPS as usize % PORTS) as u16;
        SocketAddr::from(([127, 0, 0, ip], port))
    }

    fn place(address: SocketAddr) -> Option<(usize, u64)> {
        let SocketAddr::V4(address) = address else { return None };
        let [127, 0, 0, last] = address.ip().octets() else { return None };
        let ip = usize::from(last.checked_sub(CLIENT_IP_FIRST)?);
        let port = usize::from(address.port().checked_sub(PORT_FIRST)?);
        let index = port * CLIENT_IPS as usize + ip;
        (ip < CLIENT_IPS as usize && port < PORTS).then_some((index / 64, 1 << (index % 64)))
    }

    /// A client is about to connect from here.
    pub fn enter(&self, address: SocketAddr) {
        if let Some((word, bit)) = Self::place(address) {
            self.bits[word].fetch_or(bit, Ordering::AcqRel);
        }
    }

    /// A header has named it. Was it a client's, and is this the first header that says so?
    pub fn take(&self, address: SocketAddr) -> bool {
        Self::place(address).is_some_and(|(word, bit)| self.bits[word].fetch_and(!bit, Ordering::AcqRel) & bit != 0)
    }
}

/// Reads once; `None`: nothing there now.
pub fn receive(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    receive_with(socket, buffer, RecvFlags::DONTWAIT)
}

/// Reads once and throws it away in the kernel: no copy that would make the generator the limit.
pub fn discard(socket: &impl AsFd, buffer: &mut [u8]) -> io::Result<Option<usize>> {
    receive_with(socket, buffer, RecvFlags::DONTWAIT | RecvFlags::TRUNC)
}

fn receive_with(socket: &impl AsFd, buffer: &mut [u8], flags: RecvFlags) -> io::Result<Option<usize>> {
    match rustix::net::recv(socket, buffer, flags) {
        Ok((_, count)) => Ok(Some(count)),
        Err(Errno::AGAIN | Errno::INTR) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes once; 0: no room now.
pub fn send(socket: &impl AsFd, bytes: &[u8]) -> io::Result<usize> {
    match rustix::net::send(socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
        Ok(count) => Ok(count),
        Err(Errno::AGAIN | Errno::INTR) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// What a thread waits on. Level-triggered.
pub struct Poller {
    epoll: OwnedFd,
    events: Vec<epoll::Event>,
}

impl Poller {
    /// An empty one.
    pub fn new() -> io::Result<Poller> {
        Ok(Poller { epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?, events: Vec::with_capacity(256) })
    }

    /// Watches a socket until it is closed.
    pub fn add(&self, socket: &impl AsFd, token: u64, write: bool) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, socket, epoll::EventData::new_u64(token), flags(write))?)
    }

    /// Watches for the other direction.
    pub fn change(&self, socket: &impl AsFd, token: u64, write: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.epoll, socket, epoll::EventData::new_u64(token), flags(write))?)
    }

    /// Waits and returns the tokens of what is ready; none: it took too long.
    pub fn wait(&mut self, timeout: Duration, tokens: &mut Vec<u64>) -> io::Result<()> {
        let timeout = Timespec { tv_sec: timeout.as_secs() as _, tv_nsec: timeout.subsec_nanos() as _ };
        self.events.clear();
        tokens.clear();
        match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut self.events), Some(&timeout)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        tokens.extend(self.events.iter().map(|event| event.data.u64()));
        Ok(())
    }
}

fn flags(write: bool) -> epoll::EventFlags {
    if write { epoll::EventFlags::OUT } else { epoll::EventFlags::IN }
}
