//! One TCP or UNIX connection in a worker's event loop, with the few operations that the data path needs.

use std::cell::Cell;
use std::future::Future;
use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags, Shutdown, SocketAddrAny};
use socket2::{Domain, Protocol, SockAddr, SockRef, Type};
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};

use super::listen::Accepted;
use super::splice::Pipe;
use crate::address::{Address, Client};

/// A connected (or connecting) non-blocking stream socket.
#[derive(Debug)]
pub struct Stream {
    fd: AsyncFd<Socket>,
}

/// The descriptor, and the options that a short connection never pays for.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    nodelay: Cell<NoDelay>,
    /// Seconds until the first probe, to be set by `keep_alive`; 0: off, or inherited from the listener.
    keepalive_secs: Cell<u16>,
    /// A UNIX socket has none of TCP's options.
    is_unix: bool,
}

/// When TCP_NODELAY is to be set. Only a second write can be held back by Nagle's algorithm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NoDelay {
    BeforeSecondWrite,
    BeforeThisWrite,
    Set,
}

impl Socket {
    fn before_write(&self) {
        match self.nodelay.get() {
            NoDelay::Set => {}
            NoDelay::BeforeSecondWrite => self.nodelay.set(NoDelay::BeforeThisWrite),
            NoDelay::BeforeThisWrite => {
                // Without it small messages are late, but they come.
                let _ = SockRef::from(&self.fd).set_tcp_nodelay(true);
                self.nodelay.set(NoDelay::Set);
            }
        }
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How to connect.
#[derive(Clone, Copy, Debug)]
pub struct ConnectOptions {
    /// Local address; `None`: the kernel's choice.
    pub source: Option<IpAddr>,
    /// Idle time before the first keepalive probe; `None`: off.
    pub keepalive: Option<Duration>,
    /// TCP_FASTOPEN_CONNECT.
    pub fast_open: bool,
    /// Something is written as soon as it is connected: the handshake's last ACK goes out with it, a packet less.
    pub writes_at_once: bool,
}

/// What one read brought.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Read {
    /// Bytes; 0 is the end of the stream.
    pub count: usize,
    /// The stream ends after these bytes: to read once more would only say so.
    pub is_last: bool,
}

/// When the kernel sends the SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handshake {
    /// It has.
    Begun,
    /// Together with the first bytes written (RFC 7413, section 2): the peer gave a cookie earlier.
    WithFirstWrite,
}

/// `tcpi_state` of a socket whose SYN has not been answered.
const TCP_SYN_SENT: u8 = 2;

/// A wait for the peer's reset.
pub type ErrorWatch<'a> = Pin<Box<dyn Future<Output = ()> + 'a>>;

impl Stream {
    /// Takes an accepted, non-blocking socket into the current runtime. TCP_NODELAY and keepalive are the listener's.
    pub fn new(accepted: Accepted) -> io::Result<Stream> {
        let Accepted { fd, client } = accepted;
        Stream::without_options(fd, client == Client::Unix)
    }

    fn without_options(fd: OwnedFd, is_unix: bool) -> io::Result<Stream> {
        Stream::register(Socket { fd, nodelay: Cell::new(NoDelay::Set), keepalive_secs: Cell::new(0), is_unix })
    }

    fn register(socket: Socket) -> io::Result<Stream> {
        let interest = Interest::READABLE | Interest::WRITABLE | Interest::PRIORITY;
        // SAFETY: a Socket refers to the same open descriptor until it is dropped, which AsyncFd does last.
        Ok(Stream { fd: unsafe { AsyncFd::register_with_interest(socket, interest)? } })
    }

    /// Starts to connect; `connected` tells the outcome, `keep_alive` starts keepalive probes.
    pub fn connect(address: &Address, options: &ConnectOptions) -> io::Result<(Stream, Handshake)> {
        match address {
            Address::Ip(address) => Stream::connect_ip(*address, options),
            Address::Unix(path) => Ok((Stream::without_options(super::unix::connect(path)?, true)?, Handshake::Begun)),
        }
    }

    fn connect_ip(address: SocketAddr, options: &ConnectOptions) -> io::Result<(Stream, Handshake)> {
        let socket = socket2::Socket::new(
            Domain::for_address(address),
            Type::STREAM.nonblocking().cloexec(),
            Some(Protocol::TCP),
        )?;
        if let Some(source) = options.source {
            // The port is chosen at connect, per destination: 64k connections for each upstream instead of for all.
            super::set_option(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
            socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
        }
        if options.fast_open {
            // Not every kernel has it, and it is a hint.
            let _ = super::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1);
        }
        if options.writes_at_once {
            // The kernel sees it as no more than a hint for this one ACK, and is back at its usual ways after it.
            let _ = socket.set_tcp_quickack(false);
        }
        let handshake = match socket.connect(&SockAddr::from(address)) {
            Ok(()) if options.fast_open => Handshake::WithFirstWrite,
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => Handshake::Begun,
        };
        let keepalive_secs =
            options.keepalive.map_or(0, |idle| u16::try_from(idle.as_secs().max(1)).unwrap_or(u16::MAX));
        let stream = Stream::register(Socket {
            fd: OwnedFd::from(socket),
            nodelay: Cell::new(NoDelay::BeforeSecondWrite),
            keepalive_secs: Cell::new(keepalive_secs),
            is_unix: false,
        })?;
        Ok((stream, handshake))
    }

    /// Waits until the handshake is over.
    pub async fn connected(&self, handshake: Handshake) -> io::Result<()> {
        loop {
            // The guard keeps its readiness: the socket is writable from here on.
            let mut ready = self.fd.writable().await?;
            // epoll tells of a failure along with it; only then the socket has to be asked.
            if ready.ready().is_write_closed() {
                break;
            }
            // With a handshake that waits for the first write, a socket is writable before it has begun.
            if handshake == Handshake::Begun || super::tcp_info(&self.fd)?.tcpi_state != TCP_SYN_SENT {
                return Ok(());
            }
            ready.clear_ready();
        }
        match SockRef::from(&self.fd).take_error()? {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Starts the keepalive probes that `connect` was told of. Later than at connect, because they cost four system
    /// calls that a connection of a few seconds has no use for.
    pub fn keep_alive(&self) -> io::Result<()> {
        match self.fd.get_ref().keepalive_secs.take() {
            0 => Ok(()),
            secs => SockRef::from(&self.fd).set_tcp_keepalive(&super::keepalive(Duration::from_secs(secs.into()))),
        }
    }

    /// The address on this side: for an accepted connection, the one that the client wrote to.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        let address: SocketAddrAny = rustix::net::getsockname(self.fd.as_fd())?;
        let address = SocketAddr::try_from(address).map_err(|_| io::Error::other("not an IP socket"))?;
        Ok(super::canonical(address))
    }

    /// Reads once. A short read means that the socket is empty now: readiness is given back without another call that
    /// would only say so.
    pub fn poll_read(&self, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<Read>> {
        loop {
            let mut ready = ready!(self.fd.poll_read_ready(cx))?;
            match rustix::net::recv(self.fd.get_ref(), &mut *buffer, RecvFlags::empty()) {
                Ok((_, 0)) => return Poll::Ready(Ok(Read { count: 0, is_last: true })),
                Ok((_, count)) => {
                    let mut is_last = false;
                    if count < buffer.len() && !self.may_stop_short() {
                        // A FIN that epoll told of has all bytes before it; so has a reset, which is an error, too.
                        is_last = ready.ready().is_read_closed() && !self.reported(Interest::ERROR).is_error();
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(Read { count, is_last }));
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// May a read return less than there is? One of a UNIX socket ends after descriptors that came along with bytes.
    fn may_stop_short(&self) -> bool {
        self.fd.get_ref().is_unix || self.has_urgent_data()
    }

    /// Fills an empty pipe from the socket, at most with what it can hold; 0 is the end of the stream.
    pub fn poll_fill(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.fd.poll_read_ready(cx))?;
            match pipe.fill(self.fd.as_fd()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Writes what the pipe holds, once. Unlike a short send, a short splice says nothing: a signal (a pause, a debugger)
    /// cuts it short with room left in the socket, and no event would follow. Only EAGAIN means that the socket is full.
    pub fn poll_drain(&self, cx: &mut Context<'_>, pipe: &mut Pipe) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.fd.poll_write_ready(cx))?;
            self.fd.get_ref().before_write();
            match pipe.drain(self.fd.as_fd()) {
                Ok(count) => return Poll::Ready(Ok(count)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// Reads once, whether the event loop knows of something to read or not. Pending does not mean to be woken.
    pub fn read_now(&self, buffer: &mut [u8]) -> Poll<io::Result<Read>> {
        match rustix::net::recv(self.fd.get_ref(), buffer, RecvFlags::empty()) {
            Ok((_, count)) => Poll::Ready(Ok(Read { count, is_last: count == 0 })),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }

    /// Writes once, as `read_now` reads; also before the handshake, which it then begins.
    pub fn write_now(&self, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.fd.get_ref().before_write();
        match rustix::net::send(self.fd.get_ref(), bytes, SendFlags::NOSIGNAL) {
            Ok(count) => Poll::Ready(Ok(count)),
            // No cookie any more: the SYN is out, without a byte.
            Err(rustix::io::Errno::INPROGRESS | rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Poll::Pending,
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }

    /// Was there ever urgent data? A read stops at its mark although more is queued, so a short one says nothing then,
    /// and splicing never gets past the mark.
    pub fn has_urgent_data(&self) -> bool {
        // tokio's PRIORITY is also ready when the peer has sent its FIN.
        self.reported(Interest::PRIORITY).is_priority()
    }

    /// What epoll has reported of this until now, without a system call.
    fn reported(&self, interest: Interest) -> Ready {
        // Cheap, and most often the answer.
        if self.fd.try_io(interest, |_| Ok(())).is_err() {
            return Ready::EMPTY;
        }
        match pin!(self.fd.ready(interest)).poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(guard)) => guard.ready(),
            _ => Ready::EMPTY,
        }
    }

    /// Writes once. A short write means that the socket is full now.
    pub fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, bytes, SendFlags::NOSIGNAL)
    }

    /// As `poll_write`, for bytes that `shutdown_write` or the close follows at once: they leave with the FIN in one
    /// packet.
    pub fn poll_write_last(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_send(cx, bytes, SendFlags::NOSIGNAL | SendFlags::MORE)
    }

    fn poll_send(&self, cx: &mut Context<'_>, bytes: &[u8], flags: SendFlags) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.fd.poll_write_ready(cx))?;
            self.fd.get_ref().before_write();
            match rustix::net::send(self.fd.get_ref(), bytes, flags) {
                Ok(count) => {
                    if count < bytes.len() {
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(count));
                }
                Err(rustix::io::Errno::AGAIN) => ready.clear_ready(),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Poll::Ready(Err(error.into())),
            }
        }
    }

    /// Completes when the socket is in error: how a reset shows on a side that isn't being read.
    pub async fn error(&self) {
        // An error of the registration itself ends the watch as well: the next call on the socket will say why.
        let _ = self.fd.ready(Interest::ERROR).await;
    }

    /// `error`, on the heap: few connections ever need it.
    pub fn error_watch(&self) -> ErrorWatch<'_> {
        Box::pin(self.error())
    }

    /// Sends FIN after what was written; reading goes on.
    pub fn shutdown_write(&self) -> io::Result<()> {
        Ok(rustix::net::shutdown(self.fd.get_ref(), Shutdown::Write)?)
    }

    /// Bytes written that the peer has not acknowledged (SIOCOUTQ); `None` if the kernel does not say. What was written
    /// to a UNIX socket is in its peer's queue already, and stays there whatever becomes of the connection.
    pub fn unacknowledged(&self) -> Option<usize> {
        if self.fd.get_ref().is_unix {
            return Some(0);
        }
        unacknowledged(self.fd.get_ref())
    }

    /// Closes with RST as soon as it is dropped: the peer must not take what it got for the whole. A UNIX socket knows
    /// no reset: its peer gets ECONNRESET if it had sent something that was not read, and else the end of the stream.
    pub fn reset_when_closed(&self) {
        // Should the option fail, the socket is closed with FIN: there is no other way to send a reset.
        let _ = SockRef::from(&self.fd).set_linger(Some(Duration::ZERO));
    }
}

/// Closes an accepted socket with RST before it ever became a `Stream`.
pub fn reset(fd: OwnedFd) {
    let _ = SockRef::from(&fd).set_linger(Some(Duration::ZERO));
}

/// Bytes written to a TCP socket that its peer has not acknowledged (SIOCOUTQ); `None` if the kernel does not say.
pub fn unacknowledged(socket: &impl AsFd) -> Option<usize> {
    let mut count = MaybeUninit::<libc::c_int>::zeroed();
    // SAFETY: TIOCOUTQ (SIOCOUTQ) writes one int to the pointer, which is valid and initialised to zero.
    let count = unsafe {
        if libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, count.as_mut_ptr()) != 0 {
            return None;
        }
        count.assume_init()
    };
    usize::try_from(count).ok()
}

#[cfg(test)]
pub(crate) mod tests {
    use std::future::poll_fn;
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    /// A connection, and its other end.
    pub(crate) async fn pair(writes_at_once: bool) -> (Stream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let options = ConnectOptions { source: None, keepalive: None, fast_open: false, writes_at_once };
        let (stream, handshake) = Stream::connect(&listener.local_addr().unwrap().into(), &options).unwrap();
        stream.connected(handshake).await.unwrap();
        poll_fn(|cx| stream.poll_write(cx, b"header")).await.unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.read_exact(&mut [0; 6]).unwrap();
        (stream, peer)
    }

    async fn read(stream: &Stream, buffer: &mut [u8]) -> io::Result<Read> {
        poll_fn(|cx| stream.poll_read(cx, buffer)).await
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_read_before_a_fin_that_is_there_already_is_the_last() {
        let (stream, mut peer) = pair(true).await;
        peer.write_all(b"answer").unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        let buffer = &mut [0; 64];
        assert_eq!(read(&stream, buffer).await.unwrap(), Read { count: 6, is_last: true });
        // Who asks all the same is told the same.
        assert_eq!(read(&stream, buffer).await.unwrap(), Read { count: 0, is_last: true });
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_read_that_may_have_left_something_is_not_the_last() {
        let (stream, mut peer) = pair(true).await;
        peer.write_all(b"answer").unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(read(&stream, &mut [0; 6]).await.unwrap(), Read { count: 6, is_last: false });
        assert_eq!(read(&stream, &mut [0; 6]).await.unwrap(), Read { count: 0, is_last: true });
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_reset_is_no_end_of_the_stream() {
        let (stream, mut peer) = pair(true).await;
        peer.write_all(b"ans").unwrap();
        SockRef::from(&peer).set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        let buffer = &mut [0; 64];
        assert_eq!(read(&stream, buffer).await.unwrap(), Read { count: 3, is_last: false });
        assert_eq!(read(&stream, buffer).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn urgent_data_is_told_from_a_fin() {
        let (stream, mut peer) = pair(true).await;
        peer.write_all(b"a").unwrap();
        peer.shutdown(std::net::Shutdown::Write).unwrap();
        read(&stream, &mut [0; 64]).await.unwrap();
        assert!(!stream.has_urgent_data());
        let (stream, peer) = pair(true).await;
        SockRef::from(&peer).send_out_of_band(b"!").unwrap();
        (&peer).write_all(b"after it").unwrap();
        read(&stream, &mut [0; 64]).await.unwrap();
        assert!(stream.has_urgent_data());
    }

    /// Segments that it has received, SYN and FIN among them.
    pub(crate) fn segments(peer: &TcpStream) -> u32 {
        /// Where `struct tcp_info` has tcpi_segs_in, since Linux 4.2.
        const SEGS_IN: usize = 140;
        let info = SockRef::from(peer);
        let mut bytes = [0_u8; 256];
        let mut length = bytes.len() as libc::socklen_t;
        // SAFETY: the kernel writes at most `length` bytes to `bytes`.
        let result = unsafe {
            let (level, option) = (libc::IPPROTO_TCP, libc::TCP_INFO);
            libc::getsockopt(info.as_fd().as_raw_fd(), level, option, bytes.as_mut_ptr().cast(), &mut length)
        };
        assert!(result == 0 && length as usize >= SEGS_IN + 4, "{}", io::Error::last_os_error());
        u32::from_ne_bytes(bytes[SEGS_IN..SEGS_IN + 4].try_into().unwrap())
    }

    #[tokio::test(flavor = "current_thread")]
    async fn the_last_ack_of_the_handshake_goes_out_with_the_first_write() {
        let (_stream, plain) = pair(false).await;
        let (_stream, saving) = pair(true).await;
        assert_eq!(segments(&plain), segments(&saving) + 1);
    }
}
