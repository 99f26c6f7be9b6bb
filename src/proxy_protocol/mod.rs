//! The PROXY protocol, versions 1 and 2: what a header says, to bytes and back. Pure: no I/O, no clock.
//!
//! Sections are those of HAProxy's `proxy-protocol.txt`, revision 2026-04-27.

pub mod error;
pub mod tlv;
pub mod v1;
pub mod v2;

use std::net::{IpAddr, SocketAddr};

pub use error::{DecodeError, EncodeError};
pub use tlv::{SslTlv, Tlv};

/// Longest v2 header: 16 bytes and a 16-bit length (section 2.2).
pub const HEADER_BYTES_MAX: usize = 16 + 65_535;

/// Every receiver that was tried takes a header of this size; the first ones refuse or ignore longer ones at 256.
pub const HEADER_BYTES_SAFE: usize = 232;

/// Which version of the header is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Version {
    /// One line of text.
    V1,
    /// Binary, with TLVs.
    V2,
}

/// What the header asks of the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// The sender speaks for itself (a health check): use the connection's real addresses.
    Local,
    /// Use the addresses in the header.
    Proxy,
}

/// The transport nibble of a v2 header (section 2.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    /// TCP, or a UNIX stream.
    Stream,
    /// UDP, or a UNIX datagram.
    Dgram,
}

/// The two ends that a header names.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Addresses {
    /// Nothing is said: v1 UNKNOWN, v2 UNSPEC. The receiver uses the connection's own.
    Unknown,
    /// IPv4 or IPv6, both of one family after `Addresses::inet`.
    Inet {
        /// Who connected.
        source: SocketAddr,
        /// The address it connected to.
        destination: SocketAddr,
        /// TCP or UDP.
        transport: Transport,
    },
    /// UNIX socket paths (decoded only), 108 bytes each at most, without trailing zeros.
    Unix {
        /// Path of the client's socket.
        source: Vec<u8>,
        /// Path of the server's socket.
        destination: Vec<u8>,
        /// Stream or datagram.
        transport: Transport,
    },
    /// What a v2 header carried that the receiver must skip (decoded only): the family and addresses of LOCAL, or of a
    /// family or transport UNSPEC. Means the same as `Unknown`; kept so that the header can be written again.
    Skipped {
        /// Byte 14 of the header.
        family: u8,
        /// What stood before the TLVs.
        bytes: Vec<u8>,
    },
}

/// One header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// v1 or v2.
    pub version: Version,
    /// LOCAL or PROXY; v1 knows PROXY only.
    pub command: Command,
    /// The ends.
    pub addresses: Addresses,
    /// In the order written; always empty for v1.
    pub tlvs: Vec<Tlv>,
}

/// What the bytes so far are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decoded {
    /// A whole header.
    Complete {
        /// What it says.
        header: Header,
        /// Its length; what follows is the client's.
        len: usize,
    },
    /// The beginning of a header that may still become a valid one.
    Incomplete {
        /// At least this many more bytes are to come.
        needed: usize,
    },
}

impl Addresses {
    /// The addresses of one connection, made one family: both IPv4 or IPv4-mapped become IPv4; of a mixed pair the IPv4
    /// one becomes `::ffff:a.b.c.d`. Flow labels and scopes, which no header can carry, are dropped.
    pub fn inet(source: SocketAddr, destination: SocketAddr, transport: Transport) -> Addresses {
        let (from, to) = match (source.ip().to_canonical(), destination.ip().to_canonical()) {
            (from @ IpAddr::V4(_), to @ IpAddr::V4(_)) => (from, to),
            (from, to) => (IpAddr::V6(to_v6(from)), IpAddr::V6(to_v6(to))),
        };
        Addresses::Inet {
            source: SocketAddr::new(from, source.port()),
            destination: SocketAddr::new(to, destination.port()),
            transport,
        }
    }

    /// Source and destination, where the header names IP addresses.
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        match *self {
            Addresses::Inet { source, destination, .. } => Some((source, destination)),
            _ => None,
        }
    }
}

/// As IPv6, an IPv4 one as `::ffff:a.b.c.d`.
fn to_v6(ip: IpAddr) -> std::net::Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

impl Header {
    /// v2 LOCAL: the sender speaks for itself.
    pub fn local(tlvs: Vec<Tlv>) -> Header {
        Header { version: Version::V2, command: Command::Local, addresses: Addresses::Unknown, tlvs }
    }

    /// PROXY with these addresses. TLVs belong to v2 alone; see `encode`.
    pub fn proxy(version: Version, addresses: Addresses, tlvs: Vec<Tlv>) -> Header {
        Header { version, command: Command::Proxy, addresses, tlvs }
    }

    /// Appends the header. After an error `out` is as it was.
    ///
    /// A v2 header that was decoded is written byte for byte as it came, but for one thing: PROXY without addresses,
    /// which many receivers refuse, becomes LOCAL, which means the same to those that don't.
    pub fn encode(&self, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        match self.version {
            Version::V1 if self.command == Command::Local => Err(EncodeError::V1Local),
            Version::V1 if !self.tlvs.is_empty() => Err(EncodeError::V1Tlvs { count: self.tlvs.len() }),
            Version::V1 => v1::encode(out, &self.addresses),
            Version::V2 => {
                let mut tlvs = Vec::new();
                for tlv in &self.tlvs {
                    tlv.encode(&mut tlvs)?;
                }
                v2::encode_with(out, self.command, &self.addresses, &[&tlvs])
            }
        }
    }
}

/// Bytes of a PROXY header for IP addresses: exact for v2, the longest possible line for v1.
pub fn encoded_len(version: Version, ipv6: bool, tlvs: &[Tlv]) -> usize {
    match version {
        Version::V1 if ipv6 => v1::TCP6_BYTES_MAX,
        Version::V1 => v1::TCP4_BYTES_MAX,
        Version::V2 => {
            let addresses = if ipv6 { v2::INET6_BYTES } else { v2::INET_BYTES };
            v2::PREFIX_BYTES + addresses + tlvs.iter().map(Tlv::encoded_len).sum::<usize>()
        }
    }
}

/// Reads the header at the start of `bytes`. Answers `Incomplete` only as long as more bytes can still make it valid.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    match bytes.first() {
        None => Ok(Decoded::Incomplete { needed: v1::HEADER_BYTES_MIN }),
        Some(b'P') => v1::decode(bytes),
        Some(&first) if first == v2::SIGNATURE[0] => v2::decode(bytes),
        Some(&byte) => Err(DecodeError::NoHeader { byte }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a hex text with spaces and `"quoted text"`.
    fn hex(text: &str) -> Vec<u8> {
        text.split('"')
            .enumerate()
            .flat_map(|(index, part)| match index % 2 {
                1 => part.as_bytes().to_vec(),
                _ => {
                    let digits: String = part.chars().filter(char::is_ascii_hexdigit).collect();
                    let byte = |at: usize| u8::from_str_radix(&digits[at..at + 2], 16).expect("hex digits");
                    (0..digits.len()).step_by(2).map(byte).collect()
                }
            })
            .collect()
    }

    fn complete(bytes: &[u8]) -> Header {
        match decode(bytes) {
            Ok(Decoded::Complete { header, len }) if len == bytes.len() => header,
            other => panic!("{other:?}"),
        }
    }

    fn encoded(header: &Header) -> Vec<u8> {
        let mut out = Vec::new();
        header.encode(&mut out).expect("a header that can be written");
        out
    }

    fn tcp(source: &str, destination: &str) -> Addresses {
        let address = |text: &str| text.parse().expect("an address");
        Addresses::inet(address(source), address(destination), Transport::Stream)
    }

    /// A header, its bytes, and the other way round.
    fn pins(header: Header, bytes: &[u8]) {
        assert_eq!(complete(bytes), header);
        assert_eq!(encoded(&header), bytes);
    }

    const SIGNATURE: &str = "0d0a0d0a000d0a515549540a";

    #[test]
    fn vector_tcp4_v1() {
        let addresses = tcp("198.51.100.22:35646", "203.0.113.7:80");
        pins(Header::proxy(Version::V1, addresses, vec![]), b"PROXY TCP4 198.51.100.22 203.0.113.7 35646 80\r\n");
    }

    #[test]
    fn vector_tcp4_v2() {
        let bytes = hex(&format!("{SIGNATURE} 21 11 000c c0a864c8 c0a864c9 d86f 1f90"));
        assert_eq!(bytes.len(), 28);
        pins(Header::proxy(Version::V2, tcp("192.168.100.200:55407", "192.168.100.201:8080"), vec![]), &bytes);
    }

    #[test]
    fn vector_aws_private_link() {
        let bytes = hex(&format!(
            "{SIGNATURE} 21 11 0054 ac1f0771 ac1f0a1f c8f2 0050 | 03 0004 e8d6892d | ea 0017 01 \"vpce-08d2bf15fac5001c9\" \
             | 04 0024 {}",
            "00".repeat(36)
        ));
        assert_eq!(bytes.len(), 100);
        let vpce = Tlv::AwsVpcEndpoint("vpce-08d2bf15fac5001c9".into());
        let tlvs = vec![Tlv::Crc32c, vpce, Tlv::Noop(vec![0; 36])];
        pins(Header::proxy(Version::V2, tcp("172.31.7.113:51442", "172.31.10.31:80"), tlvs), &bytes);
    }

    #[test]
    fn vector_aws_health_check() {
        let bytes = hex(&format!("{SIGNATURE} 20 11 0054 | 03 0004 bce5951f | 04 004a {}", "00".repeat(74)));
        assert_eq!(bytes.len(), 100);
        let mut header = Header::local(vec![Tlv::Crc32c, Tlv::Noop(vec![0; 74])]);
        header.addresses = Addresses::Skipped { family: 0x11, bytes: vec![] };
        pins(header, &bytes);
    }
}
