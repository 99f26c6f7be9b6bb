//! Version 1: one line of text (section 2.1).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Range;

use super::error::{DecodeError, EncodeError};
use super::{Addresses, Command, Decoded, Header, Transport, Version, to_v6};

/// Longest line of all, CR LF included.
pub const LINE_BYTES_MAX: usize = 107;
/// Longest TCP4 line that can be written.
pub const TCP4_BYTES_MAX: usize = 56;
/// Longest TCP6 line that can be written.
pub const TCP6_BYTES_MAX: usize = 104;
/// `PROXY UNKNOWN` and CR LF, the shortest header of all.
pub const HEADER_BYTES_MIN: usize = UNKNOWN_LINE.len();

const UNKNOWN_LINE: &[u8] = b"PROXY UNKNOWN\r\n";
const PREFIX: &[u8] = b"PROXY ";
/// Shortest ends of a line from the second space on.
const TCP4_REST_MIN: usize = "0.0.0.0 0.0.0.0 0 0\r\n".len();
const TCP6_REST_MIN: usize = ":: :: 0 0\r\n".len();

/// Appends the line. Addresses that are not known are UNKNOWN in its short form: HAProxy refuses the long one.
/// Allocates only if `out` must grow; after an error `out` is as it was.
pub fn encode(out: &mut Vec<u8>, addresses: &Addresses) -> Result<(), EncodeError> {
    match *addresses {
        Addresses::Unknown | Addresses::Skipped { .. } => out.extend_from_slice(UNKNOWN_LINE),
        Addresses::Unix { .. } => return Err(EncodeError::V1Unix),
        Addresses::Inet { transport: Transport::Dgram, .. } => return Err(EncodeError::V1Dgram),
        Addresses::Inet { source, destination, transport: Transport::Stream } => {
            let mut line = Line::default();
            match (source.ip(), destination.ip()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    line.text(b"PROXY TCP4 ");
                    line.ipv4(source);
                    line.text(b" ");
                    line.ipv4(destination);
                }
                (source, destination) => {
                    line.text(b"PROXY TCP6 ");
                    line.ipv6(to_v6(source));
                    line.text(b" ");
                    line.ipv6(to_v6(destination));
                }
            }
            line.text(b" ");
            line.decimal(source.port());
            line.text(b" ");
            line.decimal(destination.port());
            line.text(b"\r\n");
            out.extend_from_slice(&line.bytes[..line.length]);
        }
    }
    Ok(())
}

/// A line under construction. `write!` takes several times as long, and every connection waits for its header.
struct Line {
    bytes: [u8; LINE_BYTES_MAX],
    length: usize,
}

impl Default for Line {
    fn default() -> Line {
        Line { bytes: [0; LINE_BYTES_MAX], length: 0 }
    }
}

impl Line {
    fn text(&mut self, text: &[u8]) {
        self.bytes[self.length..self.length + text.len()].copy_from_slice(text);
        self.length += text.len();
    }

    fn digit(&mut self, value: u16) {
        self.bytes[self.length] = b"0123456789abcdef"[usize::from(value & 15)];
        self.length += 1;
    }

    /// "must not have leading zeroes" (section 2.1)
    fn decimal(&mut self, value: u16) {
        for power in [10_000, 1000, 100, 10] {
            if value >= power {
                self.digit(value / power % 10);
            }
        }
        self.digit(value % 10);
    }

    fn hexadecimal(&mut self, value: u16) {
        for shift in [12, 8, 4] {
            if value >> shift != 0 {
                self.digit(value >> shift);
            }
        }
        self.digit(value);
    }

    fn ipv4(&mut self, ip: Ipv4Addr) {
        let [first, rest @ ..] = ip.octets();
        self.decimal(first.into());
        for octet in rest {
            self.text(b".");
            self.decimal(octet.into());
        }
    }

    /// As RFC 5952 says: the first of the longest runs of zeroes is `::`, a mapped address ends in IPv4's form.
    fn ipv6(&mut self, ip: Ipv6Addr) {
        if let Some(ipv4) = ip.to_ipv4_mapped() {
            self.text(b"::ffff:");
            return self.ipv4(ipv4);
        }
        let groups = ip.segments();
        let zeroes = longest_zeroes(&groups);
        if zeroes.len() < 2 {
            return self.groups(&groups);
        }
        self.groups(&groups[..zeroes.start]);
        self.text(b"::");
        self.groups(&groups[zeroes.end..]);
    }

    fn groups(&mut self, groups: &[u16]) {
        for (index, group) in groups.iter().enumerate() {
            if index > 0 {
                self.text(b":");
            }
            self.hexadecimal(*group);
        }
    }
}

/// The first of the longest runs of zeroes.
fn longest_zeroes(groups: &[u16; 8]) -> Range<usize> {
    let (mut longest, mut run) = (0..0, 0..0);
    for (index, group) in groups.iter().enumerate() {
        match group {
            0 => run.end = index + 1,
            _ => run = index + 1..index + 1,
        }
        if run.len() > longest.len() {
            longest = run.clone();
        }
    }
    longest
}

/// Reads a line; `bytes` begins with `P`.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    let outcome = line(&bytes[..bytes.len().min(LINE_BYTES_MAX)])?;
    match outcome {
        // More bytes than a line may have are needed to end it: nothing can make it valid any more.
        Decoded::Incomplete { needed } if bytes.len() + needed > LINE_BYTES_MAX => Err(DecodeError::V1TooLong),
        outcome => Ok(outcome),
    }
}

fn line(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    if let Some(at) = (0..bytes.len().min(PREFIX.len())).find(|&at| bytes[at] != PREFIX[at]) {
        return Err(DecodeError::V1Prefix { at, byte: bytes[at] });
    }
    let Some(rest) = bytes.get(PREFIX.len()..) else {
        return Ok(Decoded::Incomplete { needed: HEADER_BYTES_MIN - bytes.len() });
    };
    let tokens: [(&[u8], usize); 3] = [(b"TCP4 ", TCP4_REST_MIN), (b"TCP6 ", TCP6_REST_MIN), (b"UNKNOWN", 2)];
    let common = |token: &[u8]| rest.iter().zip(token).take_while(|(a, b)| a == b).count();
    if let Some((token, _)) = tokens.iter().find(|(token, _)| common(token) == token.len()) {
        let at = PREFIX.len() + token.len();
        return match *token {
            b"TCP4 " => inet::<Ipv4Addr>(bytes, at),
            b"TCP6 " => inet::<Ipv6Addr>(bytes, at),
            _ => unknown(bytes, at),
        };
    }
    let needed = tokens.iter().filter(|(token, _)| common(token) == rest.len()).map(|(token, min)| token.len() + min);
    match needed.min() {
        Some(whole) => Ok(Decoded::Incomplete { needed: whole - rest.len() }),
        None => {
            let at = tokens.iter().map(|(token, _)| common(token)).max().unwrap_or(0);
            Err(DecodeError::V1Protocol { at: PREFIX.len() + at, byte: rest[at] })
        }
    }
}

/// "the receiver must ignore anything presented before the CRLF" (section 2.1)
fn unknown(bytes: &[u8], at: usize) -> Result<Decoded, DecodeError> {
    match bytes.get(at) {
        Some(b' ' | b'\r') | None => {}
        Some(&byte) => return Err(DecodeError::V1Protocol { at, byte }),
    }
    let Some(end) = (at..bytes.len()).find(|&index| matches!(bytes[index], b'\r' | b'\n')) else {
        return Ok(Decoded::Incomplete { needed: 2 });
    };
    line_end(bytes, end, Addresses::Unknown)
}

/// One address family of TCP lines.
trait Family: std::str::FromStr + Into<IpAddr> {
    const EXPECTED: &'static str;
    /// The shortest address.
    const MIN: usize;
    /// What can make the start of an address a whole one, shortest first: the start is wrong if none of these does.
    const COMPLETIONS: &'static [&'static str];
}

impl Family for Ipv4Addr {
    const EXPECTED: &'static str = "an IPv4 address";
    const MIN: usize = "0.0.0.0".len();
    const COMPLETIONS: &'static [&'static str] = &["", "0", ".0", "0.0", ".0.0", "0.0.0", ".0.0.0", "0.0.0.0"];
}

impl Family for Ipv6Addr {
    const EXPECTED: &'static str = "an IPv6 address";
    const MIN: usize = "::".len();
    const COMPLETIONS: &'static [&'static str] = &["", "0", ":", "::", ".0", "0.0", ".0.0", "0.0.0"];
}

/// The four fields of TCP4 and TCP6, each ended by exactly one space, the last by CR LF.
fn inet<F: Family>(bytes: &[u8], at: usize) -> Result<Decoded, DecodeError> {
    const PORTS: usize = "0 0\r\n".len();
    let (source, at) = match address::<F>(bytes, at, "the source address")? {
        Field::Whole(ip, end) => (ip, end + 1),
        Field::Part { needed } => return Ok(Decoded::Incomplete { needed: needed + 1 + F::MIN + 1 + PORTS }),
    };
    let (destination, at) = match address::<F>(bytes, at, "the destination address")? {
        Field::Whole(ip, end) => (ip, end + 1),
        Field::Part { needed } => return Ok(Decoded::Incomplete { needed: needed + 1 + PORTS }),
    };
    let (source_port, at) = match port(bytes, at, "the source port", b' ')? {
        Field::Whole(port, end) => (port, end + 1),
        Field::Part { needed } => return Ok(Decoded::Incomplete { needed: needed + " 0\r\n".len() }),
    };
    let (destination_port, end) = match port(bytes, at, "the destination port", b'\r')? {
        Field::Whole(port, end) => (port, end),
        Field::Part { needed } => return Ok(Decoded::Incomplete { needed: needed + "\r\n".len() }),
    };
    let addresses = Addresses::Inet {
        source: SocketAddr::new(source, source_port),
        destination: SocketAddr::new(destination, destination_port),
        transport: Transport::Stream,
    };
    line_end(bytes, end, addresses)
}

/// The CR LF at `end`.
fn line_end(bytes: &[u8], end: usize, addresses: Addresses) -> Result<Decoded, DecodeError> {
    match (bytes[end], bytes.get(end + 1)) {
        (b'\r', Some(b'\n')) => {
            let header = Header { version: Version::V1, command: Command::Proxy, addresses, tlvs: Vec::new() };
            Ok(Decoded::Complete { header, len: end + 2 })
        }
        (b'\r', None) => Ok(Decoded::Incomplete { needed: 1 }),
        (b'\r', Some(&byte)) => Err(DecodeError::V1LineEnd { at: end + 1, byte }),
        (byte, _) => Err(DecodeError::V1LineEnd { at: end, byte }),
    }
}

enum Field<T> {
    /// The value, and where the byte that ends it stands.
    Whole(T, usize),
    /// At least so many more bytes belong to the field.
    Part { needed: usize },
}

/// The field at `at`, and the byte that ends it if it is there. A line end that is none of ours is its own error.
fn field(bytes: &[u8], at: usize, ends: u8) -> Result<(&[u8], Option<usize>), DecodeError> {
    let rest = bytes.get(at..).unwrap_or_default();
    match rest.iter().position(|byte| matches!(byte, b' ' | b'\r' | b'\n')) {
        None => Ok((rest, None)),
        Some(end) if rest[end] == ends || rest[end] == b' ' => Ok((&rest[..end], Some(at + end))),
        Some(end) => Err(DecodeError::V1LineEnd { at: at + end, byte: rest[end] }),
    }
}

fn address<F: Family>(bytes: &[u8], at: usize, name: &'static str) -> Result<Field<IpAddr>, DecodeError> {
    let (raw, end) = field(bytes, at, b' ')?;
    let text = String::from_utf8_lossy(raw);
    let parse = |tail: &str| format!("{text}{tail}").parse::<F>().ok();
    let found = match end {
        Some(end) => parse("").map(|ip| Field::Whole(ip.into(), end)),
        None => F::COMPLETIONS.iter().find(|tail| parse(tail).is_some()).map(|tail| Field::Part { needed: tail.len() }),
    };
    found.ok_or_else(|| DecodeError::V1Address { at, field: name, text: text.to_string(), expected: F::EXPECTED })
}

fn port(bytes: &[u8], at: usize, name: &'static str, ends: u8) -> Result<Field<u16>, DecodeError> {
    let (raw, end) = field(bytes, at, ends)?;
    let text = String::from_utf8_lossy(raw);
    let error = || DecodeError::V1Port { at, field: name, text: text.to_string() };
    // "must not have leading zeroes"; `parse` takes a sign.
    let plain = raw.iter().all(u8::is_ascii_digit) && !(raw.len() > 1 && raw[0] == b'0');
    match (end, raw) {
        (None, []) => Ok(Field::Part { needed: 1 }),
        _ if !plain => Err(error()),
        (None, _) => text.parse::<u16>().map(|_| Field::Part { needed: 0 }).map_err(|_| error()),
        (Some(end), _) if bytes[end] != ends => Err(DecodeError::V1LineEnd { at: end, byte: bytes[end] }),
        (Some(end), _) => text.parse().map(|port| Field::Whole(port, end)).map_err(|_| error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The line as the standard library formats it.
    fn formatted(source: SocketAddr, destination: SocketAddr) -> String {
        let (from, to) = (source.port(), destination.port());
        match (source.ip(), destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                format!("PROXY TCP4 {source} {destination} {from} {to}\r\n")
            }
            (source, destination) => {
                format!("PROXY TCP6 {} {} {from} {to}\r\n", to_v6(source), to_v6(destination))
            }
        }
    }

    #[track_caller]
    fn assert_formatted(source: SocketAddr, destination: SocketAddr) {
        let mut out = b"before".to_vec();
        encode(&mut out, &Addresses::Inet { source, destination, transport: Transport::Stream }).unwrap();
        let line = formatted(source, destination);
        assert_eq!(String::from_utf8(out).unwrap(), format!("before{line}"));
        assert!(line.len() <= if line.starts_with("PROXY TCP4") { TCP4_BYTES_MAX } else { TCP6_BYTES_MAX });
    }

    #[test]
    fn every_port_and_every_octet_is_written_as_the_standard_library_does() {
        for port in 0..=u16::MAX {
            let octet = (port >> 8) as u8;
            let source = SocketAddr::from(([octet, port as u8, !octet, 0], port));
            assert_formatted(source, SocketAddr::from(([255, 255, 255, 255], !port)));
        }
    }

    #[test]
    fn every_group_of_ipv6_is_written_as_the_standard_library_does() {
        let destination = SocketAddr::from(([0xffff; 8], u16::MAX));
        for group in 0..=u16::MAX {
            let mut groups = [0x2001, 0xdb8, 0, 0, 1, 0, 0, 1];
            groups[usize::from(group % 8)] = group;
            assert_formatted(SocketAddr::from((groups, 1)), destination);
        }
    }

    #[test]
    fn zeroes_anywhere_in_ipv6_are_written_as_the_standard_library_does() {
        // Mixed families and mapped addresses among them.
        let ipv4 = SocketAddr::from(([192, 0, 2, 1], 80));
        for zeroes in 0..=u8::MAX {
            for other in [1_u16, 0xffff] {
                let groups = std::array::from_fn(|index| if zeroes & 1 << index == 0 { other } else { 0 });
                let address = SocketAddr::from((groups, 443));
                assert_formatted(address, address);
                assert_formatted(ipv4, address);
                assert_formatted(address, ipv4);
            }
        }
    }

    proptest! {
        #[test]
        fn any_addresses_are_written_as_the_standard_library_does(
            ipv4: [[u8; 4]; 2],
            ipv6 in proptest::array::uniform2(proptest::array::uniform8(prop_oneof![Just(0), Just(0xffff), any::<u16>()])),
            ports: [u16; 2],
        ) {
            assert_formatted((ipv4[0], ports[0]).into(), (ipv4[1], ports[1]).into());
            assert_formatted((ipv6[0], ports[0]).into(), (ipv6[1], ports[1]).into());
            assert_formatted((ipv4[0], ports[0]).into(), (ipv6[1], ports[1]).into());
        }
    }
}
