//! Version 1: one line of text (section 2.1).

use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

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
            let (from, to) = (source.port(), destination.port());
            let written = match (source.ip(), destination.ip()) {
                (IpAddr::V4(source), IpAddr::V4(destination)) => {
                    write!(out, "PROXY TCP4 {source} {destination} {from} {to}\r\n")
                }
                (source, destination) => {
                    write!(out, "PROXY TCP6 {} {} {from} {to}\r\n", to_v6(source), to_v6(destination))
                }
            };
            written.expect("writing to a Vec cannot fail");
        }
    }
    Ok(())
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
