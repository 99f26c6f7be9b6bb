//! Packet captures (pcap, pcapng) down to what a receiver would read first: the first bytes that the client of each TCP
//! connection sent, and the datagrams of each UDP flow, those with one header counted together. Pure; made for captures of a few connections, not for gigabytes.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use thiserror::Error;

use crate::proxy_protocol::{Decoded, HEADER_BYTES_MAX, Transport, decode, spp};

/// Connections, and datagrams with a header of their own, that are kept; a longer capture is cut here.
pub const PAYLOADS_MAX: usize = 10_000;
/// Nested IPv6 extension headers and VLAN tags that are followed.
const NESTING_MAX: usize = 8;

/// Why a capture cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CaptureError {
    /// The file ends in the middle of its own header.
    #[error("the capture ends within its file header")]
    Truncated,
    /// A block's length makes no sense.
    #[error("the capture is damaged at byte {at}: a block says it has {length} bytes")]
    Block {
        /// Where the block begins.
        at: usize,
        /// What it says.
        length: usize,
    },
    /// Not a link type that is known here.
    #[error("the capture has link type {0}; known are Ethernet, Linux cooked (any), raw IP and loopback")]
    LinkType(u32),
}

/// What one end sent first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Payload {
    /// TCP: the first bytes of a connection; UDP: the first datagram of a flow with this header.
    pub transport: Transport,
    /// Who sent it.
    pub source: SocketAddr,
    /// To whom.
    pub destination: SocketAddr,
    /// The bytes; of TCP as many segments as a header needs.
    pub bytes: Vec<u8>,
    /// Of UDP: further datagrams that begin with the same header, or, if this one has none, have none either.
    pub alike: usize,
    /// Of UDP: datagrams without a header that follow one with a header.
    pub bare: usize,
}

impl Payload {
    /// The first of its kind.
    pub fn new(transport: Transport, source: SocketAddr, destination: SocketAddr, bytes: &[u8]) -> Payload {
        Payload { transport, source, destination, bytes: bytes.to_vec(), alike: 0, bare: 0 }
    }
}

/// Do these bytes begin a capture?
pub fn is_capture(bytes: &[u8]) -> bool {
    classic(bytes).is_some() || bytes.starts_with(&SECTION_HEADER.to_be_bytes())
}

/// What was sent first, in the order of the capture.
pub fn payloads(bytes: &[u8]) -> Result<Vec<Payload>, CaptureError> {
    let mut flows = Flows::default();
    match classic(bytes) {
        Some(endian) => read_classic(bytes, endian, &mut flows)?,
        None => read_blocks(bytes, &mut flows)?,
    }
    Ok(flows.payloads.into_iter().filter(|payload| !payload.bytes.is_empty()).collect())
}

/// Byte order of the machine that captured.
#[derive(Clone, Copy)]
enum Endian {
    Big,
    Little,
}

impl Endian {
    fn u16(self, bytes: &[u8], at: usize) -> Option<u16> {
        let bytes = bytes.get(at..at + 2)?.try_into().ok()?;
        Some(match self {
            Endian::Big => u16::from_be_bytes(bytes),
            Endian::Little => u16::from_le_bytes(bytes),
        })
    }

    fn u32(self, bytes: &[u8], at: usize) -> Option<u32> {
        let bytes = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(match self {
            Endian::Big => u32::from_be_bytes(bytes),
            Endian::Little => u32::from_le_bytes(bytes),
        })
    }

    fn len(self, bytes: &[u8], at: usize) -> Option<usize> {
        self.u32(bytes, at).map(|len| len as usize)
    }
}

/// The magic number of pcap, with microseconds or nanoseconds.
fn classic(bytes: &[u8]) -> Option<Endian> {
    match bytes.first_chunk()? {
        [0xa1, 0xb2, 0xc3, 0xd4] | [0xa1, 0xb2, 0x3c, 0x4d] => Some(Endian::Big),
        [0xd4, 0xc3, 0xb2, 0xa1] | [0x4d, 0x3c, 0xb2, 0xa1] => Some(Endian::Little),
        _ => None,
    }
}

fn read_classic(bytes: &[u8], endian: Endian, flows: &mut Flows) -> Result<(), CaptureError> {
    // The upper half of the field has other uses.
    let link = endian.u32(bytes, 20).ok_or(CaptureError::Truncated)? & 0xffff;
    let mut at = 24;
    while let Some(len) = endian.len(bytes, at + 8) {
        let Some(packet) = bytes.get(at + 16..).and_then(|rest| rest.get(..len)) else { break };
        flows.packet(link, packet)?;
        at += 16 + len;
    }
    Ok(())
}

const SECTION_HEADER: u32 = 0x0A0D_0D0A;
const INTERFACE: u32 = 1;
const OLD_PACKET: u32 = 2;
const SIMPLE_PACKET: u32 = 3;
const PACKET: u32 = 6;

fn read_blocks(bytes: &[u8], flows: &mut Flows) -> Result<(), CaptureError> {
    let (mut endian, mut links, mut at) = (Endian::Little, Vec::new(), 0);
    while bytes.len() - at >= 12 {
        let block = &bytes[at..];
        if block.starts_with(&SECTION_HEADER.to_be_bytes()) {
            endian = if block[8..12] == [0x1a, 0x2b, 0x3c, 0x4d] { Endian::Big } else { Endian::Little };
            links.clear();
        }
        let (kind, length) = (endian.u32(block, 0), endian.len(block, 4));
        let (Some(kind), Some(length)) = (kind, length) else { break };
        if length < 12 || !length.is_multiple_of(4) {
            return Err(CaptureError::Block { at, length });
        }
        // A capture that was cut ends in a part of a block.
        let Some(body) = block.get(..length).map(|block| &block[8..length - 4]) else { break };
        let packet = match kind {
            INTERFACE => {
                links.push(u32::from(endian.u16(body, 0).ok_or(CaptureError::Block { at, length })?));
                None
            }
            PACKET => endian.len(body, 0).zip(endian.len(body, 12)).map(|(link, len)| (link, 20, len)),
            OLD_PACKET => endian.u16(body, 0).zip(endian.len(body, 12)).map(|(link, len)| (link.into(), 20, len)),
            SIMPLE_PACKET => endian.len(body, 0).map(|len| (0, 4, len.min(body.len().saturating_sub(4)))),
            _ => None,
        };
        if let Some((link, start, len)) = packet
            && let (Some(&link), Some(packet)) = (links.get(link), body.get(start..).and_then(|rest| rest.get(..len)))
        {
            flows.packet(link, packet)?;
        }
        at += length;
    }
    Ok(())
}

#[derive(Default)]
struct Flows {
    payloads: Vec<Payload>,
    /// TCP connections by client and server.
    connections: HashMap<(SocketAddr, SocketAddr), Connection>,
    /// Datagrams by sender and receiver.
    datagrams: HashMap<(SocketAddr, SocketAddr), Datagrams>,
}

struct Connection {
    payload: usize,
    /// Sequence number of the byte that is expected next; `None` until a first segment is seen.
    next: Option<u32>,
    done: bool,
}

/// Datagrams that began with one header.
struct Datagrams {
    payload: usize,
    /// 0: they have none.
    header_len: usize,
}

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;

impl Flows {
    fn packet(&mut self, link: u32, packet: &[u8]) -> Result<(), CaptureError> {
        let big = Endian::Big;
        let ip = match link {
            // Loopback: the number of the family differs by system, the IP version is in the packet.
            0 | 108 => packet.get(4..),
            12 | 14 | 101 | 228 | 229 => Some(packet),
            1 => ethernet(packet),
            113 => big.u16(packet, 14).filter(|&kind| kind == IPV4 || kind == IPV6).and(packet.get(16..)),
            276 => big.u16(packet, 0).filter(|&kind| kind == IPV4 || kind == IPV6).and(packet.get(20..)),
            other => return Err(CaptureError::LinkType(other)),
        };
        // What is no whole TCP or UDP packet is none of our business.
        let _ = ip.and_then(|ip| self.ip(ip));
        Ok(())
    }

    fn ip(&mut self, packet: &[u8]) -> Option<()> {
        let big = Endian::Big;
        match packet.first()? >> 4 {
            4 => {
                let header = usize::from(packet[0] & 15) * 4;
                // 0: the kernel left it to the network card.
                let total = match usize::from(big.u16(packet, 2)?) {
                    0 => packet.len(),
                    total => total.min(packet.len()),
                };
                let later_fragment = big.u16(packet, 6)? & 0x1fff != 0;
                let ip = |at: usize| Some(IpAddr::from(Ipv4Addr::from(*packet.get(at..)?.first_chunk::<4>()?)));
                let segment = packet.get(header..total).filter(|_| header >= 20 && !later_fragment)?;
                self.segment(*packet.get(9)?, ip(12)?, ip(16)?, segment)
            }
            6 => {
                let total = match usize::from(big.u16(packet, 4)?) {
                    0 => packet.len(),
                    length => (40 + length).min(packet.len()),
                };
                let ip = |at: usize| Some(IpAddr::from(Ipv6Addr::from(*packet.get(at..)?.first_chunk::<16>()?)));
                let (mut kind, mut rest) = (*packet.get(6)?, packet.get(40..total)?);
                for _ in 0..NESTING_MAX {
                    let len = match kind {
                        0 | 43 | 60 => 8 + usize::from(*rest.get(1)?) * 8,
                        44 if big.u16(rest, 2)? >> 3 == 0 => 8,
                        _ => break,
                    };
                    (kind, rest) = (rest[0], rest.get(len..)?);
                }
                self.segment(kind, ip(8)?, ip(24)?, rest)
            }
            _ => None,
        }
    }

    fn segment(&mut self, protocol: u8, source: IpAddr, destination: IpAddr, segment: &[u8]) -> Option<()> {
        let big = Endian::Big;
        let source = SocketAddr::new(source, big.u16(segment, 0)?);
        let destination = SocketAddr::new(destination, big.u16(segment, 2)?);
        match protocol {
            6 => {
                let data = segment.get(usize::from(segment.get(12)? >> 4) * 4..)?;
                self.tcp(source, destination, big.u32(segment, 4)?, *segment.get(13)?, data);
            }
            17 => {
                let data = segment.get(8..)?;
                if !data.is_empty() {
                    self.datagram(source, destination, data);
                }
            }
            _ => {}
        }
        Some(())
    }

    fn datagram(&mut self, source: SocketAddr, destination: SocketAddr, data: &[u8]) {
        let header_len = datagram_header_len(data);
        if let Some(flow) = self.datagrams.get(&(source, destination)) {
            let payload = &mut self.payloads[flow.payload];
            if header_len == flow.header_len && data[..header_len] == payload.bytes[..header_len] {
                payload.alike += 1;
                return;
            } else if header_len == 0 {
                payload.bare += 1;
                return;
            }
        }
        if self.payloads.len() < PAYLOADS_MAX {
            self.datagrams.insert((source, destination), Datagrams { payload: self.payloads.len(), header_len });
            self.payloads.push(Payload::new(Transport::Dgram, source, destination, data));
        }
    }

    fn tcp(&mut self, source: SocketAddr, destination: SocketAddr, sequence: u32, flags: u8, data: &[u8]) {
        let (syn, ack) = (flags & 0x02 != 0, flags & 0x10 != 0);
        let known = self.connections.contains_key(&(source, destination));
        // Without a SYN in the capture the one who is heard first counts as the client.
        let answer = self.connections.contains_key(&(destination, source));
        let begins = (syn && !ack && self.is_new(source, destination, sequence))
            || (!known && !answer && !syn && !data.is_empty());
        if begins && self.payloads.len() < PAYLOADS_MAX {
            let next = syn.then(|| sequence.wrapping_add(1));
            let payload = self.payloads.len();
            self.payloads.push(Payload::new(Transport::Stream, source, destination, &[]));
            self.connections.remove(&(destination, source));
            self.connections.insert((source, destination), Connection { payload, next, done: false });
        }
        let Some(connection) = self.connections.get_mut(&(source, destination)) else { return };
        let payload = &mut self.payloads[connection.payload];
        let wanted = *connection.next.get_or_insert(sequence);
        if connection.done || data.is_empty() || wanted != sequence.wrapping_add(u32::from(syn)) {
            return;
        }
        connection.next = Some(wanted.wrapping_add(data.len() as u32));
        payload.bytes.extend_from_slice(data);
        let complete = !matches!(decode(&payload.bytes), Ok(Decoded::Incomplete { .. }));
        connection.done = complete || payload.bytes.len() > HEADER_BYTES_MAX;
    }

    /// Not the same SYN once more.
    fn is_new(&self, source: SocketAddr, destination: SocketAddr, sequence: u32) -> bool {
        match self.connections.get(&(source, destination)) {
            Some(connection) => {
                let unanswered = self.payloads[connection.payload].bytes.is_empty();
                !(unanswered && connection.next == Some(sequence.wrapping_add(1)))
            }
            None => true,
        }
    }
}

/// Bytes of the header that a datagram begins with, valid or not; 0: none.
fn datagram_header_len(data: &[u8]) -> usize {
    if spp::decode(data).is_ok() {
        return spp::HEADER_BYTES;
    }
    match decode(data) {
        Ok(Decoded::Complete { len, .. }) => len,
        Ok(Decoded::Incomplete { .. }) => data.len(),
        Err(error) if error.is_no_header() => 0,
        Err(_) => data.len(),
    }
}

/// The IP packet in an Ethernet frame, behind VLAN tags.
fn ethernet(frame: &[u8]) -> Option<&[u8]> {
    let mut at = 12;
    for _ in 0..NESTING_MAX {
        match Endian::Big.u16(frame, at)? {
            0x8100 | 0x88a8 | 0x9100 => at += 4,
            IPV4 | IPV6 => return frame.get(at + 2..),
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SYN: u8 = 0x02;
    const ACK: u8 = 0x10;

    fn tcp(ports: (u16, u16), sequence: u32, flags: u8, data: &[u8]) -> Vec<u8> {
        let mut segment = [ports.0.to_be_bytes(), ports.1.to_be_bytes()].concat();
        segment.extend(sequence.to_be_bytes());
        segment.extend([0, 0, 0, 0, 5 << 4, flags, 0, 0, 0, 0, 0, 0]);
        [&segment, data].concat()
    }

    fn udp(ports: (u16, u16), data: &[u8]) -> Vec<u8> {
        [&ports.0.to_be_bytes()[..], &ports.1.to_be_bytes(), &[0; 4], data].concat()
    }

    fn ipv4(protocol: u8, segment: &[u8]) -> Vec<u8> {
        let total = (20 + segment.len() as u16).to_be_bytes();
        let header = [0x45, 0, total[0], total[1], 0, 0, 0, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2];
        [&header, segment].concat()
    }

    /// The other way.
    fn back(protocol: u8, segment: &[u8]) -> Vec<u8> {
        let mut packet = ipv4(protocol, segment);
        packet[12..20].rotate_left(4);
        packet
    }

    /// With an empty hop-by-hop header.
    fn ipv6(protocol: u8, segment: &[u8]) -> Vec<u8> {
        let length = (8 + segment.len() as u16).to_be_bytes();
        let mut packet = vec![0x60, 0, 0, 0, length[0], length[1], 0, 64];
        for last in [1, 2] {
            packet.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last).octets());
        }
        packet.extend([protocol, 0, 0, 0, 0, 0, 0, 0]);
        [&packet, segment].concat()
    }

    fn pcap(magic: [u8; 4], link: u32, packets: &[Vec<u8>]) -> Vec<u8> {
        let big = magic[0] == 0xa1;
        let number = |number: u32| if big { number.to_be_bytes() } else { number.to_le_bytes() };
        let mut file = [magic, [0; 4], [0; 4], [0; 4], [0; 4], number(link)].concat();
        for packet in packets {
            let len = number(packet.len() as u32);
            file.extend([[0; 4], [0; 4], len, len].concat());
            file.extend(packet);
        }
        file
    }

    fn pcapng(big: bool, link: u16, packets: &[Vec<u8>]) -> Vec<u8> {
        let number = |number: u32| if big { number.to_be_bytes() } else { number.to_le_bytes() };
        let block = |kind: u32, body: &[u8]| {
            let padding = vec![0; body.len().next_multiple_of(4) - body.len()];
            let length = number((12 + body.len() + padding.len()) as u32);
            [&number(kind), &length, body, &padding, &length].concat()
        };
        let mut file = block(SECTION_HEADER, &[number(0x1a2b_3c4d), [0; 4], [255; 4], [255; 4]].concat());
        let link = if big { link.to_be_bytes() } else { link.to_le_bytes() };
        file.extend(block(INTERFACE, &[link[0], link[1], 0, 0, 0, 0, 0, 0]));
        for (index, packet) in packets.iter().enumerate() {
            let len = number(packet.len() as u32);
            file.extend(match index % 2 {
                0 => block(PACKET, &[&[[0; 4], [0; 4], [0; 4], len, len].concat(), &packet[..]].concat()),
                _ => block(SIMPLE_PACKET, &[&len, &packet[..]].concat()),
            });
        }
        file
    }

    fn found(file: &[u8]) -> Vec<String> {
        assert!(is_capture(file));
        let text = |p: &Payload| format!("{} > {} {:?}", p.source, p.destination, String::from_utf8_lossy(&p.bytes));
        payloads(file).expect("a readable capture").iter().map(text).collect()
    }

    /// One UDP datagram with an address family in every way that a capture can wrap it.
    #[test]
    fn every_link_type_and_byte_order() {
        let (v4, v6) = (ipv4(17, &udp((1, 2), b"hello")), ipv6(17, &udp((1, 2), b"hello")));
        let expected = ["192.0.2.1:1 > 192.0.2.2:2 \"hello\"", "[2001:db8::1]:1 > [2001:db8::2]:2 \"hello\""];
        let frame = |before: &[u8], kinds: [[u8; 2]; 2], after: &[u8]| {
            [(kinds[0], &v4), (kinds[1], &v6)].map(|(kind, ip)| [before, &kind, after, ip].concat())
        };
        let ether = [[0x08, 0x00], [0x86, 0xdd]];
        let links = [
            (1, frame(&[0; 12], ether, &[])),
            (1, frame(&[&[0; 12][..], &[0x81, 0, 0, 5]].concat(), ether, &[])),
            (113, frame(&[0; 14], ether, &[])),
            (276, frame(&[], ether, &[0; 18])),
            (101, [v4.clone(), v6.clone()]),
            (0, frame(&[0, 0], [[0, 2], [0, 30]], &[])),
            (108, frame(&[0, 0], [[0, 2], [0, 24]], &[])),
        ];
        let magics = [0xa1b2_c3d4u32, 0xa1b2_3c4d, 0xd4c3_b2a1, 0x4d3c_b2a1];
        for (link, packets) in links {
            for magic in magics {
                assert_eq!(found(&pcap(magic.to_be_bytes(), link, &packets)), expected, "{link} {magic:x}");
            }
            for big in [false, true] {
                assert_eq!(found(&pcapng(big, link as u16, &packets)), expected, "{link} {big}");
            }
        }
        let file = pcap(magics[0].to_be_bytes(), 147, std::slice::from_ref(&v4));
        assert_eq!(payloads(&file), Err(CaptureError::LinkType(147)));
    }

    #[test]
    fn the_first_bytes_of_each_connections_client() {
        let packets = [
            ipv4(6, &tcp((5, 80), 10, SYN, b"")),
            ipv4(6, &tcp((5, 80), 10, SYN, b"")),
            back(6, &tcp((80, 5), 90, SYN | ACK, b"")),
            back(6, &tcp((80, 5), 91, ACK, b"server first")),
            ipv4(6, &tcp((5, 80), 11, ACK, b"PROXY ")),
            ipv4(6, &tcp((5, 80), 11, ACK, b"PROXY ")),
            ipv4(6, &tcp((5, 80), 30, ACK, b"out of order")),
            ipv4(6, &tcp((5, 80), 17, ACK, b"UNKNOWN\r\n")),
            ipv4(6, &tcp((5, 80), 26, ACK, b"more")),
            ipv4(6, &tcp((6, 80), 7, ACK, b"no SYN seen")),
            back(6, &tcp((80, 6), 7, ACK, b"the answer")),
            ipv4(6, &tcp((5, 80), 77, SYN, b"")),
            ipv4(6, &tcp((5, 80), 78, ACK, b"the port again")),
            ipv4(6, &tcp((7, 80), 78, SYN, b"")),
        ];
        let expected = [
            r#"192.0.2.1:5 > 192.0.2.2:80 "PROXY UNKNOWN\r\n""#,
            r#"192.0.2.1:6 > 192.0.2.2:80 "no SYN seen""#,
            r#"192.0.2.1:5 > 192.0.2.2:80 "the port again""#,
        ];
        assert_eq!(found(&pcap([0xd4, 0xc3, 0xb2, 0xa1], 101, &packets)), expected);
    }

    #[test]
    fn datagrams_of_a_flow_are_counted_by_header() {
        let mut spp = Vec::new();
        spp::encode(&mut spp, ([192, 0, 2, 9], 4_660).into(), ([192, 0, 2, 1], 53).into());
        let with = |payload: &[u8]| [&spp, payload].concat();
        let other = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0query";
        let flow = |data: &[u8]| ipv4(17, &udp((5, 53), data));
        let packets = [
            flow(&with(b"one")),
            flow(&with(b"")),
            flow(b"bare"),
            back(17, &udp((53, 5), b"answer")),
            back(17, &udp((53, 5), b"another")),
            ipv4(17, &udp((6, 53), b"another flow")),
            flow(other),
            flow(&with(b"again")),
        ];
        let file = pcap([0xd4, 0xc3, 0xb2, 0xa1], 101, &packets);
        let found = payloads(&file).expect("a readable capture");
        let counts: Vec<_> = found.iter().map(|p| (p.source.port(), p.bytes.len(), p.alike, p.bare)).collect();
        let spp_len = spp::HEADER_BYTES;
        let expected = [(5, spp_len + 3, 1, 1), (53, 6, 1, 0), (6, 12, 0, 0), (5, 21, 0, 0), (5, spp_len + 5, 0, 0)];
        assert_eq!(counts, expected);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn no_bytes_make_it_panic(
            rest in proptest::collection::vec(any::<u8>(), 0..300),
            changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
            link in prop::sample::select(vec![0u16, 1, 101, 113, 276]),
        ) {
            let packets = [ipv4(6, &tcp((5, 80), 10, ACK, b"x")), ipv6(17, &udp((1, 2), b"hello")), rest.clone()];
            for mut file in [pcap([0xa1, 0xb2, 0xc3, 0xd4], link.into(), &packets), pcapng(false, link, &packets)] {
                for (at, byte) in &changes {
                    let at = at.index(file.len());
                    file[at] = *byte;
                }
                let _ = payloads(&file);
                let _ = payloads(&file[..changes[0].0.index(file.len())]);
            }
            let _ = payloads(&[&[0x0a, 0x0d, 0x0d, 0x0a][..], &rest].concat());
        }
    }
}
