//! Descriptors from a process to the one that takes its place: messages and sockets over a UNIX stream.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use rustix::{cmsg_space, stdio};
use socket2::{Domain, SockRef};

/// Descriptors in one message of the kernel's; it takes 253.
const DESCRIPTORS_MAX: usize = 128;
/// Of one message of ours; the state of 100,000 upstreams is about 20 MiB.
const MESSAGE_BYTES_MAX: usize = 64 << 20;

/// One end of the stream between two processes.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

impl Channel {
    /// Our end, and the one that becomes the other process's standard input.
    pub fn pair() -> io::Result<(Channel, OwnedFd)> {
        let (ours, theirs) = UnixStream::pair()?;
        Ok((Channel { stream: ours }, theirs.into()))
    }

    /// The end that this process was started with; its standard input is empty from then on.
    pub fn of_standard_input() -> io::Result<Channel> {
        let input = io::stdin().as_fd().try_clone_to_owned()?;
        if SockRef::from(&input).domain()? != Domain::UNIX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "standard input is no UNIX socket"));
        }
        stdio::dup2_stdin(File::open("/dev/null")?)?;
        Ok(Channel { stream: input.into() })
    }

    /// How long each step may wait for the other side.
    pub fn set_timeout(&self, timeout: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(timeout))?;
        self.stream.set_write_timeout(Some(timeout))
    }

    /// Sends one message.
    pub fn send(&self, message: &[u8]) -> io::Result<()> {
        let length = u32::try_from(message.len()).map_err(io::Error::other)?;
        (&self.stream).write_all(&length.to_be_bytes())?;
        (&self.stream).write_all(message)
    }

    /// The next message. `UnexpectedEof`: the other side is gone; `WouldBlock`: it says nothing.
    pub fn receive(&self) -> io::Result<Vec<u8>> {
        let mut length = [0; 4];
        (&self.stream).read_exact(&mut length)?;
        let length = u32::from_be_bytes(length) as usize;
        if length > MESSAGE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the message is too long to be one"));
        }
        let mut message = vec![0; length];
        (&self.stream).read_exact(&mut message)?;
        Ok(message)
    }

    /// Waits until the other side closes its end.
    pub fn wait_for_close(&self) -> io::Result<()> {
        io::copy(&mut &self.stream, &mut io::sink()).map(drop)
    }

    /// Sends descriptors; this process keeps its own.
    pub fn send_descriptors(&self, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        for some in descriptors.chunks(DESCRIPTORS_MAX) {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            assert!(control.push(SendAncillaryMessage::ScmRights(some)), "the space is for as many");
            // With a timeout set, a signal ends the wait though its handler says SA_RESTART: signal(7).
            retry_on_intr(|| sendmsg(&self.stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL))?;
        }
        Ok(())
    }

    /// Receives so many descriptors. They are closed on exec.
    pub fn receive_descriptors(&self, count: usize) -> io::Result<Vec<OwnedFd>> {
        let mut received = Vec::new();
        while received.len() < count {
            let mut space = [MaybeUninit::uninit(); cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0];
            // Each byte comes with the descriptors that it was sent with, and never with those of the next.
            let message = retry_on_intr(|| {
                recvmsg(&self.stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)
            })?;
            if message.bytes == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let before = received.len();
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    received.extend(descriptors);
                }
            }
            if received.len() == before {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "descriptors are missing: see ulimit -n"));
            }
        }
        Ok(received)
    }
}

/// Makes this the process's standard error.
pub fn replace_standard_error(descriptor: impl AsFd) -> io::Result<()> {
    Ok(stdio::dup2_stderr(descriptor)?)
}

/// The number of the kernel's socket behind a descriptor: equal for two descriptors of one socket.
pub fn socket_number(socket: &impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::fstat(socket)?.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};

    fn pair() -> (Channel, Channel) {
        let (ours, theirs) = Channel::pair().unwrap();
        let theirs = Channel { stream: theirs.into() };
        for channel in [&ours, &theirs] {
            channel.set_timeout(Duration::from_secs(10)).unwrap();
        }
        (ours, theirs)
    }

    #[test]
    fn messages_and_descriptors_arrive_in_their_order() {
        let (ours, theirs) = pair();
        let listeners: Vec<TcpListener> =
            (0..DESCRIPTORS_MAX + 7).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        ours.send(b"first").unwrap();
        ours.send_descriptors(&listeners.iter().map(AsFd::as_fd).collect::<Vec<_>>()).unwrap();
        ours.send(&[7; 100_000]).unwrap();
        assert_eq!(theirs.receive().unwrap(), b"first");
        let received = theirs.receive_descriptors(listeners.len()).unwrap();
        assert_eq!(theirs.receive().unwrap(), [7; 100_000]);
        for (sent, received) in listeners.into_iter().zip(received) {
            assert_eq!(socket_number(&sent).unwrap(), socket_number(&received).unwrap());
            let address = sent.local_addr().unwrap();
            drop(sent);
            // The socket lives on in the other descriptor.
            let client = TcpStream::connect(address).unwrap();
            assert_eq!(TcpListener::from(received).accept().unwrap().1, client.local_addr().unwrap());
        }
    }

    #[test]
    fn a_closed_end_and_a_silent_one_are_told_apart() {
        let (ours, theirs) = pair();
        ours.set_timeout(Duration::from_millis(10)).unwrap();
        assert_eq!(ours.receive().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(theirs);
        assert_eq!(ours.receive().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert_eq!(ours.receive_descriptors(1).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        ours.wait_for_close().unwrap();
    }

    extern "C" fn on_signal(_: libc::c_int) {}

    /// Runs `step`, which blocks in this system call; sends its thread a signal there, and then runs `release`.
    fn interrupted<T: Send>(syscall: libc::c_long, step: impl FnOnce() -> T + Send, release: impl FnOnce()) -> T {
        let (sender, thread) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let blocked = scope.spawn(move || {
                sender.send(rustix::thread::gettid().as_raw_nonzero().get()).unwrap();
                step()
            });
            let thread = thread.recv().unwrap();
            let waits = || {
                let at = std::fs::read_to_string(format!("/proc/self/task/{thread}/syscall")).unwrap_or_default();
                at.starts_with(&format!("{syscall} "))
            };
            while !waits() {
                std::thread::yield_now();
            }
            // SAFETY: the handler does nothing, and the thread is there: it is joined below.
            unsafe {
                libc::signal(libc::SIGUSR1, on_signal as *const () as libc::sighandler_t);
                assert_eq!(libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, libc::SIGUSR1), 0);
            }
            let pending = || {
                let status = std::fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap_or_default();
                status.lines().any(|line| line.starts_with("SigPnd:") && !line.ends_with(&"0".repeat(16)))
            };
            // Handled, and then waiting again, or through with an error.
            while pending() || !(waits() || blocked.is_finished()) {
                std::thread::yield_now();
            }
            release();
            blocked.join().unwrap()
        })
    }

    #[test]
    fn a_signal_does_not_end_the_wait_for_descriptors() {
        let (ours, theirs) = pair();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let received = interrupted(
            libc::SYS_recvmsg,
            || theirs.receive_descriptors(1),
            || ours.send_descriptors(&[listener.as_fd()]).unwrap(),
        );
        assert_eq!(socket_number(&received.unwrap()[0]).unwrap(), socket_number(&listener).unwrap());
        // Nobody reads: there is no room.
        ours.stream.set_nonblocking(true).unwrap();
        let mut filled = 0;
        while let Ok(count) = (&ours.stream).write(&[0; 1024]) {
            filled += count;
        }
        ours.stream.set_nonblocking(false).unwrap();
        let sent = interrupted(
            libc::SYS_sendmsg,
            || ours.send_descriptors(&[listener.as_fd()]),
            || (&theirs.stream).read_exact(&mut vec![0; filled]).unwrap(),
        );
        sent.unwrap();
        assert_eq!(theirs.receive_descriptors(1).unwrap().len(), 1);
    }

    #[test]
    fn a_length_that_cannot_be_is_an_error() {
        let (ours, theirs) = pair();
        (&ours.stream).write_all(&[255; 4]).unwrap();
        assert_eq!(theirs.receive().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }
}
