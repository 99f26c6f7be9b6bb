//! Sockets, their options and the machine's limits. The only place with `unsafe`.

pub mod check;
pub mod datagram;
pub mod handover;
pub mod inherited;
pub mod limits;
pub mod listen;
pub mod splice;
pub mod stream;
pub mod unix;

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

pub use listen::{Accepted, Listening};
pub use stream::Stream;

/// An IPv4 address that came as `::ffff:a.b.c.d` becomes plain IPv4; everything else stays.
pub fn canonical(address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => SocketAddr::new(v4.into(), address.port()),
            None => address,
        },
        IpAddr::V4(_) => address,
    }
}

/// Has this machine IPv6 sockets at all?
pub fn has_ipv6() -> bool {
    socket2::Socket::new(socket2::Domain::IPV6, socket2::Type::STREAM, None).is_ok()
}

/// Is there a way to this address? Asks the kernel's routes alone: nothing is sent.
pub fn has_route(ip: IpAddr) -> bool {
    let any: IpAddr = if ip.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    UdpSocket::bind((any, 0)).and_then(|socket| socket.connect((ip, 9))).is_ok()
}

/// TCP keepalive: first probe after `idle`, then every `idle / 4` (1 s at least), four unanswered ones end the connection.
fn keepalive(idle: Duration) -> socket2::TcpKeepalive {
    let interval = (idle / 4).max(Duration::from_secs(1));
    socket2::TcpKeepalive::new().with_time(idle.max(Duration::from_secs(1))).with_interval(interval).with_retries(4)
}

/// What the kernel knows of a TCP connection.
fn tcp_info(socket: &impl AsFd) -> io::Result<libc::tcp_info> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = mem::size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the descriptor is open while `socket` is borrowed; the kernel writes at most `length` bytes to `info`,
    // which is that large.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `tcp_info` is made of integers only, and was zeroed: every bit pattern is a value, also where an older
    // kernel wrote less than the whole.
    Ok(unsafe { info.assume_init() })
}

/// Sets an integer socket option that socket2 has no name for.
pub(crate) fn set_option(socket: &impl AsFd, level: i32, option: i32, value: i32) -> io::Result<()> {
    // SAFETY: the descriptor is borrowed for the call, and the kernel reads one int from a valid pointer.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            mem::size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
