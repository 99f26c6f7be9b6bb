//! The sockets of health checks: a connect that can leave no trace at the upstream, one for datagrams, and which errors
//! are ours alone.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use socket2::{Domain, Protocol, SockAddr, SockRef, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UdpSocket, UnixStream};

use crate::address::Address;

/// How a connect that has nothing to send was ended.
#[derive(Debug)]
pub enum Touch {
    /// Reset before the kernel acknowledged the upstream's SYN-ACK: the upstream's `accept` never returns it.
    NoTrace,
    /// The acknowledgement had gone out already, so the upstream accepts it: the caller must close with FIN.
    Seen(Connection),
}

/// A connection of a check.
#[derive(Debug)]
pub enum Connection {
    /// To an IP address.
    Tcp(TcpStream),
    /// To a UNIX socket.
    Unix(UnixStream),
}

impl Connection {
    /// Its addresses, this side's first; a UNIX socket has none.
    pub fn ends(&self) -> io::Result<Option<(SocketAddr, SocketAddr)>> {
        match self {
            Connection::Tcp(stream) => Ok(Some((stream.local_addr()?, stream.peer_addr()?))),
            Connection::Unix(_) => Ok(None),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Connection::Tcp(stream) => stream.as_fd(),
            Connection::Unix(stream) => stream.as_fd(),
        }
    }
}

impl AsyncRead for Connection {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Tcp(stream) => Pin::new(stream).poll_read(cx, buffer),
            Connection::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Connection::Tcp(stream) => Pin::new(stream).poll_write(cx, bytes),
            Connection::Unix(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        // Nothing is held back on this side of the kernel.
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Connection::Tcp(stream) => Pin::new(stream).poll_shutdown(cx),
            Connection::Unix(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }
}

/// Connects from `source`, or from the kernel's choice. Cancel it by dropping the future.
pub async fn connect(to: &Address, source: Option<IpAddr>) -> io::Result<Connection> {
    match to {
        Address::Ip(to) => Ok(Connection::Tcp(established(begin(*to, source, Acknowledge::AtOnce)?).await?)),
        Address::Unix(path) => connect_unix(path),
    }
}

fn connect_unix(path: &Path) -> io::Result<Connection> {
    Ok(Connection::Unix(UnixStream::from_std(super::unix::connect(path)?.into())?))
}

/// Connects and, where the kernel has not acknowledged yet, resets: the upstream's kernel answered, its program never
/// hears of it.
///
/// With quick acknowledgement off the kernel delays the last ACK of the handshake by up to 200 ms, in the hope that
/// data goes with it. A reset until then meets a half-open connection. Whether the ACK is still held back is not
/// guessed from the time that passed but read from the socket: it has sent nothing but its SYNs.
/// No `await` stands between seeing the socket writable and closing it.
///
/// A UNIX socket has no handshake: what is connected will be accepted.
pub async fn touch(to: &Address, source: Option<IpAddr>) -> io::Result<Touch> {
    let to = match to {
        Address::Ip(to) => *to,
        Address::Unix(path) => return connect_unix(path).map(Touch::Seen),
    };
    let stream = established(begin(to, source, Acknowledge::WithData)?).await?;
    if has_acknowledged(&stream)? {
        return Ok(Touch::Seen(Connection::Tcp(stream)));
    }
    SockRef::from(&stream).set_linger(Some(Duration::ZERO))?;
    drop(stream);
    Ok(Touch::NoTrace)
}

/// A socket that sends to `to` alone, hears of it alone, and is told when its machine refuses: an ICMP error comes only
/// to a connected socket. Nothing is sent by this.
pub fn datagram(to: SocketAddr, source: Option<IpAddr>) -> io::Result<UdpSocket> {
    let unspecified = match to {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::UNSPECIFIED),
    };
    let socket = std::net::UdpSocket::bind(SocketAddr::new(source.unwrap_or(unspecified), 0))?;
    socket.connect(to)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// Queues bytes that leave together with the next ones written, in one segment.
pub fn send_with_next(stream: &Connection, bytes: &[u8]) -> io::Result<()> {
    let sent = SockRef::from(stream).send_with_flags(bytes, libc::MSG_MORE | libc::MSG_NOSIGNAL)?;
    if sent < bytes.len() {
        return Err(io::ErrorKind::WriteZero.into());
    }
    Ok(())
}

/// Is it this machine that lacks something (a local port or address, a descriptor, a buffer, an epoll watch) or forbids it
/// (its firewall, a policy of a cgroup, a route that prohibits), so that the error says nothing about the upstream?
pub fn is_local(error: &io::Error) -> bool {
    const OURS: [i32; 9] = [
        libc::EADDRNOTAVAIL,
        libc::EMFILE,
        libc::ENFILE,
        libc::ENOBUFS,
        libc::ENOMEM,
        libc::EAGAIN,
        libc::ENOSPC,
        libc::EPERM,
        libc::EACCES,
    ];
    error.raw_os_error().is_some_and(|code| OURS.contains(&code))
}

/// Is it certainly no address of this machine? What cannot be told is not.
pub fn is_foreign(ip: IpAddr) -> bool {
    let bound = std::net::UdpSocket::bind((ip, 0));
    bound.is_err_and(|error| error.kind() == io::ErrorKind::AddrNotAvailable)
}

/// The system's words without its number: "connection refused".
pub fn words(error: &io::Error) -> String {
    let mut text = error.to_string();
    if let Some(number) = text.find(" (os error") {
        text.truncate(number);
    }
    if let Some(first) = text.get_mut(..1) {
        first.make_ascii_lowercase();
    }
    text
}

/// When the last ACK of the handshake is sent.
#[derive(Clone, Copy, PartialEq)]
enum Acknowledge {
    AtOnce,
    WithData,
}

/// A socket whose connect is under way, or has already succeeded or failed.
fn begin(to: SocketAddr, source: Option<IpAddr>, acknowledge: Acknowledge) -> io::Result<TcpStream> {
    let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking().cloexec(), Some(Protocol::TCP))?;
    socket.set_tcp_nodelay(true)?;
    if acknowledge == Acknowledge::WithData {
        socket.set_tcp_quickack(false)?;
    }
    if let Some(source) = source {
        // A bound address then does not cost one of the machine's ports for every destination.
        super::set_option(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
        socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    }
    match socket.connect(&SockAddr::from(to)) {
        Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => Err(error),
        _ => TcpStream::from_std(socket.into()),
    }
}

async fn established(stream: TcpStream) -> io::Result<TcpStream> {
    stream.writable().await?;
    match stream.take_error()? {
        Some(error) => Err(error),
        None => Ok(stream),
    }
}

/// Has this socket, just connected, sent anything but SYNs? Where the kernel cannot say: yes.
fn has_acknowledged(stream: &TcpStream) -> io::Result<bool> {
    let info = super::tcp_info(stream)?;
    // 0 segments: a kernel before 4.2, or another one than Linux; a SYN was certainly sent.
    Ok(info.tcpi_segs_out != 1 + info.tcpi_total_retrans)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    fn listening(address: &str) -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    fn assert_nothing_to_accept(listener: &TcpListener) {
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[tokio::test]
    async fn a_touch_is_never_accepted() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (listener, address) = listening(address);
            let to = Address::Ip(address);
            for _ in 0..100 {
                assert!(matches!(touch(&to, None).await.unwrap(), Touch::NoTrace));
                assert_nothing_to_accept(&listener);
            }
            // The proof that this listener does accept, and that nothing older was in its queue.
            let client = std::net::TcpStream::connect(address).unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(peer, client.local_addr().unwrap());
            assert_nothing_to_accept(&listener);
        }
    }

    #[tokio::test]
    async fn an_acknowledged_connect_is_told_from_one_that_is_not() {
        let (_listener, address) = listening("127.0.0.1:0");
        let quiet = established(begin(address, None, Acknowledge::WithData).unwrap()).await.unwrap();
        assert!(!has_acknowledged(&quiet).unwrap());
        let ordinary = established(begin(address, None, Acknowledge::AtOnce).unwrap()).await.unwrap();
        assert!(has_acknowledged(&ordinary).unwrap());
    }

    #[tokio::test]
    async fn a_repeated_syn_is_not_taken_for_an_acknowledgement() {
        // A full accept queue: the kernel drops the first SYN, and there is room when it comes again after a second.
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        socket.bind(&"127.0.0.1:0".parse::<SocketAddr>().unwrap().into()).unwrap();
        socket.listen(0).unwrap();
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        let _queued = std::net::TcpStream::connect(address).unwrap();
        let stream = begin(address, None, Acknowledge::WithData).unwrap();
        let listener = TcpListener::from(socket);
        listener.accept().unwrap();
        let stream = established(stream).await.unwrap();
        assert!(!has_acknowledged(&stream).unwrap());
    }

    #[tokio::test]
    async fn connects_from_the_source_address() {
        for (listen, source) in [("127.0.0.1:0", "127.0.0.9"), ("[::1]:0", "::1")] {
            let (listener, address) = listening(listen);
            let to = Address::Ip(address);
            let stream = connect(&to, Some(source.parse().unwrap())).await.unwrap();
            let (_, peer) = listener.accept().unwrap();
            assert_eq!(peer, stream.ends().unwrap().unwrap().0);
            assert_eq!(peer.ip(), source.parse::<IpAddr>().unwrap());
            assert!(matches!(touch(&to, Some(source.parse().unwrap())).await.unwrap(), Touch::NoTrace));
            assert_nothing_to_accept(&listener);
        }
    }

    #[tokio::test]
    async fn a_datagram_socket_has_the_source_address_and_hears_of_a_refusal() {
        for (listen, source) in [("127.0.0.1:0", "127.0.0.9"), ("[::1]:0", "::1")] {
            let receiver = std::net::UdpSocket::bind(listen).unwrap();
            let to = receiver.local_addr().unwrap();
            for source in [None, Some(source.parse::<IpAddr>().unwrap())] {
                let socket = datagram(to, source).unwrap();
                socket.send(b"x").await.unwrap();
                let (_, peer) = receiver.recv_from(&mut [0; 2]).unwrap();
                assert_eq!(peer, socket.local_addr().unwrap());
                assert!(source.is_none_or(|source| source == peer.ip()), "{peer}");
            }
            drop(receiver);
            let socket = datagram(to, None).unwrap();
            socket.send(b"x").await.unwrap();
            let refused = socket.recv(&mut [0; 2]).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        }
    }

    #[tokio::test]
    async fn a_refusal_is_the_upstreams_and_a_missing_address_is_ours() {
        let (listener, address) = listening("127.0.0.1:0");
        drop(listener);
        let address = Address::Ip(address);
        let refused = touch(&address, None).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert!(!is_local(&refused));
        // TEST-NET-2 is on no machine.
        let unknown = touch(&address, Some("198.51.100.1".parse().unwrap())).await.unwrap_err();
        assert!(is_local(&unknown), "{unknown}");
        assert!(!is_local(&io::ErrorKind::ConnectionRefused.into()));
        for forbidden in [libc::EPERM, libc::EACCES] {
            assert!(is_local(&io::Error::from_raw_os_error(forbidden)), "a firewall's, a policy's, a route's word");
        }
    }
}
