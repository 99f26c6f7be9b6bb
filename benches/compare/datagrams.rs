//! Datagrams: clients and backend on one thread, so that it is known how many are under way, and no queue overflows.

use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use preface::proxy_protocol::{Addresses, Command, Decoded, Transport, Version, decode};

use super::measure::{Gauge, Usage};
use super::wire::{CLIENT_IPS, Poller};

/// Bytes of each, without a header.
pub const SIZE: usize = 100;
/// Under way at once over all sessions: what the smallest queue of any candidate surely holds. The kernel's default holds
/// 256 of these when it was empty, but gives room back in quarters; with 256 under way nginx lost some.
const WINDOW: u64 = 192;
/// More are sent when no more than this are under way: the candidate always has something to do, and nobody waits for
/// single datagrams.
const REFILL_AT: u64 = WINDOW / 2;
/// How long nothing comes until what is under way counts as lost.
const LOST_AFTER: Duration = Duration::from_secs(2);
/// The same while a candidate starts.
const PROBE_MAX: Duration = Duration::from_millis(50);
/// Of what was sent, one in so many may be lost: with more, the figures are those of something else.
const LOSSES: u64 = 20;
const BACKEND: u64 = u64::MAX;
/// Which pass, which session, which datagram; the rest is filling.
const MARK_BYTES: usize = 16;
const FILLING: u8 = b'x';
const MESSAGE_BYTES_MAX: usize = 2048;

/// What becomes of a datagram at the backend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    /// It ends there.
    OneWay,
    /// It goes back to the client.
    Echo,
}

impl Kept {
    /// Datagrams that a session sends in a row before the next session has its turn: logs and media come in bursts,
    /// questions one by one.
    fn in_a_row(self) -> u64 {
        match self {
            Kept::OneWay => 4,
            Kept::Echo => 1,
        }
    }
}

/// What one run does.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Where clients send to.
    pub target: SocketAddr,
    /// Clients; each is a session.
    pub sessions: usize,
    /// One way or both.
    pub kept: Kept,
    /// The header that each datagram must have at the backend.
    pub header: Option<Version>,
}

/// What a run came to.
#[derive(Clone, Copy, Debug)]
pub struct Exchanged {
    /// What it used.
    pub usage: Usage,
    /// Datagrams that came to their end.
    pub arrived: u64,
    /// The others.
    pub lost: u64,
}

/// The clients and the backend.
pub struct Exchange {
    /// Where the backend receives.
    pub address: SocketAddr,
    backend: UdpSocket,
    clients: Vec<(UdpSocket, SocketAddr)>,
    poller: Poller,
    pass: u32,
    buffer: Vec<u8>,
}

/// How far a pass has come.
struct Progress {
    seen: Vec<bool>,
    sent: u64,
    arrived: u64,
    under_way: u64,
}

impl Progress {
    fn arrive(&mut self, number: u64) -> io::Result<()> {
        match self.seen.get_mut(number as usize) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(fault(format!("datagram {number} came twice"))),
        }
        self.arrived += 1;
        self.under_way = self.under_way.saturating_sub(1);
        Ok(())
    }
}

impl Exchange {
    /// A backend on a port that the kernel chooses, and no client yet.
    pub fn new() -> io::Result<Exchange> {
        let backend = bound(Ipv4Addr::LOCALHOST)?;
        let poller = Poller::new()?;
        poller.add(&backend, BACKEND, false)?;
        let (address, buffer) = (backend.local_addr()?, vec![0; MESSAGE_BYTES_MAX]);
        // Not the numbers of another harness that sends here by mistake.
        Ok(Exchange { address, backend, clients: vec![], poller, pass: std::process::id() << 8, buffer })
    }

    /// Sends one datagram, to see whether anyone is there. `TimedOut`: not yet.
    pub fn probe(&mut self, plan: &Plan) -> io::Result<()> {
        self.open(plan.sessions)?;
        self.pass(plan, 1, PROBE_MAX).map(drop)
    }

    /// So many datagrams over all sessions, which are there before it is measured.
    pub fn run(&mut self, plan: &Plan, count: u64, gauge: &Gauge) -> io::Result<Exchanged> {
        self.open(plan.sessions)?;
        self.pass(plan, plan.sessions as u64 * plan.kept.in_a_row(), LOST_AFTER)?;
        let meter = gauge.start()?;
        let arrived = self.pass(plan, count, LOST_AFTER)?;
        let (usage, lost) = (meter.stop()?, count - arrived);
        if lost * LOSSES > count {
            return Err(fault(format!("{lost} of {count} datagrams were lost")));
        }
        Ok(Exchanged { usage, arrived, lost })
    }

    /// They stay for all candidates and rows: sessions that are left behind would use up ports.
    fn open(&mut self, sessions: usize) -> io::Result<()> {
        for number in self.clients.len()..sessions {
            let socket = bound(Ipv4Addr::new(127, 0, 0, 2 + (number % CLIENT_IPS as usize) as u8))?;
            self.poller.add(&socket, number as u64, false)?;
            let address = socket.local_addr()?;
            self.clients.push((socket, address));
        }
        Ok(())
    }

    /// Keeps the window full until all have been sent, and answers with how many arrived.
    fn pass(&mut self, plan: &Plan, total: u64, patience: Duration) -> io::Result<u64> {
        self.pass = self.pass.wrapping_add(1);
        let mut progress = Progress { seen: vec![false; total as usize], sent: 0, arrived: 0, under_way: 0 };
        let mut tokens = Vec::new();
        while progress.sent < total || progress.under_way > 0 {
            let room = if progress.under_way <= REFILL_AT { WINDOW - progress.under_way } else { 0 };
            for _ in 0..room.min(total - progress.sent) {
                if !self.send(plan, progress.sent)? {
                    break;
                }
                progress.sent += 1;
                progress.under_way += 1;
            }
            self.poller.wait(patience, &mut tokens)?;
            if tokens.is_empty() {
                progress.under_way = 0;
                if progress.arrived == 0 {
                    return Err(io::Error::new(ErrorKind::TimedOut, "no datagram arrives"));
                }
            }
            for &token in &tokens {
                match token {
                    BACKEND => self.serve(plan, &mut progress)?,
                    client => self.collect(client as usize, plan, &mut progress)?,
                }
            }
        }
        Ok(progress.arrived)
    }

    /// `false`: no room now.
    fn send(&self, plan: &Plan, number: u64) -> io::Result<bool> {
        let session = (number / plan.kept.in_a_row()) as usize % plan.sessions;
        let mut datagram = [FILLING; SIZE];
        datagram[..4].copy_from_slice(&self.pass.to_be_bytes());
        datagram[4..8].copy_from_slice(&(session as u32).to_be_bytes());
        datagram[8..MARK_BYTES].copy_from_slice(&number.to_be_bytes());
        Ok(now(self.clients[session].0.send_to(&datagram, plan.target))?.is_some())
    }

    /// What is there for the backend.
    fn serve(&mut self, plan: &Plan, progress: &mut Progress) -> io::Result<()> {
        for _ in 0..WINDOW {
            let Some((length, peer)) = now(self.backend.recv_from(&mut self.buffer))? else { break };
            let message = &self.buffer[..length];
            let (client, payload) = match plan.header {
                Some(version) => {
                    let (client, length) = header(message, version, plan.target)?;
                    (Some(client), &message[length..])
                }
                None => (None, message),
            };
            let Some((session, number)) = self.read(payload)? else { continue };
            if let Some(client) = client
                && self.clients.get(session).is_none_or(|(_, address)| *address != client)
            {
                return Err(fault(format!("the header names {client}, which did not send this")));
            }
            match plan.kept {
                Kept::OneWay => progress.arrive(number)?,
                Kept::Echo => drop(now(self.backend.send_to(payload, peer))?),
            }
        }
        Ok(())
    }

    /// What is there for a client.
    fn collect(&mut self, client: usize, plan: &Plan, progress: &mut Progress) -> io::Result<()> {
        for _ in 0..WINDOW {
            let Some((length, from)) = now(self.clients[client].0.recv_from(&mut self.buffer))? else { break };
            let Some((session, number)) = self.read(&self.buffer[..length])? else { continue };
            if (session, from) != (client, plan.target) {
                return Err(fault(format!("a reply to session {session} came to {client}, from {from}")));
            }
            progress.arrive(number)?;
        }
        Ok(())
    }

    /// Session and number; `None`: it belongs to an earlier pass.
    fn read(&self, payload: &[u8]) -> io::Result<Option<(usize, u64)>> {
        let whole = payload.len() == SIZE && payload[MARK_BYTES..].iter().all(|byte| *byte == FILLING);
        let (Some((pass, rest)), true) = (payload.split_first_chunk::<4>(), whole) else {
            return Err(fault(format!("{} bytes that are not the {SIZE} that were sent", payload.len())));
        };
        let (Some((session, rest)), true) = (rest.split_first_chunk::<4>(), *pass == self.pass.to_be_bytes()) else {
            return Ok(None);
        };
        let number = rest.first_chunk().map_or(0, |number| u64::from_be_bytes(*number));
        Ok(Some((u32::from_be_bytes(*session) as usize, number)))
    }
}

/// Whom the header names, and its length.
fn header(message: &[u8], version: Version, target: SocketAddr) -> io::Result<(SocketAddr, usize)> {
    let (header, length) = match decode(message) {
        Ok(Decoded::Complete { header, len }) => (header, len),
        Ok(Decoded::Incomplete { .. }) => return Err(fault("no valid header: it is cut off".to_owned())),
        Err(error) => return Err(fault(format!("no valid header: {error}"))),
    };
    let dgram = matches!(header.addresses, Addresses::Inet { transport: Transport::Dgram, .. });
    if header.version != version || header.command != Command::Proxy || !dgram {
        return Err(fault(format!("the header is not {} for a datagram: {header:?}", version.as_str())));
    }
    match header.addresses.ends() {
        Some((client, destination)) if destination == target => Ok((client, length)),
        ends => Err(fault(format!("the header names {ends:?}, and the client sent to {target}"))),
    }
}

fn bound(address: Ipv4Addr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((address, 0))?;
    socket.set_nonblocking(true)?;
    // As much as the machine allows: what is lost is to be the candidate's loss.
    socket2::SockRef::from(&socket).set_recv_buffer_size(4 << 20)?;
    Ok(socket)
}

/// `None`: nothing there, or no room.
fn now<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

fn fault(text: String) -> io::Error {
    io::Error::other(text)
}
