//! Kernel pipes: bytes go from socket to socket without passing through the process. A few pipes for each worker, lent
//! to whoever moves bulk right now.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use rustix::pipe::{PipeFlags, SpliceFlags};

/// What a pipe is asked to hold.
const PIPE_BYTES: usize = 256 * 1024;
/// Below this a pipe costs more than it saves. Past the user's quota of pipe pages (`pipe-user-pages-soft`) the kernel
/// does not fail, it gives pipes of one page.
const PIPE_BYTES_MIN: usize = 64 * 1024;
/// After a failure no pipe is asked for during this time.
const SHORTAGE_REST: Duration = Duration::from_secs(1);

/// A pipe between two sockets, and how many bytes are in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    capacity: usize,
    held: usize,
    open: Rc<Cell<usize>>,
}

impl Pipe {
    /// Bytes taken in and not given out yet.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Takes from the socket what it has, at most what the pipe can hold; 0 is its end. Called while the pipe is empty,
    /// `WouldBlock` can only mean that the socket has nothing.
    pub(super) fn fill(&mut self, from: BorrowedFd<'_>) -> io::Result<usize> {
        let count = splice(from, self.write.as_fd(), self.capacity)?;
        self.held += count;
        Ok(count)
    }

    /// Gives to the socket what it takes.
    pub(super) fn drain(&mut self, to: BorrowedFd<'_>) -> io::Result<usize> {
        let count = splice(self.read.as_fd(), to, self.held)?;
        self.held -= count;
        Ok(count)
    }

    /// Takes the bytes out into memory: the way out when a socket refuses to be spliced to.
    pub fn take(&mut self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(self.held);
        while bytes.len() < self.held {
            if rustix::io::read(&self.read, rustix::buffer::spare_capacity(&mut bytes))? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        self.held = 0;
        Ok(bytes)
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.open.set(self.open.get() - 1);
    }
}

/// Is the pipe in trouble, or splicing itself, rather than the connection? Copying can do without either.
pub fn is_trouble(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let errno = Errno::from_io_error(error);
    matches!(errno, Some(Errno::INVAL | Errno::NOMEM | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM | Errno::BADF))
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, count: usize) -> io::Result<usize> {
    Ok(rustix::pipe::splice(from, None, to, None, count, SpliceFlags::NONBLOCK)?)
}

/// The pipes of one worker.
#[derive(Debug)]
pub struct Pipes {
    #[expect(clippy::vec_box, reason = "lent in its box: a direction without a pipe has a pointer's size for it")]
    free: Vec<Box<Pipe>>,
    open: Rc<Cell<usize>>,
    max: usize,
    not_before: Option<Instant>,
}

impl Pipes {
    /// At most `max` pipes are open at a time, lent ones included: two descriptors each.
    pub fn new(max: usize) -> Pipes {
        Pipes { free: Vec::new(), open: Rc::default(), max, not_before: None }
    }

    /// An empty pipe, or `None`: then bytes are copied.
    pub fn lend(&mut self) -> Option<Box<Pipe>> {
        if let Some(pipe) = self.free.pop() {
            return Some(pipe);
        }
        if self.open.get() >= self.max || self.not_before.is_some_and(|instant| Instant::now() < instant) {
            return None;
        }
        match self.create() {
            Ok(pipe) => {
                self.not_before = None;
                Some(Box::new(pipe))
            }
            Err(error) => {
                tracing::debug!(event = "pipe", reason = %error, "copying for a while");
                self.not_before = Some(Instant::now() + SHORTAGE_REST);
                None
            }
        }
    }

    /// Takes a pipe back; one with bytes in it is closed.
    pub fn give_back(&mut self, pipe: Box<Pipe>) {
        if pipe.held == 0 {
            self.free.push(pipe);
        }
    }

    fn create(&self) -> io::Result<Pipe> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        // Refused to users over their quota: the size that is there decides.
        let _ = rustix::pipe::fcntl_setpipe_size(&write, PIPE_BYTES);
        let capacity = rustix::pipe::fcntl_getpipe_size(&write)?;
        if capacity < PIPE_BYTES_MIN {
            return Err(io::Error::other(format!("a pipe of {capacity} bytes: over the quota pipe-user-pages-soft")));
        }
        self.open.set(self.open.get() + 1);
        Ok(Pipe { read, write, capacity, held: 0, open: Rc::clone(&self.open) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn lends_at_most_its_number_and_takes_empty_ones_back() {
        let mut pipes = Pipes::new(2);
        let (first, second) = (pipes.lend().unwrap(), pipes.lend().unwrap());
        assert!(first.capacity >= PIPE_BYTES_MIN);
        assert!(pipes.lend().is_none());
        let descriptor = format!("{:?}", first.read);
        pipes.give_back(first);
        assert_eq!(format!("{:?}", pipes.lend().unwrap().read), descriptor);
        drop(second);
        // Both were dropped by now: there is room for two again.
        assert!(pipes.lend().is_some());
    }

    #[test]
    fn one_with_bytes_in_it_is_closed() {
        let mut pipes = Pipes::new(1);
        let mut pipe = pipes.lend().unwrap();
        let (mut sender, receiver) = UnixStream::pair().unwrap();
        sender.write_all(b"left over").unwrap();
        assert_eq!(pipe.fill(receiver.as_fd()).unwrap(), 9);
        pipes.give_back(pipe);
        assert_eq!(pipes.open.get(), 0);
        assert!(pipes.free.is_empty());
        assert_eq!(pipes.lend().unwrap().held(), 0);
    }

    #[test]
    fn bytes_pass_in_order_or_can_be_taken_out() {
        let mut pipe = Pipes::new(1).lend().unwrap();
        let (mut sender, from) = UnixStream::pair().unwrap();
        let (to, mut receiver) = UnixStream::pair().unwrap();
        sender.write_all(b"through").unwrap();
        assert_eq!((pipe.fill(from.as_fd()).unwrap(), pipe.held()), (7, 7));
        assert_eq!((pipe.drain(to.as_fd()).unwrap(), pipe.held()), (7, 0));
        let mut read = [0; 7];
        receiver.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"through");
        sender.write_all(b"into memory").unwrap();
        pipe.fill(from.as_fd()).unwrap();
        assert_eq!((pipe.take().unwrap().as_slice(), pipe.held()), (&b"into memory"[..], 0));
        from.set_nonblocking(true).unwrap();
        assert_eq!(pipe.fill(from.as_fd()).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(sender);
        assert_eq!(pipe.fill(from.as_fd()).unwrap(), 0);
    }
}
