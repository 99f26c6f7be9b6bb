//! UDP sockets in a worker's event loop: a bound one, and thousands of connected ones behind a single descriptor.
//!
//! A task or a registration with the runtime for each session would cost several hundred bytes and a wake-up of its
//! own; here a session costs its kernel socket, and one wake-up tells of all that are ready.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::task::{Context, Poll, ready};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use socket2::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::{BATCH_MAX, Batch};

/// A bound socket.
#[derive(Debug)]
pub struct Bound {
    socket: AsyncFd<Socket>,
}

impl Bound {
    /// Registers with the current runtime.
    pub fn new(socket: Socket) -> io::Result<Bound> {
        // SAFETY: a Socket refers to the same open descriptor until it is dropped, which AsyncFd does last.
        Ok(Bound { socket: unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? } })
    }

    /// Another descriptor of the same socket.
    pub fn lend(&self) -> io::Result<Socket> {
        self.socket.get_ref().try_clone()
    }

    /// Receives a batch. One that is not full means that the socket is empty now.
    pub fn poll_receive(&self, cx: &mut Context<'_>, batch: &mut Batch) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            batch.clear();
            match batch.receive(self.socket.get_ref(), BATCH_MAX) {
                Ok(count) => {
                    if count < BATCH_MAX {
                        guard.clear_ready();
                    }
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => guard.clear_ready(),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsFd for Bound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.get_ref().as_fd()
    }
}

/// Sockets reported at once.
pub const READY_MAX: usize = 64;

/// A set of sockets in a worker's event loop.
#[derive(Debug)]
pub struct Sockets {
    epoll: AsyncFd<OwnedFd>,
}

/// Those that are ready, by the number that each was added with.
pub type Ready = Vec<Event>;

impl Sockets {
    /// An empty set, in the current runtime.
    pub fn new() -> io::Result<Sockets> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        // SAFETY: an OwnedFd refers to the same open descriptor until it is dropped, which AsyncFd does last.
        Ok(Sockets { epoll: unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE)? } })
    }

    /// Adds a socket, until it is closed. Reported while it has datagrams or an error.
    pub fn add(&self, socket: &impl AsFd, number: u64) -> io::Result<()> {
        Ok(epoll::add(self.epoll.get_ref(), socket, EventData::new_u64(number), EventFlags::IN)?)
    }

    /// Ready ones, into `ready`; pending when there is none.
    pub fn poll_ready(&self, cx: &mut Context<'_>, ready: &mut Ready) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.epoll.poll_read_ready(cx))?;
            ready.clear();
            match epoll::wait(self.epoll.get_ref(), rustix::buffer::spare_capacity(ready), Some(&NOW)) {
                Ok(0) => guard.clear_ready(),
                Ok(_) => return Poll::Ready(Ok(())),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }
}

const NOW: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
