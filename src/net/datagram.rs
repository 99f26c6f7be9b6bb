//! UDP sockets: bound ones that say where each datagram was sent to, connected ones, and batches of what they receive.

pub mod outbox;
pub mod poll;

use std::io;
use std::mem::{self, MaybeUninit};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use super::listen::BindOptions;
use super::set_option;

/// Datagrams of one system call.
pub const BATCH_MAX: usize = 64;
/// The longest payload of a datagram: 65,535 less the headers of IPv4 and UDP.
pub const PAYLOAD_BYTES_MAX: usize = 65_507;

/// More than any datagram has, so that none is cut; pages that no datagram reaches are never there.
const BUFFER_BYTES: usize = 1 << 16;
/// From buffer to buffer: not a power of two, or the first lines of all buffers would share a few places in the cache.
const BUFFER_STRIDE: usize = BUFFER_BYTES + 576;
/// What is asked for between the network and us; the kernel caps it at net.core.rmem_max and wmem_max.
const QUEUE_BYTES: usize = 4 << 20;

/// Is the address free? As `listen::probe`, for UDP.
pub fn probe(options: &BindOptions) -> io::Result<()> {
    open(options, false).map(drop)
}

/// Binds `count` sockets to one address. Datagrams queue from here on.
pub fn bind(options: &BindOptions, count: usize) -> io::Result<Vec<Socket>> {
    (0..count).map(|_| open(options, true)).collect()
}

fn open(options: &BindOptions, reuse_port: bool) -> io::Result<Socket> {
    let address = options.address;
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(options.v6only)?;
    }
    socket.set_reuse_port(reuse_port)?;
    prepare(&socket, address)?;
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

/// Sets what `listener::udp` counts on. `address` is what the socket is bound to, or will be.
pub fn prepare(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let may_fragment = allow_fragments(socket, address);
    if address.ip().is_unspecified() {
        // On a dual-stack socket the IPv6 option tells of IPv4 datagrams, too, in mapped form.
        let (level, option) = match address.is_ipv6() {
            true => (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
            false => (libc::IPPROTO_IP, libc::IP_PKTINFO),
        };
        set_option(socket, level, option, 1)?;
    }
    if set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, QUEUE_BYTES as i32).is_err() {
        socket.set_recv_buffer_size(QUEUE_BYTES)?;
    }
    socket.set_send_buffer_size(QUEUE_BYTES)?;
    // Kernels before 5.0 deliver datagrams one by one, which is as good.
    let _ = set_option(socket, libc::SOL_UDP, libc::UDP_GRO, 1);
    may_fragment
}

/// A socket whose datagrams all go to one address, from `source` or from where the kernel chooses.
pub fn connect(to: SocketAddr, source: Option<IpAddr>) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(to), Type::DGRAM.nonblocking().cloexec(), Some(Protocol::UDP))?;
    allow_fragments(&socket, to)?;
    if let Some(source) = source {
        set_option(&socket, libc::IPPROTO_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)?;
        socket.bind(&SockAddr::from(SocketAddr::new(source, 0)))?;
    }
    // Segments that the upstream sent in one go come in one go.
    let _ = set_option(&socket, libc::SOL_UDP, libc::UDP_GRO, 1);
    socket.connect(&SockAddr::from(to))?;
    Ok(socket.into())
}

/// Without this the kernel forbids fragments (DF) and what is longer than the path's MTU never leaves.
fn allow_fragments(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DONT)?;
    match address.is_ipv6() {
        true => set_option(socket, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DONT),
        false => Ok(()),
    }
}

/// The longest payload that leaves a connected socket in one packet.
pub fn packet_payload_max(socket: &impl AsFd, to: SocketAddr) -> io::Result<usize> {
    let (level, option, headers) = match to.is_ipv6() {
        true => (libc::IPPROTO_IPV6, libc::IPV6_MTU, 48),
        false => (libc::IPPROTO_IP, libc::IP_MTU, 28),
    };
    let (mut mtu, mut length): (libc::c_int, _) = (0, mem::size_of::<libc::c_int>() as libc::socklen_t);
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: the descriptor is borrowed for the call; the kernel writes at most `length` bytes to `mtu`.
    let result = unsafe { libc::getsockopt(fd, level, option, (&raw mut mtu).cast(), &mut length) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(mtu).unwrap_or(0).saturating_sub(headers))
}

/// Is it an address of this machine?
pub fn is_local(ip: IpAddr) -> bool {
    let Ok(socket) = std::net::UdpSocket::bind((ip, 0)) else { return false };
    let family = if ip.is_ipv6() { "ipv6" } else { "ipv4" };
    let others_too = std::fs::read_to_string(format!("/proc/sys/net/{family}/ip_nonlocal_bind"));
    if !others_too.is_ok_and(|value| value.trim() != "0") {
        return true;
    }
    // The kernel binds whatever it is asked to, but on the way to an own address it begins at that address.
    drop(socket);
    let begins_at = || {
        let any: IpAddr = if ip.is_ipv6() { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
        let socket = std::net::UdpSocket::bind((any, 0))?;
        socket.connect((ip, 1))?;
        socket.local_addr()
    };
    ip.is_loopback() || begins_at().is_ok_and(|address| address.ip() == ip)
}

/// Where a datagram was sent to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    /// The address that its sender wrote to; an IPv4 one on a dual-stack socket is mapped.
    pub ip: IpAddr,
    /// From where an answer must come.
    pub answer_from: Source,
}

/// The source of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Source {
    /// An address of this machine.
    pub ip: IpAddr,
    /// Its interface, for link-local ones; 0: any.
    pub interface: u32,
}

/// What one place of a batch holds: one datagram, or several of one sender in a row.
#[derive(Debug)]
pub struct Received<'a> {
    /// The sender.
    pub from: SocketAddr,
    /// On wildcard sockets.
    pub to: Option<Destination>,
    /// The payload.
    pub bytes: &'a [u8],
    /// Each datagram but the last has this length; `None`: there is one.
    pub segment: Option<usize>,
    /// It, or what came along with it, was longer than its place.
    pub truncated: bool,
}

/// Ancillary data of one message: IP_PKTINFO or IPV6_PKTINFO, and UDP_GRO, and all that whoever made an inherited
/// socket may have asked for: time stamps, marks, hop limits.
type Control = [u64; 64];

/// Buffers for `BATCH_MAX` messages.
pub struct Batch {
    memory: Vec<u8>,
    names: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
    iovecs: Vec<libc::iovec>,
    headers: Vec<libc::mmsghdr>,
    filled: usize,
}

impl Batch {
    /// Empty. The memory is only reserved: a page comes into being with the first datagram that reaches it.
    pub fn new() -> Batch {
        let mut batch = Batch {
            memory: vec![0; BATCH_MAX * BUFFER_STRIDE],
            names: vec![storage(); BATCH_MAX],
            controls: vec![[0; 64]; BATCH_MAX],
            iovecs: Vec::with_capacity(BATCH_MAX),
            headers: vec![message(); BATCH_MAX],
            filled: 0,
        };
        for index in 0..BATCH_MAX {
            let base = batch.memory[index * BUFFER_STRIDE..].as_mut_ptr();
            batch.iovecs.push(libc::iovec { iov_base: base.cast(), iov_len: BUFFER_BYTES });
        }
        batch
    }

    /// Forgets what was received.
    pub fn clear(&mut self) {
        self.filled = 0;
    }

    /// Messages received since `clear`.
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Has nothing been received?
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Receives up to `count` messages behind those that are there; how many came.
    pub fn receive(&mut self, socket: &impl AsFd, count: usize) -> io::Result<usize> {
        let first = self.filled;
        let count = count.min(BATCH_MAX - first);
        for index in first..first + count {
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.names[index]).cast();
            header.msg_namelen = mem::size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.iovecs[index];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[index]).cast();
            header.msg_controllen = mem::size_of::<Control>();
        }
        let fd = socket.as_fd().as_raw_fd();
        loop {
            // SAFETY: each of the `count` headers was just given a name, a control buffer and an iovec; these vectors
            // and the memory behind the iovecs belong to `self`, were never moved since `new`, and live on.
            let received = unsafe {
                libc::recvmmsg(
                    fd,
                    self.headers[first..].as_mut_ptr(),
                    count as libc::c_uint,
                    libc::MSG_DONTWAIT,
                    std::ptr::null_mut(),
                )
            };
            if received >= 0 {
                self.filled += received as usize;
                return Ok(received as usize);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// The payload in one place.
    pub fn bytes(&self, index: usize) -> &[u8] {
        assert!(index < self.filled);
        let start = index * BUFFER_STRIDE;
        &self.memory[start..start + (self.headers[index].msg_len as usize).min(BUFFER_BYTES)]
    }

    /// What one place holds; `None`: it came from no IP address.
    pub fn received(&self, index: usize) -> Option<Received<'_>> {
        let bytes = self.bytes(index);
        let from = address(&self.names[index])?;
        let header = &self.headers[index].msg_hdr;
        let (to, segment) = ancillary(header);
        let segment = segment.filter(|segment| *segment > 0 && *segment < bytes.len());
        // What came along may be where it was sent to, or that it is several.
        let truncated = header.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0;
        Some(Received { from, to, bytes, segment, truncated })
    }

    /// The length of each datagram but the last in one place; `None`: there is one datagram.
    pub fn segment(&self, index: usize) -> Option<usize> {
        let length = self.bytes(index).len();
        ancillary(&self.headers[index].msg_hdr).1.filter(|segment| *segment > 0 && *segment < length)
    }
}

impl Default for Batch {
    fn default() -> Batch {
        Batch::new()
    }
}

/// Reads the destination, and the length of segments.
fn ancillary(header: &libc::msghdr) -> (Option<Destination>, Option<usize>) {
    let (mut destination, mut segment) = (None, None);
    // SAFETY: the kernel has filled `msg_control` up to `msg_controllen`, inside a `Control`, which is aligned as
    // cmsghdr; the macros never step beyond that length.
    let mut current = unsafe { libc::CMSG_FIRSTHDR(header) };
    while !current.is_null() {
        // SAFETY: as above: `current` is a whole message's header in the buffer.
        let this = unsafe { *current };
        let (level, kind, length) = (this.cmsg_level, this.cmsg_type, this.cmsg_len as usize);
        // SAFETY: as above.
        let data = unsafe { libc::CMSG_DATA(current) };
        // What found no room is cut short, and says so by its length.
        // SAFETY: arithmetic only.
        let holds = |size: usize| length >= unsafe { libc::CMSG_LEN(size as libc::c_uint) } as usize;
        match (level, kind) {
            (libc::IPPROTO_IP, libc::IP_PKTINFO) if holds(mem::size_of::<libc::in_pktinfo>()) => {
                // SAFETY: the whole payload of IP_PKTINFO is there: an in_pktinfo, which any bytes make.
                let info = unsafe { data.cast::<libc::in_pktinfo>().read_unaligned() };
                let ip = IpAddr::V4(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)));
                let own = IpAddr::V4(Ipv4Addr::from(u32::from_be(info.ipi_spec_dst.s_addr)));
                destination = Some(Destination { ip, answer_from: Source { ip: own, interface: 0 } });
            }
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) if holds(mem::size_of::<libc::in6_pktinfo>()) => {
                // SAFETY: the whole payload of IPV6_PKTINFO is there: an in6_pktinfo, which any bytes make.
                let info = unsafe { data.cast::<libc::in6_pktinfo>().read_unaligned() };
                let ip = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                let interface = if ip.is_unicast_link_local() { info.ipi6_ifindex } else { 0 };
                // An answer cannot come from a group's address: the kernel chooses one then.
                let own = if ip.is_multicast() { Ipv6Addr::UNSPECIFIED } else { ip };
                let answer_from = Source { ip: own.into(), interface };
                destination = Some(Destination { ip: ip.into(), answer_from });
            }
            (libc::SOL_UDP, libc::UDP_GRO) if holds(mem::size_of::<libc::c_int>()) => {
                // SAFETY: the whole payload of UDP_GRO is there: an int.
                let length = unsafe { data.cast::<libc::c_int>().read_unaligned() };
                segment = usize::try_from(length).ok();
            }
            _ => {}
        }
        // SAFETY: as for the first one.
        current = unsafe { libc::CMSG_NXTHDR(header, current) };
    }
    (destination, segment)
}

fn storage() -> libc::sockaddr_storage {
    // SAFETY: sockaddr_storage is made of integers: zeroes are a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn message() -> libc::mmsghdr {
    // SAFETY: mmsghdr is made of integers and raw pointers: zeroes are a value.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

fn address(name: &libc::sockaddr_storage) -> Option<SocketAddr> {
    let name: *const libc::sockaddr_storage = name;
    // SAFETY: a sockaddr_storage is large enough and aligned for a sockaddr_in, which is made of integers only.
    let v4 = unsafe { &*name.cast::<libc::sockaddr_in>() };
    // SAFETY: as above, for a sockaddr_in6.
    let v6 = unsafe { &*name.cast::<libc::sockaddr_in6>() };
    match i32::from(v4.sin_family) {
        libc::AF_INET => {
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Some(SocketAddr::new(ip.into(), u16::from_be(v4.sin_port)))
        }
        libc::AF_INET6 => {
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Some(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), 0, v6.sin6_scope_id).into())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::outbox::{Next, Outbox, Route};
    use super::*;
    use crate::net::canonical;
    use socket2::SockRef;

    fn bound(address: &str) -> (Socket, SocketAddr) {
        let options = BindOptions { address: address.parse().unwrap(), v6only: false, keepalive: None };
        let socket = bind(&options, 1).unwrap().remove(0);
        let address = socket.local_addr().unwrap().as_socket().unwrap();
        (socket, address)
    }

    /// Every datagram that waits, however the kernel has joined them.
    fn received(socket: &impl AsFd, batch: &mut Batch) -> Vec<Vec<u8>> {
        batch.clear();
        // On loopback what was sent is there.
        batch.receive(socket, BATCH_MAX).unwrap();
        let places = (0..batch.len()).flat_map(|place| {
            let bytes = batch.bytes(place);
            let segment = batch.segment(place).unwrap_or(bytes.len()).max(1);
            let whole = || bytes.chunks(segment).map(<[u8]>::to_vec).collect::<Vec<_>>();
            if bytes.is_empty() { vec![Vec::new()] } else { whole() }
        });
        places.collect()
    }

    #[test]
    fn segments_and_plain_sends_arrive_as_the_same_datagrams() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (receiver, to) = bound(address);
            let sender = connect(to, None).unwrap();
            let payloads: Vec<Vec<u8>> =
                [100, 100, 100, 60, 0, 0, 60_000].iter().map(|length| vec![*length as u8; *length]).collect();
            let expected: Vec<Vec<u8>> = payloads.iter().map(|payload| [b"head", &payload[..]].concat()).collect();
            let (mut outbox, mut batch) = (Outbox::default(), Batch::new());
            let plain = (0..7).map(|at| at..at + 1).collect();
            for (runs, segmented) in [(vec![0..4, 4..6, 6..7], 6), (plain, 0)] {
                let mut sending = outbox.begin();
                for run in runs {
                    sending.push(Route::default(), b"head", payloads[run].iter().map(Vec::as_slice));
                }
                assert_eq!(sending.send(&sender, |failure| panic!("{failure:?}")), 7);
                assert_eq!(outbox.take_segmented(), segmented);
                assert_eq!(received(&receiver, &mut batch), expected, "{address}");
            }
        }
    }

    #[test]
    fn segments_that_the_kernel_refuses_go_one_by_one() {
        let (receiver, to) = bound("127.0.0.1:0");
        let sender = connect(to, None).unwrap();
        let payload = vec![7; 60_000];
        let (mut outbox, mut batch) = (Outbox::default(), Batch::new());
        let mut sending = outbox.begin();
        sending.push(Route::default(), &[], std::iter::once(&b"before"[..]));
        // Two of them are longer than any datagram.
        sending.push(Route::default(), &[], [&payload[..], &payload[..]].into_iter());
        sending.push(Route::default(), &[], std::iter::once(&b"after"[..]));
        let mut failures = Vec::new();
        let sent = sending.send(&sender, |failure| {
            failures.push((failure.segment, failure.first, failure.datagrams));
            Next::Plain
        });
        assert_eq!((sent, failures), (4, vec![(Some(60_000), 1, 2)]));
        let lengths: Vec<usize> = received(&receiver, &mut batch).iter().map(Vec::len).collect();
        assert_eq!(lengths, [6, 60_000, 60_000, 5]);
    }

    #[test]
    fn a_wildcard_socket_tells_where_a_datagram_was_sent_to_and_answers_from_there() {
        for (address, targets) in
            [("0.0.0.0:0", &["127.0.0.1", "127.9.9.9"][..]), ("[::]:0", &["127.0.0.1", "127.9.9.9", "::1"])]
        {
            let (socket, own) = bound(address);
            for target in targets {
                let target = SocketAddr::new(target.parse().unwrap(), own.port());
                let client = std::net::UdpSocket::bind(SocketAddr::new(target.ip(), 0)).unwrap();
                client.send_to(b"question", target).unwrap();
                let (mut outbox, mut batch) = (Outbox::default(), Batch::new());
                batch.receive(&socket, BATCH_MAX).unwrap();
                let received = batch.received(0).unwrap();
                let to = received.to.unwrap();
                assert_eq!(canonical(SocketAddr::new(to.ip, own.port())), target);
                assert_eq!(canonical(received.from), client.local_addr().unwrap());
                let route = Route { to: Some(received.from), from: Some(to.answer_from) };
                let mut sending = outbox.begin();
                sending.push(route, &[], std::iter::once(&b"answer"[..]));
                assert_eq!(sending.send(&socket, |failure| panic!("{failure:?}")), 1);
                let mut buffer = [0; 10];
                assert_eq!(client.recv_from(&mut buffer).unwrap(), (6, target));
            }
        }
    }

    #[test]
    fn what_else_an_inherited_socket_was_asked_to_tell_is_in_nobodys_way() {
        let (socket, own) = bound("[::]:0");
        let asked_for = [
            (libc::SOL_SOCKET, libc::SO_TIMESTAMPING, 0x58),
            (libc::SOL_SOCKET, libc::SO_RXQ_OVFL, 1),
            (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT, 1),
            (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1),
            (libc::IPPROTO_IPV6, libc::IPV6_FLOWINFO, 1),
            (libc::IPPROTO_IPV6, libc::IPV6_RECVORIGDSTADDR, 1),
            (libc::IPPROTO_IPV6, libc::IPV6_RECVFRAGSIZE, 1),
        ];
        for (level, option, value) in asked_for {
            set_option(&socket, level, option, value).unwrap();
        }
        let target = SocketAddr::new("::1".parse().unwrap(), own.port());
        std::net::UdpSocket::bind("[::1]:0").unwrap().send_to(b"question", target).unwrap();
        let mut batch = Batch::new();
        batch.receive(&socket, BATCH_MAX).unwrap();
        let received = batch.received(0).unwrap();
        assert_eq!((received.bytes, received.truncated), (&b"question"[..], false));
        assert_eq!(received.to.unwrap().ip, target.ip());
    }

    #[test]
    fn what_was_cut_short_is_not_read() {
        let mut control = [u64::MAX; 8];
        let mut header = message().msg_hdr;
        header.msg_control = (&raw mut control).cast();
        for (level, kind) in [
            (libc::IPPROTO_IP, libc::IP_PKTINFO),
            (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO),
            (libc::SOL_UDP, libc::UDP_GRO),
        ] {
            // As the kernel leaves it: the length is that of what is there.
            let cut = libc::cmsghdr { cmsg_len: 18, cmsg_level: level, cmsg_type: kind };
            header.msg_controllen = 18;
            // SAFETY: the buffer is aligned for a cmsghdr, and longer.
            unsafe { header.msg_control.cast::<libc::cmsghdr>().write(cut) };
            assert_eq!(ancillary(&header), (None, None), "{level} {kind}");
        }
    }

    #[test]
    fn a_refusal_is_told_once_and_the_socket_goes_on() {
        let (receiver, to) = bound("127.0.0.1:0");
        drop(receiver);
        let sender = connect(to, None).unwrap();
        let mut outbox = Outbox::default();
        let mut send = || {
            let mut sending = outbox.begin();
            sending.push(Route::default(), &[], std::iter::once(&b"hello"[..]));
            let mut errors = Vec::new();
            sending.send(&sender, |failure| {
                errors.push(failure.error.raw_os_error());
                Next::Stop
            });
            errors
        };
        assert!(send().is_empty());
        assert_eq!(send(), [Some(libc::ECONNREFUSED)]);
        assert!(send().is_empty());
        assert_eq!(SockRef::from(&sender).take_error().unwrap().unwrap().raw_os_error(), Some(libc::ECONNREFUSED));
    }
}
