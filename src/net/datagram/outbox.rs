//! Batches of datagrams on their way out: gathered without a copy, several of one length as one segmented send.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};

use super::{BATCH_MAX, Source, message};

/// Ancillary data of one message: where it comes from, and the length of its segments.
type Control = [u64; 10];

/// Place for messages, used again from batch to batch.
#[derive(Default)]
pub struct Outbox {
    iovecs: Vec<libc::iovec>,
    messages: Vec<Message>,
    names: Vec<SocketAddrBytes>,
    controls: Vec<Control>,
    headers: Vec<libc::mmsghdr>,
    segmented: u64,
}

/// A sockaddr_in or sockaddr_in6.
#[derive(Clone, Copy)]
union SocketAddrBytes {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

/// One send.
struct Message {
    iovecs: Range<usize>,
    route: Route,
    /// Datagrams in it.
    datagrams: usize,
    /// iovecs of each of them.
    parts: usize,
    /// Bytes of each of them but the last; 0: there is one.
    segment: u16,
}

/// From where to where, on a socket that is not connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Route {
    /// `None`: the socket is connected.
    pub to: Option<SocketAddr>,
    /// `None`: the socket's own address.
    pub from: Option<Source>,
}

/// A send that the kernel refused.
#[derive(Debug)]
pub struct Failure {
    /// What it said.
    pub error: io::Error,
    /// Bytes of each of its datagrams, if they were to leave as segments.
    pub segment: Option<usize>,
    /// Datagrams in it.
    pub datagrams: usize,
    /// The place of the first of them among all that were added.
    pub first: usize,
}

/// What to do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Go on with the next one.
    Skip,
    /// Send its datagrams one by one.
    Plain,
    /// Send nothing more.
    Stop,
}

/// Messages that borrow what they send.
pub struct Sending<'o, 'd> {
    outbox: &'o mut Outbox,
    data: PhantomData<&'d [u8]>,
}

impl Outbox {
    /// Datagrams that left as segments of a larger send, since this was asked last.
    pub fn take_segmented(&mut self) -> u64 {
        mem::take(&mut self.segmented)
    }

    /// Begins a batch.
    pub fn begin<'d>(&mut self) -> Sending<'_, 'd> {
        self.iovecs.clear();
        self.messages.clear();
        Sending { outbox: self, data: PhantomData }
    }
}

impl<'d> Sending<'_, 'd> {
    /// Adds one send: datagrams of one length, of which the last may be shorter, each behind `prefix`.
    pub fn push(&mut self, route: Route, prefix: &'d [u8], datagrams: impl Iterator<Item = &'d [u8]>) {
        let start = self.outbox.iovecs.len();
        let (mut count, mut longest) = (0, 0);
        for datagram in datagrams {
            if !prefix.is_empty() {
                self.outbox.iovecs.push(iovec(prefix));
            }
            self.outbox.iovecs.push(iovec(datagram));
            (count, longest) = (count + 1, longest.max(prefix.len() + datagram.len()));
        }
        self.outbox.messages.push(Message {
            iovecs: start..self.outbox.iovecs.len(),
            route,
            datagrams: count,
            parts: if prefix.is_empty() { 1 } else { 2 },
            segment: if count > 1 {
                u16::try_from(longest).expect("a datagram has fewer than 65,536 bytes")
            } else {
                0
            },
        });
    }

    /// Has nothing been added?
    pub fn is_empty(&self) -> bool {
        self.outbox.messages.is_empty()
    }

    /// Sends everything, and asks `failed` about what the kernel refuses. How many datagrams it came to: all, unless
    /// `failed` said to stop.
    pub fn send(self, socket: &impl AsFd, mut failed: impl FnMut(Failure) -> Next) -> usize {
        let outbox = self.outbox;
        let (mut at, mut done) = (0, 0);
        while at < outbox.messages.len() {
            match outbox.transmit(socket, at) {
                Ok(count) => {
                    for message in &outbox.messages[at..at + count] {
                        done += message.datagrams;
                        outbox.segmented += if message.segment > 0 { message.datagrams as u64 } else { 0 };
                    }
                    at += count;
                }
                Err(error) => {
                    let message = &outbox.messages[at];
                    let segment = (message.segment > 0).then_some(usize::from(message.segment));
                    let failure = Failure { error, segment, datagrams: message.datagrams, first: done };
                    match failed(failure) {
                        Next::Skip => (at, done) = (at + 1, done + message.datagrams),
                        Next::Plain => outbox.split(at),
                        Next::Stop => return done,
                    }
                }
            }
        }
        done
    }
}

impl Outbox {
    /// One system call, for up to `BATCH_MAX` messages from `first` on.
    fn transmit(&mut self, socket: &impl AsFd, first: usize) -> io::Result<usize> {
        let count = (self.messages.len() - first).min(BATCH_MAX);
        // Nothing is appended after this: the pointers below stay right.
        self.names.resize(BATCH_MAX, SocketAddrBytes { v6: NO_ADDRESS });
        self.controls.resize(BATCH_MAX, Control::default());
        self.headers.resize(BATCH_MAX, message());
        for index in 0..count {
            let planned = &self.messages[first + index];
            let header = &mut self.headers[index].msg_hdr;
            (header.msg_name, header.msg_namelen) = match planned.route.to {
                Some(to) => {
                    let length = write_address(&mut self.names[index], to);
                    ((&raw mut self.names[index]).cast(), length)
                }
                None => (std::ptr::null_mut(), 0),
            };
            header.msg_iov = self.iovecs[planned.iovecs.start..].as_mut_ptr();
            header.msg_iovlen = planned.iovecs.len();
            header.msg_control = (&raw mut self.controls[index]).cast();
            header.msg_controllen = mem::size_of::<Control>();
            header.msg_controllen = write_control(header, planned.route.from, planned.segment);
            if header.msg_controllen == 0 {
                header.msg_control = std::ptr::null_mut();
            }
        }
        let fd = socket.as_fd().as_raw_fd();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        loop {
            // SAFETY: the first `count` headers point to names, control data and iovecs of `self`, which live on; the
            // iovecs point to bytes that `Sending` keeps borrowed, and the kernel only reads them.
            let sent = unsafe { libc::sendmmsg(fd, self.headers.as_mut_ptr(), count as libc::c_uint, flags) };
            if sent > 0 {
                return Ok(sent as usize);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Makes a message of each datagram of this one.
    fn split(&mut self, at: usize) {
        let Message { iovecs, route, datagrams, parts, .. } = &self.messages[at];
        let plain: Vec<Message> = (0..*datagrams)
            .map(|index| {
                let start = iovecs.start + index * parts;
                Message { iovecs: start..start + parts, route: *route, datagrams: 1, parts: *parts, segment: 0 }
            })
            .collect();
        self.messages.splice(at..=at, plain);
    }
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

const NO_ADDRESS: libc::sockaddr_in6 = libc::sockaddr_in6 {
    sin6_family: 0,
    sin6_port: 0,
    sin6_flowinfo: 0,
    sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
    sin6_scope_id: 0,
};

fn write_address(name: &mut SocketAddrBytes, address: SocketAddr) -> libc::socklen_t {
    match address {
        SocketAddr::V4(v4) => {
            name.v4 = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: v4.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from(*v4.ip()).to_be() },
                sin_zero: [0; 8],
            };
            mem::size_of::<libc::sockaddr_in>() as libc::socklen_t
        }
        SocketAddr::V6(v6) => {
            name.v6 = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: v6.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                sin6_scope_id: v6.scope_id(),
            };
            mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t
        }
    }
}

/// Writes the ancillary data to where `header` points; how many bytes it has.
fn write_control(header: &libc::msghdr, from: Option<Source>, segment: u16) -> usize {
    let mut length = 0;
    // SAFETY: `msg_control` points to a `Control`, aligned as cmsghdr and, with its 80 bytes, as long as both entries
    // together (40 and 24).
    let mut current = unsafe { libc::CMSG_FIRSTHDR(header) };
    let mut put = |level: libc::c_int, kind: libc::c_int, data: &[u8]| {
        let size = data.len() as libc::c_uint;
        // SAFETY: as above: there is room for this entry behind those before it.
        unsafe {
            (*current).cmsg_level = level;
            (*current).cmsg_type = kind;
            (*current).cmsg_len = libc::CMSG_LEN(size) as _;
            std::ptr::copy_nonoverlapping(data.as_ptr(), libc::CMSG_DATA(current), data.len());
            length += libc::CMSG_SPACE(size) as usize;
            current = current.cast::<u8>().add(libc::CMSG_SPACE(size) as usize).cast();
        }
    };
    match from {
        Some(Source { ip: IpAddr::V4(ip), .. }) => {
            // in_pktinfo: interface, source, and a field that is for receiving only.
            let mut info = [0; 12];
            info[4..8].copy_from_slice(&ip.octets());
            put(libc::IPPROTO_IP, libc::IP_PKTINFO, &info);
        }
        Some(Source { ip: IpAddr::V6(ip), interface }) => {
            // in6_pktinfo: source and interface.
            let mut info = [0; 20];
            info[..16].copy_from_slice(&ip.octets());
            info[16..].copy_from_slice(&interface.to_ne_bytes());
            put(libc::IPPROTO_IPV6, libc::IPV6_PKTINFO, &info);
        }
        None => {}
    }
    if segment > 0 {
        put(libc::SOL_UDP, libc::UDP_SEGMENT, &segment.to_ne_bytes());
    }
    length
}
