//! Listening sockets: bound before anybody can connect, shared by workers through SO_REUSEPORT, closed without a loss.

use std::io;
use std::mem;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, acceptfrom_with};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::address::Client;

/// Connections waiting to be accepted, per socket; the kernel caps it at net.core.somaxconn.
const BACKLOG: i32 = 4096;

/// How to bind one address.
#[derive(Clone, Copy, Debug)]
pub struct BindOptions {
    /// The address; `[::]` is dual stack unless `v6only`.
    pub address: SocketAddr,
    /// IPV6_V6ONLY.
    pub v6only: bool,
    /// TCP keepalive of the connections accepted here; `None`: off.
    pub keepalive: Option<Duration>,
}

/// Is the address free? A socket without SO_REUSEPORT is bound and closed: with it the kernel would let two processes
/// of one user share a port in silence.
pub fn probe(options: &BindOptions) -> io::Result<()> {
    open(options, false).map(drop)
}

/// Binds `count` sockets to one address. Nobody can connect before `listen`.
pub fn bind(options: &BindOptions, count: usize) -> io::Result<Vec<Socket>> {
    (0..count).map(|_| open(options, true)).collect()
}

/// From here on the kernel takes connections.
pub fn listen(socket: &Socket) -> io::Result<()> {
    socket.listen(BACKLOG)
}

/// Makes a socket that listens already hand the options to what it accepts that our own ones do.
pub fn adopt(socket: &Socket, keepalive: Option<Duration>) -> io::Result<()> {
    if socket.domain()? == Domain::UNIX {
        return Ok(());
    }
    socket.set_tcp_nodelay(true)?;
    set_keepalive(socket, keepalive)
}

fn set_keepalive(socket: &Socket, keepalive: Option<Duration>) -> io::Result<()> {
    match keepalive {
        Some(idle) => socket.set_tcp_keepalive(&super::keepalive(idle)),
        None => socket.set_keepalive(false),
    }
}

fn open(options: &BindOptions, reuse_port: bool) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address(options.address), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    if options.address.is_ipv6() {
        socket.set_only_v6(options.v6only)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(reuse_port)?;
    // Accepted sockets inherit both: two system calls less for each connection.
    socket.set_tcp_nodelay(true)?;
    set_keepalive(&socket, options.keepalive)?;
    socket.bind(&SockAddr::from(options.address))?;
    Ok(socket)
}

/// One accepted connection.
#[derive(Debug)]
pub struct Accepted {
    /// The connection, non-blocking.
    pub fd: OwnedFd,
    /// Who connected; IPv4 in its own form on a dual-stack socket.
    pub client: Client,
}

/// A listening socket in a worker's event loop.
#[derive(Debug)]
pub struct Listening {
    socket: AsyncFd<Socket>,
    is_unix: bool,
}

impl Listening {
    /// Registers with the current runtime.
    pub fn new(socket: Socket) -> io::Result<Listening> {
        let is_unix = socket.domain()? == Domain::UNIX;
        // SAFETY: a Socket refers to the same open descriptor until it is dropped, which AsyncFd does last.
        Ok(Listening { socket: unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE)? }, is_unix })
    }

    /// The next connection.
    pub fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        loop {
            let mut ready = ready!(self.socket.poll_read_ready(cx))?;
            match accept(self.socket.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                // The client was gone before we came: not an error of this socket.
                Err(error) if error.raw_os_error() == Some(libc::ECONNABORTED) => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Another descriptor of the same socket.
    pub fn lend(&self) -> io::Result<Socket> {
        self.socket.get_ref().try_clone()
    }

    /// Connections accepted from now on use this keepalive; `None`: off. A UNIX socket needs none: its peer's end is
    /// known at once.
    pub fn set_keepalive(&self, keepalive: Option<Duration>) -> io::Result<()> {
        if self.is_unix {
            return Ok(());
        }
        set_keepalive(self.socket.get_ref(), keepalive)
    }

    /// What is queued now, without waiting.
    pub fn try_accept(&self) -> io::Result<Accepted> {
        accept(self.socket.get_ref())
    }

    /// New handshakes are dropped from now on, those under way still complete: a closed SO_REUSEPORT socket would
    /// take its accept queue and its half-open connections with it.
    pub fn refuse_handshakes(&self) -> io::Result<()> {
        // Offset 13 of the TCP header holds the flags: SYN (0x02) without ACK (0x10) is dropped.
        let program = [
            filter(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 0, 0, 13),
            filter(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0, 0, 0x12),
            filter(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 0, 1, 0x02),
            filter(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
            filter(libc::BPF_RET | libc::BPF_K, 0, 0, u32::MAX),
        ];
        let attached = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        // SAFETY: the kernel reads `attached` and the five instructions during the call and keeps neither pointer.
        let result = unsafe {
            libc::setsockopt(
                self.socket.get_ref().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_FILTER,
                (&raw const attached).cast(),
                mem::size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

fn filter(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn accept(socket: &Socket) -> io::Result<Accepted> {
    let (fd, client) = acceptfrom_with(socket.as_fd(), SocketFlags::NONBLOCK | SocketFlags::CLOEXEC)?;
    let client = match client {
        Some(client) if client.address_family() != AddressFamily::UNIX => {
            let client = SocketAddr::try_from(client).map_err(|_| io::Error::other("accepted from no IP address"))?;
            Client::Ip(super::canonical(client))
        }
        // A UNIX client has no name, or one that says nothing.
        _ => Client::Unix,
    };
    Ok(Accepted { fd, client })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use std::net::TcpStream;

    fn loopback() -> BindOptions {
        BindOptions { address: "127.0.0.1:0".parse().unwrap(), v6only: false, keepalive: Some(Duration::from_secs(60)) }
    }

    #[test]
    fn a_port_already_taken_is_an_error_also_under_reuse_port() {
        let taken = bind(&loopback(), 1).unwrap().remove(0);
        listen(&taken).unwrap();
        let address = taken.local_addr().unwrap().as_socket().unwrap();
        let options = BindOptions { address, ..loopback() };
        assert_eq!(probe(&options).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // What the probe protects from: the kernel itself would let them share.
        assert!(bind(&options, 1).is_ok());
    }

    #[tokio::test]
    async fn queued_connections_are_accepted_after_handshakes_are_refused() {
        let socket = bind(&loopback(), 1).unwrap().remove(0);
        listen(&socket).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let clients: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        let listening = Listening::new(socket).unwrap();
        listening.refuse_handshakes().unwrap();
        let late = TcpStream::connect_timeout(&address, Duration::from_millis(200));
        assert_eq!(late.unwrap_err().kind(), io::ErrorKind::TimedOut);
        for client in &clients {
            let accepted = poll_fn(|cx| listening.poll_accept(cx)).await.unwrap();
            assert_eq!(accepted.client, Client::Ip(client.local_addr().unwrap()));
        }
        assert_eq!(listening.try_accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
