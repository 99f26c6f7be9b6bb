//! A receiver inside the test: it decodes the header of each connection, remembers who came, and serves as told.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use preface::proxy_protocol::{self, Decoded, Header};
use rustix::net::Shutdown;

use super::DEADLINE;

/// One connection as the receiver saw it.
#[derive(Clone, Debug)]
pub struct Arrival {
    /// The other end of the connection: the balancer.
    pub peer: SocketAddr,
    /// The header as decoded; `None` where none is expected.
    pub header: Option<Header>,
    /// The header's bytes.
    pub raw: Vec<u8>,
    /// What came in the same read behind the header.
    pub behind: Vec<u8>,
}

impl Arrival {
    /// Does the header name a client? A health check's says LOCAL.
    pub fn is_client(&self) -> bool {
        self.header.as_ref().is_some_and(|header| header.addresses.ends().is_some())
    }

    /// The client that the header names.
    #[track_caller]
    pub fn client(&self) -> SocketAddr {
        let header = self.header.as_ref().expect("a receiver that expects a header");
        header.addresses.ends().expect("a header with addresses").0
    }
}

/// Listens on a port of its own until it is dropped; then its port refuses and its connections are gone.
pub struct Receiver {
    /// Where it listens.
    pub address: SocketAddr,
    listener: Arc<TcpListener>,
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    arrivals: Vec<Arrival>,
    errors: Vec<String>,
    open: Vec<TcpStream>,
}

/// What a receiver does with a connection whose header it has read.
pub type Serve = fn(TcpStream, &Arrival) -> io::Result<()>;

impl Receiver {
    /// Expects a header on each connection.
    pub fn with_header(serve: Serve) -> Receiver {
        Receiver::at("127.0.0.1:0", true, serve)
    }

    /// Expects none.
    pub fn plain(serve: Serve) -> Receiver {
        Receiver::at("127.0.0.1:0", false, serve)
    }

    /// Listens on a given address: to come back where an earlier one was.
    #[track_caller]
    pub fn at(address: &str, header: bool, serve: Serve) -> Receiver {
        let listener = Arc::new(TcpListener::bind(address).unwrap_or_else(|error| panic!("{address}: {error}")));
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared::default());
        let acceptor = {
            let (listener, shared) = (listener.clone(), shared.clone());
            std::thread::spawn(move || accept(&listener, &shared, header, serve))
        };
        Receiver { address, listener, shared, acceptor: Some(acceptor) }
    }

    /// Everyone so far.
    pub fn arrivals(&self) -> Vec<Arrival> {
        self.shared.state.lock().expect("no connection panics").arrivals.clone()
    }

    /// Headers that could not be read.
    pub fn errors(&self) -> Vec<String> {
        self.shared.state.lock().expect("no connection panics").errors.clone()
    }

    /// Waits until so many have come, and returns everyone.
    #[track_caller]
    pub fn wait_for(&self, count: usize) -> Vec<Arrival> {
        let state = self.shared.state.lock().expect("no connection panics");
        let waits = |state: &mut State| state.arrivals.len() < count;
        let (state, timeout) =
            self.shared.changed.wait_timeout_while(state, DEADLINE, waits).expect("no connection panics");
        let (seen, errors) = (state.arrivals.len(), &state.errors);
        assert!(!timeout.timed_out(), "waited {DEADLINE:?} for {count} connections, saw {seen}; errors: {errors:?}");
        state.arrivals.clone()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // On Linux this ends the listening at once and wakes the thread that accepts.
        let _ = rustix::net::shutdown(&self.listener, Shutdown::Both);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        if let Ok(state) = self.shared.state.lock() {
            for stream in &state.open {
                let _ = stream.shutdown(std::net::Shutdown::Both);
            }
        }
    }
}

fn accept(listener: &TcpListener, shared: &Arc<Shared>, header: bool, serve: Serve) {
    while let Ok((stream, peer)) = listener.accept() {
        let shared = shared.clone();
        std::thread::spawn(move || {
            if let Err(error) = receive(stream, peer, &shared, header, serve) {
                shared.state.lock().expect("no connection panics").errors.push(format!("{peer}: {error}"));
            }
        });
    }
}

fn receive(stream: TcpStream, peer: SocketAddr, shared: &Shared, header: bool, serve: Serve) -> io::Result<()> {
    stream.set_read_timeout(Some(DEADLINE))?;
    let arrival = if header {
        read_header(&stream, peer)?
    } else {
        Arrival { peer, header: None, raw: Vec::new(), behind: Vec::new() }
    };
    {
        let mut state = shared.state.lock().expect("no connection panics");
        state.arrivals.push(arrival.clone());
        state.open.push(stream.try_clone()?);
        shared.changed.notify_all();
    }
    serve(stream, &arrival)
}

/// Reads a whole header, however it is cut, and what came with it.
fn read_header(mut stream: &TcpStream, peer: SocketAddr) -> io::Result<Arrival> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let count = stream.read(&mut chunk)?;
        bytes.extend_from_slice(&chunk[..count]);
        let invalid = |why: String| io::Error::new(ErrorKind::InvalidData, why);
        match proxy_protocol::decode(&bytes).map_err(|error| invalid(format!("{error}: {bytes:02x?}")))? {
            Decoded::Complete { header, len } => {
                let behind = bytes.split_off(len);
                return Ok(Arrival { peer, header: Some(header), raw: bytes, behind });
            }
            Decoded::Incomplete { .. } if count == 0 => return Err(invalid(format!("cut short: {bytes:02x?}"))),
            Decoded::Incomplete { .. } => {}
        }
    }
}

/// Sends back what comes, to the end.
pub fn echo(mut stream: TcpStream, arrival: &Arrival) -> io::Result<()> {
    stream.write_all(&arrival.behind)?;
    io::copy(&mut stream.try_clone()?, &mut stream)?;
    stream.shutdown(std::net::Shutdown::Write)
}

/// Says who came (`client` by its header, or the peer) in one line before anything is asked, then ends.
pub fn say_who(mut stream: TcpStream, arrival: &Arrival) -> io::Result<()> {
    let who = if arrival.is_client() { arrival.client() } else { arrival.peer };
    writeln!(stream, "{who}")?;
    stream.shutdown(std::net::Shutdown::Write)?;
    io::copy(&mut stream, &mut io::sink()).map(drop)
}
